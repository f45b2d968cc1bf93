"""First order in a seeded subspace: backpropagation on coefficients, whose gradients and optimizer state are small.

The forward pass runs at w + sum over k of a_k z_k with the weights w untouched, and only the coefficients a are
trained: neither weight gradients nor a full-size optimizer state exist. K numbers tell the whole step.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zofed import directions, perturbed
from zofed.optimizers import Optimizer
from zofed.perturbed import Loss

NAME = "coefficients"


@dataclass(frozen=True, slots=True)
class Trained:
    """Coefficients after training, float, and the mean of the losses met on the way, float."""

    coefficients: tuple[float, ...]
    loss: float


def trained(
    losses: Sequence[Loss],
    parameters: Mapping[str, Tensor],
    kind: directions.Kind,
    seeds: Sequence[int],
    size: int,
    optimizer: Optimizer,
    rate: float,
    sizes: Mapping[str, float] | None = None,
) -> Trained:
    """Train `size` coefficients from zero, one step of the optimizer for each loss (a batch of its own each).

    kind: rankR with one seed a coefficient, or core with their square root. rate: as for the weights themselves, see
    `coefficient_rate`. The weights are neither moved nor asked for gradients. Raises ValueError when a loss is not
    finite.
    """
    device = next(iter(parameters.values())).device
    coefficients = torch.zeros(size, device=device)
    side, own_rate = len(seeds) if kind == "core" else 1, coefficient_rate(optimizer, rate, size)
    met = []
    with frozen(parameters):
        for step, loss in enumerate(losses):
            variable = coefficients.requires_grad_()
            value = perturbed.along(loss, parameters, kind, seeds, variable, sizes)
            (gradient,) = torch.autograd.grad(value, variable)
            met.append(float(value.detach()))
            if not math.isfinite(met[-1]):
                raise ValueError(f"the loss of inner step {step + 1} is {met[-1]}")
            coefficients = variable.detach()
            with torch.no_grad():
                view, change = coefficients.view(side, -1), gradient.to(torch.float32).view(side, -1)
                state = optimizer.moments(NAME, view)
                optimizer.move(NAME, view, change, state, own_rate, optimizer.begin_step())
    return Trained(tuple(coefficients.tolist()), math.fsum(met) / len(met))


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
