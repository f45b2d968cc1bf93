"""Pictures of runs, read back from their folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from zofed.errors import UserError
from zofed.runs import RunFolder

AXES = {
    "step": "step",
    "forward-equivalents": "forward-equivalents (examples run forward, a backward pass counts two)",
    "seconds": "seconds",
    "bytes": "bytes up and down, all clients",
}


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
