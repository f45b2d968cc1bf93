"""How good slopes and estimates are, measured against backpropagation; for choosing settings, never for training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zofed.base.errors import UserError
from zofed.core import directions, estimators, kinds
from zofed.core.estimators import Estimate, FiniteDifference, Points, root_mean_square
from zofed.core.records import to_integers
from zofed.core.replica import Replica

EPSILONS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BATCHES_NEEDED = 2


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one look at a model found.

    parameters: entries that train. slope: root mean square of the exact slopes. signal_to_noise: variance of the
    slopes over directions by that over batches, for one batch. cosine: of the estimate from these slopes with the
    gradient on the first batch; expected_cosine: sqrt(queries / parameters), what exact slopes along as many directions
    give.
    errors: for each epsilon the root mean square error of the finite differences and the share of it that rounding may
    be (`Estimate.rounding`), both by the slopes' root mean square.
    """

    parameters: int
    slope: float
    signal_to_noise: float
    cosine: float
    expected_cosine: float
    errors: tuple[tuple[float, float, float], ...]

    @property
    def random_cosine(self) -> float:
        """What chance gives: size of the cosine of one direction, whose slope nobody measured, with the gradient."""
        return self.parameters**-0.5

    @property
    def best_epsilon(self) -> float:
        """The epsilon whose slopes were nearest to the exact ones."""
        return min(self.errors, key=lambda row: row[1])[0]


def diagnose(
    replica: Replica,
    losses: Sequence[Callable[[], Tensor]],
    queries: int,
    points: Points = "two-point",
    perturbations_per_pass: int = 8,
) -> Diagnosis:
    """Compare finite differences along `queries` directions with exact slopes, and those with the gradient.

    losses: the loss on each of two or more batches. Needs backpropagation, and its memory. Raises UserError for dense
    directions, whose exact slopes would need each of them in memory.
    """
    kind = replica.genesis["directions"]
    if not kinds.terms(kind):
        raise UserError(f"directions = {kind!r} cannot be diagnosed: use rank1, whose slopes are as large")
    if len(losses) < BATCHES_NEEDED:
        raise UserError(f"{len(losses)} batches are too few to tell signal from noise: give {BATCHES_NEEDED} or more")
    seeds = directions.direction_seeds(replica.genesis["seed"], replica.round + 1, 0, queries)
    exact = torch.tensor(
        [estimators.exact_slopes(loss, replica.parameters, kind, seeds, replica.sizes) for loss in losses]
    ).double()
    noise = float(exact.var(0).mean())
    signal = max(0.0, float(exact.mean(0).var()) - noise / len(losses))
    first: list[float] = exact[0].tolist()
    parameters = sum(parameter.numel() for parameter in replica.parameters.values())
    return Diagnosis(
        parameters=parameters,
        slope=root_mean_square(first),
        signal_to_noise=signal / noise if noise else math.inf,
        cosine=_cosine(replica, losses[0], seeds, first),
        expected_cosine=math.sqrt(queries / parameters),
        errors=tuple(
            _error(
                replica,
                losses[0],
                seeds,
                first,
                FiniteDifference(kind, epsilon, points, perturbations_per_pass, replica.sizes),
            )
            for epsilon in EPSILONS
        ),
    )


def _error(
    replica: Replica, loss: Callable[[], Tensor], seeds: Sequence[int], exact: Sequence[float], how: FiniteDifference
) -> tuple[float, float, float]:
    def run(batched: bool) -> Estimate:
        own = replace(how, roughness=replica.measure.roughness(how, loss, seeds[0], batched=batched))
        return own.slopes(loss, replica.parameters, seeds, batched=batched)

    estimate = replica.measure.batched_or_not(run, loss)
    middle = math.fsum(exact) / len(exact) if how.points == "one-sided" else 0.0
    misses = [slope - (truth - middle) for slope, truth in zip(estimate.slopes, exact, strict=True)]
    size = root_mean_square(exact)
    return how.epsilon, root_mean_square(misses) / size if size else math.inf, estimate.rounding


@torch.no_grad()
def _cosine(replica: Replica, loss: Callable[[], Tensor], seeds: Sequence[int], slopes: Sequence[float]) -> float:
    """Cosine of sum over k of slope_k * direction_k with the gradient; whatever multiplies all of a sum cancels."""
    with torch.enable_grad():
        gradient, _ = replica.measure.gradient(loss)
    kind = replica.genesis["directions"]
    product = squares = lengths = 0.0
    coefficients, _ = to_integers(slopes)
    for name, parameter in replica.parameters.items():
        estimate = directions.weighted_sum(kind, seeds, coefficients, name, tuple(parameter.shape))
        own = gradient[name].double().cpu() * replica.sizes.get(name, 1.0)
        product += float((estimate * own).sum())
        squares += float(estimate.square().sum())
        lengths += float(own.square().sum())
    return product / math.sqrt(squares * lengths) if squares and lengths else 0.0
