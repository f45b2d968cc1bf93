"""Sweeps on a Ray cluster: what a node must have, what has no cluster, and a node that dies on the way."""

import csv
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import NODE, SWEEP, ZOFED, ray_cluster, runs
from zofed.base.errors import UserError
from zofed.experiments import sweep_process, sweep_ray
from zofed.experiments.sweep_folder import LOCK, SweepFolder

Command = Callable[..., tuple[int, str, str]]

SMALL = f"""{SWEEP}
steps = 60
eval-interval = 10
save-interval = 10
[grid]
mode = ["zo", "fo"]
"""


def nodes(*resources: dict[str, float]) -> Callable[[], list[dict[str, Any]]]:
    return lambda: [{"Resources": own, "NodeManagerHostname": "here", "NodeID": ""} for own in resources]


@pytest.mark.parametrize(
    ("base", "parallel", "share", "places"),
    [
        ({}, None, 0.0, 12),
        ({}, 3, 0.0, 3),
        ({"threads": 3}, None, 0.0, 3),  # two and one: the rest of a node is no place
        ({}, None, 1.0, 2),
        ({}, None, 0.3, 6),
        ({"threads": 4}, None, 0.25, 2),
        ({"devices": "cuda:0,cuda:1"}, None, 0.0, 1),
    ],
)
def test_a_cluster_takes_as_many_runs_as_its_nodes_have_resources(
    monkeypatch: pytest.MonkeyPatch, base: dict[str, Any], parallel: int | None, share: float, places: int
) -> None:
    monkeypatch.setattr(sweep_ray, "nodes", nodes({"CPU": 8, "GPU": 2}, {"CPU": 4}))
    assert sweep_ray.Cluster(parallel, share).places(runs(**base)) == places


def test_a_cluster_without_room_is_told_at_once_and_later_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_ray, "nodes", nodes({"CPU": 2}))
    with pytest.raises(
        UserError, match=r"asks for 3 CPUs \(threads\) and 0.5 GPUs: the nodes have 2 and 0; ask for less"
    ):
        sweep_ray.Cluster(None, 0.5).places(runs(threads=3))
    cluster = sweep_ray.Cluster(None, 0.0)
    assert cluster.places(runs(threads=2)) == 1
    monkeypatch.setattr(sweep_ray, "nodes", nodes())
    assert cluster.places(runs()) == 0, "another node may come"
    monkeypatch.setattr(sweep_ray, "ALONE", 0.0)
    with pytest.raises(UserError, match="no node of the Ray cluster can take a run"):
        cluster.places(runs())


def test_a_node_must_have_the_code_and_see_the_folder_and_its_lock(tmp_path: Path) -> None:
    code, folder = sweep_ray._code(), SweepFolder(tmp_path / "shared")
    lock = str(folder.path / LOCK)
    assert f"does not see the sweep's folder {folder.path}" in sweep_ray.what_is_wrong(lock, code)
    with folder.opened():
        assert sweep_ray.what_is_wrong(lock, code) == ""
        assert "it has zofed 0" in sweep_ray.what_is_wrong(lock, "0.0.9 abc")
    assert "is another one, or the file system does not share locks" in sweep_ray.what_is_wrong(lock, code)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS = '127.0.0.1:1' .*: start one with `ray start --head`"),
        ("nonsense:x", "no Ray cluster answers at RAY_ADDRESS = 'nonsense:x' "),
        ("ray://127.0.0.1:1", "start the sweep on a node of the cluster"),
    ],
)
def test_where_there_is_no_cluster_it_is_told_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, address: str, what: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=what), sweep_ray.connected(None, 0.0):
        pass
    with pytest.raises(UserError, match=r"--gpus-per-run 1.5: give a share"), sweep_ray.connected(None, 1.5):
        pass


def hold(log: str, seconds: float, held: Any) -> None:
    with open(log, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        held.set()
        time.sleep(seconds)


def test_a_run_waits_for_an_earlier_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, context = str(tmp_path / "run.log"), multiprocessing.get_context("fork")
    held = context.Event()
    earlier = context.Process(target=hold, args=(log, 1.0, held))
    earlier.start()
    assert held.wait(20)
    with open(log, "ab") as file:
        monkeypatch.setattr(sweep_process, "EARLIER", 0.0)
        with pytest.raises(UserError, match="another process carries this run out"):
            sweep_process.hold_log(file.fileno(), log)
        monkeypatch.setattr(sweep_process, "EARLIER", 60.0)
        sweep_process.hold_log(file.fileno(), log)
        earlier.join(0.2)
        assert not earlier.is_alive()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with ray_cluster(monkeypatch) as found:
        yield found


def begin(out: Path, file: Path, address: str) -> "subprocess.Popen[str]":
    command = [*ZOFED, "sweep", str(file), "--out", str(out), "--engine", "ray"]
    environment = os.environ | {"RAY_ADDRESS": address}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def steps(out: Path) -> dict[str, list[int]]:
    """Steps in the metrics of each run that has some."""
    found = {}
    for path in out.glob("runs/*/metrics.csv"):
        with open(path) as file:
            found[path.parent.name] = [int(row["step"]) for row in csv.DictReader(file)]
    return found


def wait(process: "subprocess.Popen[str]", until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not until():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_of_a_node_that_dies_go_on_elsewhere_to_the_same_weights(
    tmp_path: Path, zofed_command: Command, cluster: Any
) -> None:
    node = cluster.add_node(**NODE)
    file, out = tmp_path / "sweep.toml", tmp_path / "ray"
    file.write_text(SMALL.replace("steps = 60", "steps = 200"))  # a node that is slow to begin finds the other at work
    process = begin(out, file, cluster.address)
    wait(process, lambda: sum(2 < len(done) < 150 for done in steps(out).values()) == 2)  # one on either node
    cluster.remove_node(node, allow_graceful=False)
    told, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "4 runs complete, 0 of them before; 0 failed" in told, told + errors
    lost = [line.split()[2] for line in errors.splitlines() if "lost its node" in line]
    assert len(lost) == 1 and len(errors.splitlines()) == 1, errors
    for name, found in steps(out).items():
        assert found == list(range(201)), name
        starts = (out / "logs" / f"{name}.log").read_text().count("data: ")
        assert starts == 1 + (name in lost), f"{name} was begun {starts} times"
    assert zofed_command("sweep", file, "--out", tmp_path / "fork")[0] == 0
    assert outcome(out) == outcome(tmp_path / "fork")


def outcome(out: Path) -> list[dict[str, str]]:
    """The rows of a sweep's summary but for what is measured, each with its run's weights and journal."""
    with open(out / "summary.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        summary = json.loads((out / "runs" / row["run"] / "summary.json").read_text())
        row |= {key: summary[key] for key in ("digest", "journal_head")}
        del row["seconds"], row["peak_memory_bytes"]
    return rows


@pytest.mark.slow
def test_ctrl_c_cancels_the_tasks_and_says_how_to_go_on(tmp_path: Path, cluster: Any) -> None:
    file, out = tmp_path / "sweep.toml", tmp_path / "ray"
    file.write_text(SMALL.replace("steps = 60", "steps = 100000"))
    process = begin(out, file, cluster.address)
    wait(process, lambda: any(len(done) > 2 for done in steps(out).values()))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert errors == f"zofed: interrupted; continue with: zofed sweep {out / 'sweep.toml'} --out {out} --engine ray\n"
    done = steps(out)
    (name,) = done
    assert json.loads((out / "runs" / name / "summary.json").read_text())["status"] == "interrupted"
    time.sleep(1)
    assert steps(out) == done, "the run went on"
