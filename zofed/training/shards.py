"""What one client trains on: which examples a step reads, and what a batch of them is scored by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zofed.config import TEXT_OBJECTIVES, Settings
from zofed.core import metrics
from zofed.core.perturbed import Loss
from zofed.data import encoding
from zofed.data.encoding import Examples
from zofed.training import generation

Batch = Any  # nested mappings, lists and tuples of tensors, each with the examples along its first dimension


class Shard(ABC):
    """One client's examples. What a step reads of them is a function of (purpose, seed, client, step) alone."""

    @abstractmethod
    def __len__(self) -> int:
        """How many examples there are."""

    @abstractmethod
    def batches(
        self, count: int, size: int, *, seed: int, client: int, step: int, purpose: str = "batch"
    ) -> Sequence[Batch]:
        """The `count` batches of one step, `size` examples each."""

    @abstractmethod
    def of_queries(self, model: nn.Module, queries: int, size: int, *, seed: int, client: int, step: int) -> Batch:
        """Examples of each query's own in one step: the leading dimensions of its tensors are `queries` and `size`."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """What backpropagation follows: a scalar, the mean over the batch."""

    def prepared(self, model: nn.Module, batch: Batch) -> Batch:
        """The batch with what need not be computed in each pass over it."""
        return batch

    def measured(self, model: nn.Module, batch: Batch | None) -> Loss:
        """What slopes are measured of. batch: None: a loss of the examples that it is handed."""
        if batch is None:
            return lambda own: self.loss(model, own)
        return lambda: self.loss(model, batch)


Data = Examples | Shard  # a task's tensors by name, or a shard of another kind


def of(settings: Settings, data: Data) -> Shard:
    """The data as a shard: a task's tensors are scored as the settings say."""
    return data if isinstance(data, Shard) else TensorShard(settings, data)


@dataclass(frozen=True, slots=True)
class TensorShard(Shard):
    """A task's examples, of which the model itself gives the loss; slopes follow the setting objective."""

    settings: Settings
    examples: Examples

    def __len__(self) -> int:
        return len(self.examples["labels"])

    def _drawn(self, size: int, seed: int, client: int, step: int, purpose: str = "batch") -> Examples:
        chosen = {"seed": seed, "client": client, "step": step, "purpose": purpose}
        return encoding.batch(self.examples, **chosen, batch_size=size, order=self.settings.batch_order)

    def batches(
        self, count: int, size: int, *, seed: int, client: int, step: int, purpose: str = "batch"
    ) -> Sequence[Batch]:
        """Slices of what the step draws."""
        drawn = self._drawn(count * size, seed, client, step, purpose)
        return [{name: tensor[i * size : (i + 1) * size] for name, tensor in drawn.items()} for i in range(count)]

    def of_queries(self, model: nn.Module, queries: int, size: int, *, seed: int, client: int, step: int) -> Batch:
        """What the step draws, split; hidden states are made `size` examples at a time, as the passes read them."""
        drawn = self._prepared(model, self._drawn(queries * size, seed, client, step), size)
        return {name: tensor.unflatten(0, (queries, -1)) for name, tensor in drawn.items()}

    def prepared(self, model: nn.Module, batch: Batch) -> Batch:
        """With the hidden states of frozen layers, where they are kept."""
        return self._prepared(model, batch, 0)

    def _prepared(self, model: nn.Module, batch: Examples, at_once: int) -> Examples:
        if ":" in self.settings.objective:  # a function of the user's may call the model as it likes
            return batch
        return metrics.filled(model, batch, self.settings.forward_dtype, at_once=at_once, of=len(self))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own, whatever the objective."""
        return metrics.loss_of(model, batch, self.settings.forward_dtype)

    def measured(self, model: nn.Module, batch: Batch | None) -> Loss:
        """Of the setting objective."""
        settings = self.settings
        if settings.objective in TEXT_OBJECTIVES:
            return generation.TextLoss(settings, model, batch)
        how = (settings.forward_dtype, settings.objective)
        if batch is None:
            return lambda own: metrics.loss_of(model, own, *how)
        return lambda: metrics.loss_of(model, batch, *how)
