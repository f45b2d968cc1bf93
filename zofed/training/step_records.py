"""What a step's measurements become: one record, by the settings. The same for one client and for many."""

from collections.abc import Mapping
from dataclasses import replace

from zofed.config import Settings
from zofed.core import aggregation, records
from zofed.core.aggregation import Measured, Slopes, seeded
from zofed.core.aggregation_rules import RULES
from zofed.core.measure import Update
from zofed.core.records import Seeded
from zofed.core.replica import Replica
from zofed.training import schedules


def record_of(settings: Settings, replica: Replica, found: Mapping[int, Slopes], total: int) -> Seeded:
    """The record of the round that follows the replica's, from what its clients measured; total: rounds of the run."""
    return records_of(settings, replica, found, total, 1)[0]


def records_of(
    settings: Settings, replica: Replica, found: Mapping[int, Slopes], total: int, steps: int
) -> list[Seeded]:
    """The records of the `steps` rounds that follow the replica's, from what its clients measured in one exchange."""
    made: list[Seeded] = []
    spread, parameters = replica.spread, sum(parameter.numel() for parameter in replica.parameters.values())
    each = settings.queries * settings.local_steps
    for step in range(steps):
        round_ = replica.round + 1 + step
        part = {client: _some(one, step * each, (step + 1) * each) for client, one in found.items()}
        record = seeded(
            round_,
            schedules.learning_rate(settings, round_, total),
            merged_slopes(settings, part, shared=settings.direction_seeds == "shared", usual=spread.value),
            settings.queries,
            settings.finite_difference,
            spread if settings.normalize_slopes else None,
            settings.local_steps,
        )
        spread = spread.after(record.coefficients, record.exponent)
        norm = records.estimate_norm(record, parameters)
        if 0.0 < settings.clip_norm < norm:
            record = replace(record, divisor=record.divisor * (norm / settings.clip_norm))
        made.append(record)
    return made


def _some(found: Slopes, start: int, stop: int) -> Slopes:
    """Some of a client's slopes."""
    return Measured(found.coefficients[start:stop], found.exponent, 0.0, 0, examples=found.examples)


def subspace_record(
    settings: Settings, round_: int, rate: float, found: Mapping[int, Slopes], usual: float = 1.0
) -> Seeded:
    """The record of coefficients that clients trained in the round's subspace, which they share.

    The weights move by the merged coefficients themselves: by rate / divisor times them, where both are equal. With
    server_momentum m the rounds' moves, each over its rate, are summed with weights m^age, and 1 - m of the sum is a
    round's move: their running mean (Hsu, Qi and Brown, arXiv:1909.06335, whose sum has no factor 1 - m). rate: of all
    inner steps together, by which the weight decay goes; at 0, where a cosine may end, the coefficients are 0. usual:
    size of the run's coefficients so far.
    """
    divisor = (rate or 1.0) / (1.0 - settings.server_momentum)
    merged = merged_slopes(settings, found, shared=True, usual=usual)
    return Seeded(round_, rate, (0,), settings.subspace_size, merged.coefficients, merged.exponent, divisor)


def merged_slopes(
    settings: Settings, found: Mapping[int, Slopes], *, shared: bool, usual: float = 1.0
) -> aggregation.Merged:
    """All clients' integers as one set, by the rules of the settings. usual: size of the run's slopes so far."""
    return aggregation.merged(
        found,
        shared=shared,
        rule=settings.aggregation if shared else "mean",
        trim=settings.trim,
        limit=settings.clip_slopes,
        largest_weight=settings.max_examples if settings.weighting == "examples" else 0,
        bits=settings.quantization_bits,
        usual=usual,
    )


def merged_updates(settings: Settings, found: Mapping[int, tuple[Update, int]]) -> Update:
    """One update from those of all clients: (update, examples it was found on) by client index.

    Float32 sums in the order of the clients' indices: the same bits on one machine, which is enough, for the update
    itself is journalled and sent.
    """
    updates = [found[client][0] for client in sorted(found)]
    cap = settings.max_examples if settings.weighting == "examples" else 1
    weights = [max(1, min(found[client][1], cap)) for client in sorted(found)]
    rule = RULES[settings.aggregation]
    return {name: rule.tensors([update[name] for update in updates], weights, settings.trim) for name in updates[0]}
