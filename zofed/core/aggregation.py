"""Many clients' slopes into one: exact sums of integers, rounded once, whatever the order of arrival."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from zofed.core import records
from zofed.core.aggregation_rules import RULES
from zofed.core.estimators import Estimate, Points, degrees_of_freedom
from zofed.core.kinds import AggregationName
from zofed.core.records import Seeded, Spread

IMPLAUSIBLE = 1000.0  # times the limit of clipping: such a slope is no outlier but a fault, and its sender is left out
VANISHING = 2.0**-40  # times the common size: no difference of float32 losses is so far below the others', so likewise


class Integers(Protocol):
    """Slopes as integers worth 2^exponent each, of a client or of a record."""

    @property
    def coefficients(self) -> tuple[int, ...]: ...
    @property
    def exponent(self) -> int: ...


class Slopes(Integers, Protocol):
    """Those of one client, with the number of examples they were measured on."""

    @property
    def examples(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Measured:
    """Slopes of one client in one exchange, as integers, with the mean loss and the forward passes spent.

    sequences: examples that these passes ran, all together. examples: how many the client holds.
    """

    coefficients: tuple[int, ...]
    exponent: int
    loss: float
    forward_passes: int
    sequences: int = 0
    examples: int = 1

    @classmethod
    def of(cls, estimate: Estimate) -> "Measured":
        """The estimate with its slopes as integers. Raises ValueError when one is not finite."""
        coefficients, exponent = records.to_integers(estimate.slopes)
        return cls(coefficients, exponent, estimate.loss, estimate.forward_passes)


@dataclass(frozen=True, slots=True)
class Merged:
    """Coefficients worth 2^exponent each. clients: whose directions they belong to, `queries` for each in turn."""

    clients: tuple[int, ...]
    coefficients: tuple[int, ...]
    exponent: int


def size(slopes: Integers) -> float:
    """Root mean square of slopes, in the unit of the loss; 0 where there are none."""
    total = sum(value * value for value in slopes.coefficients)
    return math.ldexp(math.sqrt(total / max(1, len(slopes.coefficients))), slopes.exponent)


def implausible(found: Mapping[int, Slopes], limit: float, usual: float = 1.0) -> list[int]:
    """Clients with slopes that are none beside the others', by client index; limit 0: none.

    Left out is who has a slope of more than 1000 * limit times the common size, or slopes that are all less than 2^-40
    of it; zeros alone are no fault. usual: as for `common_size`.
    """
    common = common_size(found, usual) if limit else 0.0
    largest, smallest = IMPLAUSIBLE * limit * common, VANISHING * common
    sizes = {client: _largest(slopes) for client, slopes in sorted(found.items())}
    return [client for client, size in sizes.items() if common and (size > largest or 0.0 < size < smallest)]


def common_size(found: Mapping[int, Slopes], usual: float = 1.0) -> float:
    """The median over the clients of the root mean square of their slopes; of the two middle ones of an even number,
    the one nearer to `usual`, as a ratio. Clients whose slopes are all zero do not count; 0 where nobody else is.

    usual: size of the run's slopes so far, 1 before there are any.

    While fewer than half of those that count lie, this lies between the smallest and the largest size of the others,
    whatever the liars send. At exactly half, where sizes alone cannot tell which half lies, it is no further from the
    usual size, as a ratio, than the furthest of the others is.
    """
    sizes = sorted(one for slopes in found.values() if (one := size(slopes)))
    if not sizes:
        return 0.0
    middle = statistics.median_low(sizes), statistics.median_high(sizes)
    return min(middle, key=lambda one: abs(math.log2(one) - math.log2(usual)))


def _largest(slopes: Slopes) -> float:
    return math.ldexp(max(map(abs, slopes.coefficients), default=0), slopes.exponent)


def merged(
    found: Mapping[int, Slopes],
    *,
    shared: bool,
    rule: AggregationName = "mean",
    trim: float = 0.2,
    limit: float = 0.0,
    largest_weight: int = 0,
    bits: int = records.COEFFICIENT_BITS,
    usual: float = 1.0,
) -> Merged:
    """One set of slopes from those of all clients, by client index.

    shared: all clients measured the same directions, and the rule makes one coefficient of theirs; else each keeps
    its own directions, and the rule can only be the mean.
    limit: of several clients, slopes beyond so many times the common size are brought back to it; 0: none.
    largest_weight: clients count by their examples, up to so many; 0: all alike. bits: of the largest coefficient.
    usual: as for `common_size`, whose bounds are those of the merged slopes: with shared directions none exceeds limit
    times the common size, with distinct ones none exceeds that times its client's weight over the mean weight.
    """
    clients = tuple(sorted(found))
    exponents = [found[client].exponent for client in clients if any(found[client].coefficients)]
    if not exponents:  # all zero, from whatever exponent
        count = len(found[clients[0]].coefficients) * (1 if shared else len(clients))
        return Merged((0,) if shared else clients, (0,) * count, records.SMALLEST_EXPONENT)
    finest = min(exponents)
    rows = [_at(found[client], finest) for client in clients]
    if limit and len(rows) > 1:
        bound = math.ceil(math.ldexp(limit * common_size(found, usual), -finest))
        rows = [[max(-bound, min(bound, value)) for value in row] for row in rows]
    weights = [max(1, min(found[client].examples, largest_weight)) for client in clients] if largest_weight else []
    if not shared:
        # Each client's directions enter the sum as often as its weight says, one on average.
        own = weights or [1] * len(clients)
        total, count = (sum(own), len(own)) if weights else (1, 1)
        values = [value * weight * count for row, weight in zip(rows, own, strict=True) for value in row]
        return Merged(clients, *rounded(values, total, finest, bits))
    own, chosen = weights or [1] * len(rows), RULES[rule]
    values = [chosen.integers(column, own, trim) for column in zip(*rows, strict=True)]
    return Merged((0,), *rounded(values, chosen.divisor(own, trim), finest, bits))


def _at(slopes: Slopes, exponent: int) -> list[int]:
    """The integers at a finer exponent, exactly; Python's have no limit. Zeros may come from any."""
    shift = slopes.exponent - exponent
    return [value << shift if value else 0 for value in slopes.coefficients]


def rounded(
    values: Sequence[int], divisor: int, exponent: int, bits: int = records.COEFFICIENT_BITS
) -> tuple[tuple[int, ...], int]:
    """values / divisor * 2^exponent as integers below 2^bits in size with one exponent, to nearest, ties upwards.

    Kept as they are where they fit; else the largest fills the bits.
    """
    largest = max(map(abs, values))
    if not largest:
        return tuple(values), records.SMALLEST_EXPONENT
    limit = 2**bits
    shift = largest.bit_length() - divisor.bit_length() - bits
    if divisor == 1:
        shift = max(shift, 0)
    shift = max(shift, records.SMALLEST_EXPONENT - exponent)
    while True:
        scaled = rounded_quotients(values, divisor, shift)
        if max(map(abs, scaled)) < limit:
            return scaled, exponent + shift
        shift += 1


def rounded_quotients(values: Sequence[int], divisor: int, shift: int) -> tuple[int, ...]:
    """values / (divisor * 2^shift), to nearest, ties upwards."""
    below = divisor << (shift + 1) if shift >= 0 else 2 * divisor
    above = 2 if shift >= 0 else 2 << -shift
    return tuple((value * above + below // 2) // below for value in values)


def seeded(
    round_: int,
    rate: float,
    merged: Merged,
    queries: int,
    points: Points,
    spread: Spread | None = None,
    local_steps: int = 1,
) -> Seeded:
    """The record of merged slopes: the mean over all directions of each local step, which are summed.

    spread: that of the records before, for a step that is divided by it.
    """
    divisor = float(len(merged.clients) * degrees_of_freedom(points, queries))
    if spread is not None:
        divisor *= spread.after(merged.coefficients, merged.exponent).value
    return Seeded(round_, rate, merged.clients, queries, merged.coefficients, merged.exponent, divisor, local_steps)
