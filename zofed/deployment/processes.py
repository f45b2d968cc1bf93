"""Ends what a launch started: on a signal, at the end of a block, and after SIGKILL by a guard that lives on."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from zofed.base.files import ROOT

STOP_LIMIT_S = 3.0  # for the polite end, before SIGKILL: Flower's simulation often does not take it


class Stopped(BaseException):
    """A signal asked the whole launch to end; not an Exception, so that nothing swallows it on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Stopped`, so that every `finally` on the way out does its work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        for again in watched:  # a second Ctrl-C must not cut the clean-up short: that takes seconds and is bounded
            signal.signal(again, signal.SIG_IGN)
        raise Stopped(number)

    watched = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
        watched.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def guard(superlink_pid: int, home: Path) -> Iterator[None]:
    """Keep a small second process that cleans up if this one is killed outright (SIGKILL) and cannot.

    Flower's own watch over the parent process does not do it: a simulation that waits never sees the signal.
    """
    command = [sys.executable, "-m", "zofed.deployment.processes", str(superlink_pid), str(home)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=home,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.communicate(b"done")


def stand_guard(superlink_pid: int, home: Path) -> None:
    """What the guard does: wait until the launcher says `done`, or ends without a word and leaves the work to us."""
    if sys.stdin.read() != "done":
        stop_all(superlink_pid, home)
        shutil.rmtree(home, ignore_errors=True)


def stop_all(superlink_pid: int, home: Path, reap: Callable[[], object] = lambda: None) -> None:
    """End the SuperLink and every process that came from it: first politely, then with SIGKILL."""
    ours = descendants(superlink_pid, home)
    # It ends its superexec; the simulation would then end Ray, but mostly does not notice.
    send(superlink_pid, signal.SIGTERM)
    limit = time.monotonic() + STOP_LIMIT_S
    while ours and time.monotonic() < limit:
        time.sleep(0.1)
        reap()
        ours = {pid for pid in ours | descendants(superlink_pid, home) if alive(pid)}
    for pid in ours:
        send(pid, signal.SIGKILL)
    limit = time.monotonic() + STOP_LIMIT_S
    while any(alive(pid) for pid in ours) and time.monotonic() < limit:
        time.sleep(0.02)  # the kernel takes them down one by one, and they hold files in the folder we remove next
        reap()
    reap()


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(root: int, home: Path) -> set[int]:
    """The process, all that came from it, the groups these lead, and whoever works in our private folder."""
    table = process_table()
    # Orphans hang on process 1, but stay in their group and in their working folder (which only Linux shows).
    found = {root} | {pid for pid, _, _ in table if works_in(pid, home / "cwd")}
    groups = {group for pid, _, group in table if pid in found and pid != root} - {os.getpgrp()}
    grown = True
    while grown:
        more = {pid for pid, parent, group in table if parent in found or group in found | groups} - found
        found |= more
        grown = bool(more)
    return found


def process_table() -> list[tuple[int, int, int]]:
    """Process, parent and group of every process; read from /proc where there is one, since small images lack `ps`."""
    table = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The second field is the name in parentheses and may hold anything; the state comes before the parent.
            _state, parent, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            table.append((int(stat.parent.name), int(parent), int(group)))
    if table:
        return table
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid="], capture_output=True, text=True, check=False).stdout
    for line in listing.splitlines():
        pid, parent, group = line.split()
        table.append((int(pid), int(parent), int(group)))
    return table


def works_in(pid: int, folder: Path) -> bool:
    """Whether Linux says that the process has this working folder."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd") == str(folder)
    return False


def alive(pid: int) -> bool:
    """Whether the process still runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


if __name__ == "__main__":
    stand_guard(int(sys.argv[1]), Path(sys.argv[2]))
