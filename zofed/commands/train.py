"""Commands that train and score: `zofed train`, `simulate` and `eval`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from zofed import config
from zofed.base import torchrun
from zofed.base.errors import UserError
from zofed.commands.console import AsJson, Reporter, brief, console, figure, print_json, tell_end
from zofed.commands.groups import interruptible
from zofed.commands.options import (
    CentralCommand,
    FederatedCommand,
    SettingsCommand,
    resumed,
    with_settings,
)
from zofed.runs import run_folder
from zofed.runs.run_folder import RunFolder, with_out


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("train", cls=CentralCommand)(with_settings(train))
    app.command("simulate", cls=FederatedCommand)(with_settings(simulate))
    app.command("eval", cls=SettingsCommand)(with_settings(evaluate))


def train(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="continue the run in this folder instead")] = None,
    *,
    options: dict[str, str],
) -> None:
    """Train on this machine alone: by forward passes (zo), backpropagation (fo), or both (see --mode)."""
    if folder := resumed(resume, file, options, run_folder.CENTRAL):
        settings, out = folder.settings(), folder.path
    else:
        settings = config.asked_for(file, options, config.CENTRAL)
        settings = with_out(settings, "")
        out = Path(settings.out)
    with interruptible(RunFolder(out).after_interruption):
        # torch and transformers take seconds to load: --help and mistakes need not wait
        from zofed.training import central, device_pool, ranks

        if torchrun.place().rank:
            try:
                device_pool.serve_rank(settings)
            except KeyboardInterrupt:  # the first process tells how to go on
                sys.exit(130)
            return
        console.print(f"run folder: {out}")
        with ranks.released(), Reporter(settings.steps, "step") as reporter:
            summary = (
                central.resume(out, reporter, reporter.expect)
                if folder
                else central.train(settings, out, reporter, reporter.expect)
            )
    tell_end(RunFolder.open(out), summary, "zofed", "train")


def simulate(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="continue the run in this folder instead")] = None,
    *,
    options: dict[str, str],
) -> None:
    """Run a federation in this one process, without Ray or a SuperLink: the same apps, the same results."""
    if folder := resumed(resume, file, options, run_folder.SIMULATED):
        settings, nodes = folder.settings().model_copy(update={"out": str(folder.path)}), folder.nodes
    else:
        settings = with_out(config.asked_for(file, options, config.FEDERATED), "simulated")
        nodes = 0
    out = Path(settings.out)
    with interruptible(RunFolder(out).after_interruption):
        from zofed.federated import simulation

        summary = simulation.simulate(settings, nodes)
    tell_end(RunFolder.open(out), summary, "zofed", "simulate")


def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a run, or of a saved model")],
    best: Annotated[bool, typer.Option("--best", help="a run's weights at its lowest held-out loss")] = False,
    as_json: AsJson = False,
    *,
    options: dict[str, str],
) -> None:
    """Score a run's model, or any saved one, on held-out text or labels, or on all of the data that --dataset names."""
    run_folder.check_is_one(folder)
    from zofed.training import scoring

    if (folder / "settings.toml").exists():
        found = scoring.score_run(folder, options, best=best)
    elif best:
        raise UserError(f"{folder} is not the folder of a run: --best goes with one")
    else:
        found = scoring.score(folder, options)
    if as_json:
        sources = {source: own.columns() for source, own in found.scores.sources.items()}
        own = {"data": found.data, "held_out": str(found.scores.coverage), "note": found.note}
        print_json(own | {"scores": found.scores.whole.columns(), "sources": sources})
        return
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
