"""Arms beside each other: losses against what they cost, with bands over seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zofed.base.errors import UserError
from zofed.experiments.arms import Arm, incomparable, some
from zofed.runs import plot_style
from zofed.runs.run_result import Array, Result

POINTS = 200  # at which curves of several seeds are averaged
WIDEST = 20  # times that arms may differ in what they cost before an axis is logarithmic
EQUIVALENTS = "forward-equivalents: examples run forward, a backward pass counting two"
# Of a summary: the key, what a panel calls it, and the note that belongs to it.
TRAINING_MEMORY = (
    "training_memory_bytes",
    "memory that training took (MiB)",
    "memory: the most above what the process held when training began, with the model, the data and the libraries",
)
PEAK_MEMORY = (
    "peak_memory_bytes",
    "peak memory of the process (MiB)",
    "peak memory: of the whole process, loaded libraries among it",
)
LEAST_SMOOTHED = 5  # values
TICKS = 6  # that large numbers leave room for
FAIR = ("forward-equivalents", "seconds", "bytes")


def compare(arms: Sequence[Arm], axes: Sequence[str], path: Path, notes: Sequence[str] = ()) -> Path:
    """Held-out and training losses of arms against each of `axes`, by default all that make a comparison fair.

    A line is the mean of an arm's seeds, its band reaches from the lowest to the highest. Raises UserError where no run
    has what an axis needs.
    """
    arms, notes = shown(arms, notes)
    results = [result for arm in arms for result in arm.results]
    axes = axes or [axis for axis in FAIR if axis != "bytes" or any(result.total("bytes") > 0 for result in results)]
    figure, places = plot_style.panels(2, len(axes), sharex="col", sharey="row", height=3.4)
    for column, axis in enumerate(axes):
        name = axis.replace("-", "_")
        lacking = [result.name for result in results if name not in result.columns]
        if len(lacking) == len(results):
            raise UserError(
                f"no run has the column {name}, which --axis {axis} takes: another version of zofed wrote them"
            )
        if lacking:
            notes.append(
                f"without {name}, which another version of zofed did not write, left out there: {some(lacking)}"
            )
        logarithmic = is_wide([result.total(name) for result in results])
        for index, arm in enumerate(arms):
            own = [result for result in arm.results if name in result.columns]
            label = f"{arm.name} (n = {len(arm.results)})"
            curve(places[0, column], own, name, index, label, logarithmic)
            training(places[1, column], own, name, index, logarithmic)
        places[1, column].set(xlabel=plot_style.AXES[axis])
        if not logarithmic:
            places[1, column].locator_params(axis="x", nbins=TICKS)
        else:
            places[1, column].set_xscale("log")
            notes.append(
                f"{axis}: the start has cost nothing, which has no place here; it stands before the first cost"
            )
    places[0, 0].set_ylabel(plot_style.LOSS)
    places[1, 0].set_ylabel("training loss, smoothed (nats)")
    title = "mean of the seeds, band from lowest to highest" if any(len(arm.results) > 1 for arm in arms) else ""
    notes += [EQUIVALENTS] * ("forward-equivalents" in axes)
    return plot_style.save(figure, path, title, [*notes, incomparable(results)], places[0, 0])


def fo_vs_zo(arms: Sequence[Arm], path: Path, notes: Sequence[str] = ()) -> Path:
    """The best arm of each mode: loss against cost and seconds, end losses and peak memory.

    Raises UserError unless both first order (fo) and zeroth order (zo) are there.
    """
    best: dict[str, Arm] = {}
    for arm in arms:
        mode = str(arm.results[0].settings["mode"])
        if mode not in best or arm.mean < best[mode].mean:
            best[mode] = arm
    if missing := {"fo", "zo"} - set(best):
        raise UserError(f"there is no run of mode {' nor '.join(sorted(missing))}: this picture sets fo beside zo")
    chosen = sorted(best.items(), key=lambda item: ("fo", "zo").index(item[0]) if item[0] in ("fo", "zo") else 2)
    figure, places = plot_style.panels(2, 2)
    results = [result for _, arm in chosen for result in arm.results]
    for place, axis in ((places[0, 0], "forward-equivalents"), (places[0, 1], "seconds")):
        name = axis.replace("-", "_")
        logarithmic = is_wide([result.total(name) for result in results])
        for index, (mode, arm) in enumerate(chosen):
            label = f"{arm.name if mode in arm.name else f'{mode}: {arm.name}'} (n = {len(arm.results)})"
            curve(place, arm.results, name, index, label, logarithmic)
        place.set(xlabel=plot_style.AXES[axis], ylabel=plot_style.LOSS, xscale="log" if logarithmic else "linear")
        if not logarithmic:
            place.locator_params(axis="x", nbins=TICKS)
    ends(places[1, 0], [arm for _, arm in chosen], [mode for mode, _ in chosen])
    all_tell = all("training_memory_bytes" in result.summary for result in results)
    key, what, note = TRAINING_MEMORY if all_tell else PEAK_MEMORY  # as earlier versions told
    peaks = [[result.summary.get(key, math.nan) / 2**20 for result in arm.results] for _, arm in chosen]
    bars(places[1, 1], [mode for mode, _ in chosen], peaks, what)
    notes = [*notes, EQUIVALENTS, note, incomparable(results)]
    title = "the best arm of each mode; lines: mean of the seeds, bands and whiskers: lowest to highest"
    return plot_style.save(figure, path, title, notes, places[0, 0])


def ends(place: Any, arms: Sequence[Arm], names: Sequence[str]) -> None:
    """A point an arm: mean end loss, whiskers over the seeds, beside the controls where there are some."""
    losses = [list(arm.ends.values()) for arm in arms]
    flat = [loss for some_ in losses for loss in some_]
    frozen = {r.summary.get("controls", {}).get("frozen") for arm in arms for r in arm.results} - {None}
    starts = [loss for arm in arms for r in arm.results if (loss := r.summary.get("eval_loss_start")) is not None]
    level = float(np.mean(list(frozen) or starts)) if frozen or starts else math.nan
    seen = [*flat, *([level] if math.isfinite(level) else [])] or [0.0, 1.0]
    margin = 0.15 * (max(seen) - min(seen)) or 0.1
    for index, own in enumerate(losses):
        if own := [loss for loss in own if math.isfinite(loss)]:
            mean, drawn = float(np.mean(own)), plot_style.stroke(index)
            spread = [[mean - min(own)], [max(own) - mean]]
            place.errorbar(index, mean, spread, color=drawn.color, marker=drawn.marker, ms=8, capsize=4, lw=1.2)
            beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": "small"}
            place.annotate(f"{mean:,.4g}", (index, mean), **beside)
    place.set(xticks=range(len(names)), xticklabels=names, ylabel=f"{plot_style.LOSS} at the end")
    place.set(xlim=(-0.5, len(names) - 0.5), ylim=(min(seen) - margin, max(seen) + margin))
    place.grid(axis="x", visible=False)
    if math.isfinite(level):
        place.axhline(level, color="0.3", lw=1, ls="--")
        at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom", "fontsize": "small"}
        place.annotate("weights never moved", (0.99, level), **at)


def bars(place: Any, names: Sequence[str], values: Sequence[Sequence[float]], label: str) -> None:
    """A hatched bar for each name, from 0: the mean of its values, whiskers from the lowest to the highest."""
    values = [[value for value in own if math.isfinite(value)] for own in values]  # none of what diverged
    for index, own in enumerate(values):
        if not own:
            continue
        mean, drawn = float(np.mean(own)), plot_style.stroke(index)
        place.bar(index, mean, color=drawn.color, alpha=0.55, hatch=drawn.hatch, edgecolor="black")
        place.errorbar(index, mean, [[mean - min(own)], [max(own) - mean]], color="black", capsize=4, lw=1.2)
        above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": "small"}
        place.annotate(
            f"{mean:,.4g}", (index, max(own)), **above, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        )
    place.set(xticks=range(len(names)), xticklabels=names, ylabel=label)
    highest = max((max(own) for own in values if own), default=1.0)
    place.set_ylim(0, 1.15 * highest)
    place.grid(axis="x", visible=False)


def curve(place: Any, results: Sequence[Result], axis: str, index: int, label: str, logarithmic: bool = False) -> None:
    """Held-out losses of an arm's seeds against the column `axis`: mean and band."""
    pairs = []
    for result in results:
        rows, losses = result.held_out
        pairs.append((result.columns[axis][rows], losses))
    band(place, pairs, plot_style.stroke(index).line(), label, logarithmic)


def training(place: Any, results: Sequence[Result], axis: str, index: int, logarithmic: bool = False) -> None:
    """Training losses of an arm's seeds, smoothed, against the column `axis`."""
    pairs = []
    for result in results:
        losses = result.columns.get("loss", np.zeros(0))
        rows = np.flatnonzero(np.isfinite(losses))
        if len(rows):
            pairs.append((result.columns[axis][rows], smoothed(losses[rows])))
    drawn = plot_style.stroke(index).line() | {"marker": "", "label": None}
    band(place, pairs, drawn, None, logarithmic)


def smoothed(losses: Array) -> Array:
    """Centred running mean over a twentieth of the values, five at least; at the ends over what there is."""
    half = max(LEAST_SMOOTHED, len(losses) // 20) // 2
    at, sums = np.arange(len(losses)), np.concatenate([[0.0], np.cumsum(losses)])
    first, behind = np.maximum(at - half, 0), np.minimum(at + half + 1, len(losses))
    return (sums[behind] - sums[first]) / (behind - first)


def band(
    place: Any, pairs: Sequence[tuple[Array, Array]], drawn: dict[str, Any], label: str | None, logarithmic: bool
) -> None:
    """A line through the mean of (cost, value) curves, and a band from the lowest to the highest of them."""
    pairs = [(x[np.isfinite(x)], y[np.isfinite(x)]) for x, y in pairs]
    pairs = [(x, y) for x, y in pairs if len(x)]
    if not pairs:
        return
    drawn = drawn | {"label": label}
    first = pairs[0][0]
    same = all(len(x) == len(first) for x, _ in pairs)
    if same:  # evaluated at the same steps: no interpolation between them
        x = np.mean([x for x, _ in pairs], axis=0)
        losses = np.array([y for _, y in pairs])
    else:
        x = np.linspace(max(x[0] for x, _ in pairs), min(x[-1] for x, _ in pairs), POINTS)
        losses = np.array([np.interp(x, own, y) for own, y in pairs])
    if logarithmic and x[0] <= 0 < x[-1]:
        x = np.array([max(value, x[x > 0][0] / 2) for value in x])  # the start has cost nothing, which has no logarithm
    place.plot(x, losses.mean(0), **drawn, markevery=max(1, len(x) // 12))
    if len(pairs) > 1:
        place.fill_between(x, losses.min(0), losses.max(0), color=drawn["color"], alpha=0.18, lw=0)


def is_wide(totals: Sequence[float]) -> bool:
    """Whether arms differ so much in what they cost that the axis must be logarithmic."""
    known = [total for total in totals if math.isfinite(total) and total > 0]
    return bool(known) and max(known) > WIDEST * min(known)


def shown(arms: Sequence[Arm], notes: Sequence[str]) -> tuple[list[Arm], list[str]]:
    """The best arms, as many as one panel can hold, in their order; and the notes, with one on those left out."""
    if len(arms) <= plot_style.MOST:
        return list(arms), list(notes)
    best = sorted(arms, key=lambda arm: arm.mean)[: plot_style.MOST]
    left = [arm.name for arm in arms if arm not in best]
    told = f"the best {plot_style.MOST} of {len(arms)} arms; left out of the picture: {some(left)}"
    return [arm for arm in arms if arm in best], [*notes, told]
