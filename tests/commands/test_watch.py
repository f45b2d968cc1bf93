"""`zofed watch`: a run followed by what it writes, to its end or to where it fell silent."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zofed import config
from zofed.commands import watch
from zofed.training import central

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    values = {"dataset": str(corpus), "block-size": 16, "batch-size": 2, "queries": 2, "steps": 4, "eval-interval": 2}
    folder = tmp_path_factory.mktemp("made") / "run"
    settings = config.resolve(values | {"eval-examples": 4, "save-interval": 0, "device": "cpu"})
    central.train(settings, folder, lambda row: None)
    return folder


@pytest.fixture
def half(finished: Path, tmp_path: Path) -> Path:
    """The run as it stood after two of its steps."""
    shutil.copytree(finished, run := tmp_path / "run")
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:4]))  # the head, steps 0 to 2
    (run / "summary.json").write_text(json.dumps({"status": "running"}))
    return run


def test_a_run_is_followed_to_its_end(
    half: Path, finished: Path, zofed_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def goes_on(seconds: float) -> None:
        for name in ("metrics.csv", "summary.json"):
            shutil.copy(finished / name, half)

    monkeypatch.setattr(watch.time, "sleep", goes_on)
    status, out, _ = zofed_command("watch", half)
    lines, summary = out.splitlines(), json.loads((finished / "summary.json").read_text())
    assert status == 0 and lines[0].startswith("step 2/4") and "left" in lines[0] and "MiB" not in out
    assert lines[1].startswith("step 4/4") and lines[2] == f"{half}: completed"
    assert f"-> {summary['eval_loss_end']:.4f} nats" in lines[3]


def test_one_that_fell_silent_is_told_with_what_continues_it_and_is_not_stopped(
    half: Path, zofed_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupted)
    for file in half.iterdir():
        os.utime(file, (1e9, 1e9))
    status, out, errors = zofed_command("watch", half)
    assert status == 130 and f"if it was killed, continue with: zofed train --resume {half}" in out
    assert "no longer watched, and not stopped" in errors
    assert json.loads((half / "summary.json").read_text()) == {"status": "running"}


def test_an_interrupted_run_names_what_continues_it(half: Path, zofed_command: Command) -> None:
    (half / "summary.json").write_text(json.dumps({"status": "interrupted"}))
    status, out, _ = zofed_command("watch", half)
    assert status == 0 and f"{half}: interrupted\ncontinue with: zofed train --resume {half}" in out
