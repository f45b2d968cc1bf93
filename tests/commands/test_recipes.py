"""`zofed recipes` and `zofed copy`: what ships, and a copy that is read as the original is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from zofed.config import task_files
from zofed.experiments import sweep_file

Command = Callable[..., tuple[int, str, str]]


def test_every_experiment_and_task_is_listed_with_what_it_is_for(zofed_command: Command) -> None:
    status, out, _ = zofed_command("recipes")
    lines = {line.split()[0]: line for line in out.splitlines() if "/" in line.split()[0]}
    assert status == 0
    assert lines.keys() == {f"experiments/{name}" for name in sweep_file.names()} | {
        f"tasks/{name}" for name in task_files.names()
    }
    assert all(len(line.split()) > 3 for line in lines.values())


def test_a_copy_is_read_as_the_original_and_nothing_is_overwritten(
    zofed_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = zofed_command("copy", "quick")
    assert status == 0 and f"next: zofed sweep {tmp_path / 'quick.toml'}" in out
    assert (tmp_path / "quick.toml").read_bytes() == sweep_file.find("quick").read_bytes()
    (tmp_path / "quick.toml").write_text("mine")
    status, _, errors = zofed_command("copy", "experiments/quick")
    assert status == 2 and "quick.toml is there already: name another file" in errors
    assert (tmp_path / "quick.toml").read_text() == "mine"
    status, out, _ = zofed_command("copy", "tasks/sst2", "mine.toml")
    assert status == 0 and f"next: zofed train --task {tmp_path / 'mine.toml'}" in out
    assert task_files.load(str(tmp_path / "mine.toml")).settings["task"] == task_files.load("sst2").settings["task"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sst2", "'sst2' is the name of experiments/sst2 and tasks/sst2: give one of them whole"),
        ("quik", "unknown recipe 'quik': did you mean 'quick'?"),
    ],
)
def test_a_name_that_is_none_or_two_is_told(zofed_command: Command, name: str, told: str) -> None:
    status, _, errors = zofed_command("copy", name)
    assert status == 2 and told in errors
