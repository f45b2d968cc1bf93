"""One run looked at: how it went, and who took part in a federated one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from zofed.base.errors import UserError
from zofed.core import aggregation, journal
from zofed.core.metrics import losses_among
from zofed.core.records import Guided, Seeded
from zofed.experiments.plot_arms import smoothed
from zofed.runs import plot_style
from zofed.runs.run_result import Array, Result
from zofed.runs.tables import read_table

CLIENTS_SHOWN = 8  # curves; of more clients the mean and the range are drawn


def quick(result: Result, path: Path) -> Path:
    """Losses, rate, and the spread of the slopes (of first order: the gradient's norm) by step."""
    steps, notes = result.columns.get("step", np.zeros(0)), []
    figure, places = plot_style.panels(1, 3, width=4.9)
    loss, rate, spread = places[0]
    training = result.columns.get("loss", np.full(len(steps), np.nan))
    seen = np.flatnonzero(np.isfinite(training))
    loss.plot(steps[seen], training[seen], color="0.75", lw=0.8, label="training")
    if len(seen):
        loss.plot(steps[seen], smoothed(training[seen]), color="0.35", lw=1.6, label="training, smoothed")
    rows, losses = result.held_out
    loss.plot(steps[rows], losses, **plot_style.stroke(0).line(), label="held out")
    for name, level in losses_among(result.summary.get("baselines", {})).items():
        loss.axhline(level, color="0.3", lw=1, ls=":")
        loss.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize="small")
    loss.set(xlabel="step", ylabel="loss (nats)")
    loss.legend(frameon=False, fontsize="small")
    if "lr" in result.columns:
        rate.plot(steps, result.columns["lr"], color="black", lw=1.5)
    rate.set(xlabel="step", ylabel="rate", ylim=(0, None))
    found = slopes(result.path / "journal.zofed", notes)
    if found:
        for index, (kind, (rounds, sizes)) in enumerate(sorted(found.items())):
            drawn = plot_style.stroke(index).line() | {"ms": 0}
            spread.plot(rounds, sizes, color=drawn["color"], lw=0.7, alpha=0.35)
            spread.plot(rounds, smoothed(sizes), **drawn, label=f"along {kind} directions")
        spread.set(ylabel="spread of the slopes (rms)", ylim=(0, None))
        spread.legend(frameon=False, fontsize="small")
    elif "grad_norm" in result.columns:
        spread.plot(steps, result.columns["grad_norm"], color="black", lw=1)
        spread.set(ylabel="norm of the gradient")
    spread.set(xlabel="step")
    if not result.is_complete:
        notes.append(f"not finished: {result.summary.get('status', 'no summary')}, {len(steps) - 1} steps")
    for place in places.flat:
        place.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return plot_style.save(figure, path, result.name, notes)


def slopes(path: Path, notes: list[str]) -> dict[str, tuple[Array, Array]]:
    """(rounds, root mean square of their slopes) by kind of direction; a note where the journal cannot be read."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    try:
        for entry in journal.read(path).entries:
            is_guided = isinstance(entry.record, Guided)
            record = entry.record.seeded if isinstance(entry.record, Guided) else entry.record
            if isinstance(record, Seeded) and record.coefficients:
                rounds, sizes = found.setdefault("guided" if is_guided else "random", ([], []))
                rounds.append(record.round)
                sizes.append(aggregation.size(record))
    except UserError as error:
        notes.append(f"without slopes: {error}")
    return {kind: (np.array(rounds), np.array(sizes)) for kind, (rounds, sizes) in found.items()}


def federated(result: Result, path: Path) -> Path:
    """Who answered each round, what was refused and why, bytes, and each client's loss.

    Raises UserError for a run that was not federated.
    """
    replies = [row for row in read_table(result.path / "clients.csv") if row.get("round")]
    rounds = [row for row in read_table(result.path / "rounds.csv") if row.get("round")]
    if not replies or not rounds:
        raise UserError(
            f"{result.path} has no rounds.csv and clients.csv with a line: it is no federated run, or none yet"
        )
    clients = sorted({int(row["client"]) for row in replies})
    last = max(int(row["round"]) for row in replies)
    reasons = sorted({row["result"] for row in replies} - {"used"})
    figure, places = plot_style.panels(*((2, 2) if reasons else (1, 3)), width=5.6, height=3.7)
    flat = list(places.flat)
    _participation(flat[0], replies, clients, last)
    if reasons:
        _refusals(flat[1], replies, reasons, last)
    _traffic(flat[-2], rounds)
    notes = _losses(flat[-1], result.path, replies, clients)
    if not reasons:
        notes = [*notes, "every answer was used"]
    for place in flat:
        place.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return plot_style.save(figure, path, f"{result.name}: {len(clients)} clients, {last} rounds", notes)


def _participation(place: Any, replies: list[dict[str, str]], clients: list[int], last: int) -> None:
    grid = np.zeros((len(clients), last))
    for row in replies:
        used = row["result"] == "used"
        at = clients.index(int(row["client"])), int(row["round"]) - 1
        grid[at] = 1.0 if used else max(grid[at], 0.5)
    place.imshow(grid, cmap="Greys", vmin=0, vmax=1.25, aspect="auto", interpolation="nearest",
                 extent=(0.5, last + 0.5, len(clients) - 0.5, -0.5))  # fmt: skip
    place.set(xlabel="round", ylabel="client", title="black: used, grey: asked and not used, white: not asked")
    place.title.set_fontsize("small")
    if len(clients) <= 40:
        place.hlines(np.arange(0.5, len(clients) - 1), 0.5, last + 0.5, color="white", lw=2)
    if len(clients) <= 12:
        place.set_yticks(range(len(clients)), [str(client) for client in clients])
    place.grid(visible=False)


def _refusals(place: Any, replies: list[dict[str, str]], reasons: list[str], last: int) -> None:
    for index, reason in enumerate(reasons):
        counts = np.zeros(last)
        for row in replies:
            counts[int(row["round"]) - 1] += row["result"] == reason
        place.plot(
            np.arange(1, last + 1), np.cumsum(counts), **plot_style.stroke(index).line() | {"ms": 0}, label=reason
        )
    place.set(xlabel="round", ylabel="answers not used, in all")
    place.legend(frameon=False, fontsize="small")


def _traffic(place: Any, rounds: list[dict[str, str]]) -> None:
    at = [int(row["round"]) for row in rounds]
    for index, (column, label) in enumerate((("bytes_up", "up"), ("bytes_down", "down"))):
        sums = np.cumsum([float(row.get(column) or 0) for row in rounds]) / 1000
        place.plot(at, sums, **plot_style.stroke(index).line() | {"ms": 0}, label=label)
    place.set(xlabel="round", ylabel="KB of all clients, in all", ylim=(0, None))
    place.legend(frameon=False)


def _losses(place: Any, folder: Path, replies: list[dict[str, str]], clients: list[int]) -> list[str]:
    """Losses by client: on its own held-out data where it has some, else in training."""
    rows = [row for row in read_table(folder / "client_evaluations.csv") if row.get("loss")]
    what = "its own held-out data"
    if not rows:
        rows, what = [row for row in replies if row["result"] == "used" and row.get("loss")], "training, smoothed"
    by_client: Mapping[int, tuple[list[int], list[float]]] = {client: ([], []) for client in clients}
    for row in rows:
        at, losses = by_client.setdefault(int(row["client"]), ([], []))  # type: ignore[attr-defined]
        at.append(int(row["round"]))
        losses.append(float(row["loss"]))
    place.set(xlabel="round", ylabel=f"a client's loss,\n{what} (nats)")
    if not rows:
        place.annotate("the clients told no losses", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return []
    lines = {
        client: (at, smoothed(np.array(y)) if "smoothed" in what else y) for client, (at, y) in by_client.items() if y
    }
    if len(lines) <= CLIENTS_SHOWN:
        for index, (client, (at, losses)) in enumerate(sorted(lines.items())):
            drawn = plot_style.stroke(index).line() | {"markevery": max(1, len(at) // 8)}
            place.plot(at, losses, **drawn, label=f"client {client}")
        place.legend(frameon=False, fontsize="x-small", ncols=2)
        return []
    every = sorted({round_ for at, _ in lines.values() for round_ in at})
    values = np.array([np.interp(every, at, losses) for at, losses in lines.values()])
    place.fill_between(every, values.min(0), values.max(0), color="0.8", lw=0, label="lowest to highest client")
    place.plot(every, values.mean(0), color="black", lw=1.7, label="mean of the clients")
    place.legend(frameon=False, fontsize="small")
    return []
