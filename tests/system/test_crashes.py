"""What a power cut or a full disk leaves of a run's folder: it goes on to the same weights and the same tables.

`PYTHONPATH=. python tests/system/test_crashes.py N` prints how N images of each run end.
"""

import json
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crash import TABLES, gone_on, tables, written_corpus
from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.training.trainer import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "zo": {},
    "fo": {"mode": "fo", "optimizer": "adamw", "learning-rate": 1e-3},
    "federated": {"clients": 2, "client-held-out-fraction": 0.2, "steps-per-message": 2},
}
MOMENTS = (0, 3, 6)  # rounds behind whose checkpoint, or line, the folder is caught; then at the end


def settings_of(way: str, corpus: Path) -> Settings:
    small = {
        "dataset": str(corpus), "block-size": 16, "batch-size": 2, "queries": 2, "steps": 6, "rounds": 6,
        "eval-interval": 3, "eval-examples": 4, "save-interval": 2, "device": "cpu",
    }  # fmt: skip
    return config.resolve(small | WAYS[way])


class Undisturbed:
    """A run with its folder as it was at some moments."""

    def __init__(self, way: str, corpus: Path, place: Path) -> None:
        self.way, self.settings, self.place = way, settings_of(way, corpus), place
        place.mkdir()
        self.states: list[Path] = []
        account = Trainer._account

        def catching(trainer: Any, *arguments: Any) -> None:
            account(trainer, *arguments)
            if trainer.replica.round in MOMENTS:
                self._catch(trainer.folder.path)

        Trainer._account = catching  # type: ignore[method-assign]
        try:
            self.digest = gone_on(way, self.settings, place / "whole")["digest"]
        finally:
            Trainer._account = account  # type: ignore[method-assign]
        self.tables = tables(place / "whole")
        self._catch(place / "whole")

    def _catch(self, folder: Path) -> None:
        self.states.append(self.place / f"state {len(self.states)}")
        shutil.copytree(folder, self.states[-1])

    def outcome(self, number: int) -> str:
        """How one image ends: "same", or what is wrong with it."""
        chance = random.Random(f"{self.way} {number}")
        out = self.place / "image"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(chance.choice(self.states), out)
        what = disturb(out, chance)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                digest = gone_on(self.way, self.settings, out)["digest"]
        except UserError as error:
            return f"refused: {what}: {error}"
        except Exception as error:
            return f"traceback: {what}: {type(error).__name__}: {error}"
        if digest != self.digest:
            return f"other weights: {what}"
        return "same" if tables(out) == self.tables else f"other tables: {what}"


def disturb(out: Path, chance: random.Random) -> str:
    """Leave in a folder what a machine leaves that stops at once; returns what that is."""
    here = [name for name in TABLES if (out / name).exists()]
    what = chance.choice(
        ("one table", "one table", "all tables", "journal", "checkpoint", "model", "leftovers", "json")
    )
    if what in ("one table", "all tables"):
        return ", ".join(
            spoilt(out / name, chance) for name in (here if what == "all tables" else [chance.choice(here)])
        )
    if what == "journal":  # an entry that nobody was told of
        tail = bytes(chance.randrange(1, 200)) if chance.random() < 0.5 else chance.randbytes(chance.randrange(1, 30))
        with open(out / "journal.zofed", "ab") as file:
            file.write(tail)
        return f"{len(tail)} bytes behind the journal"
    if what == "checkpoint" and (found := sorted(out.glob("checkpoints/step-*"))):
        found[-1].rename(out / "checkpoints" / f".{found[-1].stem}.new")  # written, not yet renamed
        return "the newest checkpoint was not renamed"
    if what == "model":
        shutil.rmtree(out / "model", ignore_errors=True)
        (out / ".model.new").mkdir(exist_ok=True)
        (out / ".model.new" / "model.safetensors").write_bytes(b"half")
        return "no model, half a new one"
    if what == "json":
        spoilt(out / "summary.json", chance)
        return "summary.json"
    for name in ("metrics.new", ".metrics.csv.new", ".summary.json.new", "journal.new", ".settings.toml.new"):
        (out / name).write_bytes(chance.randbytes(40))
    return "leftovers"


def spoilt(path: Path, chance: random.Random) -> str:
    """A file of which not every page came to the disk."""
    raw = path.read_bytes() if path.exists() else b""
    at = chance.randrange(len(raw) + 1)
    how = chance.choice(("cut", "zeros", "empty", "missing", "zeros inside"))
    if how == "missing":
        path.unlink(missing_ok=True)
        return f"{path.name} {how}"
    page = raw[:at] + bytes(min(64, len(raw) - at)) + raw[at + 64 :]
    path.write_bytes(
        {"cut": raw[:at], "zeros": raw[:at] + bytes(len(raw) - at), "empty": b"", "zeros inside": page}[how]
    )
    return f"{path.name} {how} at byte {at} of {len(raw)}"


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Undisturbed]]:
    found: dict[str, Undisturbed] = {}

    def get(way: str) -> Undisturbed:
        if way not in found:
            found[way] = Undisturbed(way, corpus, tmp_path_factory.mktemp("crashes") / way)
        return found[way]

    yield get


@pytest.mark.first(1)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_crash_leaves_goes_on_to_the_same_weights_and_tables(
    undisturbed: Callable[[str], Undisturbed], way: str
) -> None:
    run = undisturbed(way)
    assert [run.outcome(number) for number in range(5)] == ["same"] * 5


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["rounds.csv", "metrics.csv", "clients.csv"])
def test_a_finished_federation_gives_its_tables_back_to_the_byte(
    undisturbed: Callable[[str], Undisturbed], name: str
) -> None:
    run = undisturbed("federated")
    out = run.place / "finished"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run.states[-1], out)
    before = {table: (out / table).read_bytes() for table in TABLES if not table.startswith("metrics")}
    (out / name).write_bytes((out / name).read_bytes()[:150])
    summary = json.loads((out / "summary.json").read_text())
    again = gone_on("federated", run.settings, out)
    assert {table: (out / table).read_bytes() for table in before} == before
    kept = ("digest", "replies", "bytes_up_per_client_round", "payload_down_per_client_round", "tokens", "bytes")
    assert {key: again[key] for key in kept} == {key: summary[key] for key in kept}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_what_a_crash_leaves_goes_on(undisturbed: Callable[[str], Undisturbed], way: str) -> None:
    run = undisturbed(way)
    assert Counter(run.outcome(number) for number in range(5, 80)) == {"same": 75}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for one in WAYS:
            run = Undisturbed(one, written_corpus(Path(scratch) / "corpus.jsonl"), Path(scratch) / one)
            ends = [run.outcome(number) for number in range(int(sys.argv[1]))]
            print(one, dict(Counter(end.split(":")[0] for end in ends)), *sorted(set(ends) - {"same"}), sep="\n  ")
