"""How much a process says of its work: ZOFED_LOG is warning, info (the default) or debug."""

import logging
import os
import sys
import traceback

from zofed.base.errors import UserError

VARIABLE = "ZOFED_LOG"
LEVELS = ("warning", "info", "debug")
TALKATIVE = ("matplotlib", "PIL", "asyncio", "fsspec", "filelock", "urllib3", "httpcore", "numba")  # told from info on


def _asked() -> str:
    return os.environ.get(VARIABLE, "").strip().lower()


def level() -> str:
    """One of LEVELS; info where the variable says nothing or something else, which `prepare` refuses."""
    found = _asked()
    return found if found in LEVELS else "info"


def shows_progress() -> bool:
    """Whether lines and bars of progress are wanted; warnings, errors and a run's results always are."""
    return level() != "warning"


def tell(text: str) -> None:
    """Print a line of progress, unless only warnings are wanted."""
    if shows_progress():
        print(text, flush=True)


def is_debug() -> bool:
    """Whether all that libraries say is wanted, and where in the code an error came up."""
    return level() == "debug"


def trace() -> None:
    """Of the error that is being handled, print where it came up, if all is wanted."""
    if is_debug():
        traceback.print_exc()


def prepare() -> None:
    """Have libraries' loggers, and Flower in the processes started from here, say as much as is wanted.

    Raises UserError for a level that there is none of.
    """
    asked = _asked()
    if asked not in ("", *LEVELS):
        raise UserError(f"{VARIABLE} = {asked!r}: set it to warning, info or debug")
    if asked and asked != "info":
        os.environ.setdefault("FLWR_LOG_LEVEL", asked.upper())
    if is_debug():
        form = "%(asctime)s %(process)d %(name)s %(levelname)s: %(message)s"
        logging.basicConfig(level=logging.DEBUG, format=form, stream=sys.stderr)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.INFO)
