"""The command line: `zofed --help` lists the commands."""

import errno
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import click
import typer
import typer.core
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zofed import (
    __version__,
    config,
    deployment_commands,
    experiment_commands,
    model_commands,
    proxies,
    runs,
    shell,
    streams,
)
from zofed.config import SETTINGS, Settings
from zofed.data_commands import app as data_app
from zofed.errors import UserError
from zofed.keys_commands import app as keys_app
from zofed.metrics import Coverage
from zofed.options import Interrupted, brief, console, figure, settings_from, with_settings
from zofed.runs import Row, RunFolder, timestamp

typer.core.HAS_RICH = False  # else plain help shows what hides brackets from rich: a backslash before each
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)
journal_app = typer.Typer(no_args_is_help=True, help="Read, check and replay the journal of a run.")
app.add_typer(journal_app, name="journal")
model_commands.register(app)
deployment_commands.register(app)
experiment_commands.register(app)
app.add_typer(data_app, name="data")
app.add_typer(keys_app, name="keys")

QUICKSTART_ROUNDS = 150
# What to do where the operating system refuses, besides choosing another place.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another place, then go on"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose another place, or have its owner let you, then go on"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "close some files or raise the limit (ulimit -n), then go on",
}


class Reporter:
    """Shows rows of a run's metrics: a bar on a terminal, else one plain line for every evaluation."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.held_out = ""
        self.progress: Progress | None = None

    def __enter__(self) -> "Reporter":
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.progress = Progress(*columns, console=console)
            self.progress.start()
            self.bar = self.progress.add_task(self.what, total=self.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def expect(self, total: int) -> None:
        """Count up to this many from now on."""
        self.total = total
        if self.progress:
            self.progress.update(self.bar, total=total)

    def __call__(self, row: Row) -> None:
        evaluated = row.get("eval_loss") is not None
        if evaluated:
            self.held_out = f"held-out {row['eval_loss']:.4f}"
        loss = f"loss {row['loss']:.4f}" if row.get("loss") is not None else ""
        if self.progress:
            self.progress.update(self.bar, completed=row["step"], description=f"{loss} {self.held_out}".strip())
        elif evaluated:
            print(
                f"{self.what} {row['step']}/{self.total}  {loss}  {self.held_out}  {row['seconds']:.1f} s", flush=True
            )


@app.command()
@with_settings
def train(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="continue the run in this folder instead")] = None,
    *,
    options: dict[str, str],
) -> None:
    """Train on this machine alone: by forward passes (zo), backpropagation (fo), or both (see --mode)."""
    if resume is not None and (file or options):
        raise UserError(f"--resume {resume} goes on with the run's own settings: give no others")
    if resume is not None:
        folder = RunFolder.open(resume)
        folder.check_way(runs.CENTRAL)
        settings, out = folder.settings(), folder.path
    else:
        settings = settings_from(file, options, config.CENTRAL)
        settings = with_out(settings, settings.mode)
        out = Path(settings.out)
    from zofed import central  # torch and transformers take seconds to load: --help and mistakes need not wait

    console.print(f"run folder: {out}")
    try:
        with Reporter(settings.steps, "step") as reporter:
            summary = (
                central.resume(out, reporter, reporter.expect)
                if resume
                else central.train(settings, out, reporter, reporter.expect)
            )
    except KeyboardInterrupt:
        raise Interrupted(how_to_go_on(out)) from None
    tell_end(RunFolder.open(out), summary, "zofed", "train")


@app.command()
@with_settings
def simulate(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="continue the run in this folder instead")] = None,
    *,
    options: dict[str, str],
) -> None:
    """Run a federation in this one process, without Ray or a SuperLink: the same apps, the same results."""
    if resume is not None and (file or options):
        raise UserError(f"--resume {resume} goes on with the run's own settings: give no others")
    if resume is not None:
        folder = RunFolder.open(resume)
        folder.check_way(runs.SIMULATED)
        settings, nodes = folder.settings().model_copy(update={"out": str(folder.path)}), folder.nodes
    else:
        settings = with_out(settings_from(file, options, config.FEDERATED), "simulated")
        nodes = 0
    if not settings.clients:  # there are as many nodes as are made here
        settings = settings.model_copy(update={"clients": nodes or 2})
    from zofed import client, server
    from zofed.grid import LocalGrid

    grid = LocalGrid(client.app, nodes or settings.clients, settings.model_dump(by_alias=True))
    try:
        summary = server.run(grid, settings, "")
    except KeyboardInterrupt:
        raise Interrupted(how_to_go_on(Path(settings.out))) from None
    tell_end(RunFolder.open(Path(settings.out)), summary, "zofed", "simulate")


def how_to_go_on(out: Path) -> str:
    """What to do after an interruption: nothing stands in a folder that has no journal yet."""
    folder = RunFolder(out)
    return f"continue with: {folder.go_on()}" if folder.journal.exists() else "nothing was trained yet: start it again"


def with_out(settings: Settings, name: str) -> Settings:
    """The settings with an absolute output folder: the one asked for, or a new one under ./runs."""
    out = config.absolute(settings.out or f"runs/{name}-{timestamp().replace(':', '')}", "out")
    return settings.model_copy(update={"out": str(out)})


def tell_end(folder: RunFolder, summary: dict[str, Any], *command: str) -> None:
    """The numbers that matter, where the results lie, and what to do next.

    command: what runs settings in the way of this run, before the file that holds them.
    """
    table = Table("", "held-out loss (nats)", box=None, pad_edge=False)
    end = summary["eval_loss_end"]
    table.add_row("start", f"{summary['eval_loss_start']:.4f}")
    table.add_row("end", f"{end:.4f}")
    for name, loss in summary["baselines"].items():
        if not name.endswith("accuracy"):
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
    if "accuracy" in summary:
        majority = summary["baselines"]["majority_accuracy"]
        console.print(
            f"accuracy {summary['accuracy']:.4f} (always the most frequent label: {majority:.4f}), "
            f"F1 {summary['f1']:.4f}"
        )
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


CONTENTS = {
    "summary.json": "losses, baselines, cost, digests, versions",
    "metrics.csv": "one line a step",
    "evaluations.csv": "one line an evaluation and source",
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


@journal_app.command("show")
def journal_show(
    folder: Annotated[Path, typer.Argument(help="folder of a run")],
    last: Annotated[int, typer.Option(min=0, help="show only this many of the newest records; 0: all")] = 20,
) -> None:
    """A table of the records: round, kind, rate, clients, queries, size of the slopes."""
    from zofed import journal
    from zofed.records import Dense, Guided, Seeded, Skipped

    contents = journal.read(RunFolder.open(folder).journal)
    table = Table("round", "kind", "rate", "clients", "queries", "slope rms", "bytes", "chain", box=None)
    for entry in contents.entries[-last:] if last else contents.entries:
        record, end = entry.record, (str(len(entry.raw)), entry.chain.hex()[:12])
        if isinstance(record, Seeded):
            scale = 2.0**record.exponent
            rms = (sum((c * scale) ** 2 for c in record.coefficients) / len(record.coefficients)) ** 0.5
            clients = str(len(record.clients))
            table.add_row(
                str(record.round), "seeded", f"{record.rate:g}", clients, str(record.queries), f"{rms:.4g}", *end
            )
        else:
            kind = {Dense: "dense", Guided: "guided"}.get(type(record), "skipped")
            rate = "" if isinstance(record, Skipped) else f"{record.rate:g}"
            table.add_row(str(record.round), kind, rate, "", "", "", *end)
    console.print(table)
    console.print(f"{len(contents.entries)} records, {contents.end} bytes, head {contents.head.hex()}")


@journal_app.command("verify")
def journal_verify(folder: Annotated[Path, typer.Argument(help="folder of a run")]) -> None:
    """Check every checksum, the chain, and that the journal is the one the run's summary names."""
    from zofed import journal

    run = RunFolder.open(folder)
    contents = journal.read(run.journal)
    if contents.torn:
        last = contents.entries[-1].record.round if contents.entries else 0
        remedy = f"{run.go_on()} cuts them off and goes on"
        raise UserError(f"journal {run.journal} ends in {contents.torn} torn bytes after round {last}: {remedy}")
    head = run.summary().get("journal_head")
    if head and head != contents.head.hex():
        raise UserError(
            f"journal {run.journal} is whole, but its head {contents.head.hex()} is not the one of the finished run, "
            f"{head}: it was cut or exchanged; restore it from a copy"
        )
    told = "as in summary.json" if head else "the run has no summary yet to compare it with"
    console.print(f"{len(contents.entries)} records whole, chain unbroken, head {contents.head.hex()}: {told}")


@journal_app.command("replay")
def journal_replay(
    folder: Annotated[Path, typer.Argument(help="folder of a run")],
    base: Annotated[str, typer.Option(help="where the saved model the run began with lies now")] = "",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the weights do not depend on them")] = 1,
) -> None:
    """Rebuild the weights from the base and the journal alone, and compare them with the run's."""
    from zofed.finish import replay_run

    run = RunFolder.open(folder)
    worker, start = replay_run(run, base, threads)
    if start:
        console.print(
            f"rounds 1 to {start} hold first-order steps whose gradients are not kept whole, which a journal cannot "
            "rebuild: started from their checkpoint"
        )
    digest, expected = worker.digest(), run.summary().get("digest")
    console.print(f"rounds {start + 1} to {worker.round} replayed" if worker.round > start else "no rounds to replay")
    console.print(f"weights SHA-256 {digest}")
    if expected is None:
        console.print("the run has not ended: no digest to compare with")
    elif digest == expected:
        console.print("equal to the run's weights")
    else:
        raise UserError(
            f"the run's weights are {expected}, the journal gives others: it was cut or exchanged; "
            "zofed journal verify tells more, restore it from a copy"
        )


@app.command("eval")
@with_settings
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a run, or of a saved model")],
    best: Annotated[bool, typer.Option("--best", help="a run's weights at its lowest held-out loss")] = False,
    *,
    options: dict[str, str],
) -> None:
    """Score a run's model, or any saved one, on held-out text or labels, or on all of the data that --dataset names."""
    from zofed import scoring

    if (folder / "settings.toml").exists():
        found = scoring.score_run(folder, options, best=best)
    elif best:
        raise UserError(f"{folder} is not the folder of a run: --best goes with one")
    else:
        found = scoring.score(folder, options)
    console.print(f"{found.data}: {found.scores.coverage}", markup=False)
    if found.note:
        console.print(f"note: {found.note}", markup=False)
    measures = list(found.scores.whole.columns())
    table = Table(*measures, box=None)
    table.add_row(*_shown(found.scores.whole.columns(), measures))
    console.print(table)
    if found.scores.sources:
        table = Table("source", *measures, box=None)
        for source, own in found.scores.sources.items():
            table.add_row(Text(brief(source)), *_shown(own.columns(), measures))
        console.print(table)


def _shown(scores: Mapping[str, float], measures: Sequence[str]) -> list[str]:
    """Scores in digits, in the order of `measures`; one that is no finite number is told as such."""
    return [figure(scores[name]) if name in scores else "not finite" for name in measures]


@app.command()
@with_settings
def diagnose(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    batches: Annotated[int, typer.Option(min=2, help="batches that tell signal from noise")] = 8,
    *,
    options: dict[str, str],
) -> None:
    """Compare a model's slopes with backpropagation: which epsilon, how noisy a batch, how good the estimate."""
    from zofed.central import diagnosis

    found = diagnosis(settings_from(file, options), batches)
    console.print(f"parameters that train       {found.parameters:,}")
    console.print(f"slopes, root mean square    {found.slope:.4g}")
    console.print(f"signal to noise of a batch  {found.signal_to_noise:.3g}")
    console.print(f"cosine with the gradient    {found.cosine:.4g} (chance gives {found.expected_cosine:.4g})")
    table = Table("epsilon", "error of the slopes", "rounding, at most about", box=None)
    for epsilon, error, rounding in found.errors:
        table.add_row(f"{epsilon:g}", f"{error:.2%}", f"{rounding:.2%}")
    console.print(table)
    console.print(f"nearest to the exact slopes: epsilon = {found.best_epsilon:g}")


@app.command("memory")
@with_settings
def show_memory(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    budget: Annotated[int, typer.Option(min=1, help="MiB that a forward pass may take beside the weights")] = 1024,
    *,
    options: dict[str, str],
) -> None:
    """Memory of a zeroth-order step, and the largest copies-per-pass that fits a budget."""
    from zofed.central import memory_of_passes

    found = memory_of_passes(settings_from(file, options), budget * 2**20)
    console.print(f"weights                 {found.weights / 2**20:10,.1f} MiB")
    console.print(f"a pass of one copy      {found.one / 2**20:10,.1f} MiB more")
    if not found.is_batched:
        console.print(
            "each direction is written into the weights: the pass above counts a second copy of what trains, and "
            "copies-per-pass changes nothing"
        )
        return
    console.print(f"each further copy       {found.further / 2**20:10,.1f} MiB more")
    console.print(f"in {budget:,} MiB: copies-per-pass = {found.proposed}")


@app.command("make-data")
def make_data(out: Annotated[Path, typer.Argument(help="folder that gets tokenizer/ and datasets_subset/")]) -> None:
    """Generate the tokenizer and the data that ship with zofed, the same bytes every time."""
    from zofed.generate import make_shipped_files

    for path in make_shipped_files(out):
        console.print(str(path))


@app.command("settings")
def show_settings() -> None:
    """Print every setting with its default: a TOML file to start from."""
    print(config.documented_toml(), end="")


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="folder of the run; an earlier one is moved aside")] = Path(
        "runs/quickstart"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="rounds of training")] = QUICKSTART_ROUNDS,
) -> None:
    """Train with 4 simulated clients through `flwr run` on the text that ships with zofed, in minutes."""
    from zofed import launch

    status = launch.quickstart(rounds, out, {"clients": 4, "controls": True, "device": "cpu", "learning-rate": 0.05})
    if status == 0:
        folder = RunFolder.open(out)
        tell_end(folder, folder.summary(), "zofed", "simulate")
    raise typer.Exit(status)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


def main() -> None:
    """Run a command: status 2 and one line for a mistake, 130 after an interruption, never a traceback for either."""
    streams.prepare()
    warnings.showwarning = lambda message, *_: print(f"zofed: warning: {message}", file=sys.stderr)
    os.environ.update(proxies.exempt(os.environ))  # before httpx or a process of Flower's reads them
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a supervisor's stop ends a run as Ctrl-C does
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        message, status = str(error), 2
    except click.NoSuchOption as error:
        known = [*(f"--{key}" for key in SETTINGS), "--resume", "--help"]
        message, status = config.unknown(error.option_name, known, "option"), 2
    except click.ClickException as error:
        message, status = f"{error.format_message()} See zofed --help", 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and streams.reader_has_gone():  # as in zofed settings | head -1
            streams.give_up()
            sys.exit(streams.READER_GONE)
        place = f" {str(error.filename)[: config.LONGEST_SHOWN]}" if error.filename else ""
        remedy = REMEDIES.get(error.errno or 0, "choose another place, then go on")
        message, status = f"cannot write or read{place}: {error.strerror or error}; {remedy}", 2
    except SystemExit:
        if not streams.reader_has_gone():  # click's answer to that
            raise
        streams.give_up()
        sys.exit(streams.READER_GONE)
    except Interrupted as error:
        message, status = f"interrupted; {error}", 130
    except click.Abort:  # what click makes of Ctrl-C
        message, status = "interrupted", 130
    else:
        sys.exit(status)
    try:
        sys.stdout.flush()
    except OSError:
        streams.give_up()
    with suppress(OSError):  # nobody reads standard error either
        print("zofed: " + " ".join(message.splitlines()), file=sys.stderr, flush=True)
    sys.exit(status)
