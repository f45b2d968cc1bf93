"""A seed names a direction, the same on every machine.

A direction z is a pure function of (seed, tensor, element). Its bits come from the counter-based generator
Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), computed in
integers, and its entries are +1 or -1, so no rounding, no device and no thread count can change it. The global
random state of Python, numpy or torch is never read or written.

Layout, fixed by the journal's format:
    key      the direction's 64-bit seed, low word first
    counter  (block, component, tensor id low word, tensor id high word)
    bits     block by block, word by word, least significant bit first; a set bit is +1, a clear one -1
    component 0 for dense entries; 2j and 2j+1 for the factors a and b of rank term j
"""

import hashlib
import statistics
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zofed.errors import UserError

GENERATOR = "philox4x32-10/1"  # part of every journal's genesis: another stream must have another name

Kind = Literal["rank1", "rademacher"]

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
    return [
        derive_seed("zofed-direction", run_seed, step, client, local, query)
        for local in range(local_steps)
        for query in range(queries)
    ]


def _words(seeds: Sequence[int], tensor: int, component: int, count: int) -> NDArray[np.uint32]:
    """First `count` 32-bit words of each seed's stream for one tensor and component: uint32 (seeds, count)."""
    key = np.asarray(seeds, dtype=np.uint64)[:, None]
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    fixed = (np.uint64(component), np.uint64(tensor & 0xFFFFFFFF), np.uint64(tensor >> 32))
    words = philox((blocks, *(np.full_like(blocks, word) for word in fixed)), (key & _LOW, key >> _SHIFT))
    return np.stack(words, axis=-1).astype("<u4").reshape(len(seeds), -1)[:, :count]


def signs(seeds: Sequence[int], tensor: int, component: int, count: int) -> NDArray[np.int8]:
    """The first `count` entries of each seed's stream as +1 or -1: int8 (seeds, count)."""
    words = np.ascontiguousarray(_words(seeds, tensor, component, -(-count // 32)))
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=count, bitorder="little")
    return (bits << 1).view(np.int8) - np.int8(1)


def rank1_factors(seeds: Sequence[int], name: str, shape: Sequence[int]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Factors a (seeds, rows) and b (seeds, columns) of the rank1 directions of one matrix: z = outer(a, b).

    A tensor of more than two dimensions counts as a matrix of its first dimension by all others.
    """
    tensor = tensor_id(name)
    return signs(seeds, tensor, 0, shape[0]), signs(seeds, tensor, 1, prod(shape[1:]))


def direction(kind: Kind, seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """One direction of one tensor, entries +1 or -1: int8 on the CPU, of `shape`.

    kind `rank1`: the outer product of two +-1 vectors for a matrix, independent entries for a vector;
    kind `rademacher`: independent entries throughout. Both have E[z z^T] = I and |z|^2 = number of entries.
    """
    if kind == "rank1" and len(shape) > 1:
        a, b = rank1_factors([seed], name, shape)
        return torch.from_numpy(a.T * b).reshape(tuple(shape))
    return torch.from_numpy(signs([seed], tensor_id(name), 0, prod(shape))[0]).reshape(tuple(shape))


def weighted_sum(
    kind: Kind, seeds: Sequence[int], coefficients: Sequence[int], name: str, shape: Sequence[int]
) -> Tensor:
    """Exact sum of coefficient * direction over all seeds for one tensor: float64 on the CPU, of `shape`.

    Every partial sum is an integer below 2^53 (coefficients are int32 and there are fewer than 2^21 of them), so the
    result is exact in float64 whatever the order of summation, the BLAS or the thread count. For rank1 the whole sum
    is one matrix product.
    """
    weights = torch.tensor(coefficients, dtype=torch.float64)
    if kind == "rank1" and len(shape) > 1:
        a, b = (torch.from_numpy(factor).to(torch.float64) for factor in rank1_factors(seeds, name, shape))
        return ((a * weights[:, None]).T @ b).reshape(tuple(shape))
    if kind == "rank1":  # vectors are small: all seeds at once, again one product
        entries = torch.from_numpy(signs(seeds, tensor_id(name), 0, prod(shape))).to(torch.float64)
        return (weights @ entries).reshape(tuple(shape))
    total = torch.zeros(tuple(shape), dtype=torch.float64)
    for seed, weight in zip(seeds, weights.tolist(), strict=True):
        total.add_(direction(kind, seed, name, shape).to(torch.float64).mul_(weight))
    return total


@cache
def _normal_table() -> NDArray[np.int32]:
    """Quantiles of the standard normal at the midpoints of 2^16 equal cells, in units of 2^-16, rounded: int32.

    The nearest entry lies 1e-6 away from a rounding tie, far beyond the error of any math library, so the integers
    are the same everywhere; a test pins their digest.
    """
    inverse = statistics.NormalDist().inv_cdf
    upper = [round(inverse(0.5 + (index + 0.5) / 65536) * 65536) for index in range(32768)]
    return np.array([-value for value in reversed(upper)] + upper, dtype=np.int32)


def normal(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal entries (65,536 levels, largest 4.3) for a fresh tensor: float32 on the CPU, of `shape`."""
    entries = _normal_table()[_halves(seed, name, prod(shape))].astype(np.float32) * np.float32(2.0**-16)
    return torch.from_numpy(entries).reshape(tuple(shape))


def random_bits(seed: int, name: str, shape: Sequence[int]) -> Tensor:
    """Uniform 16-bit integers for stochastic rounding: int32 in [0, 65535] on the CPU, of `shape`."""
    return torch.from_numpy(_halves(seed, name, prod(shape)).astype(np.int32)).reshape(tuple(shape))


def positions(seed: int, name: str, size: int, count: int) -> NDArray[np.int64]:
    """`count` positions in a tensor of `size` elements, with repetition; all positions where it has no more."""
    if size <= count:
        return np.arange(size, dtype=np.int64)
    words = _words([seed], tensor_id(name), 0, 2 * count)[0].astype(np.uint64)
    return ((words[0::2] | (words[1::2] << _SHIFT)) % np.uint64(size)).astype(np.int64)


def _halves(seed: int, name: str, count: int) -> NDArray[np.uint16]:
    words = np.ascontiguousarray(_words([seed], tensor_id(name), 0, -(-count // 2)))
    return words.view("<u2")[0, :count]
