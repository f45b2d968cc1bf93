"""What training takes above what the process held before."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zofed.config import Settings
from zofed.runs import memory
from zofed.runs.run_folder import RunFolder
from zofed.training import central

LARGE = 64 * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="a process forgets its peak on Linux alone")
def test_what_was_held_before_does_not_count_and_a_peak_stays_the_largest() -> None:
    earlier = torch.ones(2 * LARGE, dtype=torch.uint8)
    peak = memory.peak_bytes()
    del earlier
    training = memory.Training.begin()
    assert training is not None and training.bytes_above() < LARGE / 4
    taken = torch.ones(LARGE, dtype=torch.uint8)
    assert 0.8 * LARGE < training.bytes_above() < 1.5 * LARGE
    del taken
    assert training.bytes_above() > 0.8 * LARGE, "it is the most that was held, not what is"
    assert memory.peak_bytes() > 0.99 * peak, "the system counts pages roughly"


def test_where_a_system_cannot_forget_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_SELF", tmp_path / "none")
    assert memory.Training.begin() is None and memory.peak_bytes() > 0


@pytest.mark.skipif(sys.platform != "linux", reason="a process forgets its peak on Linux alone")
def test_a_run_tells_what_its_training_took(quick: Callable[..., Settings], tmp_path: Path) -> None:
    central.train(quick(steps=2), tmp_path / "run", lambda row: None)
    summary = RunFolder(tmp_path / "run").summary()
    assert 0 <= summary["training_memory_bytes"] < summary["peak_memory_bytes"]
