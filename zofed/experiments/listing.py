"""The runs below a folder, a line each: what they are, how far they came, what they found."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zofed import config
from zofed.base.errors import UserError
from zofed.runs import run_result
from zofed.runs.run_folder import SILENT_S, RunFolder
from zofed.runs.run_result import Result

DEPTH = 4  # folders below the one that is asked for: runs/SWEEP/runs/RUN


def listed(folder: Path) -> list[dict[str, Any]]:
    """The runs below a folder, the one that wrote last at the end: ready to be written as JSON.

    A run that cannot be read has its `error`. Figures that a run does not have are None. Raises UserError where there
    is no such folder, or no run in it.
    """
    folder = config.absolute(folder, "folder")
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the one that holds runs, or make a run with zofed train")
    places = sorted(_folders(folder, DEPTH), key=lambda place: -RunFolder(place).quiet_seconds)
    if not places:
        raise UserError(f"{folder} holds no runs: name the folder that does, or make one with zofed train")
    return [_row(place, folder) for place in places]


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "settings.toml").is_file():
        yield folder
    elif depth:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                yield from _folders(entry, depth - 1)


def _row(run: Path, below: Path) -> dict[str, Any]:
    name = str(run.relative_to(below)) if run != below else run.name
    try:
        result = run_result.read(run)
    except UserError as error:
        return {"run": name, "error": str(error)}
    own, found = result.settings, result.summary
    return {
        "run": name,
        "mode": own["mode"],
        "model": _short(own["model"]),
        "data": _short(own["dataset"]),
        "seed": own["seed"],
        "status": _status(result),
        "steps": int(done) if math.isfinite(done := result.total("step")) else None,
        "held_out": _finite(result.held_out[1][-1] if len(result.held_out[1]) else math.nan),
        "score": _finite(result.score),
        "metric": result.metric if result.metric in found else None,
        "bytes": int(sent) if math.isfinite(sent := result.total("bytes")) else None,
        "seconds": _finite(result.total("seconds")),
    }


def _short(name: str) -> str:
    """A model or data set by name; of a path its last two parts, since a model's folder is often called model."""
    return str(Path(*Path(name).parts[-2:])) if name else ""


def _status(result: Result) -> str:
    """What the summary says; `silent` of a run that should be running and has written nothing for a while."""
    status = str(result.summary.get("status", "unknown"))
    is_silent = status == "running" and RunFolder(result.path).quiet_seconds > SILENT_S
    return "silent" if is_silent else status


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
