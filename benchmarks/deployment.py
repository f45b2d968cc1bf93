"""Separate machines, as far as one machine shows them: real SuperLink, SuperNodes and workers, TLS and node keys.

python -m benchmarks.deployment rounds    seconds a round, stock SuperNodes and zofed's; digest as simulated
python -m benchmarks.deployment link      the same through a slow link: a proxy that delays and throttles
python -m benchmarks.deployment wire      bytes by interface counters, network namespaces (root): a run, and idle nodes
python -m benchmarks.deployment kills     worker, SuperNode, SuperLink, ServerApp killed with SIGKILL in a round
python -m benchmarks.deployment joining   a node comes at half the rounds, another goes
python -m benchmarks.deployment growth    memory and descriptors of every process over the rounds

Everything runs by the commands a person would type; each prints its table.
"""

import argparse
import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zofed import config
from zofed.deployment import flower_commands, key_files, keys, processes
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table

Values = dict[str, Any]

TINY: Values = {"queries": 8, "device": "cpu", "save-interval": 0, "eval-interval": 1000, "quantization-bits": 6}
STARTED_S = 90.0  # a SuperLink and its nodes are up after 15 s; a loaded machine gets more


class Lab:
    """A SuperLink and its nodes on this machine. Processes by role: `pids`."""

    def __init__(self, folder: Path, *, stock: bool = False, host: str = "127.0.0.1", port: int = 0) -> None:
        self.folder, self.stock, self.host = folder, stock, host
        self.port = port or flower_commands.free_port()
        self.keys = folder / "keys"
        self.environment = flower_commands.quiet_environment() | {
            "FLWR_HOME": str(folder / "flower"),
            "OMP_NUM_THREADS": "1",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Lab":
        if not self.keys.exists():
            keys.make(self.keys, [self.host], [f"node{index}" for index in range(4)])
        self.superlink()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.stop(name)

    def start(self, name: str, command: Sequence[str], within: Sequence[str] = ()) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*within, *command], env=self.environment, stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip

    def superlink(self, seconds: float = STARTED_S) -> None:
        """Start it. seconds: at most, until all keys are enrolled."""
        command = ["superlink", "--keys", str(self.keys), "--port", str(self.port), "--host", self.host]
        command += ["--state", str(self.folder / "superlink"), "--name", "lab"]
        self.start("superlink", [str(flower_commands.tool("zofed")), *command])
        wait_until(self._answers, "the SuperLink answers")
        count = len(key_files.enrolled(self.keys))
        log = self.folder / "superlink.log"  # a stock SuperNode whose key is not admitted yet gives up
        wait_until(lambda: log.read_text().count("may connect") >= count, "all keys are enrolled", seconds)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1):
            return True
        return False

    def node(self, index: int, of: int, address: str = "", within: Sequence[str] = (), **more: str) -> None:
        address = address or f"{self.host}:{self.port}"
        ca, key = self.keys / "ca.crt", self.keys / "nodes" / f"node{index}.key"
        if self.stock:
            command = [
                str(flower_commands.tool("flower-supernode")), "--superlink", address, "--root-certificates", str(ca),
                "--auth-supernode-private-key", str(key), "--port", str(flower_commands.free_port()),
                "--node-config", f"partition-id={index} num-partitions={of}",
            ]  # fmt: skip
        else:
            command = [
                str(flower_commands.tool("zofed")), "supernode", "--superlink", address, "--ca", str(ca),
                "--key", str(key), "--partition-id", str(index), "--num-partitions", str(of), "--device", "cpu",
            ]  # fmt: skip
            command += [word for name, value in more.items() for word in (f"--{name}", value)]
        self.start(f"node{index}", command, within)

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def pids(self) -> dict[str, int]:
        """Process ids by role: superlink, serverapp, node0, worker0, ..., without the shells around them."""
        table = processes.process_table()
        found: dict[str, int] = {}
        for name, process in self.processes.items():
            ours = {process.pid}
            for _ in range(4):
                ours |= {pid for pid, parent, _ in table if parent in ours}
            for pid in ours:
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                    line = " ".join(words)
                    if "flwr-serverapp" in line:
                        found["serverapp"] = pid
                    elif "flower-superlink" in line and "--database" in words:
                        found["superlink"] = pid
                    elif "zofed.federated.flower_internals" in line:
                        found[name] = pid
                    elif " worker " in line:
                        found[name.replace("node", "worker")] = pid
        return found

    def run(self, out: Path, **values: Any) -> subprocess.Popen[bytes]:
        """Start a run; `out` gets its folder."""
        options = [f"--{key.replace('_', '-')}={value}" for key, value in (TINY | values | {"out": out}).items()]
        with (self.folder / "run.log").open("ab") as log:
            return subprocess.Popen(
                [str(flower_commands.tool("zofed")), "run", "lab", *options], env=self.environment, stdout=log,
                stderr=log, cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def resume(self, out: Path) -> subprocess.Popen[bytes]:
        with (self.folder / "run.log").open("ab") as log:
            return subprocess.Popen(
                [str(flower_commands.tool("zofed")), "run", "lab", "--resume", str(out)], env=self.environment,
                stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
            )  # fmt: skip

    def finish(self, run: subprocess.Popen[bytes], seconds: float = 1200) -> None:
        """Wait for a run's good end."""
        if run.wait(seconds):
            sys.exit(f"the run failed: see {self.folder}\n" + (self.folder / "run.log").read_text()[-2000:])


def rounds_done(out: Path) -> int:
    path = out / "rounds.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = STARTED_S) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            sys.exit(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


def seconds_a_round(out: Path, skip: int = 2) -> list[float]:
    """Seconds of each round after the first ones, which load the model."""
    seconds = [float(row["seconds"]) for row in read_table(out / "metrics.csv")]
    return [b - a for a, b in zip(seconds[skip:], seconds[skip + 1 :], strict=False)]


def computing(out: Path, skip: int = 2) -> float:
    """Median over the rounds of the slowest client's seconds."""
    return statistics.median(float(row["seconds_compute"]) for row in read_table(out / "rounds.csv")[skip:])


def told(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def simulated(out: Path, **values: Any) -> str:
    """Digest of the same run in this process."""
    given = {key.replace("_", "-"): value for key, value in (TINY | values).items()}
    settings = config.resolve(given | {"out": str(out)})
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return server.run(LocalGrid(client.app, settings.clients, settings.model_dump(by_alias=True)), settings, "")[
            "digest"
        ]


def digests(out: Path) -> set[str]:
    """Weights at the end of a run: of the server, and of each client that was asked."""
    summary = RunFolder(out).summary()
    return {summary["digest"], *(digest for digest in summary["client_digests"].values() if digest)}


def rounds(folder: Path, count: int) -> None:
    print("| nodes | rounds | seconds a round, median (range) | computing | digest as simulated |")
    print("| --- | --- | --- | --- | --- |")
    medians = {}
    for stock, number in ((False, count), (True, 6)):
        place = folder / ("stock" if stock else "zofed")
        place.mkdir()
        whole = simulated(place / "simulated", rounds=number, clients=2)
        with Lab(place, stock=stock) as lab:
            for index in range(2):
                lab.node(index, 2)
            lab.finish(lab.run(place / "out", rounds=number, clients=2, node_timeout=STARTED_S))
        seconds = seconds_a_round(place / "out", 1 if stock else 2)
        medians[stock] = statistics.median(seconds)
        name = "stock SuperNodes" if stock else "zofed supernode"
        same = "yes" if digests(place / "out") == {whole} else "no"
        print(f"| {name} | {number} | {told(seconds)} | {computing(place / 'out'):.2f} | {same} |", flush=True)
    print(f"stock over zofed: {medians[True] / medians[False]:.0f}")


class SlowLink:
    """A TCP proxy with a one-way delay and a rate, both ways, in a thread of its own."""

    def __init__(self, port: int, delay: float, bits_per_second: float) -> None:
        self.target, self.delay, self.rate, self.port = port, delay, bits_per_second / 8, flower_commands.free_port()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._free = {"up": 0.0, "down": 0.0}  # when each direction of the link is free again, for all connections
        self._loop.run_until_complete(asyncio.start_server(self._connect, "127.0.0.1", self.port))
        self._loop.run_forever()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2 * self.delay)  # TCP's own handshake
        try:
            far = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._carry("up", reader, far[1]), self._carry("down", far[0], writer))

    async def _carry(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrivals: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, chunk = await arrivals.get()
                await asyncio.sleep(max(0.0, at - self._loop.time()))
                if not chunk:
                    writer.close()
                    return
                writer.write(chunk)

        task = asyncio.ensure_future(deliver())
        while chunk := await _some(reader):
            now = self._loop.time()
            self._free[way] = max(now, self._free[way]) + len(chunk) / self.rate
            arrivals.put_nowait((self._free[way] + self.delay, chunk))
            await asyncio.sleep(max(0.0, self._free[way] - now - 0.1))  # a short queue, as a modem's
        arrivals.put_nowait((self._loop.time() + self.delay, b""))
        await task


async def _some(reader: asyncio.StreamReader) -> bytes:
    """What arrives next; nothing more from a connection that is gone."""
    with contextlib.suppress(ConnectionError):
        return await reader.read(16384)
    return b""


LINKS = ((0.05, 1e6), (0.1, 1e6))  # one-way delay in seconds, bits a second


def link(folder: Path, count: int, model: str) -> None:
    print("| model | mode | round trip, ms | Mbit/s | rounds | seconds a round | computing | above it |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    runs: list[tuple[str, Values]] = [("tiny", {}), ("tiny", {"steps_per_message": 8}), ("tiny", {"local_steps": 8})]
    if model != "tiny":
        runs.append((model, {"eval_examples": 4, "batch_size": 1, "block_size": 32}))
    for name, own in runs:
        for delay, rate in LINKS if name == "tiny" else LINKS[-1:]:
            place = Path(tempfile.mkdtemp(dir=folder))
            with Lab(place) as lab:
                slow = SlowLink(lab.port, delay, rate)
                for index in range(2):
                    lab.node(index, 2, f"127.0.0.1:{slow.port}")
                number = count if name == "tiny" else 6
                lab.finish(
                    lab.run(place / "out", model=name, rounds=number, clients=2, node_timeout=STARTED_S, **own), 3600
                )
            seconds, compute = seconds_a_round(place / "out"), computing(place / "out")
            mode = (
                ", ".join(f"{key.replace('_', '-')} {value}" for key, value in own.items()) if name == "tiny" else "zo"
            )
            print(
                f"| {name} | {mode or 'zo'} | {2000 * delay:.0f} | {rate / 1e6:g} | {number} | {told(seconds)} | "
                f"{compute:.2f} | {statistics.mean(seconds) - compute:.2f} |",
                flush=True,
            )


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[str]]:
    """Network namespaces with an address each; the SuperLink's side is 10.77.N.1. Gives the interfaces on that side."""
    made = []
    try:
        for index in range(count):
            space, near, far = f"zofed{index}", f"zofedn{index}", f"zofedf{index}"
            made.append(space)
            for line in (
                f"ip netns add {space}", f"ip link add {near} type veth peer name {far}",
                f"ip link set {far} netns {space}", f"ip addr add 10.77.{index}.1/24 dev {near}",
                f"ip link set {near} up", f"ip netns exec {space} ip addr add 10.77.{index}.2/24 dev {far}",
                f"ip netns exec {space} ip link set {far} up", f"ip netns exec {space} ip link set lo up",
            ):  # fmt: skip
                subprocess.run(line.split(), check=True)
        yield [f"zofedn{index}" for index in range(count)]
    finally:
        for space in made:
            subprocess.run(["ip", "netns", "del", space], check=False)


def counted(interface: str) -> tuple[int, int]:
    """Bytes from and to the node at its interface's other end so far."""
    base = Path(f"/sys/class/net/{interface}/statistics")
    return int((base / "rx_bytes").read_text()), int((base / "tx_bytes").read_text())


def wire(folder: Path, count: int) -> None:
    print("| what | seconds | from the node, B | to the node, B |\n| --- | --- | --- | --- |")
    with namespaces(2) as interfaces:
        keys.make(folder / "keys", ["10.77.0.1", "10.77.1.1"], ["node0", "node1"])
        with Lab(folder, host="0.0.0.0") as lab:
            for index in range(2):
                lab.node(index, 2, f"10.77.{index}.1:{lab.port}", ["ip", "netns", "exec", f"zofed{index}"])
            run = lab.run(folder / "out", rounds=count, clients=2, node_timeout=STARTED_S)
            wait_until(lambda: rounds_done(folder / "out") >= 2, "the second round")
            began, first, before = time.monotonic(), rounds_done(folder / "out"), counted(interfaces[0])
            wait_until(lambda: rounds_done(folder / "out") >= count, "the last round", 3600)
            up, down = (b - a for a, b in zip(before, counted(interfaces[0]), strict=True))
            number, seconds = count - first, time.monotonic() - began
            print(f"| {number} rounds | {seconds:.0f} | {up:,} | {down:,} |")
            print(f"| a round | {seconds / number:.2f} | {up / number:,.0f} | {down / number:,.0f} |", flush=True)
            lab.finish(run)
            rows = read_table(folder / "out" / "rounds.csv")[first:]
            inside = [sum(int(row[name]) for row in rows) / len(rows) / 2 for name in ("bytes_up", "bytes_down")]
            print(f"| of it Flower's messages and objects | | {inside[0]:,.0f} | {inside[1]:,.0f} |")
            for wait, length in ((0, 20), (20, 60), (60, 120)):
                time.sleep(wait)
                before = counted(interfaces[0])
                time.sleep(length)
                up, down = (b - a for a, b in zip(before, counted(interfaces[0]), strict=True))
                print(f"| idle, a minute | 60 | {up * 60 / length:,.0f} | {down * 60 / length:,.0f} |", flush=True)


def kills(folder: Path, count: int) -> None:
    """What is killed in the middle of a round, and how long until the next round is done."""
    print("| killed | quorum | seconds to the next round | rounds | digests | as undisturbed or as its own replay |")
    print("| --- | --- | --- | --- | --- | --- |")
    whole = simulated(folder / "simulated", rounds=count, clients=2)
    for quorum in (0, 1):
        for what in ("worker1", "node1", "serverapp", "superlink"):
            place = Path(tempfile.mkdtemp(dir=folder))
            out = place / "out"
            with Lab(place) as lab:
                for index in range(2):
                    lab.node(index, 2)
                run = lab.run(out, rounds=count, clients=2, quorum=quorum, node_timeout=STARTED_S, round_timeout=300)
                wait_until(lambda out=out: rounds_done(out) >= count // 3, "a third of the rounds")
                at = rounds_done(out)
                os.kill(lab.pids()[what], signal.SIGKILL)
                killed = time.monotonic()
                while rounds_done(out) <= at + 1:  # the round after that in which it was killed
                    if run.poll() is not None:  # the run ended with its server: go on by hand
                        run = lab.resume(out)
                    time.sleep(0.05)
                recovered = time.monotonic() - killed
                lab.finish(run)
            found, summary = digests(out), RunFolder(out).summary()
            well = (
                found == {whole} if quorum == 0 else len(found) == 1 and summary["replay_digest"] == summary["digest"]
            )
            name = re.sub(r"\d", "", what).replace("node", "SuperNode")
            print(
                f"| {name} | {quorum or 'all'} | {recovered:.1f} | {count} | {len(found)} | "
                f"{'yes' if well else 'NO'} |",
                flush=True,
            )


def joining(folder: Path, count: int) -> None:
    """Three clients: the last comes at half the rounds, the second goes a tenth later."""
    out = folder / "out"
    with Lab(folder) as lab:
        for index in range(2):
            lab.node(index, 3)
        run = lab.run(out, rounds=count, quorum=1, clients=2, node_timeout=STARTED_S)
        wait_until(lambda: rounds_done(out) >= count // 2, "half the rounds", 1200)
        lab.node(2, 3)
        wait_until(lambda: rounds_done(out) >= count // 2 + count // 10, "a tenth more", 1200)
        lab.stop("node1")
        lab.finish(run)
    took_part: dict[str, list[int]] = {}
    for row in read_table(out / "clients.csv"):
        if row["result"] == "used":
            took_part.setdefault(row["client"], []).append(int(row["round"]))
    spans = ", ".join(f"client {c} rounds {min(r)} to {max(r)}" for c, r in sorted(took_part.items()))
    print(f"{spans}; {len(digests(out))} digest on the server and those there; seconds {told(seconds_a_round(out))}")


def growth(folder: Path, count: int) -> None:
    out = folder / "out"
    seen: list[dict[str, tuple[int, int]]] = []
    with Lab(folder) as lab:
        for index in range(2):
            lab.node(index, 2)
        run = lab.run(out, rounds=count, clients=2, node_timeout=STARTED_S)
        for at in (count // 10, count // 2, count - 1):
            wait_until(lambda at=at: rounds_done(out) >= at, f"round {at}", 1200)
            seen.append({name: _held(pid) for name, pid in lab.pids().items()})
        lab.finish(run)
    marks = [count // 10, count // 2, count - 1]
    print("| process |" + "".join(f" MiB at round {at} |" for at in marks) + " descriptors |")
    print("| --- |" + " --- |" * (len(marks) + 1))
    for name in seen[0]:
        memory = "".join(f" {one[name][0] / 1024:.1f} |" for one in seen)
        print(f"| {name} |{memory} {', '.join(str(one[name][1]) for one in seen)} |")


def _held(pid: int) -> tuple[int, int]:
    """(resident KiB, open descriptors) of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", text)
    return int(found.group(1)) if found else 0, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deployment", description=__doc__)
    parser.add_argument("what", choices=("rounds", "link", "wire", "kills", "joining", "growth"))
    parser.add_argument("--rounds", type=int, help="of each run")
    parser.add_argument("--model", default="tiny", help="link: also this one, such as 200M")
    parser.add_argument("--keep", action="store_true", help="leave logs and results where they are")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="zofed-deployment-"))
    print(f"logs and results: {folder}", file=sys.stderr)
    if given.what == "link":
        link(folder, given.rounds or 24, given.model)
    else:
        usual = {"rounds": 40, "wire": 200, "kills": 30, "joining": 200, "growth": 200}
        work = {"rounds": rounds, "wire": wire, "kills": kills, "joining": joining, "growth": growth}
        work[given.what](folder, given.rounds or usual[given.what])
    if not given.keep:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
