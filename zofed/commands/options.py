"""An option for every setting, made from the one schema, and the settings that a command line gives.

Help shows the settings that people need first, and the names of the sections that hold the others.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import click
import typer
import typer.core

from zofed import config
from zofed.commands.groups import CommandGroup
from zofed.config import SETTINGS, Settings
from zofed.runs.run_folder import RunFolder, to_resume


class _Help:
    """Help of a command that takes every setting. run: how it runs them, config.CENTRAL or FEDERATED; empty: any."""

    run = ""

    def write_options(
        self, parameters: Sequence[click.Parameter], ctx: click.Context, out: click.HelpFormatter
    ) -> None:
        """Arguments, options of the command's own, the first settings, and the sections."""
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Settings to begin with": []}
        for parameter in parameters:
            key = max(parameter.opts, default="").removeprefix("--")
            field = SETTINGS.get(key) if isinstance(parameter, click.Option) else None
            if field and not (config.traits(field).first and config.acts_in(field, self.run)):
                continue
            own = "Options" if isinstance(parameter, click.Option) else "Arguments"
            if record := parameter.get_help_record(ctx):
                rows["Settings to begin with" if field else own].append(record)
        rows[f"All {len(SETTINGS)} settings are options too: zofed settings SECTION shows those of"] = [
            (name, config.summary(name)) for name in config.SECTIONS
        ]
        for heading, records in rows.items():
            if records:
                with out.section(heading):
                    out.write_dl(records)


class SettingsCommand(_Help, typer.core.TyperCommand):
    """A command that takes every setting."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of its parameters."""
        self.write_options(self.get_params(ctx), ctx, formatter)


class CentralCommand(SettingsCommand):
    """One that runs them on this machine."""

    run = config.CENTRAL


class FederatedCommand(SettingsCommand):
    """One that runs them in a federation."""

    run = config.FEDERATED


class SettingsGroup(_Help, CommandGroup):
    """A group of commands that takes every setting."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help of its parameters, then its commands."""
        self.write_options(self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each setting, made from the one schema; the typed ones arrive as `options`."""

    def run(**given: Any) -> None:
        typed = {name: given.pop(name) for name in list(given) if name in Settings.model_fields}
        command(**given, options={name.replace("_", "-"): value for name, value in typed.items() if value is not None})

    own = [parameter for parameter in inspect.signature(command).parameters.values() if parameter.name != "options"]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(
                    f"--{key}",
                    metavar=_metavar(field.annotation),
                    help=f"{field.description}{_default(field.default)}",
                    autocompletion=_completion(field.annotation),
                ),
            ],
        )
        for (key, field), name in zip(SETTINGS.items(), Settings.model_fields, strict=True)
    ]
    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    return run


def _metavar(annotation: Any) -> str:
    """What to type after an option: its choices, or the kind of value."""
    if annotation is bool:
        return "true|false"
    return "|".join(get_args(annotation)) or {int: "INTEGER", float: "NUMBER"}.get(annotation, "TEXT")


def _completion(annotation: Any) -> Callable[[str], list[str]]:
    """What a shell offers after an option: its choices, where it has some."""
    choices = ("true", "false") if annotation is bool else get_args(annotation)
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def _default(value: Any) -> str:
    return "" if value == "" else f" [{str(value).lower() if isinstance(value, bool) else value}]"


def resumed(folder: Path | None, file: Path | None, options: dict[str, str], way: str) -> RunFolder | None:
    """The run that --resume names; None where it names none. way: how it must have begun, by its command."""
    return None if folder is None else to_resume(folder, file or options, way)
