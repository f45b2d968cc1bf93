"""First order in a seeded subspace: backpropagation on coefficients, whose gradients and optimizer state are small.

The forward pass runs at w + sum over k of a_k z_k with the weights w untouched, and only the coefficients a are
trained: neither weight gradients nor a full-size optimizer state exist. K numbers tell the whole step.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zofed.core import directions, kinds, perturbed
from zofed.core.optimizers import Optimizer
from zofed.core.perturbed import Loss

NAME = "coefficients"


@dataclass(frozen=True, slots=True)
class Probing:
    """How coefficients are trained where nothing can be backpropagated: along `queries` random sign vectors a step.

    The loss is measured at `epsilon` over the root of the number of coefficients to either side: the weights shift by
    epsilon a coordinate, as along a direction of their own. The signs derive from (seed, client, step).
    """

    queries: int
    epsilon: float
    seed: int
    client: int


@dataclass(frozen=True, slots=True)
class Trained:
    """Coefficients after training, float, and the mean of the losses met on the way, float."""

    coefficients: tuple[float, ...]
    loss: float


def trained(
    losses: Sequence[Loss],
    parameters: Mapping[str, Tensor],
    kind: kinds.Kind,
    seeds: Sequence[int],
    size: int,
    optimizer: Optimizer,
    rate: float,
    sizes: Mapping[str, float] | None = None,
    probing: Probing | None = None,
) -> Trained:
    """Train `size` coefficients from zero, one step of the optimizer for each loss (a batch of its own each).

    kind: rankR with one seed a coefficient, or core with their square root. rate: as for the weights themselves, see
    `coefficient_rate`. probing: with forward passes only; None: by backpropagation. The weights are neither moved nor
    asked for gradients. Raises ValueError when a loss is not
    finite.
    """
    device = next(iter(parameters.values())).device
    coefficients = torch.zeros(size, device=device)
    side, own_rate = len(seeds) if kind == "core" else 1, coefficient_rate(optimizer, rate, size)
    met = []
    with frozen(parameters):
        for step, loss in enumerate(losses):
            if probing is None:
                variable = coefficients.requires_grad_()
                value = perturbed.along(loss, parameters, kind, seeds, variable, sizes)
                (gradient,) = torch.autograd.grad(value, variable)
                coefficients = variable.detach()
            else:
                at = lambda shifted, loss=loss: perturbed.along(loss, parameters, kind, seeds, shifted, sizes)  # noqa: E731
                gradient, value = probed(at, coefficients, probing, number=seeds[0] ^ step)
            met.append(float(value.detach()))
            if not math.isfinite(met[-1]):
                raise ValueError(f"the loss of inner step {step + 1} is {met[-1]}")
            with torch.no_grad():
                view, change = coefficients.view(side, -1), gradient.to(torch.float32).view(side, -1)
                state = optimizer.moments(NAME, view)
                optimizer.step(NAME, view, change, state, own_rate, optimizer.begin_step())
    return Trained(tuple(coefficients.tolist()), math.fsum(met) / len(met))


@torch.no_grad()
def probed(loss: Callable[[Tensor], Tensor], coefficients: Tensor, how: Probing, number: int) -> tuple[Tensor, Tensor]:
    """An estimate of the loss's gradient by the coefficients (K,), from central differences, and the mean loss.

    The mean over sign vectors u of slope * u (Spall, 1992). number: of the step; names the vectors with the client.
    """
    seeds = [directions.derive_seed("zofed-probing", how.seed, how.client, number, i) for i in range(how.queries)]
    drawn = directions.signs(seeds, 0, 0, len(coefficients))
    step = how.epsilon / math.sqrt(len(coefficients))
    total, losses = torch.zeros_like(coefficients), []
    for signs in torch.from_numpy(drawn).to(coefficients):
        ends = [loss(coefficients + side * step * signs).to(torch.float32) for side in (1.0, -1.0)]
        total += signs * ((ends[0] - ends[1]) / (2 * step))
        losses += ends
    return total / how.queries, torch.stack(losses).mean()


def coefficient_rate(optimizer: Optimizer, rate: float, size: int) -> float:
    """The rate of `size` coefficients that moves the weights as `rate` would.

    Of SGD by the mean over the directions of slope * direction, an estimate of the gradient; of the others by a root
    mean square of `rate`, every direction's entries having mean square 1.
    """
    return rate / size if optimizer.name == "sgd" else rate / math.sqrt(size)


@contextmanager
def frozen(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, no gradient of the parameters is wanted, so nothing is kept for one."""
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
