"""How a setting is declared: default, limits, description, when it acts, and what resume and results ask of it."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo


def kebab(name: str) -> str:
    return name.replace("_", "-")


def limit_told(problem: Any) -> str:
    """What a value should have been, of one of pydantic's errors."""
    return problem["msg"].removeprefix("Value error, ").removeprefix("Input ")


@dataclass(frozen=True, slots=True)
class Unlike:
    """A condition: any value but these."""

    values: tuple[Any, ...]


Condition = Mapping[str, Any]  # what settings must be, by attribute: a value, a tuple of values, or Unlike
CENTRAL, FEDERATED = "central", "federated"  # the ways to run, which a condition knows as `run`


@dataclass(frozen=True, slots=True)
class Traits:
    """What is known of a setting beside its value and limits.

    acts_when: it acts only where one of these holds; empty: always. pins: a resumed run must find it unchanged.
    spaced: a text whose outer spaces and line breaks are meant.
    shapes_result: it decides what a run finds, not only where and how it computes. scores: held-out losses at two of
    its values cannot be compared. first: one of those that a person needs first.
    """

    acts_when: tuple[Condition, ...] = ()
    pins: bool = True
    shapes_result: bool = True
    scores: bool = False
    first: bool = False
    spaced: bool = False


def when(*alternatives: Condition, **condition: Any) -> tuple[Condition, ...]:
    """One of these conditions. `run`: CENTRAL or FEDERATED. `ranks`: whether torchrun started several processes."""
    return (*alternatives, *([condition] if condition else []))


def setting(
    default: Any,
    description: str,
    *,
    acts_when: tuple[Condition, ...] = (),
    pins: bool = True,
    shapes_result: bool = True,
    scores: bool = False,
    first: bool = False,
    spaced: bool = False,
    **limits: Any,
) -> Any:
    """A field of a `Section`. limits: as pydantic's `Field` takes them."""
    traits = Traits(acts_when, pins, shapes_result, scores, first, spaced)
    return Field(default, description=description, json_schema_extra={"traits": traits}, **limits)  # type: ignore[dict-item]


def traits(field: FieldInfo) -> Traits:
    """The traits that `setting` gave a field."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return extra["traits"]  # type: ignore[return-value]


def acts_in(field: FieldInfo, run: str) -> bool:
    """Whether a setting can have an effect on a run of this way, CENTRAL or FEDERATED; empty: of any."""
    conditions = traits(field).acts_when
    return not (run and conditions) or any(condition.get("run", run) == run for condition in conditions)


class Section(BaseModel):
    """Settings that belong together. Written kebab-case outside (`learning-rate`), read as attributes inside."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=kebab, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float, str):
            raise ValueError("true and false are not allowed here")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_kept(cls, value: Any, info: Any) -> Any:
        """Text that a TOML file and a path can hold and a person sees whole; numbers of 64 bits, as Flower's are."""
        if isinstance(value, str):
            spaced = traits(cls.model_fields[info.field_name]).spaced
            if not spaced and value != value.strip():
                raise ValueError("begins or ends with white space, leave it out")
            seen = value.replace("\n", "") if spaced else value
            if any(unicodedata.category(character) in ("Cc", "Cs") for character in seen):
                raise ValueError("holds a line break, a control character or a byte that is no UTF-8, leave it out")
        if isinstance(value, int) and not isinstance(value, bool) and value >= 2**63:
            raise ValueError("should be less than 2**63")
        return value
