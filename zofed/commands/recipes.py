"""`zofed recipes` and `zofed copy`: the experiments and tasks that ship, and a copy of one to change."""

import shutil
import tomllib
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zofed import config
from zofed.base import shell
from zofed.base.errors import UserError
from zofed.commands.console import AsJson, console, print_json, print_table
from zofed.config import task_files


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("recipes")(recipes)
    app.command("copy")(copy)


def recipes(as_json: AsJson = False) -> None:
    """The experiments and tasks that ship with zofed, each a TOML file to run, to read or to copy and change."""
    found = {
        name: tomllib.loads(path.read_text(encoding="utf-8")).get("about", "") for name, path in _shipped().items()
    }
    if as_json:
        print_json([{"recipe": name, "what": about} for name, about in found.items()])
        return
    table = Table("recipe", "what", box=None, pad_edge=False)
    for name, about in found.items():
        table.add_row(name, about)
    print_table(table)
    console.print("one of them to change: zofed copy RECIPE", markup=False)


def copy(
    recipe: Annotated[str, typer.Argument(help="a name of zofed recipes, as experiments/quick, or quick alone")],
    to: Annotated[Path | None, typer.Argument(help="file to write; empty: NAME.toml here")] = None,
) -> None:
    """Copy an experiment or a task that ships with zofed, to change it; nothing is overwritten."""
    name, path = _found(recipe)
    target = config.absolute(to or Path(path.name), "file")
    if target.is_dir():
        target = target / path.name
    try:
        with path.open("rb") as source, target.open("xb") as file:
            shutil.copyfileobj(source, file)
    except FileExistsError:
        raise UserError(f"{target} is there already: name another file, or remove it") from None
    console.print(f"wrote {target}", markup=False)
    command = ("sweep", target) if name.startswith("experiments/") else ("train", "--task", target)
    console.print(f"next: {shell.command('zofed', *command)}", markup=False)


def _shipped() -> dict[str, Path]:
    """Files by kind and name."""
    from zofed.experiments import sweep_file

    folders = {"experiments": sweep_file.SHIPPED, "tasks": task_files.SHIPPED}
    found = {f"{kind}/{path.stem}": path for kind, place in folders.items() for path in place.glob("*.toml")}
    return dict(sorted(found.items()))


def _found(recipe: str) -> tuple[str, Path]:
    """The recipe of this name. Raises UserError for none, and for a name that an experiment and a task have."""
    known = _shipped()
    meant = [name for name in known if recipe.removesuffix(".toml") in (name, name.partition("/")[2])]
    if len(meant) > 1:
        raise UserError(f"{recipe!r} is the name of {' and '.join(meant)}: give one of them whole")
    if not meant:
        raise UserError(config.unknown(recipe, [*known, *{name.partition("/")[2] for name in known}], "recipe"))
    return meant[0], known[meant[0]]
