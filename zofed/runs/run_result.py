"""What one run found, read back from its folder, as far as the files of a killed process or another version go."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from zofed import config
from zofed.base.errors import UserError
from zofed.base.texts import one_line
from zofed.config import SETTINGS
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Result:
    """One run. settings: as written in its folder, defaults for what is not there. columns: of metrics.csv, by name.

    arm, tunes: what its sweep says of it; empty and False for a run on its own.
    """

    path: Path
    settings: Mapping[str, Any]
    summary: Mapping[str, Any]
    columns: Mapping[str, Array]
    arm: str = ""
    tunes: bool = False

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_complete(self) -> bool:
        return self.summary.get("status") == "completed"

    @property
    def has_diverged(self) -> bool:
        return self.summary.get("status") == "diverged"

    @property
    def is_cut(self) -> bool:
        """Whether the metrics tell less than the summary says the run cost."""
        cost = self.summary.get("forward_equivalents")
        return self.is_complete and cost is not None and self.total("forward_equivalents") != cost

    @cached_property
    def held_out(self) -> tuple[Array, Array]:
        """(rows of the evaluations, their losses)."""
        losses = self.columns.get("eval_loss", np.zeros(0))
        rows = np.flatnonzero(np.isfinite(losses))
        return rows, losses[rows]

    @property
    def end(self) -> float:
        """Held-out loss at the end, nats; NaN of a run that has not ended or has diverged."""
        return math.nan if self.has_diverged else float(self.summary.get("eval_loss_end", math.nan))

    @property
    def metric(self) -> str:
        """The score that people rank such runs by."""
        from zofed.core.metrics import SCORE  # which takes torch: `zofed report --help` need not wait

        return str(self.settings.get("metric") or SCORE)

    @property
    def score(self) -> float:
        """The metric at the end, as the share of right answers; NaN where its task has none, or it has not ended."""
        return float(self.summary.get(self.metric, math.nan)) if self.is_complete else math.nan

    @property
    def best(self) -> float:
        """The lowest held-out loss of all evaluations, nats."""
        return float(min(self.held_out[1], default=math.nan))

    def total(self, column: str) -> float:
        """The last value of a running sum of the metrics (passes, seconds, bytes); NaN where there is none."""
        found = self.columns.get(column, np.zeros(0))
        return float(found[-1]) if len(found) else math.nan


NUMBERS = (
    "eval_loss_start",
    "eval_loss_end",
    "forward_equivalents",
    "seconds",
    "peak_memory_bytes",
    "training_memory_bytes",
)  # of a summary
LONGEST_SHOWN = 60  # characters of a value
LARGEST = 2**1023  # integer that is read as a number of floating point


def read(path: Path) -> Result:
    """The run in a folder. Raises UserError where it is none, is spoilt, or has not a line of metrics."""
    run = RunFolder.open(path)
    settings = {key: known.default for key, known in SETTINGS.items()} | config.read_own_toml(
        run.path / "settings.toml"
    )
    rows = read_table(run.path / "metrics.csv")
    if not rows:
        raise UserError(f"{run.path} has no line of metrics yet: let it run, or leave it out")
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in rows[0] if name}
    summary = run.summary()
    found = Result(run.path, settings, summary, columns)
    for key in (*NUMBERS, found.metric):
        if (value := summary.get(key)) is not None and not _is_number(value):
            spoilt = f"{run.path / 'summary.json'} is spoilt"
            raise UserError(
                f"{spoilt}, {key} = {one_line(repr(value), LONGEST_SHOWN)} is no number: bring it back from a copy"
            )
    return found


def _is_number(value: object) -> bool:
    """Whether a value of JSON is a number, and no integer beyond what a float holds."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < LARGEST)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan
