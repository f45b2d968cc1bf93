"""Settings of a run that trains a module of a person's own: those that a task's settings would say, their code says."""

from collections.abc import Mapping
from typing import Any

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings

KEY = "own"  # of a genesis that describes a module by nothing but the name of what makes it
PREFIX = "zofed."  # of the settings among an app's run configuration
# Sections whose settings make a model and examples of a task, and those of them that act all the same.
OF_TASKS = {"model": ("scope", "forward-dtype"), "task": (), "data": ("batch-size",)}
MORE = {
    "objective": "loss",
    "bp-dataset": "data",
    "bp-data-fraction": "data",
    "gradient-source": "data",
    "partition": "data",
    "dirichlet-alpha": "data",
    "eval-dataset": "held_out",
    "max-tokens": "data",
    "hidden-states-gigabytes": "model",
    "placement": "model",
}


def said_by_code() -> dict[str, str]:
    """The settings that have no meaning for a module of one's own, by key: which argument says it instead."""
    found = {}
    for section, kept in OF_TASKS.items():
        keys = [config.kebab(name) for name in config.SECTIONS[section].model_fields]
        argument = {"model": "model", "task": "loss", "data": "data"}[section]
        found |= dict.fromkeys((key for key in keys if key not in kept), argument)
    return found | MORE


def among(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of zofed in an app's run configuration, where they stand behind PREFIX, by key."""
    return {key.removeprefix(PREFIX): value for key, value in run_config.items() if key.startswith(PREFIX)}


def of(values: Mapping[str, Any], name: str) -> Settings:
    """The settings of a run. values: by key. name: of what makes the module.

    Raises UserError for a setting that is unknown, beyond its limits or said by the person's code.
    """
    instead = said_by_code()
    if wrong := [key for key in values if key in instead]:
        key = wrong[0]
        raise UserError(
            f"{PREFIX}{key} = {values[key]!r} has no meaning for a module of your own: the argument {instead[key]} "
            "says it, so leave it out"
        )
    settings = config.resolve(values)
    # What a run's files tell people of the model and the data; nothing reads them by these names.
    told = {"model": name, "dataset": KEY, "tokenizer": KEY, "hidden_states_gigabytes": 0.0}
    return settings.model_copy(update=told)
