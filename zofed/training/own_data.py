"""Data of a person's own, in the forms of torch's loaders, read by position, so that a step can be asked again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from zofed.base.errors import UserError
from zofed.core import metrics
from zofed.core.perturbed import each_tensor
from zofed.data import encoding
from zofed.training.shards import Batch, Shard

OwnLoss = Callable[[nn.Module, Any], Tensor]  # of (module, batch): a scalar tensor, the mean over the batch

FORMS = "a tensor, a tuple or a dict of tensors, a map-style Dataset, or a DataLoader of one"


@dataclass(frozen=True, slots=True)
class OwnData:
    """`count` examples; at: from positions to a batch of them."""

    count: int
    at: Callable[[Sequence[int]], Batch]


def read(given: Any, whose: str) -> OwnData:
    """The data that somebody hands over, in one of FORMS. whose: begins the sentence of a UserError.

    Of a DataLoader only `dataset` and `collate_fn` are used: which examples a step reads, the seed says. Raises
    UserError for what has no positions, for no example, and for a sampler that would be passed over.
    """
    collate: Callable[[list[Any]], Any] = default_collate
    if isinstance(given, DataLoader):
        _check_loader(given, whose)
        given, collate = given.dataset, given.collate_fn
    if isinstance(given, IterableDataset):
        raise UserError(
            f"{whose} is an IterableDataset, which cannot be asked for the same batch again, as a run that goes on "
            "asks: give a map-style Dataset, with __len__ and __getitem__"
        )
    if isinstance(given, TensorDataset) and collate is default_collate:
        given, collate = given.tensors, list
    if isinstance(given, Tensor | tuple | Mapping):
        return _of_tensors(given, whose, as_list=collate is list)
    if not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise UserError(f"{whose} is {kind_of(given)}: give {FORMS}")
    if not len(given):
        raise UserError(f"{whose} holds no example: give at least 1")
    return OwnData(len(given), partial(_collated, given, collate))


def _check_loader(loader: "DataLoader[Any]", whose: str) -> None:
    own = next((s for s in (loader.sampler, loader.batch_sampler) if s is not None and not _is_plain(s)), None)
    if own is not None:
        raise UserError(
            f"{whose} is a DataLoader with {kind_of(own)}, which says what a batch holds; here the seed does: give the "
            "Dataset, in it each example as often as it is to count"
        )
    if loader.batch_size is None:
        raise UserError(f"{whose} is a DataLoader without batches: give one with a batch_size, or its Dataset")


def _is_plain(sampler: object) -> bool:
    """Whether a sampler is one that a loader makes by itself; that of an iterable dataset is told of elsewhere."""
    plain = (RandomSampler, SequentialSampler, BatchSampler)
    return type(sampler) in plain or type(sampler).__name__ == "_InfiniteConstantSampler"


def _of_tensors(given: Any, whose: str, *, as_list: bool) -> OwnData:
    leaves = pytree.tree_leaves(dict(given) if isinstance(given, Mapping) else given)
    if others := [leaf for leaf in leaves if not isinstance(leaf, Tensor) or not leaf.dim()]:
        what = "a Tensor without a dimension" if isinstance(others[0], Tensor) else kind_of(others[0])
        raise UserError(f"{whose} holds {what}: give {FORMS}, tensors with the examples along their first dimension")
    lengths = {len(leaf) for leaf in leaves}
    if len(lengths) > 1:
        raise UserError(f"{whose} holds tensors of {' and '.join(map(str, sorted(lengths)))} examples: give as many")
    if not lengths or lengths == {0}:
        raise UserError(f"{whose} holds no example: give at least 1")

    def at(positions: Sequence[int]) -> Batch:
        chosen = torch.tensor(positions)
        found = each_tensor(given, lambda tensor: tensor[chosen.to(tensor.device)])
        return list(found) if as_list else found

    return OwnData(lengths.pop(), at)


def _collated(dataset: Any, collate: Callable[[list[Any]], Any], positions: Sequence[int]) -> Batch:
    """As torch's loader makes a batch of the items at some positions."""
    if hasattr(dataset, "__getitems__"):
        return collate(dataset.__getitems__(list(positions)))
    return collate([dataset[position] for position in positions])


def kind_of(value: object) -> str:
    """What a value is, with its article."""
    name = type(value).__name__
    return f"an {name}" if name[0] in "AEIOUaeiou" else f"a {name}"


@dataclass(frozen=True, slots=True)
class OwnShard(Shard):
    """Examples of a person's own, scored by their own loss. forward_dtype: the setting of that name."""

    data: OwnData
    own_loss: OwnLoss
    forward_dtype: str = "weights"

    def __len__(self) -> int:
        return self.data.count

    def batches(
        self, count: int, size: int, *, seed: int, client: int, step: int, purpose: str = "batch"
    ) -> Sequence[Batch]:
        """Each as the data make it of what the step draws."""
        chosen = encoding.positions(self.data.count, seed, client, step, count * size, purpose)
        return [self.data.at(chosen[start : start + size]) for start in range(0, count * size, size)]

    def of_queries(self, model: nn.Module, queries: int, size: int, *, seed: int, client: int, step: int) -> Batch:
        """A batch for each query, stacked. Raises UserError for batches that are not of tensors of one shape."""
        each = self.batches(queries, size, seed=seed, client=client, step=step)
        leaves, trees = zip(*(pytree.tree_flatten(each_tensor(batch, Tensor.detach)) for batch in each), strict=True)
        shapes = {tuple(getattr(leaf, "shape", None) for leaf in own) for own in leaves}
        if len(shapes) > 1 or any(shape is None for shape in next(iter(shapes))):
            raise UserError(
                "query-batches = 'per-query' stacks the queries' batches, and these are not all tensors of one shape: "
                "pad them alike, or set query-batches to shared"
            )
        return pytree.tree_unflatten([torch.stack(parts) for parts in zip(*leaves, strict=True)], trees[0])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Their own, of the batch where the module reads it."""
        with metrics.ready(model, batch, self.forward_dtype) as ready:
            return self.own_loss(model, ready)
