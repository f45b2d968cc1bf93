"""A SuperLink, two SuperNodes and their workers on loopback, with TLS and keys, by the commands a person would type."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from federations import Meddling, run

from zofed import config
from zofed.deployment import flower_commands, processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LIMIT_S = 120.0
ZOFED = str(flower_commands.tool("zofed"))


class Machines:
    """Processes of zofed's commands, each with a log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, flower_commands.free_port()
        self.environment = os.environ | {"FLWR_HOME": str(folder / "flower"), "OMP_NUM_THREADS": "1"}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: object, well: bool = True) -> str:
        done = subprocess.run(
            [ZOFED, *map(str, command)], env=self.environment, cwd=self.folder, capture_output=True, text=True,
            timeout=LIMIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert (done.returncode == 0) is well, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, *command: object, by: tuple[str, ...] = (ZOFED,)) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [*by, *map(str, command)], env=self.environment, cwd=self.folder, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def superlink(self) -> None:
        self.start("superlink", "superlink", "--port", self.port, "--name", "lab")

    def node(self, index: int, *more: object, key: str = "", by: tuple[str, ...] = (ZOFED,)) -> None:
        words = ["--ca", "keys/ca.crt", "--key", key or f"keys/nodes/node{index}.key", "--device", "cpu", *more]
        place = ["--partition-id", index, "--num-partitions", 2]
        self.start(f"node{index}", "supernode", "--superlink", f"localhost:{self.port}", *place, *words, by=by)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < limit, f"not within {LIMIT_S:g} s: {what}\n" + "\n".join(
                f"{name}: {self.log(name)[-1500:]}" for name in self.processes
            )
            time.sleep(0.1)

    def stop(self, name: str) -> int:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(30)

    def workers(self) -> list[int]:
        """Processes that answer this federation's messages."""
        return [pid for pid in self._all() if "worker" in self._words(pid)]

    def _all(self) -> set[int]:
        table = processes.process_table()
        ours = {process.pid for process in self.processes.values()}
        for _ in range(4):
            ours |= {pid for pid, parent, _ in table if parent in ours}
        return ours

    @staticmethod
    def _words(pid: int) -> list[str]:
        try:
            return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            return []


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path)
    try:
        yield made
    finally:
        everything = made._all()
        for name in list(made.processes):
            made.stop(name)
        left = [pid for pid in everything if processes.alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "processes were left behind"


QUICK = ["--clients", 2, "--queries", 4, "--block-size", 16, "--batch-size", 2, "--eval-examples", 8]


def test_separate_machines_give_the_weights_of_a_simulation(machines: Machines, tmp_path: Path) -> None:
    settings = [*QUICK, "--rounds", 5, "--save-interval", 0, "--device", "cpu", "--out"]
    machines.run("keys", "init", "localhost", "--node", "node0", "--node", "node1")
    machines.superlink()
    for index in range(2):
        machines.node(index)
    machines.until(lambda: all("is ready" in machines.log(f"node{i}") for i in range(2)), "the workers are ready")
    told = machines.run("run", "lab", *settings, "first")
    machines.run("simulate", *settings, "simulated")
    first, simulated = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "simulated"))
    assert first["digest"] == simulated["digest"] and first["digest"] in told
    assert set(first["client_digests"].values()) == {first["digest"]}
    before = machines.workers()
    assert len(before) == 2

    # another run on the same workers, of which one is killed in the middle; nothing is lost
    long = [*QUICK, "--rounds", 40, "--save-interval", 0, "--device", "cpu", "--out"]
    machines.start("run", "run", "lab", *long, "second")
    rounds = tmp_path / "second" / "rounds.csv"
    machines.until(lambda: rounds.exists() and rounds.read_text().count("\n") > 3, "round 3 of the second run")
    os.kill(before[0], signal.SIGKILL)
    machines.until(lambda: machines.processes["run"].poll() is not None, "the second run's end")
    assert machines.processes.pop("run").returncode == 0, machines.log("run")
    machines.run("simulate", *long, "simulated-second")
    second, simulated = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("second", "simulated-second")
    )
    assert second["digest"] == simulated["digest"]
    assert set(second["client_digests"].values()) == {second["digest"]}
    assert len(set(before) & set(machines.workers())) == 1  # the other kept its process over both runs

    # a node whose key is taken off the list is out, and is told why
    (tmp_path / "keys" / "enrolled" / "node1.pub").unlink()
    machines.until(lambda: "does not admit this node" in machines.log("node1"), "node 1 is refused")
    assert "Traceback" not in machines.log("node1")


def test_a_node_that_may_not_connect_says_why_and_waits(machines: Machines, tmp_path: Path) -> None:
    machines.run("keys", "init", "localhost", "--node", "node0")
    machines.run("keys", "node", "stranger", "--out", "strange")
    machines.node(0)  # before there is a SuperLink
    machines.until(lambda: "is the SuperLink running" in machines.log("node0"), "node 0 says what it waits for")
    machines.superlink()
    machines.node(1, key="strange/stranger.key")
    machines.until(lambda: "does not admit this node" in machines.log("node1"), "the stranger is refused")
    assert "copy stranger.pub into the folder keys/enrolled" in machines.log("node1")
    (tmp_path / "keys" / "enrolled" / "stranger.pub").write_text((tmp_path / "strange" / "stranger.pub").read_text())
    machines.until(lambda: all("is ready" in machines.log(f"node{i}") for i in range(2)), "both are in")
    assert machines.stop("node0") == 128 + signal.SIGTERM

    # what cannot be mended by waiting ends at once, with one line
    place = ["supernode", "--superlink", f"localhost:{machines.port}", "--partition-id", 0, "--num-partitions", 2]
    machines.run("keys", "init", "localhost", "--node", "x", "--out", "other")
    told = machines.run(*place, "--ca", "other/ca.crt", "--key", "keys/nodes/node0.key", well=False)
    assert "was not signed by" in told
    assert "does not speak TLS" not in told
    told = machines.run(*place, "--ca", "keys/ca.crt", "--key", "keys/nodes/nowhere.key", well=False)
    assert "nowhere.key" in told
    told = machines.run(*place, well=False)
    assert "give --ca and --key" in told
    told = machines.run(*place, "--insecure", "--dataset", "nowhere.jsonl", well=False)
    assert "--dataset" in told and "does not exist: client 0" in told
    told = machines.run(*place, "--insecure", "--device", "cuda:7", well=False)
    assert "cuda:7" in told
    told = machines.run("superlink", "--port", machines.port, well=False)
    assert "in use; choose another port" in told


# `zofed supernode` whose worker says five megabytes and a terminal's commands where it has slopes to tell.
LYING_NODE = """
import sys
from zofed.commands import cli
from zofed.deployment import supernode
true = supernode.worker_command
supernode.worker_command = lambda *words: [sys.executable, "worker.py", *true(*words)[1:]]
cli.main()
"""
LYING_WORKER = """
from dataclasses import replace
from zofed.commands import cli
from zofed.federated import messages
from zofed.federated.protocol import Answer
pack = messages.pack
lie = lambda told: replace(told, problem="\\x1b[2Jround 9/9" * 400_000) if isinstance(told, Answer) else told
messages.pack = lambda told: pack(lie(told))
cli.main()
"""


def test_a_policy_and_a_lying_client_are_told_by_name_over_tls(
    machines: Machines, tmp_path: Path, corpus: Path
) -> None:
    (tmp_path / "policy.toml").write_text('objectives = ["loss"]\nsmallest-batch = 2\nsnapshots = false\n')
    (tmp_path / "node.py").write_text(LYING_NODE)
    (tmp_path / "worker.py").write_text(LYING_WORKER)
    machines.run("keys", "init", "localhost", "--node", "node0", "--node", "node1")
    machines.superlink()
    machines.node(0, "--policy", "policy.toml")
    machines.node(1, by=(sys.executable, "node.py"))
    machines.until(lambda: all("is ready" in machines.log(f"node{i}") for i in range(2)), "the workers are ready")

    settings = [*QUICK, "--dataset", corpus, "--rounds", 3, "--save-interval", 0, "--device", "cpu", "--out"]
    beyond = "objective = 'accuracy', but this node's policy has objectives = [\"loss\"]: take loss, or have the node"
    told = machines.run("run", "lab", "--objective", "accuracy", *settings, "beyond", well=False)
    assert f"client 0: {beyond}" in told and f"refused: {beyond}" in machines.log("node0")

    told = machines.run("run", "lab", "--quorum", 1, *settings, "within")
    assert "client 1: malformed reply: 5,200," in told and "and what is asked for has 65,572 at most" in told
    assert "\x1b[2J" not in told
    within = json.loads((tmp_path / "within" / "summary.json").read_text())
    assert within["replies"] == {"0": {"used": 3}, "1": {"malformed": 3}}
    assert within["client_digests"] == dict.fromkeys("01", within["digest"])
    without = config.resolve(
        {"clients": 2, "quorum": 1, "dataset": str(corpus), "out": str(tmp_path / "without")}
        | {"queries": 4, "block-size": 16, "batch-size": 2, "eval-examples": 8, "rounds": 3, "save-interval": 0}
        | {"device": "cpu"}
    )
    alone = Meddling(without, 2)
    alone.before = lambda index, plan: 1 / (1 - index) if plan.task == "slopes" else None
    assert run((alone, without))["digest"] == within["digest"]
