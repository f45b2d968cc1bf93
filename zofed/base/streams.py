"""Standard streams as a command needs them: there, able to take any text, and quiet when nobody reads any more."""

import io
import os
import select
import sys
from contextlib import suppress

READER_GONE = 141  # 128 + SIGPIPE: what a shell calls a program whose reader went away


def prepare() -> None:
    """Open streams that are closed on the null device, and have output escape what its encoding lacks.

    A closed descriptor would be given to the next file that is opened, and what is printed would land in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reader_has_gone() -> bool:
    """Whether standard output is a pipe or a socket that nobody reads any more."""
    with suppress(OSError, ValueError):
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))
    return False


def give_up() -> None:
    """Send what standard output still holds nowhere, so that the end of the process does not try, and fail, again."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
