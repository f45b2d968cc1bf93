"""What the exchanges of a federation cost and found, on disk before their records: what its tables are made from.

A central run asks a step again to write its line anew; clients are not asked twice. So what an exchange gave is written
here, and made durable, before the journal takes its records: whatever becomes of the tables, their lines come back.
"""

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from zofed.base.errors import DiskError
from zofed.base.files import PRIVATE, sync_folder, write_private
from zofed.base.parsing import from_json
from zofed.runs.tables import Row

NAME = "rounds.log"  # beside the tables


class RoundLog:
    """Facts, a line each, its CRC-32 before the JSON, so that half a line or a spoilt one is left out.

    exchanges: what was found out by asking for a round, by round. scores: the clients' own, by the round they are of.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        is_new = not path.exists()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE)
        if is_new:
            sync_folder(folder)
        self.exchanges: dict[int, Row] = {}
        self.scores: dict[int, list[Row]] = {}
        for fact in _facts(path):
            self._note(fact)

    def _note(self, fact: Row) -> None:
        if "scores" in fact:
            self.scores[fact["round"]] = fact["scores"]
        else:
            self.exchanges[fact["round"]] = fact

    def write(self, *facts: Row) -> None:
        """Keep facts, each with its `round`; durable when this returns. Raises DiskError where the disk takes none."""
        raw = _lines(facts)
        try:
            if os.write(self._file, raw) != len(raw):
                raise DiskError("cannot write the log of rounds: the disk is full; free some space")
            os.fsync(self._file)
        except OSError as error:
            raise DiskError(f"cannot write the log of rounds: {error.strerror}; free some space") from error

    def close(self) -> None:
        os.close(self._file)


def keep(folder: Path, last: int) -> None:
    """Let go of all that was found out in rounds behind `last`. Raises OSError where the disk does not take it."""
    path = folder / NAME
    if path.exists() and any(fact["round"] > last for fact in _facts(path)):
        write_private(path, _lines(fact for fact in _facts(path) if fact["round"] <= last))


def exchange_of(folder: Path, round_: int) -> int:
    """The round that clients were asked for when this one's record was found: an earlier one where they were asked for
    several at once. A round that nothing is known of is its own.
    """
    path, found = folder / NAME, round_
    for fact in _facts(path) if path.exists() else []:
        if "now" in fact and fact["round"] == round_:
            found = fact.get("of", round_)
        elif "now" in fact and fact["round"] < round_ and "of" not in fact:
            found = round_  # asked from an earlier round on once more, which may have given fewer
    return found


def _facts(path: Path) -> list[Row]:
    """What stands whole in a log."""
    return list(filter(None, map(_fact, path.read_bytes().split(b"\n"))))


def _lines(facts: Iterable[Row]) -> bytes:
    texts = (json.dumps(fact, separators=(",", ":")).encode() for fact in facts)
    return b"".join(b"\n%08x %s" % (zlib.crc32(text), text) for text in texts) + b"\n"


def _fact(line: bytes) -> Row | None:
    try:
        crc, text = int(line[:8], 16), line[9:]
        fact = from_json(text) if zlib.crc32(text) == crc else None
        return fact if isinstance(fact, dict) and isinstance(fact["round"], int) else None
    except (ValueError, KeyError):
        return None
