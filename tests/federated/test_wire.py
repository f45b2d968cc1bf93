"""What travels comes back as it was, and whatever else comes is malformed."""

import contextlib
import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from exchanges import GIVEN, GOOD, PLAN, odd_contents
from flwr.app import RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st

from zofed.core import varint
from zofed.federated import wire
from zofed.federated.messages import pack, payload, size, unpack
from zofed.federated.protocol import Answer
from zofed.federated.wire import Evaluation, Final, Greeting, Introduction, Malformed

CONTENTS: tuple[Any, ...] = (
    PLAN,
    replace(PLAN, rebuild=1, updates=b"u" * 200, guide=b"g", snapshot=b"s", task="guided", steps=1024, classes=2),
    GOOD,
    replace(GOOD, coefficients=(), loss=math.inf, problem="not_finite", head=b"h" * 16),
    replace(GOOD, coefficients=(-(2**63), 2**63 - 1, 0), client=-1),
    GIVEN,
    Greeting(b'{"a":1}', 3),
    Introduction(1, 4, 100, "fo", b"h" * 16, "{}", "", "/path 0.1.0"),
    Introduction(-1, 0, 0, "", b"", "", "no such dätä", "/päth"),
    Final(2, "ab" * 32, b"h" * 16),
    Evaluation(3, b"", 1.5, 10**6),
)
KINDS = tuple({type(content): content for content in CONTENTS}.values())


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: type(content).__name__)
def test_a_message_comes_back_as_it_was(content: Any) -> None:
    packed = pack(content)
    again = unpack(type(content), packed)
    assert again == content
    assert [type(getattr(again, field.name)) for field in fields(content)] == [
        type(getattr(content, field.name)) for field in fields(content)
    ]
    assert payload(packed) == len(wire.encoded(content))


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: type(content).__name__)
def test_a_message_comes_back_from_flowers_wire(content: Any) -> None:
    packed = pack(content)
    parts = {object_id: part.deflate() for object_id, part in get_all_nested_objects(packed).items()}
    assert size(packed) == sum(len(part) for part in parts.values())
    received = inflate_object_from_contents(packed.object_id, parts)
    assert isinstance(received, RecordDict)
    assert unpack(type(content), received) == content


def test_every_kind_of_message_is_tried() -> None:
    assert {type(content) for content in CONTENTS} == set(wire.KINDS)


@pytest.mark.parametrize(("loss", "found"), [(1e300, math.inf), (-1e300, -math.inf), (0.1, 0.10000000149011612)])
def test_a_loss_travels_as_a_single(loss: float, found: float) -> None:
    assert unpack(Answer, pack(replace(GOOD, loss=loss))).loss == found


def test_a_nan_loss_travels() -> None:
    assert math.isnan(unpack(Answer, pack(replace(GOOD, loss=math.nan))).loss)


def test_a_hundred_slopes_cost_twenty_bits_each() -> None:
    short, long = (size(pack(replace(GOOD, coefficients=(2**18 - 1,) * count))) for count in (20, 120))
    assert 250 <= long - short <= 255


@pytest.mark.parametrize("content", KINDS, ids=lambda content: type(content).__name__)
def test_every_cut_and_every_byte_more_is_malformed(content: Any) -> None:
    raw = wire.encoded(content)
    for wrong in [raw[:at] for at in range(len(raw))] + [raw + b"\x00"]:
        with pytest.raises(Malformed):
            wire.decoded(type(content), wrong)


def test_a_message_of_another_kind_is_malformed() -> None:
    for content, other in itertools.permutations(KINDS, 2):
        with pytest.raises(Malformed, match=f"no {type(content).__name__}"):
            unpack(type(content), pack(other))


@given(st.sampled_from(wire.KINDS), st.binary(max_size=60))
@settings(max_examples=400, deadline=None, database=None)
def test_arbitrary_bytes_are_malformed_or_a_message(kind: type[Any], raw: bytes) -> None:
    try:
        found = wire.decoded(kind, bytes([wire.KINDS.index(kind)]) + raw)
    except Malformed:
        return
    assert wire.decoded(kind, wire.encoded(found)) == found or "nan" in repr(found)


@given(st.sampled_from(KINDS), st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=300, deadline=None, database=None)
def test_a_message_with_a_byte_changed_is_malformed_or_a_message(content: Any, at: int, value: int) -> None:
    raw = bytearray(wire.encoded(content))
    raw[at % len(raw)] = value
    with contextlib.suppress(Malformed):
        assert type(wire.decoded(type(content), bytes(raw))) is type(content)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), st.binary(max_size=3))
@settings(max_examples=200, deadline=None, database=None)
def test_integers_come_back_from_their_bytes(values: list[int], before: bytes) -> None:
    raw = before + varint.packed(values)
    assert varint.unpacked(raw + b"rest", len(before), len(values)) == (tuple(values), len(raw))


def test_a_length_beyond_the_message_costs_no_memory() -> None:
    for count in (2**40, 2**63 - 1, -1):
        raw = wire.encoded(replace(GOOD, coefficients=()))
        empty = varint.packed((0, -31))  # the length of no coefficients, then the exponent
        at = raw.rindex(empty)
        with pytest.raises(Malformed, match="field coefficients"):
            wire.decoded(Answer, raw[:at] + varint.packed((count,)) + raw[at + 1 :])


@pytest.mark.parametrize("way", odd_contents())
def test_a_message_that_lies_otherwise_is_malformed(way: str) -> None:
    with pytest.raises(Malformed):
        unpack(Answer, odd_contents()[way])
    is_among_others = way in ("a record more", "a field more")
    assert payload(odd_contents()[way]) == (len(wire.encoded(GOOD)) if is_among_others else 0)


@pytest.mark.parametrize("counts", ["", "[]", "{", '{"a": "b"}', '{"a": true}', '{"a": -1}', "1", '"a"'])
def test_counts_that_are_no_table_are_none(counts: str) -> None:
    told = Introduction(0, 1, 5, "fo", b"", counts, "", "")
    assert told.held_counts() == {}
    assert replace(told, counts='{"web": 3}').held_counts() == {"web": 3}
