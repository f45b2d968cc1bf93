"""`zofed runs`: the runs below a folder, however deep, and what became of each."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zofed import config
from zofed.base.errors import UserError
from zofed.experiments.listing import listed
from zofed.training import central

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished run."""
    values = {"dataset": str(corpus), "block-size": 16, "batch-size": 2, "queries": 2, "steps": 2, "eval-examples": 4}
    folder = tmp_path_factory.mktemp("made") / "first"
    central.train(config.resolve(values | {"save-interval": 0, "device": "cpu"}), folder, lambda row: None)
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """That run, one below a sweep's folder that was killed long ago, and one that cannot be read."""
    shutil.copytree(made, tmp_path / "first")
    shutil.copytree(made, cut := tmp_path / "sweep" / "runs" / "cut")
    (cut / "summary.json").write_text(json.dumps({"status": "running"}))
    for file in cut.iterdir():
        os.utime(file, (1e9, 1e9))
    (spoilt := tmp_path / "spoilt").mkdir()
    shutil.copy(made / "settings.toml", spoilt)
    return tmp_path


def test_runs_are_listed_with_what_they_are_and_found(runs: Path, made: Path) -> None:
    found = {row["run"]: row for row in listed(runs)}
    assert next(iter(found)) == str(Path("sweep", "runs", "cut")), "the one that wrote last stands last"
    first, summary = found["first"], json.loads((made / "summary.json").read_text())
    assert (first["mode"], first["model"], first["status"], first["steps"]) == ("zo", "tiny", "completed", 2)
    assert first["held_out"] == pytest.approx(summary["eval_loss_end"]) and first["score"] is None
    assert found[str(Path("sweep", "runs", "cut"))]["status"] == "silent"
    assert "journal.zofed" in found["spoilt"]["error"]
    assert [row["run"] for row in listed(runs / "first")] == ["first"]


def test_the_command_shows_a_table_or_json(runs: Path, zofed_command: Command) -> None:
    status, out, _ = zofed_command("runs", runs)
    assert status == 0 and "completed" in out and "silent" in out and "spoilt cannot be read: " in out
    status, out, _ = zofed_command("runs", runs, "--json")
    assert status == 0 and json.loads(out) == listed(runs)


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs: name the folder that does"):
        listed(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*none"):
        listed(tmp_path / "none")
