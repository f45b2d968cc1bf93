"""`zofed new`: a Flower app of one's own, over the zofed that is installed."""

from pathlib import Path
from typing import Annotated

import typer

from zofed import config
from zofed.base import shell
from zofed.commands.console import console


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("new")(new)


def new(
    folder: Annotated[Path, typer.Argument(metavar="NAME", help="folder to make; its last part is the app's name")],
    publisher: Annotated[str, typer.Option(help="who publishes the app: your account at Flower")] = "unpublished",
) -> None:
    """Make a Flower app of your own over the zofed installed here: settings to change, shims for code.

    Flower's `flwr run` takes the folder, zofed's commands its settings.toml. Nothing is overwritten.
    """
    from zofed.deployment import app_folder

    folder = config.absolute(folder, "name")
    app_folder.write(folder, folder.name, publisher)
    console.print(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}", markup=False)
    settings = folder / "settings.toml"
    for command in (
        ("zofed", "simulate", settings, "--out", folder / "run"),
        ("flwr", "run", folder, "--stream", "--run-config", settings),
    ):
        console.print(f"next: {shell.command(*command)}", markup=False)
