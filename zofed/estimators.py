"""From losses at shifted weights to slopes along directions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zofed import perturbed
from zofed.directions import Kind, direction

Parameters = dict[str, Tensor]  # trainable tensors by canonical name


@dataclass(frozen=True, slots=True)
class Estimate:
    """Slopes along the directions asked for, the mean loss over all forward passes, and how many those were."""

    slopes: tuple[float, ...]
    loss: float
    forward_passes: int


@contextmanager
def kept(parameters: Parameters) -> Iterator[Parameters]:
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


def two_point(
    loss: Callable[[], Tensor],
    parameters: Parameters,
    kind: Kind,
    seeds: Sequence[int],
    epsilon: float,
    copies_per_pass: int,
) -> Estimate:
    """Central differences: slope_k = (loss(w + epsilon z_k) - loss(w - epsilon z_k)) / (2 epsilon).

    loss: the scalar loss of one batch at the present weights. epsilon: step per coordinate. rank1 directions are
    measured `copies_per_pass` losses at a time and touch no weight; dense ones are written into the weights one after
    the other and every bit is restored. Source: Spall, "Multivariate stochastic approximation using a simultaneous
    perturbation gradient approximation", IEEE TAC 1992.
    """
    if kind == "rank1":
        pairs = perturbed.losses(loss, parameters, seeds, epsilon, copies_per_pass)
    else:
        pairs = materialised_losses(loss, parameters, kind, seeds, epsilon)
    slopes = tuple((plus - minus) / (2 * epsilon) for plus, minus in pairs)
    return Estimate(slopes, sum(plus + minus for plus, minus in pairs) / (2 * len(pairs)), 2 * len(pairs))


@torch.no_grad()
def materialised_losses(
    loss: Callable[[], Tensor], parameters: Parameters, kind: Kind, seeds: Sequence[int], epsilon: float
) -> list[tuple[float, float]]:
    """(loss at w + epsilon z, loss at w - epsilon z) for the direction z of each seed, of any kind.

    The weights are shifted in place; memory: one extra copy of the parameters.
    """
    pairs: list[tuple[float, float]] = []
    with kept(parameters) as saved:
        for seed in seeds:
            shift = {
                name: direction(kind, seed, name, tensor.shape).to(tensor) * epsilon for name, tensor in saved.items()
            }
            pair: list[float] = []
            for step in (torch.add, torch.sub):
                for name, parameter in parameters.items():
                    step(saved[name], shift[name], out=parameter)
                pair.append(float(loss()))
            pairs.append((pair[0], pair[1]))
    return pairs
