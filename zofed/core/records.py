"""What a step decided: the log line, the checkpoint's increment and the message, in one."""

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from zofed.core import directions, rice, varint

# Beyond, the square of a slope, or what a coefficient is worth in a step, would leave float64's normal numbers.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -450, 100
LARGEST_WORTH = 100  # 2^exponent / divisor stays below 2 to this
SPREAD_DECAY = 0.9
# |coefficient| < 2^18, an error of 2^-19 of the largest slope, far below that of finite differences: sums of 64 are
# exact in float32, and of 2^16 gaussian ones (19 bits an entry) in float64.
COEFFICIENT_BITS = 18
CLIENTS = 2**32  # a client's index is below this
LARGEST_RECORD = 2**24  # coefficients: of one bit each, what is read takes 100 times the memory of its bytes


@dataclass(frozen=True, slots=True)
class Seeded:
    """One zeroth-order step: gradient estimate = 2^exponent / divisor * sum of coefficient * direction.

    divisor: how many queries the sum is a mean of, times the spread of the slopes for a normalised step.

    The directions' seeds are not stored but derived from (run seed, round, client, local step, query), in that order,
    for every client listed. `coefficients` holds clients x local_steps x queries integers below 2^18 in size.
    """

    kind: ClassVar[int] = 5
    round: int
    rate: float  # learning rate of this step, float64
    clients: tuple[int, ...]
    queries: int
    coefficients: tuple[int, ...]
    exponent: int
    divisor: float
    local_steps: int = 1
    privacy_spent: float = math.nan  # reserved: epsilon spent so far, NaN where no privacy is promised

    def seeds(self, run_seed: int) -> list[int]:
        """64-bit seed of each coefficient's direction."""
        return [
            seed
            for client in self.clients
            for seed in directions.direction_seeds(run_seed, self.round, client, self.queries, self.local_steps)
        ]


def estimate_norm(record: Seeded, parameters: int) -> float:
    """Euclidean norm of a seeded record's gradient estimate, its directions taken as orthogonal, as they nearly are."""
    squares = sum(value * value for value in record.coefficients)
    return math.ldexp(math.sqrt(squares * parameters) / record.divisor, record.exponent)


@dataclass(frozen=True, slots=True)
class Spread:
    """Running root mean square of the slopes, rebuilt by replay: what a normalised step is divided by.

    An exponential mean of each record's mean square, its present one included, corrected for its start at zero. A
    single step's spread would be too noisy a divisor for few queries. After Zhang et al., "FZOO: fast zeroth-order
    optimizer", 2025, which divides by the spread of the present step.
    """

    mean_square: float = 0.0
    weight: float = 0.0

    def after(self, coefficients: Sequence[int], exponent: int) -> "Spread":
        """The spread once slopes coefficient * 2^exponent were measured; sums of integers, so the same everywhere."""
        square = math.ldexp(sum(value * value for value in coefficients) / len(coefficients), 2 * exponent)
        kept, new = SPREAD_DECAY, 1.0 - SPREAD_DECAY
        return Spread(kept * self.mean_square + new * square, kept * self.weight + new)

    @property
    def value(self) -> float:
        """The spread, 1 where there is none yet or every slope is zero."""
        return math.sqrt(self.mean_square / self.weight) if self.mean_square > 0.0 else 1.0


@dataclass(frozen=True, slots=True)
class Dense:
    """One first-order step: its update is no function of seeds. `update` is the SHA-256 of the file that keeps it
    beside the journal, or 32 zero bytes where none is kept."""

    kind: ClassVar[int] = 2
    round: int
    rate: float
    update: bytes = bytes(32)


@dataclass(frozen=True, slots=True)
class Guided:
    """One step along directions that a backprop gradient shaped: gradient estimate = kept * guide where its entries
    are at least `threshold` in size + whole * guide + the estimate of `seeded`.

    guide: SHA-256 of the guide's tensors, kept in a file beside the journal or else found again by backprop. masked:
    the seeded part counts only where the guide's entries are below the threshold.
    """

    kind: ClassVar[int] = 4
    seeded: Seeded
    guide: bytes
    threshold: float
    kept: float
    whole: float
    masked: bool

    @property
    def round(self) -> int:
        return self.seeded.round

    @property
    def rate(self) -> float:
        return self.seeded.rate


@dataclass(frozen=True, slots=True)
class Skipped:
    """A round that moved nothing: too few usable replies."""

    kind: ClassVar[int] = 3
    round: int


Record = Seeded | Dense | Skipped | Guided
Unpacked = Callable[[bytes, int, int], tuple[tuple[int, ...], int]]  # integers from an offset on, and that behind them
WITH_VARINTS = 1  # the kind of a seeded record before kind 5: its coefficients are varints; read, no longer written
KINDS = frozenset((WITH_VARINTS, *(kind.kind for kind in (Seeded, Dense, Skipped, Guided))))

_SEEDED = struct.Struct("<dd?")  # rate, divisor, whether privacy is accounted for
_PRIVACY = struct.Struct("<d")
_DENSE = struct.Struct("<d32s")
_GUIDED = struct.Struct("<32sddd?")  # guide, threshold, kept, whole, masked


def encode(record: Record, kind: int | None = None) -> bytes:
    """The record's bytes: u8 kind, the round, then what its kind has; integers as `varint` has them.

    A seeded record: f64 rate and divisor, a byte that tells whether f64 privacy follows, then the integers exponent,
    local steps, queries, number of clients, their indices less the one before each, and the coefficients as `rice` has
    them, or as varints in a guided record. `decode` gives the record back. kind: the record's own, unless it is a
    seeded one that an earlier version wrote WITH_VARINTS.
    """
    kind = record.kind if kind is None else kind
    head = bytes([kind]) + varint.packed((record.round,))
    match record:
        case Seeded():
            return head + _encoded_seeded(record, varint.packed if kind == WITH_VARINTS else rice.packed)
        case Dense():
            return head + _DENSE.pack(record.rate, record.update)
        case Guided():
            fixed = _GUIDED.pack(record.guide, record.threshold, record.kept, record.whole, record.masked)
            return head + fixed + _encoded_seeded(record.seeded, varint.packed)
        case Skipped():
            return head


def _encoded_seeded(record: Seeded, packed: Callable[[Sequence[int]], bytes]) -> bytes:
    if len(record.coefficients) != len(record.clients) * record.local_steps * record.queries:
        raise ValueError(
            f"{len(record.coefficients)} coefficients for {len(record.clients)} clients x {record.local_steps} "
            f"local steps x {record.queries} queries"
        )
    _check_size(record.coefficients)
    has_privacy = not math.isnan(record.privacy_spent)
    steps = (client - before for before, client in zip((0, *record.clients), record.clients, strict=False))
    integers = (record.exponent, record.local_steps, record.queries, len(record.clients), *steps)
    privacy = _PRIVACY.pack(record.privacy_spent) if has_privacy else b""
    head = _SEEDED.pack(record.rate, record.divisor, has_privacy) + privacy + varint.packed(integers)
    return head + packed(record.coefficients)


def decode(body: bytes) -> Record:
    """The record whose `encode` is `body`, or was in an earlier version. Raises ValueError for any other bytes."""
    try:
        (round_,), at = varint.unpacked(body, 1, 1)
        kind, rest = body[0], body[at:]
        if kind in (Seeded.kind, WITH_VARINTS):
            record = _decode_seeded(round_, rest, rice.unpacked if kind == Seeded.kind else varint.unpacked)
        elif kind == Dense.kind:
            record = Dense(round_, *_DENSE.unpack(rest))
        elif kind == Guided.kind:
            record = _decode_guided(round_, rest)
        elif kind == Skipped.kind and not rest:
            record = Skipped(round_)
        else:
            raise ValueError(f"record kind {kind} of {len(body)} bytes is not known to this version")
    except struct.error as error:
        raise ValueError(f"record of {len(body)} bytes: {error}") from error
    if round_ < 0 or encode(record, kind) != body:
        raise ValueError(f"record of {len(body)} bytes: not as it is written")
    if not isinstance(record, Skipped) and not 0.0 <= record.rate < math.inf:
        raise ValueError(f"a record of the rate {record.rate}, which is not finite or below 0")
    if isinstance(record, Seeded) and not record.coefficients:
        raise ValueError("a seeded record without a coefficient")
    return record


def _decode_seeded(round_: int, rest: bytes, unpacked: Unpacked) -> Seeded:
    rate, divisor, has_privacy = _SEEDED.unpack_from(rest)
    at, privacy = _SEEDED.size, math.nan
    if has_privacy:
        (privacy,) = _PRIVACY.unpack_from(rest, at)
        at += _PRIVACY.size
    (exponent, local_steps, queries, count), at = varint.unpacked(rest, at, 4)
    if not SMALLEST_EXPONENT <= exponent <= LARGEST_EXPONENT or not (
        math.ldexp(1.0, exponent - LARGEST_WORTH) <= divisor < math.inf
    ):
        raise ValueError(f"a record with divisor {divisor} and exponent {exponent} moves nothing that is finite")
    if local_steps < 1 or queries < 0 or (not queries and local_steps > 1):
        raise ValueError(f"a record of {local_steps} local steps and {queries} queries")
    steps, at = varint.unpacked(rest, at, count)
    total = count * local_steps * queries
    if total > LARGEST_RECORD:
        raise ValueError(f"{total} integers where a record has {LARGEST_RECORD:,} coefficients at most")
    coefficients, at = unpacked(rest, at, total)
    if at != len(rest):
        raise ValueError(f"{len(rest) - at} bytes follow a record's last coefficient")
    _check_size(coefficients)
    clients = tuple(itertools.accumulate(steps))
    if any(not 0 <= client < CLIENTS for client in clients):
        raise ValueError(f"a record of the clients {clients[:3]}, of which one is not within 0 to {CLIENTS - 1}")
    return Seeded(round_, rate, clients, queries, coefficients, exponent, divisor, local_steps, privacy)


def _decode_guided(round_: int, rest: bytes) -> Guided:
    guide, threshold, kept, whole, masked = _GUIDED.unpack_from(rest)
    if not all(map(math.isfinite, (threshold, kept, whole))):
        raise ValueError(f"a guided record with the weights {kept} and {whole} moves nothing that is finite")
    return Guided(_decode_seeded(round_, rest[_GUIDED.size :], varint.unpacked), guide, threshold, kept, whole, masked)


def _check_size(coefficients: Sequence[int]) -> None:
    if coefficients and max(map(abs, coefficients)) > directions.LARGEST_COEFFICIENT:
        raise ValueError(f"a coefficient above {directions.LARGEST_COEFFICIENT} in size cannot be summed exactly")


def to_integers(slopes: Sequence[float], bits: int = COEFFICIENT_BITS) -> tuple[tuple[int, ...], int]:
    """Slopes as integers with one shared power-of-two exponent: slope ~ integer * 2^exponent.

    The largest slope fills the bits, 18 or fewer, so the rounding error is at most 2^-bits of it. Raises ValueError
    when a slope is not finite, or 2^118 or more.
    """
    if not all(abs(slope) < 2.0 ** (LARGEST_EXPONENT + COEFFICIENT_BITS) for slope in slopes):
        raise ValueError(f"slopes must be finite, got {[slope for slope in slopes if not abs(slope) < 1e30][:3]}")
    largest = max((abs(slope) for slope in slopes), default=0.0)
    exponent = max(math.frexp(largest)[1] - bits, SMALLEST_EXPONENT) if largest else SMALLEST_EXPONENT
    limit = 2**bits - 1
    return tuple(max(-limit, min(limit, round(math.ldexp(slope, -exponent)))) for slope in slopes), exponent
