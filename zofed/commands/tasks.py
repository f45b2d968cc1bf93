"""Tasks by name: what they tune a model for, and a row of each as the model meets it."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tomli_w
import typer
from rich.table import Table
from rich.text import Text

from zofed import config
from zofed.base import shell
from zofed.base.texts import printable
from zofed.commands.console import AsJson, console, print_json, print_table
from zofed.commands.groups import CommandGroup
from zofed.config import task_files

if TYPE_CHECKING:
    from zofed.preflight.task_row import TaskRow

tasks_app = typer.Typer(cls=CommandGroup, help=__doc__)

TRAINED = "green"


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(tasks_app, name="tasks")


@tasks_app.callback(invoke_without_command=True)
def list_tasks(context: typer.Context, as_json: AsJson = False) -> None:
    """Tasks by name: what they tune a model for, and a row of each as the model meets it."""
    if context.invoked_subcommand:
        return
    found = []
    for task in map(task_files.load, task_files.names()):
        own, data = task.settings, task.settings.get("dataset", "")
        row = {"name": task.name, "type": own["task"], "data": data, "metric": own.get("metric", "")}
        found.append(row | {"here": _is_here(data), "what": task.about})
    if as_json:
        print_json(found)
        return
    table = Table(box=None, pad_edge=False)
    for column in found[0]:
        table.add_column(column, no_wrap=column != "what")
    for row in found:
        table.add_row(*(("yes" if value else "") if key == "here" else value for key, value in row.items()))
    print_table(table)
    console.print(
        "one of them: zofed tasks show NAME; its data: zofed data download DATA; tune: zofed train --task NAME"
    )


@tasks_app.command()
def show(
    name: Annotated[str, typer.Argument(help="a name of zofed tasks, or the path of a task file that ends in .toml")],
    model: Annotated[str, typer.Option(help="whose tokens are shown: a folder, or OWNER/NAME of the hub")] = "tiny",
    row: Annotated[int, typer.Option(min=1, help="row of the data that is shown")] = 1,
    dataset: Annotated[str, typer.Option(help="a data set's name or file in place of the task's")] = "",
) -> None:
    """What a task says, and one row of its data: the tokens that train, the candidates and the right one."""
    task = task_files.load(name)
    console.print(f"{task.name}: {task.about}", markup=False)
    for key in ("source", "licence"):
        if value := getattr(task, key):
            console.print(f"{key}: {value}", markup=False)
    console.print(f"file: {task.path}", markup=False)
    for key, value in task.settings.items():
        console.print(Text(f"{tomli_w.dumps({key: value}).strip()}  # {_explained(key, value)}"))
    given = {"task": name, "model": model} | ({"dataset": dataset} if dataset else {})
    settings = config.resolve(given)
    console.print()
    if not _is_here(settings.dataset):
        console.print(
            f"data set {settings.dataset} is not on this machine: {_how_to_get(settings.dataset)}", markup=False
        )
        console.print("a row makes this of its columns:", markup=False)
        console.print(Text(settings.template or "(its text)"))
        return
    from zofed.preflight.task_row import task_row  # torch and transformers take seconds to load

    _tell_row(task_row(settings, row), settings.dataset, model)


def _explained(key: str, value: Any) -> str:
    """What a setting of a task file is, in few words."""
    from zofed.data.catalog import CATALOG

    if key == "task":
        return "the type"
    if key == "dataset":
        return CATALOG[value].about if value in CATALOG else "the data"
    return re.split("[;:]", config.SETTINGS[key].description or "")[0]


def _tell_row(row: "TaskRow", dataset: str, model: str) -> None:
    """Print a row: what trains in colour, in a file or without colours in brackets."""
    is_coloured = console.is_terminal and console.color_system is not None and not console.no_color
    counts = f", {row.tokens} tokens of {model}, {row.trained} train" if row.tokens else ""
    how = f"{TRAINED} trains" if is_coloured else "what trains stands in [ ]"
    console.print(f"row {row.number:,} of {row.rows:,} of {dataset}{counts}; {how}:", markup=False)
    shown = Text()
    for piece in row.pieces:
        shown.append_text(_piece(piece.text, piece.trains, is_coloured))
    console.print(shown)
    for number, candidate in enumerate(row.candidates):
        mark = "right" if number == row.right else ""
        console.print(Text(f"{mark:>7} ").append_text(_piece(candidate, True, is_coloured)))
    if row.label:
        console.print(f"  class {printable(row.label)}", markup=False)


def _piece(text: str, trains: bool, is_coloured: bool) -> Text:
    """Text of somebody's data, with nothing in it that a terminal obeys but line ends."""
    plain = "\n".join(map(printable, text.split("\n")))
    if not trains:
        return Text(plain)
    return Text(plain, style=TRAINED) if is_coloured else Text(f"[{plain}]")


def _is_here(dataset: str) -> bool:
    from zofed.data import documents, subsets

    return dataset in documents.KNOWN_NAMES or subsets.find(dataset) is not None or Path(dataset).expanduser().exists()


def _how_to_get(dataset: str) -> str:
    from zofed.data.catalog import CATALOG

    if dataset in CATALOG:
        return f"{shell.command('zofed', 'data', 'download', dataset)} fetches it, and --dataset names another"
    return "name another with --dataset"
