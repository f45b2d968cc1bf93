"""What other machines say, made fit to use: messages to print, draw and write; tables of counts; numbers within bounds.

A node of a federation can send anything. All that it says passes here once, so that nothing behind needs to ask whether
a text ends a line, moves a terminal's cursor or cannot be written, or whether a number is one that a record can hold.
"""

from collections import Counter
from dataclasses import fields, replace
from typing import Any, TypeVar

from zofed.base import texts
from zofed.base.parsing import from_json
from zofed.core.records import CLIENTS

LONGEST_NAME = 100  # characters of a label or a source
LARGEST_TABLE = 2**20  # characters of a table of counts
LARGEST_COUNT = 2**40  # examples, documents
LARGEST_LOSS = 1e6  # a mean cross-entropy beyond this is a fault, not a measurement
LARGEST_MEASURE = 2.0**1000  # of either sign: beyond, a mean over clients may be no number
NO_REASON = "no reason given"
MOST_MEASURES = 64  # numbers by name that a client may say of its own evaluation
TABLES = ("counts", "names", "metrics")  # fields whose texts `counts`, `Classes.unpacked` and `measures` read

T = TypeVar("T")


def reason(raw: str | None) -> str:
    """The last line of an error that is not blank, where a traceback names its cause."""
    lines = (raw or "")[-4 * texts.LONGEST :].splitlines()
    return next((line for line in map(texts.one_line, reversed(lines)) if line), NO_REASON)


def cleaned(content: T) -> T:
    """A message whose texts are each one printable line, but for those that hold a table."""
    found: Any = content
    values = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in TABLES}
    lines = {name: texts.one_line(value) for name, value in values.items() if isinstance(value, str)}
    changed = {name: line for name, line in lines.items() if line != values[name]}
    return replace(found, **changed) if changed else content


def json_object(raw: str | bytes) -> dict[str, Any] | None:
    """The object that some JSON holds; None where it is no JSON, no object, or nested deeper than can be read."""
    try:
        found = from_json(raw)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def counts(raw: str) -> dict[str, int]:
    """Documents by label or source, from JSON; empty where it is no table of names and numbers from 0 to 2^40."""
    found = json_object(raw) if len(raw) <= LARGEST_TABLE else None
    if not found or not all(type(value) is int and 0 <= value <= LARGEST_COUNT for value in found.values()):
        return {}
    table: Counter[str] = Counter()
    for name, value in found.items():
        table[texts.one_line(name, LONGEST_NAME) or "no name"] += value
    return dict(table)


def measures(raw: str) -> dict[str, float]:
    """Finite numbers by name, from JSON; empty where it is no table of at most MOST_MEASURES of them."""
    found = json_object(raw) if len(raw) <= LARGEST_TABLE else None
    if not found or len(found) > MOST_MEASURES:
        return {}
    if not all(type(value) in (int, float) and abs(value) < LARGEST_MEASURE for value in found.values()):
        return {}
    return {texts.one_line(name, LONGEST_NAME) or "no name": float(value) for name, value in found.items()}


def misplaced(client: object, clients: object) -> str:
    """What is wrong with a client's index among so many, with the remedy; empty where nothing is."""
    if type(client) is int and type(clients) is int and 0 <= client < clients <= CLIENTS:
        return ""
    return (
        f"partition-id = {brief(client)} of num-partitions = {brief(clients)}: give each of N nodes its own whole "
        f"number, 0 to N - 1, and all the same N, at most {CLIENTS:,}"
    )


def brief(value: object) -> str:
    """A value in a few characters; Python writes no integer of thousands of digits."""
    if type(value) is int and abs(value) >= 10**20:
        return f"about {'-' if value < 0 else ''}2^{value.bit_length()}"
    return texts.one_line(repr(value), LONGEST_NAME)
