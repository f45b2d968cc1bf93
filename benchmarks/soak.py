"""What thousands of rounds leave behind in one process: memory, descriptors, threads and files, as a picture.

The server and clients that come and go: each is away for 1 to 400 rounds at a time and catches up, by the records it
missed or, where those take longer, by the weights; two join late; one answer in a hundred is lost. Each client has a
replica of its own, as on a machine of its own.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message

from benchmarks import common, memory
from benchmarks.crowd import each_round, run
from zofed.federated import client, exchanges, membership
from zofed.federated.local_grid import LocalGrid
from zofed.federated.protocol import Plan
from zofed.runs import plot_style

THERE, AWAY = (50, 600), (1, 400)  # rounds in a row
LOST = 0.01  # of the answers
LATE = 2  # of the clients, which join at a sixth and at a third of the rounds
WARM = 0.1  # of the rounds, before what is held counts
FOLDER_EVERY = 10  # rounds between looks at the run's folder


class ComingAndGoing(LocalGrid):
    """A grid whose nodes come and go by the round, each with a session of its own; `round` is told from outside."""

    def __init__(self, *arguments: Any, rounds: int) -> None:
        super().__init__(*arguments)
        self.round = 0
        self._chance = random.Random(0)
        self._sessions = {node: lru_cache(maxsize=1)(client._session.__wrapped__) for node in self._contexts}
        nodes = list(self._contexts)
        joins = {node: rounds * (index + 1) // (3 * LATE) for index, node in enumerate(nodes[-LATE:])}
        self._spans = {node: self._drawn(joins.get(node, 0), rounds, is_first=node == nodes[0]) for node in nodes}

    def _drawn(self, first: int, rounds: int, *, is_first: bool) -> list[range]:
        """Spans of rounds that a node is there for; the first node stays, so that none of the rounds lacks a client."""
        spans, at = [], first
        while at <= rounds:
            end = rounds + 1 if is_first else at + self._chance.randint(*THERE)
            spans.append(range(at, end))
            at = end + self._chance.randint(*AWAY)
        return spans

    def is_there(self, node: int, round_: int) -> bool:
        """Whether the node can be reached in a round."""
        return any(round_ in span for span in self._spans[node])

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self._contexts if self.is_there(node, self.round + 1)]

    def _deliver(self, message: Message) -> str:
        node, shared = message.metadata.dst_node_id, client._session
        client._session = self._sessions[node]
        try:
            name = super()._deliver(message)
        finally:
            client._session = shared
        if message.metadata.message_type.startswith("train") and self._chance.random() < LOST:
            del self._replies[name]
        return name


@dataclass(frozen=True, slots=True)
class Held:
    """What the process held after a round; MiB."""

    round: int
    resident: float
    descriptors: int
    threads: int
    folder: float


def taken_by(folder: Path) -> float:
    """MiB of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def threads() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/task"))


@contextmanager
def plans_counted(ways: Counter[str]) -> Iterator[None]:
    """While active, count how plans bring clients to where the run is."""
    plan = exchanges.Exchanges.plan

    def counted(self: Any, *arguments: Any, **more: Any) -> Plan:
        made = plan(self, *arguments, **more)
        missing = self._held - min(self.members.found[made.client].held, self._held)
        if made.snapshot:
            ways["weights"] += 1
        elif missing > 1:
            ways["records"] += 1
        return made

    exchanges.Exchanges.plan = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        exchanges.Exchanges.plan = plan  # type: ignore[method-assign]


@contextmanager
def looking_each_round() -> Iterator[None]:
    """While active a server looks for nodes in every round, however short it is."""
    seconds, membership.LOOK_SECONDS = membership.LOOK_SECONDS, 0.0
    try:
        yield
    finally:
        membership.LOOK_SECONDS = seconds


def growth(held: Sequence[Held], of: Callable[[Held], float]) -> float:
    """By a thousand rounds, by least squares over those after the first tenth."""
    later = [one for one in held if one.round >= WARM * held[-1].round]
    return 1000 * statistics.linear_regression([one.round for one in later], [of(one) for one in later]).slope


def report(clients: int, rounds: int, picture: Path) -> bool:
    """Run it, print what the process held at tenths of the rounds, and draw it; whether all ended with one digest."""
    grids: list[ComingAndGoing] = []
    held: list[Held] = []
    ways: Counter[str] = Counter()

    def grid(*arguments: Any) -> ComingAndGoing:
        grids.append(ComingAndGoing(*arguments, rounds=rounds))
        return grids[-1]

    def look(round_: int) -> None:
        grids[-1].round = round_
        is_due = round_ % FOLDER_EVERY == 0
        size = taken_by(next(folder.glob("run-*"))) if is_due else held[-1].folder
        held.append(Held(round_, memory.status("VmRSS") / 2**20, len(os.listdir("/proc/self/fd")), threads(), size))

    # All that are there take part (clients = 0): with a number of them the run would wait for those that join late.
    values = {"rounds": rounds, "clients": 0, "quorum": 1, "round_timeout": 0.05, "queries": 2}
    values |= {"eval_interval": max(1, rounds // 30), "save_interval": max(1, rounds // 20)}
    began, busy = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as name, each_round(look), plans_counted(ways), looking_each_round():
        folder = Path(name)
        done = run(folder, grid, clients, **values)
        summary = done.summary()
        sizes = {path.name: path.stat().st_size for path in done.path.iterdir() if path.is_file()}
    spent = time.process_time() - busy
    replies: Counter[str] = Counter()
    for counts in summary["replies"].values():
        replies.update(counts)
    told = ", ".join(f"{name} {count:,}" for name, count in sorted(replies.items()))
    caught_up = ", ".join(f"by {name} {count:,}" for name, count in sorted(ways.items()))
    print(f"{clients} clients, {rounds:,} rounds in {time.monotonic() - began:.0f} s, of CPU {spent:.0f} s")
    print(f"replies: {told}; clients caught up: {caught_up}")
    ends = {digest for digest in summary["client_digests"].values() if digest}
    is_one = ends == {summary["digest"]} and summary["replay_digest"] in (summary["digest"], None)
    print(f"digest of the {len(summary['client_digests'])} clients there at the end, the server and the replay: "
          f"{'one' if is_one else 'NOT one'}")  # fmt: skip
    print("| round | resident, MiB | descriptors | threads | folder, MiB |\n| --- | --- | --- | --- | --- |")
    for at in sorted({0, 1, *(rounds * tenth // 10 for tenth in range(1, 11))}):
        one = held[at]
        print(f"| {one.round:,} | {one.resident:.1f} | {one.descriptors} | {one.threads} | {one.folder:.2f} |")
    print(f"growth by 1,000 rounds after the first tenth: {growth(held, lambda one: one.resident):+.2f} MiB resident, "
          f"{growth(held, lambda one: one.folder):+.2f} MiB of files")  # fmt: skip
    largest = sorted(sizes.items(), key=lambda one: -one[1])[:6]
    print("files: " + ", ".join(f"{name} {size:,} B" for name, size in largest))
    there = [sum(grids[-1].is_there(node, one.round) for node in grids[-1]._contexts) for one in held]
    draw(held, there, clients, picture)
    return is_one


def draw(held: Sequence[Held], there: Sequence[int], clients: int, path: Path) -> None:
    """A panel for each of what was held, and one for the clients that were there."""
    rounds = [one.round for one in held]
    figure, places = plot_style.panels(2, 2, height=2.9)
    curves = (
        ("resident memory, MiB", {"": [one.resident for one in held]}),
        ("descriptors and threads", {
            "open descriptors": [one.descriptors for one in held], "threads": [one.threads for one in held],
        }),
        ("files of the run, MiB", {"": [one.folder for one in held]}),
        ("clients that are there", {"": there}),
    )  # fmt: skip
    for place, (label, lines) in zip(places.flat, curves, strict=True):
        for index, (name, values) in enumerate(lines.items()):
            stroke = plot_style.stroke(index)
            place.plot(rounds, values, color=stroke.color, linestyle=stroke.dash, lw=1.2, label=name or None)
        place.set(xlabel="round", ylabel=label, ylim=(0, 1.2 * max(max(values) for values in lines.values())))
        if len(lines) > 1:
            place.legend(frameon=False, fontsize="small")
    plot_style.save(figure, path, f"One process: the server and {clients} clients that come and go")
    print(f"picture: {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--picture", type=Path, default=Path("soak.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(common.machine(), flush=True)
    raise SystemExit(0 if report(given.clients, given.rounds, given.picture.absolute()) else 1)


if __name__ == "__main__":
    main()
