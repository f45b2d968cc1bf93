"""A sweep at a glance: heat maps of end losses, the best by setting, and what zeroth order's settings do."""

import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zofed.base.errors import UserError
from zofed.experiments import slope_history
from zofed.experiments.arms import Arm, differing, grouped, some
from zofed.experiments.sweep import shown
from zofed.runs import plot_style
from zofed.runs.run_result import Result

LONGEST_TICK = 44  # characters of a line
HEIGHT, LINE = 3.6, 0.21  # inches of a panel, and of a line of names beside it
MAPS = 4  # heat maps in one picture
ZO_SETTINGS = ("queries", "epsilon", "batch-size", "query-batch-size", "optimizer")
ZO_RUNS = 6  # runs whose slopes are looked at along their way
ALIKE = 0.005  # by which cosines of all arms may differ and still be one line
GUIDED = ("cosine_kept", "cosine_direction")


def sweep(results: Sequence[Result], path: Path, notes: Sequence[str] = ()) -> Path:
    """Heat maps of the end loss over pairs of settings that vary, and the best loss at each value of each of them.

    Raises UserError where no run is complete, or none differs from another.
    """
    done = [result for result in results if math.isfinite(result.end)]
    if not done:
        raise UserError("no run is complete, so that there is nothing to map: let the sweep go on")
    settings = _axes(done)
    if not settings:
        raise UserError("the runs do not differ but by their seed: draw them with zofed plot compare")
    pairs = sorted(itertools.combinations(settings, 2), key=lambda pair: -_cells(done, pair))[:MAPS]
    pairs = [pair for pair in pairs if _cells(done, pair) > 1]
    most = max(len(pairs), len(settings))
    columns = 1 if "arm" in settings else {1: 1, 2: 2, 4: 2}.get(most, 3)  # names of arms take a panel's width
    rows = -(-len(pairs) // columns) + -(-len(settings) // columns)
    heights = [HEIGHT] * rows
    if columns == 1:  # a row a panel: one that has names of arms is as high as their lines take
        lines = sum(_short(arm, "arm").count("\n") + 1 for arm in values(done, "arm"))
        tall = max(HEIGHT, LINE * lines + 1)
        heights = [tall if "arm" in keys else HEIGHT for keys in (*pairs, *((key,) for key in settings))]
    figure, places = plot_style.panels(
        rows, columns, 4.9 if columns > 1 else 9, sum(heights) / rows, gridspec_kw={"height_ratios": heights}
    )
    flat = list(places.flat)
    for place, pair in zip(flat, pairs, strict=False):
        _map(figure, place, comparable(done, pair), *pair)
    start = -(-len(pairs) // columns) * columns
    for place, key in zip(flat[start:], settings, strict=False):
        by_setting(place, comparable(done, [key]), key)
    for place in [*flat[len(pairs) : start], *flat[start + len(settings) :]]:
        place.set_visible(False)
    if len(done) < len(results):
        missing = [result.name for result in results if result not in done]
        notes = [*notes, f"not complete, left out of the maps: {some(missing)}"]
    if any(result.tunes for result in done):
        told = "the tuning's seed alone, which all values have; elsewhere: the seeds that are reported"
        notes = [*notes, f"where a tuned setting is shown: {told}"]
    title = f"{plot_style.LOSS} at the end, mean of the seeds, at the best of all other settings; lower is better"
    return plot_style.save(figure, path, title, notes)


def _axes(results: Sequence[Result]) -> list[str]:
    """What to draw by: the settings that differ; of arms that have names, those, and what their tuning varies."""
    keys = differing(results)
    if any(result.arm and "=" not in result.arm.split(",")[0] for result in results):
        return ["arm", *(key for key in keys if _within_arms(results, key))]
    return keys


def _within_arms(results: Sequence[Result], key: str) -> bool:
    """Whether a setting differs inside an arm: one that its tuning chooses."""
    by_arm: dict[str, set[str]] = {}
    for result in results:
        by_arm.setdefault(result.arm, set()).add(repr(result.settings.get(key)))
    return any(len(values) > 1 for values in by_arm.values())


def comparable(results: Sequence[Result], keys: Sequence[str]) -> list[Result]:
    """The runs that may be set against each other over these settings.

    Over one that is tuned, the runs of the tuning, which have one seed for every value; else those that are reported.
    """
    found = grouped(results)
    if any(_within_arms(results, key) for key in keys):
        seeds = {result.settings["seed"] for arm in found for result in arm.chosen_from}
        own = [result for arm in found for result in arm.chosen_from or arm.results]
        return [result for result in own if not seeds or result.settings["seed"] in seeds] or own
    return [result for arm in found for result in arm.results]


def value(result: Result, key: str) -> Any:
    """What a run has of a setting, or its arm's name."""
    return result.arm if key == "arm" else result.settings.get(key)


def values(results: Sequence[Result], key: str) -> list[Any]:
    """The values of a setting, numbers in their order, others as they come."""
    found = list(dict.fromkeys(value(result, key) for result in results))
    return sorted(found) if all(isinstance(one, int | float) for one in found) else found


def best(results: Sequence[Result]) -> tuple[float, int]:
    """(mean end loss over the seeds of the best combination among these runs, number of its seeds)."""
    by_rest: dict[str, list[float]] = {}
    for result in results:
        rest = {key: v for key, v in result.settings.items() if key not in ("seed", "out")}
        by_rest.setdefault(repr(sorted(rest.items(), key=str)), []).append(result.end)
    chosen = min(by_rest.values(), key=lambda ends: float(np.mean(ends)), default=[])
    return (float(np.mean(chosen)), len(chosen)) if chosen else (math.nan, 0)


def _cells(results: Sequence[Result], pair: tuple[str, str]) -> int:
    rows, columns = (len(values(results, key)) for key in pair)
    return rows * columns if min(rows, columns) > 1 else 0


def _map(figure: Any, place: Any, results: Sequence[Result], row: str, column: str) -> None:
    rows, columns = values(results, row), values(results, column)
    if len(columns) > len(rows) and row != "arm":  # names are read best beside their rows
        rows, columns, row, column = columns, rows, column, row
    grid = np.array([
        [best([r for r in results if value(r, row) == one and value(r, column) == other])[0] for other in columns]
        for one in rows
    ])  # fmt: skip
    known = grid[np.isfinite(grid)]
    # One run that diverged must not take all the colours: those beyond the start's loss share the last.
    starts = [loss for r in results if (loss := r.summary.get("eval_loss_start")) is not None]
    high = min(known.max(), max([*starts, known.min()])) if len(starts) else known.max()
    image = place.imshow(grid, cmap="cividis_r", vmin=known.min(), vmax=max(high, known.min() + 1e-9), aspect="auto")
    for (y, x), loss in np.ndenumerate(grid):
        if math.isfinite(loss):
            red, green, blue, _ = image.cmap(image.norm(loss))
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            weight = "bold" if loss == known.min() else "normal"
            told = f"{loss:.3f}" if abs(loss) < 1000 else f"{loss:.0e}"
            place.text(x, y, told, ha="center", va="center", color=ink, fontsize="small", weight=weight)
    place.set_xticks(
        range(len(columns)),
        [_short(one, column) for one in columns],
        rotation=25 if max(len(_short(one, column)) for one in columns) > 8 else 0,
    )
    place.set_yticks(range(len(rows)), [_short(one, row) for one in rows], fontsize="small")
    place.set(xlabel=column, ylabel=row)
    place.grid(visible=False)
    figure.colorbar(image, ax=place, shrink=0.9)


def by_setting(place: Any, results: Sequence[Result], key: str) -> None:
    """Every run's end loss at each value of a setting, and the best combination's mean; of numbers, joined.

    What ended far above where it began would squeeze all else: it is counted at the frame's edge.
    """
    found = values(results, key)
    are_numbers = all(isinstance(one, int | float) for one in found)
    means = [best([result for result in results if value(result, key) == one])[0] for one in found]
    low, high = min(result.end for result in results), max(means)
    starts = [loss for result in results if (loss := result.summary.get("eval_loss_start")) is not None]
    edge = max([high, *starts]) + 0.15 * (max([high, *starts]) - low or 0.1)
    edge = max(high, min(edge, max(result.end for result in results)))
    rows = np.arange(len(found))

    def across(at: Any, losses: Any) -> tuple[Any, Any]:
        return (at, losses) if are_numbers else (losses, at)  # names are written along the other axis, where they fit

    for at, one in enumerate(found):
        own = [result.end for result in results if value(result, key) == one]
        within = [loss for loss in own if loss <= edge]
        place.plot(*across([at] * len(within), within), "o", color="0.6", ms=4, alpha=0.7, mec="none")
        if beyond := len(own) - len(within):
            place.annotate(f"+{beyond} worse", across(at, edge), ha="center" if are_numbers else "right", va="center",
                           fontsize="x-small", color="0.35")  # fmt: skip
    place.plot(*across(rows, means), color="black", marker="D", ms=6, lw=1.4, ls="-" if are_numbers else "")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    for at, loss in enumerate(means):
        place.annotate(f"{loss:.3f}", across(at, loss), (7, 6), textcoords="offset points", fontsize="small", bbox=box)
    label, ticks = f"{plot_style.LOSS}\ngrey: each run, black: best", [_short(one, key) for one in found]
    margin = 0.1 * (edge - low) or 0.1
    if are_numbers:
        place.set_xticks(rows, ticks)
        place.set(xlabel=key, ylabel=label, ylim=(low - margin, edge + margin))
        place.margins(x=0.18)
    else:
        place.locator_params(axis="x", nbins=5)
        place.set_yticks(rows, ticks, fontsize="small" if len(rows) < 6 else "x-small")
        place.set(ylabel=key, xlabel=label, xlim=(low - margin, edge + margin), ylim=(len(found) - 0.4, -0.6))


def _short(one: Any, key: str) -> str:
    """What a tick says: an arm's long name in several lines, whole, since its end may tell it from its neighbours."""
    if key != "arm":
        return shown(one)
    return "\n".join(textwrap.wrap(str(one).replace(",", ", "), LONGEST_TICK))


def zo(results: Sequence[Result], path: Path, points: int, notes: Sequence[str] = ()) -> Path:
    """What queries, epsilon, batch size and optimizer do to zeroth order's loss; how good its slopes are over time.

    points: steps at which a run's slopes are compared with backpropagation, by replay; 0: none. Raises UserError where
    no run of zeroth order is there.
    """
    notes = list(notes)
    own = [result for result in results if result.settings["mode"] in ("zo", "instruct", "calibrate")]
    if not own:
        raise UserError("there is no run with zeroth-order steps here: give a folder with runs of mode zo")
    if others := [result.name for result in results if result not in own]:
        notes.append(f"not zeroth order, left out: {some(others)}")
    done = [result for result in own if math.isfinite(result.end)]
    keys = [key for key in ZO_SETTINGS if key in differing(own)] if done else []
    if not done and not points:
        raise UserError("no run with zeroth-order steps is complete")
    if not keys and not points and not any(_has(result, name) for result in own for name in GUIDED):
        raise UserError(
            f"the runs of zeroth order do not differ in {', '.join(ZO_SETTINGS)}; --points 5 shows how good their "
            "slopes are"
        )
    has_course = bool(points) or any(_has(result, name) for result in own for name in GUIDED)
    count = len(keys) + 2 * has_course
    columns = count if count < 4 else 2 if count == 4 else 3
    figure, places = plot_style.panels(-(-count // columns), columns, width=4.9, height=3.6)
    flat = list(places.flat)
    for place, key in zip(flat, keys, strict=False):
        by_setting(place, comparable(done, [key]), key)
    if has_course:
        _over_time(flat[len(keys)], flat[len(keys) + 1], grouped(own), points, notes)
    for place in flat[len(keys) :]:
        place.set_visible(bool(place.lines))
    if points:
        notes.append("cosine: dashed, what exact slopes along as many directions give; dotted, what chance gives")
    else:
        notes.append("slopes are not set against backpropagation: --points 5 does so at five steps, by replay")
    title = "zeroth order: end loss by setting; quality of the slopes over time"
    return plot_style.save(figure, path, title, notes, flat[len(keys)] if has_course else None)


def _is_drawn_as_one(place: Any, some_: Sequence[Result], name: str) -> bool:
    """Draw a column that is alike in all runs that have it, as a target that all reach, as one line; else draw none."""
    own = [result for result in some_ if _has(result, name)]
    levels = np.concatenate([result.columns[name] for result in own]) if own else np.zeros(0)
    if not own or np.nanmax(levels) - np.nanmin(levels) > ALIKE:
        return False
    last = max(float(result.columns["step"][-1]) for result in own)
    dash = {"cosine_kept": "-", "cosine_direction": "--"}[name]
    label = name.replace("_", " ") + f", alike in {len(own)} arms" * (len(own) > 1)
    place.plot([0, last], [np.nanmean(levels)] * 2, color="0.3", ls=dash, label=label)
    return True


def _has(result: Result, name: str) -> bool:
    return bool(np.isfinite(result.columns.get(name, np.zeros(0))).any())


def _over_time(cosine: Any, signal: Any, found: Sequence[Arm], points: int, notes: list[str]) -> None:
    chosen = sorted(found, key=lambda arm: arm.mean)[:ZO_RUNS]
    if points and len(found) > len(chosen):
        notes.append(f"slopes over time: the best {len(chosen)} of {len(found)} arms, first seed")
    guided = [name for name in GUIDED if not _is_drawn_as_one(cosine, [arm.results[0] for arm in chosen], name)]
    for index, arm in enumerate(arm for arm in found if arm in chosen):
        result, drawn = arm.results[0], plot_style.stroke(index).line()
        for name in guided:
            if _has(result, name):
                rows = np.flatnonzero(np.isfinite(result.columns[name]))
                steps = result.columns["step"][rows]
                cosine.plot(
                    steps,
                    result.columns[name][rows],
                    **drawn | {"ms": 0},
                    label=f"{arm.name}: {name.replace('_', ' ')}",
                )
        if not points or result.settings["mode"] != "zo":
            continue
        try:
            rows_ = slope_history.course(result.path, points)
        except UserError as error:
            notes.append(f"without slopes over time: {result.name}: {error}")
            continue
        steps = [row["step"] for row in rows_]
        cosine.plot(steps, [row["cosine"] for row in rows_], **drawn, label=arm.name)
        for name, style in (("expected_cosine", "--"), ("random_cosine", ":")):
            cosine.plot(steps, [row[name] for row in rows_], color=drawn["color"], lw=0.8, ls=style)
        signal.plot(steps, [row["signal_to_noise"] for row in rows_], **drawn)
    cosine.set(xlabel="step", ylabel="cosine with the gradient")
    signal.set(xlabel="step", ylabel="signal to noise of a batch")
