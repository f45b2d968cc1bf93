"""The pictures that every run leaves in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from zofed.core.metrics import losses_among
from zofed.data import partitions
from zofed.runs import plot_style, run_result
from zofed.runs.run_folder import RunFolder

GROUPS_SHOWN = 10  # colours and hatches that an eye can still tell apart


def plot_loss(folder: RunFolder, baselines: Mapping[str, float]) -> Path:
    """loss.png in the run's folder: training and held-out loss by step, with the baselines as lines."""
    result = run_result.read(folder.path)
    steps, training, (rows, held_out) = result.columns["step"], result.columns["loss"], result.held_out
    figure, places = plot_style.panels(1, 1, width=8, height=5)
    place = places[0, 0]
    seen = np.flatnonzero(np.isfinite(training))
    place.plot(steps[seen], training[seen], color="0.7", lw=1, label="training")
    place.plot(steps[rows], held_out, **plot_style.stroke(0).line(), label="held-out")
    lines = sorted(losses_among(baselines).items(), key=lambda line: line[1])
    for index, (_, loss) in enumerate(lines):
        place.axhline(loss, color="0.35", lw=1, ls=("--", "-.", ":")[index % 3])
    low, high = place.get_ylim()
    for group in _near(lines, (high - low) / 20):  # the height of a line of text
        told = ", ".join(f"{name.removesuffix('_loss').replace('_', ' ')} {loss:.2f}" for name, loss in group)
        place.annotate(told, (1, group[-1][1]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    place.set(xlabel="step", ylabel="loss (nats)")
    place.legend(loc="best", fontsize="small")
    return plot_style.save(figure, folder.path / "loss.png")


def _near(lines: Sequence[tuple[str, float]], distance: float) -> list[list[tuple[str, float]]]:
    """Lines of rising height in groups, each no further than `distance` from the one below it."""
    groups: list[list[tuple[str, float]]] = []
    for line in lines:
        if groups and line[1] - groups[-1][-1][1] < distance:
            groups[-1].append(line)
        else:
            groups.append([line])
    return groups


def partition(counts_by_client: Mapping[int, Mapping[str, int]], path: Path) -> Path:
    """Who holds what: a stacked bar a client, documents of each group (of more than 10, the largest 9 and others)."""
    shown = partitions.largest(counts_by_client, GROUPS_SHOWN)
    columns, rows = partitions.table(shown)
    groups, clients = columns[2:], [str(row[0]) for row in rows]
    counts = np.array([row[2:] for row in rows])
    few = len(clients) <= 40  # more have neither room for figures nor for a tick each
    sns.set_theme(style="ticks", context="notebook", rc={"hatch.linewidth": 0.5})
    figure, axes = plt.subplots(figsize=(10, 1.8 + (0.36 * len(clients) if few else 10)))
    # Lightness rises along cividis, so that the order of the legend is readable in grey and to any eye; hatching tells
    # neighbours apart.
    colors = matplotlib.colormaps["cividis"](np.linspace(0, 1, len(groups)))
    starts, widest = np.zeros(len(clients)), max(1, counts.sum(axis=1).max())
    for index, name in enumerate(groups):
        held, dark = counts[:, index], index < len(groups) / 2
        ink = "white" if dark else "black"
        looks: dict[str, Any] = {
            "color": colors[index], "hatch": ("", "///")[index % 2], "edgecolor": ink, "label": plot_style.shown(name),
        }  # fmt: skip
        if not few:  # one shape for all clients: as many bars take a minute for 10,000
            axes.stairs(
                starts + held, np.arange(len(held) + 1) - 0.5, baseline=starts, orientation="horizontal", fill=True,
                lw=0, **looks,
            )  # fmt: skip
        else:
            bars = axes.barh(clients, held, left=starts, height=0.8, lw=0.6, **looks)
            box = {"facecolor": colors[index], "edgecolor": "none", "pad": 0.8}  # over the hatching
            texts = [f"{count:,}" if count >= 0.012 * widest * (1 + len(str(count))) else "" for count in held]
            for text in axes.bar_label(bars, texts, label_type="center", color=ink, fontsize=9):
                text.set_bbox(box if text.get_text() else None)
        starts += held
    if few:
        for row, total in enumerate(starts):
            axes.annotate(f"{total:,.0f}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    else:
        shown_rows = range(0, len(clients), -(-len(clients) // 20))
        axes.set_yticks(shown_rows, [clients[row] for row in shown_rows])
    axes.set(xlabel="documents", ylabel="client", xlim=(0, 1.08 * widest), ylim=(len(clients) - 0.5, -0.5))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, handleheight=1.2)
    return plot_style.save(figure, path)


def federation(folder: RunFolder, clients: int) -> Path:
    """federation.png: losses by round, by bytes of a client and by seconds, and where each round's seconds went."""
    path = folder.path / "federation.png"
    metrics, rounds = run_result.read(folder.path).columns, pd.read_csv(folder.path / "rounds.csv")
    sums = rounds[["bytes_up", "bytes_down"]].cumsum() / max(1, clients)
    rounds["kilobytes"] = (sums["bytes_up"] + sums["bytes_down"]) / 1000
    rounds["seconds"] = pd.Series(metrics["seconds"], metrics["step"]).reindex(rounds["round"]).to_numpy()
    sns.set_theme(style="ticks", context="notebook")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5))
    places = (("round", "round"), ("kilobytes", "KB up and down, mean of a client"), ("seconds", "seconds"))
    for place, (column, label) in zip(axes.flat, places, strict=False):
        place.plot(rounds[column], rounds["loss"], color="0.65", lw=1, label="training (clients' mean)")
        scored = rounds.dropna(subset=["eval_loss"])
        place.plot(scored[column], scored["eval_loss"], color="black", marker="o", ms=4, label="held out, server")
        place.set(xlabel=label, ylabel="loss, nats")
    axes.flat[0].legend(frameon=False)
    last = axes.flat[3]
    parts = (
        ("seconds_compute", "0.15", "slowest client"),
        ("seconds_flower", "0.75", "Flower, waiting, others in turn"),
    )
    below = np.zeros(len(rounds))
    for column, color, label in parts:
        above = below + rounds[column].fillna(0).to_numpy()
        last.fill_between(rounds["round"], below, above, step="mid", color=color, label=label, lw=0)
        below = above
    last.set_ylim(0, 1.3 * max(below, default=1))
    last.set(xlabel="round", ylabel="seconds of a round")
    last.legend(frameon=False)
    return plot_style.save(figure, path)
