"""Settings in TOML files, and their paths."""

import os
from pathlib import Path
from typing import Any

import tomli_w
from pydantic.fields import FieldInfo

from zofed.base.errors import UserError
from zofed.base.parsing import from_toml
from zofed.config.fields import kebab
from zofed.config.settings import SECTIONS, SETTINGS, Settings, unknown, with_present_names


def absolute(path: str | Path, key: str) -> Path:
    """`path` with ~ expanded, absolute. Raises UserError naming the setting `key` for the home of an unknown user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{key} = {str(path)!r}: no such user; choose another --{key}")
    return Path(expanded).absolute()


def read_toml(path: Path, what: str = "settings file") -> dict[str, Any]:
    """What a TOML file with flat kebab-case keys holds. Raises UserError that calls the file `what`."""
    try:
        return from_toml(path.read_text(encoding="utf-8-sig"))  # editors may begin with a mark
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, not UTF-8, a number too long to read, nesting too deep
        encoding = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"{what} {path} is not valid TOML: {error}{encoding}") from error


def read_own_toml(path: Path) -> dict[str, Any]:
    """The settings that a run wrote down, by their present names, whichever version wrote them."""
    return with_present_names(read_toml(path))


def to_toml(settings: Settings) -> str:
    """The resolved settings as TOML that `read_toml` and `resolve` take back."""
    return tomli_w.dumps(settings.model_dump(by_alias=True))


def documented_toml(section: str = "") -> str:
    """Every setting, or those of one section, with its default and what it is: a settings file to start from.

    The same text is the block of run settings in pyproject.toml, where Flower wants every key declared. Raises
    UserError for a section that there is not.
    """
    if section and section not in SECTIONS:
        raise UserError(unknown(section, list(SECTIONS), "section"))
    blocks = []
    for name, kind in SECTIONS.items():
        if section in ("", name):
            lines = [_line(key, SETTINGS[key]) for key in map(kebab, kind.model_fields)]
            blocks.append("\n".join([f"# {name}: {summary(name)}", *lines]))
    return "\n\n".join(blocks) + "\n"


def _line(key: str, field: FieldInfo) -> str:
    return f"{tomli_w.dumps({key: field.default}).strip()}  # {field.description}"


def summary(section: str) -> str:
    """What the settings of a section are about, as it goes on after a colon."""
    text = (SECTIONS[section].__doc__ or "").strip().rstrip(".")
    return text[0].lower() + text[1:]
