"""Every setting: its section, type, limits and default, what it is and when it acts."""

from zofed.config.asked import asked_for
from zofed.config.fields import CENTRAL, FEDERATED, Unlike, acts_in, kebab, traits
from zofed.config.names import LONGEST_SHOWN, RENAMED, unknown, unknown_of_many
from zofed.config.settings import (
    SECTIONS,
    SETTINGS,
    SINKS,
    TEXT_OBJECTIVES,
    Settings,
    changed,
    in_mode,
    pinned,
    sinks_of,
    unknown_setting,
    with_present_names,
    without_effect,
)
from zofed.config.suited import is_chosen
from zofed.config.task_files import absolute_task, given, over, resolve
from zofed.config.toml import absolute, documented_toml, read_own_toml, read_toml, summary, to_toml
from zofed.config.training_sections import WITH_BACKPROP, ZEROTH_ORDER

__all__ = [
    "CENTRAL",
    "FEDERATED",
    "LONGEST_SHOWN",
    "RENAMED",
    "SECTIONS",
    "SETTINGS",
    "SINKS",
    "TEXT_OBJECTIVES",
    "WITH_BACKPROP",
    "ZEROTH_ORDER",
    "Settings",
    "Unlike",
    "absolute",
    "absolute_task",
    "acts_in",
    "asked_for",
    "changed",
    "documented_toml",
    "given",
    "in_mode",
    "is_chosen",
    "kebab",
    "over",
    "pinned",
    "read_own_toml",
    "read_toml",
    "resolve",
    "sinks_of",
    "summary",
    "to_toml",
    "traits",
    "unknown",
    "unknown_of_many",
    "unknown_setting",
    "with_present_names",
    "without_effect",
]  # fmt: skip
