"""How much memory forward passes take, and how many perturbed copies fit into a budget."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zofed.base.errors import UserError
from zofed.core import kinds, perturbed
from zofed.core.perturbed import Loss

LARGEST = 4096  # copies; more never pay


class _Watch(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is active, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in before | self._known:
                    self._add(storage)
        return made

    def _add(self, storage: Any) -> None:
        identity, size = storage._cdata, storage.nbytes()
        self._known.add(identity)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, identity, size)

    def _drop(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.bytes -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that tensors made during `run` took together; what existed before does not count."""
    with _Watch() as watch:
        run()
    return watch.peak


def bytes_by_copies(loss: Loss, parameters: Mapping[str, Tensor], kind: kinds.Kind) -> tuple[int, int]:
    """(bytes of a pass with one perturbed copy, bytes each further copy adds), beside the weights; kind: rankR.

    Two passes are run and watched; memory grows by the same amount with every copy.
    """

    def run(copies: int) -> int:
        seeds = list(range(copies))
        return peak_bytes(lambda: perturbed.losses(loss, parameters, kind, seeds, (1e-3,), copies))

    one, five = run(1), run(5)
    return one, max(1, -(-(five - one) // 4))


@torch.no_grad()
def bytes_one_by_one(loss: Loss, parameters: Mapping[str, Tensor]) -> int:
    """Bytes beside the weights where each direction is written into them: a copy of the parameters, and a pass."""
    return sum(map(bytes_of, parameters.values())) + peak_bytes(loss)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def copies_within(budget: int, one: int, further: int) -> int:
    """The largest `perturbations_per_pass` whose pass takes at most `budget` bytes, from what `bytes_by_copies` found.

    Raises UserError when not even one copy fits.
    """
    if one > budget:
        raise UserError(
            f"one forward pass takes {one / 2**20:,.0f} MiB beside the weights, more than the budget of "
            f"{budget / 2**20:,.0f} MiB: take a smaller batch-size or block-size"
        )
    return min(LARGEST, 1 + (budget - one) // further)
