"""The command line: `zofed --help` lists the commands."""

import logging
import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated

import click
import typer
import typer.core

from zofed import __version__
from zofed.base import environment, interruption, log, proxies, streams, torchrun
from zofed.base.errors import Interrupted, UserError
from zofed.commands.groups import Grouped

HELP = "Tune language models by forward passes alone, by backpropagation or by both: alone or in a federation."

typer.core.HAS_RICH = False  # else plain help shows what hides brackets from rich: a backslash before each
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, cls=Grouped, help=HELP, pretty_exceptions_enable=False)


def _tell_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """Run a command: status 2 and one line for a mistake, 130 after an interruption, never a traceback for either."""
    streams.prepare()
    warnings.showwarning = lambda message, *_: print(f"zofed: warning: {message}", file=sys.stderr)
    os.environ.update(proxies.exempt(os.environ))  # before httpx or a process of Flower's reads them
    interruption.listen()
    try:
        log.prepare()
        if log.is_debug():
            logging.getLogger("zofed").debug("%s in %s, by %s", sys.argv, os.getcwd(), environment.code())
        if torchrun.place().world > 1 and sys.argv[1:2] != ["train"]:
            raise UserError("torchrun starts a command once in every process: of zofed's it takes train alone")
        status = app(standalone_mode=False, prog_name="zofed")
        sys.stdout.flush()
    except UserError as error:
        log.trace()
        message, status = str(error), 2
    except click.NoSuchOption as error:
        from zofed.commands import mistakes

        message, status = mistakes.unknown_option(error), 2
    except click.ClickException as error:
        message, status = f"{error.format_message()} See zofed --help", 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and streams.reader_has_gone():  # as in zofed settings | head -1
            streams.give_up()
            sys.exit(streams.READER_GONE)
        from zofed.commands import mistakes

        log.trace()
        message, status = mistakes.refused_by_system(error), 2
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
