"""`zofed watch`: a run that another process carries out, followed by what it writes."""

import time
from pathlib import Path
from typing import Annotated

import typer

from zofed.base.texts import duration
from zofed.commands.console import Reporter, console, figure, tell_scores
from zofed.commands.groups import interruptible
from zofed.runs.run_folder import CENTRAL, SILENT_S, RunFolder
from zofed.runs.tables import Row, read_table


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("watch")(watch)


def watch(
    run: Annotated[Path, typer.Argument(help="folder of a run, central or federated")],
    every: Annotated[float, typer.Option(min=0.1, max=3600, help="seconds between two looks")] = 2.0,
) -> None:
    """Follow a run that goes on anywhere on this machine: losses, pace, time left, how it ends."""
    folder = RunFolder.open(run)
    settings, is_central = folder.settings(), folder.way == CENTRAL
    what, total = ("step", settings.steps) if is_central else ("round", settings.rounds)
    with (
        interruptible(lambda: f"no longer watched, and not stopped: zofed watch {run}"),
        Reporter(total, what, is_own=False) as reporter,
    ):
        status = _followed(folder, reporter, every)
    console.print(f"{folder.path}: {status}", markup=False)
    if status == "completed":
        summary = folder.summary()
        start, end = figure(summary["eval_loss_start"]), figure(summary["eval_loss_end"])
        console.print(f"held-out loss {start} -> {end} nats, {duration(summary['seconds'])}")
        tell_scores(summary)
    elif status != "diverged":
        console.print(f"continue with: {folder.go_on()}", markup=False)


def _followed(folder: RunFolder, reporter: Reporter, every: float) -> str:
    """Tell each new row until the run has ended; what its summary then says."""
    told, silent = -1, False
    while True:
        status = str(folder.summary().get("status", "unknown"))  # before the rows: an ended run writes no more
        rows = _rows(folder)
        if told < 0 and rows:
            reporter.told.pace(rows[0])  # the pace is that since its start
            rows = rows[-1:] if rows[-1].get("eval_loss") is not None else [*_evaluated(rows)[-1:], rows[-1]]
        for row in rows:
            if row["step"] > told:
                reporter(row)
                told, silent = row["step"], False
        if status != "running":
            return status
        if (quiet := folder.quiet_seconds) > SILENT_S and not silent:
            silent = True
            console.print(f"nothing was written for {duration(quiet)}: if it was killed, {folder.after_interruption()}")
        time.sleep(every)


def _rows(folder: RunFolder) -> list[Row]:
    """Step, losses and seconds of each whole line of the metrics; nothing of a line that is still being written."""
    rows = []
    for row in read_table(folder.path / "metrics.csv"):
        try:
            losses = {name: float(row[name]) if row[name] else None for name in ("loss", "eval_loss")}
            rows.append({"step": int(row["step"]), "seconds": float(row["seconds"]), **losses})
        except (KeyError, ValueError):
            continue
    return rows


def _evaluated(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["eval_loss"] is not None]
