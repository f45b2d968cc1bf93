"""Files that are written whole, files that are their owner's alone, and files that one process holds for itself."""

import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zofed.base.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent  # where zofed is imported from: a checkout, a Flower bundle, or site-packages
_IN_WHEEL = PACKAGE / "shipped"
IS_INSTALLED = _IN_WHEEL.is_dir()  # from a wheel, into which setup.py puts what ships

PRIVATE, PRIVATE_FOLDER = 0o600, 0o700  # modes of what a run writes: its records may tell of single documents


def shipped(name: str) -> Path:
    """A folder that ships with zofed, such as tasks: beside the package, or within it where a wheel is installed."""
    return (_IN_WHEEL if IS_INSTALLED else ROOT) / name


def write_whole(path: Path, text: str) -> None:
    """Write beside the target, sync, then rename: no reader and no crash meets half a file; durable when this returns.

    A file that was there keeps its mode and its group.
    """
    _write_whole(path, text.encode(), 0o666)


def write_private(path: Path, text: str | bytes) -> None:
    """As `write_whole`; a new file is its owner's alone, whatever the umask."""
    _write_whole(path, text.encode() if isinstance(text, str) else text, PRIVATE)


def _write_whole(path: Path, raw: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)  # a crash's, whose mode may be another
    with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(raw)
        file.flush()
        take_mode(temporary, path)
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def open_private(path: str, flags: int) -> int:
    """An opener for `open`: a file that this makes is its owner's alone; one that is there keeps its mode."""
    return os.open(path, flags, PRIVATE)


def make_private(path: Path) -> None:
    """An empty file that is its owner's alone, for a library to write into; what stood there is gone."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE))


def private_folder(path: Path) -> Path:
    """The folder, made its owner's alone where there is none; one that is there stays as it is. Returns it.

    Durable with every folder on the way that was not there: what is synced in a folder that is gone is gone, too.
    """
    made = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    for one in reversed(made):
        sync_folder(one.parent)
    return path


def take_mode(path: Path, earlier: Path) -> None:
    """Give what is to take a file's or folder's place the mode and the group that a person gave to that.

    A group that this process may not give gets nothing.
    """
    try:
        was = earlier.stat()
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(was.st_mode)
    if path.stat().st_gid != was.st_gid:
        try:
            os.chown(path, -1, was.st_gid)
        except OSError:
            mode &= ~stat.S_IRWXG
    _set_mode(path, mode)


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # of a file of our own: the disk, such as a USB stick's, knows no modes
            path.chmod(mode)


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
def whole_folder(path: Path, private_as: Path | None = None) -> Iterator[None]:
    """While active a new folder is filled; durable at the end, and gone where anything fails.

    What stands at `path` goes first: an earlier try that was killed. private_as: the place that it will take; it and
    its files are then their owner's alone, whatever libraries write, or as those are that lie there now.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=PRIVATE_FOLDER if private_as else 0o777, parents=True)
    try:
        yield
        for found in path.rglob("*"):
            if private_as:
                _set_mode(found, PRIVATE_FOLDER if found.is_dir() else PRIVATE)
                take_mode(found, private_as / found.relative_to(path))
            if found.is_file():
                sync_file(found)
            elif found.is_dir():
                sync_folder(found)
        if private_as:
            take_mode(path, private_as)
        sync_folder(path)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)  # what it took may be all that the disk lacks
        raise
