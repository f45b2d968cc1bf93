"""How good a model is on examples it never trained on, and what knowing nothing would score."""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.core import candidates, packed, trunk
from zofed.core.devices import input_device
from zofed.core.perturbation_mode import in_pieces
from zofed.core.perturbed import each_tensor

Examples = dict[str, Tensor]

SCORE = "accuracy"  # of the measures the one that people rank models by, where a task has it
SCORES = ("accuracy", "exact_match", "token_f1", "rouge_l", "auc", "f1")  # between 0 and 1, the higher the better
MEASURES = ("loss", "perplexity", "bits_per_byte", "accuracy", "f1", "auc", "exact_match", "token_f1", "rouge_l")
IGNORED_LABEL = -100  # of a token or document that no loss counts


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss in nats (per predicted token, or per document of a classifier), and what else it is worth.

    accuracy, f1, auc: of a classifier; f1 is the mean of F1 over the classes that occur among labels or predictions,
    auc the area under the curve of two classes. bytes_per_token: UTF-8 bytes of text that a predicted token stands for,
    of a language model. is_per_token: whether the loss is; so it is where that is known. exact_match, token_f1,
    rouge_l: means over generated answers. own: what a person's own function says beside the loss, by name.
    """

    loss: float
    accuracy: float | None = None
    f1: float | None = None
    bytes_per_token: float | None = None
    is_per_token: bool = False
    auc: float | None = None
    exact_match: float | None = None
    token_f1: float | None = None
    rouge_l: float | None = None
    own: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """exp(loss) of a language model or of responses; infinite where float64 cannot hold it."""
        if self.bytes_per_token is None and not self.is_per_token:
            return None
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of text: comparable between tokenizers. None where the tokens stand for no text."""
        return self.loss / math.log(2) / self.bytes_per_token if self.bytes_per_token else None

    def columns(self) -> dict[str, float]:
        """All that is known and finite, by the names of MEASURES: what files can hold."""
        found = {name: getattr(self, name) for name in MEASURES}
        return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}

    def row(self) -> dict[str, Any]:
        """The columns, and the person's own measures as JSON, for a table."""
        return self.columns() | ({"metrics": json.dumps(dict(self.own))} if self.own else {})


def losses_among(baselines: Mapping[str, float]) -> dict[str, float]:
    """Those of the baselines that are losses, in nats: not the scores."""
    return {name: value for name, value in baselines.items() if not name.endswith(SCORES)}


def scores_among(baselines: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Those of the baselines that are scores, by what was scored (`zero_shot`) and measure (`accuracy`)."""
    found: dict[str, dict[str, float]] = {}
    for name, value in baselines.items():
        measure = next((score for score in SCORES if name.endswith(f"_{score}")), None)
        if measure:
            found.setdefault(name.removesuffix(f"_{measure}"), {})[measure] = value
    return found


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of the held-out data was scored: `examples` of `held_out`, `sources` apart of `of_sources`.

    of_sources: 0 where all documents are of one source, which is then not scored apart.
    """

    examples: int
    held_out: int
    sources: int = 0
    of_sources: int = 0

    def __str__(self) -> str:
        told = f"{self.examples:,} of {self.held_out:,} examples"
        if self.sources == self.of_sources:
            return told
        return f"{told}; {self.sources} of {self.of_sources:,} sources apart, those of most documents"


@dataclass(frozen=True, slots=True)
class Answered:
    """What a model wrote after a prompt, and what was wanted."""

    prompt: str
    answer: str
    wanted: str


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found: of all sources together, and of each source by its name, which may be any text.

    answered: the prompts that were answered, where the task has any.
    """

    whole: Score
    sources: Mapping[str, Score]
    coverage: Coverage
    answered: tuple[Answered, ...] = ()


def loss_of(model: nn.Module, batch: Examples, forward_dtype: str = "weights", objective: str = "loss") -> Tensor:
    """What a batch is scored by, to be lowered: a scalar, float32 for the model's own losses.

    forward_dtype: `weights`, or `bfloat16` for passes in autocast. objective: `loss`, the mean cross-entropy as the
    model defines it; `accuracy` or `f1`, as 1 - score; or `module:function`, called with (model, batch). Raises
    UserError for a function that cannot be found.
    """
    with ready(model, batch, forward_dtype) as there:
        if ":" in objective:
            return _function(objective)(model, there)
        output = output_of(model, there)
        if objective == "loss":
            return output.loss
        return _missed(output.logits, there["labels"], objective)


@contextmanager
def ready(model: nn.Module, batch: Any, forward_dtype: str = "weights") -> Iterator[Any]:
    """The batch, nested as it may be, where the model reads it, and the type of its passes."""
    device = input_device(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=forward_dtype == "bfloat16"):
        yield each_tensor(batch, lambda tensor: tensor.to(device))


def output_of(model: nn.Module, batch: Examples) -> Any:
    """Loss and logits of a batch on the model's device: the model's own, or those of a prompt's candidates."""
    with trunk.reused(model, batch) as rest:
        if packed.KEY in rest:
            return packed.output(model, rest)
        return candidates.output(model, rest) if candidates.KEY in rest else model(**rest)


def filled(
    model: nn.Module, batch: Examples, forward_dtype: str = "weights", *, at_once: int = 0, of: int = 0
) -> Examples:
    """The batch with what the model's frozen layers make of its examples, where that is kept: see `trunk.filled`."""

    def run(some: Examples) -> Any:
        with ready(model, some, forward_dtype) as there:
            return output_of(model, there)

    return trunk.filled(model, batch, run, variant=forward_dtype, at_once=at_once, of=of)


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
    """1 - accuracy or 1 - mean F1 of the predictions; a language model predicts the next token.

    Labels of -100 do not count, as in the loss.
    """
    if labels.dim() > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    found, counts = logits.argmax(-1), labels != IGNORED_LABEL
    if objective == "accuracy":
        return 1.0 - ((found == labels) & counts).sum() / counts.sum().to(torch.float32)
    classes = torch.arange(logits.shape[-1], device=labels.device)
    is_found = (found.flatten()[:, None] == classes) & counts.flatten()[:, None]
    return 1.0 - _mean_f1(is_found, labels.flatten()[:, None] == classes)


def _mean_f1(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean F1 over the classes that occur, from memberships: bool (n, classes) each."""
    hits, total = (found & wanted).sum(0), found.sum(0) + wanted.sum(0)
    occurs = total > 0
    return ((2.0 * hits / total.clamp(min=1)) * occurs).sum() / occurs.sum()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    batch_size: int = 32,
    bytes_per_token: float | None = None,
    empty: Examples | None = None,
) -> Score:
    """Score on all of the examples, in batches of `batch_size`, with dropout off whatever mode the model is in.

    Every predicted token (of a classifier: every document) counts the same, whichever batch it falls in; labels of
    -100 do not count. bytes_per_token: of the predicted tokens, for a language model. empty: the candidates of each of
    the examples, or once of all, behind a prompt without content; their scores there are subtracted where a class is
    predicted. Raises UserError where the examples predict nothing.
    """
    loss, logits = outcomes(model, examples, batch_size, empty)
    if logits is None:
        return Score(loss, bytes_per_token=bytes_per_token, is_per_token=True)
    return score_of_classes(loss, logits, examples["labels"])


@torch.no_grad()
def outcomes(
    model: nn.Module, examples: Examples, batch_size: int = 32, empty: Examples | None = None
) -> tuple[float, Tensor | None]:
    """Mean loss of all of the examples, as `evaluate` says; and of documents with a label the logits (n, classes).

    empty: as there. Logits of a batch without a label that counts are zero. Raises UserError where the examples predict
    nothing.
    """
    device = input_device(model)
    has_classes = examples["labels"].dim() == 1
    losses, count = 0.0, 0
    found: list[Tensor | int] = []  # a batch's logits, or how many examples it leaves out
    with without_dropout(model):
        for batch in _batches(examples, batch_size):
            predicted = int((predicted_labels(batch["labels"]) != IGNORED_LABEL).sum())
            if predicted == 0:  # its mean is 0/0
                found.append(len(batch["labels"]))
                continue
            with in_pieces():
                filled_batch = filled(model, batch, of=len(examples["labels"]))
                output = output_of(model, {name: tensor.to(device) for name, tensor in filled_batch.items()})
            losses += float(output.loss) * predicted
            count += predicted
            if has_classes:
                found.append(output.logits.float().cpu())
    if count == 0:
        raise UserError(f"{len(examples['labels'])} examples hold no token to predict: score data that have some")
    if not has_classes:
        return losses / count, None
    classes = next(logits.shape[1] for logits in found if isinstance(logits, Tensor))
    whole = [logits if isinstance(logits, Tensor) else torch.zeros(logits, classes) for logits in found]
    logits = torch.cat(whole)
    if empty is not None:
        less = outcomes(model, empty, batch_size)[1]
        assert less is not None, "candidates have scores"
        logits = candidates.calibrated(logits, less)
    return losses / count, logits


def score_of_classes(loss: float, logits: Tensor, labels: Tensor) -> Score:
    """What logits (n, classes) are worth, the highest being what is predicted; labels of -100 do not count."""
    counts = labels != IGNORED_LABEL
    logits, labels = logits[counts], labels[counts]
    guesses = logits.argmax(-1)
    classes = torch.arange(int(max(guesses.max(), labels.max())) + 1)
    f1 = _mean_f1(guesses[:, None] == classes, labels[:, None] == classes)
    accuracy = float((guesses == labels).double().mean())
    area = auc(logits[:, 1].double() - logits[:, 0].double(), labels == 1) if logits.shape[1] == 2 else None
    return Score(loss, accuracy, float(f1), auc=area)


def auc(scores: Tensor, positive: Tensor) -> float | None:
    """Area under the curve: the share of pairs of a positive and another whose positive has the higher score.

    scores: float (n,); positive: bool (n,). Equal scores count half (Mann and Whitney, 1947). None where all are of one
    class, or a score is no number.
    """
    above, below = scores[positive].double(), scores[~positive].double().sort().values
    if not len(above) or not len(below) or bool(scores.isnan().any()):
        return None
    wins = torch.searchsorted(below, above) + torch.searchsorted(below, above, right=True)
    return float(wins.sum()) / (2.0 * len(above) * len(below))


def predicted_labels(labels: Tensor) -> Tensor:
    """What a model predicts of labels: of a language model's, (n, block), all but the first of each block."""
    return labels[:, 1:] if labels.dim() > 1 else labels


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; each of its modules is then again in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(examples: Examples, batch_size: int) -> Iterator[Examples]:
    for start in range(0, len(examples["labels"]), batch_size):
        yield {name: tensor[start : start + batch_size] for name, tensor in examples.items()}


def class_baselines(train_labels: Tensor, held_out_labels: Tensor, classes: int) -> dict[str, float]:
    """Losses (nats) and accuracy of guessing without reading: uniformly, or by the training labels' frequencies."""
    frequencies = (torch.bincount(train_labels, minlength=classes) + 1).double()
    frequencies /= frequencies.sum()
    return {
        "uniform": math.log(classes),
        "prior": float(-frequencies.log()[held_out_labels].mean()),
        "majority_accuracy": float((held_out_labels == frequencies.argmax()).double().mean()),
    }
