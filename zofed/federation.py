"""A federated round as plain functions: plan, answer, check, merge, catch up. Nothing here knows Flower.

The server plans a round and sends the plan with the journal entries a client lacks; the client catches up by replaying
them, measures slopes along its own seeded directions and answers with integers; the server checks every answer against
a closed list of reasons and merges the good ones into one record. Central training is the same with one client.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from zofed import data, directions, journal, metrics, records, schedules
from zofed.config import Settings
from zofed.data import Examples
from zofed.estimators import Estimate, FiniteDifference, Points, Split, degrees_of_freedom
from zofed.journal import Entry
from zofed.perturbed import Loss
from zofed.records import Seeded, Spread
from zofed.worker import Worker, update_digest

# Why a reply was not used. `late` and `error` are told by the server's loop, the others by `check`.
Reason = Literal[
    "error", "late", "malformed", "wrong_genesis", "wrong_round", "stale_attempt", "wrong_client", "duplicate",
    "wrong_length", "not_finite", "out_of_range", "behind", "desync",
]  # fmt: skip

LARGEST_LOSS = 1e6  # a mean cross-entropy beyond this is a fault, not a measurement


@dataclass(frozen=True, slots=True)
class Plan:
    """What the server asks of one client in one round.

    genesis, after, head: 16-byte chains; `entries` are the raw journal entries that lead from `after` to `head`, where
    sound weights have `probe`.
    Seeds derive from (run seed in the genesis, round, client's index, local step 0, query); `attempt` only marks late
    replies and enters no seed, so a round asked again asks the same.
    """

    genesis: bytes
    round: int
    attempt: int
    after: bytes
    head: bytes
    entries: bytes
    probe: bytes
    client: int
    queries: int
    epsilon: float
    batch_size: int
    points: str
    threads: int
    copies_per_pass: int
    forward_dtype: str
    examples_per_query: int = 0  # of each query's own; 0: all share one batch
    objective: str = "loss"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client sends: integer slopes with one exponent, and what tells whether to believe them.

    `head` and `probe` are those of the replica the slopes were measured on. A client that could not catch up sends
    no coefficients and its own `head`, so that the server can send what it lacks.
    """

    genesis: bytes
    round: int
    attempt: int
    client: int
    head: bytes
    probe: bytes
    coefficients: tuple[int, ...]
    exponent: int
    loss: float
    examples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Slopes of one client in one step, as integers, with the mean loss and the forward passes spent.

    sequences: examples that these passes ran, all together.
    """

    coefficients: tuple[int, ...]
    exponent: int
    loss: float
    forward_passes: int
    sequences: int = 0

    @classmethod
    def of(cls, estimate: Estimate, batch_size: int = 0) -> "Measured":
        """The estimate with its slopes as integers. Raises ValueError when one is not finite."""
        coefficients, exponent = records.to_integers(estimate.slopes)
        sequences = estimate.forward_passes * batch_size
        return cls(coefficients, exponent, estimate.loss, estimate.forward_passes, sequences)


def measure(worker: Worker, examples: Examples, plan: Plan, split: Split | None = None) -> Measured:
    """Ask the worker about one batch along one client's directions of a round.

    Batch and seeds are functions of (run seed, round, client) alone. split: measures shares of the queries in several
    places, as `raw_losses` does. Raises ValueError when a loss is not finite.
    """
    loss, own = query_loss(worker, examples, plan)
    estimate = worker.ask(loss, _seeds(worker, plan), plan.epsilon, plan.copies_per_pass, _points(plan), own, split)
    return Measured.of(estimate, plan.examples_per_query or plan.batch_size)


def raw_losses(worker: Worker, examples: Examples, plan: Plan, some: slice, batched: bool) -> Tensor:
    """Losses at the shifted weights of some of a plan's queries, as `measure` meets them: (queries, steps)."""
    loss, own = query_loss(worker, examples, plan)
    how = FiniteDifference(worker.kind, plan.epsilon, _points(plan), plan.copies_per_pass, worker.sizes)
    return how.losses(loss, worker.parameters, _seeds(worker, plan), own, some, batched=batched)


def _seeds(worker: Worker, plan: Plan) -> list[int]:
    return directions.direction_seeds(worker.genesis["seed"], plan.round, plan.client, plan.queries)


def _points(plan: Plan) -> Points:
    return "one-sided" if plan.points == "one-sided" else "two-point"


def query_loss(worker: Worker, examples: Examples, plan: Plan) -> tuple[Loss, Examples | None]:
    """The loss that a plan's queries measure, and the examples handed to it: those of each query, or None."""
    chosen = {"seed": worker.genesis["seed"], "client": plan.client, "step": plan.round}
    how = (plan.forward_dtype, plan.objective)
    if not plan.examples_per_query:
        shared = data.batch(examples, **chosen, batch_size=plan.batch_size)
        return lambda: metrics.loss_of(worker.model, shared, *how), None
    drawn = data.batch(examples, **chosen, batch_size=plan.queries * plan.examples_per_query)
    own = {name: tensor.unflatten(0, (plan.queries, -1)) for name, tensor in drawn.items()}
    return lambda batch: metrics.loss_of(worker.model, batch, *how), own


def merge(
    round_: int,
    rate: float,
    queries: int,
    measured: Mapping[int, Measured | Answer],
    points: Points = "two-point",
    spread: Spread | None = None,
) -> Seeded:
    """One record from the slopes of all clients, by client index: the mean over all their directions.

    The exponent is the coarsest one sent; sums stay exact whatever the order of arrival. spread: that of the records
    before, for a step that is divided by it.
    """
    clients = tuple(sorted(measured))
    exponent = max(  # that of an answer of zeros says nothing, and must not round the others to zero
        (measured[client].exponent for client in clients if any(measured[client].coefficients)),
        default=records.SMALLEST_EXPONENT,
    )
    coefficients = tuple(
        value
        for client in clients
        for value in records.to_exponent(measured[client].coefficients, measured[client].exponent, exponent)
    )
    divisor = float(len(clients) * degrees_of_freedom(points, queries))
    if spread is not None:
        divisor *= spread.after(coefficients, exponent).value
    return Seeded(round_, rate, clients, queries, coefficients, exponent, divisor)


def record_of(settings: Settings, worker: Worker, measured: Mapping[int, Measured | Answer], total: int) -> Seeded:
    """The record of the round that follows the worker's, from what its clients measured; total: rounds of the run."""
    spread = worker.spread if settings.normalise else None
    round_ = worker.round + 1
    rate = schedules.learning_rate(settings, round_, total)
    record = merge(round_, rate, settings.queries, measured, settings.estimator, spread)
    norm = estimate_norm(record, sum(parameter.numel() for parameter in worker.parameters.values()))
    if not 0.0 < settings.clip_norm < norm:
        return record
    return replace(record, divisor=record.divisor * (norm / settings.clip_norm))


def estimate_norm(record: Seeded, parameters: int) -> float:
    """Euclidean norm of a seeded record's gradient estimate, its directions taken as orthogonal, as they nearly are."""
    squares = sum(value * value for value in record.coefficients)
    return math.ldexp(math.sqrt(squares * parameters) / record.divisor, record.exponent)


def plan_for(
    settings: Settings, worker: Worker, after: bytes, missing: Sequence[Entry], *, client: int, attempt: int = 0
) -> Plan:
    """The plan of the round that follows the worker's, for a client at chain `after` that lacks `missing`."""
    return Plan(
        genesis=journal.genesis_chain(worker.genesis),
        round=worker.round + 1,
        attempt=attempt,
        after=after,
        head=worker.head,
        entries=b"".join(entry.raw for entry in missing),
        probe=worker.probe(),
        client=client,
        queries=settings.queries,
        epsilon=settings.epsilon,
        batch_size=settings.batch_size,
        points=settings.estimator,
        threads=settings.threads,
        copies_per_pass=settings.copies_per_pass,
        forward_dtype=settings.forward_dtype,
        examples_per_query=examples_per_query(settings),
        objective=settings.objective,
    )


def examples_per_query(settings: Settings) -> int:
    """Examples that each query has of its own; 0: all share one batch."""
    return (settings.zo_query_batch_size or settings.batch_size) if settings.zo_data == "per-query" else 0


def examples_seen(settings: Settings) -> int:
    """Examples that one step of a client reads."""
    return examples_per_query(settings) * settings.queries or settings.batch_size


def position(entries: Sequence[Entry], genesis: bytes, head: bytes) -> int | None:
    """How many of the entries a replica with this head holds; None when it follows another history."""
    if head == genesis:
        return 0
    return next((index + 1 for index, entry in enumerate(entries) if entry.chain == head), None)


def catch_up(worker: Worker, after: bytes, head: bytes, raw: bytes) -> bool:
    """Replay the entries that lead the worker to `head`; False when they do not reach it from where it is.

    The worker may stand anywhere between `after` and `head`. Nothing is applied unless the way is whole.
    """
    if worker.head == head:
        return True
    try:
        entries = list(journal.parse_entries(raw, after))
    except ValueError:
        return False
    if any(update_digest(entry.record) is not None for entry in entries):
        return False  # a step by backpropagation does not replay
    start = position(entries, after, worker.head)
    if start is None or not entries or entries[-1].chain != head:
        return False
    worker.replay(entries[start:])
    return True


def check(answer: Answer, plan: Plan) -> Reason | None:
    """Why this answer cannot be used, or None. Types are sound already: `messages` refuses others as malformed."""
    if answer.genesis != plan.genesis:
        return "wrong_genesis"
    if answer.round != plan.round:
        return "wrong_round"
    if answer.attempt != plan.attempt:
        return "stale_attempt"
    if answer.client != plan.client:
        return "wrong_client"
    if answer.head != plan.head:
        return "behind"
    if answer.probe != plan.probe:
        return "desync"
    if not answer.coefficients and math.isnan(answer.loss):
        return "not_finite"  # the client's own word: it met a loss that is not finite
    if len(answer.coefficients) != plan.queries:
        return "wrong_length"
    if not math.isfinite(answer.loss):
        return "not_finite"
    if not records.SMALLEST_EXPONENT <= answer.exponent <= records.LARGEST_EXPONENT or answer.examples < 1:
        return "out_of_range"
    largest = max(map(abs, answer.coefficients))
    steepest = math.ldexp(largest, answer.exponent) * plan.epsilon  # a difference of losses no larger than the losses
    if largest >= 2**records.COEFFICIENT_BITS or abs(answer.loss) > LARGEST_LOSS or steepest > LARGEST_LOSS:
        return "out_of_range"
    return None
