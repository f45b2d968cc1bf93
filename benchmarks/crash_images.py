"""What a disk may hold after a power cut: the changes of a run's files recorded, and folders rebuilt as disks would.

A recording is a list of moments: how the folder stood, and what was synced in between. Of what was never synced

    ordered     all up to some moment is there, all behind it is not: ext4 as it usually is
    strict      nothing is there, no name before its folder was synced, no byte before its file was: POSIX's promise
    reordered   each change of a folder, and the bytes of each file, may be there or not, whichever came first

and the bytes of a file that were not synced are lost, torn at some byte, or read as zeros.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zofed.core import journal

MODELS = ("ordered", "strict", "reordered")
FATES = ("lost", "torn", "zeroed")  # of bytes that were not synced
ROOT = 0  # the folder that was there before, by number
_HOOKED = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "ftruncate", "write", "truncate")

Names = Mapping[str, int]  # what a folder holds, by number


@dataclass(frozen=True, slots=True)
class State:
    """Folders and files by number: what each folder holds, and the bytes of each file."""

    folders: Mapping[int, Names]
    files: Mapping[int, bytes]


@dataclass
class Recording:
    """events: states, and numbers of what was synced, in the order of time. The first is a state, all of it synced."""

    root: Path
    events: list[State | int] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _known: dict[int, tuple[tuple[int, int, int], bytes]] = field(default_factory=dict)
    _next: int = ROOT + 1

    def look(self) -> None:
        """Note how everything stands, where that has changed."""
        folders: dict[int, Names] = {}
        files: dict[int, bytes] = {}
        seen: dict[int, int] = {}
        self._look(self.root, ROOT, folders, files, seen)
        self._numbers = seen  # a file that is gone has no number: another may get its inode
        state = State(folders, files)
        if not self.events or state != next(one for one in reversed(self.events) if isinstance(one, State)):
            self.events.append(state)

    def _look(self, place: Path, number: int, folders: dict[int, Names], files: dict[int, bytes], seen: Any) -> None:
        names: dict[str, int] = {}
        for entry in sorted(os.scandir(place), key=lambda one: one.name):
            about = entry.stat(follow_symlinks=False)
            own = seen.get(about.st_ino) or self._numbers.get(about.st_ino)
            if own is None:
                own, self._next = self._next, self._next + 1
            seen[about.st_ino] = names[entry.name] = own
            if entry.is_dir(follow_symlinks=False):
                self._look(place / entry.name, own, folders, files, seen)
            elif own not in files:
                files[own] = self._content(own, about, place / entry.name)
        folders[number] = names

    def _content(self, number: int, about: os.stat_result, path: Path) -> bytes:
        mark = (about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        if number not in self._known or self._known[number][0] != mark:
            self._known[number] = mark, path.read_bytes()
        return self._known[number][1]

    def synced(self, descriptor: int) -> None:
        """Note that an open file or folder was synced; what lies elsewhere does not count."""
        self.look()
        inode = os.fstat(descriptor).st_ino
        number = ROOT if inode == self.root.stat().st_ino else self._numbers.get(inode)
        if number is not None:
            self.events.append(number)


@contextmanager
def recorded(root: Path) -> Iterator[Recording]:
    """While active all that this process does to the files below `root` is recorded; nothing is really synced."""
    recording = Recording(root)
    recording.look()
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in (*_HOOKED, "fsync", "fdatasync")}

    def hooked(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            recording.look()
            try:
                return call(*args, **kwargs)
            finally:
                recording.look()

        return run

    def sync(file: Any) -> None:
        recording.synced(file if isinstance(file, int) else file.fileno())

    sync_data = journal._sync_data  # pyright: ignore[reportPrivateUsage]
    try:
        for name in _HOOKED:
            setattr(os, name, hooked(real[name]))
        os.fsync = os.fdatasync = journal._sync_data = sync  # pyright: ignore[reportPrivateUsage]
        yield recording
    finally:
        for name, call in real.items():
            setattr(os, name, call)
        journal._sync_data = sync_data  # pyright: ignore[reportPrivateUsage]
    recording.look()


def image(recording: Recording, model: str, chance: random.Random, moment: int | None = None) -> State:
    """What a disk of a model may hold after a power cut at a moment of the recording, by its number; None: any."""
    events = recording.events
    crash = chance.randrange(len(events)) if moment is None else moment
    fate = chance.choice(FATES)
    since = _last_syncs(recording, crash)
    if model == "ordered":
        last = max((at for at, event in enumerate(events[: crash + 1]) if not isinstance(event, State)), default=0)
        stood = _state(events, chance.randint(last, crash))
        files = {
            number: _after(_file(events, number, since.get(number, -1)), content, fate, chance)
            for number, content in stood.files.items()
        }
        return State(stood.folders, files)
    folders: dict[int, Names] = {}
    for number in _all(events, crash, "folders"):
        names = dict(_folder(events, number, since.get(number, -1)))
        if model == "reordered":
            for change in _changes(events, number, since.get(number, -1), crash):
                if chance.random() < 0.5:
                    names.update(change)
        folders[number] = {name: held for name, held in names.items() if held is not None}
    files = {}
    for number in _all(events, crash, "files"):
        last = since.get(number, -1)
        later = [at for at in range(max(last, 0), crash + 1) if number in _state(events, at).files]
        at = chance.choice(later) if model == "reordered" and later else (later[-1] if later else crash)
        files[number] = _after(_file(events, number, last), _file(events, number, at), fate, chance)
    return State(folders, files)


def acknowledged(recording: Recording, path: str, moment: int) -> bytes:
    """What of a file that only grows was synced up to a moment, once it was more than begun; empty before.

    path: from the root, by the names of that moment.
    """
    state, number = _state(recording.events, moment), ROOT
    for name in path.split("/"):
        number = state.folders.get(number, {}).get(name, -1)
    syncs = [at for at, event in enumerate(recording.events[: moment + 1]) if event == number]
    return _file(recording.events, number, syncs[-1]) if len(syncs) > 1 else b""


def write(state: State, out: Path) -> None:
    """Make an image a folder that is not there yet."""

    def fill(place: Path, number: int) -> None:
        place.mkdir(mode=0o700, parents=True)
        for name, held in state.folders.get(number, {}).items():
            if held in state.folders or held not in state.files:
                fill(place / name, held)
            else:
                (place / name).write_bytes(state.files[held])
                (place / name).chmod(0o600)

    fill(out, ROOT)


def _last_syncs(recording: Recording, crash: int) -> dict[int, int]:
    """Of each number the last moment, up to the crash, at which it was synced; all that stood at the start was."""
    first = recording.events[0]
    assert isinstance(first, State)
    found = dict.fromkeys((*first.folders, *first.files), 0)
    return found | {event: at for at, event in enumerate(recording.events[: crash + 1]) if isinstance(event, int)}


def _state(events: list[State | int], at: int) -> State:
    """How everything stood at a moment."""
    while not isinstance(state := events[at], State):
        at -= 1
    return state


def _all(events: list[State | int], crash: int, what: str) -> list[int]:
    """Numbers of all folders, or files, that there were up to a moment."""
    states = (event for event in events[: crash + 1] if isinstance(event, State))
    return sorted({number for state in states for number in getattr(state, what)})


def _folder(events: list[State | int], number: int, at: int) -> Mapping[str, int | None]:
    return _state(events, at).folders.get(number, {}) if at >= 0 else {}


def _file(events: list[State | int], number: int, at: int) -> bytes:
    return _state(events, at).files.get(number, b"") if at >= 0 else b""


def _changes(events: list[State | int], number: int, since: int, crash: int) -> Iterator[dict[str, int | None]]:
    """What was done to a folder's names from a moment on, one after the other; a rename is one change."""
    before = _folder(events, number, since)
    for at in range(max(since, 0), crash + 1):
        now = _folder(events, number, at)
        changed = {name: now.get(name) for name in {*before, *now} if before.get(name) != now.get(name)}
        if changed and number in _state(events, at).folders:
            yield changed
            before = now


def _after(synced: bytes, written: bytes, fate: str, chance: random.Random) -> bytes:
    """What is left of a file's bytes, of which the first were synced and the second written over them."""
    if synced == written or fate == "lost":
        return synced
    same = next((at for at, (one, two) in enumerate(zip(synced, written, strict=False)) if one != two), None)
    same = min(len(synced), len(written)) if same is None else same
    at = chance.randint(same, len(written))
    return written[:at] if fate == "torn" else written[:at] + bytes(len(written) - at)
