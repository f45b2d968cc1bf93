"""A seed names a direction, the same on every machine.

A direction z is a pure function of (seed, tensor, element). Its bits come from the counter-based generator
Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), computed in
integers, and its entries are integers too (+1 and -1, small sums of them, or a fixed table of normal quantiles), so no
rounding, no device and no thread count can change it. The global random state of Python, numpy or torch is never read
or written.

Layout, fixed by the journal's format:
    key      the direction's 64-bit seed, low word first
    counter  (block, component, tensor id low word, tensor id high word)
    bits     block by block, word by word, least significant bit first; a set bit is +1, a clear one -1
    halves   of each word the lower first: the index of a gaussian entry in the table of normal quantiles
    component 0 for dense entries; 2j and 2j+1 for the factors a and b of rank term j (a alone for a vector)
"""

import hashlib
import statistics
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zofed.base.errors import UserError
from zofed.core.kinds import Kind, terms

GENERATOR = "philox4x32-10/1"  # part of every journal's genesis: another stream must have another name

Factors = tuple[Tensor, ...]  # of one tensor's directions: (a, b) of a matrix, (z,) of a vector
DRAWN_TOGETHER = 2**22  # entries; one run of the generator costs as much as 10,000 of them

LARGEST_COEFFICIENT = 2**24  # float32 holds every integer up to here
LARGEST_SUM = 2**53  # and float64 up to here

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and torch.compile put these before the model's own names


def philox(counter: Sequence[NDArray[np.uint64]], key: Sequence[NDArray[np.uint64]]) -> tuple[NDArray[np.uint64], ...]:
    """Ten rounds of Philox4x32 on every block of broadcast shape.

    counter: four and key: two arrays of 32-bit words held in uint64 (broadcastable). Returns the four output words,
    each uint64 of the broadcast shape. Elementwise integer arithmetic only.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return c0, c1, c2, c3


def canonical_name(name: str) -> str:
    """The parameter's name without wrapper prefixes: what a direction is tied to, whoever wraps the model."""
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def tensor_id(name: str) -> int:
    """64-bit id of a tensor from its canonical name alone, so a direction does not depend on scope or order."""
    digest = hashlib.blake2b(canonical_name(name).encode(), digest_size=8, person=b"zofed-tensor").digest()
    return int.from_bytes(digest, "little")


def check_distinct(names: Iterable[str]) -> None:
    """Raise UserError when two parameters share a canonical name or a tensor id: they would share every direction."""
    seen: dict[int, str] = {}
    for name in names:
        identity = tensor_id(name)
        if identity in seen:
            raise UserError(f"parameters {seen[identity]!r} and {name!r} share one tensor id: rename one of them")
        seen[identity] = name


def derive_seed(purpose: str, *numbers: int) -> int:
    """64-bit seed as a keyed hash of a purpose (at most 16 ASCII characters) and unsigned 64-bit numbers."""
    message = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, person=purpose.encode()).digest(), "little")


def direction_seeds(run_seed: int, step: int, client: int, queries: int, local_steps: int = 1) -> list[int]:
    """Seeds of one client's directions in one step: local step by local step, query by query."""
    return [seed for local in range(local_steps) for seed in local_step_seeds(run_seed, step, client, local, queries)]


def local_step_seeds(run_seed: int, step: int, client: int, local: int, queries: int) -> list[int]:
    """Those of one local step."""
    return [derive_seed("zofed-direction", run_seed, step, client, local, query) for query in range(queries)]


def _words_at(counter: Sequence[NDArray[np.uint64]], seeds: Sequence[int]) -> NDArray[np.uint32]:
    """Words of each seed's stream at the given counters (blocks,): uint32 (seeds, 4 * blocks), little endian."""
    key = np.asarray(seeds, dtype=np.uint64)[:, None]
    words = philox([part[None, :] for part in counter], (key & _LOW, key >> _SHIFT))
    return np.stack(words, axis=-1).astype("<u4").reshape(len(seeds), -1)


def _words(seeds: Sequence[int], tensor: int, component: int, count: int, start: int = 0) -> NDArray[np.uint32]:
    """Words start .. start + count of each seed's stream for one tensor and component: uint32 (seeds, count)."""
    blocks = np.arange(start // 4, -(-(start + count) // 4), dtype=np.uint64)
    fixed = (np.full_like(blocks, word) for word in (component, tensor & 0xFFFFFFFF, tensor >> 32))
    return _words_at((blocks, *fixed), seeds)[:, start % 4 : start % 4 + count]


def _signs_of(words: NDArray[np.uint32]) -> Tensor:
    """Every bit of the words as +1 or -1: int8 (seeds, 32 * words)."""
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(bits).view(torch.int8).mul_(2).sub_(1)


def signs(seeds: Sequence[int], tensor: int, component: int, count: int, start: int = 0) -> NDArray[np.int8]:
    """Entries start .. start + count of each seed's stream as +1 or -1: int8 (seeds, count)."""
    skipped = start % 32
    words = np.ascontiguousarray(_words(seeds, tensor, component, -(-(skipped + count) // 32), start // 32))
    return _signs_of(words).numpy()[:, skipped : skipped + count]


def draw(kind: Kind, seeds: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Factors]]:
    """What the rankR or core directions of each named tensor are made of, for each seed: int8 tensors on the CPU.

    For a matrix a (seeds, R, rows) and b (seeds, R, columns) with z = sum over R of outer(a, b); for a vector
    z (seeds, R, entries), to be summed over R; of a core two such, whose entries are multiplied. A tensor of more than
    two dimensions counts as a matrix of its first dimension by all others. The generator runs once for as many tensors
    as `DRAWN_TOGETHER` entries hold.
    """
    waiting: list[tuple[str, list[tuple[int, int, int]]]] = []
    entries = 0
    for name, shape in shapes.items():
        sizes = (shape[0], prod(shape[1:])) if len(shape) > 1 else (prod(shape),) * (2 if kind == "core" else 1)
        tensor = tensor_id(name)
        streams = [(tensor, 2 * j + side, size) for side, size in enumerate(sizes) for j in range(terms(kind))]
        waiting.append((name, streams))
        entries += len(seeds) * sum(size for *_, size in streams)
        if entries > DRAWN_TOGETHER:
            yield from _drawn(kind, seeds, waiting)
            waiting, entries = [], 0
    if waiting:
        yield from _drawn(kind, seeds, waiting)


def _drawn(
    kind: Kind, seeds: Sequence[int], waiting: Sequence[tuple[str, list[tuple[int, int, int]]]]
) -> Iterator[tuple[str, Factors]]:
    """The factors of several tensors from one run of the generator over all their streams."""
    streams = [stream for _, own in waiting for stream in own]
    blocks = [-(-size // 128) for *_, size in streams]
    index = np.concatenate([np.arange(count, dtype=np.uint64) for count in blocks])
    component, low, high = (
        np.repeat(np.array(values, dtype=np.uint64), blocks)
        for values in zip(*((part, tensor & 0xFFFFFFFF, tensor >> 32) for tensor, part, _ in streams), strict=True)
    )
    entries = _signs_of(_words_at((index, component, low, high), seeds))
    start = 0
    found: list[Tensor] = []
    for (*_, size), count in zip(streams, blocks, strict=True):
        found.append(entries[:, start : start + size])
        start += 128 * count
    rest = iter(found)
    for name, own in waiting:
        parts = [next(rest) for _ in own]
        sides = len(own) // terms(kind)
        yield name, tuple(torch.stack(parts[side * terms(kind) : (side + 1) * terms(kind)], 1) for side in range(sides))


def factors(kind: Kind, seeds: Sequence[int], name: str, shape: Sequence[int]) -> Factors:
    """`draw` for one tensor."""
    return next(draw(kind, seeds, {name: shape}))[1]


def _dense(kind: Kind, seed: int, tensor: int, count: int, start: int) -> NDArray[np.int8] | NDArray[np.int32]:
    """Entries start .. start + count of a dense direction, the tensor read row by row."""
    if kind == "rademacher":
        return signs([seed], tensor, 0, count, start)[0]
    return _normal_table()[_halves(seed, tensor, count, start)]


def direction(kind: Kind, seed: int, name: str, shape: Sequence[int], rows: slice = slice(None)) -> Tensor:
    """One direction of one tensor, or some of its rows, as integers worth `unit(kind)` each: on the CPU, of `shape`.

    kind `rankR`: a sum of R outer products of +-1 vectors for a matrix, of R +-1 vectors for a vector, int8;
    `rademacher`: independent +-1, int8; `gaussian`: independent quantiles of the normal distribution, int32. In units
    all have E[z z^T] = I; for rank1 and rademacher |z|^2 is the number of entries.
    """
    if terms(kind):
        parts = factors(kind, [seed], name, shape)
        if len(parts) == 1:
            return parts[0][0, :, rows].sum(0, dtype=torch.int8).reshape((-1,) if shape else ())
        a, b = parts[0][0, :, rows], parts[1][0]
        return (a[:, :, None] * b[:, None, :]).sum(0, dtype=torch.int8).reshape(-1, *shape[1:])
    columns = prod(shape[1:])
    start, stop, _ = rows.indices(shape[0] if shape else 1)
    entries = _dense(kind, seed, tensor_id(name), (stop - start) * columns, start * columns)
    return torch.from_numpy(entries).reshape((stop - start, *shape[1:]) if shape else ())


def check_exact(kind: Kind, coefficients: Sequence[int], what: str) -> None:
    """Raise UserError where some entry of the sum of coefficient * direction could pass what float64 holds exactly.

    what: how the message calls the sum.
    """
    entry = int(_normal_table()[-1]) if kind == "gaussian" else terms(kind) or 1
    largest = entry * sum(map(abs, coefficients))
    if largest > LARGEST_SUM:
        raise UserError(
            f"{what} adds {len(coefficients)} {kind} directions to entries of up to {largest:.3g}, above 2^53, where "
            "sums are no longer exact: take fewer queries or clients"
        )


class WeightedSum:
    """Sum of coefficient * direction over the seeds of one record for one tensor, a block of rows at a time.

    The sum is an exact integer, whatever the order of summation, the BLAS, the thread count or the device, rounded
    once to float32. Entries of +-1 are summed in float32 as long as the coefficients' absolute values add to at most
    2^24, and such partial sums in float64. Gaussian entries have 19 bits and are summed in float64. Low-rank kinds take
    one matrix product for each partial sum. device: where to compute; one without float64 gets it from the CPU. drawn:
    what `draw` gave for this tensor, where it was called before. Raises ValueError for a coefficient above 2^24; how
    many may be summed `check_exact` tells.
    """

    def __init__(
        self,
        kind: Kind,
        seeds: Sequence[int],
        coefficients: Sequence[int],
        name: str,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        drawn: Factors | None = None,
    ) -> None:
        self.kind, self.seeds, self.coefficients = kind, seeds, coefficients
        self.columns = prod(shape[1:])
        self.tensor = tensor_id(name)
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        count = terms(kind)
        weights = [value for value in coefficients for _ in range(count or 1)]
        self.parts = _exact_parts(weights)
        if count:
            left, *right = (part.flatten(0, 1).to(self.device) for part in drawn or factors(kind, seeds, name, shape))
            self.left = left  # int8 (terms, rows): widened block by block
            scaled = torch.tensor(weights, dtype=torch.float32, device=self.device)[:, None]
            self.right = right[0] * scaled if right else scaled

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 (stop - start, columns); a vector counts as rows of one entry."""
        if terms(self.kind):
            left = self.left[:, start:stop].to(torch.float32).T
            if len(self.parts) == 1:
                return left @ self.right
            total = torch.zeros(stop - start, self.columns, dtype=torch.float64, device=self.device)
            for part in self.parts:
                total += left[:, part] @ self.right[part]
            return total.to(torch.float32)
        total = torch.zeros(stop - start, self.columns, dtype=torch.float64, device=self.device)
        for seed, weight in zip(self.seeds, self.coefficients, strict=True):
            entries = _dense(self.kind, seed, self.tensor, (stop - start) * self.columns, start * self.columns)
            total += torch.from_numpy(entries).to(self.device, torch.float64).reshape(total.shape).mul_(weight)
        return total.to(torch.float32)


class CoreSum:
    """Sum over all pairs (i, j) of core_ij * direction_ij for one tensor, as `WeightedSum` gives it, a block at a time.

    direction_ij is the outer product of the left factor of seed i and the right factor of seed j, for a vector the
    product of their entries. coefficients: row by row, as many as the square of the number of seeds; sums are exact in
    float64 where `check_exact` says so.
    """

    def __init__(
        self, coefficients: Sequence[int], shape: Sequence[int], device: torch.device | str, drawn: Factors
    ) -> None:
        self.is_vector = len(shape) < 2
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.left, right = (part[:, 0].to(self.device, torch.float64) for part in drawn)
        core = torch.tensor(coefficients, dtype=torch.float64, device=self.device).view(len(right), len(right))
        self.right = core @ right

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 (stop - start, columns); a vector counts as rows of one entry."""
        left = self.left[:, start:stop]
        if self.is_vector:
            return (left * self.right[:, start:stop]).sum(0).unsqueeze(1).to(torch.float32)
        return (left.T @ self.right).to(torch.float32)


def _exact_parts(coefficients: Sequence[int]) -> list[slice]:
    """Runs of coefficients whose sums, with any signs, float32 holds exactly."""
    starts, total = [0], 0
    for index, value in enumerate(coefficients):
        if abs(value) > LARGEST_COEFFICIENT:
            raise ValueError(f"coefficient {value} is above 2^24: sums of it would not be exact")
        total += abs(value)
        if total > LARGEST_COEFFICIENT:
            starts.append(index)
            total = abs(value)
    return [slice(start, stop) for start, stop in pairwise([*starts, len(coefficients)])]


def weighted_sum(
    kind: Kind, seeds: Sequence[int], coefficients: Sequence[int], name: str, shape: Sequence[int]
) -> Tensor:
    """All rows of `WeightedSum` at once: float32 on the CPU, of `shape`, in units of `unit(kind)`."""
    rows = shape[0] if len(shape) else 1
    return WeightedSum(kind, seeds, coefficients, name, shape).rows(0, rows).reshape(tuple(shape))


@cache
def _normal_table() -> NDArray[np.int32]:
    """Quantiles of the standard normal at the midpoints of 2^16 equal cells, in units of 2^-16, rounded: int32.

    The nearest entry lies 1e-6 away from a rounding tie, far beyond the error of any math library, so the integers
    are the same everywhere; a test pins their digest.
    """
    inverse = statistics.NormalDist().inv_cdf
    upper = [round(inverse(0.5 + (index + 0.5) / 65536) * 65536) for index in range(32768)]
    return np.array([-value for value in reversed(upper)] + upper, dtype=np.int32)


def normal(seed: int, name: str, shape: Sequence[int], start: int = 0) -> Tensor:
    """Standard normal entries (65,536 levels, largest 4.3) for a fresh tensor: float32 on the CPU, of `shape`.

    start: how many entries of the tensor's stream come before these.
    """
    chosen = _normal_table()[_halves(seed, tensor_id(name), prod(shape), start)]
    return torch.from_numpy(chosen.astype(np.float32) * np.float32(2.0**-16)).reshape(tuple(shape))


def random_bits(seed: int, name: str, shape: Sequence[int], start: int = 0) -> Tensor:
    """Uniform 16-bit integers for stochastic rounding: int32 in [0, 65535] on the CPU, of `shape`.

    start: how many entries of the tensor's stream come before these.
    """
    return torch.from_numpy(_halves(seed, tensor_id(name), prod(shape), start).astype(np.int32)).reshape(tuple(shape))


@lru_cache(maxsize=1024)  # every client of a simulation asks for the same
def positions(seed: int, name: str, size: int, count: int) -> NDArray[np.int64]:
    """`count` positions in a tensor of `size` elements, with repetition; all positions where it has no more."""
    if size <= count:
        return np.arange(size, dtype=np.int64)
    words = _words([seed], tensor_id(name), 0, 2 * count)[0].astype(np.uint64)
    return ((words[0::2] | (words[1::2] << _SHIFT)) % np.uint64(size)).astype(np.int64)


def _halves(seed: int, tensor: int, count: int, start: int = 0) -> NDArray[np.uint16]:
    skipped = start % 2
    words = np.ascontiguousarray(_words([seed], tensor, 0, -(-(skipped + count) // 2), start // 2))
    return words.view("<u2")[0, skipped : skipped + count]
