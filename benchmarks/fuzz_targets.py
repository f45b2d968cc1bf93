"""Every decoder and reader of zofed as one function of bytes, with inputs to begin from and the errors it may raise."""

import functools
import hashlib
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from benchmarks import fuzz_files
from zofed.base.errors import UserError
from zofed.core import gradient_codec, journal, records, rice, sanitize, snapshots, varint
from zofed.core.genesis import make_genesis
from zofed.core.journal import Journal
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Guided, Seeded, Skipped
from zofed.core.replica import Replica
from zofed.core.state_file import StateFile
from zofed.data.classes import Classes
from zofed.federated import wire
from zofed.federated.protocol import Answer, Contribution, Plan
from zofed.runs import checkpoints

RECORDS = (
    Seeded(1, 0.5, (0, 3), 2, (1, -(2**18) + 1, 0, 4), -20, 4.0, 1, 0.25),
    Skipped(2),
    Dense(3, 0.1, bytes(range(32))),
    Guided(Seeded(4, 1e-3, (7,), 1, (12345, -6), 3, 0.1, 2), bytes(range(32)), 0.1, 1.0, 0.5, True),
    Seeded(5, 1e-3, (7,), 1, (12345, -6), 3, 0.1, 2, 0.5),
)
SHAPES: dict[str, tuple[int, ...]] = {"weight": (6, 7), "bias": (2,), "scale": ()}
_ANSWER: dict[str, Any] = {
    "genesis": b"gggg", "round": 4, "attempt": 2, "client": 3, "head": b"h" * 16, "probe": b"p" * 8, "problem": "",
    "loss": 5.5, "examples": 17, "milliseconds": 250,
}  # fmt: skip
CONTENTS: tuple[Any, ...] = (
    Plan(
        genesis=b"gggg", round=4, attempt=2, task="slopes", steps=1, client=3, after=b"a" * 16, entries=b"\x00raw\xff",
        probe=b"p" * 8,
    ),
    Answer(**_ANSWER, coefficients=(2**18 - 1, -(2**18) + 1), exponent=-31),
    Contribution(**_ANSWER, update=b"u" * 40),
    wire.Greeting(b'{"a":1}', 3, '[false, "no", "maybe", "yes"]'),
    wire.Introduction(1, 4, 100, "fo", b"h" * 16, '{"web": 3}', "", "/path 0.1.0"),
    wire.Final(2, "ab" * 32, b"h" * 16),
    wire.Evaluation(3, b"", 1.5, 10**6, '{"accuracy": 0.5}'),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """What reads some bytes. refusals: what it may raise for bytes that are not to be read; words: of their format."""

    name: str
    read: Callable[[bytes], object]
    corpus: tuple[bytes, ...]
    refusals: tuple[type[Exception], ...] = (UserError,)
    words: tuple[bytes, ...] = ()


def all_of(scratch: Path) -> dict[str, Target]:
    """Every target by its name. scratch: an empty folder, for those that read files."""
    torch.set_num_threads(1)
    found = [*_decoders(), *_journals(scratch), *_tensors(scratch), *_texts()]
    found += [Target(*parts) for parts in fuzz_files.all_of(scratch)]
    return {target.name: target for target in found}


INTEGERS = (0, 1, -1), (2**63 - 1, -(2**63)), (300,)


def _decoders() -> Iterable[Target]:
    encoded = tuple(map(records.encode, RECORDS))
    of_bytes = (ValueError,)
    yield Target("records", records.decode, encoded, of_bytes)
    for name, module in (("varint", varint), ("Rice codes", rice)):
        read = functools.partial(_integers, module.unpacked)
        yield Target(name, read, tuple(bytes([len(some)]) + module.packed(some) for some in INTEGERS), of_bytes)
    linked = journal.bodies(_entries())
    yield Target("entries on a wire", lambda raw: journal.following(raw, bytes(16), bytes(16)), (linked,), of_bytes)
    for content in CONTENTS:
        kind = type(content)
        read = functools.partial(_message, kind)
        yield Target(f"message {kind.__name__}", read, (wire.encoded(content),), of_bytes)


def _integers(unpacked: records.Unpacked, raw: bytes) -> object:
    """As many as the first byte says."""
    return unpacked(raw, 1, raw[0] if raw else 0)


def _message(kind: type[Any], raw: bytes) -> object:
    """As a message is unpacked: decoded, its texts cleaned, its tables read."""
    found = sanitize.cleaned(wire.decoded(kind, raw))
    for look in ("held_counts", "faults", "measures"):
        if hasattr(found, look):
            getattr(found, look)()
    return found


def _entries() -> list[journal.Entry]:
    found: list[journal.Entry] = []
    for record in RECORDS:
        found.append(journal.link(found[-1].chain if found else bytes(16), record))
    return found


# --- journals, as they come from a disk, and with checksums that fit whatever stands there ---


def _journals(scratch: Path) -> Iterable[Target]:
    path = scratch / "journal" / journal.OF_A_RUN
    path.parent.mkdir()
    with Journal.create(path, {"seed": 5, "words": ["b", "a"]}) as opened:
        opened.append_all(RECORDS)
    whole = path.read_bytes()

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        journal.survey(path)
        journal.read(path)

    def of_sealed(raw: bytes) -> None:
        read(_sealed(raw))

    yield Target("journal", read, (whole,), (UserError,))
    bodies = b"".join(struct.pack("<H", len(body)) + body for body in map(records.encode, RECORDS))
    genesis = journal.canonical({"seed": 5, "words": ["b", "a"]})
    yield Target("journal with fitting checksums", of_sealed, (struct.pack("<H", len(genesis)) + genesis + bodies,))


def _sealed(raw: bytes) -> bytes:
    """A journal of parts, each with its length before it: the genesis, then bodies of entries; sums and chain fit."""
    parts: list[bytes] = []
    while len(raw) >= 2:
        length = struct.unpack_from("<H", raw)[0]
        parts.append(raw[2 : 2 + length])
        raw = raw[2 + length :]
    genesis, *bodies = parts or [b""]
    header = struct.pack("<8sHI", journal.MAGIC, journal.FORMAT, len(genesis)) + genesis
    made = header + struct.pack("<I", zlib.crc32(header))
    chain = hashlib.blake2b(genesis, digest_size=journal.CHAIN_BYTES).digest()
    for body in bodies:
        chain = hashlib.blake2b(chain + body, digest_size=journal.CHAIN_BYTES).digest()
        length_of = struct.pack("<I", len(body))
        made += length_of + struct.pack("<I", zlib.crc32(length_of + body + chain)) + body + chain
    return made


# --- tensors ---


def _tensors(scratch: Path) -> Iterable[Target]:
    chance = torch.Generator().manual_seed(1)
    update = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    gradients = (*(gradient_codec.compressed(update, rank) for rank in (0, 2)), gradient_codec.whole(update))
    of_bytes = (ValueError,)
    yield Target("gradient", lambda raw: gradient_codec.decoded(raw, SHAPES), gradients, of_bytes)
    joined = gradient_codec.joined(gradients)
    yield Target("gradients", lambda raw: list(gradient_codec.split(raw)), (joined,), of_bytes)
    yield Target("snapshot", _restored, (snapshots.taken(_replica()),), of_bytes)

    path = scratch / "checkpoint.safetensors"
    checkpoints.write(scratch, "checkpoint", update, {"round": 4, "head": "ab" * 16})

    def checkpoint(raw: bytes) -> None:
        path.write_bytes(raw)
        checkpoints.read(path)
        checkpoints.facts(path)

    yield Target("checkpoint", checkpoint, (path.read_bytes(),), ())

    def with_facts(raw: bytes) -> None:
        facts = raw.decode("utf-8", "replace")
        digest = checkpoints.tensors_digest({"a": torch.zeros(2)})
        about = {"facts": facts, "digest": digest, "seal": checkpoints._seal(digest, facts)}  # pyright: ignore
        checkpoint(save({"a": torch.zeros(2)}, about))

    yield Target("facts of a checkpoint", with_facts, (b'{"round": 4, "head": "ab"}',), ())
    yield _kept_states(scratch)


def _replica() -> Replica:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    genesis = make_genesis(model, {}, ("weight", "bias"), seed=5, kind="rank1", optimizer=Optimizer("adamw"))
    return Replica(model, genesis)


@functools.cache
def _replica_to_restore() -> Replica:
    return _replica()


def _restored(raw: bytes) -> None:
    snapshots.restore(_replica_to_restore(), raw)


def _kept_states(scratch: Path) -> Target:
    folder, keys = scratch / "states", [bytes([number]) * 16 for number in range(3)]
    kept = StateFile(folder, "some", 10**6)
    for key in keys:
        kept.add(key, torch.arange(6, dtype=torch.float32).reshape(2, 3))
    path = folder / "some.states"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        found = StateFile(folder, "some", 10**6)
        for key in keys:
            if key in found:
                into = found.like(key, 1)
                found.read([key], into, [0])

    return Target("kept states", read, (path.read_bytes(),), ())


# --- texts that other machines send, or that settings hold ---


def _texts() -> Iterable[Target]:
    def table(raw: bytes) -> None:
        text = raw.decode("utf-8", "replace")
        for look in (sanitize.counts, sanitize.measures, sanitize.reason, sanitize.json_object):
            look(text)

    yield Target("table of a node", table, (b'{"web": 3, "code": 0}', b'{"accuracy": 0.5}', b"a\nb"), ())

    def classes(raw: bytes) -> None:
        Classes.unpacked(3, raw.decode("utf-8", "replace"))

    yield Target("names of classes", classes, (b'[false, "no", "maybe", "yes"]',), (ValueError,))
