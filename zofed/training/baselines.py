"""What no learning gives, beside every result, on the very examples that evaluations read.

The base weights as they are; with one threshold on their scores, since a lean to one label is no knowledge; with solved
examples before each prompt; the most frequent label; uniform guesses.
"""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zofed.base import log
from zofed.base.errors import UserError
from zofed.base.parsing import from_json
from zofed.core import metrics
from zofed.data import encoding, prompts
from zofed.models import limits
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training.task import Task

FITTED_ON = 256  # training documents that a threshold is fitted on, at most
SHOTS = 8  # solved examples before each prompt
SWEEPS = 8  # over the classes; two have their best threshold after one
KEPT = "baselines.json"


def keep(task: Task, model: nn.Module, folder: RunFolder) -> None:
    """Measure what takes passes of the base weights, once a run, and keep it in the run's folder.

    model: at the base weights. A run that goes on finds it there.
    """
    if task.settings.baselines and task.type.base_name and task.type.has_classes and _kept(folder) is None:
        folder.write_text(KEPT, json.dumps(measured(task, model), indent=2) + "\n")


def of(task: Task, folder: RunFolder) -> dict[str, float]:
    """All baselines of a run, by name: losses in nats, and scores; the base weights' are those of its first line."""
    name, found = ("few_shot" if task.settings.shots else task.type.base_name), task.baselines()
    first = next((row for row in read_table(folder.path / "evaluations.csv") if not row["source"]), {})
    if name and first.get("step") == "0":
        measures = [measure for measure in ("loss", *metrics.SCORES) if first.get(measure)]
        found |= {f"{name}_{measure}": float(first[measure]) for measure in measures}
    return found | (_kept(folder) or {})


def _kept(folder: RunFolder) -> dict[str, float] | None:
    """What an earlier process measured; None: nothing, or the file is spoilt."""
    with suppress(OSError, ValueError):
        found: Any = from_json((folder.path / KEPT).read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(type(value) is float for value in found.values()):
            return found
    return None


def measured(task: Task, model: nn.Module) -> dict[str, float]:
    """The baselines of the base weights that evaluations do not give, of a task whose prompts have classes."""
    log.tell("baselines: the untrained model, with a threshold and with solved examples before each prompt")
    found: dict[str, float] = {}
    if not any(document.candidates for document in task.held_out):  # else a class is but a place in a row's list
        found["threshold_accuracy"] = _with_threshold(task, model)
    if task.settings.shots:  # the run's own prompts have them already
        return found
    try:
        found |= {f"few_shot_{name}": value for name, value in _few_shot(task, model).items()}
    except UserError as error:
        print(f"baselines: no few-shot score: {error}", flush=True)
    return found


def _with_threshold(task: Task, model: nn.Module) -> float:
    """Accuracy of the base weights with a bias a class that fits the training data best."""
    some = encoding.sample(len(task.train), FITTED_ON, task.settings.seed).tolist()
    fitted_on = task.examples([task.train[at] for at in some], cache=False)
    biases = fitted_biases(_logits(model, fitted_on), fitted_on["labels"])
    held_out = task.held_out_sample.examples
    guesses = (_logits(model, held_out) + biases).argmax(-1)
    return float((guesses == held_out["labels"]).double().mean())


def _logits(model: nn.Module, examples: encoding.Examples) -> Tensor:
    logits = metrics.outcomes(model, examples)[1]
    assert logits is not None, "a task with classes has logits"
    return logits


def fitted_biases(logits: Tensor, labels: Tensor) -> Tensor:
    """What to add to each class's logit for the highest accuracy: float32 (classes,), the first class's 0.

    logits: float (n, classes); labels: int64 (n,). One class after the other gets the best bias beside the others'; of
    several as good ones that in the middle. Of two classes this is the best of all thresholds.
    """
    biases = torch.zeros(logits.shape[1])
    hits = int(((logits + biases).argmax(-1) == labels).sum())
    for _ in range(SWEEPS):
        before = hits
        for own in range(1, logits.shape[1]):
            others = (logits + biases).clone()
            others[:, own] = -torch.inf
            margins = (others.max(-1).values - logits[:, own]).sort().values  # above one of them the class is taken
            steps = torch.cat([margins[:1] - 1.0, (margins[1:] + margins[:-1]) / 2, margins[-1:] + 1.0])
            tried = others.unsqueeze(0).repeat(len(steps), 1, 1)
            tried[:, :, own] = logits[:, own] + steps[:, None]
            right = (tried.argmax(-1) == labels).sum(1)
            if int(right.max()) > hits:
                hits = int(right.max())
                best = (right == hits).nonzero()[:, 0]
                biases[own] = steps[best[len(best) // 2]]
        if hits == before:
            break
    return biases


def _few_shot(task: Task, model: nn.Module) -> dict[str, float]:
    """Scores of the base weights where solved training documents stand before each prompt, the same before all.

    Raises UserError where they do not fit what the model reads, or where rows are so much longer than block-size that
    the run cuts that it would take many times the run's own tokens.
    """
    settings = task.settings
    count = min(SHOTS, len(task.train) - 1)
    shown = tuple(prompts.drawn(task.train, count, settings.seed)[1])
    longest, need = limits.positions(model), replace(task, demonstrations=shown).block_for(task.scored_documents)
    if longest is not None and need > longest:
        raise UserError(f"{count} solved examples before a prompt take up to {need:,} tokens, the model {longest:,}")
    if need > (count + 1) * settings.block_size:
        raise UserError(
            f"{count} solved examples before a prompt take up to {need:,} tokens, more than {count + 1} times "
            f"block-size = {settings.block_size}, which cuts the rows"
        )
    wider = replace(task, settings=settings.model_copy(update={"block_size": need}), demonstrations=shown)
    examples = wider.examples(task.scored_documents, cache=False)
    loss, logits = metrics.outcomes(model, examples, batch_size=8)
    assert logits is not None, "a task with classes has logits"
    score = metrics.score_of_classes(loss, logits, examples["labels"])
    return score.columns()
