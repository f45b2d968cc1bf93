"""`zofed tune`: the best value of a setting, found by as many runs as it takes."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from zofed import config
from zofed.base import shell
from zofed.base.errors import UserError
from zofed.commands import experiments
from zofed.commands.console import console, figure
from zofed.commands.options import SettingsCommand, with_settings
from zofed.config import SETTINGS, Settings
from zofed.experiments import sweep_walk


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("tune", cls=SettingsCommand)(with_settings(tune))


def tune(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    over: Annotated[str, typer.Option(help="setting to tune, one that is a number")] = "learning-rate",
    factor: Annotated[float, typer.Option(help="ratio of one value to the next")] = sweep_walk.FACTOR,
    most: Annotated[int, typer.Option(help="values to try at most")] = sweep_walk.MOST,
    parallel: experiments.Parallel = None,
    gpus_per_run: experiments.GpusPerRun = 0.0,
    engine: experiments.Engine = "fork",
    slurm: experiments.Slurm = None,
    *,
    options: dict[str, str],
) -> None:
    """Find a setting's best value: runs at the one given, at its neighbours, then on to where the held-out loss falls.

    Each run is whole, so that schedules mean what they will mean. With --clients the runs are federations. The folder
    is a sweep's: zofed report and zofed plot sweep read it, zofed sweep goes on with it.
    """
    from zofed.experiments import sweep_file

    settings = config.asked_for(file, options, _way(file, options))
    if over not in SETTINGS:
        raise UserError(f"--over: {config.unknown_setting(over)}")
    if over in ("seed", "out") or SETTINGS[over].annotation not in (int, float):
        raise UserError(f"--over {over}: it is no number to tune; name another setting, as learning-rate")
    if idle := config.without_effect(settings, [over], _way(file, options)):
        raise UserError(f"--over {over}: {idle[0]}")
    own = settings.model_dump(by_alias=True)
    if (start := own[over]) <= 0:
        raise UserError(f"--over {over}: it is {start:g}, and a search begins above 0: give --{over} a first value")
    # Also what was given as it would have been chosen, since at other values of `over` another would be.
    given = {*config.changed(settings), *map(config.kebab, settings.model_fields_set)} - {over, "seed", "out"}
    base = {key: value for key, value in own.items() if key in given}
    walk = {"around": start, "factor": factor, "most": most}
    asked = {"slurm": sbatch} if (sbatch := experiments.slurm_of(engine, slurm)) else {}
    wanted = sweep_file.of({"seeds": [settings.seed], "base": base, "tune": {over: walk}} | asked)
    from zofed.runs.run_folder import with_out

    path = Path(with_out(settings, "tune").out)
    runner = experiments.carry_out(wanted, path, engine, parallel, gpus_per_run)
    _tell(runner, over)
    typed = [word for key, value in options.items() if key not in (over, "out") for word in (f"--{key}", value)]
    chosen = [f"--{over}", f"{_chosen(runner)[over]:g}"]
    words = [*([file] if file else []), *typed, *chosen]
    console.print(f"next: {shell.command('zofed', _command(settings), *words)}", markup=False)


def _way(file: Path | None, options: dict[str, str]) -> str:
    """How the runs will run: as a federation where clients are given."""
    in_file = config.read_own_toml(file).get("clients", 0) if file else 0
    return config.FEDERATED if str(options.get("clients", in_file)) != "0" else config.CENTRAL


def _command(settings: Settings) -> str:
    return "simulate" if settings.clients else "train"


def _chosen(runner: "experiments.Runner") -> dict[str, Any]:
    chosen = runner.sweep.chosen(runner.sweep.arms[0], runner.losses)
    assert chosen is not None, "where nothing trains, carry_out has told so and ended"
    return chosen


def _tell(runner: "experiments.Runner", over: str) -> None:
    """The values that were tried, what each came to, and the best."""
    from zofed.runs import run_result

    sweep, folder = runner.sweep, runner.folder
    tried = sweep.tried(sweep.arms[0], runner.losses)
    results = {
        own[over]: run_result.read(folder.run_path(sweep.run(sweep.arms[0], own, sweep.seeds[0]))) for own in tried
    }
    metric = next((result.metric for result in results.values() if result.metric in result.summary), "")
    table = Table(over, "held-out loss", *([metric] if metric else []), box=None, pad_edge=False)
    for value, result in results.items():
        shown = [f"{value:g}", "diverged" if result.has_diverged else figure(result.summary["eval_loss_end"])]
        shown += [figure(result.summary[metric])] if metric and metric in result.summary else []
        table.add_row(*map(Text, shown))
    console.print(table)
    best = _chosen(runner)[over]
    console.print(f"best: {over} = {best:g}, the run {results[best].path}", markup=False)
    if best in (min(results), max(results)):
        console.print(f"it lies at an end of what was tried: --{over} {best:g} begins there", markup=False)
