"""How good a run's slopes were along its way: its journal is replayed, and backpropagation asked now and then."""

import csv
import io
from pathlib import Path

from zofed.base.errors import UserError
from zofed.core.journal import read
from zofed.core.slope_quality import diagnose
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row, read_table
from zofed.training.finalize import base_replica
from zofed.training.measurements import batch_loss
from zofed.training.process import prepare_process
from zofed.training.replicas import place_model
from zofed.training.task import Task

FILE = "course.csv"
COLUMNS: tuple[str, ...] = ("step", "signal_to_noise", "cosine", "expected_cosine", "random_cosine")
BATCHES = 4
QUERIES = 64  # directions, at most, along which one look compares slopes


def course(path: Path, points: int) -> list[dict[str, float]]:
    """Signal to noise of the slopes and the estimate's cosine with the gradient at `points` steps, evenly spread.

    Beside it what exact slopes along as many directions give, and what chance does (`Diagnosis`). Kept in the run's
    folder, so that it is measured once. Raises UserError where the journal does not replay from the start, or for dense
    directions.
    """
    folder = RunFolder.open(path)
    rows = read_table(folder.path / FILE)
    if not rows or not set(COLUMNS) <= set(rows[0]):
        rows = _measure(folder, points)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        folder.write_text(FILE, text.getvalue())
    return [{name: float(row[name]) for name in COLUMNS} for row in rows]


def _measure(folder: RunFolder, points: int) -> list[Row]:
    replica, settings = base_replica(folder)
    prepare_process(settings.threads)
    place_model(replica, settings)
    task = Task.load(settings)
    examples = task.shard(0, max(1, settings.clients))
    entries = read(folder.journal).entries
    if not entries:
        raise UserError(f"{folder.journal} has no steps yet")
    last = len(entries) - 1  # the step after the last would be of no run
    rows: list[Row] = []
    for at in sorted({round(last * part / max(1, points - 1)) for part in range(points)}):
        replica.replay(entries[replica.round : at], folder.whole_update)
        losses = [batch_loss(settings, replica, examples, at + 1 + extra) for extra in range(BATCHES)]
        queries = min(QUERIES, settings.queries)
        found = diagnose(replica, losses, queries, settings.finite_difference, settings.perturbations_per_pass)
        values = (at, found.signal_to_noise, found.cosine, found.expected_cosine, found.random_cosine)
        rows.append(dict(zip(COLUMNS, map(repr, values), strict=True)))
    return rows
