"""Every setting in one schema, for the command line, TOML files and Flower; and what is wrong with some values."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from zofed.base import torchrun
from zofed.base.errors import UserError
from zofed.config import suited
from zofed.config.federation_sections import Aggregation, Federation, Machine, Output
from zofed.config.fields import CENTRAL, FEDERATED, Condition, Section, Unlike, kebab, limit_told, traits
from zofed.config.names import LONGEST_SHOWN, RENAMED, unknown, unknown_of_many
from zofed.config.task_section import Task
from zofed.config.training_sections import (
    Backpropagation,
    Data,
    Instruct,
    Model,
    Optimizer,
    Run,
    Subspace,
    ZerothOrder,
)
from zofed.core import kinds
from zofed.core.kinds import OptimizerName

TEXT_OBJECTIVES = ("exact-match", "token-f1", "rouge-l")  # of the answers that a model generates
SINKS = ("tensorboard", "wandb", "trackio", "mlflow")
OBJECTIVES = ("loss", "accuracy", "f1", *TEXT_OBJECTIVES)
# By name, in the order in which a person meets them.
SECTIONS: dict[str, type[Section]] = {
    "run": Run,
    "model": Model,
    "task": Task,
    "data": Data,
    "zeroth-order": ZerothOrder,
    "optimizer": Optimizer,
    "backpropagation": Backpropagation,
    "instruct": Instruct,
    "subspace": Subspace,
    "federation": Federation,
    "aggregation": Aggregation,
    "output": Output,
    "machine": Machine,
}


class Settings(
    Machine,
    Output,
    Aggregation,
    Federation,
    Subspace,
    Instruct,
    Backpropagation,
    Optimizer,
    ZerothOrder,
    Data,
    Task,
    Model,
    Run,
):
    """The settings of one run. The fields of the last base come first."""

    @field_validator("mode", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _chosen(self) -> "Settings":
        """A run knows its optimizer and its rate by name and number, so that no later version chooses others."""
        return _choose(self)

    @property
    def step_rule(self) -> OptimizerName:
        """The optimizer, chosen."""
        assert self.optimizer != "auto"
        return self.optimizer

    def steps_told(self) -> str:
        """One line for people: how steps are made."""
        return f"steps: {self.mode} by {self.optimizer}, learning-rate {self.learning_rate:g}, {self.schedule}"


def _choose(settings: Settings) -> Settings:
    """The settings themselves, in which what is left to choose is chosen."""
    for key, choose in suited.CHOSEN.items():  # in this order: the rate is that of the optimizer
        if getattr(settings, _attribute(key)) == SETTINGS[key].default:
            object.__setattr__(settings, _attribute(key), choose(settings))
    return settings


SETTINGS: dict[str, FieldInfo] = {kebab(name): field for name, field in Settings.model_fields.items()}


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version wrote down by the names of its settings, by those of today; other keys as they are."""
    return {RENAMED.get(key, key): _present_value(key, value) for key, value in values.items()}


def _present_value(key: str, value: Any) -> Any:
    """What a setting with another name than today's said, as it is said today."""
    if key == "tensorboard" and isinstance(value, bool):
        return "tensorboard" if value else ""
    return value


def sinks_of(settings: Settings) -> list[str]:
    """What `report-to` names, each once."""
    return list(dict.fromkeys(name for part in settings.report_to.split(",") if (name := part.strip())))


def validated(values: Mapping[str, Any]) -> Settings:
    """The settings that `values` (kebab-case keys; `task` is a type) and the defaults give.

    Raises UserError, one line that names every wrong key or value with its limit and remedy.
    """
    try:
        settings = Settings.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None
    if clashes := _clashes(settings):
        raise UserError("; ".join(clashes))
    return settings


def _clashes(settings: Settings) -> list[str]:
    """What is wrong with settings that are each within their limits."""
    found = []
    if settings.schedule == "cosine" and settings.min_learning_rate > settings.learning_rate:
        found.append(
            f"min-learning-rate = {settings.min_learning_rate:g} is above learning-rate = {settings.learning_rate:g}: "
            "lower it"
        )
    if settings.objective not in OBJECTIVES and not re.fullmatch(r"[\w.]+:\w+", settings.objective):
        found.append(f"{unknown(settings.objective, list(OBJECTIVES), 'objective')}, or module:function")
    if settings.objective != "loss" and settings.mode != "zo":
        found.append(f"objective = {settings.objective!r} takes mode = zo: backprop follows the loss alone")
    if settings.objective in TEXT_OBJECTIVES and not _has_responses(settings):
        found.append(
            f"objective = {settings.objective!r} scores generated responses: it takes task = instruction, loss-on = "
            "response and packing = false"
        )
    found += [
        f"report-to: {unknown(name, list(SINKS), 'dashboard')}" for name in sinks_of(settings) if name not in SINKS
    ]
    if settings.devices and settings.mode != "zo":
        found.append(f"devices = {settings.devices!r} takes mode = zo: {settings.mode} runs on one; set device")
    if settings.placement == "auto" and (settings.devices or settings.device != "auto"):
        key = "devices" if settings.devices else "device"
        found.append(
            f"placement = 'auto' takes all GPUs of this machine, not {key} = {getattr(settings, key)!r}: leave {key} "
            "out, or set placement to none"
        )
    if settings.adapter != "none" and settings.freeze_encoder:
        found.append(
            f"adapter = {settings.adapter!r} trains inside the encoder, which freeze-encoder = true freezes: leave one "
            "out"
        )
    if settings.bp_dataset and settings.bp_data_fraction:
        found.append("bp-dataset and bp-data-fraction both say where backprop's data come from: leave one out")
    if settings.mode == "instruct":
        if settings.instruct_blend and settings.instruct_weighting == "raw":
            found.append(
                "instruct-blend = true takes a gradient and an estimate in one unit: set instruct-weighting to "
                "projected or unbiased, or instruct-blend to false"
            )
        if settings.instruct_weighting == "unbiased" and settings.queries < 2:
            found.append(f"instruct-weighting = 'unbiased' takes 2 queries or more, not {settings.queries}")
        if settings.dtype == "bfloat16":
            found.append("mode = 'instruct' shifts weights by less than bfloat16 can hold: set dtype to float32")
    if settings.mode == "subspace":
        if settings.clip_norm:
            found.append(f"clip-norm = {settings.clip_norm:g}: a subspace has no gradient to clip; leave it out")
        side = math.isqrt(settings.subspace_size)
        if settings.subspace_variant == "core" and side * side != settings.subspace_size:
            found.append(
                f"subspace-size = {settings.subspace_size} is no square, as the variant core needs: take {side**2} or "
                f"{(side + 1) ** 2}"
            )
        if settings.subspace_variant == "diagonal" and not kinds.terms(settings.directions):
            found.append(f"directions = {settings.directions!r} have no factors to train along: take rank1")
    return found


def _has_responses(settings: Settings) -> bool:
    """Whether a batch of the run tells each prompt from the response to it."""
    return settings.task == "instruction" and settings.loss_on == "response" and not settings.packing


def without_effect(settings: Settings, keys: Iterable[str], run: str = "") -> list[str]:
    """A sentence for each of the keys whose setting has no effect beside the others, with what makes it act.

    run: how the settings are run, CENTRAL or FEDERATED; empty: it is not known, and no condition fails by it.
    """
    found = []
    for key in keys:
        field = SETTINGS[key]
        alternatives = traits(field).acts_when
        if alternatives and not any(_holds(condition, settings, run) for condition in alternatives):
            value = _written(getattr(settings, _attribute(key)))
            words = ", or with ".join(map(_in_words, alternatives))
            found.append(f"{key} = {value} has no effect here: it acts with {words}")
    return found


def _attribute(key: str) -> str:
    return key.replace("-", "_")


def _holds(condition: Condition, settings: Settings, run: str) -> bool:
    around = {"run": run, "ranks": torchrun.place().world > 1}

    def holds(name: str, wanted: Any) -> bool:
        value = around[name] if name in around else getattr(settings, name)
        if isinstance(wanted, Unlike):
            return value not in wanted.values
        return value in wanted if isinstance(wanted, tuple) else value == wanted

    return all(holds(name, wanted) for name, wanted in condition.items() if name != "run" or run)


def _in_words(condition: Condition) -> str:
    ways = {CENTRAL: "zofed train", FEDERATED: "a federation (zofed simulate, zofed run, flwr run)"}

    def words(name: str, wanted: Any) -> str:
        if name == "run":
            return ways[wanted]
        if name == "ranks":
            return "torchrun"
        if isinstance(wanted, Unlike):
            return f"{kebab(name)} other than {' or '.join(map(_written, wanted.values))}"
        return f"{kebab(name)} = {' or '.join(map(_written, wanted if isinstance(wanted, tuple) else (wanted,)))}"

    return " and ".join(words(*pair) for pair in condition.items())


def _written(value: Any) -> str:
    """A value as a person types it."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if value == "" else f"{value}"


def changed(settings: Settings) -> list[str]:
    """Keys of the settings that are not at their defaults, nor as they are chosen where nobody gives them."""
    chosen = {key: choose(settings) for key, choose in suited.CHOSEN.items()}
    values = {key: getattr(settings, _attribute(key)) for key in SETTINGS}
    return [key for key, value in values.items() if value not in (SETTINGS[key].default, chosen.get(key))]


def in_mode(settings: Settings, mode: str) -> Settings:
    """The same in another mode, for which what nobody gave is chosen anew."""
    names = map(_attribute, suited.CHOSEN)
    anew = {name: SETTINGS[kebab(name)].default for name in names if name not in settings.model_fields_set}
    return settings if mode == settings.mode else _choose(settings.model_copy(update=anew | {"mode": mode}))


def _explain(problem: Any) -> str:
    if not problem["loc"]:  # of a key that is no text
        return unknown_setting(ascii(problem["input"])[1:-1])
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return unknown_setting(key)
    field = SETTINGS[key]
    given = repr(problem["input"])
    given = given if len(given) <= LONGEST_SHOWN else f"{given[:LONGEST_SHOWN]}... ({len(given)} characters)"
    return f"{key} = {given}: {limit_told(problem)}; the default is {field.default!r} ({field.description})"


def unknown_setting(key: str) -> str:
    """The sentence for a key that is no setting: its present name, what was meant, or where all of them are listed."""
    return unknown_of_many(key, SETTINGS, "setting", "zofed settings lists all")


def pinned(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a run's steps are, by key; the length too where the rate follows it."""
    lengths = ("steps", "rounds", "epochs") if settings.schedule == "cosine" else ()
    values = settings.model_dump(by_alias=True)
    return {key: value for key, value in values.items() if traits(SETTINGS[key]).pins or key in lengths}
