"""A server that dies anywhere and is started again ends with the weights of a run that nothing disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import BACKPROP, SUBSPACE, Quick, Start, records_of, results, run

from zofed.base.errors import UserError
from zofed.base.files import ROOT
from zofed.config import Settings
from zofed.core import journal
from zofed.core.journal import Journal
from zofed.core.replica import Replica
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid
from zofed.federated.rounds import Rounds
from zofed.federated.server import Server
from zofed.runs import repair
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_waiting")

WAYS: dict[str, dict[str, Any]] = {
    "zo": {"optimizer": "adamw", "learning_rate": 1e-3},
    "several": {"steps_per_message": 2, "momentum": 0.5},
    "fo": {"mode": "fo", "optimizer": "adamw", "learning_rate": 1e-3},
    "calibrate": {"mode": "calibrate", **BACKPROP, "optimizer": "mudamw", "learning_rate": 1e-3},
    "instruct": {"mode": "instruct", **BACKPROP},
    "subspace": SUBSPACE,
}
Point = Callable[[pytest.MonkeyPatch, Callable[[int], None]], None]


def around(owner: Any, name: str, round_of: Callable[..., int | None], *, after: bool) -> Point:
    """Die before or after a call, if it is that of the chosen round."""

    def arrange(patch: pytest.MonkeyPatch, die: Callable[[int], None]) -> None:
        whole = getattr(owner, name)

        def dying(self: Any, *arguments: Any, **named: Any) -> Any:
            round_ = round_of(self, *arguments, **named)
            if round_ and not after:
                die(round_)
            found = whole(self, *arguments, **named)
            if round_ and after:
                die(round_)
            return found

        patch.setattr(owner, name, dying)

    return arrange


def of_server(replica: Replica, entry: journal.Entry, *_: Any) -> int:
    return entry.record.round


POINTS: dict[str, Point] = {
    "before asking": around(Rounds, "measure", lambda _, round_: round_, after=False),
    "after asking": around(Rounds, "measure", lambda _, round_: round_, after=True),
    "before the journal": around(Journal, "append_all", lambda _, some: some[0].round, after=False),
    "after the journal": around(Journal, "append_all", lambda _, some: some[0].round, after=True),
    "before moving": around(Replica, "apply", of_server, after=False),
    "after moving": around(Replica, "apply", of_server, after=True),
    "before the metrics": around(Trainer, "_account", lambda _, __, ___, step, *____: step.record.round, after=False),
    "at the metrics": around(Trainer, "_tell", lambda _, __, row: row["step"], after=False),
    "in the display": around(Server, "_show", lambda _, row: row["step"], after=False),
    "after the display": around(Server, "_show", lambda _, row: row["step"], after=True),
    "before the checkpoint": around(Trainer, "_save_checkpoint", lambda _, round_: round_, after=False),
    "after the checkpoint": around(Trainer, "_save_checkpoint", lambda _, round_: round_, after=True),
}
WHOLE: dict[str, tuple[str, list[bytes], str]] = {}


def whole_run(quick: Quick, start: Start, way: str) -> tuple[str, list[bytes], str]:
    """Digest, records and last held-out loss of the undisturbed run."""
    if way not in WHOLE:
        started = start(quick(save_interval=2, **WAYS[way]), name=f"whole {way}")
        summary = run(started)
        WHOLE[way] = summary["digest"], records_of(Path(started[1].out)), str(summary["eval_loss_end"])
    return WHOLE[way]


def disturbed(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, way: str, point: str, round_: int, *, forget: bool
) -> None:
    digest, entries, loss = whole_run(quick, start, way)
    grid, settings = start(quick(save_interval=2, **WAYS[way]))
    died: list[int] = []

    def die(now: int) -> None:
        if now == round_ or (now > round_ and way == "several"):
            died.append(now)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        POINTS[point](patch, die)
        with pytest.raises(KeyboardInterrupt):
            run((grid, settings))
    assert len(died) == 1
    folder = RunFolder(Path(settings.out))
    assert folder.summary()["status"] == "interrupted"
    kept = [entry.raw for entry in journal.read(folder.journal).entries]
    assert kept == entries[: len(kept)]
    assert len(kept) >= round_ - 1
    if forget:
        client.forget()
    summary = run((LocalGrid(client.app, 2, settings.model_dump(by_alias=True)), settings))  # type: ignore[arg-type]
    assert records_of(Path(settings.out)) == entries, "no entry that was written is lost or changed"
    assert summary["digest"] == digest
    assert summary["client_digests"] == {"0": digest, "1": digest}
    assert str(summary["eval_loss_end"]) == loss
    steps = [int(row["step"]) for row in read_table(folder.path / "metrics.csv")]
    assert steps == list(range(7)), "each round has one line"
    rounds = [int(row["round"]) for row in read_table(folder.path / "rounds.csv")]
    assert len(set(rounds)) == len(rounds)
    replies = [(round_, one) for round_, one, result in results(settings) if result == "used"]
    assert len(replies) == len(set(replies)) or way == "instruct"


@pytest.mark.first(1)
@pytest.mark.parametrize("point", POINTS)
def test_a_server_that_dies_anywhere_goes_on_to_the_same_weights(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    disturbed(quick, start, monkeypatch, "zo", point, 4 if "checkpoint" in point else 3, forget=False)


@pytest.mark.first(1)
@pytest.mark.parametrize("point", ["after asking", "after the journal", "in the display"])
@pytest.mark.parametrize("way", ["fo", "calibrate", "subspace"])
def test_a_server_of_every_mode_goes_on_to_the_same_weights(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, way: str, point: str
) -> None:
    disturbed(quick, start, monkeypatch, way, point, 4, forget=True)


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.02}, "learning-rate"),
        ({"queries": 4}, "queries"),
        ({"seed": 5}, "seed"),
        ({"direction_seeds": "shared"}, "direction-seeds"),
        ({"local_steps": 2}, "local-steps"),
        ({"participation": 0.5}, "participation"),
        ({"mode": "fo"}, "mode"),
    ],
    ids=str,
)
def test_a_run_does_not_go_on_with_other_settings(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str
) -> None:
    started = start(quick())

    def die(now: int) -> None:
        if now == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        POINTS["in the display"](patch, die)
        with pytest.raises(KeyboardInterrupt):
            run(started)
    folder = RunFolder(Path(started[1].out))
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"began with another [^:]*\b{named}\b"):
        run(start(quick(**change)))
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
    assert run(start(quick()))["status"] == "completed"


def test_a_finished_run_started_again_changes_nothing(quick: Quick, start: Start) -> None:
    first = run(start(quick()))
    started = start(quick())
    before = RunFolder(Path(started[1].out)).journal.read_bytes()
    again = run(started)
    assert again["digest"] == first["digest"]
    assert again["client_digests"] == first["client_digests"]
    assert RunFolder(Path(started[1].out)).journal.read_bytes() == before


@pytest.mark.parametrize("kept", [3, 5])
def test_half_of_what_an_exchange_gave_is_asked_for_again(
    quick: Quick, start: Start, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk may keep the first of two records that were written at once: the rounds after it stay where they were."""
    digest, entries, _ = whole_run(quick, start, "several")
    grid, settings = start(quick(save_interval=2, **WAYS["several"]))
    run((grid, settings))
    folder = RunFolder(Path(settings.out))
    log, logged = folder.path / "rounds.log", (folder.path / "rounds.log").read_bytes()
    repair.cut(folder, kept - 1)
    log.write_bytes(logged)
    with open(folder.journal, "ab") as file:
        file.write(entries[kept - 1])
    client.forget()
    summary = run(start(quick(save_interval=2, **WAYS["several"])))
    assert f"the exchange from round {kept} on was not whole: asking for it again" in capsys.readouterr().err
    assert records_of(folder.path) == entries
    assert summary["client_digests"] == {"0": digest, "1": digest}


# --- a process that is killed ---


def child(settings_file: str) -> None:
    """What the killed process runs: one federation over a grid of its own."""
    settings = Settings.model_validate_json(Path(settings_file).read_text())
    server.run(LocalGrid(client.app, settings.clients, settings.model_dump(by_alias=True)), settings, "")


@pytest.mark.slow
def test_a_server_killed_at_any_moment_goes_on_to_the_same_weights(quick: Quick, tmp_path: Path) -> None:
    settings = quick(mode="calibrate", **BACKPROP, rounds=40, eval_interval=5, save_interval=3)
    chance, found = random.Random(3), {}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for name, kills in (("whole", 0), ("killed", 6)):
        out = tmp_path / name
        own = settings.model_copy(update={"out": str(out), "clients": 2})
        (tmp_path / f"{name}.json").write_text(own.model_dump_json(by_alias=True))
        command = [sys.executable, __file__, str(tmp_path / f"{name}.json")]
        for kill in range(kills + 1):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            before = (out / "journal.zofed").stat().st_size if (out / "journal.zofed").exists() else 0
            if kill < kills:
                limit = time.monotonic() + 60
                while process.poll() is None and time.monotonic() < limit:
                    if (out / "journal.zofed").exists() and (out / "journal.zofed").stat().st_size > before + 200:
                        break
                    time.sleep(0.002)
                time.sleep(chance.random() * 0.05)
                process.send_signal(signal.SIGKILL)
                process.wait()
                if (out / "journal.zofed").exists():
                    journal.read(out / "journal.zofed")
            else:
                assert process.wait(timeout=200) == 0
        folder = RunFolder(out)
        found[name] = (folder.summary()["digest"], folder.summary()["client_digests"], records_of(out))
    assert found["killed"] == found["whole"]


if __name__ == "__main__":
    child(sys.argv[1])


@pytest.mark.slow
def test_a_federation_cut_before_its_first_record_goes_on(quick: Quick, start: Start, monkeypatch: Any) -> None:
    """Nothing is written that could neither go on nor begin anew."""
    whole = run(start(quick(), name="whole"))
    grid, settings = start(quick())

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "write_summary", crash)
        run((grid, settings))
    assert RunFolder(Path(settings.out)).journal.exists()
    assert run(start(quick()))["digest"] == whole["digest"]


@pytest.mark.slow
def test_a_spoilt_table_behind_the_last_checkpoint_costs_a_federation_by_backpropagation_nothing(
    quick: Quick, start: Start
) -> None:
    """Its gradients are gone: it goes on from the checkpoint, and the rounds before have the lines that were logged."""
    settings = quick(mode="fo", rounds=6, save_interval=2, keep_checkpoints=1)
    grid, settings = start(settings)
    whole = run((grid, settings))
    table = Path(settings.out) / "rounds.csv"
    rows = read_table(table)
    lines = table.read_text().split("\n")
    lines[2] = "2,xx"
    table.write_text("\n".join(lines))
    again = run(start(quick(mode="fo", rounds=6, save_interval=2, keep_checkpoints=1)))
    assert again["status"] == "completed" and again["digest"] == whole["digest"]
    assert [(row["round"], row["loss"]) for row in read_table(table)] == [(row["round"], row["loss"]) for row in rows]
    for checkpoint in (Path(settings.out) / "checkpoints").iterdir():
        checkpoint.unlink()
    table.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"no whole checkpoint lies behind it in .*: bring one back from a copy"):
        run(start(quick(mode="fo", rounds=6, save_interval=2, keep_checkpoints=1)))
