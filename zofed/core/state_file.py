"""Tensors kept by key in a file that outlives its process and that several processes may share."""

import fcntl
import hashlib
import json
import os
import shutil
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SHARE_OF_FREE = 0.25  # of the disk's free bytes that a file may take
SUFFIX = ".states"
_HEAD = struct.Struct("<16s16sIQ")  # key, digest of what follows, bytes of the description, bytes of the tensor


class Full(Exception):  # noqa: N818
    """A tensor is not kept: there are as many as may be, or can be. count: of those that are; the text says why."""

    def __init__(self, why: str, count: int) -> None:
        super().__init__(why)
        self.count = count


class _Place(NamedTuple):
    """start: of the record. dtype, shape: of its tensor. size: bytes of the record."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


class StateFile:
    """Tensors of any shapes and types by key; no file of the folder is above `limit` bytes, nor all of them together.

    Steps walk through one permutation of the examples an epoch, so that whichever were dropped for others would be
    asked for as soon as those: none is ever dropped but with its whole file, that which was opened longest ago first.
    What is read often enough stays in memory: the system's page cache holds it as long as memory is free.

    A record is written whole behind a lock; one that was cut by a crash is written over, one that is damaged is taken
    for absent.
    """

    def __init__(self, folder: Path, name: str, limit: int) -> None:
        self._path, self._limit, self._why = (
            folder / f"{name}{SUFFIX}",
            limit,
            f"hidden-states-gigabytes = {limit / 1e9:g}",
        )
        self._file: int | None = None
        self._places: dict[bytes, _Place] = {}
        self._sound: set[bytes] = set()  # keys whose record was read and found whole
        self._end = 0

    def __contains__(self, key: bytes) -> bool:
        if key in self._sound:
            return True
        self._open()
        if key not in self._places:
            self._see()
        if key not in self._places or self._file is None:
            return False
        place = self._places[key]
        record = _read(self._file, place.start, place.size)
        if len(record) < place.size or not _is_sound(record):
            return False
        self._sound.add(key)
        return True

    def add(self, key: bytes, tensor: Tensor) -> None:
        """Keep a tensor of the CPU. Raises Full where it is not."""
        if key in self._sound:
            return
        self._open()
        record = _record(key, tensor)
        if self._file is None or self._end + len(record) > self._limit:
            raise Full(self._why, len(self._places))
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._see()
                _write(self._file, record, self._end)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        except OSError as error:  # the disk is full
            self._limit, self._why = self._end, f"{str(self._path.parent)!r}: {error.strerror}; set ZOFED_CACHE"
            raise Full(self._why, len(self._places)) from error
        self._places[key] = _Place(self._end, tensor.dtype, tuple(tensor.shape), len(record))
        self._sound.add(key)
        self._end += len(record)

    def read(self, keys: Sequence[bytes], into: Tensor, at: Sequence[int]) -> None:
        """Write the tensors of some keys, all of them kept, into those rows of a tensor of the CPU."""
        assert self._file is not None
        for key, row in zip(keys, at, strict=True):
            place, raw, done = self._places[key], _bytes(into[row]), 0
            start = place.start + place.size - len(raw)
            while done < len(raw):
                count = os.preadv(self._file, [raw[done:]], start + done)
                if not count:
                    raise OSError(f"the file of hidden states {str(self._path)!r} ended early: it was cut meanwhile")
                done += count

    def like(self, key: bytes, rows: int) -> Tensor:
        """An empty tensor of so many rows of the shape and type of a kept one."""
        place = self._places[key]
        return torch.empty(rows, *place.shape, dtype=place.dtype)

    def _open(self) -> None:
        """The file, from the first key on."""
        if self._file is not None or not self._limit:
            return
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.utime(self._file)
            _make_room(self._path, self._limit)
            free = int(shutil.disk_usage(folder).free * SHARE_OF_FREE) + os.fstat(self._file).st_size
        except OSError as error:
            self._limit, self._why = 0, f"{str(folder)!r}: {error.strerror}; set ZOFED_CACHE"
            return
        weakref.finalize(self, os.close, self._file)
        if free < self._limit:
            self._limit, self._why = free, f"a quarter of what is free on the disk of {str(folder)!r}"

    def _see(self) -> None:
        """Find the records that this process has not met yet."""
        if self._file is None:
            return
        size = os.fstat(self._file).st_size
        while self._end + _HEAD.size <= size:
            key, _, described, held = _HEAD.unpack(_read(self._file, self._end, _HEAD.size))
            length = _HEAD.size + described + held
            if self._end + length > size:  # cut by a crash, or being written
                return
            try:
                dtype, *shape = json.loads(_read(self._file, self._end + _HEAD.size, described))
                place = _Place(self._end, getattr(torch, dtype), tuple(map(int, shape)), length)
            except (ValueError, TypeError, AttributeError):
                place = None
            if place:
                self._places[key] = place
            self._end += length


def _make_room(path: Path, limit: int) -> None:
    """Remove other files of the folder until all of them together are no more than the limit."""
    files = {file: file.stat() for file in path.parent.glob(f"*{SUFFIX}")}
    total = sum(found.st_size for found in files.values())
    for file in sorted(files, key=lambda file: files[file].st_mtime):
        if total <= limit:
            return
        if file != path:  # a process that has it open goes on reading it
            total -= files[file].st_size
            file.unlink(missing_ok=True)


def _record(key: bytes, tensor: Tensor) -> bytes:
    described = json.dumps([str(tensor.dtype).removeprefix("torch."), *tensor.shape]).encode()
    content = described + bytes(_bytes(tensor.contiguous()))
    return _HEAD.pack(key, _digest(content), len(described), len(content) - len(described)) + content


def _is_sound(record: bytes) -> bool:
    return _HEAD.unpack(record[: _HEAD.size])[1] == _digest(record[_HEAD.size :])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _read(file: int, start: int, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = os.pread(file, size - len(found), start + len(found))
        if not part:
            break
        found += part
    return found


def _write(file: int, record: bytes, start: int) -> None:
    done = 0
    while done < len(record):
        done += os.pwrite(file, memoryview(record)[done:], start + done)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
