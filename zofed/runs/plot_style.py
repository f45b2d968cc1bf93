"""How all pictures look: curves that differ in colour, lightness, dash and marker, for print in grey and any eye."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.text import Text
from matplotlib.ticker import LogFormatter

from zofed.base.errors import UserError
from zofed.base.files import make_private, take_mode

AXES = {
    "step": "step",
    "forward-equivalents": "forward-equivalents (examples)",
    "seconds": "seconds of training",
    "tokens": "tokens of training data",
    "bytes": "bytes up and down, all clients",
}
LOSS = "held-out loss (nats)"
MOST = 10  # curves that an eye can still tell apart in one panel

# Okabe and Ito's colours, which any eye can tell apart, in an order in which lightness alternates, for print in grey.
_COLORS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#661100", "#999933", "#D55E00", "#888888")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "++", "oo", "|||", "---", "**")


@dataclass(frozen=True, slots=True)
class Stroke:
    """How one curve is drawn."""

    color: str
    dash: Any
    marker: str
    hatch: str

    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": self.dash, "marker": self.marker, "ms": 4.5, "lw": 1.7}


def stroke(index: int) -> Stroke:
    """The stroke of the curve of that place in the legend."""
    return Stroke(
        _COLORS[index % len(_COLORS)],
        _DASHES[index % len(_DASHES)],
        _MARKERS[index % len(_MARKERS)],
        HATCHES[index % len(HATCHES)],
    )


LETTER = 0.085  # inches of a legend's letter


def panels(rows: int, columns: int, width: float = 5.2, height: float = 3.9, **more: Any) -> tuple[Any, Any]:
    """A figure with (rows, columns) panels, always a two-dimensional array."""
    sns.set_theme(style="ticks", context="notebook", rc={"axes.grid": True, "grid.alpha": 0.35, "hatch.linewidth": 0.6})
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **more)


def _as_written(figure: Any) -> None:
    """Have every text drawn as it stands, dollar signs too: names of data may hold what is no formula. The ticks of a
    logarithmic axis stay, whose powers of ten are formulas."""
    own = {
        id(label)
        for place in figure.axes
        for axis in (place.xaxis, place.yaxis)
        if isinstance(axis.get_major_formatter(), LogFormatter)
        for label in axis.get_ticklabels(which="both")
    }
    for text in figure.findobj(Text):
        if id(text) not in own:
            text.set_parse_math(False)


def shown(name: str, longest: int = 40) -> str:
    """A name from somebody's data as the label of a curve or bar: not too long, and never left out of a legend, which
    leaves out what begins with _."""
    label = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return f" {label}" if label.startswith("_") else label


def save(figure: Any, path: Path, title: str = "", notes: Sequence[str] = (), legend_of: Any = None) -> Path:
    """Write the picture whole, with its title above and notes below; returns the path.

    Raises UserError where it cannot be written.

    legend_of: a panel whose legend all panels share, below them.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: pictures are PNG files: give --out a name that ends in .png")
    sns.despine(figure)
    width, height = figure.get_size_inches()
    wrapped = [line for note in notes if note for line in textwrap.wrap(note, int(width * 13))]
    below = 0.2 * len(wrapped)
    if legend_of is not None and legend_of.get_legend_handles_labels()[0]:
        handles, labels = legend_of.get_legend_handles_labels()
        widest = int((width - 1.1) / LETTER)  # of a name, in letters: a longer one takes several lines
        labels = ["\n".join(textwrap.wrap(label, widest)) for label in labels]
        longest = max((len(line) for label in labels for line in label.split("\n")), default=1)
        columns = max(1, min(len(labels), int(width / (0.9 + LETTER * longest))))
        tallest = max(label.count("\n") + 1 for label in labels)
        below += 0.26 * tallest * -(-len(labels) // columns) + 0.1
        figure.legend(
            handles, labels, loc="lower center", ncols=columns, frameon=False, handlelength=3.2, fontsize="small",
            bbox_to_anchor=(0.5, 0.2 * len(wrapped) / height),
        )  # fmt: skip
    lines = textwrap.wrap(title, int(width * 9))
    above = 0.15 + 0.25 * len(lines) if lines else 0.0
    figure.set_size_inches(width, height + below + above)
    total = height + below + above
    if lines:
        figure.suptitle("\n".join(lines), fontsize="medium", y=1 - 0.12 / total, va="top").set_in_layout(False)
    for at, line in enumerate(reversed(wrapped)):
        figure.text(0.01, (0.06 + 0.2 * at) / total, line, fontsize="x-small", color="0.25")
    _as_written(figure)
    figure.tight_layout(rect=(0, below / total, 1, 1 - above / total))
    temporary = path.with_name(f".{path.name}.new.png")
    try:
        make_private(temporary)  # curves and shares of a run, which is its owner's alone
        figure.savefig(temporary, dpi=120)
        take_mode(temporary, path)
        temporary.rename(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    finally:
        plt.close(figure)
    return path
