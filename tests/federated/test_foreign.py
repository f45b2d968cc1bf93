"""What other machines say passes one gate: texts that can be printed, drawn and written; numbers that can be held."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zofed.base import texts
from zofed.core import sanitize
from zofed.data import partitions
from zofed.federated import messages, wire
from zofed.federated.wire import Evaluation, Final, Introduction

HERE = Introduction(0, 2, 5, "fo", bytes(16), "", "", "")


@given(st.text(st.characters(codec=None)), st.integers(2, 40))
@settings(max_examples=300, deadline=None, database=None)
def test_any_text_becomes_one_printable_line(raw: str, longest: int) -> None:
    line = texts.one_line(raw, longest)
    assert len(line) <= longest and line.isprintable()
    line.encode("utf-8")
    assert texts.one_line(line, longest) == line


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a plain reason", "a plain reason"),
        ("Größe \N{SNOWMAN}", "Größe \N{SNOWMAN}"),
        ("\x1b[2J\x1b]0;title\x07gone", r"\x1b[2J\x1b]0;title\x07gone"),
        ("two\r\nlines\tand\x85more\u2028still", "two lines and more still"),
        ("turned \u202e round", r"turned \u202e round"),
        ("half \ud800 a pair", r"half \ud800 a pair"),
        ("\x9b31m", r"\x9b31m"),
        (" \n\t ", ""),
    ],
)
def test_what_cannot_be_seen_is_written_out(raw: str, shown: str) -> None:
    assert texts.one_line(raw) == shown


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("two\n  lines.\n"), "two lines"),
        (KeyError("name"), "KeyError 'name'"),
        (RuntimeError(), "RuntimeError"),
        (OSError("x" * 10**6), "x" * (texts.LONGEST_ERROR - 1) + "…"),
    ],
)
def test_an_error_stands_in_a_sentence_by_its_own_words(error: Exception, told: str) -> None:
    assert texts.said_by(error) == told


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (None, sanitize.NO_REASON),
        ("", sanitize.NO_REASON),
        (" \n\t\n", sanitize.NO_REASON),
        ("Traceback:\n  line\nValueError: bad\n \n", "ValueError: bad"),
        ("\x1b[31mred", r"\x1b[31mred"),
    ],
)
def test_an_error_is_told_by_its_last_line_that_is_not_blank(raw: str | None, told: str) -> None:
    assert sanitize.reason(raw) == told


def test_a_reason_of_a_hundred_megabytes_is_read_from_its_end() -> None:
    assert sanitize.reason("x\n" * 10**6 + "y" * 10**6).endswith("…")
    assert len(sanitize.reason("y" * 10**6)) == texts.LONGEST


NO_TABLES = [
    "", "[]", "{", "1", '"a"', '{"a": "b"}', '{"a": true}', '{"a": -1}', '{"a": 1.5}', '{"a": 1e400}', '{"a": NaN}',
    '{"a": 1' + "0" * 400 + "}", '{"a": 1' + "0" * 5000 + "}", '{"a": ' + str(2**40 + 1) + "}",
    "[" * 100_000, '{"a":' * 100_000, '{"a": ' + "[" * 5000 + "]" * 5000 + "}", json.dumps({"x" * 2**20: 1}),
]  # fmt: skip


@pytest.mark.parametrize("raw", NO_TABLES, ids=lambda raw: f"{raw[:12]} {len(raw)}")
def test_what_is_no_table_of_counts_counts_as_none(raw: str) -> None:
    assert sanitize.counts(raw) == {}


def test_names_of_counts_are_lines_and_those_that_look_alike_are_one() -> None:
    raw = json.dumps({"a\x1bb": 1, "a\\x1bb": 2, "": 3, " ": 4, "half \ud800": 5, "9" * 5000: 6, "$\\frac$": 7})
    table = sanitize.counts(raw)
    assert table == {
        "a\\x1bb": 3, "no name": 7, "half \\ud800": 5, "9" * 99 + "…": 6, "$\\frac$": 7,
    }  # fmt: skip
    partitions.to_csv({0: table}).encode("utf-8")


def test_labels_of_any_number_of_digits_are_sorted_by_their_value() -> None:
    names = ["label 10", "label 2", "label 02", f"label {'9' * 5000}", "others", f"label 1{'0' * 4999}", "label"]
    assert partitions.in_order(names) == [
        "label", "label 02", "label 2", "label 10", f"label 1{'0' * 4999}", f"label {'9' * 5000}", "others",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("client", "clients"),
    [(-1, 2), (2, 2), (0, 0), (-(2**63), 2**63 - 1), (2**32, 2**33), (0, 2**32 + 1), (True, 2), ("0", 2), (0.0, 1)],
)
def test_a_place_that_no_record_can_hold_is_named_with_its_limit_and_remedy(client: Any, clients: Any) -> None:
    problem = sanitize.misplaced(client, clients)
    assert f"partition-id = {client!r} of num-partitions = {clients!r}: give each of N nodes its own" in problem
    assert "at most 4,294,967,296" in problem


@pytest.mark.parametrize(("client", "clients"), [(0, 1), (4, 5), (2**32 - 1, 2**32)])
def test_every_place_that_a_record_can_hold_is_one(client: int, clients: int) -> None:
    assert sanitize.misplaced(client, clients) == ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"examples": 0}, "says it holds 0 examples"),
        ({"examples": -(2**62)}, "says it holds -4611686018427387904 examples"),
        ({"examples": 2**41}, "give it 1 to 1,099,511,627,776"),
        ({"mode": "both"}, "says mode = 'both'"),
        ({"head": b""}, "a head of 0 bytes, not 16"),
        ({"client": 2}, "partition-id = 2 of num-partitions = 2"),
    ],
)
def test_an_introduction_that_cannot_be_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    fields = {name: getattr(HERE, name) for name in HERE.__slots__}
    assert HERE.faults() == ""
    assert named in Introduction(**fields | change).faults()


def test_texts_of_messages_are_lines_once_they_are_unpacked() -> None:
    for sent, got in (
        (Final(0, "\x1b[2J", bytes(16)), Final(0, r"\x1b[2J", bytes(16))),
        (Introduction(0, 2, 5, "f\no", bytes(16), '{"\x1b": 1}', "\x1b", "1\n2"),
         Introduction(0, 2, 5, "f o", bytes(16), '{"\x1b": 1}', r"\x1b", "1 2")),
        (Evaluation(1, b"", 0.5, 3), Evaluation(1, b"", 0.5, 3)),
    ):  # fmt: skip
        assert messages.unpack(type(sent), messages.pack(sent)) == got
        assert wire.decoded(type(sent), wire.encoded(sent)) == sent


def test_names_of_many_classes_reach_a_node_as_they_are() -> None:
    names = json.dumps([False, *(f"class\u00a0{n} {'x' * 90}" for n in range(50))], ensure_ascii=False)
    greeting = wire.Greeting(b"{}", 50, names)
    assert messages.unpack(wire.Greeting, messages.pack(greeting)) == greeting
