"""A step's queries split over processes: the same records, whatever happens to the processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from federations import ignore, records_of
from torch import Tensor

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import journal
from zofed.core.estimators import FiniteDifference
from zofed.core.perturbed import CannotBatch
from zofed.federated import server
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row, read_table
from zofed.training import central, device_pool, pins
from zofed.training.task import Task

Quick = Callable[..., Settings]


class NearProcess:
    """What stands for a process that answers within this one, which takes no seconds to start."""

    exitcode = 0

    def kill(self) -> None: ...

    def join(self, timeout: float | None = None) -> None: ...


class NearPipe:
    """Answers each request at once, from a task and a replica of its own."""

    def __init__(self, settings: Settings, device: str, cannot_batch: bool) -> None:
        self.settings = settings.model_copy(update={"device": device, "devices": ""})
        task = Task.load(self.settings)
        self.replica, self.examples = task.replica(), task.shard(0, 1)
        self.cannot_batch = cannot_batch
        self.sizes: list[int] = []
        self.answers: list[bytes] = []

    def send_bytes(self, request: bytes) -> None:
        self.sizes.append(len(request))
        is_batched = device_pool._REQUEST.unpack_from(request)[3]
        if self.cannot_batch and is_batched:
            self.answers.append(b"cit looks at its numbers")
        else:
            self.answers.append(device_pool._answer(self.settings, self.replica, self.examples, request))

    def poll(self, timeout: float) -> bool:
        return bool(self.answers)

    def recv_bytes(self) -> bytes:
        return self.answers.pop(0)

    def close(self) -> None:
        assert not self.answers, "an answer was left unread"


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> list[NearPipe]:
    """Pools without processes; the pipes they made. Those whose index is in `refusing` cannot batch."""
    pipes: list[NearPipe] = []

    def start(settings: Settings, device: str, digests: dict[str, str]) -> tuple[Any, Any]:
        assert digests == pins.digests(Task.load(settings))
        pipes.append(NearPipe(settings, device, cannot_batch=len(pipes) in refusing))
        return NearProcess(), pipes[-1]

    monkeypatch.setattr(device_pool, "start", start)
    return pipes


refusing: set[int] = set()


def losses_of(out: Path) -> list[str]:
    return [row["loss"] for row in read_table(out / "metrics.csv")]


def as_number(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """An objective that gives float64 and, looking at its numbers, cannot run for many copies at once."""
    return torch.tensor(float(model(**batch).loss) / 3, dtype=torch.float64)


WAYS: dict[str, dict[str, Any]] = {
    "one-sided": {"queries": 7, "perturbations_per_pass": 2},
    "two-point": {"queries": 7, "perturbations_per_pass": 3, "finite_difference": "two-point"},
    "fewer passes than devices": {"queries": 7, "perturbations_per_pass": 4},
    "per-query data": {"queries": 5, "perturbations_per_pass": 2, "query_batches": "per-query", "query_batch_size": 1},
    "rademacher": {"directions": "rademacher", "queries": 4},
    "cannot batch": {"queries": 4, "objective": "test_pool:as_number"},
    "bfloat16, sizes": {"dtype": "bfloat16", "epsilon": 1e-2, "direction_scale": "rms", "perturbations_per_pass": 1},
}


@pytest.mark.first(1)
@pytest.mark.filterwarnings("ignore:the loss cannot run", "ignore:.*stay idle", "ignore:with epsilon")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_any_number_of_devices_gives_the_same_records(
    quick: Quick, tmp_path: Path, near: list[NearPipe], way: dict[str, Any]
) -> None:
    alone = central.train(quick(steps=3, **way), tmp_path / "1", ignore)
    assert near == []
    for count in (2, 3):
        devices = ",".join(["cpu"] * count)
        several = central.train(quick(steps=3, devices=devices, **way), tmp_path / str(count), ignore)
        assert several["digest"] == alone["digest"] == several["replay_digest"]
        assert several["forward_passes"] == alone["forward_passes"]
        assert records_of(tmp_path / str(count)) == records_of(tmp_path / "1")
        assert losses_of(tmp_path / str(count)) == losses_of(tmp_path / "1")
    assert len(near) == 3
    assert all(pipe.sizes for pipe in near[:2]), "the others must have had a share"
    assert len(records_of(tmp_path / "1")) == 3


def test_only_new_records_cross_the_pipe(quick: Quick, tmp_path: Path, near: list[NearPipe]) -> None:
    central.train(quick(devices="cpu,cpu", perturbations_per_pass=1), tmp_path / "run", ignore)
    sizes = [len(journal.bodies([entry])) for entry in journal.read(RunFolder(tmp_path / "run").journal).entries]
    assert near[0].sizes == [device_pool._REQUEST.size + size for size in (0, *sizes[:-1])]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("cpu,cpu", "cpu,cpu,cpu"), ("cpu,cpu", ""), ("", "cpu,cpu")])
def test_a_run_goes_on_with_another_number_of_devices(
    quick: Quick, tmp_path: Path, near: list[NearPipe], before: str, after: str
) -> None:
    """Cut after the checkpoint of step 4: the run goes on from there, its processes from the base."""

    def cut(row: Row) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    whole = central.train(quick(queries=4, perturbations_per_pass=1), tmp_path / "whole", ignore)
    settings = quick(queries=4, perturbations_per_pass=1, devices=before)
    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "cut", cut)
    with_devices(tmp_path / "cut", after)
    resumed = central.resume(tmp_path / "cut", ignore)
    assert resumed["digest"] == whole["digest"]
    assert records_of(tmp_path / "cut") == records_of(tmp_path / "whole")


def with_devices(run: Path, devices: str) -> None:
    """Edit the settings of a run as its owner would."""
    values = config.read_toml(run / "settings.toml")
    (run / "settings.toml").write_text(tomli_w.dumps(values | {"devices": devices}))


@pytest.mark.slow
def test_where_one_cannot_batch_none_does(
    quick: Quick, tmp_path: Path, near: list[NearPipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = quick(steps=2, queries=5, perturbations_per_pass=2, devices="cpu,cpu,cpu")
    monkeypatch.setattr(sys.modules[__name__], "refusing", {0})
    with pytest.warns(UserWarning, match="it looks at its numbers") as told:
        several = central.train(settings, tmp_path / "several", ignore)
    assert len(told) == 1

    def refuse(*_: Any) -> Any:
        raise CannotBatch("no")

    monkeypatch.setattr(FiniteDifference, "_batched", refuse)
    with pytest.warns(UserWarning, match="cannot run"):
        alone = central.train(settings.model_copy(update={"devices": ""}), tmp_path / "alone", ignore)
    assert several["digest"] == alone["digest"]


def test_idle_devices_are_told_once(quick: Quick, tmp_path: Path, near: list[NearPipe]) -> None:
    with pytest.warns(UserWarning, match="1 of 3 devices stay idle: 5 queries fill whole passes 3 at a time") as told:
        central.train(
            quick(steps=2, queries=5, perturbations_per_pass=3, devices="cpu,cpu,cpu"), tmp_path / "run", ignore
        )
    assert len(told) == 1
    assert near[0].sizes and not near[1].sizes


def test_a_diverged_run_is_told_as_on_one_device(quick: Quick, tmp_path: Path, near: list[NearPipe]) -> None:
    told = []
    for devices in ("", "cpu,cpu"):
        settings = quick(learning_rate=1e30, devices=devices, perturbations_per_pass=1, eval_interval=100)
        with pytest.raises(UserError) as error:
            central.train(settings, tmp_path / f"run {devices}", ignore)
        told.append(str(error.value))
    assert "is not finite: training diverged" in told[0]
    assert told[0] == told[1]


def test_a_replica_that_went_wrong_is_found(quick: Quick, tmp_path: Path, near: list[NearPipe]) -> None:
    def spoil(row: Row) -> None:
        if row["step"] == 2:
            with torch.no_grad():
                next(iter(near[0].replica.parameters.values())).mul_(1.001)

    with pytest.raises(UserError, match="its weights are not the run's"):
        central.train(quick(devices="cpu,cpu", perturbations_per_pass=1), tmp_path / "run", spoil)


@pytest.mark.parametrize("queries", [1, 5, 8, 32])
@pytest.mark.parametrize("together", [1, 3, 4])
@pytest.mark.parametrize("places", [1, 2, 3, 40])
def test_shares_cover_all_queries_in_order_and_no_pass_twice(queries: int, together: int, places: int) -> None:
    parts = device_pool.shares(queries, together, places)
    assert [query for part in parts for query in range(part.start, part.stop)] == list(range(queries))
    assert all(part.start % together == 0 and part.start < part.stop for part in parts)
    assert len(parts) == min(places, -(-queries // together))
    passes = [-(-(part.stop - part.start) // together) for part in parts]
    assert max(passes) - min(passes) <= 1


@pytest.mark.parametrize(
    ("points", "copies", "expected"),
    [("one-sided", 8, 8), ("two-point", 8, 4), ("two-point", 3, 3), ("one-sided", 1, 1)],
)
def test_the_fewest_queries_that_fill_whole_passes(points: Any, copies: int, expected: int) -> None:
    how = FiniteDifference("rank1", 0.1, points, copies)
    assert how.together(batched=True) == expected
    assert how.together(batched=False) == FiniteDifference("gaussian", 0.1, points, copies).together(True) == 1


@pytest.mark.parametrize("devices", ["gpu", "cpu;cpu", "cpu,", "auto,cpu", "cuda:x"])
def test_a_list_that_is_none_is_refused(devices: str) -> None:
    with pytest.raises(UserError, match=f"devices = '{devices}'.*comma|devices = '{devices}'.*cuda:0,cuda:1"):
        config.resolve({"devices": devices})


@pytest.mark.parametrize("mode", ["fo", "instruct", "calibrate", "subspace"])
def test_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(UserError, match=f"devices = 'cpu,cpu' takes mode = zo: {mode}"):
        config.resolve({"devices": "cpu,cpu", "mode": mode})


def test_a_federated_run_is_refused(quick: Quick, tmp_path: Path) -> None:
    settings = quick(devices="cpu,cpu", out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="devices = 'cpu,cpu' does not split a federated run"):
        server.run(None, settings, "")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_there_is_refused(quick: Quick, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"devices = 'cpu,cuda:63': this machine has . CUDA devices; set devices"):
        central.train(quick(devices="cpu,cuda:63"), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_is_told_and_the_run_goes_on(quick: Quick, tmp_path: Path) -> None:
    """Real processes: their losses are those of one device up to the kill, and after it."""
    way = {"queries": 7, "perturbations_per_pass": 2, "steps": 4}
    alone = central.train(quick(**way), tmp_path / "alone", ignore)

    def kill(row: Row) -> None:
        if row["step"] == 2:
            children = multiprocessing.active_children()
            assert len(children) == 2
            max(children, key=lambda child: child.pid or 0).kill()

    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"process 2 of 2, on cpu, was killed by signal 9 .*--resume") as told:
        central.train(quick(devices="cpu,cpu,cpu", **way), run, kill)
    assert "\n" not in str(told.value) and str(run / "settings.toml") in str(told.value)
    assert multiprocessing.active_children() == []
    assert RunFolder(run).summary()["status"] == "failed"
    assert records_of(run) == records_of(tmp_path / "alone")[:2]
    with_devices(run, "")
    assert central.resume(run, ignore)["digest"] == alone["digest"]


@pytest.mark.parametrize(("asked", "waited"), [(0.25, 0.25), (1e30, 1e6)])
def test_a_process_that_hangs_is_told_after_the_timeout_and_ended(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: float, waited: float
) -> None:
    """It takes requests, and neither answers nor dies; its pipe is a real one, which would wait for ever."""
    waits: list[float] = []
    ended: list[str] = []

    class Hanging(NearProcess):
        def kill(self) -> None:
            ended.append("killed")

        def join(self, timeout: float | None = None) -> None:
            ended.append("joined")

    class Silent:
        def __init__(self) -> None:
            self.ours, self.theirs = multiprocessing.Pipe()
            self.send_bytes, self.recv_bytes, self.close = self.ours.send_bytes, self.ours.recv_bytes, self.ours.close

        def poll(self, timeout: float) -> bool:
            waits.append(timeout)
            return self.ours.poll(min(timeout, 0.25))

    monkeypatch.setattr(device_pool, "start", lambda *_: (Hanging(), Silent()))
    run = tmp_path / "run"
    told = rf"^process 1 of 2, on cpu, has not answered for round-timeout = {waited:g} seconds .*--resume {run}$"
    with pytest.raises(UserError, match=told.replace("+", r"\+")):
        central.train(quick(devices="cpu,cpu,cpu", perturbations_per_pass=1, round_timeout=asked), run, ignore)
    assert waits == [waited]
    assert ended == ["killed", "joined"] * 2
    assert RunFolder(run).summary()["status"] == "failed"


def test_the_wait_of_a_pipe_may_be_as_long_as_the_longest() -> None:
    ours, theirs = multiprocessing.Pipe()
    theirs.send_bytes(b"x")
    assert ours.poll(device_pool.LONGEST_WAIT)


@pytest.mark.slow
def test_a_process_that_fails_says_why(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "digests", lambda _: {"documents": "as they were before"})
    run = tmp_path / "run"
    with pytest.raises(UserError, match="process 1 of 1, on cpu, failed: it read other data than the run"):
        central.train(quick(devices="cpu,cpu", perturbations_per_pass=1), run, ignore)
    assert multiprocessing.active_children() == []


def descendants(pid: int) -> set[int]:
    """Ids of the processes below one, from /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found, grew = {pid}, True
    while grew:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grew = found | more, bool(more)
    return found - {pid}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("ending", ["killed", "killed in a pass", "interrupted", "interrupted at the start"])
def test_no_process_outlives_the_run(corpus: Path, tmp_path: Path, ending: str) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", "from zofed.commands.cli import main; main()", "train", "--dataset", str(corpus)]
    command += ["--steps", "100000", "--queries", "4", "--perturbations-per-pass", "1", "--devices", "cpu,cpu,cpu"]
    command += ["--eval-examples", "4", "--save-interval", "0", "--out", str(run)]
    command += ["--block-size", "64", "--batch-size", "256"] if ending == "killed in a pass" else ["--block-size", "16"]
    rows = 0 if ending in ("interrupted at the start", "killed in a pass") else 3
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while len(descendants(process.pid)) < 3 or lines_of(run / "metrics.csv") < 1 + rows:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            if ending == "killed in a pass":
                time.sleep(15)  # until the processes have loaded and measure
            below = descendants(process.pid)
            if ending.startswith("killed"):
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == (-signal.SIGKILL if ending.startswith("killed") else 130)
    assert b"Traceback" not in errors, errors.decode()
    deadline = time.monotonic() + 5
    while left := {pid for pid in below if is_alive(pid)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0
