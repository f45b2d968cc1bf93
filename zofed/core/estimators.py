"""From losses at shifted weights to slopes along directions."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from zofed.core import directions, kinds, perturbed
from zofed.core.perturbation_mode import in_pieces
from zofed.core.perturbed import CannotBatch, Loss

Parameters = dict[str, Tensor]  # trainable tensors by canonical name
Points = Literal["two-point", "one-sided"]

Share = Callable[[slice], Tensor]  # some of the queries -> their losses (queries, steps)
# Where the losses of all queries come from: how to measure a share of them here, how many there are, how many of them
# fill whole forward passes, and whether they run batched -> losses (queries, steps).
Split = Callable[[Share, int, int, bool], Tensor]

SIZE_FLOOR = 0.01
ROUGH_POINTS = 9  # along one direction, of which a parabola takes three
BLOCK = 2**18  # entries of a dense direction that are expanded together: they stay in the cache


@dataclass(frozen=True, slots=True)
class Estimate:
    """Slopes along the directions asked for, and what the forward passes found besides.

    slopes: directional derivatives by finite differences; those of one-sided queries less their mean. loss: mean over
    the two points of every query, or at the unperturbed weights. forward_passes: batches run. rounding: what the
    loss's own resolution may have put into a slope, as a share of the slopes' root mean square.
    """

    slopes: tuple[float, ...]
    loss: float
    forward_passes: int
    rounding: float


@dataclass(frozen=True, slots=True)
class FiniteDifference:
    """How slopes are measured.

    kind: of the directions. epsilon: step per coordinate. points: `two-point`, central differences
    (loss(w + epsilon z) - loss(w - epsilon z)) / (2 epsilon), whose error is of order epsilon^2 (Spall, "Multivariate
    stochastic approximation using a simultaneous perturbation gradient approximation", IEEE TAC 1992); `one-sided`,
    (loss(w + epsilon z) - loss(w)) / epsilon with one loss(w) for all, less the mean over the directions, which takes
    out epsilon/2 times the Hessian's trace: nearly twice the directions for the same passes. sizes: what multiplies
    each parameter's direction, 1 where absent. perturbations_per_pass: perturbed copies in one forward pass, of
    low-rank kinds. roughness: what `measured_roughness` found, where the passes are coarser than the loss's type.
    """

    kind: kinds.Kind
    epsilon: float
    points: Points = "two-point"
    perturbations_per_pass: int = 8
    sizes: Mapping[str, float] | None = None
    roughness: float = 0.0

    def slopes(
        self,
        loss: Loss,
        parameters: Parameters,
        seeds: Sequence[int],
        examples: Any = None,
        *,
        batched: bool = True,
        split: Split | None = None,
    ) -> Estimate:
        """Slopes of `loss` along the direction of each seed; the weights are afterwards what they were, bit for bit.

        loss: the scalar loss of one batch at the present weights, of any kind, differentiable or not. examples: one
        batch for every seed, handed to `loss`; None: all share the batch that `loss` holds. batched: run low-rank
        directions many at a time; raises CannotBatch where that cannot be done. Dense directions are written into the
        weights one after the other. split: measures shares of the queries in several places; None: all here.
        """

        def share(some: slice) -> Tensor:
            return self.losses(loss, parameters, seeds, examples, some, batched=batched)

        count = len(seeds)
        found = split(share, count, self.together(batched), batched) if split else share(slice(0, count))
        resolution = max(torch.finfo(found.dtype).eps * float(found.abs().mean()), math.sqrt(2) * self.roughness)
        values: list[list[float]] = found.to(torch.float64).tolist()
        passes = forward_passes(self.points, len(seeds)) if examples is None else 2 * len(seeds)
        if self.points == "two-point":
            step = 2 * self.epsilon
            slopes = [(plus - minus) / step for plus, minus in values]
            mean = math.fsum(map(math.fsum, values)) / (2 * len(values))
        else:
            step = self.epsilon
            base = [float(value) for value in _base_losses(loss, len(seeds), examples)]
            slopes = [(plus[0] - at) / step for plus, at in zip(values, base, strict=True)]
            middle = math.fsum(slopes) / len(slopes)
            slopes = [slope - middle for slope in slopes] if len(slopes) > 1 else slopes
            mean = math.fsum(base) / len(base)
        size = root_mean_square(slopes)
        rounding = resolution / (step * size) if size else math.inf
        return Estimate(tuple(slopes), mean, passes, rounding)

    def losses(
        self, loss: Loss, parameters: Parameters, seeds: Sequence[int], examples: Any, some: slice, *, batched: bool
    ) -> Tensor:
        """Losses at the shifted weights of some of the queries: float32 or float64 (queries, steps), on the CPU.

        seeds, examples: of all queries. To the bits that these give when all are measured here, where `some` begins and
        ends at multiples of `together`, or with the last query.
        """
        seeds = seeds[some]
        own = None if examples is None else perturbed.each_tensor(examples, lambda tensor: tensor[some])
        if batched and kinds.terms(self.kind):
            return self._batched(loss, parameters, seeds, self._steps, own)
        return materialised_losses(loss, parameters, self.kind, seeds, self._steps, self.sizes, own)

    def measured_roughness(
        self, loss: Loss, parameters: Parameters, seed: int, examples: Any, *, batched: bool
    ) -> float:
        """How far losses between -epsilon and epsilon along one direction lie off a smooth curve: a standard deviation.

        What rounding in the passes leaves of a loss, where they are coarser than its type says: the residuals of a
        parabola through ROUGH_POINTS losses. examples: as for `slopes`; the first query's are read.
        """
        at = torch.linspace(-1, 1, ROUGH_POINTS, dtype=torch.float64)
        steps: list[float] = (at * self.epsilon).tolist()
        own = None if examples is None else perturbed.each_tensor(examples, lambda tensor: tensor[:1])
        if batched and kinds.terms(self.kind):
            found = self._batched(loss, parameters, [seed], steps, own)
        else:
            found = materialised_losses(loss, parameters, self.kind, [seed], steps, self.sizes, own)
        losses = found[0].to(torch.float64)
        if not bool(torch.isfinite(losses).all()):
            return 0.0
        powers = torch.stack([at**power for power in range(3)], 1)
        missed = losses - powers @ torch.linalg.lstsq(powers, losses[:, None]).solution[:, 0]
        return math.sqrt(float(missed.square().sum()) / (ROUGH_POINTS - powers.shape[1]))

    def together(self, batched: bool) -> int:
        """The smallest number of queries that fills whole forward passes."""
        if not (batched and kinds.terms(self.kind)):
            return 1
        return self.perturbations_per_pass // math.gcd(self.perturbations_per_pass, len(self._steps))

    @property
    def _steps(self) -> tuple[float, ...]:
        return (self.epsilon, -self.epsilon) if self.points == "two-point" else (self.epsilon,)

    def _batched(
        self, loss: Loss, parameters: Parameters, seeds: Sequence[int], steps: Sequence[float], examples: Any
    ) -> Tensor:
        try:
            return perturbed.losses(
                loss, parameters, self.kind, seeds, steps, self.perturbations_per_pass, self.sizes, examples
            )
        except perturbed.Unseen as error:
            hidden = [name for name in error.names if _is_used(loss, parameters, name, examples)]
            if not hidden:
                raise
            raise CannotBatch(perturbed.hidden(hidden[0])) from error


def size_exponents(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """For each tensor the power of two nearest to its root mean square plus 0.01: steps in proportion to the weights.

    Small or zero tensors still move by the floor. Exponents, so that sizes multiply exactly.
    """
    return {
        name: round(math.log2(float(tensor.detach().to(torch.float32).square().mean().sqrt()) + SIZE_FLOOR))
        for name, tensor in parameters.items()
    }


def root_mean_square(values: Sequence[float]) -> float:
    """Square root of the mean square, exactly rounded sums."""
    return math.sqrt(math.fsum(value * value for value in values) / len(values)) if values else 0.0


def degrees_of_freedom(points: Points, queries: int) -> int:
    """What a sum of slope * direction is divided by to estimate the gradient: centring the slopes takes one."""
    return queries if points == "two-point" else max(1, queries - 1)


def forward_passes(points: Points, queries: int) -> int:
    """Batches that one step of so many queries on shared examples runs."""
    return 2 * queries if points == "two-point" else queries + 1


@contextmanager
def weights_restored(parameters: Parameters) -> Iterator[Parameters]:
    """A saved copy of the parameters; on leaving, every bit of them is as before.

    Restoring from a copy, never by subtraction: adding and subtracting the same step rounds, and the weights drift.
    """
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield saved
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


@torch.no_grad()
def materialised_losses(
    loss: Loss,
    parameters: Parameters,
    kind: kinds.Kind,
    seeds: Sequence[int],
    steps: Sequence[float],
    sizes: Mapping[str, float] | None = None,
    examples: Any = None,
) -> Tensor:
    """loss(w + step * z) for the direction z of each seed, of any kind, and each step: float64 (seeds, steps).

    The weights are shifted in place; memory: one extra copy of the parameters.
    """
    rows: list[list[Tensor]] = []
    with weights_restored(parameters) as saved:
        for query, seed in enumerate(seeds):
            call = bound_loss(loss, examples, query)
            rows.append([])
            for step in steps:
                for name, parameter in parameters.items():
                    size = (sizes or {}).get(name, 1.0) * kinds.unit(kind)
                    _shift(parameter, saved[name], kind, seed, name, step * size)
                rows[-1].append(scalar(call()))
    return torch.stack([torch.stack(row) for row in rows])


def _shift(parameter: Tensor, saved: Tensor, kind: kinds.Kind, seed: int, name: str, step: float) -> None:
    """parameter = saved + step * direction, expanded a block of rows at a time."""
    rows = parameter.shape[0] if parameter.dim() else 1
    at_once = max(1, BLOCK // max(1, prod(parameter.shape[1:])))
    for start in range(0, rows, at_once):
        some = slice(start, min(start + at_once, rows))
        drawn = directions.direction(kind, seed, name, tuple(parameter.shape), some).to(parameter)
        whole = some if parameter.dim() else ...
        torch.add(saved[whole], drawn.mul_(step), out=parameter[whole])


def unused(seen: Collection[int], loss: Loss, parameters: Parameters, examples: Any = None) -> list[str]:
    """Names of the parameters that the loss never uses.

    seen: ids of what calls of torch were given in a pass; of what is not among them, two further passes each tell.
    """
    hidden = [name for name, parameter in parameters.items() if id(parameter) not in seen]
    return [name for name in hidden if not _is_used(loss, parameters, name, examples)]


def _is_used(loss: Loss, parameters: Parameters, name: str, examples: Any) -> bool:
    """Whether the loss changes when every entry of a parameter does."""
    one = {name: parameters[name]}
    with torch.no_grad(), weights_restored(one):
        call = bound_loss(loss, examples, 0)
        before = call()
        one[name].mul_(1.5).add_(0.5)
        return not torch.equal(torch.as_tensor(call()), torch.as_tensor(before))


@torch.no_grad()
def _base_losses(loss: Loss, count: int, examples: Any) -> list[Tensor]:
    """Losses at the present weights: one for all queries, or one for each query's own examples."""
    with in_pieces():
        if examples is None:
            return [scalar(loss())] * count
        return [scalar(bound_loss(loss, examples, query)()) for query in range(count)]


def bound_loss(loss: Loss, examples: Any, query: int) -> Callable[[], Any]:
    """The loss of one query's examples."""
    if examples is None:
        return loss
    own = perturbed.each_tensor(examples, lambda tensor: tensor[query])
    return lambda: loss(own)


def scalar(value: Any) -> Tensor:
    """A loss on the CPU, in float32 at least; any Python number will do."""
    tensor = torch.as_tensor(value).detach().cpu().reshape(())
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else torch.float64)


def exact_slopes(
    loss: Loss,
    parameters: Parameters,
    kind: kinds.Kind,
    seeds: Sequence[int],
    sizes: Mapping[str, float] | None = None,
) -> tuple[float, ...]:
    """Directional derivatives of `loss` along each seed's low-rank direction, by one backpropagation; a reference."""
    coefficients = torch.zeros(len(seeds), dtype=next(iter(parameters.values())).dtype, requires_grad=True)
    with torch.enable_grad():
        (found,) = torch.autograd.grad(
            perturbed.along(loss, parameters, kind, seeds, coefficients, sizes), coefficients
        )
    return tuple(found.to(torch.float64).tolist())
