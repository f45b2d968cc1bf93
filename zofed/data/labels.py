"""Labels in numbers or in words: what a cell says, and how a data set's words are numbered."""

import re
import string
from collections.abc import Sequence

from zofed.base.errors import UserError
from zofed.base.texts import printable

DECISIONS = {"yes": 0, "no": 1, "maybe": 2}  # PubMedQA's
_BOOLEANS = ("false", "true")


def read(place: str, value: object) -> int | str | None:
    """A cell's label: a number from 0, a word, or None for an empty cell and -1.

    true and false are words. Raises UserError, which begins with the row's place, for another number and for a cell of
    another kind.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        return _BOOLEANS[value]
    try:
        # Parquet turns integers with gaps into floats and text files hold strings: both count when they are whole.
        label = int(re.sub(r"\.0+$", "", str(value).strip()))
    except ValueError:
        if isinstance(value, str) and not _is_number(value):
            return printable(value.strip())
        label = -2
    if label < -1:
        raise UserError(
            f"{place} has the label {value!r}: a label must be a whole number from 0 (-1 if hidden) or a word"
        )
    return None if label == -1 else label


def decision(place: str, value: object) -> int | None:
    """PubMedQA's label. Raises UserError for any but yes, no, maybe and nothing."""
    if value is None or value == "":
        return None
    if value not in DECISIONS:
        raise UserError(f"{place} has the final_decision {value!r}: it must be {', '.join(DECISIONS)} or left out")
    return DECISIONS[str(value)]


def of_candidates(place: str, label: int | str | None, candidates: Sequence[str]) -> int | None:
    """Which of a row's candidates is right, by its number from 0, its text or its letter (A is the first).

    Raises UserError, which begins with the row's place, for one that is not there.
    """
    found = label
    if isinstance(label, str):
        letters = string.ascii_uppercase[: len(candidates)]
        found = next((number for number, text in enumerate(candidates) if text.strip() == label), None)
        found = letters.find(label.upper()) if found is None and len(label) == 1 else found
    if label is not None and (not isinstance(found, int) or not 0 <= found < len(candidates)):
        raise UserError(
            f"{place} has the label {label!r}, but {len(candidates)} candidates: name the right one by its number "
            f"(0 to {len(candidates) - 1}), its text or its letter"
        )
    return found if isinstance(found, int) else None


class Labels:
    """The labels of a data set's rows, one after the other; words are numbered when all are known."""

    def __init__(self) -> None:
        self._found: list[int | str | None] = []
        self._first: dict[type, tuple[str, int | str]] = {}  # of numbers and of words: where, and which

    def add(self, place: str, label: int | str | None) -> None:
        self._found.append(label)
        if label is not None:
            self._first.setdefault(type(label), (place, label))

    def numbered(self, *, strict: bool) -> tuple[list[int | None], tuple[str, ...], bool]:
        """The labels, their names where they are words, and whether the names have an order of their own.

        Words are numbered in sorted order; false and true alone are 0 and 1 everywhere. strict: the column must hold
        labels; else words count where each of them comes twice on average. Raises UserError for numbers and words in
        one data set, naming a row of each.
        """
        words = sorted({label for label in self._found if isinstance(label, str)})
        if not words:
            return [label if isinstance(label, int) else None for label in self._found], (), True
        if not strict and (int in self._first or 2 * len(words) > sum(label is not None for label in self._found)):
            return [label if isinstance(label, int) else None for label in self._found], (), True
        if int in self._first:
            (there, word), (here, number) = self._first[str], self._first[int]
            raise UserError(f"{here} has the label {number}, {there} the word {word!r}: use numbers or words, not both")
        are_booleans = all(word.casefold() in _BOOLEANS for word in words)
        names = _BOOLEANS if are_booleans else tuple(words)
        at = {word: _BOOLEANS.index(word.casefold()) if are_booleans else number for number, word in enumerate(words)}
        return [at[label] if isinstance(label, str) else None for label in self._found], names, are_booleans


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)  # "nan" may be a word
    except ValueError:
        return False
