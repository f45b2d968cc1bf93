"""Work for others, within so many seconds and so much more memory than this process has."""

import faulthandler
import re
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from zofed.base.errors import UserError

GRACE_S = 2.0  # to come to an end in: what does not, within one call of a library, ends with its process
_NO_MEMORY = re.compile(r"allocate memory|out of memory|bad_alloc", re.IGNORECASE)  # as torch and others say it
_OF_GPU = re.compile(r"\b(CUDA|HIP|MPS|XPU)\b")


class Exceeded(UserError):  # noqa: N818, a state of a limit
    """What ran took more than it may; the text says of what. limit: `seconds` or `memory`."""

    def __init__(self, text: str, limit: str) -> None:
        super().__init__(text)
        self.limit = limit


class _Late(BaseException):
    """No Exception, which libraries catch."""


@contextmanager
def within(seconds: float, megabytes: float) -> Iterator[None]:
    """Raise Exceeded where the block takes longer, or wants more memory beyond what this process holds; 0: any.

    Both hold in a process's main thread, elsewhere neither does. Memory is that of this machine, not of a GPU, as
    Linux counts it (RLIMIT_DATA): the allocation that would go beyond fails. A single call of a library that neither
    returns nor looks for signals ends this process with status 1, GRACE_S after the time.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, _raise_late)
    try:
        if megabytes and (held := _held_bytes()):
            most = held + int(megabytes * 1e6)
            wanted = most if before[1] == resource.RLIM_INFINITY else min(most, before[1])
            resource.setrlimit(resource.RLIMIT_DATA, (wanted, before[1]))
        if seconds:
            faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=sys.__stderr__ or sys.stderr)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except _Late:
        raise Exceeded(f"it took more than {seconds:g} seconds", "seconds") from None
    except (MemoryError, RuntimeError) as error:
        if is_of_memory(error) and (megabytes or isinstance(error, MemoryError)):
            raise _no_memory(megabytes) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if seconds:
            faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_of_memory(error: Exception) -> bool:
    """Whether it says that this machine's memory could not be had, in Python's way or in that of a library."""
    if isinstance(error, MemoryError):
        return True
    said = str(error) if isinstance(error, RuntimeError) else ""
    return bool(_NO_MEMORY.search(said)) and not _OF_GPU.search(said)


def _raise_late(number: int, frame: FrameType | None) -> NoReturn:
    raise _Late


def _no_memory(megabytes: float) -> Exceeded:
    what = f"{megabytes:g} MB beyond what the process held" if megabytes else "the machine has"
    return Exceeded(f"it wanted more memory than {what}", "memory")


def _held_bytes() -> int:
    """Bytes of this process's private data, as RLIMIT_DATA counts them; 0 where the system does not tell."""
    try:
        found = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0
