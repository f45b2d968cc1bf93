"""Plans and answers to Flower records and back: the only file that knows how they look on the wire."""

import struct
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

from flwr.app import ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from zofed.federation import Answer, Plan

KEY = "zofed"  # one record a message: every record is an object of its own on Flower's wire

T = TypeVar("T", bound="Plan | Answer | Greeting | Introduction | Final")


class Malformed(ValueError):  # noqa: N818, a state of a message
    """A message whose fields are not exactly those expected; the text says which."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server's first word to a node: the genesis (canonical JSON) that its own settings must give too."""

    genesis: bytes


@dataclass(frozen=True, slots=True)
class Introduction:
    """A node's answer: which client it is, out of how many, and how many examples it holds.

    problem: one line why it cannot take part, empty when it can. code: where its zofed lies and which version it is.
    """

    client: int
    clients: int
    examples: int
    problem: str
    code: str


@dataclass(frozen=True, slots=True)
class Final:
    """SHA-256 (hex) of a client's weights at the end of the run; empty when it could not catch up."""

    client: int
    digest: str


def pack(content: Plan | Answer | Greeting | Introduction | Final) -> RecordDict:
    """A message's content: one record of plain fields; integer sequences as little-endian int32 bytes."""
    record = ConfigRecord()
    for field in fields(content):
        value = getattr(content, field.name)
        record[field.name] = struct.pack(f"<{len(value)}i", *value) if isinstance(value, tuple) else value
    return RecordDict({KEY: record})


def unpack(kind: type[T], content: RecordDict) -> T:
    """The content `pack` was given. Raises Malformed for a missing, extra or wrongly typed field."""
    if list(content) != [KEY] or not isinstance(content[KEY], ConfigRecord):
        raise Malformed(f"expected one record {KEY!r}, got {list(content)}")
    record = dict(content[KEY].items())  # type: ignore[union-attr]
    hints = get_type_hints(kind)
    if set(record) != set(hints):
        raise Malformed(f"fields {sorted(set(record) ^ set(hints))} are missing or too many")
    return kind(**{name: _field(name, record[name], hints[name]) for name in hints})


def _field(name: str, value: Any, hint: Any) -> Any:
    is_plain = hint in (int, float, str, bytes)
    wanted: type = hint if is_plain else bytes  # a tuple of integers travels as bytes
    if type(value) is not wanted:  # bool is no int here, and an int is no float
        raise Malformed(f"field {name} is a {type(value).__name__}, not a {wanted.__name__}")
    if is_plain:
        return value
    if len(value) % 4:
        raise Malformed(f"field {name} has {len(value)} bytes, not a multiple of 4")
    return struct.unpack(f"<{len(value) // 4}i", value)


def size(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it, without the transport's own framing."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())
