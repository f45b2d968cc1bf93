"""A folder of rows that zofed made: one JSON-lines file and an info.json that names it and its digest."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.base.files import hold, write_whole
from zofed.base.parsing import from_json
from zofed.data.catalog import data_root

FORMAT = "zofed subset 1"


def find(name: str) -> Path | None:
    """The folder of a subset under the data root, or None; a name with a path separator is a path, not a name."""
    folder = data_root() / name
    plain = name not in ("", ".", "..") and os.path.basename(name) == name
    return folder if plain and is_subset(folder) else None


def is_subset(folder: Path) -> bool:
    return (folder / "info.json").is_file()


def info(folder: Path) -> dict[str, Any]:
    """What info.json says. Raises UserError where it is not one of zofed's."""
    path = folder / "info.json"
    try:
        value = from_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        value = None
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("file"), str):
        raise UserError(f"{str(path)!r} was not written by zofed or is damaged: move it away, or make the subset anew")
    return value


def rows_file(folder: Path) -> Path:
    """The file of rows. Raises UserError where it is missing or not what was written."""
    described = info(folder)
    path = folder / described["file"]
    if not os.path.isfile(path) or _sha256(path) != described.get("sha256"):
        raise UserError(f"{str(path)!r} is missing or not what was written: make it anew with --force")
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a subset's folder, made if need be, for one writer. Raises UserError where another one is at work."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file: name a folder for the subset")
    if is_subset(folder):
        info(folder)  # somebody else's info.json is refused before anything is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "rows.lock", "a")  # noqa: SIM115, closed below
    except OSError as error:
        raise UserError(f"{str(folder)!r} cannot be written ({error.strerror}): choose another place") from error
    with lock:
        hold(lock.fileno(), f"another command is writing {str(folder)!r}: wait for it, or stop it")
        try:
            yield
        finally:
            (folder / "rows.lock").unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()


def publish(folder: Path, part: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Make the finished `part` the subset in `folder`; returns its info.

    The rows get a name made of their digest, so the one step that counts is the exchange of info.json: until then an
    earlier subset is whole, after it the new one is.
    """
    old = folder / info(folder)["file"] if is_subset(folder) else None
    digest = _sha256(part)
    described = {"format": FORMAT, "file": f"rows-{digest[:12]}.jsonl", "sha256": digest} | about
    os.replace(part, folder / described["file"])
    write_whole(folder / "info.json", json.dumps(described, indent=1) + "\n")
    if old is not None and old.name != described["file"]:
        old.unlink(missing_ok=True)
    return described


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
