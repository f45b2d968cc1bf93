"""Task files: what a model is tuned for, by a name. Settings, no code.

    about = "one line: the task"
    source = "where the template comes from"
    licence = "of the data"
    task = "prompt"                          # the type
    dataset = "sst2"                         # a name of zofed data list, or a path relative to this file
    template = "{{ sentence }} It was"
    label-words = " terrible, great"

`task = NAME` or `task = FILE.toml`, wherever settings stand, means the settings of that file; what a person gives
beside it wins. It is put in their place before they are checked, so that a run knows the settings alone.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from zofed.base.errors import UserError
from zofed.base.files import shipped
from zofed.config.fields import kebab
from zofed.config.settings import LONGEST_SHOWN, SETTINGS, Settings, unknown, validated, without_effect
from zofed.config.task_section import Task
from zofed.config.toml import read_toml

SHIPPED = shipped("tasks")
TYPES: tuple[str, ...] = get_args(Task.model_fields["task"].annotation)
ABOUT = ("about", "source", "licence")  # for people
DATA = ("dataset", "eval-dataset")
KEYS = (*map(kebab, Task.model_fields), *DATA, "held-out-fraction", "block-size")  # settings a task file may hold
SUFFIX = ".toml"


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task by name. settings: by key, `task` its type, paths absolute. about, source, licence: for people."""

    name: str
    path: Path
    settings: dict[str, Any]
    about: str = ""
    source: str = ""
    licence: str = ""


def names() -> list[str]:
    """The tasks that ship."""
    return sorted(path.stem for path in SHIPPED.glob(f"*{SUFFIX}"))


def is_file(task: object) -> bool:
    """Whether a value of the setting `task` means a task file, there or not; no type does."""
    return isinstance(task, str) and task not in TYPES


def find(task: str) -> Path:
    """The file of that path, which ends in .toml, or of the shipped task of that name. Raises UserError for neither."""
    shown = repr(task) if len(task) <= LONGEST_SHOWN else f"{task[:LONGEST_SHOWN]!r}... ({len(task)} characters)"
    if task in names():
        return SHIPPED / f"{task}{SUFFIX}"
    if task.endswith(SUFFIX):
        path = Path(os.path.expanduser(task)).absolute()
        if os.path.isfile(path):
            return path
        place = f" {str(path)!r}" if len(task) <= LONGEST_SHOWN else ""
        raise UserError(f"task = {shown}: there is no such file{place}; name a task file, or a task of zofed tasks")
    close = difflib.get_close_matches(task[:LONGEST_SHOWN], [*names(), *TYPES], n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"unknown task {shown}: {meant}give a type ({', '.join(TYPES)}), a task ({', '.join(names())}), or the path of "
        f"a task file, which ends in {SUFFIX}"
    )


def load(task: str) -> TaskFile:
    """The task of a name or of a file's path. Raises UserError, one line with the file, the key and the remedy."""
    path = find(task)
    values = read_toml(path)
    try:
        return _checked(path, values)
    except UserError as error:
        raise UserError(f"task file {path}: {error}") from error


def _checked(path: Path, values: dict[str, Any]) -> TaskFile:
    for key, value in values.items():
        if key not in ABOUT + KEYS:
            told = f"{key} is a setting, but none of a task: give it beside task, or leave it out"
            raise UserError(told if key in SETTINGS else unknown(key, [*ABOUT, *KEYS], "key of a task file"))
        if key in ABOUT and not isinstance(value, str):
            raise UserError(f"{key} = {value!r} is no text: write it in quotes")
    if not isinstance(kind := values.get("task", ""), str) or kind not in TYPES:
        given = f"task = {kind!r} is no type" if "task" in values else "it does not say its type"
        raise UserError(f'{given}: write task = "prompt" or another of {", ".join(TYPES)}')
    settings = {key: value for key, value in values.items() if key not in ABOUT}
    if path.parent != SHIPPED:
        settings = _with_absolute_paths(settings, path.parent)
    if idle := without_effect(validated(settings), settings):
        raise UserError("; ".join(idle))
    return TaskFile(path.stem, path, settings, *(values.get(key, "") for key in ABOUT))


def _with_absolute_paths(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with what names a file made a path from `folder`; a name without a dot and a slash names no file."""
    found = dict(settings)
    for key in (*DATA, "chat-template"):
        name = found.get(key, "")
        if isinstance(name, str) and "{" not in name and (os.sep in name or Path(name).suffix):  # no template's text
            found[key] = os.path.abspath(folder / os.path.expanduser(name))
    return found


def absolute_task(task: Any) -> Any:
    """The path of a task file absolute, so that it means the same from any working folder; another task as it is."""
    return str(find(task)) if is_file(task) and task.endswith(SUFFIX) else task


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the settings of the task file that `task` names, if it does, where they do not say otherwise.

    Raises UserError for a task that there is not, or one that cannot be used.
    """
    task = values.get("task")
    if not is_file(task):
        return dict(values)
    own = load(str(task)).settings
    return {**own, **values, "task": own["task"]}


def over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others put over them: those of a file, and what was typed beside it.

    A task file above takes the place of a task below with all that belongs to it: no template and no data set of the
    one stay to be read by the other.
    """
    if is_file(above.get("task")) and "task" in below:
        belongs = {*map(kebab, Task.model_fields), *DATA}
        below = {key: value for key, value in below.items() if key not in belongs}
        return {**below, **expanded(above)}
    return {**below, **above}


def resolve(values: Mapping[str, Any]) -> Settings:
    """The settings that `values` (kebab-case keys), the task file that `task` may name, and the defaults give.

    Raises UserError, one line that names every wrong key or value with its limit and remedy.
    """
    return validated(expanded(values))


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a full set of settings that are not at their defaults.

    Flower hands over every setting: a task file must not be overruled by what nobody gave.
    """

    def is_default(key: str, value: Any) -> bool:
        default = SETTINGS[key].default if key in SETTINGS else None
        return type(value) is type(default) and value == default

    return {key: value for key, value in values.items() if not is_default(key, value)}
