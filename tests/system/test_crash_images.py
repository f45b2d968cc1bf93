"""A power cut leaves what some disk would have: the run goes on from it to the same weights and the same tables.

`python -m benchmarks crash` tries thousands of images; here are a few of each run and disk, and the disks themselves.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import crash, crash_images
from benchmarks.crash_images import MODELS, Recording
from zofed.base.files import private_folder, sync_folder, whole_folder, write_private

IMAGES = 14  # of each run and disk: 210 in all


@pytest.fixture(scope="module")
def run_of(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], crash.Run]]:
    found: dict[str, crash.Run] = {}

    def get(kind: str) -> crash.Run:
        if kind not in found:
            place = tmp_path_factory.mktemp("images") / kind
            found[kind] = crash.Run(kind, crash.settings_of(kind, corpus), place)
        return found[kind]

    yield get


def left(recording: Recording, model: str, out: Path) -> list[dict[str, bytes]]:
    """What images at the recording's end hold: files by their names, in all ways that 60 of them show."""
    found: list[dict[str, bytes]] = []
    for number in range(60):
        state = crash_images.image(recording, model, random.Random(number), len(recording.events) - 1)
        place = out / f"{model} {number}"
        crash_images.write(state, place)
        files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        if files not in found:
            found.append(files)
    return found


def test_what_was_never_synced_may_be_lost_torn_or_zeros(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    (root / "old").write_bytes(b"one")
    with crash_images.recorded(root) as recording, open(root / "old", "ab") as file:
        file.write(b"+two")
    found = [files["old"] for files in left(recording, "strict", tmp_path / "t")]
    assert b"one" in found and any(part.endswith(b"\0") for part in found) and b"one+" in found
    assert all(part.startswith(b"one") for part in found)


@pytest.mark.parametrize("model", MODELS)
def test_what_was_synced_with_its_folder_is_there_on_every_disk(tmp_path: Path, model: str) -> None:
    (root := tmp_path / "root").mkdir()
    with crash_images.recorded(root) as recording:
        write_private(private_folder(root / "a" / "b") / "name", "all")
    assert left(recording, model, tmp_path) == [{"a/b/name": b"all"}]


def test_a_strict_disk_loses_a_file_in_a_folder_that_was_not_synced(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    with crash_images.recorded(root) as recording:
        (root / "a").mkdir()
        write_private(root / "a" / "name", "all")
    assert left(recording, "strict", tmp_path) == [{}]
    assert left(recording, "ordered", tmp_path) == [{"a/name": b"all"}]
    assert sorted(map(len, left(recording, "reordered", tmp_path))) == [0, 1]


def test_a_rename_is_there_or_not_but_no_disk_has_half_of_it(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    (root / "name").write_bytes(b"old")
    with crash_images.recorded(root) as recording:
        with open(root / "new", "wb") as file:
            file.write(b"new")
            file.flush()
            os.fsync(file.fileno())
        os.replace(root / "new", root / "name")
    found = left(recording, "reordered", tmp_path)
    assert {files["name"] for files in found} == {b"old", b"new"}
    with crash_images.recorded(root) as again:
        os.rename(root / "name", root / "last")
        sync_folder(root)
    assert left(again, "strict", tmp_path / "more") == [{"last": b"new"}]


def test_a_folder_that_is_filled_whole_is_on_every_disk_with_all_in_it(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    with crash_images.recorded(root) as recording:
        with whole_folder(root / ".new"):
            (root / ".new" / "inner").mkdir()
            (root / ".new" / "inner" / "name").write_bytes(b"all")
        os.rename(root / ".new", root / "folder")
        sync_folder(root)
    assert left(recording, "strict", tmp_path) == [{"folder/inner/name": b"all"}]


@pytest.mark.first(1)
@pytest.mark.parametrize("kind", ["federated fo", *(kind for kind in crash.KINDS if kind != "federated fo")])
def test_a_run_goes_on_from_what_any_disk_holds(run_of: Callable[[str], crash.Run], kind: str) -> None:
    ends = Counter(run_of(kind).outcome(model, number) for model in MODELS for number in range(2))
    assert ends == {"same": 6}


@pytest.mark.slow
@pytest.mark.parametrize("kind", crash.KINDS)
def test_a_run_goes_on_from_many_images(run_of: Callable[[str], crash.Run], kind: str) -> None:
    ends = Counter(run_of(kind).outcome(model, number) for model in MODELS for number in range(IMAGES))
    assert all(end.startswith("same") for end in ends), ends
    assert sum(ends.values()) == len(MODELS) * IMAGES
