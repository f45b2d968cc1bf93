"""Each remedy that zofed prints is followed to the letter, and leads to the weights of the undisturbed run."""

import errno
import json
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from zofed.base.errors import UserError
from zofed.commands import cli
from zofed.core import journal
from zofed.data import encoding
from zofed.models import spec
from zofed.runs import checkpoints
from zofed.runs.round_log import RoundLog
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Table
from zofed.training import central, finalize
from zofed.training.finalize import status_kept
from zofed.training.trainer import Trainer

Zofed = Callable[..., tuple[int, str, str]]
SMALL = ["--batch-size", "2", "--block-size", "16", "--eval-examples", "4", "--save-interval", "2", "--device", "cpu"]
COMMANDS = {
    "zo": ["train", "--steps", "4", "--queries", "2"],
    "fo": ["train", "--steps", "4", "--mode", "fo", "--optimizer", "adamw", "--learning-rate", "1e-3"],
    "federated": ["simulate", "--rounds", "4", "--queries", "2"],
}
NAME = "it's a run; $HOME"  # which a shell would read otherwise, were it printed as it is


def command_in(text: str) -> list[str]:
    """The words after `zofed` of the command that a message tells to run."""
    found = re.findall(r"(zofed (?:train|simulate|journal|eval) .*?)(?= cuts them|, or choose|\n|$)", text)
    assert found, text
    return shlex.split(found[-1])[1:]


def digest_of(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["digest"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("remedies")
    corpus = place / "corpus.jsonl"
    documents = encoding.load_documents("sample-dclm")[:20]
    corpus.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents), encoding="utf-8")
    for name, command in COMMANDS.items():
        out = ["--dataset", str(corpus), "--out", str(place / name / NAME)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["zofed", *command, *SMALL, *out])
            cli.app(standalone_mode=False)
    return {name: place / name / NAME for name in COMMANDS}


@pytest.fixture
def begun(
    zofed_command: Zofed, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[Path, str]]:
    """A run that Ctrl-C ended before its third step, and what the command said then."""

    def make(name: str) -> tuple[Path, str]:
        out = tmp_path / NAME
        corpus = finished["zo"].parents[1] / "corpus.jsonl"
        account = Trainer._account

        def interrupted(trainer: Any, *arguments: Any) -> None:
            if trainer.replica.round == 3:
                raise KeyboardInterrupt
            account(trainer, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_account", interrupted)
            words = [*COMMANDS[name], *SMALL, "--dataset", corpus, "--out", out]
            status, _, errors = zofed_command(*words)
        assert status == 130
        return out, errors

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_after_an_interruption(zofed_command: Zofed, begun: Any, finished: dict[str, Path], name: str) -> None:
    out, errors = begun(name)
    assert zofed_command(*command_in(errors))[::2] == (0, "")
    assert digest_of(out) == digest_of(finished[name])


# What spoils a finished or begun run; the command that then names the remedy; what it leads to.
Spoil = Callable[[Path], object]


def torn(folder: Path) -> None:
    raw = (folder / "journal.zofed").read_bytes()
    (folder / "journal.zofed").write_bytes(raw[:-3])


def without_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")


def without_rounds(folder: Path) -> None:
    (folder / "rounds.csv").unlink(missing_ok=True)


TOLD: dict[str, tuple[str, Spoil, list[str]]] = {
    "a torn journal": ("zo", torn, ["journal", "verify", "FOLDER"]),
    "a torn journal of a federation": ("federated", torn, ["journal", "verify", "FOLDER"]),
    "a federation resumed centrally": ("federated", torn, ["train", "--resume", "FOLDER"]),
    "the same without rounds.csv": ("federated", without_rounds, ["train", "--resume", "FOLDER"]),
    "a central run simulated": ("zo", torn, ["simulate", "--resume", "FOLDER"]),
    "a folder that holds a run": ("zo", torn, ["train", "--out", "FOLDER"]),
    "a folder that holds a federation": ("federated", torn, ["train", "--out", "FOLDER"]),
    "a run without its model": ("fo", without_model, ["eval", "FOLDER"]),
    "a federation without its model": ("federated", without_model, ["eval", "FOLDER"]),
}


@pytest.mark.first(1)
@pytest.mark.parametrize("told", TOLD)
def test_what_a_refusal_names(zofed_command: Zofed, finished: dict[str, Path], tmp_path: Path, told: str) -> None:
    name, spoil, words = TOLD[told]
    folder = Path(shutil.copytree(finished[name], tmp_path / NAME))
    spoil(folder)
    status, _, errors = zofed_command(*(str(folder) if word == "FOLDER" else word for word in words))
    assert status == 2 and len(errors.splitlines()) == 1
    assert zofed_command(*command_in(errors))[::2] == (0, "")
    assert digest_of(folder) == digest_of(finished[name])
    assert RunFolder(folder).has_model()


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["zo", "federated"])
def test_what_the_end_of_a_run_names(
    zofed_command: Zofed, finished: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(finished[name], tmp_path / NAME))
    status, output, _ = zofed_command(COMMANDS[name][0], "--resume", folder)
    assert status == 0
    again, replay = re.findall(r"(?:the same once more|next): (zofed .*)", output)
    assert zofed_command(*shlex.split(again)[1:])[::2] == (0, "")
    assert digest_of(tmp_path / f"{NAME}-again") == digest_of(folder)
    status, output, _ = zofed_command(*shlex.split(replay)[1:])
    assert status == 0 and "equal to the run's weights" in output


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*_: Any, **__: Any) -> Any:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


class Full:
    """A file that takes no more."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, raw: bytes) -> int:
        return self.file.write(raw[:5])  # a part of it

    def fileno(self) -> int:
        return self.file.fileno()

    def close(self) -> None:
        self.file.close()


def full_table(patch: pytest.MonkeyPatch) -> None:
    begin = Table.__init__

    def opened(table: Any, path: Path, columns: Any) -> None:
        begin(table, path, columns)
        table._file = Full(table._file)

    patch.setattr(Table, "__init__", opened)


def at_the_end(write: Any) -> Any:
    """Fails for the summary that says a run is complete."""

    def text(folder: RunFolder, name: str, text: str) -> None:
        full() if '"completed"' in text else write(folder, name, text)

    return text


DISK: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the journal": lambda patch: patch.setattr(journal, "_sync_data", full),
    "a table": full_table,
    "a checkpoint": lambda patch: patch.setattr(checkpoints, "save_file", full_for_safetensors),
    "the model": lambda patch: patch.setattr(spec, "save", full_for_safetensors),
    "the model's tokenizer": lambda patch: patch.setattr(spec, "save", full),
    "the summary": lambda patch: patch.setattr(RunFolder, "write_text", at_the_end(RunFolder.write_text)),
}


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("name", "what"), [*(("fo", what) for what in DISK), ("federated", "the log of rounds"), ("federated", "a table")]
)
def test_a_full_disk_keeps_the_run_and_names_what_goes_on(
    zofed_command: Zofed, begun: Any, finished: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    out, errors = begun(name)
    going_on = command_in(errors)
    fills = DISK | {"the log of rounds": lambda patch: patch.setattr(RoundLog, "write", full)}
    with monkeypatch.context() as patch:
        fills[what](patch)
        status, _, errors = zofed_command(*going_on)
    assert status == 2
    assert len(errors.splitlines()) == 1
    assert re.search(r"free some space|mend the disk", errors)
    assert command_in(errors) == going_on
    assert RunFolder(out).summary()["status"] == "failed"
    assert zofed_command(*going_on)[::2] == (0, "")
    assert digest_of(out) == digest_of(finished[name])


@pytest.mark.pictures
def test_a_picture_that_cannot_be_drawn_ends_no_run(
    zofed_command: Zofed, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished["fo"], tmp_path / NAME))
    without_model(folder)
    monkeypatch.setattr("zofed.runs.pictures.plot_loss", full)
    status, _, errors = zofed_command("train", "--resume", folder)
    assert status == 0 and "plot_loss" in errors and "No space left" in errors
    assert digest_of(folder) == digest_of(finished["fo"])


# --- checkpoints ---


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool) -> None:
    """A checkpoint with other facts, under the seal they had or, as an earlier version wrote it, without one."""
    with safe_open(path, "pt") as file:
        about = dict(file.metadata())
    facts = json.loads(about["facts"])
    change(facts)
    if not sealed:
        del about["seal"]
    save_file(load_file(path), path, about | {"facts": json.dumps(facts)})


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "of an earlier version"])
@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(round=2),
        lambda facts: facts.pop("head"),
        lambda facts: facts.pop("round"),
        lambda facts: facts.update(head=[1]),
        lambda facts: facts.update(head="00" * 16),
        lambda facts: facts.update(round="4"),
    ],
    ids=["another round", "no head", "no round", "a list for a head", "another head", "words for a round"],
)
def test_a_checkpoint_whose_facts_are_wrong_is_left_aside(
    finished: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], sealed: bool
) -> None:
    folder = Path(shutil.copytree(finished["fo"], tmp_path / NAME))
    entries = journal.read(folder / "journal.zofed").entries
    rewritten(sorted((folder / "checkpoints").glob("step-*"))[-1], change, sealed=sealed)
    (folder / "summary.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        central.resume(folder, lambda _: None)
    assert digest_of(folder) == digest_of(finished["fo"])
    assert journal.read(folder / "journal.zofed").entries == entries


def test_a_whole_checkpoint_of_an_earlier_version_is_taken(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(finished["fo"], tmp_path / NAME))
    for path in (folder / "checkpoints").glob("step-*"):
        rewritten(path, lambda _: None, sealed=False)
    replica, start = finalize.replay_run(RunFolder(folder))
    assert (replica.digest(), start) == (digest_of(finished["fo"]), 4)


def test_a_reader_that_goes_away_interrupts_a_run_and_is_no_full_disk(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(BrokenPipeError), status_kept(folder):
        raise BrokenPipeError(32, "Broken pipe")
    assert folder.summary() == {"status": "interrupted"}
    told = r"Too many open files; mend that, then continue with: zofed"
    with pytest.raises(UserError, match=told), status_kept(folder):
        raise OSError(24, "Too many open files")
