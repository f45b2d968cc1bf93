"""Plans and answers as bytes, as few as will do: no field is named, small numbers take few bits.

content   u8 kind | its fields in order
int       as `varint` has it
float     float32, little endian: what is measured, not what weights move by
str       its length as an int, UTF-8; bytes likewise
sequence  of integers: its length as an int, then the integers as `rice` has them
"""

import math
import struct
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar, get_type_hints

from zofed.core import rice, sanitize, varint
from zofed.core.journal import CHAIN_BYTES
from zofed.federated.protocol import Answer, Contribution, Plan

T = TypeVar("T")


class Malformed(ValueError):  # noqa: N818, a state of a message
    """Bytes that are not exactly the content expected; the text says where."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server's first word to a node: the outline (canonical JSON) of the genesis that its settings must give too.

    classes, names: as in a plan.
    """

    genesis: bytes
    classes: int
    names: str = ""


@dataclass(frozen=True, slots=True)
class Introduction:
    """A node's answer: which client it is, how many examples it holds and of what.

    mode: `fo` where it can backpropagate, else `zo`. head: chain where its weights stand. counts: documents by label or
    source, as JSON. problem: one line why it cannot take part, empty when it can. code: where its zofed lies and which
    version it is. snapshots: 0 where it takes records alone.
    """

    client: int
    clients: int
    examples: int
    mode: str
    head: bytes
    counts: str
    problem: str
    code: str
    snapshots: int = 1

    def held_counts(self) -> dict[str, int]:
        """The counts; none where what the node says is no table of names and numbers."""
        return sanitize.counts(self.counts)

    def faults(self) -> str:
        """Why such a node cannot take part, in one line with the remedy; empty where what it says can be."""
        if problem := sanitize.misplaced(self.client, self.clients):
            return problem
        if not 0 < self.examples <= sanitize.LARGEST_COUNT:
            examples = sanitize.brief(self.examples)
            return f"client {self.client} says it holds {examples} examples: give it 1 to {sanitize.LARGEST_COUNT:,}"
        if self.mode not in ("fo", "zo"):
            return f"client {self.client} says mode = '{self.mode}': it runs another zofed, give all machines the same"
        if len(self.head) != CHAIN_BYTES:
            return (
                f"client {self.client} stands at a head of {len(self.head)} bytes, not {CHAIN_BYTES}: it runs another "
                "zofed, give all machines the same"
            )
        return ""


@dataclass(frozen=True, slots=True)
class Final:
    """SHA-256 (hex) of a client's weights; empty when it could not catch up."""

    client: int
    digest: str
    head: bytes


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean loss on a client's own held-out examples and how many they are; 0 where it could not catch up.

    metrics: what a function of the client's own says of them, as JSON; empty where it has none.
    """

    client: int
    head: bytes
    loss: float
    examples: int
    metrics: str = ""

    def measures(self) -> dict[str, float]:
        """The metrics; none where what the node says is no table of names and numbers."""
        return sanitize.measures(self.metrics)


KINDS: tuple[type[Any], ...] = (Plan, Answer, Contribution, Greeting, Introduction, Final, Evaluation)
LARGEST_TEXTS = 2**16  # bytes of all that an answer says beside its integers, its tensors and its table
LARGEST: dict[type[Any], int] = {  # bytes of what a client says, where no integers or tensors were asked for
    Answer: LARGEST_TEXTS,
    Contribution: LARGEST_TEXTS,
    Introduction: LARGEST_TEXTS + sanitize.LARGEST_TABLE,
    Final: LARGEST_TEXTS,
    Evaluation: LARGEST_TEXTS + sanitize.LARGEST_TABLE,
}
MORE_INTEGERS = 2**16  # of a sequence, beside those that were asked for: they are read and told to be too many
_FLOAT = struct.Struct("<f")
_LARGEST_FLOAT = 3.4e38


def encoded(content: Any) -> bytes:
    """The content's bytes, which `decoded` takes back."""
    parts = [bytes([KINDS.index(type(content))])]
    for field in fields(content):
        value = getattr(content, field.name)
        if isinstance(value, tuple):
            parts.append(varint.packed((len(value),)) + rice.packed(value))
        elif isinstance(value, float):
            parts.append(_FLOAT.pack(_single(value)))
        elif isinstance(value, int):
            parts.append(varint.packed((value,)))
        else:
            raw = value.encode() if isinstance(value, str) else value
            parts.append(varint.packed((len(raw),)) + raw)
    return b"".join(parts)


def decoded(kind: type[T], raw: bytes, integers: int = 0) -> T:
    """The content `encoded` was given. Raises Malformed for any other bytes, whatever they are.

    integers: how many a sequence was asked for. Of many more none is read: of a bit each they take hundreds of times
    their bytes.
    """
    if not raw or raw[0] != KINDS.index(kind):
        raise Malformed(f"{len(raw)} bytes are no {kind.__name__}")
    values, at = [], 1
    for name, hint in _hints(kind):
        try:
            reader = _READERS.get(hint)
            value, at = reader(raw, at) if reader else _read_ints(raw, at, integers + MORE_INTEGERS)
        except (ValueError, struct.error) as error:
            what = f"field {name} of {kind.__name__} is cut or no {hint.__name__}"
            raise Malformed(f"{what}: {error}") from None
        values.append(value)
    if at != len(raw):
        raise Malformed(f"{len(raw) - at} bytes follow the last field of {kind.__name__}")
    return kind(*values)


@cache
def _hints(kind: type[Any]) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in fields(kind))


def _single(value: float) -> float:
    """The value, infinite where float32 cannot hold it."""
    return value if not _LARGEST_FLOAT < abs(value) < math.inf else math.copysign(math.inf, value)


def _read_int(raw: bytes, at: int) -> tuple[int, int]:
    (value,), at = varint.unpacked(raw, at, 1)
    return value, at


def _read_float(raw: bytes, at: int) -> tuple[float, int]:
    return _FLOAT.unpack_from(raw, at)[0], at + _FLOAT.size


def _read_bytes(raw: bytes, at: int) -> tuple[bytes, int]:
    length, at = _read_int(raw, at)
    if not 0 <= length <= len(raw) - at:
        raise ValueError(f"a length of {length} where {len(raw) - at} bytes are left")
    return raw[at : at + length], at + length


def _read_str(raw: bytes, at: int) -> tuple[str, int]:
    found, at = _read_bytes(raw, at)
    return found.decode(), at


def _read_ints(raw: bytes, at: int, most: int) -> tuple[tuple[int, ...], int]:
    count, at = _read_int(raw, at)
    if count > most:
        raise ValueError(f"{count} integers where {most} are read at most")
    return rice.unpacked(raw, at, count)


_READERS: dict[Any, Any] = {int: _read_int, float: _read_float, bytes: _read_bytes, str: _read_str}
