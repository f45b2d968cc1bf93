"""What a run's model answered at its evaluations: `samples.jsonl`, one answer a line."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from zofed.base.errors import DiskError
from zofed.base.files import open_private, sync_folder, write_private
from zofed.base.parsing import from_json
from zofed.core.metrics import Answered

SAMPLES = "samples.jsonl"
TEXTS = ("prompt", "answer", "wanted")


def add(folder: Path, step: int, answered: Sequence[Answered]) -> None:
    """Append the answers of one evaluation, durable when this returns. Raises DiskError where the disk does not."""
    if not answered:
        return
    path = folder / SAMPLES
    lines = (
        _line({"step": step, "prompt": one.prompt, "answer": one.answer, "wanted": one.wanted}) for one in answered
    )
    try:
        with open(path, "ab", opener=open_private) as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}; free some space") from error


def read(folder: Path) -> list[dict[str, Any]]:
    """The answers in a run's folder that stand whole, from the first on; none where there is no file."""
    try:
        raw = (folder / SAMPLES).read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in raw.split(b"\n")[:-1]:  # what no line break ends was cut
        try:
            sample = from_json(line)
        except ValueError:
            break
        if not isinstance(sample, dict) or type(sample.get("step")) is not int:
            break
        if not all(isinstance(sample.get(key), str) for key in TEXTS):
            break
        found.append(sample)
    return found


def keep(folder: Path, steps: Collection[int]) -> None:
    """Make the file hold only answers of these steps, each step's once; a run that goes on answers the others anew.

    Raises DiskError where the disk does not take it.
    """
    path = folder / SAMPLES
    if not path.exists():
        return
    text = "".join(map(_line, (sample for sample in read(folder) if sample["step"] in steps)))
    try:
        if path.read_bytes() != text.encode():
            write_private(path, text)
    except OSError as error:
        raise DiskError(f"cannot write {path}: {error.strerror}; free some space") from error


def newest(folder: Path) -> list[dict[str, Any]]:
    """The answers of the last step that has some."""
    found = read(folder)
    return [sample for sample in found if sample["step"] == found[-1]["step"]]


def _line(sample: dict[str, Any]) -> str:
    return json.dumps(sample) + "\n"
