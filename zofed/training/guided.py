"""From a backprop gradient to directions, and from slopes along them to a record.

A guide g is a backprop gradient on a grid of its own. A guided direction is v = g_S + sigma n: g_S holds the guide's
largest coordinates, n is noise of a seeded kind. Its slope needs forward passes only, on data that may be other and far
more than backpropagation's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zofed.core import directions, kinds, perturbed
from zofed.core.digests import tensors_digest
from zofed.core.estimators import (
    FiniteDifference,
    Parameters,
    bound_loss,
    degrees_of_freedom,
    materialised_losses,
    scalar,
    weights_restored,
)
from zofed.core.measure import Update
from zofed.core.perturbation_mode import in_pieces
from zofed.core.perturbed import Loss
from zofed.core.records import Guided, Seeded, estimate_norm, to_integers
from zofed.core.replica import Replica
from zofed.training.guides import BLOCK, Guidance, Shape, guidance


@dataclass(frozen=True, slots=True)
class Slopes:
    """Slopes along guided directions, the mean loss of the passes that found them, and their number."""

    values: tuple[float, ...]
    loss: float
    forward_passes: int


@dataclass(frozen=True, slots=True)
class Found:
    """A record with what measuring it took: the mean loss of the passes (NaN without any) and their number."""

    record: Guided
    loss: float
    forward_passes: int


def guided(
    replica: Replica,
    loss: Loss,
    guide: Update,
    shape: Shape,
    seeds: Sequence[int],
    *,
    round_: int,
    rate: float,
    examples: Any = None,
) -> tuple[Found, Guidance]:
    """One guided step: slopes of `loss` along the guide's directions, weighed into a record.

    examples: one batch for every seed, handed to `loss`; None: all share the batch that `loss` holds. The replica's
    weights are afterwards what they were. Raises ValueError when a loss is not finite.
    """
    own = guidance(guide, shape)
    if shape.kind == "guide-only":
        found = Found(_record(own, round_, rate, (), 1.0, kept_weight=1.0, blend=shape.blend), math.nan, 0)
    elif shape.kind == "line":
        found = _line(replica, loss, own, shape, seeds, round_, rate, examples)
    else:
        measured = slopes(replica, loss, own, shape, seeds, examples)
        integers = {0: to_integers(measured.values)}
        record = weighed(replica, own, shape, integers, round_=round_, rate=rate)
        found = Found(record, measured.loss, measured.forward_passes)
    return found, own


def slopes(
    replica: Replica, loss: Loss, own: Guidance, shape: Shape, seeds: Sequence[int], batch: Any = None
) -> Slopes:
    """Slopes along v_i = g_S + sigma n_i by central differences of Euclidean length `step`, for the kinds with noise.

    batch: as `examples` of `guided`. The weights are afterwards what they were.
    """
    replica.measure.check(loss, batch)
    step = shape.step / math.sqrt(own.direction_square)
    if own.masked:
        found = _masked_losses(replica, loss, own, seeds, (step, -step), batch)
    else:

        def run(batched: bool) -> Tensor:
            copies = shape.perturbations_per_pass if batched else None
            return torch.cat([_side(replica, loss, own, seeds, end, batch, copies) for end in (step, -step)], 1)

        found = replica.measure.batched_or_not(run, loss, batch)
    values: list[list[float]] = found.to(torch.float64).tolist()
    return Slopes(
        tuple((plus - minus) / (2 * step) for plus, minus in values),
        math.fsum(map(math.fsum, values)) / (2 * len(seeds)),
        2 * len(seeds),
    )


def weighed(
    replica: Replica,
    own: Guidance,
    shape: Shape,
    found: Mapping[int, tuple[Sequence[int], int]],
    *,
    round_: int,
    rate: float,
) -> Guided:
    """The record of slopes along directions that one guide shaped: (integers, exponent) by client index.

    All directions count alike, whoever measured them. Raises ValueError for slopes that make no finite step.
    """
    clients = tuple(sorted(found))
    values = [math.ldexp(value, found[client][1]) for client in clients for value in found[client][0]]
    mean = math.fsum(values) / len(values)
    if shape.weighting == "unbiased":
        values = [value - mean for value in values]
        kept_weight, divisor = mean / own.kept_square, own.noise * degrees_of_freedom("one-sided", len(values))
    else:
        square = own.direction_square if shape.weighting == "projected" else 1.0
        kept_weight, divisor = mean / square, len(values) * square / own.noise
    masked = own.masked or (shape.weighting == "unbiased" and shape.kind != "cosine")
    record = _record(
        own, round_, rate, values, divisor, kept_weight=kept_weight, blend=shape.blend, masked=masked, clients=clients
    )
    if shape.weighting == "unbiased" and shape.kind == "cosine":
        record = _without_overlap(replica, record, own)
    return record


def clipped(record: Guided, own: Guidance, limit: float) -> Guided:
    """The record with a norm of at most `limit` (0: any); noise counts as orthogonal to the guide, as it nearly is."""
    parameters = own.size - own.kept_count if record.masked else own.size
    noise = estimate_norm(record.seeded, parameters)
    kept, spared = (record.kept + record.whole) ** 2 * own.kept_square, own.square - own.kept_square
    norm = math.sqrt(kept + record.whole**2 * spared + noise**2)
    if not 0.0 < limit < norm:
        return record
    share = limit / norm
    seeded = replace(record.seeded, divisor=record.seeded.divisor / share)
    return replace(record, seeded=seeded, kept=record.kept * share, whole=record.whole * share)


def _line(
    replica: Replica,
    loss: Loss,
    own: Guidance,
    shape: Shape,
    seeds: Sequence[int],
    round_: int,
    rate: float,
    batch: Any,
) -> Found:
    """The arm `line`: the slope along the guide's kept part alone, and plain two-point queries beside it."""
    replica.measure.check(loss, batch)
    step = shape.step / math.sqrt(own.kept_square)
    call = bound_loss(loss, batch, 0)
    ends = []
    with torch.no_grad(), weights_restored(replica.parameters) as saved, in_pieces():
        for length in (step, -step):
            _write(replica.parameters, saved, own, length)
            ends.append(float(scalar(call())))
    slope = (ends[0] - ends[1]) / (2 * step)
    how = FiniteDifference(
        replica.kind, shape.epsilon, "two-point", shape.perturbations_per_pass
    )  # as long as the record's
    plain = replica.measure.batched_or_not(
        lambda batched: how.slopes(loss, replica.parameters, seeds, batch, batched=batched), loss, batch
    )
    weight = slope / own.kept_square
    record = _record(own, round_, rate, plain.slopes, len(seeds), kept_weight=weight, blend=shape.blend)
    return Found(record, plain.loss, plain.forward_passes + 2)


def _record(
    own: Guidance,
    round_: int,
    rate: float,
    slopes: Sequence[float],
    divisor: float,
    *,
    kept_weight: float,
    blend: bool,
    masked: bool = False,
    clients: tuple[int, ...] = (0,),
) -> Guided:
    coefficients, exponent = to_integers(slopes)
    share = 0.5 if blend else 1.0
    seeded = Seeded(round_, rate, clients, len(slopes) // len(clients), coefficients, exponent, divisor / share)
    digest = own.digest or bytes.fromhex(tensors_digest(own.guide))
    if not math.isfinite(kept_weight):
        raise ValueError(f"the slope along the guide is {kept_weight}")
    return Guided(seeded, digest, own.threshold, share * kept_weight, 0.5 if blend else 0.0, masked)


@contextmanager
def _guide_written(replica: Replica, own: Guidance, length: float) -> Iterator[None]:
    """While active, the weights are shifted by length * g_S."""
    with weights_restored(replica.parameters) as saved:
        _write(replica.parameters, saved, own, length)
        yield


def _write(parameters: Parameters, saved: Parameters, own: Guidance, length: float) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            tensors = (own.guide[name].to(parameter.device), saved[name], parameter.detach())
            rows = max(1, BLOCK // max(1, math.prod(parameter.shape[1:])))
            pieces = ((tensor if tensor.dim() else tensor.view(1)).split(rows) for tensor in tensors)
            for guide, before, now in zip(*pieces, strict=True):
                torch.add(before, (guide * (guide.abs() >= own.threshold)).mul_(length), out=now)


def _side(
    replica: Replica, loss: Loss, own: Guidance, seeds: Sequence[int], step: float, batch: Any, copies: int | None
) -> Tensor:
    """Losses at w + step * (g_S + sigma n_i), float (seeds, 1): the guide written once, the noise batched.

    copies: perturbed copies in one pass; None: one after the other, in the weights.
    """
    common, noise = (loss, replica.parameters, replica.kind, seeds), (step * own.noise,)
    with _guide_written(replica, own, step):
        if copies:
            return perturbed.losses(*common, noise, copies, examples=batch)
        return materialised_losses(*common, noise, examples=batch)


@torch.no_grad()
def _masked_losses(
    replica: Replica, loss: Loss, own: Guidance, seeds: Sequence[int], steps: Sequence[float], batch: Any
) -> Tensor:
    """Losses at w + step * (g_S + sigma n_i), n_i zero where the guide is kept: float (seeds, steps)."""
    rows = []
    unit = kinds.unit(replica.kind) * own.noise
    with weights_restored(replica.parameters) as saved, in_pieces():
        for query, seed in enumerate(seeds):
            call = bound_loss(loss, batch, query)
            rows.append([])
            for step in steps:
                for name, parameter in replica.parameters.items():
                    guide = own.guide[name].to(parameter.device)
                    drawn = directions.direction(replica.kind, seed, name, tuple(parameter.shape)).to(parameter)
                    shift = torch.where(guide.abs() >= own.threshold, guide, drawn.mul_(unit))
                    torch.add(saved[name], shift.mul_(step), out=parameter)
                rows[-1].append(scalar(call()))
    return torch.stack([torch.stack(row) for row in rows])


def _without_overlap(replica: Replica, record: Guided, own: Guidance) -> Guided:
    """The record less the projection of its noise on the guide, which the slope along the guide tells already."""
    part = record.seeded
    scale = math.ldexp(kinds.unit(replica.kind) / part.divisor, part.exponent)
    seeds = part.seeds(replica.genesis["seed"])
    overlap = math.fsum(
        float((directions.weighted_sum(replica.kind, seeds, part.coefficients, name, guide.shape) * guide.cpu()).sum())
        for name, guide in own.guide.items()
    )
    kept_weight = record.kept - overlap * scale / own.square
    return Guided(part, record.guide, record.threshold, kept_weight, record.whole, record.masked)
