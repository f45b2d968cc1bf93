"""Commands of experiments: `zofed sweep`, `zofed plot`, `zofed report`, `zofed runs`."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from zofed import config
from zofed.base import log, shell
from zofed.base.errors import Interrupted, UserError
from zofed.base.texts import duration
from zofed.commands.console import AsJson, brief, console, figure, print_json, print_table
from zofed.commands.groups import CommandGroup
from zofed.commands.options import SettingsCommand, with_settings
from zofed.experiments import slurm_options, sweep_engine

if TYPE_CHECKING:
    from zofed.experiments.sweep import Sweep
    from zofed.experiments.sweep_runner import Board, Runner


plot_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="Pictures of runs and sweeps, read back from their folders."
)

Out = Annotated[Path | None, typer.Option(help="PNG file to write; empty: beside what is drawn")]
Folder = Annotated[Path, typer.Argument(help="folder of a sweep, or one that holds folders of runs")]
Engine = Annotated[
    sweep_engine.Name,
    typer.Option(help="what carries the runs out: fork: this machine; ray: the cluster at RAY_ADDRESS; slurm: sbatch"),
]
Parallel = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="runs at a time, each in a process of its own [1; ray: what fits; slurm: all]",
        show_default=False,
    ),
]
GpusPerRun = Annotated[
    float, typer.Option(min=0, max=1, help="share of a GPU for each run: as many at a time as the GPUs hold")
]
Slurm = Annotated[
    list[str] | None,
    typer.Option(help="KEY=VALUE, or KEY: an option of sbatch, as partition=gpu; may be repeated (--engine slurm)"),
]
RunPath = Annotated[Path, typer.Argument(help="folder of a run")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("sweep", cls=SettingsCommand)(with_settings(sweep))
    app.add_typer(plot_app, name="plot")
    app.command("report")(report)
    app.command("runs")(runs)


def sweep(
    file: Annotated[str, typer.Argument(help="TOML file of a sweep, or the name of a shipped experiment")],
    scale: Annotated[str, typer.Option(help="which of the file's scales, as laptop or paper; empty: its first")] = "",
    parallel: Parallel = None,
    gpus_per_run: GpusPerRun = 0.0,
    engine: Engine = "fork",
    slurm: Slurm = None,
    with_controls: Annotated[
        bool,
        typer.Option(
            "--with-controls", help="frozen weights and random slopes for all, guide-only and line of instruct"
        ),
    ] = False,
    data: Annotated[list[str] | None, typer.Option(help="NAME=PATH: read PATH for a data set the file names")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the runs and what they will cost, run none")] = False,
    *,
    options: dict[str, str],
) -> None:
    """Carry out many runs: what is finished is skipped, what was cut goes on, what fails is told and stops no other.

    Settings typed as options override the file's base. Start it again, after Ctrl-C or kill -9, and it goes on.
    """
    from zofed.experiments import sweep_file

    path = sweep_file.find(file)
    out = options.pop("out", "")
    own = slurm_of(engine, slurm)
    wanted = sweep_file.read(path, scale, options, data or [], with_controls=with_controls, slurm=own)
    if idle := wanted.without_effect(options):
        raise UserError("; ".join(idle))
    if idle := wanted.without_effect(key for key in wanted.base if key not in options):
        warnings.warn(f"{path}: {'; '.join(idle)}", stacklevel=2)
    folder_path = config.absolute(out or f"runs/{path.stem}{'-' + scale if scale else ''}", "out")
    if dry_run:
        from zofed.experiments import sweep_cost  # torch and transformers take seconds to load

        with sweep_engine.opened(engine, parallel, gpus_per_run, wanted.slurm) as chosen:
            for line in sweep_cost.estimate(wanted, chosen.places(wanted.first())):
                console.print(line, markup=False)
            for line in chosen.requests(wanted.first()):
                console.print(line, markup=False)
        return
    carry_out(wanted, folder_path, engine, parallel, gpus_per_run)


def slurm_of(engine: sweep_engine.Name, pairs: list[str] | None) -> dict[str, Any]:
    """Options of sbatch from those typed. Raises UserError for what is none, and where no job is asked of Slurm."""
    if pairs and engine != "slurm":
        raise UserError(f"--slurm {pairs[0]}: it is for --engine slurm, and this is --engine {engine}")
    return slurm_options.typed(pairs or [])


def carry_out(
    wanted: "Sweep", path: Path, engine: sweep_engine.Name, parallel: int | None, gpus_per_run: float
) -> "Runner":
    """Begin a sweep in the folder, or go on with it; raises `typer.Exit` at its end where a run failed."""
    from zofed.experiments import sweep_cost, sweep_file
    from zofed.experiments.sweep_folder import SweepFolder
    from zofed.experiments.sweep_runner import Runner

    folder = SweepFolder(path)
    with sweep_engine.opened(engine, parallel, gpus_per_run, wanted.slurm) as chosen, folder.opened():
        wanted = folder.begin(wanted)
        at_a_time = chosen.places(wanted.first())
        console.print(f"sweep: {folder.path}: {wanted.size}, {at_a_time} at a time", markup=False)
        if engine == "fork" and (warning := sweep_cost.too_much(wanted, at_a_time)):
            console.print(f"zofed: warning: {warning}", markup=False)
        try:
            with Watching() as watching:
                runner = Runner(wanted, folder, chosen, watching)
                board = runner.run()
        except KeyboardInterrupt:
            again = ["zofed", "sweep", folder.path / sweep_file.COPY, "--out", folder.path]
            again += [] if engine == "fork" else ["--engine", engine]
            raise Interrupted(f"continue with: {shell.command(*again)}") from None
    _tell_outcome(runner, board)
    if board.failed or runner.untuned:
        raise typer.Exit(1)
    return runner


def _tell_outcome(runner: "Runner", board: "Board") -> None:
    """Say how the runs of a sweep ended, and where their results lie."""
    console.print(f"{board.complete} runs complete, {board.complete_before} of them before; {len(board.failed)} failed")
    if board.diverged:
        console.print(f"{len(board.diverged)} diverged while tuning: {', '.join(board.diverged)}", markup=False)
    for name in runner.untuned:
        console.print(
            f"no value that was tried for {name or 'the runs'} trains: its other seeds did not run", markup=False
        )
    for run in board.failed:
        console.print(f"  {run.name}: {run.error}", markup=False)
    if (median := runner.overhead) is not None:
        console.print(f"from a run's start to its first step {median:.2f} s (median of {len(runner.first_steps)})")
    path = runner.folder.path
    console.print(f"results in {path / 'summary.csv'}; next: {shell.command('zofed', 'report', path)}", markup=False)


class Watching:
    """Shows a sweep's board as it changes: a table on a terminal, else a line for each run that ends."""

    def __init__(self) -> None:
        self.live = Live(console=console, transient=True) if console.is_terminal and log.shows_progress() else None
        self.told = 0

    def __enter__(self) -> "Watching":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, board: "Board") -> None:
        left = f", about {duration(board.left)} left" if board.left else ""
        if self.live:
            table = Table("run", "step", "of", "seconds", box=None, pad_edge=False)
            for run in board.running:
                table.add_row(run.name, str(run.step), str(run.steps), f"{run.seconds:.0f}")
            counts = f"{board.over} of {board.most} runs over, {len(board.failed)} failed{left}"
            self.live.update(Group(table, counts))
            return
        for at, run in enumerate(board.ended[self.told :], board.skipped + self.told + 1):
            how = f"held-out {run.loss:.4f}" if math.isfinite(run.loss) else "diverged"
            how = f"failed: {run.error}" if run.error else f"{how}, {run.seconds:.1f} s"
            log.tell(f"[{at}/{board.most}] {run.name}: {how}{left}")
        self.told = len(board.ended)


def report(
    folder: Folder,
    points: Annotated[int, typer.Option(min=0, help="steps at which slopes are set against backpropagation")] = 0,
) -> None:
    """One HTML page and a summary.md: what won, by how much, how surely; pictures, controls, costs, environment."""
    from zofed.experiments.report import write_report

    page, summary = write_report(folder, points)
    for line in summary.read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            console.print(line, markup=False)
    console.print(f"wrote {page} and {summary}", markup=False)


def runs(
    folder: Annotated[Path, typer.Argument(help="folder that holds runs, at any depth down to a sweep's")] = Path(
        "runs"
    ),
    as_json: AsJson = False,
) -> None:
    """The runs in a folder: mode, model, data, how far they came, what they scored and sent."""
    from zofed.experiments import listing

    found = listing.listed(folder)
    if as_json:
        print_json(found)
        return
    metrics = {row["metric"] for row in found if row.get("metric")}
    table = Table(box=None, pad_edge=False)
    for name in ("run", "mode", "model", "data", "status"):
        table.add_column(name, min_width=9 if name == "status" else 6, no_wrap=True)
    for name in ("steps", "held-out", metrics.pop() if len(metrics) == 1 else "score", "MB"):
        table.add_column(name, justify="right", min_width=min(6, max(5, len(name))), no_wrap=True)
    for row in found:
        if "error" in row:
            continue
        texts = [Text(brief(str(row[name]))) for name in ("run", "mode", "model", "data", "status")]
        losses = ["" if row[name] is None else figure(row[name]) for name in ("held_out", "score")]
        sent = f"{row['bytes'] / 1e6:,.3g}" if row["bytes"] else ""
        table.add_row(*texts, "" if row["steps"] is None else str(row["steps"]), *losses, sent)
    print_table(table)
    for row in found:
        if "error" in row:
            console.print(f"{row['run']} cannot be read: {row['error']}", markup=False)


@plot_app.command("quick")
def plot_quick(run: RunPath, out: Out = None) -> None:
    """One run: losses, rate, spread of the slopes."""
    from zofed.experiments import plot_run
    from zofed.runs import run_result

    console.print(f"wrote {plot_run.quick(run_result.read(run), _png(out, run, 'quick'))}", markup=False)


@plot_app.command("compare")
def plot_compare(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs, or of sweeps")],
    axis: Annotated[
        list[str] | None, typer.Option(help="step, forward-equivalents, seconds, tokens or bytes; may be repeated")
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG file to write")] = Path("compare.png"),
) -> None:
    """Runs beside each other: training and held-out losses against what they cost, with bands over seeds."""
    from zofed.experiments import arms, plot_arms
    from zofed.runs import plot_style

    for name in axis or []:
        if name not in plot_style.AXES:
            raise UserError(config.unknown(name, list(plot_style.AXES), "axis"))
    found, notes = arms.collect(folders)
    _told(plot_arms.compare(arms.grouped(found), axis or [], out.absolute(), notes), notes)


@plot_app.command("scores")
def plot_scores(
    folders: Annotated[list[Path], typer.Argument(help="folders of runs, or of sweeps")],
    axis: Annotated[
        str, typer.Option(help="step, forward-equivalents, seconds, tokens or bytes; empty: bytes of federations")
    ] = "",
    metric: Annotated[
        str, typer.Option(help="accuracy, auc, f1, rouge_l ...; empty: the one the task is ranked by")
    ] = "",
    out: Annotated[Path, typer.Option(help="PNG file to write")] = Path("scores.png"),
) -> None:
    """What runs scored at each evaluation against what it cost, beside what the untouched model scores."""
    from zofed.experiments import arms, plot_scores
    from zofed.runs import plot_style

    if axis and axis not in plot_style.AXES:
        raise UserError(config.unknown(axis, list(plot_style.AXES), "axis"))
    found, notes = arms.collect(folders)
    sends = any(result.total("bytes") > 0 for result in found)
    axis = axis or ("bytes" if sends else "forward-equivalents")
    _told(plot_scores.scores(arms.grouped(found), axis, out.absolute(), notes, metric), notes)


@plot_app.command("sweep")
def plot_sweep(folder: Folder, out: Out = None) -> None:
    """Heat maps of the end loss over the settings that vary, and the best at each value."""
    from zofed.experiments import arms, plot_sweep

    found, notes = arms.collect([folder])
    _told(plot_sweep.sweep(found, _png(out, folder, "sweep"), notes), notes)


@plot_app.command("zo")
def plot_zo(
    folder: Folder,
    points: Annotated[int, typer.Option(min=0, help="steps at which slopes are set against backpropagation")] = 5,
    out: Out = None,
) -> None:
    """Zeroth order: loss by queries, epsilon, batch size and optimizer; cosine and signal to noise over time."""
    from zofed.experiments import arms, plot_sweep

    found, notes = arms.collect([folder])
    _told(plot_sweep.zo(found, _png(out, folder, "zo"), points, notes), notes)


@plot_app.command("fo-vs-zo")
def plot_fo_vs_zo(folder: Folder, out: Out = None) -> None:
    """First order beside zeroth order and the other modes: loss against cost, end losses, memory."""
    from zofed.experiments import arms, plot_arms

    found, notes = arms.collect([folder])
    _told(plot_arms.fo_vs_zo(arms.grouped(found), _png(out, folder, "fo-vs-zo"), notes), notes)


@plot_app.command("federated")
def plot_federated(run: RunPath, out: Out = None) -> None:
    """One federated run: who took part, what was refused, bytes, each client's loss."""
    from zofed.experiments import plot_run
    from zofed.runs import run_result

    console.print(f"wrote {plot_run.federated(run_result.read(run), _png(out, run, 'federated'))}", markup=False)


def _png(out: Path | None, folder: Path, name: str) -> Path:
    return (out or folder / f"{name}.png").absolute()


def _told(path: Path, notes: list[str]) -> None:
    for note in notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"wrote {path}", markup=False)
