"""The orthogonal factor of a matrix, nearly, in the same bits on every machine.

Newton-Schulz is made of matrix products, and a BLAS adds in whatever order it likes. Here every operand lies on one
grid of step h = 2^-25, so that each product of two entries is a whole number of h^2, and all the products that make up
one entry of a result have absolute values that sum to less than 2^52 h^2. Every partial sum, in any order, with or
without FMA, on any number of threads, is then a float64 without rounding.

Proof, with |.| the spectral norm, which bounds the length of every row and column; e = h/2 = 2^-26; r rows, c columns,
r <= c, r c <= 2^32, so r and sqrt(r c) are at most 2^16. Rounding an (m, n) matrix to the grid adds an error of norm
at most sqrt(m n) e, which is at most 2^-10. One iteration maps the singular values by p(s) = P s + Q s^3 + R s^5.

- Claim: |X| <= 1.22 at every stage. At the start |X| <= Frobenius norm <= 1 + 2^-14 + 2^-10 (2^-14: see `_norm`).
- A = X X' has |A| <= 1.4884; rounded, 1.4894. Its error moves B by at most (|Q| + R (1.4884 + 1.4894)) r e = 10.9 r e.
- B = Q A + R A^2: Q u + R u^2 lies in [-2.806, 0.005] for u in [-2^-10, 1.4894], so |B| <= 2.807 once rounded.
- P X + B X: |p| <= 1.2024 on [0, 1.22]; the errors of A, of B and of the last rounding add at most
  1.22 * 10.9 r e + 1.22 r e + sqrt(r c) e <= 15.6 * 2^-10 < 0.0153, and 1.2024 + 0.0153 < 1.22: the claim goes on.
- By Cauchy-Schwarz the absolute products of one entry sum to at most the length of the row times that of the column:
  X X': 1.22^2 < 1.49; A A: 1.4894^2 < 2.22; B X: 2.807 * 1.22 < 3.43. All are below 4 = 2^52 h^2.

(The elementwise steps in float64 err by less than 2^-49, which the figures above absorb.) The size of the matrix thus
enters only through the rounding errors, and a coarser grid would enlarge those: beyond 2^32 entries there is no proof.
"""

import math

import torch
from torch import Tensor

P, Q, R = 3.4445, -4.7750, 2.0315  # Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024
ITERATIONS = 5
GRID_BITS = 25
LARGEST = 2**32  # entries the proof covers
NORM_BITS = 30


@torch.no_grad()
def orthogonalised(matrix: Tensor) -> Tensor:
    """`matrix` with its singular values moved near 1: float32 (rows, columns) to float32 of the same shape and device.

    Singular values above 0.002 of the Frobenius norm end between about 0.68 and 1.2, smaller ones lower; a matrix of
    zeros stays zero. The input may have any strides and is not written to; the result is contiguous. A transposed
    matrix gives the transposed result, a square one up to the rounding to the grid.

    Raises ValueError for what is not a float32 matrix, has more than 2^32 entries, or holds an entry that is not
    finite. A device without float64 (Apple's MPS) has the work done on the CPU.
    """
    if matrix.ndim != 2 or matrix.dtype != torch.float32:
        raise ValueError(f"only float32 matrices can be orthogonalised, not {matrix.dtype} {tuple(matrix.shape)}")
    if matrix.numel() > LARGEST:
        raise ValueError(f"{tuple(matrix.shape)} has more entries than can be orthogonalised exactly ({LARGEST})")
    if matrix.device.type == "mps":
        return orthogonalised(matrix.cpu()).to(matrix.device)
    rows, columns = matrix.shape
    tall = rows > columns  # then the transpose has the smaller Gram matrix
    x = (matrix.T if tall else matrix).double()
    peak = float(x.abs().amax()) if x.numel() else 0.0
    if not math.isfinite(peak):
        raise ValueError("a matrix with an entry that is not finite cannot be orthogonalised")
    if peak == 0.0:
        return torch.zeros(rows, columns, device=matrix.device)
    x *= 2.0 ** (NORM_BITS - math.frexp(peak)[1])  # exact, and now every entry is below 2^30
    x = _on_grid(x * (1.0 / _norm(x)))  # not x / norm: CUDA divides by a number through its reciprocal
    for _ in range(ITERATIONS):
        gram = _on_grid(_product(x, x.T))
        polynomial = _on_grid(gram * Q + _product(gram, gram) * R)
        x = _on_grid(x * P + _product(polynomial, x))
    x += 0.0  # turns -0, whose sign the order of a sum may decide, into 0
    return (x.T if tall else x).float().contiguous()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product, exact by the proof above."""
    return left @ right


def _on_grid(values: Tensor) -> Tensor:
    """Float64 `values`, overwritten by the nearest multiples of 2^-25, ties to even."""
    return values.mul_(2.0**GRID_BITS).round_().mul_(2.0**-GRID_BITS)


def _norm(values: Tensor) -> float:
    """Frobenius norm of `values`, float64 below 2^30 with a largest one of 2^29 or more, each rounded to an integer.

    Squares fill up to 60 bits. Their halves of 30 bits are summed apart, at most 2^32 of them, so that int64 holds
    either sum. Rounding moves the norm by at most sqrt(2^32) / 2, which is 2^-14 of 2^29.
    """
    integers = values.round().to(torch.int64)
    squares = integers * integers
    high, low = int((squares >> NORM_BITS).sum()), int((squares & (2**NORM_BITS - 1)).sum())
    return math.sqrt((high << NORM_BITS) + low)
