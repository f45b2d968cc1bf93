"""How much a command says: ZOFED_LOG."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from zofed.base import log

Command = Callable[..., tuple[int, str, str]]
SHORT = ("--eval-interval", "1", "--eval-examples", "4", "--block-size", "16", "--queries", "2")


@pytest.fixture(autouse=True)
def loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `prepare` sets, put back."""
    root, levels = logging.getLogger(), {name: logging.getLogger(name).level for name in log.TALKATIVE}
    handlers, before = list(root.handlers), root.level
    monkeypatch.setenv("FLWR_LOG_LEVEL", "")
    monkeypatch.delenv("FLWR_LOG_LEVEL")
    yield
    root.handlers[:] = handlers
    root.setLevel(before)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    ("wanted", "level", "shows"), [("", "info", True), ("DEBUG", "debug", True), ("warning", "warning", False)]
)
def test_the_variable_says_how_much(
    wanted: str, level: str, shows: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZOFED_LOG", wanted)
    assert (log.level(), log.shows_progress()) == (level, shows)
    log.tell("round 3/5")
    assert capsys.readouterr().out == ("round 3/5\n" if shows else "")


def test_a_level_that_there_is_none_of_is_refused(zofed_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOFED_LOG", "loud")
    told = "zofed: ZOFED_LOG = 'loud': set it to warning, info or debug\n"
    assert zofed_command("version") == (2, "", told)


def test_warning_leaves_out_progress_but_not_results(
    zofed_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOFED_LOG", "warning")
    status, told, errors = zofed_command("train", *SHORT, "--steps", "2", "--out", tmp_path / "run")
    assert status == 0 and errors == ""
    assert "step 1/2" not in told and "data: " not in told and "weights SHA-256 " in told
    status, told, _ = zofed_command("simulate", *SHORT, "--rounds", "2", "--out", tmp_path / "federation")
    assert status == 0 and "round 1/2" not in told and "weights SHA-256 " in told


def test_debug_tells_where_an_error_came_up_and_what_libraries_say(
    zofed_command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ZOFED_LOG", "debug")
    with caplog.at_level(logging.DEBUG):
        status, _, errors = zofed_command("train", "--steps", "-1")
    assert status == 2 and errors.startswith("Traceback ") and "\nzofed: steps = '-1'" in errors
    assert any(record.name == "zofed" and "'--steps'" in record.getMessage() for record in caplog.records)
    monkeypatch.setenv("ZOFED_LOG", "info")
    assert "Traceback" not in zofed_command("train", "--steps", "-1")[2]
