"""Pictures of runs, read back from their folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from zofed import partitions
from zofed.errors import UserError
from zofed.runs import RunFolder

AXES = {
    "step": "step",
    "forward-equivalents": "forward-equivalents (examples run forward, a backward pass counts two)",
    "seconds": "seconds",
    "bytes": "bytes up and down, all clients",
}
GROUPS_SHOWN = 10  # colours and hatches that an eye can still tell apart


def read_metrics(folder: RunFolder) -> pd.DataFrame:
    """The run's metrics. Raises UserError when there are none."""
    path = folder.path / "metrics.csv"
    try:
        table = pd.read_csv(path)
    except (OSError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"cannot read {path}: {error}; give the folder of a run") from error
    table = table.rename(columns={"forward_equivalents": "forward-equivalents"})
    if missing := [axis for axis in AXES if axis not in table]:
        raise UserError(f"{path} has no column {missing[0]}: another version of zofed wrote it, which can draw it")
    return table


def plot_loss(folder: RunFolder, baselines: Mapping[str, float]) -> Path:
    """loss.png in the run's folder: training and held-out loss by step, with the baselines as lines."""
    path = folder.path / "loss.png"
    _draw([folder], "step", path, baselines)
    return path


def compare(folders: Sequence[RunFolder], axis: str, path: Path) -> Path:
    """One picture of several runs' training and held-out losses along `axis`, one of AXES."""
    _draw(folders, axis, path, {})
    return path


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
        bars = axes.barh(
            clients, held, left=starts, color=colors[index], height=0.8 if few else 1, label=name,
            hatch=("", "///")[index % 2], edgecolor=ink, lw=0.6 if few else 0,
        )  # fmt: skip
        if few:
            box = {"facecolor": colors[index], "edgecolor": "none", "pad": 0.8}  # over the hatching
            texts = [f"{count:,}" if count >= 0.012 * widest * (1 + len(str(count))) else "" for count in held]
            for text in axes.bar_label(bars, texts, label_type="center", color=ink, fontsize=9):
                text.set_bbox(box if text.get_text() else None)
        starts += held
    if few:
        for row, total in enumerate(starts):
            axes.annotate(f"{total:,.0f}", (total, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    else:
        axes.set_yticks(range(0, len(clients), -(-len(clients) // 20)))
    axes.set(xlabel="documents", ylabel="client", xlim=(0, 1.08 * widest), ylim=(len(clients) - 0.5, -0.5))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, handleheight=1.2)
    sns.despine(figure)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _draw(folders: Sequence[RunFolder], axis: str, path: Path, baselines: Mapping[str, float]) -> None:
    sns.set_theme(style="whitegrid", context="notebook")
    colors = sns.color_palette("colorblind")
    figure, axes = plt.subplots(figsize=(8, 5))
    styles = ("-", "--", "-.", ":")
    for index, folder in enumerate(folders):
        table = read_metrics(folder)
        name = "" if len(folders) == 1 else f"{folder.path.name}: "
        color, style = colors[index % len(colors)], styles[index % len(styles)]
        training, held_out = table.dropna(subset=["loss"]), table.dropna(subset=["eval_loss"])
        axes.plot(training[axis], training["loss"], color=color, alpha=0.3, lw=1, label=f"{name}training")
        axes.plot(held_out[axis], held_out["eval_loss"], style, color=color, lw=2, marker="o", ms=4)
        axes.lines[-1].set_label(f"{name}held-out")
    top = axes.get_ylim()[1]
    for index, (name, loss) in enumerate((k, v) for k, v in baselines.items() if not k.endswith("accuracy")):
        axes.axhline(loss, color="0.35", lw=1, ls=styles[1 + index % 3])
        axes.annotate(f"{name} {loss:.2f}", (1, loss), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(xlabel=AXES[axis], ylabel="loss (nats)")
    axes.set_ylim(top=max(top, axes.get_ylim()[1]))
    axes.legend(loc="best", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def federation(folder: RunFolder, clients: int) -> Path:
    """federation.png: losses by round, by bytes of a client and by seconds, and where each round's seconds went."""
    path = folder.path / "federation.png"
    metrics, rounds = read_metrics(folder), pd.read_csv(folder.path / "rounds.csv")
    sums = rounds[["bytes_up", "bytes_down"]].cumsum() / max(1, clients)
    rounds["kilobytes"] = (sums["bytes_up"] + sums["bytes_down"]) / 1000
    rounds["seconds"] = metrics.set_index("step")["seconds"].reindex(rounds["round"]).to_numpy()
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
    sns.despine(figure)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
