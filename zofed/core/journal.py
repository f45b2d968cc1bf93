"""What was asked and answered; enough to rebuild the weights.

A journal is an append-only file:

    header   "ZOFEDJNL" | u16 format | u32 length of genesis | genesis, canonical JSON | u32 CRC-32 of all before
    entry    u32 length of body | u32 CRC-32 of length, body and chain | body | 16-byte chain

all little endian. The genesis pins everything a replay depends on. The chain of the header is the BLAKE2b-128 of the
genesis, that of an entry the BLAKE2b-128 of the chain before it and the body: two journals with the same head hold
the same history. An entry counts once `fdatasync` has returned, and only then may anybody act on it.
"""

import hashlib
import itertools
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from zofed.base import checksums, shell
from zofed.base.errors import DiskError, UserError
from zofed.base.files import hold, open_private, sync_folder
from zofed.base.parsing import from_json
from zofed.core import records, varint
from zofed.core.records import Record

OF_A_RUN = "journal.zofed"  # the name in the folder of a run, whose commands know more remedies
FORMAT = 3
MAGIC = b"ZOFEDJNL"
_START = struct.Struct("<8sHI")  # magic, format, length of the genesis
_ENTRY = struct.Struct("<II")  # length of the body, CRC-32 of that length, the body and the chain
_CRC = struct.Struct("<I")
CHAIN_BYTES = 16
LARGEST_BODY = 64 * 2**20  # a longer length field can only be damage
_SEARCHED_AT_ONCE = 2**20  # offsets: bounds the memory of a search

_sync_data = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync

Genesis = dict[str, Any]


class JournalError(UserError):
    """The journal's bytes are not what was written: the message names the file, the offset and the remedy."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record with the chain after it (16 bytes) and its own bytes as they stand in the file."""

    record: Record
    chain: bytes
    raw: bytes

    @property
    def body(self) -> bytes:
        """The record's bytes."""
        return self.raw[_ENTRY.size : -CHAIN_BYTES]

    def follows(self, chain: bytes) -> bool:
        """Whether it says what its record says, and continues the history of this chain."""
        body = self.body
        return self.chain == _after(chain, body) and body == records.encode(self.record, body[0])


@dataclass(frozen=True, slots=True)
class Contents:
    """All a journal file holds. `end` is the offset after the last whole entry, `torn` the bytes behind it."""

    genesis: Genesis
    entries: tuple[Entry, ...]
    end: int
    torn: int

    @property
    def head(self) -> bytes:
        """Chain after the last whole entry (16 bytes): it names the whole history."""
        return self.entries[-1].chain if self.entries else genesis_chain(self.genesis)

    @property
    def last_round(self) -> int:
        """Round of the last whole entry; 0 where there is none."""
        return self.entries[-1].record.round if self.entries else 0


@dataclass(frozen=True, slots=True)
class Survey:
    """What a journal holds up to where it is whole; what is wrong behind that (empty: nothing), with the byte.

    is_torn: it is a torn end, which opening cuts off. behind: rounds of the whole entries behind the damage, in order.
    """

    contents: Contents
    damage: str
    is_torn: bool
    behind: tuple[int, ...]


def canonical(genesis: Genesis) -> bytes:
    """The one JSON spelling of a genesis: sorted keys, no spaces, ASCII."""
    return json.dumps(genesis, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def differences(genesis: Genesis, other: Genesis) -> list[str]:
    """What one genesis pins and another does not pin alike, by key.

    As JSON has them: one of the two was read from it, where the numbers of labels have become strings.
    """
    return [key for key, value in genesis.items() if canonical({key: other.get(key)}) != canonical({key: value})]


def outline(genesis: Genesis) -> Genesis:
    """Enough of a genesis to tell by key how another differs: a digest of 4 bytes, hex, of what each key pins.

    A 135M model's genesis has 30 kB of names and shapes, its outline 300 bytes.
    """
    digests = {key: hashlib.blake2b(canonical({key: value}), digest_size=4) for key, value in genesis.items()}
    return {key: digest.hexdigest() for key, digest in digests.items()}


def genesis_chain(genesis: Genesis) -> bytes:
    """Chain before the first entry: what names a history from its start (16 bytes)."""
    return hashlib.blake2b(canonical(genesis), digest_size=CHAIN_BYTES).digest()


def link(chain: bytes, record: Record) -> Entry:
    """The entry that follows `chain` with this record."""
    body = records.encode(record)
    return _entry(record, body, _after(chain, body))


def _entry(record: Record, body: bytes, after: bytes) -> Entry:
    length = _CRC.pack(len(body))
    return Entry(record, after, length + _CRC.pack(zlib.crc32(length + body + after)) + body + after)


def _after(chain: bytes, body: bytes) -> bytes:
    """The chain behind a record's bytes."""
    return hashlib.blake2b(chain + body, digest_size=CHAIN_BYTES).digest()


def _readable(chain: bytes, record: Record) -> Entry:
    """As `link`. Raises UserError where reading the entry's bytes would not give the record back.

    One entry that no reader takes would make all before it unreadable. Costs as much as reading it, several times what
    encoding costs: 0.2 ms for 32 slopes, 20 ms for 10,000.
    """
    try:
        entry = link(chain, record)
        body = entry.body
        if len(body) > LARGEST_BODY:
            raise ValueError(f"it has {len(body):,} bytes, and a journal's entry at most {LARGEST_BODY:,}")
        if records.decode(body) != record:
            raise ValueError("its bytes give another record")
    except (ValueError, OverflowError, struct.error) as error:
        raise UserError(
            f"the record of round {record.round} cannot be read back, so it is not written: {error}; what the journal "
            "holds stands: --resume goes on from there, once what gave these numbers is mended"
        ) from error
    return entry


def bodies(entries: Iterable[Entry]) -> bytes:
    """What leads from one chain to another, on a wire: each record's length and its bytes."""
    parts = []
    for entry in entries:
        body = entry.body
        parts.append(varint.packed((len(body),)) + body)
    return b"".join(parts)


def following(raw: bytes, chain: bytes, head: bytes) -> list[Entry] | None:
    """The entries that follow `head` on the way from `chain` that `bodies` gave; None where it does not pass the head.

    What lies before the head is not read, for the chain says all of it: a process that serves a thousand clients meets
    the record of their thousand answers a thousand times. Raises ValueError for other bytes, and for rounds that fall.
    """
    way = _chained(raw, chain)
    start = 0 if head == chain else next((index + 1 for index, (_, after) in enumerate(way) if after == head), None)
    if start is None:
        return None
    entries: list[Entry] = []
    last = 0
    for body, after in way[start:]:
        record = records.decode(body)
        if record.round <= last:
            raise ValueError(f"a record of round {record.round} after round {last}")
        entries.append(_entry(record, body, after))
        last = record.round
    return entries


def _chained(raw: bytes, chain: bytes) -> list[tuple[bytes, bytes]]:
    """The bytes of each record in what `bodies` gave, with the chain behind it. Raises ValueError for other lengths."""
    found: list[tuple[bytes, bytes]] = []
    for start, stop in _body_places(raw):
        chain = _after(chain, raw[start:stop])
        found.append((raw[start:stop], chain))
    return found


def body_kinds(raw: bytes, most: int) -> bytes:
    """The kind of each record that `bodies` joined to these bytes, as far as one more than `most`; none is read.

    Raises ValueError for other bytes.
    """
    return bytes(raw[begin] for begin, _ in itertools.islice(_body_places(raw), most + 1))


def _body_places(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where each record's bytes begin and end."""
    at = 0
    while at < len(raw):
        (length,), at = varint.unpacked(raw, at, 1)
        if not 0 < length <= len(raw) - at:
            raise ValueError(f"a record of {length} bytes where {len(raw) - at} are left")
        yield at, at + length
        at += length


def position(entries: Sequence[Entry], genesis: bytes, head: bytes) -> int | None:
    """How many of the entries a replica with this head holds; None when it follows another history."""
    if head == genesis:
        return 0
    return next((index + 1 for index, entry in enumerate(entries) if entry.chain == head), None)


def _entry_size(raw: bytes, offset: int) -> int | None:
    """Whole size of the entry at `offset`, or None where no undamaged entry stands there."""
    if offset + _ENTRY.size > len(raw):
        return None
    length, crc = _ENTRY.unpack_from(raw, offset)
    size = _ENTRY.size + length + CHAIN_BYTES
    if not 0 < length <= LARGEST_BODY or offset + size > len(raw):
        return None
    rest = raw[offset + _ENTRY.size : offset + size]
    return size if zlib.crc32(raw[offset : offset + 4] + rest) == crc else None


def _whole_entries(raw: bytes, start: int) -> Iterator[int]:
    """Offsets of the undamaged entries from offset `start` on; linear in the bytes, whatever they are."""
    kinds = np.zeros(256, np.bool_)
    kinds[list(records.KINDS)] = True
    every = np.frombuffer(raw, np.uint8)
    for first in range(start, len(raw) - _ENTRY.size - CHAIN_BYTES, _SEARCHED_AT_ONCE):
        offsets = np.arange(first, min(first + _SEARCHED_AT_ONCE, len(raw) - _ENTRY.size - CHAIN_BYTES))
        offsets = offsets[kinds[every[offsets + _ENTRY.size]]]
        length, crc = (_little_endian(every, offsets + at) for at in (0, 4))
        stops = offsets + _ENTRY.size + length + CHAIN_BYTES
        fits = (length > 0) & (length <= LARGEST_BODY) & (stops <= len(raw))
        offsets, stops, crc = offsets[fits], stops[fits], crc[fits]
        zeros = np.zeros(len(offsets), np.uint32)
        of_lengths = checksums.crc32_of_parts(raw, offsets, offsets + 4, zeros)
        found = checksums.crc32_of_parts(raw, offsets + _ENTRY.size, stops, of_lengths)
        yield from offsets[found == crc].tolist()


def _little_endian(every: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The 4-byte integers that stand at these offsets."""
    low, second, third, high = (every[offsets + place].astype(np.int64) for place in range(4))
    return low | second << 8 | third << 16 | high << 24


def parse_entries(raw: bytes, chain: bytes, offset: int = 0) -> Iterator[Entry]:
    """Entries that stand whole and unbroken in `raw` from `offset` on, each continuing `chain`.

    Stops before the first entry that is cut or whose checksum fails. Raises ValueError where the checksum holds but
    the chain, the record or the order of the rounds does not: such bytes were not damaged but written by someone else.
    """
    last = 0
    while (size := _entry_size(raw, offset)) is not None:
        body = raw[offset + _ENTRY.size : offset + size - CHAIN_BYTES]
        entry = _entry(records.decode(body), body, _after(chain, body))
        if entry.raw != raw[offset : offset + size]:
            raise ValueError(f"the entry at byte {offset} does not continue the history before it")
        if entry.record.round <= last:
            raise ValueError(f"the entry at byte {offset} is of round {entry.record.round}, after round {last}")
        yield entry
        chain, offset, last = entry.chain, offset + size, entry.record.round


def read(path: Path) -> Contents:
    """All entries of the journal at `path`; a torn tail is counted, never repaired here.

    Raises JournalError as `survey`, and for an edited entry or damage with whole entries behind it.
    """
    raw, contents, edited = _parsed(path)
    remedy = "restore it from a copy"
    if path.name == OF_A_RUN:
        remedy += f", or see what can be kept with {shell.command('zofed', 'journal', 'repair', path.parent)}"
    if edited:
        raise JournalError(f"journal {path} was edited: {edited}; {remedy}")
    if contents.torn and next(_whole_entries(raw, contents.end + 1), None) is not None:
        raise JournalError(
            f"journal {path} is damaged at byte {contents.end}, after round {contents.last_round}, with whole entries "
            f"behind the damage; {remedy}"
        )
    return contents


def survey(path: Path) -> Survey:
    """What can be kept of the journal at `path`, and what is wrong behind it.

    Raises JournalError for a missing file, another format and a damaged header: then nothing can be.
    """
    raw, contents, damage = _parsed(path)
    rounds: list[int] = []
    for offset in (found := [*_whole_entries(raw, contents.end + 1)] if contents.torn else []):
        length = _CRC.unpack_from(raw, offset)[0]
        with suppress(ValueError):
            rounds.append(records.decode(raw[offset + _ENTRY.size : offset + _ENTRY.size + length]).round)
    is_torn = bool(contents.torn) and not damage and not found
    if contents.torn and not damage:
        what = "is cut off by the file's end" if is_torn else "does not fit its checksum"
        damage = f"the entry at byte {contents.end} {what}"
    return Survey(contents, damage, is_torn, tuple(rounds))


def _parsed(path: Path) -> tuple[bytes, Contents, str]:
    """The bytes of a journal, what of them is whole and in order, and why the entry behind that is refused, if so."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise JournalError(f"cannot read journal {path}: {error.strerror}; give the folder of a run") from error
    genesis, start = _read_header(path, raw)
    entries: list[Entry] = []
    end, edited = start, ""
    try:
        for entry in parse_entries(raw, genesis_chain(genesis), start):
            entries.append(entry)
            end += len(entry.raw)
    except ValueError as error:
        edited = str(error)
    return raw, Contents(genesis, tuple(entries), end, len(raw) - end), edited


def _read_header(path: Path, raw: bytes) -> tuple[Genesis, int]:
    if len(raw) < _START.size or not raw.startswith(MAGIC):
        raise JournalError(
            f"{path} is not a zofed journal: its first bytes are {raw[:8]!r}, not {MAGIC!r}; restore it from a copy"
        )
    _, version, length = _START.unpack_from(raw)
    if version != FORMAT:
        raise JournalError(f"journal {path} has format {version}; this version reads format {FORMAT}: use its zofed")
    end = _START.size + length
    if len(raw) < end + 4 or _CRC.unpack_from(raw, end)[0] != zlib.crc32(raw[:end]):
        raise JournalError(f"journal {path} has a damaged header; restore it from a copy or start the run again")
    strange = f"journal {path} has a genesis that"
    try:
        genesis = from_json(raw[_START.size : end])
        if isinstance(genesis, dict) and canonical(genesis) == raw[_START.size : end]:
            return genesis, end + 4
    except ValueError as error:
        raise JournalError(f"{strange} is no JSON ({error}): zofed did not write it; give its own") from error
    raise JournalError(f"{strange} is not spelt as zofed spells it; give its own")


class Journal:
    """An open journal, locked against a second writer, positioned after its last whole entry."""

    def __init__(self, file: int, contents: Contents) -> None:
        self._file = file
        self._failed = False
        self.genesis = contents.genesis
        self.entries = list(contents.entries)
        self.head = contents.head
        self.torn = contents.torn

    @classmethod
    def create(cls, path: Path, genesis: Genesis) -> Self:
        """A new journal at `path`, whole on disk before it is visible. Raises UserError when one exists."""
        if path.exists():
            raise UserError(f"{path} exists: choose another folder with --out, or continue it with --resume")
        body = canonical(genesis)
        header = _START.pack(MAGIC, FORMAT, len(body)) + body
        temporary = path.with_suffix(".new")
        with open(temporary, "wb", opener=open_private) as file:
            file.write(header + _CRC.pack(zlib.crc32(header)))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The journal at `path` for appending; a torn last entry is cut off and counted in `torn`.

        Raises JournalError as `read` does, UserError when another process holds the journal.
        """
        read(path)  # tells what is wrong before anything is opened for writing
        try:
            file = os.open(path, os.O_RDWR)
        except OSError as error:
            raise UserError(f"cannot write journal {path}: {error.strerror}; mend its permissions") from error
        try:
            hold(file, f"{path} is being written by another process: wait for it or stop it")
            contents = read(path)  # again: it may have grown before the lock was ours
            if contents.torn:
                os.ftruncate(file, contents.end)
                os.fsync(file)
            os.lseek(file, 0, os.SEEK_END)
            return cls(file, contents)
        except BaseException:
            os.close(file)
            raise

    @property
    def last_round(self) -> int:
        """Round of the newest record; 0 where there is none."""
        return self.entries[-1].record.round if self.entries else 0

    def append(self, record: Record) -> Entry:
        """`append_all` for one record."""
        return self.append_all([record])[0]

    def append_all(self, some: Sequence[Record]) -> list[Entry]:
        """Write records at once; when this returns, they survive a crash of the process and of the machine.

        Raises UserError, with nothing written, for a record that a reader would refuse; DiskError when the disk does
        not take them. What then stands in the file is unknown, so this journal takes no more: opening it again cuts a
        torn entry off.
        """
        if self._failed:
            raise DiskError("an earlier write to the journal failed: mend the disk")
        entries: list[Entry] = []
        last = self.last_round
        for record in some:
            if record.round <= last:
                raise UserError(
                    f"a record of round {record.round} would follow round {last} in the journal, whose rounds rise: "
                    "report this as a bug"
                )
            entries.append(_readable(entries[-1].chain if entries else self.head, record))
            last = record.round
        raw = b"".join(entry.raw for entry in entries)
        self._failed = True
        try:
            written = os.write(self._file, raw)
            _sync_data(self._file)
        except OSError as error:
            raise DiskError(f"cannot write the journal: {error.strerror}; mend the disk") from error
        if written != len(raw):
            raise DiskError(f"cannot write the journal: the disk took {written} of {len(raw)} bytes; free some space")
        self._failed = False
        self.head = entries[-1].chain
        self.entries += entries
        return entries

    def close(self) -> None:
        """Close the file, for another writer to open."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
