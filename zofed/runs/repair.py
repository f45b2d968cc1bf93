"""A run cut back to one of its rounds: what lies behind it is put aside, whole, and the run goes on from there.

    RUN/cut-2026-05-04T093000Z/   all that was changed or taken away, as it was, by the same names
    RUN/repair.json               while a repair is under way: to which round

First the folder aside is made, whole on disk. With `repair.json` the repair is settled: what stops before it leaves the
run as it was, and what stops behind it is carried to its end whenever the run's folder is next opened.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zofed.base import shell
from zofed.base.errors import DiskError, UserError
from zofed.base.files import hold, private_folder, sync_folder, whole_folder, write_private
from zofed.base.parsing import from_json
from zofed.base.texts import is_count
from zofed.core.journal import Contents, Entry, Survey, survey
from zofed.core.replica import update_digest
from zofed.runs import checkpoints, round_log, samples, tables
from zofed.runs.run_folder import BEST, CENTRAL, RunFolder, timestamp

PENDING = "repair.json"
# Tables by the column that tells the round, and further files that hold lines of many rounds.
_TABLES = {"metrics.csv": "step", "evaluations.csv": "step", "rounds.csv": "round", "clients.csv": "round"}
_TABLES |= {"client_evaluations.csv": "round"}
_LINES = (*_TABLES, samples.SAMPLES, round_log.NAME)
_OF_ITS_END = ("model", "loss.png", "federation.png", "course.csv")  # of all rounds together, made again at the end


@dataclass(frozen=True)
class Lost:
    """What a cut puts aside. rounds: the first and the last known of; seconds: of training; files: checkpoints and more
    that lie behind it, by their names in the run's folder."""

    rounds: tuple[int, int]
    seconds: float
    files: tuple[str, ...]


def last_to_go_on_from(folder: RunFolder, found: Survey) -> int:
    """The last round of the whole part of a journal from which the run can go on, be it 0."""
    entries = found.contents.entries
    rounds = [0, *(entry.record.round for entry in entries)]
    return next(round_ for round_ in reversed(rounds) if not refusal(folder, entries, round_))


def refusal(folder: RunFolder, entries: Sequence[Entry], to: int) -> str:
    """Why the run could not go on from a round of its journal as it went on before; empty where it can.

    A central run measures again whatever it lacks. Clients are not asked twice: of a federation a gradient that is gone
    stays gone, and the rounds of one exchange stay together.
    """
    if folder.way == CENTRAL:
        return ""
    if to and round_log.exchange_of(folder.path, to + 1) <= to:
        return f"round {to + 1} came of the same answers as round {to}"
    kept = [entry for entry in entries if entry.record.round <= to]
    lacking = [entry.record.round for entry in kept if _lacks_update(folder, entry)]
    heads = {entry.chain.hex(): entry.record.round for entry in kept}
    if not lacking or any(lacking[-1] <= heads.get(_head(path), -1) for path in folder.checkpoints()):
        return ""
    return f"round {lacking[-1]} is a step by backpropagation whose gradient is gone, and no checkpoint lies behind it"


def _lacks_update(folder: RunFolder, entry: Entry) -> bool:
    digest = update_digest(entry.record)
    return digest is not None and not folder.has_update(digest)


def _head(path: Path) -> str:
    """Chain of the journal where a checkpoint stands, hex; empty where the file does not tell."""
    return str(checkpoints.facts(path).get("head", ""))


def lost(folder: RunFolder, found: Survey, to: int) -> Lost:
    """What cutting behind round `to` puts aside."""
    rows = tables.read_table(folder.path / "metrics.csv")
    told = [int(row["step"]) for row in rows if is_count(row.get("step", ""))]
    last = max(to, found.contents.last_round, *found.behind, *told)
    seconds = [float(row["seconds"]) for row in rows[to:] if row.get("seconds")] if len(told) == len(rows) else []
    return Lost((to + 1, last), seconds[-1] - seconds[0] if seconds else 0.0, tuple(_behind(folder, found, to)))


def _behind(folder: RunFolder, found: Survey, to: int) -> Iterator[str]:
    """Names of what is of later rounds alone: states, the gradients that no record left needs, the results."""
    for path in folder.checkpoints():
        if not is_count(path.stem[5:]) or int(path.stem[5:]) > to:
            yield f"checkpoints/{path.name}"
    best = folder.path / "checkpoints" / f"{BEST}.safetensors"
    if best.exists() and checkpoints.facts(best).get("round") not in range(to + 1):
        yield f"checkpoints/{best.name}"
    kept = {digest.hex() for entry in found.contents.entries if (digest := _update_of(entry, to))}
    for path in sorted((folder.path / "updates").glob("*.safetensors")):
        if path.stem not in kept:
            yield f"updates/{path.name}"
    yield from (name for name in _OF_ITS_END if (folder.path / name).exists())


def _update_of(entry: Entry, to: int) -> bytes | None:
    return update_digest(entry.record) if entry.record.round <= to else None


def cut(folder: RunFolder, to: int) -> Path:
    """Cut a run back to round `to` of its journal; returns the folder that holds what was, for whoever wants it back.

    Raises UserError for a round that cannot be cut to, and where another process works in the run; DiskError where the
    disk does not take it.
    """
    with _held(folder):
        found = survey(folder.journal)
        check(folder, found, to)
        try:
            aside = _put_aside(folder, found, to)
            write_private(folder.path / PENDING, json.dumps({"to": to, "aside": aside.name}) + "\n")
            sync_folder(folder.path)
            _carry_out(folder)
        except OSError as error:
            raise DiskError(
                f"cannot write {error.filename or folder.path}: {error.strerror or error}; free some space, then give "
                "the command again"
            ) from error
    return aside


def check(folder: RunFolder, found: Survey, to: int) -> None:
    """Raise UserError unless a run can be cut back to round `to`, with the round that it can be."""
    last = found.contents.last_round
    if not 0 <= to <= last:
        raise UserError(f"--to {to}: the journal is whole up to round {last}; give 0 to {last}")
    if why := refusal(folder, found.contents.entries, to):
        rounds = [0, *(entry.record.round for entry in found.contents.entries)]
        nearest = sorted(rounds, key=lambda round_: abs(round_ - to))  # each refusal reads what was logged anew
        others = (round_ for round_ in nearest if not refusal(folder, found.contents.entries, round_))
        near = list(itertools.islice(others, 2))
        remedy = f"give {' or '.join(map(str, sorted(near)))}" if near else "restore the run from a copy"
        raise UserError(f"--to {to}: the run could not go on from there: {why}; {remedy}")
    if to == last and not found.damage:
        raise UserError(f"--to {to}: that is the journal's last round, and it is whole: there is nothing to cut")


def _put_aside(folder: RunFolder, found: Survey, to: int) -> Path:
    """A folder with all that the cut will change or take away, as it is, on disk."""
    away = list(_behind(folder, found, to))
    changed = [name for name in (folder.journal.name, "summary.json", *_LINES) if (folder.path / name).exists()]
    aside, number = folder.path / (name := f"cut-{timestamp().replace(':', '')}"), 1
    while aside.exists():
        number += 1
        aside = folder.path / f"{name}-{number}"
    temporary = folder.path / ".cut.new"
    with whole_folder(temporary):
        temporary.chmod(0o700)
        for name in changed:  # which is added to in place
            shutil.copy2(folder.path / name, temporary / name)
        for name in away:  # which is only ever replaced: another name for it costs nothing
            private_folder((temporary / name).parent)
            if (folder.path / name).is_dir():
                shutil.copytree(folder.path / name, temporary / name, copy_function=_link)
            else:
                _link(folder.path / name, temporary / name)
    temporary.rename(aside)
    sync_folder(folder.path)
    return aside


def _link(path: str | Path, place: str | Path) -> None:
    """A second name for a file, or a copy of it where the disk has no such names."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copy2(path, place)


def complete(folder: RunFolder) -> None:
    """Carry a repair to its end that was stopped once it was settled.

    Raises UserError where another process works in the run, and where the disk does not take it.
    """
    with _held(folder):
        if not (folder.path / PENDING).exists():  # whoever held the journal until now has done it
            return
        try:
            _carry_out(folder)
        except OSError as error:
            raise UserError(
                f"a repair of {folder.path} was stopped on its way and cannot go on: cannot write "
                f"{error.filename or folder.path}: {error.strerror or error}; mend that, then give the command again"
            ) from error


def _carry_out(folder: RunFolder) -> None:
    """What the settled repair says, as often as it takes: each step leaves alone what is done.

    All but the round comes from the files themselves, so that no file can have others than them taken away.
    """
    pending = folder.path / PENDING
    try:
        to = int(from_json(pending.read_text(encoding="utf-8"))["to"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{pending}, which tells of a repair, is spoilt: remove it, and repair the run anew") from error
    folder.write_summary({"status": "interrupted"})
    found = survey(folder.journal)
    _truncate(folder.journal, found.contents, to)
    for name, column in _TABLES.items():
        if (folder.path / name).exists():
            tables.cut(folder.path / name, column, to)
    samples.keep(folder.path, {sample["step"] for sample in samples.read(folder.path) if sample["step"] <= to})
    round_log.keep(folder.path, to)
    for name in _behind(folder, found, to):
        path = folder.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for inner in (path for path in (folder.path / "checkpoints", folder.path / "updates") if path.is_dir()):
        sync_folder(inner)
    pending.unlink()
    sync_folder(folder.path)


def _truncate(journal: Path, contents: Contents, to: int) -> None:
    """Cut the file behind the entry of a round; durable when this returns."""
    size = contents.end - sum(len(entry.raw) for entry in contents.entries if entry.record.round > to)
    with open(journal, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


@contextmanager
def _held(folder: RunFolder) -> Iterator[None]:
    """While active no other process writes the journal. Raises UserError where one does."""
    try:
        file = os.open(folder.journal, os.O_RDWR)
    except OSError as error:
        raise UserError(f"cannot write {folder.journal}: {error.strerror}; mend its permissions") from error
    try:
        hold(file, f"{folder.path} is in use by another process: wait for it or stop it")
        yield
    finally:
        os.close(file)


def command(folder: RunFolder, to: int | str) -> str:
    """The command that cuts a run back."""
    return shell.command("zofed", "journal", "repair", folder.path, "--to", str(to))
