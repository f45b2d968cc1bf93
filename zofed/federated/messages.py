"""Contents to Flower messages and back: the only file that knows how they lie in one."""

import itertools
from collections.abc import Iterable
from typing import Any, TypeVar

from flwr.app import ConfigRecord, RecordDict

from zofed.base import texts
from zofed.core import rice, sanitize
from zofed.federated import flower_messages, wire
from zofed.federated.wire import Malformed

KEY = "zofed"  # one record of one field a message: every record is an object of its own on Flower's wire

T = TypeVar("T")


def pack(content: Any) -> RecordDict:
    """A message's content."""
    return RecordDict({KEY: ConfigRecord({KEY: wire.encoded(content)})})


def unpack(kind: type[T], content: RecordDict, tensors: int = 0, integers: int = 0) -> T:
    """The content `pack` was given, its texts fit to be printed. Raises Malformed for anything else.

    tensors, integers: what a client was asked for: bytes at most, and how many. A client's word that is longer than
    these and `wire.LARGEST` is not read: as Python's integers and texts it would take many times its memory.
    """
    if list(content) != [KEY] or not isinstance(content[KEY], ConfigRecord):
        raise Malformed(f"expected one record {KEY!r}, got {_names(content)}")
    record = dict(content[KEY].items())  # type: ignore[union-attr]
    raw = record.get(KEY)
    if list(record) != [KEY] or type(raw) is not bytes:
        raise Malformed(f"expected one field {KEY!r} of bytes, got {_names(record)}")
    limit = wire.LARGEST.get(kind, len(raw)) + tensors + rice.LONGEST * integers
    if len(raw) > limit:
        raise Malformed(f"{len(raw):,} bytes, and what is asked for has {limit:,} at most")
    return sanitize.cleaned(wire.decoded(kind, raw, integers))


def _names(found: Iterable[str]) -> str:
    return texts.one_line(repr([str(name)[: sanitize.LONGEST_NAME] for name in itertools.islice(found, 3)]), 100)


def size(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it, without the transport's own framing."""
    return flower_messages.size(content)


def payload(content: RecordDict) -> int:
    """Bytes of zofed's own among them."""
    record = content.get(KEY)
    raw = record.get(KEY) if isinstance(record, ConfigRecord) else None
    return len(raw) if isinstance(raw, bytes) else 0
