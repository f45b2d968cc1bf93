"""One run of a sweep in a process of its own, forked from a process that has loaded the libraries once.

Loading torch, transformers and what draws pictures takes seconds, a fork milliseconds. The process they are loaded in
(Python's fork server) computes nothing, so that nothing is forked that must not be: no threads, no GPU.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.base.files import hold, open_private
from zofed.config import Settings
from zofed.experiments.sweep import Run
from zofed.experiments.sweep_engine import Job
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row

CENTRAL = ("zofed.training.central", "zofed.runs.pictures", "zofed.experiments.sweep_process")
FEDERATED = ("zofed.federated.server", "zofed.federated.client", "zofed.federated.local_grid")
PATIENCE = 20.0  # seconds a run that is told to end gets for the end of its step
INTERRUPTED = "interrupted"  # the error of a run that was told to end
EARLIER = 180.0  # seconds a run waits for an earlier process of its own, as on a node that lost its Ray cluster


@dataclass
class Process(Job):
    """A run under way in a process. pipe: on which it says how it goes; its end is the end of the process."""

    process: BaseProcess
    pipe: Connection

    def hear(self) -> dict[str, Any]:
        """Take in what the process has to say, and return it; `ended` when that was its last word."""
        told: dict[str, Any] = {}
        try:
            told = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            self.pipe.close()
            self.ended = True
            code = self.process.exitcode or 0
            if code and self.error is None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
                told = {"error": f"its process {how} (out of memory, perhaps)"}
        self.take(told)
        return told

    def stop(self) -> None:
        """Have it end as by Ctrl-C, or at once where it takes too long."""
        self.process.terminate()
        self.process.join(PATIENCE)
        self.process.kill()
        self.process.join()


class Forks:
    """The engine of one machine: so many runs at a time, each in a process of its own."""

    def __init__(self, at_a_time: int) -> None:
        self._places = at_a_time
        self._context: Any = None
        self._running: list[Process] = []

    def places(self, runs: Sequence[Run]) -> int:
        """As many as it was told."""
        return self._places

    def requests(self, runs: Sequence[Run]) -> list[str]:
        """Nothing: the machine is at hand."""
        return []

    def prepare(self, folder: Path, runs: Sequence[Run]) -> None:
        """Settle which libraries are loaded once."""
        self._context = prepare(libraries(runs))

    def start(self, run: Run, out: Path, log: Path, slot: int) -> Job:
        """Begin a run in a new process."""
        self._running.append(start(self._context, run, out, log, slot))
        return self._running[-1]

    def hear(self, seconds: float) -> None:
        """Take in what the processes say, if one does within so many seconds."""
        for pipe in connection.wait([process.pipe for process in self._running], seconds):
            next(process for process in self._running if process.pipe is pipe).hear()
        self._running = [process for process in self._running if not process.ended]

    def stop(self) -> None:
        """Have all end as by Ctrl-C."""
        for process in self._running:
            process.process.terminate()  # all at once, so that each can end its step
        for process in self._running:
            process.stop()
        self._running.clear()


def libraries(runs: Sequence[Run]) -> list[str]:
    """Modules that such runs import, and that load once."""
    return [*CENTRAL, *(FEDERATED if any(run.settings.clients for run in runs) else ())]


def prepare(modules: Sequence[str]) -> Any:
    """What starts processes that have these modules loaded, which begin to load with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def start(context: Any, run: Run, out: Path, log: Path, slot: int) -> Process:
    """Begin a run in folder `out`, or go on with it, in a new process; what it prints is added to the file `log`.

    slot: which of the parallel runs it is; with several GPUs runs that may choose (device = auto) take them in turn.
    """
    ours, theirs = context.Pipe()
    written = run.settings.model_copy(update={"out": str(out)}).model_dump_json(by_alias=True)
    process = context.Process(target=work, args=(theirs, written, str(log), time.monotonic(), slot))
    process.start()
    theirs.close()
    return Process(run, slot, process, ours)


def work(pipe: Connection, written: str, log: str, began: float, slot: int) -> None:
    """What the process does: the run, as `zofed train` or `zofed simulate` would; then it says how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and is for the sweep to answer
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    try_out(written, log, began, slot, lambda told: _tell(pipe, told))


def try_out(written: str, log: str, began: float, slot: int, tell: Callable[[dict[str, Any]], None]) -> None:
    """The run of these settings in this process, whose output goes to the end of the file `log` from now on.

    written: settings as JSON. began: monotonic seconds. tell: called with what `Job.take` takes, an `error` where the
    run fails; nothing but the end of this process is raised.
    """
    log_file = open_private(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    warnings.showwarning = lambda message, *_: print(f"zofed: warning: {message}", file=sys.stderr, flush=True)
    settings, error = Settings.model_validate_json(written), ""

    def show(row: Row) -> None:
        nonlocal began
        if row["step"] and began:
            tell({"first_step": time.monotonic() - began})
            began = 0.0

    try:
        hold_log(log_file, log)
        choose_gpu(settings, slot)
        carry_out(settings, show, lambda steps: tell({"steps": steps}))
    except UserError as failure:
        error = " ".join(str(failure).split())
    except KeyboardInterrupt:
        error = INTERRUPTED
    except Exception as failure:  # a fault of zofed or of a library: one run's, never the sweep's
        traceback.print_exc()
        error = " ".join(f"{type(failure).__name__}: {failure} (see {log})".split())
    if error:
        print(f"zofed: {error}", file=sys.stderr, flush=True)
        tell({"error": error})


def hold_log(log_file: int, log: str) -> None:
    """Hold the open log for as long as this process lives, so that no other carries the same run out meanwhile.

    Raises UserError where an earlier one does not end.
    """
    busy = f"another process carries this run out and holds {log}: wait for its end, or stop it"
    deadline = time.monotonic() + EARLIER
    while time.monotonic() < deadline:
        with contextlib.suppress(UserError):
            return hold(log_file, busy)
        time.sleep(0.2)
    hold(log_file, busy)


def carry_out(settings: Settings, show: Any, expect: Any = lambda _: None) -> None:
    """The run of these settings in its folder: from its start, or from where it was cut.

    show, expect: as `central.train` has them.
    """
    out = Path(settings.out)
    if settings.clients:
        from zofed.federated import client, server
        from zofed.federated.local_grid import LocalGrid

        server.run(LocalGrid(client.app, settings.clients, settings.model_dump(by_alias=True)), settings, "")
        return
    from zofed.training import central

    if RunFolder(out).journal.exists():
        central.resume(out, show, expect)
    else:
        central.train(settings, out, show, expect)


def at_a_time(parallel: int | None, share: float) -> int:
    """Runs at a time: `parallel`, 1 if not given; with a share of a GPU a run (above 0, at most 1) as many as fit.

    Raises UserError for another share, and for one where there is no GPU.
    """
    if share == 0:
        return parallel or 1
    if not 0 < share <= 1:
        raise UserError(f"--gpus-per-run {share:g}: give a share above 0, at most 1")
    fit = device_count() * int(1 / share + 1e-9)
    if not fit:
        raise UserError(
            f"--gpus-per-run {share:g}: no CUDA device is seen here: leave it out, and say how many with --parallel"
        )
    return min(parallel or fit, fit)


def gpus(settings: Settings) -> int:
    """GPUs that runs with such settings take in turn; 0: none, or the settings say which device."""
    has_choice = settings.device == "auto" and not settings.devices and settings.placement == "none"
    return device_count() if has_choice else 0


def device_count() -> int:
    import torch  # takes seconds to load

    return torch.cuda.device_count()


def choose_gpu(settings: Settings, slot: int) -> None:
    """Where runs take several GPUs in turn, make the slot's own the one that `cuda` means in this process."""
    import torch

    if (count := gpus(settings)) > 1:
        torch.cuda.set_device(slot % count)


def _tell(pipe: Connection, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        pipe.send_bytes(json.dumps(what).encode())


def _end_with(pipe: Connection) -> None:
    """At the pipe's other end's end the sweep is gone, and so goes this process: whoever goes on must find it gone."""
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()
    os._exit(1)
