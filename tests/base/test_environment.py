"""What a run writes down of the process that ended it."""

import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zofed.base import environment
from zofed.runs.run_folder import RunFolder

Zofed = Callable[..., tuple[int, str, str]]


def test_a_summary_says_when_where_and_by_which_command_the_run_ended(
    zofed_command: Zofed, tmp_path: Path, corpus: Path
) -> None:
    out = tmp_path / "a run"
    given = ["train", "--steps", "1", "--queries", "2", "--block-size", "16", "--eval-examples", "4", "--device", "cpu"]
    given += ["--dataset", str(corpus), "--out", str(out)]
    assert zofed_command(*given)[0] == 0
    session = RunFolder.open(out).summary()["session"]
    assert session["command"] == f"zofed {' '.join(given[:-1])} '{out}'"
    assert session["host"] == socket.gethostname() and session["threads"] == 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", session["ended"])
    assert re.fullmatch(r"([0-9a-f]{12}(\+changes)?)?", session["commit"])


def test_options_of_other_programs_are_not_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/flwr-serverapp", "--token", "secret"])
    assert environment.command() == "flwr-serverapp"
    monkeypatch.setattr(sys, "argv", [""])
    assert environment.command() == ""
