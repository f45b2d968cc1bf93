"""Runs for clusters, and Ray clusters on this machine, for tests."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from zofed.experiments import sweep_file
from zofed.experiments.sweep import Run

ZOFED = [sys.executable, "-c", "import sys; sys.argv[0] = 'zofed'; from zofed.commands.cli import main; main()"]
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}


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
