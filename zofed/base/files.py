"""Files that are written whole, and files that one process holds for itself."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zofed.base.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # where zofed is imported from: a checkout, a Flower bundle, or site-packages
_IN_WHEEL = PACKAGE / "shipped"
IS_INSTALLED = _IN_WHEEL.is_dir()  # from a wheel, into which setup.py puts what ships


def shipped(name: str) -> Path:
    """A folder that ships with zofed, such as tasks: beside the package, or within it where a wheel is installed."""
    return (_IN_WHEEL if IS_INSTALLED else ROOT) / name


def write_whole(path: Path, text: str) -> None:
    """Write beside the target, sync, then rename: no reader and no crash meets half a file."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_folder(folder: Path) -> None:
    """Make durable which files `folder` holds, and under which names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make durable what a file holds, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold(descriptor: int, busy: str) -> None:
    """Keep an open file for this process until it is closed. Raises UserError, which says `busy`, if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(busy) from error


@contextmanager
def whole_folder(path: Path) -> Iterator[None]:
    """While active a new folder is filled; durable at the end, and gone where anything fails.

    What stands at `path` goes first: an earlier try that was killed.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield
        for file in path.rglob("*"):
            if file.is_file():
                sync_file(file)
        sync_folder(path)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # what it took may be all that the disk lacks
        raise
