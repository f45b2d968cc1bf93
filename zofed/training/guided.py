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

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import directions, gradient_codec, perturbed
from zofed.core.digests import tensors_digest
from zofed.core.estimators import (
    FiniteDifference,
    Parameters,
    asked,
    degrees_of_freedom,
    materialised_losses,
    scalar,
    weights_restored,
)
from zofed.core.measure import Update
from zofed.core.perturbed import Loss
from zofed.core.records import Guided, Seeded, estimate_norm, to_integers
from zofed.core.replica import Replica

BLOCK = 2**18  # entries that are worked on together
ARMS = ("guide-only", "line")  # instruct kinds that tell what the noise adds to the guide


@dataclass(frozen=True, slots=True)
class Shape:
    """How a guide shapes directions and how slopes along them are weighed: the settings of the same names."""

    kind: str
    weighting: str
    blend: bool
    cosine_target: float
    noise_scale: float
    step: float
    epsilon: float
    perturbations_per_pass: int

    @classmethod
    def of(cls, settings: Settings) -> "Shape":
        return cls(
            settings.instruct_kind,
            settings.instruct_weighting,
            settings.instruct_blend,
            settings.instruct_cosine_target,
            settings.instruct_noise_scale,
            settings.instruct_step,
            settings.epsilon,
            settings.perturbations_per_pass,
        )


@dataclass(frozen=True, slots=True)
class Slopes:
    """Slopes along guided directions, the mean loss of the passes that found them, and their number."""

    values: tuple[float, ...]
    loss: float
    forward_passes: int


@dataclass(frozen=True, slots=True)
class Guidance:
    """A guide and what is kept of it.

    square, kept_square: |g|^2 and |g_S|^2. noise: standard deviation sigma of the noise in each coordinate that has
    some; noisy: how many have. masked: the noise spares the kept coordinates. digest: of the guide, empty where it is
    not known yet.
    """

    guide: Update
    threshold: float
    square: float
    kept_square: float
    size: int
    kept_count: int
    noise: float
    noisy: int
    masked: bool
    digest: bytes = b""

    @property
    def direction_square(self) -> float:
        """|v|^2, exact for entries of +-1 that spare the kept coordinates, else its mean."""
        return self.kept_square + self.noise**2 * self.noisy

    @property
    def facts(self) -> dict[str, float]:
        """Cosines with the guide of its kept part and of a whole direction, and the share of coordinates kept."""
        whole = math.sqrt(self.square)
        return {
            "cosine_kept": math.sqrt(self.kept_square) / whole,
            "cosine_direction": self.kept_square / (whole * math.sqrt(self.direction_square)),
            "share_kept": self.kept_count / self.size,
        }


@dataclass(frozen=True, slots=True)
class Found:
    """A record with what measuring it took: the mean loss of the passes (NaN without any) and their number."""

    record: Guided
    loss: float
    forward_passes: int


def on_grid(gradient: Mapping[str, Tensor]) -> Update:
    """The gradient as a guide: of each tensor 15-bit integers times a power of two, as float32.

    A float32 gradient is overwritten, so that no second one is held. Raises ValueError when an entry is not finite,
    UserError when all are zero.
    """
    guide: Update = {}
    for name, tensor in gradient.items():
        value = tensor.detach().to(torch.float32)
        try:
            exponent = gradient_codec.to_grid(value)
        except ValueError as error:
            raise ValueError(f"the gradient of {name}: {error}") from None
        guide[name] = value.mul_(2.0**exponent)
    if not any(bool(tensor.any()) for tensor in guide.values()):
        raise UserError(
            "the backprop gradient is zero everywhere and shapes no direction: set mode to zo, or scope wider"
        )
    return guide


def _pieces(guide: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """All entries, a block at a time: what is computed from them in float64 would be several guides large."""
    for tensor in guide.values():
        yield from tensor.flatten().split(BLOCK)


def threshold_of(guide: Mapping[str, Tensor], energy: float) -> float:
    """The largest t for which the coordinates of at least t in size hold a share `energy` of the guide's square sum.

    Those are the fewest coordinates that do, with all that tie. Bits of a float32, read as an integer, grow with its
    size: a histogram over their upper half finds the bin in which t lies, and only that bin is sorted.
    """
    sums = torch.zeros(2**15, dtype=torch.float64)
    for piece in _pieces(guide):
        size = piece.abs().cpu()
        sums += torch.bincount(size.view(torch.int32) >> 16, size.double().square_(), minlength=2**15)
    above = sums.flip(0).cumsum(0).flip(0)  # energy of each bin and all larger ones
    wanted = energy * float(above[0])
    last = int((above >= wanted).sum()) - 1
    sizes = (piece.abs().cpu() for piece in _pieces(guide))
    ordered = torch.cat([size[size.view(torch.int32) >> 16 == last] for size in sizes]).sort(descending=True).values
    reached = (float(above[last]) - float(sums[last])) + ordered.double().square().cumsum(0)
    return float(ordered[min(int((reached < wanted).sum()), len(ordered) - 1)])


def guidance(guide: Update, shape: Shape, digest: bytes = b"") -> Guidance:
    """What a shape keeps of a guide. The kind `cosine` keeps all of it and bends it by noise to the target cosine.

    digest: the guide's, where it is known.
    """
    size = sum(tensor.numel() for tensor in guide.values())
    bends = shape.kind == "cosine"
    threshold = 0.0 if bends else threshold_of(guide, shape.cosine_target**2)
    square = kept_square = 0.0
    kept_count = 0
    for piece in _pieces(guide):
        keeps = piece.abs() >= threshold
        squares = piece.double().square_()
        square += float(squares.sum())
        kept_square += float((squares * keeps).sum())
        kept_count += int(keeps.sum())
    scale = math.tan(math.acos(shape.cosine_target)) if bends else shape.noise_scale
    masked = shape.kind == "hybrid"
    noisy = 0 if shape.kind in ARMS else size - kept_count if masked else size
    noise = scale * math.sqrt(square / size)
    return Guidance(guide, threshold, square, kept_square, size, kept_count, noise, noisy, masked, digest)


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
    ask = asked(loss, batch, 0)
    ends = []
    with torch.no_grad(), weights_restored(replica.parameters) as saved, perturbed.in_pieces():
        for length in (step, -step):
            _write(replica.parameters, saved, own, length)
            ends.append(float(scalar(ask())))
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
            tensors = (own.guide[name], saved[name], parameter.detach())
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
    asked_of, noise = (loss, replica.parameters, replica.kind, seeds), (step * own.noise,)
    with _guide_written(replica, own, step):
        if copies:
            return perturbed.losses(*asked_of, noise, copies, examples=batch)
        return materialised_losses(*asked_of, noise, examples=batch)


@torch.no_grad()
def _masked_losses(
    replica: Replica, loss: Loss, own: Guidance, seeds: Sequence[int], steps: Sequence[float], batch: Any
) -> Tensor:
    """Losses at w + step * (g_S + sigma n_i), n_i zero where the guide is kept: float (seeds, steps)."""
    rows = []
    unit = directions.unit(replica.kind) * own.noise
    with weights_restored(replica.parameters) as saved, perturbed.in_pieces():
        for query, seed in enumerate(seeds):
            ask = asked(loss, batch, query)
            rows.append([])
            for step in steps:
                for name, parameter in replica.parameters.items():
                    guide = own.guide[name]
                    drawn = directions.direction(replica.kind, seed, name, tuple(parameter.shape)).to(parameter)
                    shift = torch.where(guide.abs() >= own.threshold, guide, drawn.mul_(unit))
                    torch.add(saved[name], shift.mul_(step), out=parameter)
                rows[-1].append(scalar(ask()))
    return torch.stack([torch.stack(row) for row in rows])


def _without_overlap(replica: Replica, record: Guided, own: Guidance) -> Guided:
    """The record less the projection of its noise on the guide, which the slope along the guide tells already."""
    part = record.seeded
    scale = math.ldexp(directions.unit(replica.kind) / part.divisor, part.exponent)
    seeds = part.seeds(replica.genesis["seed"])
    overlap = math.fsum(
        float((directions.weighted_sum(replica.kind, seeds, part.coefficients, name, guide.shape) * guide.cpu()).sum())
        for name, guide in own.guide.items()
    )
    kept_weight = record.kept - overlap * scale / own.square
    return Guided(part, record.guide, record.threshold, kept_weight, record.whole, record.masked)
