"""A journal must give back exactly what was acknowledged, or say by name why it cannot.

To write the golden files anew (only together with a new journal format):
ZOFED_WRITE_GOLDEN=1 python tests/core/test_journal.py
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zofed.base import checksums
from zofed.base.errors import UserError
from zofed.core import aggregation, directions, journal, records, rice, varint
from zofed.core.digests import tensors_digest
from zofed.core.genesis import make_genesis
from zofed.core.journal import Journal, JournalError
from zofed.core.measure import Update
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Guided, Record, Seeded, Skipped, Spread
from zofed.core.replica import Replica

GENESIS = {"seed": 5, "words": ["b", "a"]}
RECORDS: tuple[Record, ...] = (
    Seeded(1, 0.5, (0, 3), 2, (1, -(2**18) + 1, 0, 4), -20, 4, 1, 0.25),
    Skipped(2),
    Dense(3, 0.1, bytes(range(32))),
    Seeded(4, 1e-3, (7,), 1, (12345, -6), 3, 0.1, 2, 0.5),
)


def written(path: Path, contents: Sequence[Record] = RECORDS) -> bytes:
    """The bytes of a new journal at `path` with these records."""
    with Journal.create(path, GENESIS) as opened:
        for record in contents:
            opened.append(record)
    return path.read_bytes()


def ends(raw: bytes, entries: Sequence[journal.Entry]) -> list[int]:
    """Offset behind the header and behind each entry."""
    found = [len(raw) - sum(len(entry.raw) for entry in entries)]
    for entry in entries:
        found.append(found[-1] + len(entry.raw))
    return found


def found_in(path: Path, raw: bytes) -> journal.Contents:
    path.write_bytes(raw)
    return journal.read(path)


def records_of(contents: journal.Contents) -> tuple[Record, ...]:
    return tuple(entry.record for entry in contents.entries)


# --- records ---

ROUND = st.integers(0, 2**63 - 1)
RATE = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
PRIVACY = st.floats(allow_nan=False)
DIVISOR = st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.integers(1, 2**32 - 1).map(float)


@st.composite
def seeded(draw: st.DrawFn, fewest: int = 1) -> Seeded:
    """fewest: clients; a guided record's seeded part may be empty."""
    clients = draw(st.lists(st.integers(0, 2**32 - 1), min_size=fewest, max_size=4))
    local_steps, queries = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    count = len(clients) * local_steps * queries
    exponent = draw(st.integers(records.SMALLEST_EXPONENT, records.LARGEST_EXPONENT))
    return Seeded(
        draw(ROUND),
        draw(RATE),
        tuple(clients),
        queries,
        tuple(draw(st.lists(st.integers(-(2**24), 2**24), min_size=count, max_size=count))),
        exponent,
        max(draw(DIVISOR), 2.0 ** (exponent - records.LARGEST_WORTH)),
        local_steps,
        draw(PRIVACY),
    )


DIGEST = st.binary(min_size=32, max_size=32)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
ANY_RECORD = (
    seeded()
    | st.builds(Dense, ROUND, RATE, DIGEST)
    | st.builds(Skipped, ROUND)
    | st.builds(Guided, seeded(0), DIGEST, FINITE, FINITE, FINITE, st.booleans())
)


@given(ANY_RECORD)
@settings(max_examples=200, deadline=None, database=None)
def test_a_record_comes_back_from_its_bytes(record: Record) -> None:
    assert records.decode(records.encode(record)) == record


def test_a_privacy_budget_of_nan_comes_back() -> None:
    record = Seeded(1, 0.5, (0,), 1, (3,), 0, 1)
    again = records.decode(records.encode(record))
    assert isinstance(again, Seeded)
    assert math.isnan(again.privacy_spent)
    assert records.encode(again) == records.encode(record)


@given(
    st.binary(max_size=80) | st.tuples(st.integers(0, 5), st.binary(max_size=80)).map(lambda p: bytes([p[0]]) + p[1])
)
@settings(max_examples=400, deadline=None, database=None)
def test_arbitrary_bytes_are_a_record_or_a_value_error(body: bytes) -> None:
    try:
        record = records.decode(body)
    except ValueError:
        return
    assert records.encode(record, body[0]) == body


@given(ANY_RECORD, st.data())
@settings(max_examples=100, deadline=None, database=None)
def test_a_record_with_bytes_missing_or_added_is_refused(record: Record, data: st.DataObject) -> None:
    body = records.encode(record)
    shorter = body[: data.draw(st.integers(0, len(body) - 1))]
    for wrong in (shorter, body + data.draw(st.binary(min_size=1, max_size=9))):
        with pytest.raises(ValueError, match=r"record|integer"):
            records.decode(wrong)


def longer(encoded: bytes) -> bytes:
    """The same integer in one byte more than it needs."""
    return encoded[:-1] + bytes([encoded[-1] | 128, 0])


@given(st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=200, deadline=None, database=None)
def test_an_integer_has_one_encoding(value: int) -> None:
    raw = varint.packed((value,))
    assert varint.unpacked(b"x" + raw, 1, 1) == ((value,), 1 + len(raw))
    assert len(raw) == max(1, math.ceil((max(value, ~value).bit_length() + 1) / 7))
    with pytest.raises(ValueError, match="integer"):
        varint.unpacked(longer(raw), 0, 1)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**68])
def test_an_integer_of_more_than_64_bits_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        varint.unpacked(varint.packed((value,)), 0, 1)


@given(ANY_RECORD, st.data())
@settings(max_examples=100, deadline=None, database=None)
def test_a_record_with_an_integer_longer_than_needed_is_refused(record: Record, data: st.DataObject) -> None:
    body = records.encode(record)
    seeded_at = len(records._GUIDED.pack(bytes(32), 0, 0, 0, False)) if isinstance(record, Guided) else 0
    start = 1 + len(varint.packed((record.round,)))
    places = [1]  # the round's
    if isinstance(record, Seeded | Guided):
        own = record if isinstance(record, Seeded) else record.seeded
        at = start + seeded_at + records._SEEDED.size + (0 if math.isnan(own.privacy_spent) else records._PRIVACY.size)
        rest = len(own.clients) + 4 + (len(own.coefficients) if isinstance(record, Guided) else 0)
        for _ in range(rest):
            places.append(at)
            _, at = varint.unpacked(body, at, 1)
    at = data.draw(st.sampled_from(places))
    _, end = varint.unpacked(body, at, 1)
    with pytest.raises(ValueError, match="integer"):
        records.decode(body[:at] + longer(body[at:end]) + body[end:])


def test_a_record_that_claims_more_coefficients_than_memory_holds_is_refused() -> None:
    head = bytes([Seeded.kind]) + varint.packed((1,)) + records._SEEDED.pack(0.1, 1.0, False)
    for count, steps, queries in ((2**32 - 1, 1, 1), (1, 2**16, 2**16), (2**40, 2**20, 2**20), (3, 2**63 - 1, 1)):
        claims = head + varint.packed((0, steps, queries, count))
        for padding in (b"", bytes(100), bytes(2**16)):
            with pytest.raises(ValueError, match="integers where"):
                records.decode(claims + padding)


def test_a_record_of_a_billion_zeros_of_a_bit_each_is_refused() -> None:
    head = bytes([Seeded.kind]) + varint.packed((1,)) + records._SEEDED.pack(0.1, 1.0, False)
    count = records.LARGEST_RECORD + 1
    with pytest.raises(ValueError, match="16777217 integers where a record has 16,777,216"):
        records.decode(head + varint.packed((0, 1, count, 1, 0)) + b"\x00" + b"\xff" * (count // 8 + 1))


@pytest.mark.parametrize("count", [-1, -(2**40)])
def test_a_record_of_fewer_than_no_clients_is_refused(count: int) -> None:
    head = bytes([Seeded.kind]) + varint.packed((1,)) + records._SEEDED.pack(0.1, 1.0, False)
    for steps, queries in ((1, 1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1)):
        with pytest.raises(ValueError, match=r"integers where|a record of"):
            records.decode(head + varint.packed((0, steps, queries, count)) + bytes(9))


def test_a_record_of_a_negative_round_or_client_is_refused() -> None:
    with pytest.raises(ValueError, match="not as it is written"):
        records.decode(bytes([Skipped.kind]) + varint.packed((-1,)))
    for clients in ((-1,), (3, -1), (2**32,)):
        with pytest.raises(ValueError, match="of the clients"):
            records.decode(records.encode(Seeded(1, 0.1, clients, 1, (1,) * len(clients), 0, 1.0)))


def test_a_seeded_record_takes_twenty_bits_a_slope_at_most() -> None:
    few, many = (len(records.encode(Seeded(9, 0.1, (0,), k, (2**18 - 1,) * k, -30, 1.0))) for k in (32, 56))
    assert many - few == 24 * 20 / 8
    assert few == 2 + 17 + 4 + 1 + 1 + 32 * 20 / 8


@pytest.mark.parametrize("divisor", [0.0, -0.0, -1.0, 4e-324, 2.0**-101, math.inf, -math.inf, math.nan, -math.nan])
def test_a_divisor_that_is_not_a_positive_number_is_refused(divisor: float) -> None:
    body = records.encode(Seeded(1, 0.5, (0, 1), 1, (3, -2), 0, divisor))
    with pytest.raises(ValueError, match=r"divisor .* moves nothing"):
        records.decode(body)
    with pytest.raises(ValueError, match="divisor"):
        list(journal.parse_entries(journal.link(bytes(16), Seeded(1, 0.5, (0,), 1, (3,), 0, divisor)).raw, bytes(16)))


@pytest.mark.parametrize("divisor", [2.0**-100, 0.1, 1 / 3, 1.0, 2.0**32 + 0.5, 1.7976931348623157e308])
def test_a_divisor_comes_back_bit_for_bit(divisor: float) -> None:
    record = Seeded(1, 0.5, (0, 1), 1, (3, -2), 0, divisor, 1, 0.0)
    again = records.decode(records.encode(record))
    assert again == record
    assert isinstance(again, Seeded)
    assert again.divisor.hex() == divisor.hex()


@pytest.mark.parametrize("exponent", [records.SMALLEST_EXPONENT - 1, records.LARGEST_EXPONENT + 1, -(2**15), 2**15 - 1])
def test_an_exponent_beyond_what_float64_holds_is_refused(exponent: int) -> None:
    with pytest.raises(ValueError, match="exponent"):
        records.decode(records.encode(Seeded(1, 0.5, (0,), 1, (3,), exponent, 1.0)))


@pytest.mark.parametrize("value", [2**24 + 1, -(2**24) - 1, -(2**31)])
def test_a_coefficient_that_cannot_be_summed_exactly_is_neither_written_nor_read(value: int) -> None:
    with pytest.raises(ValueError, match="coefficient above 16777216"):
        records.encode(Seeded(1, 0.5, (0,), 2, (1, value), 0, 4.0))
    good = records.encode(Seeded(1, 0.5, (0,), 2, (1, 2**24), 0, 4.0))
    assert records.encode(records.decode(good)) == good
    with pytest.raises(ValueError, match="coefficient above 16777216"):
        records.decode(good[: -len(rice.packed((1, 2**24)))] + rice.packed((1, value)))


def test_a_record_that_could_not_be_read_back_is_not_written() -> None:
    with pytest.raises(ValueError, match="coefficient"):
        records.encode(Seeded(1, 0.5, (0, 1), 2, (1, 2, 3), 0, 4))


@given(st.lists(st.floats(-(2.0**117), 2.0**117, allow_nan=False), max_size=9))
@settings(max_examples=300, deadline=None, database=None)
def test_integers_lie_within_half_a_step_of_the_slopes(slopes: list[float]) -> None:
    integers, exponent = records.to_integers(slopes)
    largest = max((abs(Fraction(slope)) for slope in slopes), default=Fraction(0))
    bound = max(largest / 2**18, Fraction(1, 2**451))  # no exponent is below -450
    assert len(integers) == len(slopes)
    assert all(abs(integer) < 2**18 for integer in integers)
    for integer, slope in zip(integers, slopes, strict=True):
        assert abs(integer * Fraction(2) ** exponent - Fraction(slope)) <= bound
    if largest > Fraction(1, 2**430):
        assert max(abs(integer) for integer in integers) >= 2**17


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**118])
def test_slopes_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        records.to_integers([1.0, bad, 2.0])


def test_all_slopes_zero_are_all_integers_zero() -> None:
    assert records.to_integers([0.0, -0.0])[0] == (0, 0)
    assert records.to_integers([])[0] == ()


@given(st.lists(st.integers(-(2**18) + 1, 2**18 - 1), max_size=9), st.integers(0, 1100))
@settings(max_examples=200, deadline=None, database=None)
def test_a_coarser_exponent_rounds_to_nearest_ties_upwards(integers: list[int], shift: int) -> None:
    exact = [Fraction(integer, 2**shift) for integer in integers]
    assert aggregation.rounded_quotients(integers, 1, shift) == tuple(math.floor(v + Fraction(1, 2)) for v in exact)


# --- the spread of the slopes ---

STEPS = st.lists(
    st.tuples(st.lists(st.integers(-(2**18) + 1, 2**18 - 1), min_size=1, max_size=6), st.integers(-40, 10)),
    min_size=1,
    max_size=30,
)


@pytest.mark.slow
@given(STEPS)
@settings(max_examples=200, deadline=None, database=None)
def test_a_spread_is_the_weighted_mean_square_of_the_slopes_so_far(steps: list[tuple[list[int], int]]) -> None:
    """In fractions: weights 0.9^age, the newest of age 0, over the sum of the weights."""
    spread = Spread()
    for coefficients, exponent in steps:
        spread = spread.after(coefficients, exponent)
    squares = [sum((c * Fraction(2) ** e) ** 2 for c in cs) / Fraction(len(cs)) for cs, e in steps]
    ages = [Fraction(9, 10) ** age for age in reversed(range(len(steps)))]
    expected = sum(age * square for age, square in zip(ages, squares, strict=True)) / sum(ages)
    assert spread.value == pytest.approx(math.sqrt(expected) if expected else 1.0, rel=1e-12)
    assert spread.weight == pytest.approx(1 - 0.9 ** len(steps), rel=1e-12)


def test_the_first_spread_is_that_of_its_own_slopes() -> None:
    assert Spread().value == 1.0
    assert Spread().after((3, -4), -1).value == pytest.approx(math.sqrt(12.5) / 2, rel=1e-15)
    assert Spread().after((0, 0, 0), 7).value == 1.0
    once = Spread().after((5, 5), 0)
    assert once.after((5, -5), 0).value == pytest.approx(5.0, rel=1e-15)
    assert once.after((0, 0), 0).value == pytest.approx(5 * math.sqrt(0.09 / 0.19), rel=1e-12)
    assert once.value == pytest.approx(5.0, rel=1e-15)  # a spread is never changed in place


@pytest.mark.parametrize("exponent", [records.SMALLEST_EXPONENT, -300, 0, 60, records.LARGEST_EXPONENT])
def test_spreads_of_every_size_are_positive_and_finite(exponent: int) -> None:
    value = Spread().after((2**18 - 1, 1), exponent).value
    assert 0.0 < value < math.inf
    records.decode(records.encode(Seeded(1, 0.1, (0,), 2, (2**18 - 1, 1), exponent, 2 * value)))


# --- files ---


def test_what_was_appended_is_read_and_the_head_names_it(tmp_path: Path) -> None:
    path = tmp_path / "journal.zofed"
    with Journal.create(path, GENESIS) as opened:
        assert opened.head == journal.genesis_chain(GENESIS)
        entries = [opened.append(record) for record in RECORDS]
        assert opened.head == entries[-1].chain
    contents = journal.read(path)
    assert contents == journal.Contents(GENESIS, tuple(entries), path.stat().st_size, 0)
    assert contents.head == entries[-1].chain
    assert records_of(contents) == RECORDS
    with Journal.open(path) as again:
        assert (again.genesis, again.entries, again.head, again.torn) == (GENESIS, entries, entries[-1].chain, 0)


def test_a_journal_continued_is_the_journal_written_at_once(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole")
    for count in range(len(RECORDS)):
        path = tmp_path / f"split-{count}"
        written(path, RECORDS[:count])
        with Journal.open(path) as opened:
            for record in RECORDS[count:]:
                opened.append(record)
        assert path.read_bytes() == whole


def test_the_same_history_has_the_same_head_and_another_has_not(tmp_path: Path) -> None:
    heads = {journal.read(path).head for path in (tmp_path / "a", tmp_path / "b") if written(path)}
    assert len(heads) == 1
    written(tmp_path / "c", (*RECORDS[:-1], Skipped(9)))
    assert journal.read(tmp_path / "c").head not in heads
    assert journal.genesis_chain({"a": 1, "b": 2}) == journal.genesis_chain({"b": 2, "a": 1})
    assert journal.genesis_chain({"a": 1}) != journal.genesis_chain({"a": 2})


def test_an_existing_journal_is_never_overwritten(tmp_path: Path) -> None:
    raw = written(tmp_path / "j")
    with pytest.raises(UserError, match=r"exists.*--out.*--resume"):
        Journal.create(tmp_path / "j", GENESIS)
    assert (tmp_path / "j").read_bytes() == raw


def test_a_new_journal_leaves_one_file(tmp_path: Path) -> None:
    written(tmp_path / "journal.zofed")
    assert [path.name for path in tmp_path.iterdir()] == ["journal.zofed"]


def test_every_cut_leaves_the_longest_whole_prefix(tmp_path: Path) -> None:
    raw = written(tmp_path / "j")
    entries = journal.read(tmp_path / "j").entries
    whole = ends(raw, entries)
    for cut in range(len(raw) + 1):
        if cut < whole[0]:
            with pytest.raises(JournalError, match=r"not a zofed journal|damaged header"):
                found_in(tmp_path / "cut", raw[:cut])
            continue
        contents = found_in(tmp_path / "cut", raw[:cut])
        kept = sum(end <= cut for end in whole) - 1
        assert contents == journal.Contents(GENESIS, entries[:kept], whole[kept], cut - whole[kept])


@pytest.mark.slow
def test_every_flipped_bit_is_named_or_loses_the_last_record_only(tmp_path: Path) -> None:
    raw = written(tmp_path / "j")
    entries = journal.read(tmp_path / "j").entries
    last = ends(raw, entries)[-2]
    refused = torn = 0
    for at in range(len(raw)):
        for bit in range(8):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << bit
            try:
                contents = found_in(tmp_path / "flipped", bytes(damaged))
            except JournalError:
                refused += 1
                continue
            assert at >= last
            assert contents == journal.Contents(GENESIS, entries[:-1], last, len(raw) - last)
            torn += 1
    assert refused + torn == 8 * len(raw)
    assert torn >= 8 * (len(entries[-1].raw) - journal.CHAIN_BYTES)


def test_a_tail_of_zeros_after_a_power_loss_is_torn(tmp_path: Path) -> None:
    """A file system may have grown the file before the bytes of an unacknowledged entry reached the disk."""
    raw = written(tmp_path / "j")
    entries = journal.read(tmp_path / "j").entries
    last = ends(raw, entries)[-2]
    for cut in range(last, len(raw)):
        contents = found_in(tmp_path / "zeros", raw[:cut] + bytes(len(raw) - cut))
        assert records_of(contents) == RECORDS[:-1]
        assert (contents.end, contents.torn) == (last, len(raw) - last)


def test_damage_before_whole_entries_is_refused_with_its_place(tmp_path: Path) -> None:
    raw = written(tmp_path / "j")
    whole = ends(raw, journal.read(tmp_path / "j").entries)
    for round_, (start, end) in enumerate(itertools.pairwise(whole[:-1])):
        for damaged in (raw[:start] + bytes(end - start) + raw[end:], raw[:start] + b"xyz" + raw[start:]):
            with pytest.raises(JournalError, match=rf"damaged at byte {start}, after round {round_}, .*restore it"):
                found_in(tmp_path / "damaged", damaged)


def test_entries_left_out_or_swapped_are_refused(tmp_path: Path) -> None:
    raw = written(tmp_path / "j")
    parts = [entry.raw for entry in journal.read(tmp_path / "j").entries]
    header = raw[: ends(raw, journal.read(tmp_path / "j").entries)[0]]
    for order in ([1, 2, 3], [0, 2, 3], [1, 0, 2, 3], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3]):
        with pytest.raises(JournalError, match=r"edited.*restore it from a copy"):
            found_in(tmp_path / "reordered", header + b"".join(parts[index] for index in order))


@pytest.mark.parametrize("index", range(len(RECORDS)))
def test_an_edited_entry_with_its_checksum_made_good_is_refused(tmp_path: Path, index: int) -> None:
    raw = written(tmp_path / "j")
    entries = journal.read(tmp_path / "j").entries
    start = ends(raw, entries)[index]
    forged = journal.link(entries[index].chain, Skipped(77)).raw  # a sound entry, but from another history
    with pytest.raises(JournalError, match=rf"{tmp_path}.*edited.*byte {start}.*restore it from a copy"):
        found_in(tmp_path / "edited", raw[:start] + forged + raw[start + len(entries[index].raw) :])


def test_a_body_that_is_no_record_is_refused(tmp_path: Path) -> None:
    raw = written(tmp_path / "j", ())
    length = struct.pack("<I", 3)
    entry = length + struct.pack("<I", zlib.crc32(length + b"abc" + bytes(16))) + b"abc" + bytes(16)
    with pytest.raises(JournalError, match="edited"):
        found_in(tmp_path / "j", raw + entry)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda raw: b"", "not a zofed journal"),
        (lambda raw: b"PK\x03\x04 something else entirely", "not a zofed journal"),
        (lambda raw: raw[:8] + struct.pack("<H", 2) + raw[10:], r"^journal \S+ has format 2; .* reads format 3: .*"),
        (lambda raw: raw[:8] + struct.pack("<H", 4) + raw[10:], r"^journal \S+ has format 4; .* reads format 3: .*"),
        (lambda raw: raw[:20] + b"X" + raw[21:], r"damaged header; restore it"),
        (lambda raw: raw[:10] + b"\xff\xff\xff\xff" + raw[14:], r"damaged header"),
    ],
)
def test_what_is_no_journal_of_this_format_is_refused_by_name(
    tmp_path: Path, change: Callable[[bytes], bytes], complaint: str
) -> None:
    raw = written(tmp_path / "j")
    with pytest.raises(JournalError, match=complaint):
        found_in(tmp_path / "j", change(raw))
    with pytest.raises(JournalError, match=complaint):
        Journal.open(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == change(raw)


def test_a_header_whose_genesis_is_no_json_is_refused(tmp_path: Path) -> None:
    header = struct.pack("<8sHI", b"ZOFEDJNL", journal.FORMAT, 3) + b"{x}"
    with pytest.raises(JournalError, match="genesis that is no JSON"):
        found_in(tmp_path / "j", header + struct.pack("<I", zlib.crc32(header)))


@pytest.mark.parametrize(
    "genesis",
    [b"[" * 100_000 + b"]" * 100_000, b"[]", b"1", b'{"a": 1}', b'{"b":1,"a":2}', b'{"a":NaN}', b'{"a":1,"a":1}'],
    ids=lambda raw: raw[:12].decode(),
)
def test_a_genesis_that_zofed_did_not_write_is_refused(tmp_path: Path, genesis: bytes) -> None:
    header = struct.pack("<8sHI", b"ZOFEDJNL", journal.FORMAT, len(genesis)) + genesis
    with pytest.raises(JournalError, match=r"has a genesis that .*give its own"):
        found_in(tmp_path / "j", header + struct.pack("<I", zlib.crc32(header)))


def forged(path: Path, bodies: Sequence[bytes]) -> None:
    """A journal whose checksums and chain are right, with these bodies."""
    path.unlink(missing_ok=True)
    raw, chain = written(path, ()), journal.genesis_chain(GENESIS)
    for body in bodies:
        length = struct.pack("<I", len(body))
        chain = hashlib.blake2b(chain + body, digest_size=16).digest()
        raw += length + struct.pack("<I", zlib.crc32(length + body + chain)) + body + chain
    path.write_bytes(raw)


def body_of(rate: float, clients: tuple[int, ...] = (0,), queries: int = 1) -> bytes:
    count = len(clients) * queries
    integers = varint.packed((-20, 1, queries, len(clients), *clients)) + rice.packed((1,) * count)
    return b"\x05" + varint.packed((1,)) + struct.pack("<dd?", rate, 1.0, False) + integers


@pytest.mark.parametrize("rate", [math.nan, math.inf, -math.inf, -0.5])
@pytest.mark.parametrize("kind", ["seeded", "dense", "guided"])
def test_a_record_whose_rate_is_no_rate_is_refused(tmp_path: Path, kind: str, rate: float) -> None:
    guided = b"\x04" + varint.packed((1,)) + struct.pack("<32sddd?", bytes(32), 0.0, 1.0, 0.0, False)
    body = {
        "seeded": body_of(rate),
        "dense": b"\x02" + varint.packed((1,)) + struct.pack("<d32s", rate, bytes(32)),
        "guided": guided + body_of(rate)[2:-2] + varint.packed((1,)),
    }[kind]
    forged(tmp_path / "j", [body])
    with pytest.raises(JournalError, match=r"was edited: .* rate .*restore it from a copy"):
        journal.read(tmp_path / "j")


@pytest.mark.parametrize("body", [body_of(0.1, ()), body_of(0.1, (0,), 0)], ids=["no clients", "no queries"])
def test_a_seeded_record_that_holds_nothing_is_refused(tmp_path: Path, body: bytes) -> None:
    forged(tmp_path / "j", [body])
    with pytest.raises(JournalError, match="without a coefficient"):
        journal.read(tmp_path / "j")


def test_rounds_rise_in_a_journal_that_is_read_and_in_one_that_is_written(tmp_path: Path) -> None:
    for rounds in ([1, 1], [2, 1], [0]):
        forged(tmp_path / "j", [records.encode(Skipped(round_)) for round_ in rounds])
        with pytest.raises(JournalError, match=r"was edited: .* is of round \d, after round \d"):
            journal.read(tmp_path / "j")
    raw = written(tmp_path / "k")
    with Journal.open(tmp_path / "k") as opened:
        for again in ([Skipped(4)], [Skipped(5), Skipped(5)]):
            with pytest.raises(UserError, match="would follow round"):
                opened.append_all(again)
        opened.append(Skipped(5))
    assert (tmp_path / "k").read_bytes()[: len(raw)] == raw


def test_checksums_of_parts_are_those_of_zlib() -> None:
    chance = np.random.default_rng(0)
    raw = chance.bytes(3000)
    starts = chance.integers(0, 3000, 400)
    stops = starts + chance.integers(0, 3001 - starts)
    before = chance.integers(0, 2**32, 400).astype(np.uint32)
    found = checksums.crc32_of_parts(raw, starts, stops, before)
    every = zip(starts, stops, before, strict=True)
    assert found.tolist() == [zlib.crc32(raw[start:stop], int(crc)) for start, stop, crc in every]


@pytest.mark.slow
def test_a_damaged_tail_is_searched_in_linear_time(tmp_path: Path) -> None:
    """Every byte of it could begin an entry of a megabyte: read anew for each, that would take hours."""
    raw = written(tmp_path / "j")
    tail = b"\x01\x01\x01\x00" * 2**18
    began = time.process_time()
    contents = found_in(tmp_path / "j", raw + tail)
    assert time.process_time() - began < 20
    assert contents.torn == len(tail)
    whole = journal.link(contents.head, Skipped(7)).raw
    with pytest.raises(JournalError, match="whole entries behind the damage"):
        found_in(tmp_path / "j", raw + tail + whole + tail[:100])


def test_a_missing_journal_is_a_users_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        for call in (journal.read, Journal.open):
            with pytest.raises(JournalError, match="cannot read journal"):
                call(path)


def test_a_genesis_does_not_differ_from_itself_read_from_json() -> None:
    """Where the numbers of labels are strings."""
    genesis = {"seed": 1, "model": {"config": {"id2label": {0: "no", 1: "yes", 2: "maybe"}}}}
    read = json.loads(journal.canonical(genesis))
    assert journal.differences(read, genesis) == journal.differences(genesis, read) == []
    assert journal.differences(read, genesis | {"seed": 2}) == ["seed"]


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = tmp_path / "j"
    raw = written(path)
    with Journal.open(path):
        with pytest.raises(UserError, match="another process"):
            Journal.open(path)
        assert records_of(journal.read(path)) == RECORDS
    Journal.open(path).close()
    assert path.read_bytes() == raw


def test_opening_cuts_a_torn_tail_off_and_goes_on(tmp_path: Path) -> None:
    raw = written(tmp_path / "j")
    last = ends(raw, journal.read(tmp_path / "j").entries)[-2]
    for cut in (last + 1, last + 20, len(raw) - 1):
        path = tmp_path / f"cut-{cut}"
        path.write_bytes(raw[:cut])
        with Journal.open(path) as opened:
            assert opened.torn == cut - last
            assert path.stat().st_size == last
            opened.append(RECORDS[-1])
        assert path.read_bytes() == raw


def test_reading_repairs_nothing(tmp_path: Path) -> None:
    raw = written(tmp_path / "j")
    assert found_in(tmp_path / "j", raw[:-1]).torn > 0
    assert (tmp_path / "j").read_bytes() == raw[:-1]


# --- crashes ---

Event = tuple[str, Any]


def acknowledged_but_lost(start: bytes, events: Sequence[Event], path: Path) -> int:
    """Acknowledgements that a power loss right after them would break: only what was synced is on the disk then."""
    durable, pending, lost = start, b"", 0
    for what, value in events:
        if what == "write":
            pending += value
        elif what == "sync":
            durable, pending = durable + pending, b""
        elif value not in records_of(found_in(path, durable)):
            lost += 1
    return lost


def test_append_returns_only_after_the_record_survives_a_power_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    write, sync = os.write, journal._sync_data

    def recorded_write(file: int, data: bytes) -> int:
        count = write(file, data)
        events.append(("write", bytes(data[:count])))
        return count

    def recorded_sync(file: int) -> None:
        sync(file)
        events.append(("sync", None))

    start = written(tmp_path / "j", ())
    with Journal.open(tmp_path / "j") as opened:
        monkeypatch.setattr(os, "write", recorded_write)
        monkeypatch.setattr(journal, "_sync_data", recorded_sync)
        for record in RECORDS:
            opened.append(record)
            events.append(("acknowledge", record))
        monkeypatch.undo()
    assert [what for what, _ in events] == ["write", "sync", "acknowledge"] * len(RECORDS)
    assert acknowledged_but_lost(start, events, tmp_path / "image") == 0
    # The two classic mistakes, to prove that the check above can fail.
    early = [events[3 * (i // 3) + (0, 2, 1)[i % 3]] for i in range(len(events))]
    never = [event for event in events if event[0] != "sync"]
    assert acknowledged_but_lost(start, early, tmp_path / "image") == len(RECORDS)
    assert acknowledged_but_lost(start, never, tmp_path / "image") == len(RECORDS)


def test_a_new_journal_is_on_disk_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(file: int) -> None:
        fsync(file)
        events.append("sync folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "sync file")

    def recorded_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append("rename")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    Journal.create(tmp_path / "j", GENESIS).close()
    assert events[:3] == ["sync file", "rename", "sync folder"]


def no_space(file: int, data: bytes) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half(file: int, data: bytes, write: Callable[[int, bytes], int] = os.write) -> int:
    return write(file, data[: len(data) // 2])


def no_sync(file: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


FAULTS = {
    "disk full": (os, "write", no_space, "No space left on device; mend the disk"),
    "short write": (os, "write", half, "the disk took .* bytes; free some space"),
    "sync fails": (journal, "_sync_data", no_sync, "Input/output error; mend the disk"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_append_is_a_users_error_and_the_journal_reopens_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    owner, name, broken, complaint = FAULTS[fault]
    raw = written(tmp_path / "j", RECORDS[:3])
    with Journal.open(tmp_path / "j") as opened:
        head = opened.head
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, broken)
            with pytest.raises(UserError, match=complaint):
                opened.append(RECORDS[3])
        assert (opened.head, len(opened.entries)) == (head, 3)
    with Journal.open(tmp_path / "j") as again:
        held = tuple(entry.record for entry in again.entries)
        assert held == (RECORDS if fault == "sync fails" else RECORDS[:3])  # what was written may have arrived
        assert again.torn == (len(journal.link(head, RECORDS[3]).raw) // 2 if fault == "short write" else 0)
    if fault != "sync fails":
        assert (tmp_path / "j").read_bytes() == raw


@pytest.mark.parametrize(
    "fault",
    [
        "disk full",
        "short write",
        "sync fails",
    ],
)
def test_appending_after_a_failure_cannot_ruin_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    owner, name, broken, _ = FAULTS[fault]
    written(tmp_path / "j", RECORDS[:2])
    with Journal.open(tmp_path / "j") as opened:
        with monkeypatch.context() as patched, pytest.raises(UserError):
            patched.setattr(owner, name, broken)
            opened.append(RECORDS[2])
        with contextlib.suppress(UserError):
            opened.append(RECORDS[2])
    assert records_of(journal.read(tmp_path / "j"))[:2] == RECORDS[:2]


# --- the golden files: journals of format 3 stay readable, those whose seeded records were of kind 1 too ---

GOLDEN = Path(__file__).parent.parent / "golden"
GOLDEN_RECORDS: tuple[Record, ...] = (
    Seeded(1, 0.015625, (0, 5), 3, (2**18 - 1, -3, 70000, -123456, 0, 1), -17, 6.0),
    Skipped(2),
    Dense(3, 0.01, bytes(range(32))),
    Seeded(4, 0.3, (5,), 2, (-(2**18) + 1, 99, 1, -1), -13, 4.0, local_steps=2, privacy_spent=1.5),
    Seeded(5, 0.01, (0, 1, 2), 1, (5, -6, 7), 0, 3.0),
    Seeded(6, 0.02, (0, 9), 2, (123456, -3, 2**17, 77), -16, 2.718281828),
)
GOLDEN_CORE = "journal-format3-core.zofed"
CORE_RECORDS: tuple[Record, ...] = (  # each the square of a number of seeds
    Seeded(1, 0.5, (0,), 9, (2**18 - 1, -3, 70000, -123456, 0, 1, 5, -6, 2**17), -18, 0.5),
    Skipped(2),
    Seeded(3, 0.25, (0,), 4, (-(2**18) + 1, 99, 1, -1), -16, 0.25, privacy_spent=1.5),
    Seeded(4, 0.0, (0,), 1, (0,), records.SMALLEST_EXPONENT, 1.0),
    Seeded(5, 0.1, (0,), 1, (77,), -9, 0.1),
)
SIZE_EXPONENTS = {"conv.weight": -2, "norm.bias": 1}
GOLDEN_RUNS: dict[str, dict[str, Any]] = {
    "journal-format3.zofed": {"kind": "rank1", "optimizer": Optimizer("adamw", weight_decay=0.125)},
    "journal-format3-mudamw.zofed": {
        "kind": "rank4",
        "optimizer": Optimizer("mudamw", weight_decay=0.125, cautious=True, orthogonal=frozenset({"head.weight"})),
        "size_exponents": SIZE_EXPONENTS,
    },
    "journal-format3-gaussian.zofed": {
        "kind": "gaussian",
        "optimizer": Optimizer("sgd", momentum=0.75),
        "size_exponents": SIZE_EXPONENTS,
    },
    "journal-format3-guided.zofed": {
        "kind": "rank2",
        "optimizer": Optimizer("sgd", momentum=0.75),
        "size_exponents": SIZE_EXPONENTS,
        "backprop_optimizer": Optimizer("adamw", weight_decay=0.125),
    },
    GOLDEN_CORE: {
        "kind": "core",
        "optimizer": Optimizer("sgd", weight_decay=0.125),
        "size_exponents": SIZE_EXPONENTS,
    },
}
GOLDEN_ENDS = {  # head of the chain, digest and probe of the replayed weights
    "journal-format3.zofed": (
        "fc4d749b16f2fc9e511f2b4f3b374d50",
        "a930def323ba76aab3968c29be523a6c4e93432d95a39c08bef6943d1a445270",
        "900815cddb57e3dc",
    ),
    "journal-format3-mudamw.zofed": (
        "aef3203d19ea5dda0992df72bd18a84f",
        "0becd0560992547567c6b836da1b415a0f16edea411a3e72cfea68a9eda419d3",
        "835c96d73b21e083",
    ),
    "journal-format3-gaussian.zofed": (
        "929a518033604c9bcec98979dccb6c21",
        "da90a8c2a68ef5a4d6162f6c62a01a3fe9db3c537dfc5c1b7eea916041bba56a",
        "4bf33cc52d227201",
    ),
    "journal-format3-guided.zofed": (
        "9862edcc2881d9ee44a6ac561fc520b7",
        "5cd1002da441e80284660520e72ae058c8bd41e53af5562cab3a4b6addb785e2",
        "942ed9d9a51fedb0",
    ),
    "journal-format3-core.zofed": (
        "7a4605313f52585b8bffa26a64f33a7b",
        "fc8f2c0c2f3211e532368abd50f117a4e15a46ca343fca29860a31036afff96b",
        "9c8586f414428248",
    ),
}


HEADS_OF_KIND_1 = {
    "journal-format3.zofed": "d62993c68b4d6240ef1a92c14de25582",
    "journal-format3-mudamw.zofed": "f9caa4cc1caf751eb69944748c47f2eb",
    "journal-format3-gaussian.zofed": "e39327e5fd0a341dd79b36853190a217",
    "journal-format3-guided.zofed": "9306111c2af36466286f8c4f238ad42e",
    "journal-format3-core.zofed": "069af385d061064117af36b39cfb3a29",
}


def golden_model() -> nn.Module:
    """A small model of plain layers whose weights are multiples of 1/64, whatever torch's initialisation does."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(7, 5), "conv": nn.Conv1d(5, 3, 2), "norm": nn.LayerNorm(3), "head": nn.Linear(3, 7)}
    )
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            pattern = (torch.arange(parameter.numel()) * (7 + index)) % 61 - 30
            parameter.copy_(pattern.reshape(parameter.shape) / 64)
    return model


def golden_update() -> dict[str, torch.Tensor]:
    """The gradient that the golden journal's dense and guided records stand for."""
    return {name: torch.full_like(parameter, 0.375) for name, parameter in golden_model().named_parameters()}


def golden_guide() -> Update:
    """The guide of the golden journal's guided records: multiples of 1/32, some of each size from 0 to 1."""
    return {
        name: ((torch.arange(parameter.numel()) * (5 + index)) % 65 - 32).reshape(parameter.shape) / 32
        for index, (name, parameter) in enumerate(golden_model().named_parameters())
    }


def golden_records(name: str) -> tuple[Record, ...]:
    """The records of a golden journal."""
    if name == GOLDEN_CORE:
        return CORE_RECORDS
    return guided_records() if name == "journal-format3-guided.zofed" else GOLDEN_RECORDS


def guided_records() -> tuple[Record, ...]:
    """Guided ones, masked and not, whole guide and not, with noise and without, among the others."""
    guide = bytes.fromhex(tensors_digest(golden_guide()))
    noise = (2**18 - 1, -3, 70000, -123456)
    return (
        Guided(Seeded(1, 0.015625, (0,), 4, noise, -17, 4.0), guide, 0.5, 0.8125, 0.0, True),
        Seeded(2, 0.3, (0,), 3, (-(2**18) + 1, 99, 1), -13, 3.0),
        Guided(Seeded(3, 0.01, (0,), 4, noise, -16, 2.718281828), guide, 0.25, -0.3, 0.5, False),
        Skipped(4),
        Dense(5, 0.01, bytes(range(32))),
        Guided(Seeded(6, 0.02, (0,), 0, (), records.SMALLEST_EXPONENT, 1.0), guide, 0.0, 0.1, 0.0, False),
    )


def write_golden(path: Path, name: str) -> None:
    model = golden_model()
    names = [name for name, _ in model.named_parameters() if name != "head.bias"]
    genesis = make_genesis(model, {"name": "golden"}, names, seed=2**63 - 1, **GOLDEN_RUNS[name])
    with Journal.create(path, genesis) as opened:
        for record in golden_records(name):
            opened.append(record)


def golden_end(path: Path) -> tuple[str, str, str]:
    contents = journal.read(path)
    replica = Replica(golden_model(), contents.genesis)
    updates = {Dense: golden_update(), Guided: golden_guide()}
    for entry in contents.entries:
        replica.apply(entry, updates.get(type(entry.record)))
    return contents.head.hex(), replica.digest(), replica.probe().hex()


@pytest.mark.parametrize("name", GOLDEN_RUNS)
@pytest.mark.parametrize("folder", ["", "kind-1"])
def test_a_golden_journal_still_parses_to_its_records(folder: str, name: str) -> None:
    contents = journal.read(GOLDEN / folder / name)
    assert contents.torn == 0
    assert contents.genesis["generator"] == directions.GENERATOR
    expected = golden_records(name)
    assert [records.encode(record) for record in records_of(contents)] == [records.encode(r) for r in expected]
    assert [repr(record) for record in records_of(contents)] == [repr(record) for record in expected]


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_a_golden_journal_still_replays_to_its_weights(name: str) -> None:
    assert golden_end(GOLDEN / name) == GOLDEN_ENDS[name]
    assert golden_end(GOLDEN / "kind-1" / name) == (HEADS_OF_KIND_1[name], *GOLDEN_ENDS[name][1:])


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_the_same_run_still_writes_its_golden_journal(tmp_path: Path, name: str) -> None:
    write_golden(tmp_path / "j", name)
    assert (tmp_path / "j").read_bytes() == (GOLDEN / name).read_bytes()


def test_a_journal_of_kind_1_is_gone_on_with(tmp_path: Path) -> None:
    old = (GOLDEN / "kind-1" / "journal-format3-core.zofed").read_bytes()
    (tmp_path / "j").write_bytes(old)
    more = Seeded(6, 0.1, (0,), 4, (3, -2, 0, 1), -9, 0.1)
    with Journal.open(tmp_path / "j") as opened:
        opened.append(more)
    assert (tmp_path / "j").read_bytes().startswith(old)
    contents = journal.read(tmp_path / "j")
    assert repr(records_of(contents)) == repr((*CORE_RECORDS, more))
    origin = journal.genesis_chain(contents.genesis)
    found = journal.following(journal.bodies(contents.entries), origin, contents.entries[1].chain)
    assert found is not None and [entry.raw for entry in found] == [entry.raw for entry in contents.entries[2:]]


def test_every_golden_file_is_of_this_format_and_known() -> None:
    assert {path.name for path in (GOLDEN / "kind-1").iterdir()} == set(GOLDEN_RUNS) == set(HEADS_OF_KIND_1)
    assert {path.name for path in GOLDEN.iterdir()} - {"kind-1"} == set(GOLDEN_RUNS) == set(GOLDEN_ENDS)
    assert all(f"format{journal.FORMAT}" in name for name in GOLDEN_RUNS)


def test_an_outline_tells_what_the_genesis_tells() -> None:
    model, other = golden_model(), {"seed": 6, "generator": "another"}
    genesis = make_genesis(model, {"name": "golden"}, ["head.weight"], seed=2**63 - 1, **GOLDEN_RUNS[GOLDEN_CORE])
    sent = json.loads(journal.canonical(journal.outline(genesis)))
    for changed in (genesis, genesis | other, genesis | {"model": {"name": "olden"}}, {}):
        found = journal.differences(sent, journal.outline(changed))
        assert found == sorted(journal.differences(genesis, changed))
        assert set(found) == {key for key, value in genesis.items() if changed.get(key) != value}
    long = journal.outline(genesis | {"trainable": [["layer", "float32", [1, 2]]] * 10**4})
    assert len(journal.canonical(long)) == len(journal.canonical(sent)) < 400


# --- nothing is written that cannot be read ---

UNREADABLE: dict[str, Record] = {
    "a client below 0": Seeded(3, 0.5, (-1,), 1, (5,), -20, 4.0),
    "a client of more than 32 bits": Seeded(3, 0.5, (2**32,), 1, (5,), -20, 4.0),
    "a client of more than 64 bits": Seeded(3, 0.5, (2**80,), 1, (5,), -20, 4.0),
    "an exponent too large": Seeded(3, 0.5, (0,), 1, (5,), records.LARGEST_EXPONENT + 1, 4.0),
    "a divisor that is infinite": Seeded(3, 0.5, (0,), 1, (5,), -20, math.inf),
    "a rate that is no number": Seeded(3, math.nan, (0,), 1, (5,), -20, 4.0),
    "a coefficient too large": Seeded(3, 0.5, (0,), 1, (2**25,), -20, 4.0),
    "no local steps": Seeded(3, 0.5, (0,), 1, (), -20, 4.0, 0),
    "a round of more than 64 bits": Skipped(2**70),
    "an update that is no digest": Dense(3, 0.5, b"short"),
    "a first order's rate that is no number": Dense(3, math.nan),
    "a guide's weight that is infinite": Guided(
        Seeded(3, 0.5, (0,), 1, (5,), -20, 4.0), bytes(32), 0.5, math.inf, 0.0, False
    ),
}


@pytest.mark.parametrize("record", UNREADABLE.values(), ids=UNREADABLE)
def test_a_record_that_no_reader_takes_is_refused_before_a_byte_is_written(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "journal.zofed"
    with Journal.create(path, GENESIS) as opened:
        opened.append(RECORDS[0])
        before = path.read_bytes()
        with pytest.raises(UserError, match=f"the record of round {record.round} cannot be read back, so it is not"):
            opened.append_all([RECORDS[1], record])
        assert path.read_bytes() == before
        opened.append(RECORDS[1])
    assert records_of(journal.read(path)) == RECORDS[:2]


def test_an_entry_longer_than_a_reader_takes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LARGEST_BODY", 40)
    with Journal.create(tmp_path / "journal.zofed", GENESIS) as opened:
        opened.append(RECORDS[1])
        with pytest.raises(UserError, match="a journal's entry at most 40"):
            opened.append(Seeded(3, 0.5, (0,), 40, (1000,) * 40, -20, 4.0))
    assert records_of(journal.read(tmp_path / "journal.zofed")) == (RECORDS[1],)


if __name__ == "__main__" and os.environ.get("ZOFED_WRITE_GOLDEN") == "1":
    for name_ in GOLDEN_RUNS:
        (GOLDEN / name_).unlink(missing_ok=True)
        write_golden(GOLDEN / name_, name_)
        print(f'    "{name_}": {golden_end(GOLDEN / name_)},')
