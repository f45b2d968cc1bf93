"""Runs and engines of sweeps, and Ray clusters on this machine, for tests."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zofed.experiments import sweep_file, sweep_process
from zofed.experiments.sweep import Run
from zofed.experiments.sweep_engine import Job

ZOFED = [sys.executable, "-c", "import sys; sys.argv[0] = 'zofed'; from zofed.commands.cli import main; main()"]
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}

SWEEP = """
seeds = [0, 1]
[base]
block-size = 16
batch-size = 2
queries = 3
eval-examples = 8
device = "cpu"
"""  # of small runs, whose base goes on with what a test adds


class Here:
    """An engine that carries one run at a time out in this process, whose clock is the test's."""

    def __init__(self) -> None:
        self._jobs: list[tuple[Job, Path]] = []

    def places(self, runs: Sequence[Run]) -> int:
        return 1

    def prepare(self, folder: Path, runs: Sequence[Run]) -> None:
        """Nothing to make ready."""

    def start(self, run: Run, out: Path, log: Path, slot: int) -> Job:
        self._jobs.append((Job(run, slot), out))
        return self._jobs[-1][0]

    def hear(self, seconds: float) -> None:
        job, out = self._jobs.pop()
        settings = job.run.settings.model_copy(update={"out": str(out)})
        sweep_process.carry_out(settings, lambda row: None, lambda steps: job.take({"steps": steps}))
        job.ended = True

    def stop(self) -> None:
        self._jobs.clear()


def runs(**base: Any) -> list[Run]:
    """Of a sweep with nothing but these settings."""
    return sweep_file.of({"base": {"steps": 3} | base}).first()


@contextmanager
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one node with one CPU, whose place in the file system no other test's Ray looks at."""
    from ray.cluster_utils import Cluster

    place = tempfile.mkdtemp(prefix="zr-", dir="/tmp")  # short: sockets lie in it
    monkeypatch.setenv("RAY_TMPDIR", place)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_enable_metrics_collection", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "120")  # on a machine that does other work, too
    found = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        yield found
    finally:
        found.shutdown()
        shutil.rmtree(place, ignore_errors=True)
