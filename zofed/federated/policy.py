"""A node's own policy: what a run may have it do, whatever its server or whoever submitted it says.

A TOML file on the node, named by `zofed supernode --policy` (`policy` in the node's configuration); what it does not
say is as in `Policy`. It is read anew when it changes, and each change counts from the next message on.
"""

import json
import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import tomli_w
from flwr.app import Context
from pydantic import ValidationError

from zofed import config
from zofed.base.errors import UserError
from zofed.base.texts import one_line
from zofed.config.fields import Section, limit_told, setting
from zofed.config.settings import OBJECTIVES
from zofed.core import sanitize
from zofed.core.kinds import NAMED_SCOPES

KEY = "policy"  # of the node's configuration
NEVER = ("/proc", "/sys")  # no data lie there, whatever the folders are


class Refused(UserError):  # noqa: N818, an answer
    """What the node's policy does not allow; the text names the value, the policy's line and the remedy."""


def _choices(key: str) -> tuple[str, ...]:
    """All values of a setting that has a few."""
    return get_args(config.SETTINGS[key].annotation)


class Policy(Section):
    """What a run may have this node do."""

    folders: tuple[str, ...] = setting(
        ("/",), "folders whose files a run may name as data, model, tokenizer or task; names that zofed knows are free"
    )
    hub_models: bool = setting(True, "whether a run may name a model OWNER/NAME of the hub that is cached here")
    modes: tuple[str, ...] = setting(_choices("mode"), "modes of a run; all but zo send more than slopes")
    objectives: tuple[str, ...] = setting(OBJECTIVES, "objectives that a run may have slopes follow")
    scopes: tuple[str, ...] = setting(
        (*NAMED_SCOPES, "last-K", "pattern"),
        "scopes that train: by name, last-K for any K, pattern for any expression, or one itself, word for word",
    )
    adapters: tuple[str, ...] = setting(_choices("adapter"), "adapters that train")
    templates: bool = setting(
        True, "whether a run may bring templates that no task of zofed has; they can ask what is in a row"
    )
    snapshots: bool = setting(True, "whether the server may send weights, not records alone; of gradients modes tells")
    details: bool = setting(
        True, "whether the server is told labels, sources and how many of each, and errors word for word"
    )
    smallest_batch: int = setting(
        1,
        "examples that each slope, gradient and loss is the mean over, at least; where epochs meet some count twice",
        ge=1,
    )
    integers_per_message: int = setting(65_536, "slopes or coefficients that an answer may hold", ge=1)
    slopes_per_example: int = setting(
        0, "slopes measured of any one example, a gradient counting one a number; 0: any", ge=0
    )
    slopes_in_all: int = setting(0, "slopes in all; 0: any", ge=0)
    ledger: str = setting(
        "",
        "file that keeps the counts of slopes, from the worker's folder; empty: they begin anew with it",
    )
    tokens_per_message: int = setting(2**26, "tokens of the batches that a message asks for", ge=1)
    records_per_message: int = setting(100_000, "records that a message may bring", ge=0)
    megabytes_per_message: float = setting(8192.0, "size of a message", gt=0)
    seconds_per_message: float = setting(3600.0, "seconds that a message may take, the first of a run included", gt=0)
    memory_per_message: float = setting(
        0.0, "megabytes of this machine's memory that a message may add to what the worker holds; 0: any", ge=0
    )
    minutes_per_run: float = setting(10_080.0, "minutes from a run's first message to its last", gt=0)
    idle_seconds: float = setting(600.0, "seconds without a message until the worker lets go of model and data", gt=0)
    threads: int = setting(128, "CPU threads that a run may ask for", ge=1)
    cache_gigabytes: float = setting(64.0, "hidden states that a run may keep in the cache", ge=0)


LINES = {config.kebab(name): field for name, field in Policy.model_fields.items()}
DEFAULT = Policy()


def of(context: Context) -> Policy:
    """The policy of a node. Raises UserError for a file that cannot be read or is none."""
    path = str(context.node_config.get(KEY, ""))
    if not path:
        return DEFAULT
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError as error:
        raise UserError(
            f"policy file {path} cannot be read ({error.strerror}): this node takes part in nothing"
        ) from error
    return _read(path, changed)


def read(path: Path) -> Policy:
    """The policy in a file. Raises UserError, one line, for a file that cannot be read, and a line that is none."""
    values = config.read_toml(path, "policy file")
    if wrong := [key for key in values if key not in LINES]:
        raise UserError(f"policy file {path}: {config.unknown(wrong[0], list(LINES), 'line of a policy')}")
    try:
        found = Policy.model_validate(values)
    except ValidationError as error:
        raise UserError(f"policy file {path}: {'; '.join(map(_explain, error.errors()))}") from None
    _check_words(found, path)
    return found


@lru_cache(maxsize=8)
def _read(path: str, changed: int) -> Policy:
    return read(Path(path))


def _explain(problem: Any) -> str:
    key = str(problem["loc"][0])
    return f"{key} = {sanitize.brief(problem['input'])}: {limit_told(problem)}; it says {LINES[key].description}"


def _check_words(policy: Policy, path: Path) -> None:
    """Raise UserError for a word that would allow nothing, and a folder that is no absolute path."""
    for key in ("modes", "objectives", "adapters"):
        known = getattr(DEFAULT, key)
        if wrong := [word for word in getattr(policy, key) if word not in known]:
            raise UserError(f"policy file {path}: {config.unknown(wrong[0], list(known), f'one of the {key}')}")
    if wrong := [folder for folder in policy.folders if not os.path.isabs(folder)]:
        raise UserError(f"policy file {path}: {wrong[0]!r} is no absolute path: begin it with /")


def to_toml(policy: Policy) -> str:
    """The policy as a file that `read` takes back, each line with what it says."""
    values = policy.model_dump(by_alias=True)
    return "\n".join(f"# {field.description}\n{_line(key, values[key])}\n" for key, field in LINES.items())


def _line(key: str, value: Any) -> str:
    """A line of the file; tomli_w would spread a list over many."""
    written = json.dumps(value, ensure_ascii=False) if isinstance(value, tuple) else None
    return f"{key} = {written}" if written else tomli_w.dumps({key: value}).strip()


def refusal(what: str, line: str, policy: Policy, remedy: str) -> Refused:
    """What is told of something that a line of the policy does not allow. remedy: whoever submits the run can do."""
    allowed = one_line(_line(line, getattr(policy, line.replace("-", "_"))), 300)
    return Refused(f"{what}, but this node's policy has {allowed}: {remedy}, or have the node change that line")


def is_within(path: str, policy: Policy) -> bool:
    """Whether a file or folder, there or not, lies in one of the policy's, links followed, and can be data at all."""
    real = os.path.realpath(os.path.expanduser(path))
    if any(real == never or real.startswith(f"{never}/") for never in NEVER):
        return False
    roots = [os.path.realpath(folder) for folder in policy.folders]
    return any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots) and not _is_odd(real)


def _is_odd(path: str) -> bool:
    """Whether it is neither a file nor a folder, but a pipe, a socket or a device, which may never end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # not there, or no name that a file can have
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
