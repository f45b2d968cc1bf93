"""The command line: `zofed --help` lists the commands."""

import errno
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import click
import typer
import typer.core

from zofed import __version__, config
from zofed.base import proxies, streams, torchrun
from zofed.base.errors import UserError
from zofed.commands import deployment, experiments, export, generate, preflight, train
from zofed.commands.console import Interrupted, console
from zofed.commands.data import app as data_app
from zofed.commands.journal import app as journal_app
from zofed.commands.keys import app as keys_app
from zofed.commands.tasks import app as tasks_app
from zofed.config import SETTINGS

HELP = "Tune language models by forward passes alone, by backpropagation or by both: alone or in a federation."
# What `zofed --help` shows, in the order in which a person meets it.
GROUPS = {
    "Train": ("quickstart", "train", "simulate", "sweep"),
    "Before a run": ("tasks", "check", "models", "settings", "memory", "diagnose"),
    "Results": ("eval", "generate", "export", "plot", "report", "journal"),
    "Data": ("data", "make-data"),
    "Machines": ("keys", "superlink", "supernode", "worker", "run"),
}


class Grouped(typer.core.TyperGroup):
    """The commands under headings."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands that `GROUPS` names, then the others."""
        others = tuple(name for name in self.commands if not any(name in names for names in GROUPS.values()))
        for heading, names in {**GROUPS, "Other": others}.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit=200)) for name in names])


typer.core.HAS_RICH = False  # else plain help shows what hides brackets from rich: a backslash before each
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, cls=Grouped, help=HELP)
train.register(app)
app.add_typer(journal_app, name="journal")
preflight.register(app)
deployment.register(app)
experiments.register(app)
generate.register(app)
export.register(app)
app.add_typer(data_app, name="data")
app.add_typer(tasks_app, name="tasks")
app.add_typer(keys_app, name="keys")

# What to do where the operating system refuses, besides choosing another place.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another place, then go on"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose another place, or have its owner let you, then go on"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "close some files or raise the limit (ulimit -n), then go on",
}


@app.command("make-data")
def make_data(out: Annotated[Path, typer.Argument(help="folder that gets tokenizer/ and datasets_subset/")]) -> None:
    """Generate the tokenizer and the data that ship with zofed, the same bytes every time."""
    from zofed.data.sample_data import make_shipped_files

    for path in make_shipped_files(out):
        console.print(str(path))


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
        if torchrun.place().world > 1 and sys.argv[1:2] != ["train"]:
            raise UserError("torchrun starts a command once in every process: of zofed's it takes train alone")
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        message, status = str(error), 2
    except click.NoSuchOption as error:
        known = [*(f"--{key}" for key in SETTINGS), "--resume", "--help"]
        renamed = config.RENAMED.get(error.option_name.removeprefix("--"))
        message = f"{error.option_name} is now called --{renamed}" if renamed else ""
        message, status = message or config.unknown(error.option_name, known, "option"), 2
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
