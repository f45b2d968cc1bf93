"""Power cuts by the thousand: each leaves a run's folder as some disk would, and the run goes on from it.

It has to reach the weights and the tables of the run that nothing disturbed, by itself or by the remedy that it prints.
"""

import hashlib
import json
import random
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks import crash_images
from benchmarks.crash_images import MODELS, Recording
from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.journal import OF_A_RUN, JournalError, survey
from zofed.data import documents
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid
from zofed.runs import repair
from zofed.runs.run_folder import CENTRAL, SIMULATED, RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, finalize

SMALL: dict[str, Any] = {
    "block-size": 16, "batch-size": 2, "queries": 2, "steps": 5, "rounds": 5, "eval-interval": 2, "eval-examples": 4,
    "save-interval": 2, "device": "cpu", "baselines": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "zo": {"keep-best": True},
    "fo": {"mode": "fo", "optimizer": "adamw", "learning-rate": 1e-3},
    "calibrate": {"mode": "calibrate", "bp-interval": 2, "keep-gradients": True},
    "federated zo": {"clients": 2, "client-held-out-fraction": 0.2, "steps-per-message": 2},
    "federated fo": {"clients": 2, "mode": "fo"},
}
TABLES = ("metrics.csv", "evaluations.csv", "rounds.csv", "clients.csv", "client_evaluations.csv", "partition.csv")
_OF_CLOCKS = ("timestamp", "seconds", "bytes", "payload")  # a client that begins anew is sent what it lacks
JOURNAL = f"runs/run/{OF_A_RUN}"


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    """All lines of a run's tables, but for what clocks say, and for bytes."""
    return {
        name: [{key: row[key] for key in row if not key.startswith(_OF_CLOCKS)} for row in read_table(out / name)]
        for name in TABLES
        if (out / name).exists()
    }


def settings_of(kind: str, corpus: Path) -> Settings:
    """Those of a run of a second."""
    return config.resolve(SMALL | {"dataset": str(corpus)} | KINDS[kind])


def begun(kind: str, settings: Settings, out: Path) -> dict[str, Any]:
    """The run, from its first step; its summary."""
    if kind.startswith("federated"):
        client.forget()
        settings = settings.model_copy(update={"out": str(out)})
        return server.run(LocalGrid(client.app, 2, settings.model_dump(by_alias=True)), settings, "", SIMULATED)
    return central.train(settings, out, lambda _: None)


def gone_on(kind: str, settings: Settings, out: Path) -> dict[str, Any]:
    """As `zofed train --resume`, or simulate, does; where no journal stands there is nothing to go on from."""
    if not RunFolder(out).journal.exists():
        return begun(kind, settings, out)
    folder = RunFolder.open(out)
    folder.check_way(SIMULATED if kind.startswith("federated") else CENTRAL)
    return begun(kind, settings, out) if kind.startswith("federated") else central.resume(out, lambda _: None)


def follow(kind: str, settings: Settings, out: Path, error: UserError) -> dict[str, Any]:
    """What a person does on reading the error: repairs the journal, takes another folder, or starts again."""
    told = str(error)
    if isinstance(error, JournalError) and "journal repair" in told:
        folder = RunFolder.open(out)
        with suppress(JournalError):
            found = survey(folder.journal)
            repair.cut(folder, repair.last_to_go_on_from(folder, found))
            return gone_on(kind, settings, out)
    if any(words in told for words in ("another folder", "start the run again", "restore it from a copy", "it lacks")):
        return begun(kind, settings, out.with_name(f"{out.name} again"))
    raise error


@dataclass
class Run:
    """A run that nothing disturbs, recorded: `place` holds its folder, and then those of its images."""

    kind: str
    settings: Settings
    place: Path
    recording: Recording = field(init=False)
    digest: str = field(init=False)
    tables: dict[str, list[dict[str, str]]] = field(init=False)
    known: dict[str, str] = field(default_factory=dict)  # how images ended, by their digest

    def __post_init__(self) -> None:
        whole = self.place / "whole"
        whole.mkdir(parents=True)
        with crash_images.recorded(whole) as self.recording:
            self.digest = begun(self.kind, self.settings, whole / "runs" / "run")["digest"]
        self.tables = tables(whole / "runs" / "run")

    def outcome(self, model: str, number: int) -> str:
        """How an image ends: `same`, `same by the remedy`, or what is wrong with it.

        Of every fourth image the run that goes on from it is cut, too.
        """
        chance = random.Random(f"{self.kind} {model} {number}")
        place = self.place / "image"
        told = self._cut(self.recording, model, chance, place)
        if told is not None and number % 4 == 3 and (place / JOURNAL).exists():
            with crash_images.recorded(place) as second, suppress(UserError):
                gone_on(self.kind, self.settings, place / "runs" / "run")
            told = self._cut(second, model, chance, place, told)
        if told is None:
            return "lost: records that were acknowledged"
        key = _digest(place)
        if key not in self.known:
            self.known[key] = self._outcome(place / "runs" / "run")
        return self.known[key]

    @staticmethod
    def _cut(recording: Recording, model: str, chance: random.Random, place: Path, before: bytes = b"") -> bytes | None:
        """Have `place` hold what a power cut at any moment of a recording leaves.

        Returns the records that were acknowledged by then, those before the recording among them; None where some are
        lost.
        """
        moment = chance.randrange(len(recording.events))
        state = crash_images.image(recording, model, chance, moment)
        shutil.rmtree(place, ignore_errors=True)
        crash_images.write(state, place)
        told = crash_images.acknowledged(recording, JOURNAL, moment)
        left = (place / JOURNAL).read_bytes() if (place / JOURNAL).exists() else b""
        return told or before if left.startswith(told) and left.startswith(before) else None

    def _outcome(self, out: Path) -> str:
        told = ""
        try:
            try:
                summary = gone_on(self.kind, self.settings, out)
            except UserError as error:
                told = str(error)
                summary = follow(self.kind, self.settings, out, error)
                out = Path(summary.get("out") or out)
        except UserError as error:
            return f"refused: {error}"
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            return f"traceback: {type(error).__name__}: {error} in {Path(at.filename).name}:{at.lineno}"
        if summary["digest"] != self.digest:
            return f"other weights {told}"
        again = out.with_name(f"{out.name} again")
        if tables(again if again.exists() else out) != self.tables:
            return f"other tables {told}"
        return f"same by the remedy: {told}" if told else "same"


def _digest(place: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(place.rglob("*")):
        found.update(f"{path.relative_to(place)}\0{path.is_file()}\0".encode())
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def written_corpus(path: Path) -> Path:
    """A file of 40 short documents."""
    chosen = documents.load_documents("sample-dclm")[:40]
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in chosen), encoding="utf-8")
    return path


def report(images: int, only: Sequence[str]) -> bool:
    """Print how `images` of each kind of run and model of a disk end; returns whether all ended the same."""
    print("| run | disk | images | different | ends |\n| --- | --- | --- | --- | --- |", flush=True)
    is_well = True
    finalize.draw = server.draw = lambda *_: None  # type: ignore[assignment]  # pictures: most of a run's second
    with tempfile.TemporaryDirectory() as scratch:
        corpus = written_corpus(Path(scratch) / "corpus.jsonl")
        for kind in only or KINDS:
            with warnings.catch_warnings(), redirect_stdout(StringIO()):
                warnings.simplefilter("ignore")
                run = Run(kind, settings_of(kind, corpus), Path(scratch) / kind)
            for model in MODELS:
                before = len(run.known)
                with warnings.catch_warnings(), redirect_stdout(StringIO()):
                    warnings.simplefilter("ignore")
                    ends = Counter(run.outcome(model, number) for number in range(images))
                is_well = is_well and all(end.startswith("same") for end in ends)
                kinds = Counter[str]()
                for end, count in ends.items():
                    kinds[end.split(":")[0]] += count
                told = ", ".join(f"{count} {end}" for end, count in kinds.items())
                print(f"| {kind} | {model} | {images} | {len(run.known) - before} | {told} |", flush=True)
                for end, count in ends.items():
                    if end != "same":
                        print(f"    {count} {end}", flush=True)
    return is_well
