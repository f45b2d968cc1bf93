"""A SuperLink with many real SuperNodes on one machine: seconds and CPU of a round, what each process holds.

python -m benchmarks.nodes --nodes 64          TLS and a key for each node, as zofed superlink wants them
python -m benchmarks.nodes --nodes 64 --insecure

Each node is a SuperNode of its own (a process, a key, a connection), forked from one that has loaded Flower. One
process answers the messages of all, where separate machines would have a worker each: the passes of `tiny` are not
what is measured. It stops short of the number wanted where less than 8 GiB would be left of the machine's memory.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks import common, crowd, deployment
from benchmarks.deployment import Lab, wait_until
from zofed.base.files import ROOT
from zofed.deployment import flower_commands, keys, processes, warm_worker
from zofed.federated import client
from zofed.federated.flower_internals import Runtime

LEFT_FREE = 8 * 2**30  # bytes
NODE = 90 * 2**20  # that a forked SuperNode holds of its own, at most
ENROLLED_S = 15.0  # for a key: flwr supernode register is a process that loads Flower
SKIPPED = 2  # rounds, in which the model is loaded


class Full(Lab):
    """A SuperLink with `count` SuperNodes forked from one process, and the process that answers for them."""

    def __init__(self, folder: Path, count: int, *, insecure: bool) -> None:
        super().__init__(folder)
        self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.count, self.insecure = count, insecure
        self.ports = _free_ports(count)
        self.enrolled = 0.0  # seconds that the keys took

    def __enter__(self) -> "Full":
        began = time.monotonic()
        if self.insecure:
            command = ["superlink", "--insecure", "--port", str(self.port), "--state", str(self.folder / "superlink")]
            self.start("superlink", [str(flower_commands.tool("zofed")), *command, "--name", "lab"])
            wait_until(self._answers, "the SuperLink answers")
        else:
            keys.make(self.keys, [self.host], [f"node{index}" for index in range(self.count)])
            self.superlink(ENROLLED_S * self.count)
        self.enrolled = time.monotonic() - began
        module = [sys.executable, "-m", "benchmarks.many_supernodes", f"{self.host}:{self.port}"]
        folder = "" if self.insecure else str(self.keys)
        self.start("nodes", [*module, folder, str(self.folder), *self.ports])
        self.start("worker", [sys.executable, "-m", "benchmarks.nodes", "--answer", *self.ports])
        wait_until(lambda: self.connected() >= self.count, "all nodes are connected", 60 + 5 * self.count)
        return self

    def connected(self) -> int:
        """SuperNodes that the SuperLink has given an id."""
        logs = [self.folder / f"node{index}.log" for index in range(self.count)]
        return sum(log.exists() and "SuperNode ID" in log.read_text(errors="replace") for log in logs)

    def roles(self) -> dict[str, list[int]]:
        """Process ids by role."""
        found = {name: [pid] for name, pid in self.pids().items() if name in ("superlink", "serverapp")}
        parent = self.processes["nodes"].pid
        nodes = [pid for pid, above, _ in processes.process_table() if above == parent]
        return found | {"nodes": nodes, "worker": [self.processes["worker"].pid]}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the processes of a role hold and have used. pss: bytes, of which shared ones count for a part each."""

    pss: int
    descriptors: int
    cpu: float

    @classmethod
    def of(cls, pids: Sequence[int]) -> "Seen":
        pss = descriptors = 0
        cpu = 0.0
        for pid in pids:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            pss += 1024 * int(re.search(r"Pss:\s+(\d+)", rollup)[1])  # type: ignore[index]
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return cls(pss, descriptors, cpu)


def answer(ports: Sequence[str]) -> None:
    """Take the tasks of all SuperNodes in turn, as a worker takes those of one."""
    runtimes = [Runtime(f"127.0.0.1:{port}") for port in ports]
    began = time.monotonic()
    while True:
        has_worked = False
        for runtime in runtimes:
            try:
                task = runtime.acquire()
            except httpx.HTTPError:  # it starts, or has gone
                continue
            if task is not None:
                warm_worker.work(task, "cpu")
                has_worked, began = True, time.monotonic()
        if not has_worked:
            client.forget_after(time.monotonic() - began)
            time.sleep(warm_worker.SHORTEST_PAUSE_S)


def fitting(wanted: int) -> int:
    """How many SuperNodes leave enough of the memory that the machine has now."""
    text = Path("/proc/meminfo").read_text()
    available = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])  # type: ignore[index]
    return max(2, min(wanted, (available - LEFT_FREE) // NODE))


def report(folder: Path, count: int, rounds: int, *, insecure: bool) -> bool:
    """Print the row of one number of nodes, and the rows of its processes; whether its digest is the simulated one."""
    values: dict[str, Any] = {"rounds": rounds, "clients": count, "dataset": str(crowd.documents(folder))}
    values |= {"block_size": 8, "batch_size": 1, "eval_examples": 8, "round_timeout": 600}
    whole = deployment.simulated(folder / "simulated", **values)
    out = folder / "out"
    with Full(folder, count, insecure=insecure) as lab:
        run = lab.run(out, node_timeout=deployment.STARTED_S, **values)
        wait_until(lambda: deployment.rounds_done(out) >= SKIPPED, "the second round", 600)
        first, before = deployment.rounds_done(out), {role: Seen.of(pids) for role, pids in lab.roles().items()}
        wait_until(lambda: deployment.rounds_done(out) >= rounds - 1, "the last round but one", 3600)
        last, after = deployment.rounds_done(out), {role: Seen.of(pids) for role, pids in lab.roles().items()}
        lab.finish(run)
        state = sum(path.stat().st_size for path in (folder / "superlink").glob("state.db*"))
        enrolled = lab.enrolled
    same = "yes" if deployment.digests(out) == {whole} else "NO"
    seconds = deployment.told(deployment.seconds_a_round(out, SKIPPED))
    print(
        f"| {count} | {'no' if insecure else 'yes'} | {enrolled:.0f} | {rounds} | {seconds} | "
        f"{deployment.computing(out, SKIPPED):.2f} | {state / 2**20:.1f} | {same} |"
    )
    print("\n| process | memory (PSS), MiB at round 2 and at the end | descriptors | CPU seconds a round |")
    print("| --- | --- | --- | --- |")
    for role, seen in after.items():
        spent = (seen.cpu - before[role].cpu) / max(1, last - first)
        name = f"{count} SuperNodes" if role == "nodes" else role
        held = f"{before[role].pss / 2**20:,.0f}, {seen.pss / 2**20:,.0f}"
        print(f"| {name} | {held} | {before[role].descriptors}, {seen.descriptors} | {spent:.2f} |", flush=True)
    return same == "yes"


def _free_ports(count: int) -> list[str]:
    found: set[int] = set()
    while len(found) < count:
        found.add(flower_commands.free_port())
    return [str(port) for port in found]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nodes", description=__doc__)
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--insecure", action="store_true", help="no TLS, no keys")
    parser.add_argument("--keep", action="store_true", help="leave logs and results where they are")
    parser.add_argument("--answer", nargs="*", metavar="PORT", help="be the process that answers for these SuperNodes")
    given = parser.parse_args()
    if given.answer:
        answer(given.answer)
    count = fitting(given.nodes)
    print(common.machine(), flush=True)
    if count < given.nodes:
        print(f"{count} nodes, not {given.nodes}: more would leave less than 8 GiB of memory", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="zofed-nodes-"))
    print(f"logs and results: {folder}", file=sys.stderr)
    print(
        "| nodes | TLS, keys | until admitted, s | rounds | seconds a round | computing | SuperLink's database, MiB | "
        "digest as simulated |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    is_well = report(folder, count, given.rounds, insecure=given.insecure)
    if not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
