"""Cells inside cells: `answers.text.0` is the first of the texts in the column answers."""

from collections.abc import Iterable, Mapping
from typing import Any

from zofed.base.texts import is_count

SEPARATOR = "."


def column_of(name: str) -> str:
    """The column that a name begins in: its first part."""
    return name.split(SEPARATOR)[0]


def with_paths(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The row with a column more for each name that leads into a cell; one that leads nowhere is left out.

    Parts between dots are keys of a table, or whole numbers from 0 of a list. A column that is called so itself stays.
    """
    found = dict(row)
    for name in names:
        if name in row or SEPARATOR not in name:
            continue
        first, *rest = name.split(SEPARATOR)
        value, is_there = row.get(first), first in row
        for part in rest:
            value, is_there = _inside(value, part)
            if not is_there:
                break
        if is_there:
            found[name] = value
    return found


def _inside(value: Any, part: str) -> tuple[Any, bool]:
    if isinstance(value, Mapping) and part in value:
        return value[part], True
    if isinstance(value, list) and is_count(part) and int(part) < len(value):
        return value[int(part)], True
    return None, False
