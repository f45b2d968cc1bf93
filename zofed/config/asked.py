"""The settings that a person asks for: defaults, a file, and what is given beside it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.config.settings import Settings, changed, without_effect
from zofed.config.task_files import over, resolve
from zofed.config.toml import read_toml


def asked_for(file: Path | None, given: Mapping[str, Any], run: str | None = None) -> Settings:
    """Defaults, overridden by a TOML file, overridden by what is given, typed or in code.

    run: how they will be run, config.CENTRAL or config.FEDERATED, empty where both are possible; None: only a part of
    them is looked at. A given setting that then has no effect is a UserError; of those of a file, which may serve
    several runs, one warning tells.
    """
    written = read_toml(file) if file else {}
    settings = resolve(over(written, given))
    if run is None:
        return settings
    if idle := without_effect(settings, given, run):
        raise UserError("; ".join(idle))
    of_file = [key for key in changed(settings) if key in written and key not in given]
    if idle := without_effect(settings, of_file, run):
        warnings.warn(f"{file}: {'; '.join(idle)}", stacklevel=2)
    return settings
