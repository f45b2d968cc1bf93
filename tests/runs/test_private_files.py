"""What runs leave is their owner's alone, whatever the umask, until a person opens it."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from federations import federate

from zofed.base import files
from zofed.config import Settings
from zofed.deployment import superlink, supervisor
from zofed.deployment.supervisor import Child, supervise
from zofed.runs import repair, sinks
from zofed.runs.run_folder import RunFolder
from zofed.training import central

Quick = Callable[..., Settings]

SHORT: dict[str, Any] = {"steps": 2, "rounds": 2, "save_interval": 1, "eval_examples": 4, "keep_best": True}


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """Nothing but the program itself keeps others out."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """By name, the folder's own under "."."""
    found = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in found}


def assert_private(folder: Path) -> None:
    found = modes(folder)
    wanted = {name: 0o700 if (folder / name).is_dir() else 0o600 for name in found}
    assert {name: oct(mode) for name, mode in found.items()} == {name: oct(mode) for name, mode in wanted.items()}


@pytest.mark.pictures
def test_the_files_of_a_run_are_private(tmp_path: Path, quick: Quick) -> None:
    more: dict[str, Any] = {"mode": "calibrate", "bp_interval": 2, "keep_gradients": True}
    out = tmp_path / "runs" / "one"
    central.train(quick(**SHORT, **more), out, lambda _: None)
    assert_private(out)
    found = modes(out)
    assert found.keys() >= {
        ".", "journal.zofed", "metrics.csv", "evaluations.csv", "settings.toml", "inputs.json", "summary.json",
        "loss.png", "checkpoints/step-00000002.safetensors", "checkpoints/best.safetensors", "updates",
        "model/model.safetensors", "model/config.json",
    }  # fmt: skip
    repair.cut(RunFolder(out), 1)
    assert_private(out)
    central.resume(out, lambda _: None)
    assert_private(out)
    library = SimpleNamespace(SummaryWriter=lambda *_, **__: None)  # which makes files in the folder
    sinks.TensorBoard(library, out, Settings(), {}).write(0, {})
    assert modes(out)["tensorboard"] == 0o700


@pytest.mark.pictures
def test_the_files_of_a_federation_are_private(tmp_path: Path, quick: Quick) -> None:
    federate(quick(**SHORT, client_held_out_fraction=0.2), tmp_path / "run", 2)
    assert_private(tmp_path / "run")
    assert modes(tmp_path / "run").keys() >= {
        "journal.zofed", "rounds.log", "rounds.csv", "clients.csv", "client_evaluations.csv", "members.json",
        "partition.csv", "partition.png", "federation.png",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.pictures
def test_the_files_of_a_sweep_are_private(tmp_path: Path, corpus: Path, zofed_command: Callable[..., Any]) -> None:
    text = f'dataset = "{corpus}"\nblock-size = 16\nbatch-size = 2\nqueries = 2\nsteps = 2\neval-examples = 4\n'
    (tmp_path / "sweep.toml").write_text(
        f'about = "two rates"\nseeds = [0]\n[base]\n{text}[grid]\nepsilon = [1e-3, 2e-3]\n'
    )
    out = tmp_path / "sweep"
    status, told, errors = zofed_command("sweep", tmp_path / "sweep.toml", "--out", out)
    assert status == 0, told + errors
    assert_private(out)
    assert {name for name in modes(out) if name.startswith("logs/")} and ".lock" in modes(out)


def test_what_a_person_opened_stays_open(tmp_path: Path, quick: Quick) -> None:
    out = tmp_path / "run"
    out.mkdir(mode=0o750)
    central.train(quick(**SHORT), out, lambda _: None)
    assert modes(out).pop(".") == 0o750 and modes(out)["journal.zofed"] == 0o600
    for path in (out, *out.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = modes(out)
    (out / "settings.toml").write_text((out / "settings.toml").read_text().replace("steps = 2", "steps = 4"))
    central.resume(out, lambda _: None)
    assert json.loads((out / "summary.json").read_text())["status"] == "completed"
    after = modes(out)
    new = after.keys() - before.keys()
    assert new == {"checkpoints/step-00000003.safetensors", "checkpoints/step-00000004.safetensors"}
    assert {after[name] for name in new} == {0o600}
    assert all(after[name] == before[name] for name in before.keys() & after.keys())


def test_a_group_that_cannot_be_given_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    path.write_text("before")
    path.chmod(0o664)
    files.write_private(path, "now")
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    earlier, new = tmp_path / "earlier", tmp_path / "new"
    earlier.touch(0o664)
    new.touch(0o600)

    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "chown", refused)
    files.take_mode(new, earlier)
    assert stat.S_IMODE(new.stat().st_mode) == 0o664  # the same group: nothing to give
    if os.geteuid() == 0:
        monkeypatch.undo()
        os.chown(earlier, -1, 12345)
        files.take_mode(new, earlier)
        assert (new.stat().st_gid, stat.S_IMODE(new.stat().st_mode)) == (12345, 0o664)
        os.chown(new, -1, 0)
        monkeypatch.setattr(os, "chown", refused)
        files.take_mode(new, earlier)
        assert stat.S_IMODE(new.stat().st_mode) == 0o604


def test_what_a_superlink_keeps_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, started = tmp_path / "state", []
    monkeypatch.setattr(superlink, "supervise", lambda children, _: started.extend(children) or 0)
    monkeypatch.setattr(superlink.connections, "save", lambda *_: None)
    monkeypatch.setattr(superlink.flower_commands, "check_port_is_free", lambda *_: None)
    superlink.run_superlink(None, "127.0.0.1", 9093, state, "here")
    script = "import sys; open(sys.argv[1], 'w').close(); sys.exit(2)"
    (child,) = started
    child.command = [os.sys.executable, "-c", script, str(state / "state.db")]
    assert supervise([child]) == supervisor.MISTAKE
    assert_private(state)
    other = Child("other", [os.sys.executable, "-c", script, str(tmp_path / "other")], dict(os.environ))
    assert supervise([other]) == supervisor.MISTAKE and modes(tmp_path)["other"] == 0o666
    state.chmod(0o750)
    superlink.run_superlink(None, "127.0.0.1", 9093, state, "here")
    assert modes(state)["."] == 0o750
