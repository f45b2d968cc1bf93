"""What commands print: the console, progress, and the end of a run."""

import json
import math
from typing import Annotated, Any

import rich.progress
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Table

from zofed.base import log, shell
from zofed.runs.progress import Progress
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row


class PlainConsole(Console):
    """A console that leaves a reader who went away to `main`."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


# Progress and results are for people: they go to the terminal as plain words, without colour codes in a pipe.
console = PlainConsole(highlight=False, soft_wrap=True)


AsJson = Annotated[bool, typer.Option("--json", help="JSON in the place of a table, for programs")]


def print_json(found: Any) -> None:
    """Print what a table would show, whole, as JSON; a float that is no finite number as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(own) for key, own in value.items()}
        if isinstance(value, list):
            return [plain(own) for own in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    print(json.dumps(plain(found), indent=1))


def print_table(table: Table) -> None:
    """Print a table of many columns: a pipe or a file has room for all of it, a terminal as much as it is wide."""
    (console if console.is_terminal else Console(width=1000, highlight=False)).print(table)


NAME_WIDTH = 60


def brief(name: str) -> str:
    """A name from somebody's data, cut to what a line of a terminal can hold."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"


def figure(value: float) -> str:
    """A score in digits."""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.3e}"


class Reporter:
    """Shows rows of a run's metrics: a bar on a terminal, else one plain line for every evaluation."""

    def __init__(self, total: int, what: str, *, is_own: bool = True) -> None:
        self.told = Progress(what, total, is_own=is_own)
        self.live: rich.progress.Progress | None = None

    def __enter__(self) -> "Reporter":
        if console.is_terminal and log.shows_progress():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
            )
            self.live = rich.progress.Progress(*columns, console=console)
            self.live.start()
            self.bar = self.live.add_task(self.told.what, total=self.told.total, pace="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def expect(self, total: int) -> None:
        """Count up to this many from now on."""
        self.told.total = total
        if self.live:
            self.live.update(self.bar, total=total)

    def __call__(self, row: Row) -> None:
        losses, pace = self.told.losses(row), self.told.pace(row)
        if self.live:
            self.live.update(self.bar, completed=row["step"], description=losses, pace=pace)
        elif row.get("eval_loss") is not None:
            log.tell(self.told.line(row))


def tell_end(folder: RunFolder, summary: dict[str, Any], *command: str) -> None:
    """The numbers that matter, where the results lie, and what to do next.

    command: what runs settings in the way of this run, before the file that holds them.
    """
    from zofed.core.metrics import Coverage, losses_among

    table = Table("", "held-out loss (nats)", box=None, pad_edge=False)
    end = summary["eval_loss_end"]
    table.add_row("start", f"{summary['eval_loss_start']:.4f}")
    table.add_row("end", f"{end:.4f}")
    for name, loss in losses_among(summary["baselines"]).items():
        table.add_row(f"baseline {name}", f"{loss:.4f}  {'passed' if end < loss else 'not passed'}")
    for name, loss in summary["controls"].items():
        table.add_row(f"control {name.replace('_', ' ')}", f"{loss:.4f}")
    console.print(table)
    if "evaluated" in summary:
        console.print(f"held-out: {Coverage(**summary['evaluated'])}, the same in every evaluation")
    if summary["stopped_by"]:
        console.print(f"stopped by {summary['stopped_by']}")
    if "perplexity" in summary and "bits_per_byte" in summary:
        console.print(f"perplexity {figure(summary['perplexity'])}, {summary['bits_per_byte']:.4f} bits per byte")
    tell_scores(summary)
    if sources := summary.get("sources"):
        console.print("by source:")
        for source, found in sources.items():
            told = ", ".join(f"{key} {figure(value)}" for key, value in found.items())
            console.print(f"  {brief(source)}: {told}", markup=False)
    console.print(f"weights SHA-256 {summary['digest']}")
    if summary["replay_digest"]:
        equal = "equal" if summary["replay_digest"] == summary["digest"] else "DIFFERENT"
        console.print(f"replay of the journal: {equal}")
    console.print(f"results in {folder.path}:")
    for name, what in CONTENTS.items():
        if (folder.path / name).exists():
            console.print(f"  {name:23}{what}")
    again = shell.command(*command, folder.path / "settings.toml", "--out", f"{folder.path}-again")
    console.print(f"the same once more: {again}", markup=False)
    console.print(f"next: {shell.command('zofed', 'journal', 'replay', folder.path)}", markup=False)


def tell_scores(summary: dict[str, Any]) -> None:
    """A table of the scores at the end, over those of what is no learning."""
    from zofed.core.metrics import SCORES, scores_among

    if not (measures := [measure for measure in SCORES if measure in summary]):
        return
    table = Table("score (0 to 1)", *(measure.replace("_", " ") for measure in measures), box=None, pad_edge=False)
    for name, found in {"end": summary, **scores_among(summary["baselines"])}.items():
        what = name if name == "end" else f"baseline {name.replace('_', ' ')}"
        table.add_row(what, *(f"{found[measure]:.4f}" if measure in found else "" for measure in measures))
    console.print(table)


CONTENTS = {
    "summary.json": "losses, baselines, cost, digests, versions",
    "metrics.csv": "one line a step",
    "evaluations.csv": "one line an evaluation and source",
    "samples.jsonl": "held-out prompts, what the model answered at each evaluation, and what was wanted",
    "rounds.csv": "one line a round: replies, bytes, where the time went",
    "clients.csv": "one line a reply",
    "rounds.log": "what each exchange found out, durable; a run that goes on rebuilds its tables from it",
    "client_evaluations.csv": "one line an evaluation and client",
    "partition.csv": "who holds what, with partition.png",
    "federation.png": "losses by round, bytes and seconds, and where the seconds went",
    "loss.png": "the losses as a picture",
    "journal.zofed": "every step as seeds and integers; base weights + journal = final weights",
    "model": "the trained model: a Hugging Face folder, which --model takes too",
    "checkpoints": "the newest states, to resume from",
    "updates": "gradients and guides, for the replay",
    "settings.toml": "all settings",
}
