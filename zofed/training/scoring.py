"""A model scored again, and not trained further: a run's, on what scored the run or on other data; or any saved one."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.config import Settings, resolve
from zofed.core import metrics
from zofed.models import spec
from zofed.runs.run_folder import RunFolder
from zofed.training.paths import absolute_path, with_absolute_paths
from zofed.training.process import prepare_process
from zofed.training.task import Task

# Settings that decide what is scored and how; any other would be ignored. The seed of a run is its own: it says which
# documents were held out, and draws the parts of a named size that never trained.
OF_A_RUN = (
    "dataset",
    "eval-dataset",
    "eval-examples",
    "held-out-fraction",
    "columns",
    "block-size",
    "tokenizer",
    "device",
    "dtype",
    "threads",
)
OF_A_TASK = ("template", "label-words", "loss-on", "chat-template")
OF_A_MODEL = ("task", *OF_A_TASK, "pooling", "freeze-encoder", "seed", *OF_A_RUN)
OF_THE_BASE = ("model", "revision")  # which a run's best weights are loaded into


@dataclass(frozen=True, slots=True)
class Scored:
    """scores: what was found. data: on what, in words. note: why they are no held-out scores; empty where they are."""

    scores: metrics.Scores
    data: str
    note: str = ""


def score(folder: Path, changes: Mapping[str, Any]) -> Scored:
    """Score a saved model: on all of the data set that `changes` names, else on the held-out part of the default one.

    changes: settings, by key; with held-out the held-out part of the data set. Raises UserError for a setting that
    would change no score, and for two data sets.
    """
    _check(changes, OF_A_MODEL)
    settings = spec.as_saved(resolve({**changes, "model": str(folder)}))
    if named := _named(changes):
        settings = settings.model_copy(update={"dataset": named, "eval_dataset": named})
    return Scored(_scores(settings, changes), _described(settings, changes))


def score_run(path: Path, changes: Mapping[str, Any], *, best: bool = False) -> Scored:
    """Score a run's model as it ended, or (best) at its lowest held-out loss.

    changes: settings, by key, that differ from the run's. A data set named there is scored as a whole, or its held-out
    part where held-out is given too; without one the run is scored on what it was scored on before. Raises UserError
    for a run without a model or without a best checkpoint, for a setting that would change no score, for two data sets,
    and for a held-out part that holds what the run trained on.
    """
    _check(changes, (*OF_A_RUN, *OF_THE_BASE) if best else OF_A_RUN)
    folder = RunFolder.open(path)
    folder.check_has_model()
    own, named = folder.settings(), _named(changes)
    if not best and not folder.model.is_dir():
        raise UserError(f"{folder.path} has no model yet: let the run end, with {folder.go_on()}")
    place = {} if best else {"model": str(folder.model), "revision": ""}
    settings = resolve(own.model_dump(by_alias=True) | dict(changes) | place)
    # The run's own data stay its data set, whose labels' names number those of any other.
    update = {"dataset": own.dataset} | ({"eval_dataset": named} if named else {})
    settings = settings.model_copy(update=update)
    note = _note(own, settings, changes)
    return Scored(_scores(settings, changes, folder if best else None), _described(settings, changes), note)


def _check(changes: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse what would be ignored."""
    if idle := [f"--{key}" for key in changes if key not in known]:
        raise UserError(f"{', '.join(idle)} would change no score here, where only {', '.join(known)} do: leave it out")
    data, eval_data = changes.get("dataset"), changes.get("eval-dataset")
    if data and eval_data:
        raise UserError(f"--dataset {data} and --eval-dataset {eval_data} both name what to score: give one of them")
    if eval_data and "held-out-fraction" in changes:
        raise UserError(
            f"--eval-dataset {eval_data} is scored as a whole: leave out --held-out-fraction, or say --dataset"
        )


def _named(changes: Mapping[str, Any]) -> str:
    """The data set that is to be scored; empty where none is named."""
    return changes.get("dataset") or changes.get("eval-dataset") or ""


def _note(own: Settings, settings: Settings, changes: Mapping[str, Any]) -> str:
    """What the user must know of the documents that a run is scored on. Raises UserError where they cannot be meant."""
    named = _named(changes)
    is_wider = settings.held_out_fraction > own.held_out_fraction
    if not named and settings.eval_dataset:
        if "held-out-fraction" in changes:
            raise UserError(
                f"held-out-fraction = {settings.held_out_fraction:g}, but the run is scored on all of its eval-dataset "
                f"{settings.eval_dataset!r}: leave out --held-out-fraction, or name other data with --dataset"
            )
        return ""
    if not named and not own.eval_dataset and is_wider:
        raise UserError(
            f"held-out-fraction = {settings.held_out_fraction:g} is above the run's {own.held_out_fraction:g}, and it "
            f"trained on the rest: take {own.held_out_fraction:g} or less, or name the data with --dataset to score "
            "all of them"
        )
    is_held_out = not own.eval_dataset and not is_wider and (not named or "held-out-fraction" in changes)
    scored = absolute_path("dataset", named) if named else own.dataset
    if scored == own.bp_dataset or (scored == own.dataset and not is_held_out):
        return "the run trained on documents of these data, so this is no held-out score"
    return ""


def _described(settings: Settings, changes: Mapping[str, Any]) -> str:
    data = _named(changes) or settings.eval_dataset
    if data and not ("held-out-fraction" in changes and _named(changes)):
        return f"all of {data}" if _named(changes) and "eval-examples" not in changes else data
    share = f"held-out-fraction = {settings.held_out_fraction:g}"
    return f"the held-out part of {data or settings.dataset} ({share}, seed {settings.seed})"


def _scores(settings: Settings, changes: Mapping[str, Any], best_of: RunFolder | None = None) -> metrics.Scores:
    """Scores of the settings' model, or of the best weights of a run."""
    prepare_process(settings.threads)
    if _named(changes) and "eval-examples" not in changes:
        settings = settings.model_copy(update={"eval_examples": sys.maxsize})
    share = settings.held_out_fraction if _named(changes) and "held-out-fraction" in changes else 0.0
    task = Task.to_score(with_absolute_paths(settings), share)
    replica = task.replica()
    if best_of:
        tensors, facts = best_of.best()
        weights = {key.removeprefix("weight/"): tensor for key, tensor in tensors.items()}
        replica.load(weights, replica.state_dict(), round_=facts["round"], head=replica.head)
    return task.evaluate(replica.model)
