"""Processes that belong together: started, watched, started anew when they die, ended in order, none left behind."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

STOP_LIMIT_S = 10.0  # for a polite end, before SIGKILL
SHORTEST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0  # before a process that died is started anew
WELL_AFTER_S = 60.0  # one that lived so long is taken to have been well
MISTAKE = 2  # exit status of zofed's commands for what only a person can mend: no restart helps


@dataclass
class Child:
    """One process to keep alive.

    before_restart: what to do between its death and its next start, which must not raise. takes_along: names of those
    that end with it, to be started anew too. umask: of the process; negative: ours.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    takes_along: Sequence[str] = ()
    before_restart: Callable[[], None] = lambda: None
    umask: int = -1
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0  # in a row
    due: float = field(default_factory=time.monotonic)  # when to start it


def supervise(children: Sequence[Child], every: Callable[[], None] = lambda: None) -> int:
    """Keep the children alive until a signal or a mistake ends it; the exit status: 128 + signal, or the child's own.

    every: called about ten times a second.
    """
    stop: list[int] = []
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda got, _: stop.append(got)) for number in watched}
    by_name = {child.name: child for child in children}
    try:
        while not stop:
            for child in children:
                status = child.process.poll() if child.process else None
                if child.process is None and time.monotonic() >= child.due:
                    _start(child)
                elif status is not None:
                    if status == MISTAKE:
                        return MISTAKE
                    _bury(child, status)
                    together = [child, *(by_name[name] for name in child.takes_along)]
                    _end(together)
                    for one in together:
                        one.process, one.due = None, child.due
                    child.before_restart()
            every()
            time.sleep(0.1)
        return 128 + stop[0]
    finally:
        _end(children)
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(child: Child) -> None:
    child.process = subprocess.Popen(
        child.command,
        env=dict(child.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        umask=child.umask,
        start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we end the rest in order
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    child.started = time.monotonic()
    threading.Thread(target=_copy, args=(child.name, child.process.stdout), daemon=True).start()


def _bury(child: Child, status: int) -> None:
    """Note a death, and when to try again: at once the first time, then later and later."""
    was_well = time.monotonic() - child.started > WELL_AFTER_S
    child.deaths = 1 if was_well else child.deaths + 1
    delay = min(LONGEST_DELAY_S, SHORTEST_DELAY_S * 2 ** (child.deaths - 1))
    how = f"signal {-status}" if status < 0 else f"status {status}"
    print(f"{child.name} ended with {how}: starts anew in {delay:g} s", file=sys.stderr, flush=True)
    child.due = time.monotonic() + delay


def _end(children: Sequence[Child]) -> None:
    """End processes and all that came from them: SIGTERM first, and SIGKILL for those that do not take it."""
    running = [child.process for child in children if child.process and child.process.poll() is None]
    for process in running:
        _signal_group(process, signal.SIGTERM)
    limit = time.monotonic() + STOP_LIMIT_S
    for process in running:
        try:
            process.wait(max(0.1, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()
    for child in children:
        if child.process:
            _signal_group(child.process, signal.SIGKILL)  # what its own children left


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _copy(name: str, output: IO[bytes] | None) -> None:
    """A child's lines on our standard output, each with its name."""
    assert output is not None
    for line in output:
        sys.stdout.write(f"{name}: {line.decode(errors='replace')}")
        sys.stdout.flush()


def _die_with_parent() -> None:
    """Have Linux end the child when we are killed outright; nothing of ours can do it then."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
