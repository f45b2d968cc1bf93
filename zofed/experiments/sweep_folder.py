"""A sweep's folder: runs, what they print, why some failed, who carried the sweep out, and one table of all."""

import csv
import io
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from zofed import config
from zofed.base import environment
from zofed.base.errors import UserError
from zofed.base.files import PRIVATE, hold, private_folder, write_private
from zofed.base.parsing import from_json
from zofed.data import mixing, subsets
from zofed.experiments import sweep_file
from zofed.experiments.sweep import Run, Sweep
from zofed.runs.run_folder import RunFolder, timestamp, versions
from zofed.runs.tables import read_table
from zofed.training.paths import NAMES, absolute_path, with_absolute_paths

LOCK = ".lock"  # the file that a sweep at work in its folder holds
COSTS = ("forward_passes", "backward_passes", "forward_equivalents", "tokens", "seconds", "bytes")
SUMMARY = (
    "run", "arm", "tunes", "seed", "status", "eval_loss_start", "eval_loss_end", "eval_loss_best", "accuracy", "frozen",
    "random_slopes", *COSTS, "peak_memory_bytes", "stopped_by", "error",
)  # fmt: skip


@dataclass(frozen=True)
class SweepFolder:
    """Paths and files of one sweep. `path` is absolute."""

    path: Path

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, made where there is none, held against a second sweep while this lasts.

        Raises UserError where another sweep is at work in it, or where it cannot be written.
        """
        try:
            for folder in (self.path, self.path / "runs", self.path / "logs"):
                private_folder(folder)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, PRIVATE)
        except OSError as error:
            raise UserError(
                f"out = {str(self.path)!r} cannot be written: {error.strerror}; choose another --out"
            ) from error
        try:
            hold(lock, f"another sweep is at work in {self.path}: wait for it, or stop it")
            yield
        finally:
            os.close(lock)

    def run_path(self, run: Run) -> Path:
        return self.path / "runs" / run.name

    def log(self, run: Run) -> Path:
        return self.path / "logs" / f"{run.name}.log"

    def sessions(self) -> list[dict[str, Any]]:
        """Who carried out the sweep, one entry for each time it was begun or went on."""
        return _read_json(self.path / "sessions.json", [])

    def failures(self) -> dict[str, str]:
        """Why runs failed when they were last tried, by name."""
        return _read_json(self.path / "failed.json", {})

    def write_failures(self, failures: Mapping[str, str]) -> None:
        self._write("failed.json", json.dumps(failures, indent=2) + "\n")

    def begin(self, sweep: Sweep) -> Sweep:
        """Merge the data that are to be merged, unless they are here, and write down the sweep and who begins it.

        Returns the sweep as written: with paths in the place of the merged data's names, and all paths absolute, so
        that it can go on from any working folder. Raises UserError where runs of other settings lie here.
        """
        pairs = []
        for name, some in sweep.merge.items():
            folder = self.path / "data" / name
            if not subsets.is_subset(folder):
                private_folder(folder.parent)
                mixing.merge(some, folder, 0)
            pairs.append(f"{name}={folder}")
        if pairs:
            sweep = sweep_file.with_merged(sweep, pairs)
        sweep = sweep_file.of(_with_absolute_paths(sweep.parts))
        for run in sweep.first():
            self.check_same(run)  # before the folder's own sweep is written over
        self._write(sweep_file.COPY, tomli_w.dumps(sweep.parts))
        self._write("sessions.json", json.dumps([*self.sessions(), session()], indent=2) + "\n")
        return sweep

    def loss(self, run: Run) -> float | None:
        """End loss of a run that is complete, infinite for one that tuned and diverged; else None: it is to run."""
        return _loss(run, RunFolder(self.run_path(run)).summary())

    def steps_done(self, run: Run) -> int:
        """The last step in a run's metrics; 0 where there is none yet."""
        try:
            with open(self.run_path(run) / "metrics.csv", "rb") as file:
                header = file.readline().decode().strip().split(",")
                file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - 4096))
                lines = file.read().decode(errors="replace").rsplit("\n", 2)
            return int(dict(zip(header, lines[-2].split(","), strict=True))["step"])
        except (OSError, ValueError, IndexError, KeyError):
            return 0

    def check_same(self, run: Run) -> None:
        """Raise UserError where the run's folder holds a run with other settings, which must not pass for this one."""
        file = self.run_path(run) / "settings.toml"
        if not file.exists():
            return
        before, now = config.read_own_toml(file), with_absolute_paths(run.settings).model_dump(by_alias=True)
        for key, value in now.items():
            if key != "out" and before.get(key, value) != value:
                raise UserError(
                    f"{file.parent} was made with {key} = {before[key]!r}, and the sweep now says {value!r}: choose "
                    "another --out, or put it back"
                )

    def write_summary(self, runs: Mapping[str, Run], running: Collection[str] = ()) -> list[dict[str, Any]]:
        """summary.csv: a row a run, with the settings that vary; returns the rows. running: names of those at work."""
        failures, keys = self.failures(), _varying(list(runs.values()))
        rows = [self._row(run, keys, failures.get(run.name, ""), run.name in running) for run in runs.values()]
        text = io.StringIO()
        writer = csv.DictWriter(text, [*SUMMARY[:4], *keys, *SUMMARY[4:]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self._write("summary.csv", text.getvalue())
        return rows

    def _row(self, run: Run, keys: list[str], error: str, is_running: bool) -> dict[str, Any]:
        settings, folder = run.settings.model_dump(by_alias=True), RunFolder(self.run_path(run))
        summary, lines = folder.summary(), read_table(folder.path / "metrics.csv")
        if error:
            status = "failed"
        elif _loss(run, summary) is not None:
            status = summary["status"]
        else:
            status = "running" if is_running else "cut" if folder.journal.exists() else "waiting"
        row = {"run": run.name, "arm": run.arm, "tunes": run.tunes, "seed": run.settings.seed}
        row |= {key: settings[key] for key in keys} | {key: lines[-1].get(key) for key in COSTS if lines}
        losses = [float(line["eval_loss"]) for line in lines if line.get("eval_loss")]
        row["eval_loss_best"] = min(losses, default=None)
        row |= {key: value for key, value in (summary | summary.get("controls", {})).items() if key in SUMMARY}
        return row | {"status": status, "error": error}

    def _write(self, name: str, text: str) -> None:
        write_private(self.path / name, text)


def _loss(run: Run, summary: Mapping[str, Any]) -> float | None:
    if run.tunes and summary.get("status") == "diverged":
        return math.inf
    return float(summary["eval_loss_end"]) if summary.get("status") == "completed" else None


def _with_absolute_paths(value: Any, key: str = "") -> Any:
    """Parts of a sweep's file with the local paths of settings absolute; key: the setting that has the value."""
    if isinstance(value, dict):
        return {name: _with_absolute_paths(own, name) for name, own in value.items()}
    if isinstance(value, list):
        return [_with_absolute_paths(own, key) for own in value]
    if key == "task":
        return config.absolute_task(value)
    key = key.replace("-", "_")
    return absolute_path(key, value) if key in NAMES and isinstance(value, str) else value


def _varying(runs: list[Run]) -> list[str]:
    """Settings in which the runs differ, besides the seed, by key."""
    settings = [run.settings.model_dump(by_alias=True) for run in runs]
    return [key for key in settings[0] if key not in ("seed", "out") and len({repr(own[key]) for own in settings}) > 1]


def session() -> dict[str, Any]:
    """What results of this process may depend on: versions, machine, the commit of zofed's code where it has one."""
    return {
        "began": timestamp(),
        "versions": versions(),
        **environment.session(),
    }


def _read_json(path: Path, empty: Any) -> Any:
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return empty
    return found if isinstance(found, type(empty)) else empty
