"""A sweep on a machine whose clock is set: no run waits, fails or is told other seconds for it."""

import csv
import itertools
import json
import math
import time
from pathlib import Path

import pytest

from tests.clusters import Here
from zofed.experiments import sweep_file
from zofed.experiments.sweep_folder import SweepFolder
from zofed.experiments.sweep_runner import Board, Runner

DAYS = 400
LONGEST_S = 3600.0  # nothing here takes as long


def went(folder: Path, corpus: Path) -> tuple[list[Board], list[str]]:
    """What the board said, and the digests of the runs."""
    base = {"dataset": str(corpus), "steps": 3, "rounds": 3, "queries": 2, "batch-size": 2, "block-size": 16}
    base |= {"eval-examples": 4, "save-interval": 2, "device": "cpu"}
    sweep = sweep_file.of({"seeds": [0], "base": base, "grid": {"clients": [0, 2]}})
    found, boards = SweepFolder(folder), []
    with found.opened():
        Runner(sweep, found, Here(), boards.append).run()
    summaries = sorted(folder.glob("runs/*/summary.json"))
    return boards, [json.loads(path.read_text())["digest"] for path in summaries]


def test_a_clock_set_forwards_and_backwards_changes_nothing(
    tmp_path: Path, corpus: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, steady = went(tmp_path / "steady", corpus)
    now, jumps = time.time, itertools.cycle((0, DAYS, -DAYS, DAYS, -DAYS, -DAYS))
    monkeypatch.setattr(time, "time", lambda: now() + 86400 * next(jumps))
    boards, digests = went(tmp_path / "jumping", corpus)
    assert digests == steady and len(digests) == 2
    assert boards[-1].complete == 2 and not boards[-1].failed
    told = [board.left for board in boards if board.left is not None]
    told += [run.seconds for board in boards for run in (*board.running, *board.ended)]
    with (tmp_path / "jumping" / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["completed"] * 2
    told += [float(row["seconds"]) for row in rows]
    assert told and all(math.isfinite(seconds) and 0 <= seconds < LONGEST_S for seconds in told)
