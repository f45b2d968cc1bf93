"""How good a model is on examples it never trained on, and what knowing nothing would score."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zofed.perturbed import in_pieces

Examples = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss in nats (per predicted token, or per document of a classifier) and, for a classifier, accuracy."""

    loss: float
    accuracy: float | None = None


def loss_of(model: nn.Module, batch: Examples, forward_dtype: str = "weights") -> Tensor:
    """The mean cross-entropy of a batch, as the model's own loss defines it: float32 scalar.

    forward_dtype: `weights`, or `bfloat16` for passes in autocast.
    """
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=forward_dtype == "bfloat16"):
        return model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, limit: int, batch_size: int = 32) -> Score:
    """Score on the first `limit` examples, in batches of `batch_size`; every example counts the same."""
    device = next(model.parameters()).device
    classifier = examples["labels"].dim() == 1
    losses = hits = 0.0
    count = min(limit, len(examples["labels"]))
    for batch in _batches(examples, count, batch_size):
        with in_pieces():
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        losses += float(output.loss) * len(batch["labels"])
        if classifier:
            hits += int((output.logits.argmax(-1).cpu() == batch["labels"]).sum())
    return Score(losses / count, hits / count if classifier else None)


def _batches(examples: Examples, count: int, batch_size: int) -> Iterator[Examples]:
    for start in range(0, count, batch_size):
        yield {name: tensor[start : min(start + batch_size, count)] for name, tensor in examples.items()}


def class_baselines(train_labels: Tensor, held_out_labels: Tensor, classes: int) -> dict[str, float]:
    """Losses (nats) and accuracy of guessing without reading: uniformly, or by the training labels' frequencies."""
    frequencies = (torch.bincount(train_labels, minlength=classes) + 1).double()
    frequencies /= frequencies.sum()
    return {
        "uniform": math.log(classes),
        "prior": float(-frequencies.log()[held_out_labels].mean()),
        "majority_accuracy": float((held_out_labels == frequencies.argmax()).double().mean()),
    }
