"""A run's folder: settings, journal, metrics, checkpoints, summary, model; the same whichever way it ran."""

import csv
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

from zofed import __version__, config
from zofed.config import Settings
from zofed.errors import UserError
from zofed.files import write_whole
from zofed.journal import Genesis, differences, sync_folder
from zofed.worker import NotKept, tensors_digest

METRICS = (
    "timestamp", "epoch", "step", "mode", "scope", "q", "lr", "batch_size", "optimizer", "bp_interval", "loss",
    "grad_norm", "eval_loss", "forward_passes", "backward_passes", "forward_equivalents", "tokens", "seconds", "bytes",
    "cosine_kept", "cosine_direction", "share_kept",
)  # fmt: skip
EVALUATIONS = ("step", "source", "loss", "perplexity", "bits_per_byte", "accuracy", "f1")
BEST = "best"  # name of the checkpoint with the lowest held-out loss

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run. `path` is absolute."""

    path: Path

    @classmethod
    def create(cls, path: Path, settings: Settings, inputs: Mapping[str, Any]) -> "RunFolder":
        """A new folder for a run. Raises UserError when it cannot be written or holds something already.

        inputs: what a resumed run must find unchanged. What a run killed before its first entry left is written over.
        """
        path = config.absolute(path, "out")
        folder = cls(path)
        try:
            if path.is_symlink() and not path.exists():
                raise UserError(f"out = {str(path)!r} is a link to nowhere: remove it or choose another --out")
            begun = ("settings.toml", "inputs.json")
            if path.exists() and (
                not path.is_dir() or any(p.name not in begun and not p.name.endswith(".new") for p in path.iterdir())
            ):
                remedy = f"continue it with --resume {path}, or choose" if folder.journal.exists() else "choose"
                raise UserError(f"out = {str(path)!r} is not empty: {remedy} another folder with --out")
            path.mkdir(parents=True, exist_ok=True)
            folder.write_text("inputs.json", json.dumps(inputs, indent=2, sort_keys=True) + "\n")
            folder.write_text("settings.toml", config.to_toml(settings))
        except OSError as error:
            raise UserError(f"out = {str(path)!r} cannot be written: {error.strerror}; choose another --out") from error
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run. Raises UserError when it is none."""
        folder = cls(config.absolute(path, "out"))
        if not (folder.path / "settings.toml").is_file() or not folder.journal.is_file():
            raise UserError(f"{folder.path} is not the folder of a run: it lacks settings.toml or journal.zofed")
        return folder

    @property
    def journal(self) -> Path:
        return self.path / "journal.zofed"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def settings(self) -> Settings:
        return config.resolve(config.read_toml(self.path / "settings.toml"))

    def write_text(self, name: str, text: str) -> None:
        """Write a file so that a reader sees the old or the new one, never half of it."""
        write_whole(self.path / name, text)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self.write_text("summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def summary(self) -> dict[str, Any]:
        return self._read_json("summary.json")

    def inputs(self) -> dict[str, Any]:
        return self._read_json("inputs.json")

    def check_unchanged(self, inputs: Mapping[str, Any], genesis: Genesis, now: Genesis) -> None:
        """Raise UserError unless a run can go on: from what it read, and from the journal's genesis, as they were.

        inputs, now: what settings, data and model give today.
        """
        before = self.inputs()
        different = [key for key in sorted(before | dict(inputs)) if before.get(key) != inputs.get(key)]
        different += differences(genesis, now)
        if different:
            raise UserError(
                f"{self.path} began with another {', '.join(different)} than its settings give today: "
                "bring back the settings, data, tokenizer and model it began with"
            )

    def _read_json(self, name: str) -> dict[str, Any]:
        """The object in a file; empty where there is none or it is spoilt."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def save_update(self, digest: bytes, tensors: Mapping[str, Tensor]) -> None:
        """Keep the gradient or guide that a record names by its digest, whole on disk before this returns."""
        self._save(self.path / "updates", digest.hex(), tensors, {})

    def keep_updates(self, digests: Collection[bytes]) -> None:
        """Let go of all gradients and guides but these."""
        names = {self._update_path(digest).name for digest in digests}
        for path in (self.path / "updates").glob("*.safetensors"):
            if path.name not in names:
                path.unlink()

    def has_update(self, digest: bytes) -> bool:
        """Whether there is a file for the gradient or guide of a digest, be it whole or not."""
        return bool(digest) and self._update_path(digest).is_file()

    def _update_path(self, digest: bytes) -> Path:
        return self.path / "updates" / f"{digest.hex()}.safetensors"

    def update(self, digest: bytes) -> dict[str, Tensor] | None:
        """The gradient or guide of a digest, None where it was not kept or is damaged."""
        found = read_checkpoint(self._update_path(digest), digest.hex()) if digest else None
        return found and found[0]

    def whole_update(self, digest: bytes) -> dict[str, Tensor] | None:
        """As `update`, but raises NotKept, which names the file, where it is damaged."""
        found = self.update(digest)
        if found is None and self.has_update(digest):
            raise NotKept(
                f"{self._update_path(digest)}, a gradient that the replay needs, is damaged, and no checkpoint lies "
                "behind its step: restore the file from a copy"
            )
        return found

    def save_checkpoint(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> None:
        """Save tensors and facts whole or not at all; all but the newest `keep` go once the new one is on disk."""
        self._save(self.path / "checkpoints", name, tensors, facts)
        for old in self.checkpoints()[:-keep]:
            old.unlink()

    def save_best(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep what scored best so far, in place of what did before."""
        self._save(self.path / "checkpoints", BEST, tensors, facts)

    def best(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of the best checkpoint. Raises UserError where there is none or it is damaged."""
        found = read_checkpoint(self.path / "checkpoints" / f"{BEST}.safetensors")
        if found is None:
            raise UserError(f"{self.path} holds no best checkpoint: train with keep-best = true")
        return found

    def _save(self, folder: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        temporary = folder / f".{name}.new"
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            folder.mkdir(exist_ok=True)
            save_file(held, temporary, {"facts": json.dumps(facts), "digest": tensors_digest(held)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {temporary}: {error}; free some space, then --resume") from error
        temporary.rename(folder / f"{name}.safetensors")
        sync_folder(folder)

    def checkpoints(self) -> list[Path]:
        """Files of all checkpoints to go on from, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.safetensors"))


def read_checkpoint(path: Path, wanted: str = "") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and facts of a checkpoint file, or None where it is damaged.

    wanted: the tensors' digest, hex; empty: the one in the file.
    """
    try:
        with safe_open(path, "pt") as file:
            facts, digest = json.loads(file.metadata()["facts"]), file.metadata()["digest"]
        tensors = load_file(path)
        return (tensors, facts) if tensors_digest(tensors) == (wanted or digest) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


class Table:
    """A CSV file that grows by one flushed line at a time."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.columns = columns
        is_new = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns, lineterminator="\n")
        if is_new:
            self._writer.writeheader()
            self._file.flush()

    def write(self, row: Row) -> None:
        self._writer.writerow({column: _cell(row.get(column)) for column in self.columns})
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cell(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value  # every bit: a resumed run reads its start from here


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file, whole lines only: a killed process may have left half of the last one."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))


def cut_table(path: Path, column: str, last: int) -> list[dict[str, str]]:
    """Keep the whole rows whose `column` is at most `last`, rewrite the file if needed, and return them.

    Raises UserError when the file does not have that column in every row.
    """
    if not path.exists():
        return []
    rows = read_table(path)
    header = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].split(",")
    try:
        if column not in header:
            raise KeyError(column)
        kept = [row for row in rows if int(row[column]) <= last]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is spoilt: no whole column {column!r}; delete it, resume rebuilds it") from error
    temporary = path.with_suffix(".new")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    temporary.rename(path)
    return kept


def versions() -> dict[str, str]:
    """Versions of all that a result may depend on."""
    packages = ("torch", "transformers", "numpy", "flwr", "safetensors", "tokenizers")
    return {"zofed": __version__, "python": platform.python_version()} | {name: version(name) for name in packages}


def peak_memory_bytes() -> int:
    """Largest memory this process has held: on the GPU if it used one, else resident in RAM."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def timestamp() -> str:
    """Now, in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
