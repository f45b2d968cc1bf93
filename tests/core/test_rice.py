"""Integers in Golomb-Rice codes come back, have one way to be written, and take what their spread needs."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zofed.core import rice

INTEGERS = st.integers(-(2**63), 2**63 - 1)
BITS = st.binary(max_size=30) | st.integers(0, 239).map(lambda place: (1 << place).to_bytes(30, "big"))
SOME = st.lists(INTEGERS | st.integers(-3, 3), max_size=20)


@given(SOME | st.lists(st.integers(-40, 40), max_size=200), st.binary(max_size=3), st.binary(max_size=3))
@settings(max_examples=400, deadline=None, database=None)
def test_integers_come_back_from_between_other_bytes(values: list[int], before: bytes, behind: bytes) -> None:
    raw = before + rice.packed(values) + behind
    assert rice.unpacked(raw, len(before), len(values)) == (tuple(values), len(raw) - len(behind))


@given(
    st.binary(max_size=40) | st.tuples(st.integers(0, 64), BITS).map(lambda p: bytes([p[0]]) + p[1]),
    st.integers(-1, 60),
)
@settings(max_examples=600, deadline=None, database=None)
def test_bytes_that_are_read_are_those_that_would_be_written(raw: bytes, count: int) -> None:
    try:
        values, end = rice.unpacked(raw, 0, count)
    except ValueError:
        return
    assert len(values) == count
    assert rice.packed(values) == raw[:end]


@given(st.lists(INTEGERS | st.integers(-3, 3), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None, database=None)
def test_every_cut_is_refused(values: list[int]) -> None:
    raw = rice.packed(values)
    for end in range(len(raw)):
        with pytest.raises(ValueError, match="integers"):
            rice.unpacked(raw[:end], 0, len(values))


def test_the_bytes_of_some() -> None:
    assert rice.packed(()) == b""
    assert rice.packed((0, 0, 0)) == bytes([0, 0b11100000])
    # zigzags 3, 0, 8, whose mean is 3, so that k is 1: 1, 0, 4 in front, then 1, 0, 0
    assert rice.packed((-2, 0, 4)) == bytes([1, 0b01100001, 0b10000000])


@pytest.mark.parametrize(
    ("raw", "count", "reason"),
    [
        (bytes([0, 0b11110000]), 3, "more bits than they need"),  # filled by a one
        (bytes([1, 0b11100000]), 3, "more bits than they need"),  # k of 0 would do
        (bytes([64, 0b11100000]), 3, "more than 64 bits"),
        (bytes([63, 0b00100000, *bytes(8)]), 1, "more than 64 bits"),  # 2 << 63
        (bytes([62, 0b00001000, *bytes(8)]), 1, "more than 64 bits"),
        (bytes([0, 0]), 3, "cut"),
        (bytes([0, 0b11000000]), 3, "cut"),
        (bytes([0, 0b11100000]), 9, "where 2 bytes are left"),
        (b"", 1, "where 0 bytes are left"),
        (bytes([0, 0b11100000]), -1, "-1 integers"),
        (bytes(9), 2**62, "where 9 bytes are left"),
    ],
)
def test_what_was_not_written_so_is_refused(raw: bytes, count: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        rice.unpacked(raw, 0, count)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8, 18])
def test_coefficients_take_what_their_spread_needs(bits: int) -> None:
    drawn = [random.Random(bits).gauss(0.0, 1.0) for _ in range(2048)]
    values = [round(value / max(map(abs, drawn)) * (2**bits - 1)) for value in drawn]
    spread = math.sqrt(sum(value * value for value in values) / len(values))
    entropy = math.log2(spread * math.sqrt(2 * math.pi * math.e))  # of a rounded normal one, in bits
    taken = 8 * len(rice.packed(values)) / len(values)
    assert entropy - 0.1 < taken < entropy + 0.45
    rests = [2 * value if value >= 0 else -2 * value - 1 for value in values]
    best = min(sum(rest >> k for rest in rests) + len(rests) * (k + 1) for k in range(24))
    assert taken <= 1.02 * best / len(values) + 0.01


def test_one_large_among_many_small_costs_no_more_than_k_and_three_bits() -> None:
    for outlier in (2**10, 2**24, 2**63 - 1):
        values = (outlier, *(0,) * 255)
        raw = rice.packed(values)
        assert len(raw) <= 1 + math.ceil(256 * (raw[0] + 3) / 8) <= 1 + 256 * rice.LONGEST


def test_more_than_64_bits_are_not_written() -> None:
    for values in ((2**63,), (-(2**63) - 1, 0, 0), (2**64, *(0,) * 40)):
        with pytest.raises(OverflowError, match="64 bits"):
            rice.packed(values)
