"""How good a model is on examples it never trained on, and what knowing nothing would score."""

import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from zofed.errors import UserError
from zofed.perturbed import in_pieces

Examples = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss in nats (per predicted token, or per document of a classifier), and what else it is worth.

    accuracy, f1: of a classifier; f1 is the mean of the classes' F1. bytes_per_token: of a language model's text.
    """

    loss: float
    accuracy: float | None = None
    f1: float | None = None
    bytes_per_token: float | None = None

    @property
    def perplexity(self) -> float | None:
        """exp(loss), of a language model."""
        return None if self.bytes_per_token is None else math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of text: comparable between tokenizers."""
        return None if self.bytes_per_token is None else self.loss / math.log(2) / self.bytes_per_token

    def columns(self) -> dict[str, float]:
        """All that is known, by name."""
        names = ("loss", "perplexity", "bits_per_byte", "accuracy", "f1")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


def loss_of(model: nn.Module, batch: Examples, forward_dtype: str = "weights", objective: str = "loss") -> Tensor:
    """What a batch is scored by, to be lowered: a scalar, float32 for the model's own losses.

    forward_dtype: `weights`, or `bfloat16` for passes in autocast. objective: `loss`, the mean cross-entropy as the
    model defines it; `accuracy` or `f1`, as 1 - score; or `module:function`, called with (model, batch). Raises
    UserError for a function that cannot be found.
    """
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=forward_dtype == "bfloat16"):
        if ":" in objective:
            return _function(objective)(model, batch)
        output = model(**batch)
        if objective == "loss":
            return output.loss
        return _missed(output.logits, batch["labels"], objective)


@cache
def _function(objective: str) -> Callable[[nn.Module, Examples], Tensor]:
    module, name = objective.split(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"objective = {objective!r} cannot be loaded ({error}): name a function of (model, batch) in a module that "
            "Python finds, for instance through PYTHONPATH"
        ) from error


def _missed(logits: Tensor, labels: Tensor, objective: str) -> Tensor:
    """1 - accuracy or 1 - mean F1 of the predictions; a language model predicts the next token."""
    if labels.dim() > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    found = logits.argmax(-1)
    if objective == "accuracy":
        return 1.0 - (found == labels).to(torch.float32).mean()
    classes = torch.arange(logits.shape[-1], device=labels.device)
    return 1.0 - _mean_f1((found.flatten()[:, None] == classes), (labels.flatten()[:, None] == classes))


def _mean_f1(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean F1 over the classes that occur, from memberships: bool (n, classes) each."""
    hits, total = (found & wanted).sum(0), found.sum(0) + wanted.sum(0)
    occurs = total > 0
    return ((2.0 * hits / total.clamp(min=1)) * occurs).sum() / occurs.sum()


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Examples, limit: int, batch_size: int = 32, bytes_per_token: float | None = None
) -> Score:
    """Score on the first `limit` examples, in batches of `batch_size`; every example counts the same."""
    device = next(model.parameters()).device
    classifier = examples["labels"].dim() == 1
    losses = 0.0
    found, count = [], min(limit, len(examples["labels"]))
    for batch in _batches(examples, count, batch_size):
        with in_pieces():
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        losses += float(output.loss) * len(batch["labels"])
        if classifier:
            found.append(output.logits.argmax(-1).cpu())
    if not classifier:
        return Score(losses / count, bytes_per_token=bytes_per_token)
    predicted, labels = torch.cat(found), examples["labels"][:count]
    classes = torch.arange(int(max(predicted.max(), labels.max())) + 1)
    f1 = _mean_f1(predicted[:, None] == classes, labels[:, None] == classes)
    return Score(losses / count, float((predicted == labels).double().mean()), float(f1))


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
