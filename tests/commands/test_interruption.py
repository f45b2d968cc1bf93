"""Ctrl-C: one line, with what to type to go on, wherever it comes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zofed.deployment import connections, flower_commands, processes
from zofed.federated import server
from zofed.runs.run_folder import RunFolder
from zofed.training import central

Zofed = Callable[..., tuple[int, str, str]]
SMALL = ("--clients", 2, "--rounds", 4, "--queries", 2, "--batch-size", 2, "--block-size", 16, "--eval-examples", 4)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def in_an_import(*_: Any) -> None:
    """What transformers makes of a Ctrl-C while it is imported."""
    try:
        ctrl_c()
    except KeyboardInterrupt:
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from None


@pytest.mark.parametrize("interrupt", [lambda *_: ctrl_c(), in_an_import], ids=["", "in an import"])
@pytest.mark.parametrize(("command", "module", "name"), [("simulate", server, "run"), ("train", central, "train")])
def test_before_the_first_record_there_is_nothing_to_go_on_from(
    zofed_command: Zofed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, module: Any, name: str,
    interrupt: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, name, interrupt)
    status, _, errors = zofed_command(command, "--out", tmp_path / "run")
    assert (status, errors) == (130, "zofed: interrupted; nothing was trained yet: start it again\n")


def test_a_command_that_keeps_nothing_says_so(zofed_command: Zofed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(central, "diagnosis", in_an_import)
    status, _, errors = zofed_command("diagnose")
    assert (status, errors) == (130, "zofed: interrupted; nothing of it goes on: type it again to start over\n")


def test_an_interrupted_simulation_goes_on_to_the_weights_of_an_undisturbed_one(
    zofed_command: Zofed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Path
) -> None:
    given = (*SMALL, "--dataset", corpus, "--device", "cpu", "--out")
    assert zofed_command("simulate", *given, tmp_path / "whole")[0] == 0

    shown = server.Server._show

    def interrupt(self: Any, row: Any) -> None:
        shown(self, row)
        if row["step"] == 2:
            ctrl_c()

    with monkeypatch.context() as patched:
        patched.setattr(server.Server, "_show", interrupt)
        status, _, errors = zofed_command("simulate", *given, tmp_path / "cut")
    resume = ("simulate", "--resume", tmp_path / "cut")
    assert (status, errors) == (130, f"zofed: interrupted; continue with: zofed {' '.join(map(str, resume))}\n")
    assert zofed_command(*resume)[0] == 0
    whole, cut = (RunFolder.open(tmp_path / name).summary() for name in ("whole", "cut"))
    assert whole["digest"] == cut["digest"] and whole["journal_head"] == cut["journal_head"]


@pytest.mark.parametrize("submitted", [False, True])
def test_a_run_says_whether_the_superlink_has_it(
    zofed_command: Zofed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, submitted: bool
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.lab]\naddress = ":local:"\n')

    def stream(command: Any, environment: Any, scratch: Any, note: Any, on_start: Callable[[str], Any]) -> Any:
        if submitted:
            on_start("17")
        raise processes.Stopped(signal.SIGINT)

    monkeypatch.setattr(flower_commands, "stream", stream)
    status, _, errors = zofed_command("run", "lab")
    told = (
        "the run goes on: follow it with flwr log 17 lab, end it with flwr stop 17 lab"
        if submitted
        else "the SuperLink had not confirmed the run: if flwr list lab does not show it, start it again"
    )
    assert (status, errors) == (130, f"zofed: interrupted; {told}\n")
    monkeypatch.setattr(connections, "run_on", in_an_import)
    assert zofed_command("run", "lab")[::2] == (
        130,
        "zofed: interrupted; nothing of it goes on: type it again to start over\n",
    )
