"""Tensors kept by key in a file that processes share: found again, bounded, whole whatever happens to the file."""

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from zofed.core.state_file import Full, StateFile

LIMIT = 10**7


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def states(number: int) -> Tensor:
    return torch.full((3, 5), float(number))


def opened(folder: Path, name: str = "states", limit: int = LIMIT) -> StateFile:
    return StateFile(folder, name, limit)


def filled(folder: Path, *numbers: int, name: str = "states") -> Path:
    """A file that holds the states of these numbers; its path."""
    file = opened(folder, name)
    for number in numbers:
        if key(number) not in file:
            file.add(key(number), states(number))
    return next(folder.glob(f"{name}*"))


def held(folder: Path, upto: int) -> list[int]:
    """Which numbers below `upto` a new process would find, each with its own states."""
    file = opened(folder)
    found = [number for number in range(upto) if key(number) in file]
    for number in found:
        into = torch.empty(1, 3, 5)
        file.read([key(number)], into, [0])
        assert torch.equal(into[0], states(number))
    return found


def test_what_one_process_keeps_another_finds(tmp_path: Path) -> None:
    filled(tmp_path, 1, 2, 5)
    file = opened(tmp_path)
    assert key(1) in file and key(5) in file
    into = file.like(key(5), 4)
    file.read([key(5), key(1)], into, [3, 0])
    assert torch.equal(into[3], states(5)) and torch.equal(into[0], states(1))
    assert key(3) not in file


def test_other_types_and_shapes_come_back_as_they_were(tmp_path: Path) -> None:
    file = opened(tmp_path)
    kept = {0: torch.tensor(1.5), 1: torch.randn(2, 3, 4).bfloat16(), 2: torch.arange(4), 3: torch.zeros(3, 1)}
    for number, tensor in kept.items():
        file.add(key(number), tensor)
    for number, tensor in kept.items():
        into = file.like(key(number), 1)
        file.read([key(number)], into, [0])
        assert into.dtype == tensor.dtype and torch.equal(into[0], tensor)


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [
        multiprocessing.get_context("fork").Process(target=filled, args=(tmp_path, *range(start, start + 200)))
        for start in (0, 100, 200)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert held(tmp_path, 500) == list(range(400))


def test_a_record_that_was_cut_is_written_anew(tmp_path: Path) -> None:
    path = filled(tmp_path, 0, 1, 2)
    os.truncate(path, path.stat().st_size - 7)
    assert held(tmp_path, 3) == [0, 1]
    filled(tmp_path, 3, 2)
    assert held(tmp_path, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("place", [0, 17, 40, 60, 150, 250])  # of a record of 44 + 15 + 60 bytes: head, shape, numbers
def test_a_damaged_record_is_taken_for_absent_and_written_anew(place: int, tmp_path: Path) -> None:
    path = filled(tmp_path, 0, 1, 2)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 8)
    assert len(held(tmp_path, 3)) < 3
    filled(tmp_path, 0, 1, 2)
    assert held(tmp_path, 3) == [0, 1, 2]


def test_no_more_is_kept_than_the_limit(tmp_path: Path) -> None:
    file = opened(tmp_path, limit=300)
    file.add(key(0), states(0))
    file.add(key(1), states(1))
    with pytest.raises(Full, match=r"hidden-states-gigabytes = 3e-07") as full:
        file.add(key(2), states(2))
    assert full.value.count == 2 and key(1) in file and key(2) not in file
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 300


def test_older_files_make_room_for_a_new_one(tmp_path: Path) -> None:
    old, new = (filled(tmp_path, *range(10), name=name) for name in ("old", "new"))
    os.utime(old, (1, 1))
    opened(tmp_path, "third", limit=1500).add(key(0), states(0))
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    file = opened(tmp_path / "file")
    assert key(0) not in file
    with pytest.raises(Full, match="set ZOFED_CACHE"):
        file.add(key(0), states(0))


def test_a_full_disk_ends_the_keeping_and_what_was_kept_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = opened(tmp_path)
    one = states(1)
    file.add(key(1), one)

    def refuse(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    for _ in range(2):
        with pytest.raises(Full, match="No space left on device; set ZOFED_CACHE") as full:
            file.add(key(2), states(2))
        assert full.value.count == 1
    assert held(tmp_path, 3) == [1]
