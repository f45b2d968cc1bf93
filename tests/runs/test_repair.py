"""A run cut back to a round loses what it says it loses, and goes on to the weights of a run that nothing disturbed."""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from federations import federate

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import journal
from zofed.core.journal import Journal, JournalError
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid
from zofed.runs import repair, round_log
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, finalize
from zofed.training.finalize import replay_run

Quick = Callable[..., Settings]
Zofed = Callable[..., tuple[int, str, str]]

SIX: dict[str, Any] = {"steps": 6, "rounds": 6, "save_interval": 2, "eval_interval": 3, "eval_examples": 4}
TABLES = ("metrics.csv", "evaluations.csv", "rounds.csv", "clients.csv", "client_evaluations.csv")
WAYS: dict[str, dict[str, Any]] = {
    "zo": {"keep_best": True},
    "federated": {"client_held_out_fraction": 0.2},
    "fo": {"mode": "fo", "optimizer": "adamw", "learning_rate": 1e-3, "keep_checkpoints": 3},
    "calibrate": {"mode": "calibrate", "bp_interval": 2, "keep_gradients": True},
    "federated fo": {"mode": "fo", "keep_checkpoints": 3},
}


def carried_out(way: str, settings: Settings, out: Path) -> dict[str, Any]:
    if way.startswith("federated"):
        return federate(settings, out, 2)
    if RunFolder(out).journal.exists():
        return central.resume(out, lambda _: None)
    return central.train(settings, out, lambda _: None)


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    """All lines but for what clocks say, and for bytes: a client that begins anew is sent what it lacks."""
    apart = ("timestamp", "seconds", "bytes", "payload")
    return {
        name: [{key: row[key] for key in row if not key.startswith(apart)} for row in read_table(out / name)]
        for name in TABLES
    }


def spoil(out: Path, round_: int) -> None:
    """Change a byte of a round's record."""
    path = RunFolder(out).journal
    contents = journal.read(path)
    raw = bytearray(path.read_bytes())
    raw[contents.end - sum(len(entry.raw) for entry in contents.entries if entry.record.round >= round_) + 9] ^= 1
    path.write_bytes(raw)


def files(out: Path) -> dict[str, bytes]:
    """All files but for those put aside or half written."""
    found = (path for path in out.rglob("*") if path.is_file())
    names = {str(path.relative_to(out)): path for path in found}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(("cut-", "."))}


def aside(out: Path) -> Path:
    (found,) = out.glob("cut-*")
    return found


@pytest.fixture(scope="module")
def zo(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished central run, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "zo"
    small = {"dataset": str(corpus), "block_size": 16, "batch_size": 2, "queries": 2, "device": "cpu"}
    given = {key.replace("_", "-"): value for key, value in (SIX | WAYS["zo"] | small).items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalize, "draw", lambda *_: None)
        patch.setenv("ZOFED_CACHE", str(out.parent / "cache"))
        central.train(config.resolve(given), out, lambda _: None)
    return out


@pytest.fixture
def run(zo: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(zo, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.first(2)
@pytest.mark.parametrize("way", WAYS)
def test_a_repaired_run_ends_as_one_that_nothing_disturbed(way: str, tmp_path: Path, quick: Quick) -> None:
    settings, out = quick(**SIX, **WAYS[way]), tmp_path / "run"
    whole = carried_out(way, settings, out)
    expected, before = tables(out), files(out)
    spoil(out, 5)
    with pytest.raises(JournalError, match="zofed journal repair"):
        journal.read(RunFolder(out).journal)
    folder = RunFolder(out)
    found = journal.survey(folder.journal)
    assert (found.contents.last_round, found.behind, found.is_torn) == (4, (6,), False)
    assert repair.last_to_go_on_from(folder, found) == 4
    spoilt = folder.journal.read_bytes()
    repair.cut(folder, 4)
    assert journal.read(folder.journal).head == found.contents.head
    assert tables(out) == {
        name: [row for row in rows if int(row.get("step") or row["round"]) <= 4] for name, rows in expected.items()
    }
    assert not (out / "model").exists() and folder.summary() == {"status": "interrupted"}
    kept = {str(path.relative_to(aside(out))): path.read_bytes() for path in aside(out).rglob("*") if path.is_file()}
    assert kept.pop("journal.zofed") == spoilt
    assert kept.items() <= before.items()
    now = files(out)
    assert all(kept[name] == raw for name, raw in before.items() if now.get(name) != raw and name != "journal.zofed")
    replica, _ = replay_run(RunFolder.open(out))
    assert replica.round == 4
    again = carried_out(way, settings, out)
    assert (again["digest"], again["journal_head"]) == (whole["digest"], whole["journal_head"])
    assert tables(out) == expected
    assert files(out)["journal.zofed"] == before["journal.zofed"]


@pytest.mark.first(1)
@pytest.mark.parametrize("every", [11, 3])
def test_a_repair_that_is_stopped_leaves_the_run_as_it_was_or_repaired(every: int, run: Path) -> None:
    """As by a power cut before each of its lines: a process that ends at once, without a word."""
    spoil(run, 4)
    before, image = files(run), run.with_name("image")
    shutil.copytree(run, image)
    repair.cut(RunFolder(image), 3)
    after = files(image)
    outcomes = []
    for line in range(0, 1000, every):
        shutil.rmtree(image)
        shutil.copytree(run, image)
        if not is_stopped(image, line):
            break
        if not (image / repair.PENDING).exists():
            assert files(image) in (before, after)
            outcomes.append("before" if files(image) == before else "after")
            continue
        outcomes.append("settled")
        RunFolder.open(image)
        assert files(image) == after
        assert journal.read(RunFolder(image).journal).last_round == 3
        assert files(aside(image))["journal.zofed"] == before["journal.zofed"]
    assert outcomes == sorted(outcomes, key=["before", "settled", "after"].index)
    assert outcomes.count("before") > 30 // every and outcomes.count("settled") > 30 // every
    repair.cut(RunFolder(run), 3)  # what a killed one left is in nobody's way
    assert files(run) == after


def is_stopped(out: Path, line: int) -> bool:
    """Cut in a process that ends before its line of that number; whether it got there."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal line
        if frame.f_code.co_filename != repair.__file__:
            return None
        line -= event == "line"
        if line < 0:
            os._exit(9)
        return trace

    if not (process := os.fork()):
        sys.settrace(trace)
        repair.cut(RunFolder(out), 3)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_the_command_tells_and_changes_nothing_until_it_is_given_a_round(run: Path, zofed_command: Zofed) -> None:
    digest = RunFolder(run).summary()["digest"]
    assert "nothing to repair" in zofed_command("journal", "repair", str(run))[1]
    spoil(run, 4)
    before = files(run)
    status, _, error = zofed_command("journal", "verify", str(run))
    assert status and f"zofed journal repair {run}" in error
    status, told, _ = zofed_command("journal", "repair", str(run))
    assert status == 0 and files(run) == before and not [*run.glob("*cut*")]
    assert "whole up to round 3" in told and "does not fit its checksum" in told
    assert "2 whole records stand behind the damage, of rounds 5 to 6" in told
    assert "rounds 4 to 6" in told and "checkpoints/step-00000006.safetensors" in told and "  model" in told
    assert f"zofed journal repair {run} --to 3" in told
    assert zofed_command("journal", "repair", str(run), "--to", "4")[0] and files(run) == before
    status, told, _ = zofed_command("journal", "repair", str(run), "--to", "3")
    assert status == 0 and str(aside(run)) in told and f"zofed train --resume {run}" in told
    assert zofed_command("journal", "verify", str(run))[0] == 0
    assert zofed_command("journal", "replay", str(run))[0] == 0
    assert zofed_command("train", "--resume", str(run))[0] == 0
    assert RunFolder(run).summary()["digest"] == digest


def test_a_whole_run_goes_back_to_any_round_and_keeps_what_was_each_time(run: Path) -> None:
    best = RunFolder(run).best()[1]["round"]
    for to in (5, 3, 0):
        repair.cut(RunFolder(run), to)
        assert journal.read(RunFolder(run).journal).last_round == to
        assert [row["step"] for row in read_table(run / "metrics.csv")] == [str(round_) for round_ in range(to + 1)]
        assert (run / "checkpoints" / "best.safetensors").exists() == (best <= to)
        assert all(int(path.stem[5:]) <= to for path in RunFolder(run).checkpoints())
    assert sorted(journal.read(path / "journal.zofed").last_round for path in run.glob("cut-*")) == [3, 5, 6]
    with pytest.raises(UserError, match="last round, and it is whole"):
        repair.cut(RunFolder(run), 0)


def test_what_was_edited_is_cut_too(run: Path) -> None:
    path = RunFolder(run).journal
    entries = journal.read(path).entries
    without = b"".join(entry.raw for entry in entries)
    others = b"".join(entry.raw for entry in (*entries[:2], *entries[3:]))
    path.write_bytes(path.read_bytes().replace(without, others))
    found = journal.survey(path)
    assert "does not continue the history" in found.damage and found.behind == (5, 6)
    repair.cut(RunFolder(run), 2)
    assert journal.read(path).last_round == 2


def test_a_torn_end_is_told_as_one(run: Path, zofed_command: Zofed) -> None:
    with open(RunFolder(run).journal, "ab") as file:
        file.write(b"half an entry")
    told = zofed_command("journal", "repair", str(run))[1]
    assert "whole up to round 6" in told and "is cut off by itself" in told and "no round" in told
    repair.cut(RunFolder(run), 6)
    assert not journal.survey(RunFolder(run).journal).damage


def test_what_cannot_be_repaired_is_refused_with_a_sentence(run: Path, zofed_command: Zofed) -> None:
    path = RunFolder(run).journal
    with Journal.open(path), pytest.raises(UserError, match="in use by another process"):
        repair.cut(RunFolder(run), 3)
    (run / repair.PENDING).write_text("{}")
    with pytest.raises(UserError, match="is spoilt: remove it"):
        RunFolder.open(run)
    (run / repair.PENDING).unlink()
    raw = bytearray(path.read_bytes())
    raw[40] ^= 1
    path.write_bytes(raw)
    before = files(run)
    for more in ([], ["--to", "3"]):
        status, _, error = zofed_command("journal", "repair", str(run), *more)
        assert status and "damaged header; restore it from a copy" in error
    assert files(run) == before


def test_rounds_of_one_exchange_stay_together(tmp_path: Path, quick: Quick) -> None:
    out = tmp_path / "run"
    federate(quick(**SIX, steps_per_message=2), out, 2)
    with pytest.raises(UserError, match="round 4 came of the same answers as round 3; give 2 or 4"):
        repair.cut(RunFolder(out), 3)
    spoil(out, 4)
    assert repair.last_to_go_on_from(RunFolder(out), journal.survey(RunFolder(out).journal)) == 2
    assert [round_log.exchange_of(out, round_) for round_ in range(1, 8)] == [1, 1, 3, 3, 5, 5, 7]
    with closing(round_log.RoundLog(out)) as log:
        log.write({"round": 3, "now": {}})  # asked once more, for one round
    assert [round_log.exchange_of(out, round_) for round_ in (3, 4, 6)] == [3, 4, 6]


@pytest.mark.slow
def test_gradients_of_clients_that_are_gone_stay_gone(tmp_path: Path, quick: Quick) -> None:
    out = tmp_path / "run"
    federate(quick(**SIX, mode="fo", keep_checkpoints=1), out, 2)
    found = journal.survey(RunFolder(out).journal)
    assert repair.refusal(RunFolder(out), found.contents.entries, 6) == ""
    with pytest.raises(UserError, match=r"round 1 is a step by backpropagation whose gradient is gone.* give 0 or 6"):
        repair.cut(RunFolder(out), 5)


def test_clients_that_are_ahead_come_back_to_the_run(tmp_path: Path, quick: Quick) -> None:
    out = tmp_path / "run"
    client.forget()
    settings = quick(**SIX, clients=2, out=str(out))
    grid = LocalGrid(client.app, 2, settings.model_dump(by_alias=True))
    whole = server.run(grid, settings, "")
    repair.cut(RunFolder(out), 3)
    again = server.run(grid, settings, "")
    assert again["digest"] == whole["digest"]
    assert set(again["client_digests"].values()) == {whole["digest"]}
