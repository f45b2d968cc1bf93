"""Messages of a round, and replicas that stand somewhere on the way: for the tests of what travels."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import nn

from zofed.core import aggregation, gradient_codec
from zofed.core.aggregation import Measured
from zofed.core.digests import tensors_digest
from zofed.core.genesis import make_genesis
from zofed.core.journal import Entry, link
from zofed.core.measure import Update
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Guided, Record, Seeded, Skipped
from zofed.core.replica import Replica
from zofed.federated import wire
from zofed.federated.messages import KEY
from zofed.federated.protocol import Answer, Contribution, Plan

PLAN = Plan(
    genesis=b"gggg",
    round=4,
    attempt=2,
    task="slopes",
    steps=1,
    client=3,
    after=b"a" * 16,
    entries=b"\x00raw\xff",
    probe=b"p" * 8,
)

HEAD: dict[str, Any] = {
    "genesis": b"gggg",
    "round": 4,
    "attempt": 2,
    "client": 3,
    "head": b"",
    "probe": b"p" * 8,
    "problem": "",
}

GOOD = Answer(
    **HEAD, coefficients=(2**18 - 1, -(2**18) + 1), exponent=-31, loss=5.5, examples=17, milliseconds=250
)  # fmt: skip

SHAPES: dict[str, tuple[int, ...]] = {"weight": (2, 3), "bias": (2,)}


def update_of(value: float = 0.5) -> Update:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


GIVEN = Contribution(**HEAD, update=gradient_codec.whole(update_of()), loss=5.5, examples=17, milliseconds=250)

UPDATE = update_of(0.125)

DIGEST = bytes.fromhex(tensors_digest(UPDATE))

HISTORY: tuple[Record, ...] = (
    Seeded(1, 0.125, (0, 1), 1, (5, -3), -6, 2),
    Dense(2, 0.25, DIGEST),
    Skipped(3),
    Seeded(4, 0.125, (1,), 2, (9, 8), -6, 2),
    Guided(Seeded(5, 0.5, (0,), 2, (-1, 2**17), -18, 2), DIGEST, 0.1, 0.5, 0.25, False),
    Seeded(6, 0.5, (0,), 2, (-1, 2**17), -18, 2),
)


def replica_of(seed: int = 1, optimizer: Optimizer | None = None) -> Replica:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    genesis = make_genesis(
        model, {"name": "test"}, list(SHAPES), seed=seed, kind="rank1", optimizer=optimizer or Optimizer("sgd", 0.5)
    )
    return Replica(model, genesis)


def history(replica: Replica, contents: Sequence[Record] = HISTORY) -> list[Entry]:
    chain, entries = replica.head, []
    for record in contents:
        entries.append(link(chain, record))
        chain = entries[-1].chain
    return entries


def standing_at(count: int, optimizer: Optimizer | None = None) -> Replica:
    """A replica that has applied the first `count` entries."""
    replica = replica_of(optimizer=optimizer)
    for entry in history(replica)[:count]:
        replica.apply(entry, UPDATE if isinstance(entry.record, Dense | Guided) else None)
    return replica


def state(replica: Replica) -> tuple[Any, ...]:
    moments = {key: value.tolist() for key, value in replica.state_dict().items()}
    return replica.digest(), replica.head, replica.round, replica.probe(), replica.spread, moments


LENGTHS = range(len(HISTORY) + 1)


def odd_contents() -> dict[str, RecordDict]:
    raw = wire.encoded(GOOD)
    return {
        "nothing": RecordDict(),
        "another key": RecordDict({"zofed2": ConfigRecord({KEY: raw})}),
        "a record more": RecordDict({KEY: ConfigRecord({KEY: raw}), "more": ConfigRecord()}),
        "another kind of record": RecordDict({KEY: MetricRecord({"loss": 1.0})}),
        "no field": RecordDict({KEY: ConfigRecord()}),
        "a field more": RecordDict({KEY: ConfigRecord({KEY: raw, "more": 1})}),
        "another field": RecordDict({KEY: ConfigRecord({"raw": raw})}),
        "a text": RecordDict({KEY: ConfigRecord({KEY: "raw"})}),
        "a bool": RecordDict({KEY: ConfigRecord({KEY: True})}),
        "a number": RecordDict({KEY: ConfigRecord({KEY: 7})}),
        "a list": RecordDict({KEY: ConfigRecord({KEY: [raw]})}),
        "no bytes": RecordDict({KEY: ConfigRecord({KEY: b""})}),
    }


def measured(coefficients: Sequence[int], exponent: int, examples: int = 1) -> Measured:
    return Measured(tuple(coefficients), exponent, 1.0, 2 * len(coefficients), examples=examples)


def exact(slopes: aggregation.Slopes | aggregation.Merged) -> list[Fraction]:
    return [value * Fraction(2) ** slopes.exponent for value in slopes.coefficients]
