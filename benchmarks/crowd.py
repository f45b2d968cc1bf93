"""Many clients in one process: CPU of a round by numbers of clients: forward passes, moving the weights, the rest."""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, federation
from zofed import config
from zofed.core.aggregation import Measured
from zofed.core.replica import Replica
from zofed.data.documents import load_documents
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid
from zofed.runs.run_folder import RunFolder
from zofed.training import measurements

WORDS = 12  # of a document: a client needs one at least, and 10,000 of them 10,000
ROUNDS = 3  # measured of each run; the first, which is sent no record, and the last, which is scored, are not
ROWS = (  # clients:seeds:asked in a round
    "100:distinct:100", "1000:distinct:1000", "100:shared:100", "1000:shared:1000", "10000:shared:10000",
    "10000:distinct:1000",
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "block-size": 8, "batch-size": 1, "queries": 8, "eval-interval": 100_000, "eval-examples": 8, "device": "cpu",
    "save-interval": 0, "weight-check-interval": 0, "learning-rate": 0.02, "threads": 1,
}  # fmt: skip


class Busy:
    """CPU seconds of this process within some functions, by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = False

    @contextmanager
    def within(self, name: str, *places: tuple[Any, str]) -> Iterator[None]:
        """While active, calls of these attributes count under `name`; one within another counts once."""
        before = [(owner, attribute, getattr(owner, attribute)) for owner, attribute in places]
        for owner, attribute, function in before:
            setattr(owner, attribute, self._timed(name, function))
        try:
            yield
        finally:
            for owner, attribute, function in before:
                setattr(owner, attribute, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **more: Any) -> Any:
            if self._inside:
                return function(*arguments, **more)
            self._inside, began = True, time.process_time()
            try:
                return function(*arguments, **more)
            finally:
                self._inside = False
                self.seconds[name] += time.process_time() - began  # type: ignore[assignment]

        return timed


@contextmanager
def each_round(tell: Callable[[int], None]) -> Iterator[None]:
    """While active `tell` is called with every round that has been shown."""
    show = server.Server._show

    def telling(self: Any, row: Any) -> None:
        show(self, row)
        tell(row["step"])

    server.Server._show = telling  # type: ignore[method-assign]
    try:
        yield
    finally:
        server.Server._show = show  # type: ignore[method-assign]


def documents(folder: Path) -> Path:
    """A file of short documents, cut from the sample of the web."""
    path = folder / "short.jsonl"
    if not path.exists():
        words = [document.text.split() for document in load_documents("sample-dclm")]
        lines = [" ".join(own[at : at + WORDS]) for own in words for at in range(0, len(own) - WORDS + 1, WORDS)]
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def run(folder: Path, grid: Callable[..., LocalGrid], nodes: int, **values: Any) -> RunFolder:
    """One federated run from the beginning; its folder. All nodes are clients, unless `values` say otherwise."""
    client.forget()
    changed = {key.replace("_", "-"): value for key, value in values.items()}
    out = folder / f"run-{time.monotonic_ns()}"
    data = {"out": str(out), "clients": nodes, "dataset": str(documents(folder))}
    settings = config.resolve(SETTINGS | data | changed)
    with federation.quiet():
        server.run(grid(client.app, nodes, settings.model_dump(by_alias=True)), settings, "")
    return RunFolder(out)


def made_up(settings: Any, replica: Any, data: Any, client: int, steps: int = 1) -> Measured:
    """Slopes of no pass at all, of the size that slopes have."""
    chance = random.Random(client)
    return Measured(tuple(chance.randrange(-100_000, 100_000) for _ in range(settings.queries)), -20, 5.0, 0)


def load(folder: Path, rows: Iterable[str], *, passes: bool) -> None:
    """Print a row for each number of clients. passes: run them; else the slopes are made up."""
    slopes = measurements.slopes
    measurements.slopes = slopes if passes else made_up  # type: ignore[assignment]
    print("| clients | seeds | asked | whole | passes | moving | the rest | (range) | meeting | digests and end |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for row in rows:
        clients, kind, asked = int(row.split(":")[0]), row.split(":")[1], int(row.split(":")[2])
        busy, marks = Busy(), []
        began = time.process_time()

        def mark(_: int, busy: Busy = busy, marks: list[tuple[float, ...]] = marks) -> None:
            marks.append((time.process_time(), busy.seconds["passes"], busy.seconds["moving"]))

        moving = (Replica, "apply"), (Replica, "replay")
        with each_round(mark), busy.within("passes", (measurements, "slopes")), busy.within("moving", *moving):
            participation = asked if asked < clients else 1.0
            run(folder, LocalGrid, clients, rounds=ROUNDS + 2, direction_seeds=kind, participation=participation)
        end = time.process_time() - marks[-1][0]
        found = [
            [1000 * (after - before) / asked for before, after in zip(*pair, strict=True)]
            for pair in itertools.pairwise(marks[1 : ROUNDS + 2])
        ]
        whole, computed, moved = (statistics.median(column) for column in zip(*found, strict=True))
        rest = [one - computing - moving for one, computing, moving in found]
        told = f"{whole:.2f} | {computed:.2f} | {moved:.2f} | {statistics.median(rest):.2f}"
        spread = f"{min(rest):.2f} to {max(rest):.2f}"
        print(
            f"| {clients:,} | {kind} | {asked:,} | {told} | {spread} | {marks[0][0] - began:.1f} s | {end:.1f} s |",
            flush=True,
        )
    measurements.slopes = slopes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crowd", description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), metavar="CLIENTS:SEEDS:ASKED")
    parser.add_argument("--without-passes", action="store_true", help="make the slopes up; the rest stays")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(common.machine(), flush=True)
    with tempfile.TemporaryDirectory() as name:
        load(Path(name), given.rows, passes=not given.without_passes)


if __name__ == "__main__":
    main()
