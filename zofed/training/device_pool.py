"""The queries of a step, split over processes that replay the same records.

Each device but the first has a process whose model and data are its own, built from the run's settings. All that
crosses its pipe are the journal entries it lacks and which queries to measure, one way, and raw losses, the other. A
forward pass holds the same perturbed copies wherever it runs, and slopes are computed in one place from all losses in
the order of the queries: the records are those of a run on one device.
"""

import itertools
import json
import multiprocessing
import os
import queue
import signal
import struct
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from zofed.base import arithmetic, torchrun
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.digests import raw_bytes
from zofed.core.estimators import Share, Split
from zofed.core.journal import Journal, bodies, genesis_chain, position
from zofed.core.perturbed import CannotBatch
from zofed.core.replica import Replica, catch_up
from zofed.data.encoding import Examples
from zofed.runs.run_folder import RunFolder
from zofed.training import measurements, pins, ranks
from zofed.training.paths import with_absolute_paths
from zofed.training.process import devices, prepare_process
from zofed.training.task import Task

# A request: chain before and after the entries at its end, probe of the weights there, batched, first query, end.
_REQUEST = struct.Struct("<16s16s8s?II")
# An answer begins with its kind: losses of either type, or one line that says why there are none.
_TYPES = {b"f": torch.float32, b"d": torch.float64}
_CANNOT_BATCH, _FAILED = b"c", b"e"

LONGEST_WAIT = 1e6  # seconds; the system counts the milliseconds of a wait in 31 bits


@contextmanager
def opened(task: Task, replica: Replica, journal: Journal, folder: Path) -> Iterator[Split | None]:
    """What splits the queries of a run over its devices while this lasts; None where it has one.

    replica, journal: the run's own, on the first device. folder: of the run, named where a process fails. No process
    outlives the block, or this process, however either ends.
    """
    pool = Pool(task, replica, journal, folder)
    try:
        yield pool.losses if pool.members else None
    finally:
        pool.close()


def shares(queries: int, together: int, places: int) -> list[slice]:
    """The queries in at most so many consecutive parts, each beginning at a multiple of `together`; smaller first."""
    groups = -(-queries // together)
    count = min(places, groups)
    bounds = [min(queries, groups * index // count * together) for index in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class Pool:
    """A process for every device of a run but the first, or for every rank of torchrun's but rank 0."""

    def __init__(self, task: Task, replica: Replica, journal: Journal, folder: Path) -> None:
        self.replica, self.journal = replica, journal
        self._told_idle = False
        self.members: list[Member] = []
        others = devices(task.settings)[1:]
        digests = pins.digests(task) if others else {}
        base = genesis_chain(replica.genesis)
        patience = min(task.settings.round_timeout, LONGEST_WAIT)
        try:
            for index, device in enumerate(others):
                place = f"process {index + 1} of {len(others)}, on {device},"
                process, pipe = start(task.settings, str(device), digests)
                self.members.append(Member(process, pipe, base, place, folder, patience))
            if torchrun.place().world > 1:
                for other in ranks.gathered(patience):
                    where = f"rank {other.rank} of {torchrun.place().world}, on {other.host},"
                    self.members.append(Member(None, other.pipe, base, where, folder, patience))
                    check_same(other.read, read_by(task, replica), where)
                    if different := arithmetic.changed_since(other.arithmetic):
                        warnings.warn(
                            f"{where} has other arithmetic than rank 0 ({different}): the steps of this run replay, "
                            "but their last bits may differ from those of a run on rank 0 alone",
                            stacklevel=2,
                        )
        except BaseException:
            self.close()
            raise

    def losses(self, share: Share, queries: int, together: int, batched: bool) -> Tensor:
        """Raw losses (queries, steps) of the replica's next round: the first part measured here, the others there.

        Raises UserError that names the process that failed, CannotBatch where any of them says so.
        """
        parts = shares(queries, together, 1 + len(self.members))
        self._tell_idle(len(parts), queries, together)
        busy = list(zip(self.members, parts[1:], strict=False))
        probe = self.replica.probe()
        for member, some in busy:
            member.ask(self.journal, self.replica.head, probe, batched, some)
        found: list[Tensor] = []
        reasons: list[CannotBatch] = []
        for measure in (lambda: share(parts[0]), *(member.losses for member, _ in busy)):
            try:
                found.append(measure())
            except CannotBatch as reason:  # all answers are read before the same is asked in another way
                reasons.append(reason)
        if reasons:
            raise reasons[0]
        return torch.cat(found)

    def _tell_idle(self, busy: int, queries: int, together: int) -> None:
        places = 1 + len(self.members)
        if busy < places and not self._told_idle:
            self._told_idle = True
            warnings.warn(
                f"{places - busy} of {places} devices stay idle: {queries} queries fill whole passes {together} at a "
                "time; raise queries or lower perturbations-per-pass (both are part of the result)",
                stacklevel=2,
            )

    def close(self) -> None:
        for member in self.members:
            member.close()


class Member:
    """One process, and the pipe to it.

    process: None for a rank, which torchrun started. head: chain of a fresh replica. place: how messages call this one.
    patience: seconds that an answer may take.
    """

    def __init__(
        self, process: BaseProcess | None, pipe: Connection, head: bytes, place: str, folder: Path, patience: float
    ) -> None:
        self.process, self.pipe, self.head, self.place, self.folder = process, pipe, head, place, folder
        self.patience = patience
        self._sent = 0  # entries of the journal

    def ask(self, journal: Journal, head: bytes, probe: bytes, batched: bool, some: slice) -> None:
        """Have it catch up with `head` and measure some of the queries of the round after."""
        missing = journal.entries[self._sent :]
        count = position(missing, self.head, head)
        assert count is not None, "a run's replica only moves forward, along its journal"
        raw = bodies(missing[:count])
        with suppress(OSError):  # it is gone, which reading its answer tells
            self.pipe.send_bytes(_REQUEST.pack(self.head, head, probe, batched, some.start, some.stop) + raw)
        self._sent, self.head = self._sent + count, head

    def losses(self) -> Tensor:
        """Its answer: (queries, steps), bit for bit. Raises CannotBatch, or UserError where it failed or hangs."""
        try:
            if not self.pipe.poll(self.patience):
                raise self._failure(
                    f"has not answered for round-timeout = {self.patience:g} seconds (it hangs, or that is too short)"
                )
            answer = self.pipe.recv_bytes()
        except (EOFError, OSError) as error:
            how = "has gone"
            if self.process:
                self.process.join(5)
                status = self.process.exitcode or 0
                how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            raise self._failure(f"{how} (out of memory, perhaps)") from error
        kind, body = answer[:1], answer[1:]
        if kind == _CANNOT_BATCH:
            raise CannotBatch(body.decode())
        if kind == _FAILED:
            raise self._failure(f"failed: {body.decode()}")
        rows, values = struct.unpack_from("<I", body)[0], bytearray(body[4:])
        return torch.frombuffer(values, dtype=_TYPES[kind]).view(rows, -1)

    def _failure(self, what: str) -> UserError:
        go_on = RunFolder(self.folder).go_on()
        if not self.process:
            return UserError(f"{self.place} {what}; mend that, then continue with: torchrun ... -m {go_on}")
        return UserError(
            f"{self.place} {what}; mend that, or leave its device out of devices in {self.folder / 'settings.toml'}, "
            f"then continue with: {go_on}"
        )

    def close(self) -> None:
        """End the process, which holds nothing that is not elsewhere; a rank ends itself at its pipe's end."""
        self.pipe.close()
        if self.process:
            self.process.kill()
            self.process.join()


def read_by(task: Task, replica: Replica) -> dict[str, Any]:
    """All that must be the same in two processes that measure for one run."""
    return pins.of(task) | {"model": genesis_chain(replica.genesis).hex()}


def check_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], place: str) -> None:
    """Raise UserError where a rank read something else than rank 0."""
    known = json.loads(json.dumps(ours))
    if different := [key for key in sorted(known | dict(theirs)) if known.get(key) != theirs.get(key)]:
        raise UserError(
            f"{place} has another {', '.join(different)} than rank 0: give all ranks the same command, model and data"
        )


def check_ranks(settings: Settings, *, is_served: bool = False) -> None:
    """Raise UserError where torchrun started processes that cannot help a run of these settings."""
    if torchrun.place().world == 1:
        return
    if torchrun.place().rank and not is_served:
        raise UserError("under torchrun rank 0 alone runs, and the others measure for it: use zofed train")
    if settings.mode != "zo":
        raise UserError(f"torchrun's processes share the queries of mode zo: run mode = {settings.mode!r} without it")
    if settings.placement == "auto":
        raise UserError(
            "placement = 'auto' takes all GPUs of this machine for one process, and torchrun starts several: leave "
            "torchrun out, or set placement to none"
        )
    if settings.devices:
        raise UserError(
            f"devices = {settings.devices!r} and torchrun both split the queries: leave devices out, or torchrun"
        )


def serve_rank(settings: Settings) -> None:
    """What a rank of torchrun's but the first does: load, then measure what rank 0 asks for until that has gone.

    Raises UserError as a run of these settings does before its first step.
    """
    check_ranks(settings, is_served=True)
    prepare_process(settings.threads)
    if settings.device in ("auto", "cuda") and torch.cuda.is_available():
        local, count = torchrun.place().local, torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"torchrun started more processes here than there are CUDA devices, {count}: set --nproc-per-node to "
                f"{count} or less, or device to cpu"
            )
        settings = settings.model_copy(update={"device": f"cuda:{local}"})
    warnings.simplefilter("ignore")  # rank 0 says the same
    task = Task.load(with_absolute_paths(settings))
    replica, examples = task.replica(), task.shard(0, 1)
    if pipe := ranks.joined(read_by(task, replica)):
        with _failures_told(pipe):
            _answer_all(pipe, _requests(pipe), task.settings, replica, examples)


def start(settings: Settings, device: str, digests: dict[str, str]) -> tuple[BaseProcess, Connection]:
    """A new process that serves a run's requests on a device, and the pipe to it. digests: of the data the run read."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    written = settings.model_copy(update={"device": device, "devices": ""}).model_dump_json(by_alias=True)
    process = context.Process(target=serve, args=(theirs, written, digests), daemon=True)
    # Ctrl-C reaches the whole group of processes, but is for this one to answer. Python's own helper comes first:
    # starting it unblocks the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return process, ours


def serve(pipe: Connection, written: str, digests: dict[str, str]) -> None:
    """What a process does: build the task, then answer one request after the other until its pipe ends.

    written: the run's settings with this process's device, as JSON. digests: of the data that the run read.
    """
    requests = _requests(pipe)
    warnings.simplefilter("ignore")  # the run itself says the same
    with _failures_told(pipe):
        settings = Settings.model_validate_json(written)
        prepare_process(settings.threads)
        task = Task.load(settings)
        if pins.digests(task) != digests:
            raise UserError("it read other data than the run, which changed since: bring them back")
        replica, examples = task.replica(), task.shard(0, 1)
        _answer_all(pipe, requests, settings, replica, examples)


Requests = queue.SimpleQueue[bytes]


def _requests(pipe: Connection) -> Requests:
    """What comes through a pipe, read by a thread, which ends this process with the pipe."""
    requests: Requests = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, requests), daemon=True).start()
    return requests


@contextmanager
def _failures_told(pipe: Connection) -> Iterator[None]:
    """An error inside is sent through the pipe in one line; then its end is waited for."""
    with suppress(OSError):  # nobody reads any more
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            pipe.send_bytes(_FAILED + " ".join(f"{kind}{error}".split()).encode())
    threading.Event().wait()


def _answer_all(
    pipe: Connection, requests: Requests, settings: Settings, replica: Replica, examples: Examples
) -> NoReturn:
    while True:
        pipe.send_bytes(_answer(settings, replica, examples, requests.get()))


def _read(pipe: Connection, requests: Requests) -> None:
    """Pass requests on; at the pipe's end the run is gone, and so goes this process, in the middle of a pass or not."""
    try:
        while True:
            requests.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _answer(settings: Settings, replica: Replica, examples: Examples, request: bytes) -> bytes:
    after, head, probe, batched, start, stop = _REQUEST.unpack_from(request)
    arrived = catch_up(replica, after, request[_REQUEST.size :])
    if not arrived or replica.head != head or replica.probe() != probe:
        raise UserError("its weights are not the run's: report this as a bug")
    try:
        found = measurements.raw_losses(settings, replica, examples, 0, slice(start, stop), batched)
    except CannotBatch as reason:
        return _CANNOT_BATCH + str(reason).encode()
    kind = next(kind for kind, dtype in _TYPES.items() if dtype == found.dtype)
    return kind + struct.pack("<I", len(found)) + bytes(raw_bytes(found))
