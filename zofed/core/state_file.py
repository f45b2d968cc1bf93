"""Tensors kept by key in a nameless file, which is gone when its process is, however that ends."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

SHARE_OF_FREE = 0.25  # of the disk's free bytes that a file may take; several processes may have one each


class Full(Exception):  # noqa: N818
    """A tensor is not kept: there are as many as may be, or can be. count: of those that are; the text says why."""

    def __init__(self, why: str, count: int) -> None:
        super().__init__(why)
        self.count = count


class StateFile:
    """Tensors of any shapes and types by key, of at most `limit` bytes together; none is ever dropped.

    Steps walk through one permutation of the examples an epoch, so that whichever were dropped for others would be
    asked for as soon as those. folder: on the disk that holds the file, which has no name in it. What is read often
    enough stays in memory: the system's page cache holds it as long as memory is free.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit, self._why = folder, limit, f"hidden-states-gigabytes = {limit / 1e9:g}"
        self._file: IO[bytes] | None = None
        self._places: dict[bytes, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._end = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def add(self, key: bytes, tensor: Tensor) -> None:
        """Keep a tensor of the CPU. Raises Full where it is not."""
        if key in self._places:
            return
        raw = _bytes(tensor.contiguous())
        self._open()
        if self._end + len(raw) > self._limit:
            raise Full(self._why, len(self._places))
        assert self._file is not None
        try:
            done = 0
            while done < len(raw):
                done += os.pwrite(self._file.fileno(), raw[done:], self._end + done)
        except OSError as error:  # the disk is full
            self._limit, self._why = self._end, f"{str(self._folder)!r}: {error.strerror}; set ZOFED_CACHE"
            raise Full(self._why, len(self._places)) from error
        self._places[key] = self._end, tensor.dtype, tuple(tensor.shape)
        self._end += len(raw)

    def read(self, keys: Sequence[bytes], into: Tensor, at: Sequence[int]) -> None:
        """Write the tensors of some keys, all of them kept, into those rows of a tensor of the CPU."""
        for key, row in zip(keys, at, strict=True):
            start, _, _ = self._places[key]
            raw, done = _bytes(into[row]), 0
            while done < len(raw):
                assert self._file is not None
                count = os.preadv(self._file.fileno(), [raw[done:]], start + done)
                if not count:
                    raise OSError(f"the file of hidden states in {str(self._folder)!r} ended early")
                done += count

    def like(self, key: bytes, rows: int) -> Tensor:
        """An empty tensor of so many rows of the shape and type of a kept one."""
        _, dtype, shape = self._places[key]
        return torch.empty(rows, *shape, dtype=dtype)

    def _open(self) -> None:
        """The file, from the first tensor on."""
        if self._file is not None or not self._limit:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
            free = int(shutil.disk_usage(self._folder).free * SHARE_OF_FREE)
        except OSError as error:
            self._limit, self._why = 0, f"{str(self._folder)!r}: {error.strerror}; set ZOFED_CACHE"
            return
        weakref.finalize(self, self._file.close)
        if free < self._limit:
            self._limit, self._why = free, f"a quarter of what is free on the disk of {str(self._folder)!r}"


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
