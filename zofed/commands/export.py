"""`zofed export`: a run as a folder that other programs read, and that may go to the hub."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zofed.base.errors import UserError
from zofed.commands.console import console
from zofed.runs.run_folder import RunFolder


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    out: Annotated[Path, typer.Option("--out", help="a new folder for what is written")],
    is_merged: Annotated[
        bool, typer.Option("--merged", help="the whole model, as AutoModel of transformers loads it")
    ] = False,
    is_adapter: Annotated[
        bool, typer.Option("--adapter", help="the adapter that the run trained, as peft loads it")
    ] = False,
    rank: Annotated[
        int | None,
        typer.Option("--delta-rank", metavar="R", help="what the run changed, as a LoRA of rank R that peft loads"),
    ] = None,
    base: Annotated[
        str, typer.Option("--base", help="where the saved model the run began with lies now, or OWNER/NAME")
    ] = "",
    push: Annotated[
        str, typer.Option("--push", metavar="OWNER/NAME", help="then upload the folder to the hub, privately")
    ] = "",
    is_public: Annotated[bool, typer.Option("--public", help="what --push makes can be seen by everybody")] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads")] = 1,
) -> None:
    """Write a run's model, its adapter, or a LoRA of what it changed, with a model card; --push uploads them."""
    if (is_merged, is_adapter, rank is not None).count(True) != 1:
        raise UserError("what to write is said by one of --merged, --adapter and --delta-rank R: give one")
    if rank is not None and rank < 1:
        raise UserError(f"--delta-rank {rank}: a LoRA has a rank of 1 or more; give one")
    if is_public and not push:
        raise UserError("--public says how --push uploads: give --push OWNER/NAME beside it")
    folder = RunFolder.open(run)
    from zofed.data import hub_upload
    from zofed.training import export as exports  # torch and transformers take seconds to load: mistakes need not wait

    out = exports.check_out(out)
    if push:
        place = exports.base_of(folder.settings(), base)[0]
        if not is_merged and Path(place).is_absolute():
            warnings.warn(
                f"the adapter names its base {place}, a folder of this machine: give --base OWNER/NAME, if the hub has "
                "that model, so that others find it",
                stacklevel=2,
            )
        hub_upload.check(push, is_public=is_public)
    if rank is None:
        end = (exports.merged if is_merged else exports.adapter)(folder, out, base, threads)
        console.print(f"weights after round {end.round}, SHA-256 {end.digest}")
        if not end.has_ended:
            console.print(f"the run has not ended: {folder.go_on()} continues it", markup=False)
    else:
        delta, told = exports.lora(folder, out, rank, base, threads)
        head, *lines = exports.export_texts.rows(delta)
        table = Table(*head, box=None, pad_edge=False)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        for sentence in told:
            console.print(sentence, markup=False)
    console.print(f"written: {out}", markup=False)
    if push:
        console.print(f"uploaded: {hub_upload.push(out, push, is_public=is_public)}", markup=False)
