"""What arms score against what it cost, beside what the untouched model scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zofed.base.errors import UserError
from zofed.core.metrics import SCORES, scores_among
from zofed.experiments import plot_arms
from zofed.experiments.arms import Arm, incomparable
from zofed.runs import plot_style
from zofed.runs.run_result import Array, Result
from zofed.runs.tables import read_table

# Of a summary: scores that need no training, and how their lines are called.
UNTRAINED = {
    "zero_shot": "untouched",
    "threshold": "untouched, one fitted threshold",
    "majority": "most frequent class",
}
PER_CENT = frozenset(SCORES) - {"auc"}


def scores(arms: Sequence[Arm], axis: str, path: Path, notes: Sequence[str] = (), metric: str = "") -> Path:
    """The metric of arms at each evaluation against `axis`, a name of plot_style.AXES; lines for untrained baselines.

    A line is the mean of an arm's seeds, its band reaches from the lowest to the highest. metric: empty: the one that
    the runs are ranked by. Raises UserError where no run was scored by it.
    """
    results = [result for arm in arms for result in arm.results]
    metric = metric or results[0].metric
    column = axis.replace("-", "_")
    found = {arm.name: [pair for result in arm.results if (pair := _curve(result, metric, column))] for arm in arms}
    if not any(found.values()):
        raise UserError(f"no run has {metric!r} at its evaluations: choose another metric, or runs of another task")
    has_seeds = any(len(pairs) > 1 for pairs in found.values())
    logarithmic = plot_arms.is_wide([result.total(column) for result in results])
    figure, places = plot_style.panels(1, 1, width=8.2, height=4.6)
    place = places[0, 0]
    for index, (name, pairs) in enumerate(found.items()):
        label = f"{name} (n = {len(pairs)})" if has_seeds else name
        plot_arms.band(place, pairs, plot_style.stroke(index).line(), label, logarithmic)
    if logarithmic:
        place.set_xscale("log")
    _baselines(place, results, metric)
    unit = " (%)" if metric in PER_CENT else ""
    place.set(xlabel=plot_style.AXES[axis], ylabel=f"{metric.replace('_', ' ')}, held out{unit}")
    told = [*notes, incomparable(results)]
    if logarithmic:
        told.append(f"{axis}: the start has cost nothing, which has no place here; it stands before the first cost")
    return plot_style.save(figure, path, "", told, place)


def _curve(result: Result, metric: str, column: str) -> tuple[Array, Array] | None:
    """(cost, score) at each evaluation of all that is held out; None where there are none."""
    cost = dict(zip(result.columns.get("step", ()), result.columns.get(column, ()), strict=False))
    rows = [row for row in read_table(result.path / "evaluations.csv") if not row.get("source")]
    pairs = [(cost[step], float(value)) for row in rows if (value := row.get(metric)) and (step := _step(row)) in cost]
    if not pairs:
        return None
    at, values = np.array(pairs).T
    return at, values * _scale(metric)


def _step(row: dict[str, str]) -> float:
    return float(row.get("step") or "nan")


def _scale(metric: str) -> float:
    return 100.0 if metric in PER_CENT else 1.0


def _baselines(place: Any, results: Sequence[Result], metric: str) -> None:
    """A dashed line, with its name, for each untrained score that every run that has it agrees on."""
    for name, told in UNTRAINED.items():
        values = {
            round(value, 6)
            for result in results
            for own in [scores_among(result.summary.get("baselines", {})).get(name, {})]
            if isinstance(value := own.get(metric), int | float)
        }
        if len(values) == 1:
            level = values.pop() * _scale(metric)
            place.axhline(level, color="0.35", lw=1, ls="--")
            at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": "small"}
            place.annotate(told, (0.99, level), **at)
