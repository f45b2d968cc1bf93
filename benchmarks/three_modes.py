"""Held-out loss of a small federation in modes zo, subspace and fo (FedAvg), by rounds and by bytes a client sends.

Model `tiny` from scratch, the shipped sample-dclm, 4 clients. In every mode a client reads 4 batches of 4 examples a
round, in the same order of the same share. Bytes are those of a client's replies as Flower serialises them. The rate of
a mode is the one of its grid with the lowest held-out loss at the end, in the mean of two seeds; three others are
reported. A run that is finished is not run again.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.federated_training import federate
from zofed.runs import plot_style
from zofed.runs.tables import read_table

CLIENTS = 4
BASE: dict[str, Any] = {
    "dataset": "sample-dclm", "model": "tiny", "batch-size": 4, "block-size": 64, "rounds": 40, "eval-interval": 2,
    "eval-examples": 128, "save-interval": 0, "weight-check-interval": 0, "device": "cpu", "threads": 1,
}  # fmt: skip
# name: learning rates to choose from, settings
MODES: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {
    "zo": ((0.01, 0.03, 0.1), {"mode": "zo", "queries": 16, "local-steps": 4, "quantization-bits": 6}),
    "subspace": (
        (0.003, 0.01, 0.03),
        {"mode": "subspace", "optimizer": "adamw", "subspace-interval": 4, "quantization-bits": 6},
    ),
    "fo (FedAvg)": ((0.1, 0.3, 1.0), {"mode": "fo", "local-steps": 4}),
}
CHOOSING = (0, 4)  # seeds that choose the rate
SEEDS = (1, 2, 3)  # seeds that are reported

Curve = list[tuple[int, float, float]]  # (round, bytes a client has sent, held-out loss)


def curve(folder: Path) -> Curve:
    """What a run's folder tells of every evaluation."""
    rounds = read_table(folder / "rounds.csv")
    start = next(row for row in read_table(folder / "metrics.csv") if row["step"] == "0")
    found, sent = [(0, 0.0, float(start["eval_loss"]))], 0.0
    for row in rounds:
        sent += int(row["bytes_up"]) / CLIENTS
        if row["eval_loss"]:
            found.append((int(row["round"]), sent, float(row["eval_loss"])))
    return found


def one(out: Path, name: str, rate: float, seed: int) -> tuple[dict[str, Any], Curve]:
    """A run's summary and curve."""
    folder = out / MODES[name][1]["mode"] / f"{rate:g}-{seed}"
    summary = federate(BASE | MODES[name][1] | {"learning-rate": rate, "seed": seed}, folder, CLIENTS)
    return summary, curve(folder)


def bytes_to(found: Curve, loss: float) -> float | None:
    """Bytes a client had sent when the held-out loss was first at most this; None where it never was."""
    return next((sent for _, sent, value in found if value <= loss), None)


def report(out: Path) -> None:
    """Run what is missing, print the table and draw OUT/three-modes.png."""
    curves: dict[str, list[Curve]] = {}
    chosen: dict[str, float] = {}
    unigram = 0.0
    for name, (rates, _) in MODES.items():
        ends = {
            rate: statistics.fmean(one(out, name, rate, seed)[0]["eval_loss_end"] for seed in CHOOSING)
            for rate in rates
        }
        chosen[name] = min(ends, key=lambda rate, ends=ends: ends[rate])
        print(f"{name}: " + ", ".join(f"rate {rate:g} gives {end:.3f}" for rate, end in ends.items()))
        runs = [one(out, name, chosen[name], seed) for seed in SEEDS]
        curves[name] = [found for _, found in runs]
        unigram = statistics.fmean(summary["baselines"]["unigram"] for summary, _ in runs)
    worst = max(statistics.fmean(found[-1][2] for found in some) for some in curves.values())
    goal = math.ceil(10 * worst) / 10
    print(f"| mode | rate | held-out loss | bytes a client sends a round | KB in all | KB to {goal:.1f} nats |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, some in curves.items():
        ends = [found[-1][2] for found in some]
        sent = statistics.fmean(found[-1][1] for found in some)
        costs = [cost for found in some if (cost := bytes_to(found, goal)) is not None]
        told = f"{statistics.fmean(costs) / 1e3:,.1f} ({len(costs)} of {len(some)} seeds)" if costs else "not reached"
        print(
            f"| {name} | {chosen[name]:g} | {statistics.fmean(ends):.3f} ± {statistics.stdev(ends):.3f} | "
            f"{sent / BASE['rounds']:,.0f} | {sent / 1e3:,.1f} | {told} |"
        )
    print(f"start {curves['zo'][0][0][2]:.3f} (seed {SEEDS[0]}); unigram baseline {unigram:.3f}")
    draw(curves, unigram, out / "three-modes.png")


def draw(curves: dict[str, list[Curve]], unigram: float, path: Path) -> None:
    """Mean over the seeds, and the range between the best and the worst of them."""
    figure, axes = plot_style.panels(1, 2, sharey=True)
    for index, (name, some) in enumerate(curves.items()):
        style = plot_style.stroke(index)
        points = list(zip(*some, strict=True))  # of each evaluation, one of every seed
        rounds = [at[0][0] for at in points]
        sent = [statistics.fmean(run[1] for run in at) for at in points]
        means, lows, highs = ([of(run[2] for run in at) for at in points] for of in (statistics.fmean, min, max))
        for panel, x, first in ((axes[0, 0], rounds, 0), (axes[0, 1], sent, 1)):  # no logarithm of 0 bytes
            panel.plot(x[first:], means[first:], label=name, markevery=3, **style.line())
            panel.fill_between(x[first:], lows[first:], highs[first:], color=style.color, alpha=0.15, lw=0)
    for panel in axes[0]:
        panel.axhline(unigram, color="0.5", lw=1.2, ls=(0, (2, 2)), label="unigram baseline")
    axes[0, 0].set(xlabel="round", ylabel=plot_style.LOSS)
    axes[0, 1].set(xlabel="bytes that a client has sent")
    axes[0, 1].set_xscale("log")
    note = f"4 clients, 141,056 parameters from scratch; mean of {len(SEEDS)} seeds, shaded: from the best to the worst"
    plot_style.save(figure, path, notes=(note,), legend_of=axes[0, 0])
