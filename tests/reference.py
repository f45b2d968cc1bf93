"""Plain twins of zofed's arithmetic, slow and written from the papers, for the tests to compare with."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 in Python integers (Salmon et al., SC 2011, section 3.3)."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
    return x0, x1, x2, x3


def sign_stream(seed: int, tensor: int, component: int, count: int) -> list[int]:
    """Signs in the layout the journal's format fixes: block by block, word by word, lowest bit first, 1 is +1."""
    entries: list[int] = []
    block = 0
    while len(entries) < count:
        counter = (block, component, tensor % 2**32, tensor // 2**32)
        for word in philox4x32(counter, (seed % 2**32, seed // 2**32)):
            entries += [1 if word >> bit & 1 else -1 for bit in range(32)]
        block += 1
    return entries[:count]


def normal_stream(seed: int, tensor: int, count: int) -> list[int]:
    """Normal quantiles in units of 2^-16, one for each 16 bits: block by block, word by word, the lower half first."""
    inverse = statistics.NormalDist().inv_cdf
    entries: list[int] = []
    block = 0
    while len(entries) < count:
        counter = (block, 0, tensor % 2**32, tensor // 2**32)
        for word in philox4x32(counter, (seed % 2**32, seed // 2**32)):
            entries += [round(65536 * inverse((half + 0.5) / 65536)) for half in (word % 65536, word // 65536)]
        block += 1
    return entries[:count]


def sgd(weight: Array, gradients: Sequence[Array], rate: float, momentum: float, decay: float) -> list[Array]:
    """Weights after each step of heavy-ball SGD (Polyak, 1964) with decoupled weight decay."""
    velocity, path = np.zeros_like(weight), []
    for gradient in gradients:
        velocity = np.float32(momentum) * velocity + gradient
        weight = (np.float32(1 - rate * decay) * weight - np.float32(rate) * velocity).astype(np.float32)
        path.append(weight)
    return path


def adamw(weight: Array, gradients: Sequence[Array], rate: float, decay: float) -> list[Array]:
    """Weights after each step of AdamW (Loshchilov and Hutter, ICLR 2019, algorithm 2)."""
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    mean, square, path = np.zeros_like(weight), np.zeros_like(weight), []
    for t, gradient in enumerate(gradients, start=1):
        mean = np.float32(beta1) * mean + np.float32(1 - beta1) * gradient
        square = np.float32(beta2) * square + np.float32(1 - beta2) * gradient**2
        step = (mean / np.float32(1 - beta1**t)) / (np.sqrt(square / np.float32(1 - beta2**t)) + np.float32(epsilon))
        weight = (weight - np.float32(rate) * step - np.float32(rate * decay) * weight).astype(np.float32)
        path.append(weight)
    return path


def newton_schulz(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Five iterations towards the orthogonal factor (Jordan et al., "Muon", 2024), a tall matrix by its transpose."""
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T).T
    x = matrix / np.sqrt((matrix**2).sum())
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def mudamw(
    weight: Array,
    gradients: Sequence[Array],
    rate: float,
    decay: float,
    is_orthogonal: bool,
    is_cautious: bool,
) -> list[NDArray[np.float64]]:
    """Weights after each step of MuDaMW, in float64 throughout: AdamW's step with epsilon 1e-6, without the entries
    that point up the gradient (the others scaled by size / (kept + 1)), then orthogonalised, 0.2 sqrt(longer side)."""
    beta1, beta2, epsilon = 0.9, 0.999, 1e-6
    wide = weight.astype(np.float64)
    mean, square, path = np.zeros_like(wide), np.zeros_like(wide), []
    for t, gradient in enumerate((gradient.astype(np.float64) for gradient in gradients), start=1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        step = (mean / (1 - beta1**t)) / (np.sqrt(square / (1 - beta2**t)) + epsilon)
        if is_cautious:
            mask = (step * gradient > 0).astype(np.float64)
            step = step * mask * (mask.size / (mask.sum() + 1))
        if is_orthogonal:
            step = newton_schulz(step) * 0.2 * max(step.shape) ** 0.5
        wide = wide - rate * step - rate * decay * wide
        path.append(wide)
    return path


def core_sum(core: Sequence[Sequence[int]], seeds: Sequence[int], tensor: int, shape: Sequence[int]) -> list[list[int]]:
    """Sum over all pairs of core_ij * (left factor of seed i) (right factor of seed j)^T in Python integers.

    Row by row; a tensor of one dimension or none has one product an entry, and counts as one row.
    """
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape),) * 2
    left = [sign_stream(seed, tensor, 0, rows) for seed in seeds]
    right = [sign_stream(seed, tensor, 1, columns) for seed in seeds]

    def entry(row: int, column: int) -> int:
        return sum(core[i][j] * left[i][row] * right[j][column] for i in range(len(seeds)) for j in range(len(seeds)))

    if len(shape) > 1:
        return [[entry(row, column) for column in range(columns)] for row in range(rows)]
    return [[entry(at, at) for at in range(rows)]]


def fewest(values: Sequence[float], share: float) -> float:
    """The size of the smallest of the fewest largest entries that hold `share` of the square sum; by sorting."""
    ordered = sorted((abs(value) for value in values), reverse=True)
    wanted, reached = share * math.fsum(value * value for value in ordered), 0.0
    for value in ordered:
        reached += value * value
        if reached >= wanted:
            return value
    return ordered[-1]


def guided(
    kind: str,
    weighting: str,
    guide: NDArray[np.float64],
    noise: NDArray[np.float64],
    gradient: NDArray[np.float64],
    scale: float,
    cosine: float,
) -> NDArray[np.float64]:
    """The guided estimate of a linear loss with this gradient, from all directions written out: v_i = g_S + sigma n_i.

    noise: unit noise (queries, size). The formulas of the design: raw mean(s v), projected the same over mean |v|^2,
    unbiased s/|g_S|^2 g_S + sum (s_i - s) n_i / (sigma (q - 1)) off S; the kind cosine takes away what overlaps g.
    """
    kept = np.abs(guide) >= (0.0 if kind == "cosine" else fewest(guide.tolist(), cosine**2))
    part = guide * kept
    ratio = math.tan(math.acos(cosine)) if kind == "cosine" else scale
    sigma = ratio * math.sqrt((guide**2).sum() / guide.size)
    drawn = noise * ~kept if kind == "hybrid" else noise
    noisy = int((~kept).sum()) if kind == "hybrid" else guide.size
    along = part + sigma * drawn
    slopes = along @ gradient
    if weighting == "unbiased":
        rest = ((slopes - slopes.mean()) @ drawn) / (sigma * (len(noise) - 1))
        rest = rest - (rest @ guide) / (guide @ guide) * guide if kind == "cosine" else rest * ~kept
        return slopes.mean() / (part @ part) * part + rest
    mean = (slopes @ along) / len(noise)
    return mean if weighting == "raw" else mean / (part @ part + sigma**2 * noisy)
