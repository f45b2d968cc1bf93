"""Which columns of a row hold its text, label, source and topic, and which hold text that nobody reads."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from zofed.base.errors import UserError

TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels")
PUBMEDQA_COLUMNS = {
    "question": ("question", "context", "long_answer"),  # the hub's spelling
    "QUESTION": ("QUESTION", "CONTEXTS", "LONG_ANSWER"),  # the original repository's spelling
}
PUBMEDQA_LABEL = "final_decision"
SAMPLED = 64  # rows that are looked at to tell which of the other columns hold text

_RUN = re.compile(r"[^\W\d_]{8,}")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a row that are read, by what they hold, and the rest. Empty: the row has none.

    text: one, or PubMedQA's three. strict: the label's column is called `label`, in any case, and must hold labels.
    read: all that are there of the four.
    """

    text: tuple[str, ...]
    label: str
    source: str
    topic: str
    read: tuple[str, ...]
    rest: tuple[str, ...]
    strict: bool
    is_pubmedqa: bool = False


@lru_cache(maxsize=1024)
def chosen(names: tuple[str, ...], others: tuple[str, ...] = ()) -> Columns:
    """The columns to read of those that a row has; a name counts without case and outer spaces where none is exact.

    others: columns that a template names, read as they are; only where there are none, or `text` is one of them, must a
    column hold a text. Raises UserError, the end of a sentence about the row, where none does or two could.
    """
    source, topic = ("source" if "source" in names else ""), ("topic" if "topic" in names else "")
    pubmedqa = next((found for first, found in PUBMEDQA_COLUMNS.items() if {first, found[1]} <= set(names)), None)
    if pubmedqa:
        text, label = pubmedqa, PUBMEDQA_LABEL if PUBMEDQA_LABEL in names else ""
    else:
        text, label = (_named(names, TEXT_COLUMNS, "text"),), _named(names, LABEL_COLUMNS, "label")
    if not text[0] and (not others or "text" in others):
        raise UserError(
            f"has no text column: it has {listed(names)}; name one of them {', '.join(TEXT_COLUMNS[:-1])} "
            f"or {TEXT_COLUMNS[-1]}{_other_separator(names)}"
        )
    read = tuple(name for name in dict.fromkeys((*text, *others, label, source, topic)) if name in names)
    rest = tuple(name for name in names if name not in read)
    strict = label.strip().casefold() in (LABEL_COLUMNS[0], PUBMEDQA_LABEL)
    return Columns(text, label, source, topic, read, rest, strict, pubmedqa is not None)


def header(cells: Sequence[str], place: str) -> list[str]:
    """The names in the first line of a table, without outer spaces and byte order marks; an empty one gets a number.

    Raises UserError where two columns have one name: one of them would be lost.
    """
    names = [plain(cell) or f"column {number}" for number, cell in enumerate(cells, 1)]
    check_distinct(names, place)
    return names


def check_distinct(names: Iterable[str], place: str) -> None:
    """Raise UserError where two columns have one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{place} has two columns named {name!r}: rename or remove one of them")
        seen.add(name)


def is_known(name: str) -> bool:
    """Whether a cell of a first line is the name of a column that would be read."""
    return plain(name).casefold() in _KNOWN or plain(name) in _KNOWN


def plain(name: str) -> str:
    """A column's name as a person reads it."""
    return name.replace("\ufeff", "").strip()


class Unread:
    """Collects which of the columns that are not read hold text, from the first rows."""

    def __init__(self) -> None:
        self._filled: dict[str, int] = {}
        self._prose: dict[str, int] = {}

    def see(self, row: Mapping[str, Any], rest: Iterable[str]) -> None:
        for name in rest:
            if isinstance(value := row[name], str) and value.strip():
                self._filled[name] = self._filled.get(name, 0) + 1
                self._prose[name] = self._prose.get(name, 0) + _is_prose(value)

    def found(self) -> tuple[str, ...]:
        """Columns of which at least half the filled cells seen read like text."""
        return tuple(name for name, filled in self._filled.items() if 2 * self._prose[name] >= filled)


def _is_prose(value: str) -> bool:
    """Whether a cell has two words or more; of a script without spaces a run of letters."""
    words = sum(any(map(str.isalpha, part)) for part in value.split())
    return words > 1 or (not value.isascii() and len(_RUN.findall(value)) > 0)


def listed(names: Iterable[str]) -> str:
    """The column names, shortened, since a file without a header has its first texts there."""
    shown = [repr(name if len(str(name)) <= 30 else f"{name[:30]}...") for name in names]
    return ("columns " + ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")) if shown else "no columns"


def _named(names: tuple[str, ...], wanted: tuple[str, ...], what: str) -> str:
    """The first of the wanted names, exactly or else without case and outer spaces; empty for none."""
    if exact := next((name for name in wanted if name in names), ""):
        return exact
    for name in wanted:
        alike = [own for own in names if plain(str(own)).casefold() == name]
        if len(alike) > 1:
            raise UserError(
                f"has the columns {alike[0]!r} and {alike[1]!r}, either of which could be its {what}: rename one"
            )
        if alike:
            return alike[0]
    return ""


def _other_separator(names: tuple[str, ...]) -> str:
    """A remedy more for a file whose cells something other than a comma separates."""
    found = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    return f"; or separate the columns by commas, not by {found!r}" if found else ""


_KNOWN = {*TEXT_COLUMNS, *LABEL_COLUMNS, PUBMEDQA_LABEL, "source", "topic"}.union(*PUBMEDQA_COLUMNS.values())
