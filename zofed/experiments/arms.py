"""What runs found, read back from their folders: one run, many, and the arms they belong to.

Files of a killed process or of another version are read as far as they go; what is left out is told, never hidden.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from zofed import config
from zofed.base.errors import UserError
from zofed.config import SETTINGS
from zofed.experiments import sweep_file
from zofed.experiments.sweep import Sweep, shown
from zofed.runs.run_result import Result, read

# Settings that say where and how a run went, not what it found.
ASIDE = {key for key, field in SETTINGS.items() if not config.traits(field).shapes_result}
# Settings without which two held-out losses are not of the same thing.
SCORED_BY = {key for key, field in SETTINGS.items() if config.traits(field).scores}
SHORT = ("mode", "optimizer", "dataset", "model", "instruct-kind")  # whose value alone tells what it is

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed alone. values: settings in which arms differ. chosen_from: the tuning's runs."""

    name: str
    values: Mapping[str, Any]
    results: list[Result]
    chosen_from: list[Result] = field(default_factory=list)

    @property
    def ends(self) -> dict[int, float]:
        """End losses of complete runs, by seed."""
        found = {int(result.settings["seed"]): result.end for result in self.results if result.is_complete}
        return {seed: loss for seed, loss in found.items() if math.isfinite(loss)}

    @property
    def mean(self) -> float:
        """Mean of the end losses; infinite where no run is complete."""
        return statistics.fmean(self.ends.values()) if self.ends else math.inf


def collect(paths: Sequence[Path]) -> tuple[list[Result], list[str]]:
    """The runs in folders of runs and of sweeps, and a sentence for each that cannot be read.

    Raises UserError for a folder that holds no run, and where not one run can be read.
    """
    found: list[Result] = []
    notes: list[str] = []
    for path in paths:
        path = config.absolute(path, "folder")
        if (path / "settings.toml").exists() or (path / "journal.zofed").exists():
            folders, roles = [path], {}
        else:
            folders, roles = run_folders(path), _roles(path, notes)
        if not folders:
            raise UserError(f"{path} holds no runs: give the folder of a run, or of a sweep that has begun")
        if roles and (strangers := [folder.name for folder in folders if folder.name not in roles]):
            notes.append(f"left out, no runs of the sweep as it now stands: {some(strangers)}")
            folders = [folder for folder in folders if folder.name in roles]
        for folder in folders:
            try:
                result = read(folder)
            except UserError as error:
                notes.append(f"left out {folder.name}: {error}")
                continue
            arm, tunes = roles.get(folder.name, ("", False))
            found.append(Result(result.path, result.settings, result.summary, result.columns, arm, tunes))
    if not found:
        raise UserError(f"not one run can be read: {notes[0]}" + (f" (and {len(notes) - 1} more)" if notes[1:] else ""))
    if diverged := [result.name for result in found if result.has_diverged and not result.tunes]:
        notes.append(f"diverged, shown as far as they went: {some(diverged)}")
    if tried := [result.name for result in found if result.has_diverged and result.tunes]:
        notes.append(f"diverged while tuning, not chosen: {some(tried)}")
    if unfinished := [result.name for result in found if not result.is_complete and not result.has_diverged]:
        notes.append(f"not finished, shown as far as they are: {some(unfinished)}")
    if cut := [result.name for result in found if result.is_cut]:
        notes.append(f"metrics.csv was cut, shown as far as it goes: {some(cut)}")
    return found, notes


def run_folders(path: Path) -> list[Path]:
    """Folders of runs in a sweep's folder, or in any other that holds some; by name, numbers in it by their size."""
    place = path / "runs" if (path / "runs").is_dir() else path
    if not place.is_dir():
        raise UserError(f"there is no folder {path}")
    return sorted((each for each in place.iterdir() if (each / "settings.toml").exists()), key=_in_order)


def _in_order(path: Path) -> list[Any]:
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", path.name)
    return [float(part) if at % 2 else part for at, part in enumerate(parts)]


def sweep_of(path: Path) -> Sweep | None:
    """The sweep whose folder this is, if any. Raises UserError where this version cannot read it."""
    file = path / sweep_file.COPY
    return sweep_file.read(file) if file.exists() else None


def _roles(path: Path, notes: list[str]) -> dict[str, tuple[str, bool]]:
    """(arm, whether it only tunes) of each run that a sweep may have, by name."""
    try:
        sweep = sweep_of(path)
    except UserError as error:
        notes.append(f"arms are told by the runs' settings alone: {error}")
        sweep = None
    if sweep is None:
        return {}
    runs = [sweep.run(arm, values, seed) for arm in sweep.arms for values in arm.tuned for seed in sweep.seeds]
    return {run.name: (run.arm, run.tunes) for run in runs}


def grouped(results: Sequence[Result]) -> list[Arm]:
    """The runs by arm, in their order; of an arm that was tuned, those at the chosen values.

    Where seeds beside the tuning's are there, they alone are an arm's results: what chose is not what is reported. So
    are those at values that a grid, since widened, no longer chooses.
    """
    by_arm: dict[Any, list[Result]] = {}
    differ = differing(results)
    named_by = [key for key in differ if not all(config.is_chosen(key, result.settings) for result in results)]
    for result in results:
        key = (result.path.parent, result.arm) if result.arm else tuple(repr(result.settings.get(k)) for k in differ)
        by_arm.setdefault(key, []).append(result)
    found = []
    for own in by_arm.values():
        tuning = [result for result in own if result.tunes]
        reported = [result for result in own if not result.tunes]
        if tuning:
            candidates = [(tried, [one for one in reported if not differing([tried, one])]) for tried in tuning]
            # Of equals the one with which the sweep went on.
            chosen, reported = min(candidates, key=lambda own: (_sortable(own[0].end), not own[1]))
            reported = reported or [chosen]
        values = {name: reported[0].settings.get(name) for name in differ}
        named = label({name: values[name] for name in named_by})
        found.append(Arm(reported[0].arm or named or reported[0].name, values, reported, tuning))
    names = [arm.name for arm in found]
    return [replace(arm, name=_with_folder(arm)) if names.count(arm.name) > 1 else arm for arm in found]


def _sortable(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _with_folder(arm: Arm) -> str:
    """The arm's name and its sweep's, where several sweeps have such an arm."""
    place = arm.results[0].path.parent
    return f"{(place.parent if place.name == 'runs' else place).name}: {arm.name}"


def differing(results: Sequence[Result]) -> list[str]:
    """Settings in which the runs differ, in the order of the schema, without those that change no result."""
    keys = [*SETTINGS, *sorted({key for result in results for key in result.settings} - set(SETTINGS))]
    return [key for key in keys if key not in ASIDE and len({repr(result.settings.get(key)) for result in results}) > 1]


def label(values: Mapping[str, Any]) -> str:
    """Settings in few words."""
    return ", ".join(shown(value) if key in SHORT else f"{key} {shown(value)}" for key, value in values.items())


def incomparable(results: Sequence[Result]) -> str:
    """A warning where the runs' held-out losses are not of the same text; empty where they are."""
    differ = [key for key in differing(results) if key in SCORED_BY]
    if "eval-dataset" not in differ and all(result.settings.get("eval-dataset") for result in results):
        differ = [key for key in differ if key != "dataset"]  # what they train on, not what scores them
    return f"losses are not of the same thing: the runs differ in {', '.join(differ)}" if differ else ""


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
