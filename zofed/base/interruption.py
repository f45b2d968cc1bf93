"""Ctrl-C and SIGTERM as KeyboardInterrupt, and remembered: within an import libraries make another error of one."""

import signal
from types import FrameType
from typing import NoReturn

_came = False


def listen() -> None:
    """From now on a stop by a supervisor (SIGTERM) ends what runs as Ctrl-C does; a SIGINT that is ignored stays so."""
    global _came
    _came = False
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)


def came() -> bool:
    """Whether one came since `listen`."""
    return _came


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    global _came
    _came = True
    raise KeyboardInterrupt
