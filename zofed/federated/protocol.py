"""A federated round as plain functions: what a plan asks, what an answer says, whether to believe it.

The server plans a round and sends the plan with the journal entries a client lacks; the client catches up by replaying
them, does its part (`measurements`) and answers; the server checks every answer against a closed list of reasons and
merges the good ones into records (`step_records`). Nothing here knows Flower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import gradient_codec, journal, records, sanitize
from zofed.core.journal import Entry
from zofed.core.measure import Update
from zofed.core.replica import Replica

# What a plan asks for: slopes along seeded directions; slopes along directions that the plan's guide shapes; trained
# coefficients of the round's subspace; a gradient for a guide; an update after local training; nothing but to be there;
# the same once the run is over.
Task = Literal["slopes", "guided", "coefficients", "gradient", "update", "none", "end"]

# Why a reply was not used. `late`, `error`, `malformed` and `duplicate` are told by the server's loop, `implausible`
# once all are there, the others by `check` or `check_update`.
Reason = Literal[
    "error", "late", "malformed", "duplicate", "wrong_genesis", "wrong_round", "stale_attempt", "wrong_client",
    "behind", "desync", "not_finite", "wrong_length", "out_of_range", "implausible", "wrong_tensors", "too_large",
]  # fmt: skip

LARGEST_LOSS = sanitize.LARGEST_LOSS
LARGEST_NORM = 2.0**50  # of an update or a gradient: beyond, its squares and sums would leave float32
NAME_BYTES = 4
UPDATES_SENT = 4  # encoded updates that a plan brings at most, for clients that missed a round or two
NO_LOSS = 0.0  # what a client reports that withholds its losses


@dataclass(frozen=True, slots=True)
class Plan:
    """What the server asks of one client in one exchange; how it is to be done, the run's settings say to both.

    round: the first round asked for, the one after the head's. steps: rounds asked for in this exchange.
    genesis: the first bytes of its chain, enough to tell runs apart. after: 16-byte chain; `entries` are the records
    that lead from there to the head, where sound weights have `probe`. The head itself is not sent: it follows.
    Seeds derive from (run seed in the genesis, round, client's index, local step, query); `attempt` only marks late
    replies and enters no seed, so a round asked again asks the same.
    updates: what records that are no function of seeds need, encoded; guide: what shapes the directions asked for.
    snapshot: weights and state to start from in place of the base, or empty. rebuild: 1 where the client's weights were
    found wrong, and nothing it holds may be kept. classes: of the run's classification, which a node's own documents
    need not show; 0 for a language model. names: theirs, as `Classes.packed` has them; empty where they are numbers.
    """

    genesis: bytes
    round: int
    attempt: int
    task: str
    steps: int
    client: int
    after: bytes
    entries: bytes
    probe: bytes
    rebuild: int = 0
    updates: bytes = b""
    guide: bytes = b""
    snapshot: bytes = b""
    classes: int = 0
    names: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """What every reply to a plan says, and what tells whether to believe the rest.

    probe: of the replica it was found on. head: empty where it followed the plan's records to their end, else its own,
    so that the server can send what it lacks. problem: a reason of the client's own why there is nothing to use.
    examples: how many the client holds.
    """

    genesis: bytes
    round: int
    attempt: int
    client: int
    head: bytes
    probe: bytes
    problem: str
    loss: float
    examples: int
    milliseconds: int


@dataclass(frozen=True, slots=True)
class Answer(Reply):
    """Slopes or coefficients: integers with one exponent."""

    coefficients: tuple[int, ...]
    exponent: int


@dataclass(frozen=True, slots=True)
class Contribution(Reply):
    """What a client that backpropagates sends where no coefficients tell it: its gradient or update, encoded."""

    update: bytes


def plan_for(
    replica: Replica,
    after: bytes,
    missing: Sequence[Entry],
    *,
    client: int,
    attempt: int = 0,
    task: Task = "slopes",
    steps: int = 1,
    guide: bytes = b"",
    probe: bytes = b"",
) -> Plan:
    """The plan of the rounds that follow the replica's, for a client at chain `after` that lacks `missing`.

    probe: the replica's, where it is known already.
    """
    return Plan(
        genesis=name_of(replica),
        round=replica.round + 1,
        attempt=attempt,
        task=task,
        steps=steps,
        client=client,
        after=after,
        entries=journal.bodies(missing),
        probe=probe or replica.probe(),
        guide=guide,
    )


def name_of(replica: Replica) -> bytes:
    """What messages call the run of a replica."""
    return replica.origin[:NAME_BYTES]


def asked_each_round(settings: Settings, count: int) -> int:
    """How many of `count` clients a round asks."""
    if settings.only_client >= 0:
        return 1
    wanted = settings.participation
    return min(count, round(wanted) if wanted > 1 else max(1, round(wanted * count)))


def integers_asked(settings: Settings, task: str, steps: int) -> int:
    """How many integers the answer to a plan of this task (a `Task`) and of so many rounds holds."""
    if task == "coefficients":
        return settings.subspace_size
    return settings.queries * (settings.local_steps * steps if task == "slopes" else 1)


def check(answer: Answer, plan: Plan, count: int, epsilon: float) -> Reason | None:
    """Why this answer cannot be used, or None. Types are sound already: `wire` refuses others as malformed.

    count: integers asked for. epsilon: of the finite difference; no slope can exceed the largest loss over it.
    """
    if reason := _check_head(answer, plan):
        return reason
    if len(answer.coefficients) != count:
        return "wrong_length"
    if not math.isfinite(answer.loss):
        return "not_finite"
    if not records.SMALLEST_EXPONENT <= answer.exponent <= records.LARGEST_EXPONENT:
        return "out_of_range"
    largest = max(map(abs, answer.coefficients))
    if largest >= 2**records.COEFFICIENT_BITS or abs(answer.loss) > LARGEST_LOSS:
        return "out_of_range"
    steepest = math.ldexp(largest, answer.exponent) * epsilon  # a difference of losses no larger than the losses
    return "out_of_range" if steepest > LARGEST_LOSS else None


def check_update(
    contribution: Contribution, plan: Plan, replica: Replica, largest_norm: float
) -> tuple[Update | None, Reason | None]:
    """The update of a contribution, or why it cannot be used. largest_norm: Euclidean; 0: any."""
    if reason := _check_head(contribution, plan):
        return None, reason
    if not math.isfinite(contribution.loss):
        return None, "not_finite"
    if abs(contribution.loss) > LARGEST_LOSS:
        return None, "out_of_range"
    try:
        update = gradient_codec.decoded(contribution.update, replica.shapes)
    except ValueError:
        return None, "wrong_tensors"
    norm = gradient_codec.norm(update)
    if not math.isfinite(norm):
        return None, "not_finite"
    if 0.0 < largest_norm < norm:
        return None, "too_large"
    return (None, "out_of_range") if norm > LARGEST_NORM else (update, None)


def _check_head(answer: Reply, plan: Plan) -> Reason | None:
    """Whether an answer belongs to the plan and to sound weights."""
    if answer.genesis != plan.genesis:
        return "wrong_genesis"
    if answer.round != plan.round:
        return "wrong_round"
    if answer.attempt != plan.attempt:
        return "stale_attempt"
    if answer.client != plan.client:
        return "wrong_client"
    if answer.head:
        return "behind"
    if answer.probe != plan.probe:
        return "desync"
    if answer.problem:
        return "not_finite" if answer.problem == "not_finite" else "malformed"  # the rest is for the server to find
    return None if 1 <= answer.examples <= sanitize.LARGEST_COUNT else "out_of_range"


def check_settings(settings: Settings) -> None:
    """Raise UserError for settings that a federation cannot run with."""
    if settings.devices:
        raise UserError(
            f"devices = {settings.devices!r} does not split a federated run, whose clients compute on a device each: "
            "set device, or use zofed train"
        )
    if ":" in settings.objective:
        raise UserError(
            f"objective = {settings.objective!r} would have clients run code the server names: a federation takes "
            "loss, accuracy or f1"
        )
    if settings.mode == "instruct" and settings.instruct_kind in ("guide-only", "line"):
        raise UserError(
            f"instruct-kind = {settings.instruct_kind!r} does not run in a federation: take hybrid, hybrid-rank1 or "
            "cosine, or use zofed train"
        )
    if (
        settings.aggregation != "mean"
        and settings.direction_seeds == "distinct"
        and settings.mode in ("zo", "calibrate", "instruct")
    ):
        raise UserError(
            f"aggregation = {settings.aggregation!r} compares clients along the same directions: set direction-seeds "
            "to shared, or aggregation to mean"
        )
    if settings.direction_seeds == "shared" and settings.mode == "instruct":
        raise UserError(
            "direction-seeds = 'shared' does not run with mode = 'instruct': set direction-seeds to distinct"
        )
    if settings.steps_per_message > 1 and settings.mode != "zo":
        raise UserError(f"steps-per-message = {settings.steps_per_message} takes mode = zo, not {settings.mode}: set 1")
