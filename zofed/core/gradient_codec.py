"""Gradients, guides and updates as bytes, small where asked: a few singular factors of each matrix, in 15-bit integers.

What is decoded is the same on every machine: integers, or products of integers that float64 holds exactly, rounded once
to float32 and times a power of two.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zofed.core import directions
from zofed.core.measure import Update

BITS = 15
LARGEST_EXPONENT = 140
SMALLEST_EXPONENT = -126  # that is written: float32 holds the power of two it is multiplied by
POWER_STEPS = 3  # of the subspace iteration; the leading factors of a gradient stand out after two or three
HEADER_OF_TENSOR = 200  # bytes that describe one beside its name, at most; a character of a name takes 6 at most
_LENGTH = struct.Struct("<I")
_HEADER = struct.Struct("<Q")  # length of what describes the tensors, with which their bytes begin

Shapes = Mapping[str, tuple[int, ...]]


def whole(update: Mapping[str, Tensor]) -> bytes:
    """An update in float32, as it is: four bytes an entry."""
    return save({f"float:{name}": tensor.detach().to(torch.float32).cpu() for name, tensor in update.items()})


def compressed(gradient: Mapping[str, Tensor], rank: int) -> bytes:
    """The `rank` leading singular factors of every matrix (0: all entries), and all other tensors, as int16.

    Raises ValueError when an entry is not finite. Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM
    Review 2011 (subspace iteration from a seeded start).
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in gradient.items():
        value = tensor.detach().to(torch.float32).cpu()
        matrix = value.reshape(value.shape[0], -1) if value.dim() > 1 else value.reshape(1, -1)
        if not torch.isfinite(matrix).all():
            raise ValueError(f"the gradient of {name} is not finite")
        if rank and min(matrix.shape) > rank:
            left, right = leading_factors(matrix, rank, name)
            parts[f"left:{name}"], parts[f"right:{name}"] = left, right
        else:
            parts[f"whole:{name}"] = value
    integers, exponents = {}, []
    for key in sorted(parts):
        value = parts[key].clone(memory_format=torch.contiguous_format)
        exponents.append(to_grid(value))
        integers[key] = value.to(torch.int16)
    return save(integers | {"exponents": torch.tensor(exponents, dtype=torch.int16)})


def leading_factors(matrix: Tensor, rank: int, name: str) -> tuple[Tensor, Tensor]:
    """left (rows, rank) and right (rank, columns), orthonormal rows: left @ right is the best of its rank, nearly."""
    seed = directions.derive_seed("zofed-factors", rank)
    right = directions.normal(seed, name, (matrix.shape[1], rank))
    for _ in range(POWER_STEPS):
        left = torch.linalg.qr(matrix @ right).Q
        right = torch.linalg.qr(matrix.T @ left).Q
    return matrix @ right, right.T.contiguous()


def to_grid(value: Tensor) -> int:
    """Make a float32 tensor integers of 15 bits, in place; returns the exponent of what one of them is worth.

    Raises ValueError when an entry is not finite.
    """
    peak = float(value.abs().max()) if value.numel() else 0.0
    if not math.isfinite(peak):
        raise ValueError("an entry is not finite")
    exponent = max(math.frexp(peak)[1] - BITS, SMALLEST_EXPONENT) if peak else 0
    value.mul_(2.0**-exponent).round_().clamp_(-(2**BITS) + 1, 2**BITS - 1)
    return exponent


def largest(shapes: Shapes) -> int:
    """Bytes that `whole` or `compressed` make of an update of these shapes, at most."""
    return _HEADER.size + _largest_header(shapes) + sum(4 * prod(shape) + 4 for shape in shapes.values())


def _largest_header(shapes: Shapes) -> int:
    """Bytes that describe the tensors of an update, at most: two for each, and the exponents."""
    return 1000 + sum(2 * (HEADER_OF_TENSOR + 6 * len(name)) for name in shapes)


def decoded(raw: bytes, shapes: Shapes) -> Update:
    """The update that `whole` or `compressed` encoded: float32 by name, on the CPU.

    Raises ValueError unless the bytes hold exactly the tensors of `shapes`, of the types that are written. Bytes that
    describe more tensors than that are not read at all: a million of them would take a minute.
    """
    described = _HEADER.unpack_from(raw)[0] if len(raw) >= _HEADER.size else 0
    if described > (limit := _largest_header(shapes)):
        raise ValueError(f"{described} bytes describe the tensors, where {limit} do for those of the model")
    try:
        parts = load(raw)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:  # the last of sizes beyond 2^63
        raise ValueError(f"{len(raw)} bytes are no tensors: {error}") from None
    names = [key.partition(":")[2] for key in parts if key.startswith(("float:", "whole:", "left:"))]
    if sorted(names) != sorted(shapes):
        raise ValueError(f"tensors {sorted(set(names) ^ set(shapes))[:3]} are missing or too many")
    worth = _worths(parts)
    used = {"exponents"} & set(parts)
    update = {}
    for name, shape in shapes.items():
        if f"float:{name}" in parts:
            value = _typed(parts, f"float:{name}", torch.float32, shape)
            used.add(f"float:{name}")
        elif f"whole:{name}" in parts:
            integer = _typed(parts, f"whole:{name}", torch.int16, shape)
            value = integer.to(torch.float32).mul_(worth(f"whole:{name}"))
            used.add(f"whole:{name}")
        else:
            keys, columns = (f"left:{name}", f"right:{name}"), prod(shape[1:])
            rows, rank = shape[0] if shape else 1, parts[keys[0]].shape[-1] if parts[keys[0]].dim() == 2 else 0
            if rank >= min(rows, columns):  # or a few bytes more would ask for many times their memory
                raise ValueError(f"{rank} factors are not those of a matrix of {rows} x {columns}")
            left = _typed(parts, keys[0], torch.int16, (rows, rank))
            right = _typed(parts, keys[1], torch.int16, (rank, columns))
            product = (left.double() @ right.double()).to(torch.float32)  # exact: 30 bits and those of the rank
            value = product.mul_(worth(keys[0])).mul_(worth(keys[1])).reshape(shape)
            used.update(keys)
        update[name] = value
    if used != set(parts):
        raise ValueError(f"tensors {sorted(set(parts) - used)[:3]} are too many")
    return update


def _worths(parts: Mapping[str, Tensor]) -> Callable[[str], float]:
    """What one integer of each tensor is worth, by its key."""
    keys = sorted(key for key in parts if key.partition(":")[0] in ("whole", "left", "right"))
    exponents = parts.get("exponents", torch.zeros(0, dtype=torch.int16))
    if exponents.dtype != torch.int16 or exponents.shape != (len(keys),):
        raise ValueError("the exponents are not one for each tensor")
    values: list[int] = exponents.tolist()
    if not all(-LARGEST_EXPONENT <= value <= LARGEST_EXPONENT for value in values):
        raise ValueError(f"the exponents {values[:3]} are beyond those of float32")
    found = dict(zip(keys, values, strict=True))
    return lambda key: 2.0 ** found[key]


def _typed(parts: Mapping[str, Tensor], key: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    tensor = parts.get(key)
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{key} is not {dtype} of shape {tuple(shape)}")
    return tensor


def joined(raws: Iterable[bytes]) -> bytes:
    """Several encoded updates as one run of bytes."""
    return b"".join(_LENGTH.pack(len(raw)) + raw for raw in raws)


def split(raw: bytes) -> Iterator[bytes]:
    """The updates that `joined` was given. Raises ValueError for other bytes."""
    at = 0
    while at < len(raw):
        if at + _LENGTH.size > len(raw):
            raise ValueError("an update's length is cut")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += _LENGTH.size
        if length > len(raw) - at:
            raise ValueError(f"an update of {length} bytes is cut after {len(raw) - at}")
        yield raw[at : at + length]
        at += length


def count(raw: bytes, most: int) -> int:
    """How many updates `joined` was given, as far as one more than `most`. Raises ValueError for other bytes."""
    return sum(1 for _ in zip(split(raw), range(most + 1), strict=False))


def norm(update: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all entries together."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))
