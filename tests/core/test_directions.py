"""A seed must name the same direction for ever: known answers, pinned digests, exact sums, no global state."""

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from math import prod, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import normal_stream, philox4x32, sign_stream
from torch import Tensor

from zofed import config
from zofed.base.errors import UserError
from zofed.core import directions, kinds
from zofed.core.directions import WeightedSum, direction, signs, tensor_id, weighted_sum
from zofed.core.kinds import Kind, unit

KINDS: tuple[Kind, ...] = ("rank1", "rank2", "rank4", "rademacher", "gaussian")
SIGNS: tuple[Kind, ...] = ("rank1", "rademacher")  # every entry +1 or -1
RANKS = {"rank1": 1, "rank2": 2, "rank4": 4}
DENSE: tuple[Kind, ...] = ("rademacher", "gaussian")
SHAPES = [(), (1,), (7,), (129,), (3, 5), (1, 9), (33, 4), (2, 3, 4), (3, 1, 2, 2)]
WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(0, 2**64 - 1)

# Journals written today must mean the same in ten years: what changes here needs another GENERATOR name.
PINNED_ID = 0x0A83D7148056C5C3
PINNED_SEED = 0x3C566FD06CD1D8A1
PINNED_DIGESTS = {
    "signs": "5050498410b77c06bce9e1ed94ce184b2f1712c39b15ac5b6fdecfcd16818a5d",
    "rank1": "309137ea6813d8f402fba5f52779b28faff52d4ef0f0d41a550b6ebea94c4cfe",
    "rank1 vector": "f8b271b642d9cfadd3ab1d4d0756c7e126e5fca0971cf70a1927cb615e43cf88",
    "rank4": "5f9283a584c8238cd394739d7d4ec156295d52f930eda8ae316d0bbbe914185b",
    "rank4 vector": "cff79b3db850efdf1c32c5cc5ed3815ff4f5ef140e7430ed9f81618c2052cbd2",
    "rademacher": "f8b271b642d9cfadd3ab1d4d0756c7e126e5fca0971cf70a1927cb615e43cf88",
    "gaussian": "cb72a68617c657d8e0f0d076ea6d7fe6c4c49665ee02529b5e5b9a84f95340ad",
    "normal": "8244d896ef9a5be5cacb42a37519fa2703e564b2a43574a581b681fe724689af",
    "normal table": "ee46eda6f743ea9b2949c72134d6385025bcc7573bb0fba98b3bf40224779880",
    "random bits": "2589289e922a028f860d965c10f512b153a1a738530b435ce23af8eb3d7db416",
    "positions": "62bcf30dfe04603bb1f029abf4aa53089218a4010dc2d4b4cf0a4de85e358d4d",
}

PINNED_GAUSSIAN = [33840, -25172, -105731, -12854, -230250, 36527, 93078, -9056]
PINNED_RANK4 = [[0, -4, 4, -4, -2], [-4, 0, 0, 0, 2], [2, 2, -2, 2, 0]]


def words(*numbers: int) -> list[NDArray[np.uint64]]:
    return [np.array([number], dtype=np.uint64) for number in numbers]


def sha256(values: NDArray | Tensor) -> str:
    array = values.numpy() if isinstance(values, Tensor) else values
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    inputs, keys, outputs = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert [int(word[0]) for word in directions.philox(words(*inputs), words(*keys))] == outputs
    assert list(philox4x32(inputs, keys)) == outputs


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
@settings(max_examples=200, deadline=None, database=None)
def test_philox_equals_its_twin_in_python_integers(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert tuple(int(word[0]) for word in directions.philox(words(*counter), words(*key))) == philox4x32(counter, key)


@given(SEED, SEED, st.integers(0, 9), st.integers(1, 400))
@settings(max_examples=100, deadline=None, database=None)
def test_signs_come_in_the_documented_bit_order(seed: int, tensor: int, component: int, count: int) -> None:
    drawn = signs([seed], tensor, component, count)
    assert drawn.dtype == np.int8
    assert drawn[0].tolist() == sign_stream(seed, tensor, component, count)


def test_each_row_of_signs_belongs_to_its_own_seed() -> None:
    seeds = [0, 1, 2**32, 2**64 - 1]
    together = signs(seeds, 17, 3, 50)
    assert together.shape == (4, 50)
    for row, seed in zip(together, seeds, strict=True):
        assert row.tolist() == sign_stream(seed, 17, 3, 50)


def test_streams_have_their_pinned_digests() -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    assert directions.GENERATOR == "philox4x32-10/1"
    assert tensor_id(name) == PINNED_ID
    assert directions.derive_seed("zofed-direction", 1, 2, 3, 4, 5) == PINNED_SEED
    assert {
        "signs": sha256(signs([1, 2**63 + 5], tensor_id(name), 0, 1000)),
        "rank1": sha256(direction("rank1", 7, name, (37, 53))),
        "rank1 vector": sha256(direction("rank1", 7, name, (1961,))),
        "rank4": sha256(direction("rank4", 7, name, (37, 53))),
        "rank4 vector": sha256(direction("rank4", 7, name, (1961,))),
        "rademacher": sha256(direction("rademacher", 7, name, (37, 53))),
        "gaussian": sha256(direction("gaussian", 7, name, (37, 53)).numpy().astype("<i4")),
        "normal": sha256(directions.normal(7, name, (37, 53))),
        "normal table": sha256(directions._normal_table().astype("<i4")),
        "random bits": sha256(directions.random_bits(7, name, (37, 53)).numpy().astype("<i4")),
        "positions": sha256(directions.positions(7, name, 10**6, 100).astype("<i8")),
    } == PINNED_DIGESTS


@given(SEED, st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=60, deadline=None, database=None)
def test_a_longer_request_begins_with_the_shorter_one(seed: int, one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    assert signs([seed], 5, 0, longer)[:, :shorter].tolist() == signs([seed], 5, 0, shorter).tolist()
    flat = direction("rademacher", seed, "w", (longer,))
    assert flat[:shorter].tolist() == direction("rademacher", seed, "w", (1, shorter)).flatten().tolist()
    bits = directions.random_bits(seed, "w", (longer,))
    assert bits[:shorter].tolist() == directions.random_bits(seed, "w", (shorter,)).tolist()
    values = directions.normal(seed, "w", (longer,))
    assert values[:shorter].tolist() == directions.normal(seed, "w", (shorter,)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_and_seeds_have_directions_of_their_own(kind: Kind) -> None:
    names, seeds = ("a.weight", "b.weight", "weight"), (0, 1, 2**32, 2**33)
    drawn = {sha256(direction(kind, seed, name, (16, 16))) for name in names for seed in seeds}
    assert len(drawn) == len(names) * len(seeds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_is_the_same_alone_and_in_company(kind: Kind) -> None:
    alone = direction(kind, 11, "a", (6, 5))
    weighted_sum(kind, [3, 4], [1, 2], "b", (100, 2))
    assert torch.equal(direction(kind, 11, "a", (6, 5)), alone)
    assert torch.equal(direction(kind, 11, "module.a", (6, 5)), alone)
    for position in range(3):  # among other seeds of one record, at any place
        coefficients = [int(index == position) for index in range(3)]
        seeds = [11 if index == position else 900 + index for index in range(3)]
        assert torch.equal(weighted_sum(kind, seeds, coefficients, "a", (6, 5)), alone.to(torch.float32))


def summed(parts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*parts, strict=True)]


@pytest.mark.parametrize("kind", RANKS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1], ids=str)
def test_a_low_rank_direction_is_the_sum_of_outer_products_of_its_factors(kind: Kind, shape: tuple[int, ...]) -> None:
    terms = range(RANKS[kind])
    left = [sign_stream(21, tensor_id("w"), 2 * term, shape[0]) for term in terms]
    right = [sign_stream(21, tensor_id("w"), 2 * term + 1, prod(shape[1:])) for term in terms]
    products = [[x * y for x in a for y in b] for a, b in zip(left, right, strict=True)]
    drawn = direction(kind, 21, "w", shape)
    assert drawn.dtype == torch.int8
    assert drawn.shape == torch.Size(shape)
    assert drawn.flatten().tolist() == summed(products)
    a, b = directions.factors(kind, [4, 21], "w", shape)
    assert (a.shape, b.shape) == ((2, RANKS[kind], shape[0]), (2, RANKS[kind], prod(shape[1:])))
    assert (a[1].tolist(), b[1].tolist()) == (left, right)


@pytest.mark.parametrize("kind", RANKS)
@pytest.mark.parametrize("shape", [(), (77,)], ids=str)
def test_a_low_rank_direction_of_a_vector_is_a_sum_of_independent_entries(kind: Kind, shape: tuple[int, ...]) -> None:
    parts = [sign_stream(21, tensor_id("w"), 2 * term, prod(shape)) for term in range(RANKS[kind])]
    drawn = direction(kind, 21, "w", shape)
    assert drawn.shape == torch.Size(shape)
    assert drawn.flatten().tolist() == summed(parts)
    (z,) = directions.factors(kind, [21], "w", shape)
    assert z[0].tolist() == parts


def test_the_largest_rank_does_not_overflow_its_integers() -> None:
    parts = [sign_stream(3, tensor_id("w"), 2 * term, 20) for term in range(99)]
    assert direction("rank99", 3, "w", (20,)).tolist() == summed(parts)
    square = direction("rank99", 3, "w", (30, 30)).to(torch.int64)
    a, b = (part[0].to(torch.int64) for part in directions.factors("rank99", [3], "w", (30, 30)))
    assert torch.equal(square, a.T @ b)
    assert torch.equal(weighted_sum("rank99", [3], [2**17], "w", (30, 30)), square.float() * 2**17)


def test_what_a_direction_is_made_of_is_known_by_its_kind() -> None:
    assert [kinds.terms(kind) for kind in (*KINDS, "rank10", "rank99")] == [1, 2, 4, 0, 0, 10, 99]
    assert [unit(kind) for kind in KINDS] == [1.0, 1 / sqrt(2), 0.5, 1.0, 2**-16]


def test_kinds_are_rank1_to_rank99_rademacher_and_gaussian() -> None:
    ranks = [f"rank{rank}" for rank in range(1, 100)]
    others = [
        "rank",
        "rank0",
        "rank01",
        "rank00",
        "rank100",
        "rank1.5",
        "rank-1",
        "Rank1",
        "xrank1",
        "rank1x",
        "normal",
    ]
    others += ["", " rank1", "rank1 ", "rank1\n", "rank\u0661", "rank1\u0662", "rank1|gaussian", "gaussian1"]
    for kind in (*ranks, "rademacher", "gaussian"):
        assert re.fullmatch(kinds.KIND_PATTERN, kind)
        assert config.resolve({"directions": kind}).directions == kind
    for kind in others:
        assert not re.fullmatch(kinds.KIND_PATTERN, kind), kind
        with pytest.raises(UserError, match="directions = "):
            config.resolve({"directions": kind})


def test_a_rademacher_direction_has_independent_entries_whatever_the_shape() -> None:
    assert direction("rademacher", 21, "w", (7, 11)).flatten().tolist() == sign_stream(21, tensor_id("w"), 0, 77)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gaussian_direction_is_the_quantiles_of_its_bits_half_word_by_half_word(shape: tuple[int, ...]) -> None:
    drawn = direction("gaussian", 2**40 + 21, "w", shape)
    assert (drawn.dtype, drawn.shape) == (torch.int32, torch.Size(shape))
    assert drawn.flatten().tolist() == normal_stream(2**40 + 21, tensor_id("w"), prod(shape))


def test_the_first_entries_are_those_of_ten_years_ago() -> None:
    assert direction("gaussian", 7, "w", (8,)).tolist() == PINNED_GAUSSIAN
    assert direction("rank4", 7, "w", (3, 5)).tolist() == PINNED_RANK4


@pytest.mark.parametrize("kind", SIGNS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_direction_has_the_shape_asked_for_and_squared_length_d(kind: Kind, shape: tuple[int, ...]) -> None:
    drawn = direction(kind, 5, "w", shape)
    assert drawn.shape == torch.Size(shape)
    assert drawn.dtype == torch.int8
    assert int((drawn.to(torch.int64) ** 2).sum()) == prod(shape)
    assert set(drawn.flatten().tolist()) <= {-1, 1}


def drawn_in_units(kind: Kind, shape: tuple[int, ...], count: int) -> Tensor:
    """float64 (count, entries) of as many seeds."""
    seeds = directions.direction_seeds(3, 1, 0, count)
    if kinds.terms(kind):
        parts = [part.double() for part in directions.factors(kind, seeds, "w", shape)]
        rows = torch.einsum("nri,nrj->nij", *parts) if len(parts) > 1 else parts[0].sum(1)
    else:
        rows = torch.stack([direction(kind, seed, "w", shape) for seed in seeds]).double()
    return rows.reshape(count, -1) * unit(kind)


# E z^4: 1 for +-1; 3 - 2/R for a sum of R of them over sqrt(R); 3 for the normal, whose table ends at 4.3.
FOURTH = {"rank1": 1.0, "rank2": 2.0, "rank4": 2.5, "rademacher": 1.0, "gaussian": 3.0}


@pytest.mark.first(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(11,), (3, 4), (2, 2, 3)], ids=str)
def test_directions_are_isotropic_on_average(kind: Kind, shape: tuple[int, ...]) -> None:
    """Mean 0 and E z z^T = I, each to 4.5 standard errors; exactly 1 on the diagonal for entries of +-1."""
    count, d = 3000, prod(shape)
    rows = drawn_in_units(kind, shape, count)
    assert float(rows.mean(0).abs().max()) < 4.5 / count**0.5
    moments = rows.T @ rows / count
    off = moments - torch.diag(moments.diagonal())
    pairs = torch.einsum("ni,nj->nij", rows, rows).var(0).max()  # of a product of two entries: 1 in theory
    assert 0.7 < float(pairs) < 3.5
    assert float(off.abs().max()) < 4.5 / count**0.5
    if kind in SIGNS:
        assert torch.equal(moments.diagonal(), torch.ones(d, dtype=torch.float64))
    spread = sqrt((FOURTH[kind] - 1) / count)
    assert float((moments.diagonal() - 1).abs().max()) <= 4.5 * spread + 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_fourth_moment_is_that_of_the_kind(kind: Kind) -> None:
    eighth = {"rank1": 1.0, "rank2": 8.0, "rank4": 32.5, "rademacher": 1.0, "gaussian": 105.0}[kind]
    for values in (drawn_in_units(kind, (100_000,), 1).flatten(), drawn_in_units(kind, (2, 3), 4000)[:, 5]):
        error = sqrt((eighth - FOURTH[kind] ** 2) / len(values))
        assert abs(float((values**4).mean()) - FOURTH[kind]) <= 4.5 * error + 0.01 * (kind == "gaussian")


@pytest.mark.parametrize(("kind", "expected"), list(zip(KINDS, (1.0, 0.5, 0.25, 0.0, 0.0), strict=True)))
def test_four_corners_of_a_matrix_tell_its_rank(kind: Kind, expected: float) -> None:
    """E of their product is 1/R, where independent entries have 0: what low rank costs, and all it costs."""
    corners = drawn_in_units(kind, (2, 2), 4000).prod(1)
    assert abs(float(corners.mean()) - expected) < 4.5 * float(corners.std()) / 4000**0.5 + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_drawn_twice_for_tensors_and_seeds_of_one_shape(kind: Kind) -> None:
    """No entry of one stream depends on another stream's, shifted by anything."""
    count, names = 4096, ("h.0.weight", "h.1.weight")
    streams = [
        direction(kind, seed, name, (count,)).double() * unit(kind)
        for name in names
        for seed in (0, 1, 2, 3, 2**32, 2**32 + 1, 2**63)
    ]
    if kinds.terms(kind):
        matrices = [directions.factors(kind, [0, 1], name, (count, count)) for name in names]
        streams += [part.double() for sides in matrices for side in sides[1:] for part in side.flatten(0, 1)]
    spectra = torch.fft.rfft(torch.stack(streams), dim=1)
    for one, other in itertools.combinations(range(len(streams)), 2):
        at_lags = torch.fft.irfft(spectra[one] * spectra[other].conj(), n=count) / count
        assert float(at_lags.abs().max()) < 6.5 / count**0.5
    alone = torch.fft.irfft(spectra * spectra.conj(), n=count, dim=1)[:, 1:] / count
    assert float(alone.abs().max()) < 6.5 / count**0.5  # nor does a stream repeat itself


@pytest.mark.parametrize("kind", DENSE)
def test_no_two_rows_of_dense_directions_are_alike(kind: Kind) -> None:
    shape = (64, 400)
    rows = torch.cat([direction(kind, seed, name, shape) for name in "ab" for seed in (5, 6)]).double() * unit(kind)
    alike = rows @ rows.T / shape[1] - torch.eye(len(rows))
    assert float(alike.fill_diagonal_(0.0).abs().max()) < 6 / shape[1] ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@given(st.sampled_from(SHAPES), st.data())
@settings(max_examples=60, deadline=None, database=None)
def test_some_rows_are_those_of_the_whole(kind: Kind, shape: tuple[int, ...], data: st.DataObject) -> None:
    count = shape[0] if shape else 1
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start, count))
    whole = direction(kind, 8, "w", shape)
    total = weighted_sum(kind, [8, 9], [-3, 2**24], "w", shape).reshape(count, -1)
    assert torch.equal(WeightedSum(kind, [8, 9], [-3, 2**24], "w", shape).rows(start, stop), total[start:stop])
    if shape:
        assert torch.equal(direction(kind, 8, "w", shape, slice(start, stop)), whole[start:stop])
        assert torch.equal(direction(kind, 8, "w", shape, slice(start, None)), whole[start:])
    else:
        assert torch.equal(direction(kind, 8, "w", shape, slice(0, 1)), whole)


@given(SEED, st.integers(0, 300), st.integers(0, 200))
@settings(max_examples=100, deadline=None, database=None)
def test_a_stream_can_be_entered_anywhere(seed: int, start: int, count: int) -> None:
    stop = start + count
    assert signs([seed], 5, 1, count, start).tolist() == signs([seed], 5, 1, stop)[:, start:].tolist()
    bits = directions.random_bits(seed, "w", (count,), start)
    assert bits.tolist() == directions.random_bits(seed, "w", (stop,))[start:].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(37,), (37, 5), (37, 3, 7), (1, 130)], ids=str)
@pytest.mark.parametrize("at_once", [1, 3, 16, 100])
def test_a_weighted_sum_in_blocks_of_rows_is_the_whole(kind: Kind, shape: tuple[int, ...], at_once: int) -> None:
    seeds, coefficients = [11, 2**63, 13], [2**24, -(2**24) + 1, 12_345]
    whole = weighted_sum(kind, seeds, coefficients, "w", shape).reshape(shape[0], -1)
    total = WeightedSum(kind, seeds, coefficients, "w", shape)
    starts = list(range(0, shape[0], at_once))
    parts = {start: total.rows(start, min(start + at_once, shape[0])) for start in reversed(starts)}
    assert torch.equal(torch.cat([parts[start] for start in starts]), whole)


@given(
    st.sampled_from(KINDS),
    st.sampled_from(SHAPES),
    st.lists(
        st.tuples(SEED, st.sampled_from([-(2**24), 1 - 2**24, -1, 0, 1, 2**18 - 1, 2**24]) | st.integers(-9, 9)),
        min_size=1,
        max_size=12,
    ),
)
@settings(max_examples=100, deadline=None, database=None)
def test_a_weighted_sum_is_the_exact_integer_sum_rounded_once(
    kind: Kind, shape: tuple[int, ...], terms: list[tuple[int, int]]
) -> None:
    seeds, coefficients = [seed for seed, _ in terms], [coefficient for _, coefficient in terms]
    total = weighted_sum(kind, seeds, coefficients, "w", shape)
    entries = [direction(kind, seed, "w", shape).flatten().tolist() for seed in seeds]
    exact = [sum(c * z for c, z in zip(coefficients, column, strict=True)) for column in zip(*entries, strict=True)]
    assert total.dtype == torch.float32
    assert total.shape == torch.Size(shape)
    assert total.flatten().tolist() == [float(np.float32(float(value))) for value in exact]  # all fit into float64


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gaussian"])
def test_many_of_the_largest_coefficients_still_sum_exactly(kind: Kind) -> None:
    seeds, count = list(range(1500)), 1500
    coefficients = [2**24 - 1 if index % 3 else -(2**24) for index in range(count)]
    total = weighted_sum(kind, seeds, coefficients, "w", (2, 3))
    entries = np.stack([direction(kind, seed, "w", (2, 3)).numpy().reshape(-1) for seed in seeds]).astype(np.int64)
    exact = [sum(c * z for c, z in zip(coefficients, column, strict=True)) for column in entries.T.tolist()]
    assert total.flatten().tolist() == [float(np.float32(float(value))) for value in exact]


@given(st.lists(st.integers(-(2**24), 2**24), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None, database=None)
def test_parts_of_a_sum_are_as_long_as_float32_holds_them(coefficients: list[int]) -> None:
    parts = directions._exact_parts(coefficients)
    assert [value for part in parts for value in coefficients[part]] == coefficients
    sizes = [[abs(value) for value in coefficients[part]] for part in parts]
    assert all(sum(size) <= 2**24 for size in sizes)
    assert all(sum(size) + after[0] > 2**24 for size, after in itertools.pairwise(sizes))


def test_a_coefficient_beyond_float32s_integers_is_refused() -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="coefficient -16777217 is above"):
            weighted_sum(kind, [1, 2], [1, -(2**24) - 1], "w", (2, 3))


@given(st.integers(0, 2**32), st.integers(1, 64), st.booleans())
@settings(max_examples=60, deadline=None, database=None)
def test_a_gaussian_weighted_sum_is_the_exact_sum_rounded_once(first: int, count: int, is_one_sign: bool) -> None:
    """Aligned with the entry's sign the sums pass what float32 holds, by far."""
    seeds, shape = list(range(first, first + count * 64, 64)), (2, 3)
    entries = np.stack([direction("gaussian", seed, "w", shape).numpy().reshape(-1) for seed in seeds]).tolist()
    coefficients = [(-1 if is_one_sign and row[0] < 0 else 1) * (2**18 - 1 - 977 * i) for i, row in enumerate(entries)]
    total = weighted_sum("gaussian", seeds, coefficients, "w", shape).flatten().tolist()
    exact = [sum(c * z for c, z in zip(coefficients, column, strict=True)) for column in zip(*entries, strict=True)]
    assert total == [float(np.float32(float(value))) for value in exact]
    if is_one_sign and count == 64:
        assert abs(exact[0]) > 2**38


@pytest.mark.slow
def test_many_gaussian_terms_stay_exact_until_they_are_rounded_once() -> None:
    seeds, shape = list(range(6000)), (2, 2)
    entries = np.stack([direction("gaussian", seed, "w", shape).numpy().reshape(-1) for seed in seeds]).tolist()
    coefficients = [(2**18 - 1 - index) * (1 if row[1] > 0 else -1) for index, row in enumerate(entries)]
    exact = [sum(c * z for c, z in zip(coefficients, column, strict=True)) for column in zip(*entries, strict=True)]
    assert 2**45 < abs(exact[1]) < 2**53
    found = weighted_sum("gaussian", seeds, coefficients, "w", shape).flatten().tolist()
    assert found == [float(np.float32(float(value))) for value in exact]


@pytest.mark.parametrize("kind", ["rank1", "rank4", "rademacher", "gaussian", "core"])
def test_a_sum_that_float64_cannot_hold_is_refused_from_the_first_such_one_on(kind: Kind) -> None:
    """The largest entry of a direction, times coefficients that reach 2^53 together, and one more."""
    entry = {"rank4": 4, "gaussian": int(max(abs(directions._normal_table())))}.get(kind, 1)
    coefficients = [2**24, -(2**53 // entry) + 2**24]
    directions.check_exact(kind, coefficients, "it")
    with pytest.raises(
        UserError, match=rf"^it adds 3 {kind} directions .* 9.01e\+15, above 2\^53, .*: take fewer queries"
    ):
        directions.check_exact(kind, [*coefficients, -1], "it")


@pytest.mark.slow
def test_a_million_seeds_do_not_collide() -> None:
    seeds: set[int] = set()
    for step, client in itertools.product(range(50), range(20)):
        seeds.update(directions.direction_seeds(7, step, client, 500, local_steps=2))
    assert len(seeds) == 1_000_000


def test_derived_seeds_do_not_collide() -> None:
    grid = itertools.product(("zofed-direction", "zofed-probe"), range(10), range(50), range(10), range(10))
    seeds = {directions.derive_seed(purpose, *numbers) for purpose, *numbers in grid}
    shorter = {
        directions.derive_seed("zofed-direction", *numbers) for numbers in itertools.product(range(50), repeat=2)
    }
    assert len(seeds | shorter) == 100_000 + 2_500
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_seeds_of_a_step_run_local_step_by_local_step_and_query_by_query() -> None:
    seeds = directions.direction_seeds(run_seed=1, step=2, client=3, queries=2, local_steps=3)
    derive = directions.derive_seed
    assert seeds == [derive("zofed-direction", 1, 2, 3, local, query) for local in range(3) for query in range(2)]
    assert directions.direction_seeds(1, 2, 3, queries=5)[:2] == seeds[:2]


def test_no_global_random_state_is_read_or_written() -> None:
    def draw() -> list[str]:
        name, shape = "w", (9, 7)
        return [
            *(sha256(direction(kind, 1, name, shape)) for kind in KINDS),
            *(sha256(weighted_sum(kind, [1, 2], [3, 4], name, shape)) for kind in KINDS),
            sha256(directions.normal(1, name, shape)),
            sha256(directions.random_bits(1, name, shape)),
            sha256(directions.positions(1, name, 10**6, 9)),
        ]

    def states() -> str:
        return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    with np.printoptions(threshold=10**6):
        before = states()
        first = draw()
        assert states() == before
    _ = random.random(), np.random.rand(), torch.rand(1)
    assert draw() == first


def test_normal_entries_look_standard_normal() -> None:
    values = directions.normal(3, "w", (1000, 100))
    assert values.dtype == torch.float32
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.std()) - 1) < 0.01
    inside = [float((values.abs() < limit).float().mean()) for limit in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)


def test_the_normal_table_is_odd_and_rises() -> None:
    table = directions._normal_table()
    assert len(table) == 65536
    assert (table == -table[::-1]).all()
    assert (np.diff(table) >= 0).all()


def test_random_bits_are_sixteen_uniform_bits() -> None:
    bits = directions.random_bits(3, "w", (50_000,))
    assert 0 <= int(bits.min()) < 10
    assert 65_525 < int(bits.max()) <= 65_535
    shares = [float((bits >> place & 1).float().mean()) for place in range(16)]
    assert shares == pytest.approx([0.5] * 16, abs=0.01)


def test_positions_stay_inside_and_cover_small_tensors() -> None:
    assert directions.positions(1, "w", 10, 10).tolist() == list(range(10))
    assert directions.positions(1, "w", 3, 10).tolist() == [0, 1, 2]
    drawn = directions.positions(1, "w", 1000, 400)
    assert drawn.shape == (400,)
    assert 0 <= drawn.min() < 50
    assert 950 < drawn.max() < 1000
    assert drawn.tolist() != directions.positions(2, "w", 1000, 400).tolist()


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        ("h.0.weight", "h.0.weight"),
        ("module.h.0.weight", "h.0.weight"),
        ("_orig_mod.h.0.weight", "h.0.weight"),
        ("module._orig_mod.h.0.weight", "h.0.weight"),
        ("_orig_mod.module.h.0.weight", "h.0.weight"),
        ("h.module.weight", "h.module.weight"),
        ("modules.weight", "modules.weight"),
    ],
)
def test_a_wrapper_changes_neither_name_nor_id(wrapped: str, name: str) -> None:
    assert directions.canonical_name(wrapped) == name
    assert tensor_id(wrapped) == tensor_id(name)


def test_names_that_share_an_id_are_refused() -> None:
    directions.check_distinct(["a", "b", "a.b", "b.a"])
    directions.check_distinct([])
    with pytest.raises(UserError, match=r"'a' and 'module\.a'.*rename one"):
        directions.check_distinct(["a", "b", "module.a"])
