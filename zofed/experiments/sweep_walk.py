"""A search along one setting: a line of values in equal ratios, which a tuning walks until the best lies between worse.

`learning-rate = { around = 0.01, factor = 3, most = 7 }` tries 0.0033, 0.01 and 0.03, then on to whichever side does
better, seven values at most. Loss against a rate has one valley for all that was measured, so that no value beyond a
worse one is worth a run.
"""

import math
from collections.abc import Mapping
from typing import Any

from zofed import config
from zofed.base.errors import UserError
from zofed.config import SETTINGS
from zofed.experiments.sweep import Values, Walk

FACTOR, MOST = 3.0, 7
LARGEST = 1e300  # that a search can begin at
FEWEST = 3  # values that have a middle


def check(key: str, wanted: Mapping[str, Any], where: str) -> None:
    """Raise UserError, which begins with `where`, unless the table says a search along this setting."""
    form = "{ around = 0.01, factor = 3, most = 7 }"
    if SETTINGS[key].annotation not in (int, float):
        raise UserError(f"{where}: {key} has no numbers to search among: write {key} = [values]")
    for name, value in wanted.items():
        if name not in ("around", "factor", "most"):
            raise UserError(f"{where}: {key} has {name!r}: write {key} = {form}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {key}: {name} = {value!r} is no number: write {key} = {form}")
    if "around" not in wanted or not 0 < wanted["around"] < LARGEST:
        raise UserError(f"{where}: {key} has no value above 0 to begin at: write {key} = {form}")
    if not 1 < wanted.get("factor", FACTOR) <= 1000:
        raise UserError(f"{where}: {key}: factor = {wanted['factor']!r}: give a number above 1, as 3")
    if not isinstance(most := wanted.get("most", MOST), int) or not FEWEST <= most <= 99:
        raise UserError(f"{where}: {key}: most = {most!r}: give a whole number from {FEWEST} to 99")
    _values(key, wanted, where)


def line(tune: Values) -> tuple[tuple[Values, ...], Walk] | None:
    """The values along which such a table may lead, in order, and the walk; None where a tuning has lists alone."""
    for key, wanted in tune.items():
        if isinstance(wanted, Mapping):
            values, start = _values(key, wanted, "[tune]")
            return tuple({key: value} for value in values), Walk(start, wanted.get("most", MOST))
    return None


def _values(key: str, wanted: Mapping[str, Any], where: str) -> tuple[list[int | float], int]:
    """All values that a walk can reach within the setting's limits, in order, and the place of the first."""
    whole, factor = SETTINGS[key].annotation is int, float(wanted.get("factor", FACTOR))
    reach = wanted.get("most", MOST) - 2  # from the first three on, all to one side
    found: list[int | float] = []
    for power in range(-reach, reach + 1):
        value = float(wanted["around"]) * factor**power
        if not math.isfinite(value):
            continue
        value = round(value) if whole else float(wanted["around"] if power == 0 else f"{value:.3g}")
        if value > 0 and value not in found and _is_allowed(key, value):  # 0 often stands for another, or for all
            found.append(value)
    middle = round(wanted["around"]) if whole else float(wanted["around"])
    if middle not in found or len(found) < FEWEST:
        allowed = f", which allows {', '.join(map(str, found))}" if found else ""
        raise UserError(f"{where}: {key} around {wanted['around']} leaves its limits{allowed}: begin elsewhere")
    return found, found.index(middle)


def _is_allowed(key: str, value: float) -> bool:
    try:
        config.resolve({key: value})
    except UserError:
        return False
    return True
