"""Gradients on their way: the same everywhere, few bytes, and broken ones refused."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from zofed.core import gradient_codec
from zofed.core.digests import tensors_digest
from zofed.core.measure import Update

NAMED = st.dictionaries(
    st.sampled_from(["a", "b.weight", "left:x", "head"]),
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
    min_size=1,
    max_size=3,
)


def tensors_of(shapes: gradient_codec.Shapes, seed: int = 0, scale: float = 1.0) -> Update:
    chance = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=chance) * scale for name, shape in shapes.items()}


@given(NAMED, st.integers(0, 99), st.integers(0, 3), st.sampled_from([1.0, 1e-30, 1e30, 0.0]))
@settings(max_examples=80, deadline=None, database=None)
def test_an_encoded_update_comes_back_the_same_everywhere(
    shapes: dict[str, tuple[int, ...]], seed: int, rank: int, scale: float
) -> None:
    update = tensors_of(shapes, seed, scale)
    assert tensors_digest(gradient_codec.decoded(gradient_codec.whole(update), shapes)) == tensors_digest(update)
    raw = gradient_codec.compressed(update, rank)
    found = gradient_codec.decoded(raw, shapes)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert tensors_digest(found) == tensors_digest(gradient_codec.decoded(raw, shapes))
    if rank == 0:
        for name, tensor in update.items():
            assert (found[name] - tensor).abs().max() <= tensor.abs().max() * 2**-14


def test_a_matrix_of_rank_r_survives_in_r_factors() -> None:
    left, right = tensors_of({"l": (40, 3), "r": (3, 30)}, 1).values()
    shapes = {"w": (40, 30)}
    raw = gradient_codec.compressed({"w": left @ right}, 3)
    found = gradient_codec.decoded(raw, shapes)["w"]
    assert gradient_codec.norm({"w": found - left @ right}) < 1e-3 * gradient_codec.norm({"w": left @ right})
    assert len(raw) < 2 * 3 * 70 + 400 < 4 * 40 * 30
    worse = gradient_codec.decoded(gradient_codec.compressed({"w": left @ right}, 2), shapes)["w"]
    assert gradient_codec.norm({"w": worse - left @ right}) > 0.05 * gradient_codec.norm({"w": left @ right})


def test_the_same_gradient_has_the_same_bytes() -> None:
    update = tensors_of({"b": (9, 8), "a": (7,)})
    assert gradient_codec.compressed(update, 2) == gradient_codec.compressed(dict(reversed(update.items())), 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_encoded(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        gradient_codec.compressed({"w": torch.tensor([[1.0, bad]])}, 1)


def broken_guides() -> dict[str, bytes]:
    parts = load(gradient_codec.compressed(tensors_of({"w": (6, 5), "b": (4,)}), 2))
    assert set(parts) == {"left:w", "right:w", "whole:b", "exponents"}
    short = lambda key: {other: tensor for other, tensor in parts.items() if other != key}  # noqa: E731
    odd = torch.zeros(3, dtype=torch.int16)
    changed: dict[str, dict[str, Tensor]] = {
        "a factor missing": short("right:w"),
        "the other factor missing": short("left:w"),
        "a tensor missing": short("whole:b"),
        "exponents missing": short("exponents"),
        "a tensor more": parts | {"float:c": torch.ones(2)},
        "a tensor twice": parts | {"float:b": torch.ones(4)},
        "a stray factor": parts | {"right:c": odd.view(1, 3)},
        "a stray name": parts | {"c": torch.ones(2)},
        "an exponent too many": parts | {"exponents": torch.zeros(4, dtype=torch.int16)},
        "exponents of another type": parts | {"exponents": torch.zeros(3, dtype=torch.int32)},
        "an exponent too large": parts | {"exponents": odd + 141},
        "an exponent too small": parts | {"exponents": odd - 141},
        "factors of floats": parts | {"left:w": parts["left:w"].float()},
        "factors of two ranks": parts | {"left:w": parts["left:w"][:, :1].contiguous()},
        "a factor too long": parts | {"right:w": torch.zeros(2, 6, dtype=torch.int16)},
        "a factor of one dimension": parts | {"left:w": torch.zeros(12, dtype=torch.int16)},
        "factors of more than the matrix has": parts
        | {"left:w": torch.zeros(6, 5, dtype=torch.int16), "right:w": torch.zeros(5, 5, dtype=torch.int16)},
        "another shape": parts | {"whole:b": torch.zeros(2, 2, dtype=torch.int16)},
    }
    header = b'{"float:w":{"dtype":"F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]}}'
    beyond = len(header).to_bytes(8, "little") + header
    found = {name: save(tensors) for name, tensors in changed.items()}
    return found | {"a shape beyond 64 bits": beyond, "garbage": bytes(99), "nothing": b""}


@pytest.mark.parametrize("way", broken_guides())
def test_a_broken_guide_is_refused(way: str) -> None:
    with pytest.raises(ValueError, match=r"tensor|exponent|is not|factors"):
        gradient_codec.decoded(broken_guides()[way], {"w": (6, 5), "b": (4,)})


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_no_update_is_longer_than_the_largest(rank: int) -> None:
    """Of names that are escaped where they are written down, and of the highest rank that is."""
    shapes = {"w": (6, 5), "\x01" * 50: (5, 7), "b": (4,), "s": ()}
    update = tensors_of(shapes)
    assert len(gradient_codec.whole(update)) <= gradient_codec.largest(shapes)
    assert len(raw := gradient_codec.compressed(update, rank)) <= gradient_codec.largest(shapes)
    assert set(gradient_codec.decoded(raw, shapes)) == set(shapes)


def test_a_long_description_of_tensors_is_not_read() -> None:
    raw = save({f"float:{n}": torch.zeros(0) for n in range(99)})
    with pytest.raises(ValueError, match=r"bytes describe the tensors, where 1\d\d\d do"):
        gradient_codec.decoded(raw, {"w": (6, 5)})


@pytest.mark.slow
@given(st.integers(0, 400), st.integers(0, 255), st.booleans())
@settings(max_examples=300, deadline=None, database=None)
def test_a_guide_with_a_byte_changed_is_a_guide_or_a_value_error(at: int, value: int, cut: bool) -> None:
    raw = gradient_codec.compressed(tensors_of({"w": (6, 5), "b": (4,)}), 2)
    at %= len(raw)
    with_change = raw[:at] if cut else raw[:at] + bytes([value]) + raw[at + 1 :]
    try:
        found = gradient_codec.decoded(with_change, {"w": (6, 5), "b": (4,)})
    except ValueError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"w": (6, 5), "b": (4,)}


@given(st.lists(st.binary(max_size=20), max_size=4), st.binary(max_size=30))
@settings(max_examples=100, deadline=None, database=None)
def test_updates_side_by_side_are_split_again(raws: list[bytes], other: bytes) -> None:
    assert list(gradient_codec.split(gradient_codec.joined(raws))) == raws
    with contextlib.suppress(ValueError):
        assert gradient_codec.joined(gradient_codec.split(other)) == other
