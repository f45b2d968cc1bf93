"""What TensorBoard is told; a stand-in records it, since the package is an extra."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.runs import sinks
from zofed.runs.tables import read_table
from zofed.training import central


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of every writer: the folder with the first step, then (tag, value, step)."""
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

        def flush(self) -> None:
            calls.append(("flush",))

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


def test_each_row_of_the_metrics_is_told_once_and_a_resumed_run_goes_on(
    quick: Callable[..., Settings], tmp_path: Path, told: list[tuple[Any, ...]]
) -> None:
    shown: list[int] = []
    settings, out = quick(steps=3, tensorboard=True), tmp_path / "run"
    central.train(settings, out, lambda row: shown.append(row["step"]))
    assert shown == [0, 1, 2, 3] and told[0] == (str(out / "tensorboard"), 0) and told[-1] == ("close",)
    losses = [call[1:] for call in told if call[0] == "loss/training (nats)"]
    rows = read_table(out / "metrics.csv")
    assert losses == [(float(row["loss"]), int(row["step"])) for row in rows if row["loss"]]
    assert told.count(("flush",)) == sum(bool(row["eval_loss"]) for row in rows)
    told.clear()
    text = (out / "settings.toml").read_text()
    (out / "settings.toml").write_text(text.replace("steps = 3", "steps = 5"))
    central.resume(out, lambda row: None)
    assert told[0] == (str(out / "tensorboard"), 4)
    assert [call[2] for call in told if call[0] == "loss/training (nats)"] == [4, 5]


def test_without_the_extra_a_run_says_so_before_it_writes_anything(
    quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'zofed\[tensorboard\]'"):
        central.train(quick(tensorboard=True), tmp_path / "run", lambda row: None)
    assert not (tmp_path / "run").exists()
    sinks.check(quick())
