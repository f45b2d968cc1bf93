"""What arms score against what it cost, beside what the untouched model scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zofed.base.errors import UserError
from zofed.core.metrics import MEASURES, SCORES, scores_among
from zofed.experiments import plot_arms
from zofed.experiments.arms import Arm, incomparable, some
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

    A line is the mean of an arm's seeds, its band reaches from the lowest to the highest. metric: empty: what the first
    of the runs is ranked by that was scored by it, else the loss. Raises UserError where no run was scored by it.
    """
    arms, notes = plot_arms.shown(arms, notes)
    results = [result for arm in arms for result in arm.results]
    scored = {name: None for result in results for name in _scored(result)}  # in order, each once
    ranked = [result.metric for result in results if result.metric in scored]
    metric = metric.replace("-", "_") or [*ranked, *scored, results[0].metric][0]
    if metric not in scored:
        known = f"their evaluations have {', '.join(scored)}" if scored else "none was evaluated yet"
        raise UserError(f"no run has the metric {metric!r}: {known}")
    column = axis.replace("-", "_")
    curves = {arm.name: [pair for result in arm.results if (pair := _curve(result, metric, column))] for arm in arms}
    found = {name: pairs for name, pairs in curves.items() if any(np.nan_to_num(at).any() for at, _ in pairs)}
    if left := [name for name in curves if name not in found]:
        told = f"without {metric} at evaluations, or without {axis}, left out: {some(left)}"
        if not found:
            raise UserError(f"nothing to draw; {told}: choose another --axis or --metric")
        notes = [*notes, told]
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


def _scored(result: Result) -> list[str]:
    """The measures that a run's evaluations have, the loss among them."""
    rows = read_table(result.path / "evaluations.csv")
    return [name for name in MEASURES if any(row.get(name) for row in rows)]


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
