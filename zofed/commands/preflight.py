"""Commands that look before a run: `zofed models`, `check`, `diagnose`, `memory` and `settings`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zofed import config
from zofed.base import shell
from zofed.base.errors import UserError
from zofed.commands.console import AsJson, console, print_json
from zofed.commands.options import CentralCommand, SettingsCommand, SettingsGroup, with_settings

models_app = typer.Typer(
    cls=SettingsGroup, help="The models there are: parameters that train by scope, memory of a step by mode."
)
SettingsFile = Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(models_app, name="models")
    app.command("check", cls=SettingsCommand)(with_settings(check))
    app.command("diagnose", cls=CentralCommand)(with_settings(diagnose))
    app.command("memory", cls=CentralCommand)(with_settings(show_memory))
    app.command("settings")(show_settings)


@models_app.callback(invoke_without_command=True)
@with_settings
def list_models(
    context: typer.Context,
    fits: Annotated[
        float | None, typer.Option(help="GiB of a GPU: the largest models of --family whose step fits")
    ] = None,
    family: Annotated[str, typer.Option(help="llama (default), qwen2.5, opt or gpt2; with --fits")] = "",
    memory: Annotated[
        bool, typer.Option("--memory", help="of every named size; seconds each. With any setting given it is told too")
    ] = False,
    *,
    options: dict[str, str],
) -> None:
    """The named sizes, or the one given with --model: parameters by scope, and memory of a step by mode.

    Memory is predicted with --memory, or where settings are given, all of which count: --batch-size 8 --block-size 128
    --optimizer adamw tells what such a run takes.
    """
    if context.invoked_subcommand is not None:
        asked = [*options, *(["fits"] if fits is not None else []), *(["family"] if family else [])]
        asked += ["memory"] if memory else []
        if asked:
            raise UserError(f"--{asked[0]} is no option of zofed models {context.invoked_subcommand}: leave it out")
        return
    if fits is not None:
        _tell_fits(fits, family or "llama", options)
        return
    if family:
        raise UserError(f"--family {family} goes with --fits GiB, the memory of a GPU")
    from zofed.data import hub
    from zofed.models import sources
    from zofed.preflight import model_info
    from zofed.training.modes import MODES
    from zofed.training.paths import with_absolute_paths
    from zofed.training.process import prepare_process

    prepare_process(1)
    settings = config.asked_for(None, options)
    names = [settings.model] if "model" in options else list(sources.SIZES)
    infos = []
    for name in names:
        chosen = with_absolute_paths(settings.model_copy(update={"model": name}))
        infos.append((name, chosen, model_info.info(chosen, ())))
    parameters = Table("model", "positions", *model_info.SCOPES, box=None, pad_edge=False)
    for name, _, found in infos:
        counts = (f"{found.by_scope[scope]:,}" if scope in found.by_scope else "-" for scope in model_info.SCOPES)
        parameters.add_row(name, str(found.positions or "-"), *counts)
        if "model" in options:
            console.print(f"{found.architecture}, vocabulary {found.vocabulary}, tokenizer {found.tokenizer}")
            if found.revision:
                console.print(f"commit {found.revision}")
    console.print("parameters that train, by scope")
    console.print(parameters)
    if "model" not in options and (cached := hub.cached()):
        console.print(f"\nin the hub's cache: {', '.join(cached)}")
    if not (memory or options):
        console.print("\nmemory of a step, by mode: zofed models --memory, or with a run's settings, as --batch-size 8")
        return
    table = Table("model", "weights", *MODES, box=None, pad_edge=False)
    for name, chosen, _ in infos:
        with console.status(f"predicting {name} ..."):
            found = model_info.info(chosen, tuple(MODES))
        if found.memory:
            peaks = [found.memory[mode].peak for mode in MODES]
            weights = found.memory[next(iter(MODES))].weights
            table.add_row(name, *(f"{size / 2**20:,.0f}" for size in (weights, *peaks)))
        else:
            console.print(f"memory cannot be predicted for {name}: {found.unpredictable}", markup=False, soft_wrap=True)
    optimizer = settings.optimizer if "optimizer" in options else "each by its own optimizer"
    how = f"{settings.batch_size}x{settings.block_size} tokens, {optimizer}, scope {settings.scope}"
    console.print(f"\npredicted peak of a step in MiB, by mode ({how})")
    console.print(table)


def _tell_fits(gigabytes: float, family: str, options: dict[str, str]) -> None:
    """The largest model of a family that fits a GPU, by mode."""
    if not 0.1 <= gigabytes <= 1e6:
        raise UserError(f"--fits {gigabytes:g} is no memory of a GPU: give GiB, 0.1 to 1e6")
    if "model" in options:
        raise UserError("--fits asks which model of --family fits, and --model names one: leave one of them out")
    from zofed.preflight import families
    from zofed.training.modes import MODES
    from zofed.training.process import prepare_process

    prepare_process(1)
    settings = config.asked_for(None, options)
    modes = [settings.mode] if "mode" in options else list(MODES)
    with console.status("") as status:
        found = families.largest(
            settings, family, int(gigabytes * 2**30), modes, lambda what: status.update(f"predicting {what} ...")
        )
    table = Table("mode", "largest that fits", "GiB", "next", "GiB", box=None, pad_edge=False)
    for mode, fit in found.items():
        own = (fit.name, f"{fit.peak / 2**30:.1f}") if fit.name else ("none", "-")
        larger = (fit.larger, f"{fit.larger_peak / 2**30:.1f}") if fit.larger else ("-", "-")
        table.add_row(mode, *own, *larger)
    what = f"adapter {settings.adapter}" if settings.adapter != "none" else f"scope {settings.scope}"
    base = settings.dtype if settings.quantisation == "none" else f"{settings.quantisation}, the rest {settings.dtype}"
    console.print(
        f"{family} on {gigabytes:g} GiB: predicted peak of a step, {settings.batch_size}x{settings.block_size} tokens, "
        f"{base}, {what}, {settings.optimizer}; 1 GiB is left to CUDA",
        soft_wrap=True,
    )
    console.print(table)


@models_app.command("download")
def download(
    name: Annotated[str, typer.Argument(help="hub id, OWNER/NAME")],
    revision: Annotated[str, typer.Option(help="commit, branch or tag; empty: main")] = "",
) -> None:
    """Fetch a model of the Hugging Face hub into the local cache: safetensors, configs and tokenizer, nothing else."""
    from zofed.data import hub

    folder = hub.download(name, revision)
    console.print(f"{name} at commit {folder.name}")
    again = shell.command("zofed", "train", "--model", name, "--revision", folder.name)
    console.print(f"next: {again}", markup=False)


def check(
    file: SettingsFile = None,
    all_modes: Annotated[bool, typer.Option("--all-modes", help="take a step in every mode")] = False,
    *,
    options: dict[str, str],
) -> None:
    """Look at everything a run needs, in seconds and without writing a file: versions, data, model, memory, time."""
    settings = config.asked_for(file, options, None if all_modes else config.FEDERATED if "clients" in options else "")
    from zofed.preflight import check
    from zofed.training.modes import MODES

    faults = []
    for line in check.check(settings, tuple(MODES) if all_modes else (settings.mode,)):
        console.print(f"{line.verdict:5}{line.what:16}{line.told}", markup=False)
        faults += [line.what] if line.verdict == "fix" else []
    if faults:
        raise UserError(f"{len(faults)} to fix before this run, each told above with its remedy: {', '.join(faults)}")
    console.print(f"ready: zofed {'simulate' if settings.clients else 'train'} with the same settings")


def diagnose(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    batches: Annotated[int, typer.Option(min=2, help="batches that tell signal from noise")] = 8,
    as_json: AsJson = False,
    *,
    options: dict[str, str],
) -> None:
    """Compare a model's slopes with backpropagation: which epsilon, how noisy a batch, how good the estimate."""
    from zofed.training.central import diagnosis

    found = diagnosis(config.asked_for(file, options), batches)
    if as_json:
        columns = ("epsilon", "error", "rounding")
        errors = [dict(zip(columns, row, strict=True)) for row in found.errors]
        print_json(
            asdict(found) | {"errors": errors, "best_epsilon": found.best_epsilon, "random_cosine": found.random_cosine}
        )
        return
    console.print(f"parameters that train       {found.parameters:,}")
    console.print(f"slopes, root mean square    {found.slope:.4g}")
    console.print(f"signal to noise of a batch  {found.signal_to_noise:.3g}")
    console.print(f"cosine with the gradient    {found.cosine:.4g}")
    console.print(f"  as of exact slopes        {found.expected_cosine:.4g}")
    console.print(f"  as of chance              {found.random_cosine:.4g} (a direction without its slope)")
    table = Table("epsilon", "error of the slopes", "rounding, at most about", box=None)
    for epsilon, error, rounding in found.errors:
        table.add_row(f"{epsilon:g}", f"{error:.2%}", f"{rounding:.2%}")
    console.print(table)
    console.print(f"nearest to the exact slopes: epsilon = {found.best_epsilon:g}")


def show_memory(
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    budget: Annotated[int, typer.Option(min=1, help="MiB that a forward pass may take beside the weights")] = 1024,
    as_json: AsJson = False,
    *,
    options: dict[str, str],
) -> None:
    """Memory of a zeroth-order step, and the largest perturbations-per-pass that fits a budget."""
    from zofed.training.central import memory_of_passes

    found = memory_of_passes(config.asked_for(file, options), budget * 2**20)
    if as_json:
        print_json(asdict(found))
        return
    console.print(f"weights                 {found.weights / 2**20:10,.1f} MiB")
    console.print(f"a pass of one copy      {found.one / 2**20:10,.1f} MiB more")
    if not found.is_batched:
        console.print(
            "each direction is written into the weights: the pass above counts a second copy of what trains, and "
            "perturbations-per-pass changes nothing"
        )
        return
    console.print(f"each further copy       {found.further / 2**20:10,.1f} MiB more")
    console.print(f"in {budget:,} MiB: perturbations-per-pass = {found.proposed}")


def show_settings(
    section: Annotated[str, typer.Argument(help="only this section, such as model or zeroth-order; empty: all")] = "",
) -> None:
    """Print every setting with its default: a TOML file to start from."""
    print(config.documented_toml(section), end="")
