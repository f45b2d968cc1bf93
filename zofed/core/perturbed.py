"""Losses of many perturbed models in one pass, weights untouched.

All copies, both signs of many directions, run as one batch through the same weights, each as a `Perturbation` makes it;
`torch.vmap` sees to it that whatever lies below the first perturbed parameter runs once for all of them. Nothing is
written into the model, so nothing has to be restored and nothing drifts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.core import directions, kinds
from zofed.core.copies import Copies, Differ, NeedsOwn
from zofed.core.directions import Factors
from zofed.core.perturbation_mode import Perturbation

QUERIES_AT_ONCE = 32  # directions whose factors are drawn together: bytes ~ queries * sum(rows + columns)

Loss = Callable[..., Tensor]  # of no arguments, or of the examples of one query


class CannotBatch(RuntimeError):  # noqa: N818, a property of the loss
    """The loss is built of something that cannot run for many perturbed copies at once; the text says what."""


class Unseen(UserError):  # noqa: N818
    """The loss never showed its use of some parameters, named in `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"the loss never used the trainable parameters {', '.join(names[:3])}: set scope to leave them out"
        )
        self.names = tuple(names)


@torch.no_grad()
def losses(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    kind: kinds.Kind,
    seeds: Sequence[int],
    steps: Sequence[float],
    perturbations_per_pass: int,
    sizes: Mapping[str, float] | None = None,
    examples: Any = None,
) -> Tensor:
    """loss(w + step * z) for the direction z of each seed and each step: float32 or float64 (seeds, steps), on the CPU.

    loss: scalar of one batch, built of torch calls on the given parameters. kind: rankR. sizes: what multiplies the
    direction of each parameter, 1 where absent. perturbations_per_pass: perturbed copies that share one pass; more are
    faster until the activations of all leave the cache or the memory. examples: one batch for every seed, tensors with
    the seeds along their first dimension, each handed to `loss`; None for a loss of no arguments. Raises CannotBatch
    when the loss cannot run so, Unseen when it never used one of the parameters.
    """
    pairs = [(query, step) for query in range(len(seeds)) for step in steps]
    found, seen = [], set[int]()
    drawn: list[Factors] = []
    first = last = 0
    for start in range(0, len(pairs), perturbations_per_pass):
        some = pairs[start : start + perturbations_per_pass]
        if some[-1][0] >= last:  # draw on from the first query of this pass
            first, last = some[0][0], max(some[0][0] + QUERIES_AT_ONCE, some[-1][0] + 1)
            drawn = list(_factors(kind, seeds[first:last], parameters, sizes))
        queries = torch.tensor([query for query, _ in some])
        scale = torch.tensor([[step * kinds.unit(kind)] * kinds.terms(kind) for _, step in some], dtype=torch.float64)
        batch = each_tensor(examples, lambda tensor, at=queries: tensor[at.to(tensor.device)])
        found.append(_one_pass(loss, parameters, drawn, queries - first, scale, seen, batch))
    unseen = [name for name, parameter in parameters.items() if id(parameter) not in seen]
    if unseen:
        raise Unseen(unseen)
    return torch.cat(found).view(len(seeds), len(steps)).cpu()


@torch.no_grad()
def losses_along(
    loss: Loss, parameters: Mapping[str, Tensor], factors: Mapping[str, Factors], steps: Sequence[float], batch: Any
) -> Tensor:
    """loss(w + step * z) at each step along one direction, all in one pass: (steps,) on the CPU.

    factors: of z by name, a (1, r, rows) and b (1, r, columns) of a matrix, z (1, r, entries) of a vector. batch: what
    `loss` is handed, None for a loss of no arguments. Raises CannotBatch when the loss cannot run so, or hides its use
    of a parameter.
    """
    seen = set[int]()
    drawn = [factors[name] for name in parameters]
    scale = torch.tensor(steps, dtype=torch.float64)[:, None]
    queries = torch.zeros(len(steps), dtype=torch.int64)
    batch = each_tensor(batch, lambda tensor: tensor.expand(len(steps), *tensor.shape))
    found = _one_pass(loss, parameters, drawn, queries, scale, seen, batch)
    for name, parameter in parameters.items():
        if id(parameter) not in seen:
            raise CannotBatch(hidden(name))
    return found.cpu()


def hidden(name: str) -> str:
    """Why a loss that depends on a parameter cannot run batched all the same."""
    return f"it uses {name} where no call of torch shows it"


def _one_pass(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    drawn: list[Factors],
    queries: Tensor,
    scale: Tensor,
    seen: set[int],
    batch: Any,
    owns: bool = False,
) -> Tensor:
    """One loss for each of `queries` and rows of `scale`, all in one pass, or in one for each group that agrees."""
    ids = [id(parameter) for parameter in parameters.values()]
    like = next(iter(parameters.values()))
    # Each in its parameter's own type: a model in bfloat16 may keep some in float32.
    chosen = [
        tuple(factor[queries].to(parameter) for factor in pair)
        for parameter, pair in zip(parameters.values(), drawn, strict=True)
    ]

    def one(scale: Tensor, factors: list[Factors], batch: Any) -> Tensor:
        with Perturbation(dict(zip(ids, factors, strict=True)), scale, seen, Copies(scale, owns)):
            value = loss() if batch is None else loss(batch)
        if not isinstance(value, Tensor):
            raise CannotBatch(f"it gives a {type(value).__name__}, not a tensor")
        return value.to(torch.promote_types(value.dtype, torch.float32)).reshape(())

    try:
        by_copy = pytree.tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        return torch.vmap(one, in_dims=(0, 0, by_copy))(scale.to(like), chosen, batch)
    except Differ as differ:
        found = torch.empty(len(queries))
        for group in differ.groups:
            at = torch.tensor(group)
            own = each_tensor(batch, lambda tensor, at=at: tensor[at.to(tensor.device)])
            some = _one_pass(loss, parameters, drawn, queries[at], scale[at], seen, own, owns)
            found = found.to(some)
            found[at.to(some.device)] = some
        return found
    except NeedsOwn:
        return _one_pass(loss, parameters, drawn, queries, scale, seen, batch, owns=True)
    except (torch.OutOfMemoryError, UserError, CannotBatch):
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # vmap's limits; a fault of the loss shows again without it
        cause: BaseException | None = error
        while cause := cause.__context__:
            if isinstance(cause, KeyboardInterrupt):  # vmap, cut in its middle, fails again on its way out
                raise cause from None
        raise CannotBatch(said_by(error)) from error


def along(
    loss: Loss,
    parameters: Mapping[str, Tensor],
    kind: kinds.Kind,
    seeds: Sequence[int],
    coefficients: Tensor,
    sizes: Mapping[str, float] | None = None,
) -> Tensor:
    """loss(w + sum over k of coefficient_k * z_k), which can be differentiated by the coefficients (K,).

    Neither weights nor gradients of their size are written; the derivative at zero coefficients is the exact slope
    along each direction. kind: rankR, or core with one coefficient for each pair of seeds, row by row.
    """
    like = next(iter(parameters.values()))
    if kind == "core":
        scale = coefficients.view(len(seeds), len(seeds))
    else:
        scale = coefficients.repeat_interleave(kinds.terms(kind)) * kinds.unit(kind)
    factors = {
        id(parameter): tuple(part.flatten(0, 1).to(parameter) for part in parts)
        for parameter, parts in zip(parameters.values(), _factors(kind, seeds, parameters, sizes), strict=True)
    }
    with Perturbation(factors, scale.to(like), set()):
        return loss()


def _factors(
    kind: kinds.Kind, seeds: Sequence[int], parameters: Mapping[str, Tensor], sizes: Mapping[str, float] | None
) -> Iterator[Factors]:
    """Factors of each seed's direction of each parameter, the last one times the parameter's size."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name, (*rest, last) in directions.draw(kind, seeds, shapes):
        size = (sizes or {}).get(name, 1.0)
        yield (*rest, last if size == 1.0 else last * size)


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested examples with every tensor changed; any mapping becomes a dict, which vmap can look into."""
    if isinstance(value, Mapping):
        return {key: each_tensor(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        changed = [each_tensor(item, change) for item in value]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return change(value) if isinstance(value, Tensor) else value
