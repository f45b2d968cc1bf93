"""Newton-Schulz must come near the orthogonal factor, and every product in it must be exact, whoever computes it."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zofed.core import orthogonal
from zofed.core.orthogonal import orthogonalised

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(1, 1), (1, 9), (9, 1), (8, 8), (5, 7), (13, 4), (24, 24), (12, 60)]
H = 2.0**-orthogonal.GRID_BITS
# What the proof in the module allows the absolute products of one entry to sum to: X X', A A and B X in turn.
BOUNDS = (1.49, 2.22, 3.43)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(rows: int, columns: int, values: Tensor) -> Tensor:
    left, _ = torch.linalg.qr(drawn(rows, len(values), seed=1).double())
    right, _ = torch.linalg.qr(drawn(columns, len(values), seed=2).double())
    return ((left * values) @ right.T).float()


def low_rank() -> Tensor:
    return drawn(80, 3) @ drawn(3, 120, seed=1) + 0.1 * drawn(80, 120, seed=2)


def hadamard(rows: int, columns: int) -> Tensor:
    """+-1 with orthogonal rows (Sylvester); both sizes are powers of two."""
    signs = torch.ones(1, 1)
    while len(signs) < columns:
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    return signs[:rows].contiguous()


MATRICES: dict[str, Callable[[], Tensor]] = {
    "random": lambda: drawn(96, 200),
    "square": lambda: drawn(64, 64),
    "tall": lambda: drawn(150, 40),
    "heavy-tailed": lambda: drawn(60, 90) ** 5,
    "low rank and noise": low_rank,
    "ill-conditioned": lambda: with_singular_values(60, 100, torch.logspace(0, -6, 60).double()),
    "equal entries": lambda: torch.full((64, 2048), 0.3),
    "one row of equal entries": lambda: torch.ones(1, 2048),
    "signs": lambda: hadamard(256, 2048),
    "signs with one strong row": lambda: hadamard(64, 2048) * torch.tensor([9.0] + [1.0] * 63)[:, None],
    "identity": lambda: torch.eye(50),
    "one great entry": lambda: drawn(64, 2048) + 3e4 * torch.eye(64, 2048) * (torch.arange(2048) == 0),
    "zeros of either sign": lambda: torch.tensor([[-0.0, 0.0, -0.0], [-0.0, 1.0, -0.5]]),
}


def plain(matrix: Tensor) -> NDArray[np.float64]:
    """Newton-Schulz without a grid (Jordan et al., "Muon", 2024), in float64."""
    x = matrix.numpy().astype(np.float64)
    x /= np.sqrt((x**2).sum())
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Unlike torch.equal, tells -0 from 0."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}[left.dtype]
    return torch.equal(left.contiguous().view(whole), right.contiguous().view(whole))


def relative(found: Tensor, expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


# --- what it computes ---


@pytest.mark.parametrize("name", MATRICES)
def test_the_grid_changes_little(name: str) -> None:
    matrix = MATRICES[name]()
    # Measured: 2.7e-4 with one great entry, beside which the grid is coarse; else 5e-5 at most, mostly below 6e-6.
    assert relative(orthogonalised(matrix), plain(matrix)) < (4e-4 if name == "one great entry" else 6e-5)


@pytest.mark.parametrize("name", MATRICES)
def test_singular_values_come_near_one_and_follow_the_polynomial(name: str) -> None:
    matrix = MATRICES[name]().double()
    before = torch.linalg.svdvals(matrix / matrix.norm())
    after = torch.linalg.svdvals(orthogonalised(matrix.float()).double())
    assert after[: int((before > 0.002).sum())].min() > 0.65
    assert after.max() < 1.25
    for _ in range(5):
        before = 3.4445 * before - 4.7750 * before**3 + 2.0315 * before**5
    assert float((after.sort()[0] - before.sort()[0]).abs().max()) < 1e-4


# --- its bits ---


def exact(matrix: Tensor) -> NDArray[np.float32]:
    """The same algorithm with every product and every rounding to the grid in fractions."""

    def to_grid(value: Fraction | float) -> Fraction:
        return Fraction(round(Fraction(value) * 2**25), 2**25)

    def to_float(value: Fraction) -> float:
        assert Fraction(float(value)) == value, "a product would need more than 53 bits"
        return float(value)

    on_grid, real = np.vectorize(to_grid, otypes=[object]), np.vectorize(to_float, otypes=[np.float64])
    values = matrix.numpy().astype(np.float64)
    scaled = values * 2.0 ** (30 - math.frexp(np.abs(values).max())[1])
    norm = math.sqrt(sum(round(entry) ** 2 for entry in scaled.flatten().tolist()))
    x = on_grid(scaled * (1 / norm))
    for _ in range(5):
        gram = on_grid(x @ x.T)
        polynomial = on_grid(real(gram) * -4.7750 + real(gram @ gram) * 2.0315)
        x = on_grid(real(x) * 3.4445 + real(polynomial @ x))
    return real(x).astype(np.float32)


@pytest.mark.first(6)
@pytest.mark.parametrize("power", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_exact_fractions(shape: tuple[int, int], power: int) -> None:
    matrix = drawn(*shape) ** power
    wide = matrix if shape[0] <= shape[1] else matrix.T
    expected = torch.from_numpy(exact(wide))
    assert same_bits(orthogonalised(matrix), expected if shape[0] <= shape[1] else expected.T)


def test_the_norm_is_exact() -> None:
    """The squares sum to 4^29, beyond what float64 can add up; the least error in the norm would then break the ties.

    Over the norm, 2^29, one entry in 16 lies halfway between two points of the grid.
    """
    entries = torch.randint(-(2**24), 2**24, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    rest = 4**29 - sum(entry**2 for entry in entries)
    while rest:
        entries.append(min(math.isqrt(rest), 2**24 - 1))
        rest -= entries[-1] ** 2
    matrix = torch.tensor([entries], dtype=torch.float32)
    operands, _ = spied(matrix)
    assert operands[0][0][0].tolist() == [round(Fraction(entry, 16)) * H for entry in entries]


@pytest.mark.parametrize("power", [1, 9])
def test_the_norm_is_that_of_the_rounded_entries(power: int) -> None:
    values = drawn(70, 90).double() ** power
    values *= 2.0 ** (30 - math.frexp(float(values.abs().max()))[1])
    expected = math.sqrt(sum(round(entry) ** 2 for entry in values.flatten().tolist()))
    assert orthogonal._norm(values) == expected
    assert orthogonal._norm(torch.full((64, 512), 2.0**30)) == 2.0**30 * math.sqrt(64 * 512)


Product = Callable[[Tensor, Tensor], Tensor]


def spied(matrix: Tensor, product: Product = torch.matmul) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The operands of every product, which `product` computes, and the result."""
    operands: list[tuple[Tensor, Tensor]] = []

    def spy(left: Tensor, right: Tensor) -> Tensor:
        operands.append((left.clone(), right.clone()))
        return product(left, right)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orthogonal, "_product", spy)
        result = orthogonalised(matrix)
    return operands, result


@pytest.mark.parametrize("name", MATRICES)
def test_no_partial_sum_of_a_product_can_round(name: str) -> None:
    matrix = MATRICES[name]()
    operands, _ = spied(matrix)
    assert len(operands) == 15
    for index, (left, right) in enumerate(operands):
        assert left.dtype == right.dtype == torch.float64 and len(left) == min(matrix.shape)
        for operand in (left, right):
            assert torch.equal((operand / H).round() * H, operand), "off the grid"
        largest = float((left.abs() @ right.abs()).max())
        assert largest / H**2 < 2**53
        assert largest < BOUNDS[index % 3]
        if index % 3 == 0:
            assert float(torch.linalg.matrix_norm(left, 2)) < 1.22


def shuffled(left: Tensor, right: Tensor) -> Tensor:
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    return left[:, order] @ right[order]


def in_blocks(left: Tensor, right: Tensor) -> Tensor:
    return sum((left[:, i : i + 7] @ right[i : i + 7] for i in range(0, len(right), 7)), torch.zeros(()).double())


def backwards(left: Tensor, right: Tensor) -> Tensor:
    """One outer product after the other, from the last to the first, with no zero to start from."""
    total = left[:, -1:] * right[-1:]
    for index in reversed(range(len(right) - 1)):
        total = total + left[:, index : index + 1] * right[index : index + 1]
    return total


@pytest.mark.parametrize("product", [shuffled, in_blocks, backwards])
@pytest.mark.parametrize("name", ["random", "square", "tall", "heavy-tailed", "zeros of either sign"])
def test_products_in_any_order_give_the_same_bits(name: str, product: Product) -> None:
    matrix = MATRICES[name]()
    operands, result = spied(matrix)
    assert all(torch.equal(left @ right, product(left, right)) for left, right in operands)
    assert same_bits(spied(matrix, product)[1], result)


def test_elementwise_steps_multiply_and_add_apart() -> None:
    """A fused step, or a division by a number, rounds otherwise on some devices: too seldom to be seen in the bits."""
    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__.rstrip("_"))
            assert not kwargs or kwargs.keys() == {"dtype"}, f"{func} with {kwargs}"
            return func(*args, **(kwargs or {}))

    matrix = drawn(9, 5)
    with Watch():
        orthogonalised(matrix)
    once_rounded = {"mul", "add", "round", "_to_copy"}
    exact_ = {"mm", "abs", "amax", "sum", "__rshift", "bitwise_and", "permute", "clone", "_local_scalar_dense"}
    assert once_rounded <= seen <= once_rounded | exact_


def test_two_threads_give_the_bits_of_one() -> None:
    matrix = drawn(300, 700)
    alone = orthogonalised(matrix)
    torch.set_num_threads(2)
    assert same_bits(orthogonalised(matrix), alone)


def test_a_transposed_matrix_gives_the_transposed_result() -> None:
    for shape in ((1, 9), (13, 4), (40, 150)):
        matrix = drawn(*shape)
        assert same_bits(orthogonalised(matrix.T.contiguous()), orthogonalised(matrix).T)
    square = drawn(64, 64)
    assert relative(orthogonalised(square.T), orthogonalised(square).T.double().numpy()) < 1e-5


def test_a_power_of_two_makes_no_difference() -> None:
    matrix = drawn(20, 30)
    assert all(same_bits(orthogonalised(matrix * 2.0**power), orthogonalised(matrix)) for power in (-90, -3, 1, 90))


# What stands in for other machines: other vector units, another code path in the BLAS; and other thread counts.
MACHINES = [{"ATEN_CPU_CAPABILITY": units} for units in ("default", "avx2", "avx512")] + [{"MKL_CBWR": "COMPATIBLE"}]

DIGESTS = """
import hashlib, torch
from zofed.core.orthogonal import orthogonalised
for threads in (1, 2):
    torch.set_num_threads(threads)
    for shape in ((256, 1024), (700, 300)):
        matrix = torch.randint(-2**20, 2**20, shape, generator=torch.Generator().manual_seed(0)).float()
        print(shape, hashlib.sha256(orthogonalised(matrix).numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_every_kind_of_machine_gives_one_digest() -> None:
    digests = set()
    for machine in MACHINES:
        command = [sys.executable, "-c", DIGESTS]
        told = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | machine)
        assert len(told.stdout.splitlines()) == 4, f"{machine}: {told.stdout}{told.stderr}"
        digests |= set(told.stdout.splitlines())
    assert len(digests) == 2, f"one for each shape expected: {digests}"


# --- edges ---


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (6, 4), (0, 3), (3, 0)], ids=str)
def test_zeros_stay_zeros(shape: tuple[int, int]) -> None:
    assert same_bits(orthogonalised(-torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30, 3e38])
def test_entries_may_be_tiny_or_huge(scale: float) -> None:
    signs = hadamard(4, 8)
    found = orthogonalised(signs * scale)
    assert relative(found, plain(signs)) < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)], ids=str)
def test_a_vector_becomes_a_unit_vector_nearly(shape: tuple[int, int]) -> None:
    vector = drawn(*shape)
    found = orthogonalised(vector)
    assert 0.65 < float(found.norm()) < 1.25
    assert torch.allclose(found / found.norm(), vector / vector.norm(), atol=1e-6)


def test_strides_do_not_matter_and_the_input_stays_as_it_was() -> None:
    storage = drawn(40, 60)
    copy = storage.clone()
    for view in (storage[::2, 1::3], storage[:, ::2].T, storage[3:5], storage[0].expand(5, 60)):
        found = orthogonalised(view)
        assert found.is_contiguous() and found.dtype == torch.float32
        assert same_bits(found, orthogonalised(view.clone(memory_format=torch.contiguous_format)))
        assert same_bits(storage, copy)
    weight = torch.nn.Parameter(storage)
    assert not orthogonalised(weight).requires_grad


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3)], ids=str)
def test_an_entry_that_is_not_finite_is_refused(entry: float, shape: tuple[int, int]) -> None:
    matrix = drawn(*shape)
    matrix[-1, 0] = entry
    with pytest.raises(ValueError, match="not finite"):
        orthogonalised(matrix)


@pytest.mark.parametrize("matrix", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(2, 2).double(), torch.tensor(1.0)])
def test_what_is_no_float32_matrix_is_refused(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="float32 matrices"):
        orthogonalised(matrix)


def test_a_matrix_beyond_the_proof_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly"):
        orthogonalised(torch.ones(1, 1).expand(2**16, 2**16 + 1))
