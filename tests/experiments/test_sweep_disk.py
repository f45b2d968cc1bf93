"""A sweep whose disk fills up ends in one sentence, leaves no run at work, and goes on once there is space."""

import errno
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from zofed.commands.mistakes import refused_by_system
from zofed.experiments import sweep_file, sweep_folder
from zofed.experiments.sweep import Run
from zofed.experiments.sweep_engine import Job
from zofed.experiments.sweep_folder import SweepFolder
from zofed.experiments.sweep_runner import Board, Runner
from zofed.runs.run_folder import RunFolder

RUNS = 4
ZOFED = [sys.executable, "-c", "import sys; sys.argv[0] = 'zofed'; from zofed.commands.cli import main; main()"]


class AtOnce:
    """An engine of two places whose runs end when they are next heard, all well."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.at_work: list[tuple[Job, Path]] = []

    def places(self, runs: Sequence[Run]) -> int:
        return 2

    def prepare(self, folder: Path, runs: Sequence[Run]) -> None:
        """Nothing to make ready."""

    def start(self, run: Run, out: Path, log: Path, slot: int) -> Job:
        self.started.append(run.name)
        self.at_work.append((Job(run, slot), out))
        return self.at_work[-1][0]

    def hear(self, seconds: float) -> None:
        job, out = self.at_work.pop(0)
        out.mkdir(parents=True, exist_ok=True)
        RunFolder(out).write_summary({"status": "completed", "eval_loss_end": 1.0})
        job.ended = True

    def stop(self) -> None:
        self.at_work.clear()


def went(folder: Path, engine: AtOnce) -> Board:
    sweep = sweep_file.of({"seeds": list(range(RUNS)), "base": {"steps": 2}})
    found = SweepFolder(folder)
    with found.opened():
        return Runner(sweep, found, engine, lambda board: None).run()


@pytest.mark.parametrize("writes", range(1, 2 + 2 * RUNS))
def test_a_full_disk_ends_a_sweep_which_goes_on_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """writes: of the sweep's own files that the disk takes before it is full."""
    write, taken = sweep_folder.write_private, [0]

    def until_full(path: Path, text: str) -> None:
        taken[0] += 1
        if taken[0] > writes:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    monkeypatch.setattr(sweep_folder, "write_private", until_full)
    first = AtOnce()
    with pytest.raises(OSError, match="No space") as full:
        went(tmp_path, first)
    assert not first.at_work, "nothing is left at work"
    told = refused_by_system(full.value)
    assert str(tmp_path) in told and told.endswith("free some space or choose another place, then go on")
    done = [path.parent.name for path in (tmp_path / "runs").glob("*/summary.json")]
    monkeypatch.setattr(sweep_folder, "write_private", write)
    again = AtOnce()
    board = went(tmp_path, again)
    assert board.complete == RUNS and board.complete_before == len(done)
    assert sorted([*done, *again.started]) == sorted({*done, *again.started}), "no run twice"
    assert (tmp_path / "summary.csv").read_text().count("completed") == RUNS


@pytest.mark.slow
def test_runs_whose_disk_is_full_say_so_and_go_on_with_the_sweep(tmp_path: Path, corpus: Path) -> None:
    """A limit on files that the system itself holds, which a checkpoint is beyond."""
    text = f"""
[base]
dataset = "{corpus}"
steps = 4
queries = 2
batch-size = 2
block-size = 16
eval-examples = 4
save-interval = 2
device = "cpu"
"""
    (tmp_path / "sweep.toml").write_text(text)
    full, whole = (tmp_path / name for name in ("full", "whole"))

    def swept(out: Path, largest_file: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest_file, largest_file))
        command = [*ZOFED, "sweep", str(tmp_path / "sweep.toml"), "--out", str(out)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=limit)

    first = swept(full, largest_file=100_000)
    assert first.returncode == 1 and "0 runs complete, 0 of them before; 1 failed" in first.stdout
    run = full / "runs" / "seed=0"
    remedy = f"free some space, then continue with: zofed train --resume {run}"
    assert "File too large" in first.stdout and remedy in first.stdout and "Traceback" not in first.stderr
    before = (run / "journal.zofed").read_bytes()
    assert len(before) > 0 and json.loads((run / "summary.json").read_text())["status"] == "failed"
    again, undisturbed = swept(full), swept(whole)
    assert again.returncode == undisturbed.returncode == 0, again.stdout + again.stderr
    assert (run / "journal.zofed").read_bytes().startswith(before), "it went on, and did not begin anew"
    digests = {json.loads((out / "runs" / "seed=0" / "summary.json").read_text())["digest"] for out in (full, whole)}
    assert len(digests) == 1
