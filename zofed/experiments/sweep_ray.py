"""Carries the runs of a sweep out on a Ray cluster: a task for each, which forks the run as one machine's sweep does.

Ray places the tasks and tells which ended with their node. It starts none of them again by itself: a run goes on from
its own folder, which all nodes see, so that the sweep starts it anew.
"""

import fcntl
import logging
import math
import os
import signal
import socket
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray import exceptions
from ray._private import worker as ray_worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from zofed.base import environment
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.experiments import sweep_process
from zofed.experiments.sweep import Run
from zofed.experiments.sweep_engine import Job, asks
from zofed.experiments.sweep_folder import LOCK

START, JOIN = "ray start --head", "ray start --address=HOST:6379"
LOSSES = 3  # times that a run may lose its node or its worker before it counts as failed
ALONE = 120.0  # seconds that the sweep waits for a node that can take a run
ANSWER = 120.0  # seconds that a node has to say whether it can
TICK = 0.5  # seconds between two looks of a task at whether it was cancelled
LOST = (
    exceptions.NodeDiedError,
    exceptions.WorkerCrashedError,
    exceptions.LocalRayletDiedError,
    exceptions.ObjectLostError,
)


@dataclass
class Task(Job):
    """A run under way in a task of Ray. words: what the task says, as it says it."""

    words: Any


@dataclass
class Cluster:
    """The engine of a Ray cluster that this process is connected to.

    parallel: runs at a time at most, None: as many as the nodes' resources take. share: of a GPU, for each run.
    """

    parallel: int | None
    share: float
    _folder: Path = field(default=Path(), init=False)
    _libraries: list[str] = field(default_factory=list, init=False)
    _running: list[Task] = field(default_factory=list, init=False)
    _losses: Counter[str] = field(default_factory=Counter, init=False)
    _had_room: float = field(default=-math.inf, init=False)  # when a node could last take a run, monotonic seconds

    def places(self, runs: Sequence[Run]) -> int:
        """As many as the resources of the nodes that are alive take, each run counted as the most that one asks for."""
        cpus, gpus = self._most(runs)
        found = sum(_fit(node["Resources"], cpus, gpus) for node in nodes())
        now = time.monotonic()
        if found or self._running:
            self._had_room = now
        elif now - self._had_room > ALONE:
            self._no_room(cpus, gpus)
        return min(found, self.parallel or found)

    def requests(self, runs: Sequence[Run]) -> list[str]:
        """What a task asks Ray for, at most."""
        cpus, gpus = self._most(runs)
        return [f"each run asks Ray for {cpus} CPUs and {gpus:g} GPUs at most"]

    def prepare(self, folder: Path, runs: Sequence[Run]) -> None:
        """See that all nodes that can take such runs have this zofed and see this folder."""
        self._folder, self._libraries = folder, sweep_process.libraries(runs)
        able = [node for node in nodes() if _fit(node["Resources"], *self._most(runs))]
        look = ray.remote(num_cpus=0, max_retries=0)(what_is_wrong)
        answers = {}
        for node in able:
            on_it = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers[node["NodeManagerHostname"]] = look.options(scheduling_strategy=on_it).remote(*self._looked_for())
        for host, answer in answers.items():
            if wrong := _answer(answer):
                raise UserError(f"node {host} of the Ray cluster: {wrong}")

    def start(self, run: Run, out: Path, log: Path, slot: int) -> Job:
        """Begin a run in a new task."""
        cpus, gpus = asks(run.settings, self.share)
        # Not by .options: a worker ends with its task, and frees its GPU, only where the decorator is told of one.
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, num_returns="streaming", max_retries=0)(carry_out)
        written = run.settings.model_copy(update={"out": str(out)}).model_dump_json(by_alias=True)
        words = task.options(name=run.name).remote(written, str(log), self._libraries, self._looked_for())
        self._running.append(Task(run, slot, words))
        return self._running[-1]

    def hear(self, seconds: float) -> None:
        """Take in what the tasks say, if one does within so many seconds."""
        if not self._running:
            return time.sleep(seconds)
        ready, _ = ray.wait([task.words for task in self._running], num_returns=1, timeout=seconds)
        for task in [task for task in self._running if any(task.words is words for words in ready)]:
            self._hear(task)
        self._running = [task for task in self._running if not task.ended]

    def stop(self) -> None:
        """Cancel all tasks: each has its run end as by Ctrl-C."""
        for task in self._running:
            ray.cancel(task.words)
        deadline = time.monotonic() + sweep_process.PATIENCE
        while self._running and time.monotonic() < deadline:
            self.hear(TICK)
        for task in self._running:
            ray.cancel(task.words, force=True)
        self._running.clear()

    def _hear(self, task: Task) -> None:
        try:
            told: dict[str, Any] = ray.get(next(task.words))  # pyright: ignore[reportAssignmentType]
        except StopIteration:
            task.ended = True
        except LOST:
            self._losses[task.run.name] += 1
            task.ended = True
            task.lost = self._losses[task.run.name] <= LOSSES
            if task.lost:
                warnings.warn(f"{task.run.name} lost its node or its worker: it goes on from its folder", stacklevel=2)
            task.error = f"its node or its worker was lost {LOSSES + 1} times (out of memory, perhaps)"
        except exceptions.OutOfMemoryError:
            task.ended, task.error = True, "Ray ended it for lack of memory on its node: take a smaller --parallel"
        except exceptions.RayError as error:
            task.ended, task.error = True, _brief(error)
        else:
            if "first_step" in told:  # by the clock of this machine, and with what Ray takes to place the task
                told["first_step"] = time.monotonic() - task.began
            task.take(told)

    def _most(self, runs: Sequence[Run]) -> tuple[int, float]:
        """The most CPUs and the most GPUs that one of the runs asks for."""
        cpus, gpus = zip(*(asks(run.settings, self.share) for run in runs), strict=True)
        return max(cpus), max(gpus)

    def _looked_for(self) -> tuple[str, str]:
        """What a node must have: the file that this sweep holds, and the code, as `environment.code` tells it."""
        return str(self._folder / LOCK), _code()

    def _no_room(self, cpus: int, gpus: float) -> NoReturn:
        have = [f"{each['Resources'].get('CPU', 0):g} and {each['Resources'].get('GPU', 0):g}" for each in nodes()]
        raise UserError(
            f"no node of the Ray cluster can take a run, which asks for {cpus} CPUs (threads) and {gpus:g} GPUs: the "
            f"nodes have {', '.join(have)}; ask for less, or add a node with `{JOIN}`"
        )


@contextmanager
def connected(parallel: int | None, share: float) -> Iterator[Cluster]:
    """The engine of the cluster at RAY_ADDRESS, else of the one that runs on this machine.

    Raises UserError for a share of a GPU that is none, and where no cluster answers.
    """
    if share != 0 and not 0 < share <= 1:
        raise UserError(f"--gpus-per-run {share:g}: give a share above 0, at most 1")
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS = {address!r}: start the sweep on a node of the cluster, and set HOST:PORT or auto"
        )
    stops = signal.getsignal(signal.SIGTERM)
    try:
        _knock(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of Ray's, about GPUs, of tasks that ask for none
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (RuntimeError, ValueError, OSError, exceptions.RayError) as error:
        where = "on this machine" if address == "auto" else f"at RAY_ADDRESS = {address!r} ({_brief(error)})"
        raise UserError(
            f"--engine ray: no Ray cluster answers {where}: start one with `{START}`, then on each further machine "
            f"`{JOIN}`"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, stops)  # Ray's own would end this process as an error
    ray_worker.print_to_stdstream = _say_nothing  # a lost node's whole log: the sweep has a sentence for it
    try:
        yield Cluster(parallel, share)
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT, for which Ray takes two minutes; ValueError for no number."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _say_nothing(*_: Any, **__: Any) -> None: ...


def nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def carry_out(
    written: str, log: str, libraries: Sequence[str], looked_for: tuple[str, str]
) -> Iterator[dict[str, Any]]:
    """What a task does: the run in a process forked from its worker's own fork server; yields what that says."""
    if wrong := what_is_wrong(*looked_for):
        yield {"error": f"on {os.uname().nodename}: {wrong}"}
        return
    settings = Settings.model_validate_json(written)
    run = Run(Path(log).stem, "", settings, False)
    context = sweep_process.prepare([*libraries, "__main__"])  # Ray's worker, which each process would import anew
    process = sweep_process.start(context, run, Path(settings.out), Path(log), 0)
    try:
        while not process.ended:
            # Ray cancels by KeyboardInterrupt between two lines of Python
            if connection.wait([process.pipe], TICK) and (told := process.hear()):
                yield told
    finally:
        process.stop()


def what_is_wrong(lock: str, code: str) -> str:
    """Why this node cannot take runs of the sweep that holds the file `lock` and has this code; empty: it can.

    Locks must reach from node to node, so that no run is carried out twice where a node is only thought to be lost.
    """
    if (own := _code()) != code:
        return f"it has zofed {own}, this machine {code} (version and digest): install the same on all nodes"
    try:
        held = os.open(lock, os.O_RDWR)
    except OSError as error:
        return (
            f"it does not see the sweep's folder {Path(lock).parent} ({error.strerror}): choose an --out that all "
            "nodes share, at the same path"
        )
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"the file system of {Path(lock).parent} has no locks ({error.strerror}): mount it with flock"
    finally:
        os.close(held)
    return (
        f"its folder {Path(lock).parent} is another one, or the file system does not share locks between nodes: choose "
        "an --out that all nodes share, on NFS 4 or another file system mounted with flock"
    )


def _code() -> str:
    return " ".join(environment.code().split()[:2])


def _fit(resources: dict[str, float], cpus: int, gpus: float) -> int:
    """Runs that a node with such resources takes at a time."""
    fit = int(resources.get("CPU", 0) // cpus)
    if 0 < gpus <= 1:
        fit = min(fit, int(resources.get("GPU", 0)) * int(1 / gpus + 1e-9))
    elif gpus:
        fit = min(fit, int(resources.get("GPU", 0) // gpus))
    return fit


def _answer(answer: Any) -> str:
    """What a node says is wrong with it; empty: nothing, or it is gone, and no run comes to it."""
    try:
        return ray.get(answer, timeout=ANSWER)
    except exceptions.GetTimeoutError:
        return f"it did not answer within {ANSWER:g} s: see `ray status`"
    except exceptions.RayTaskError as error:
        return f"zofed cannot be imported there ({_brief(error)}): install the same zofed as on this machine"
    except exceptions.RayError:
        return ""


def _brief(error: Exception) -> str:
    """The last line of an error, which in Ray's holds what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
