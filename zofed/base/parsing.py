"""JSON and TOML that anybody may have written: whatever is wrong with them is a ValueError."""

import json
import tomllib
from collections.abc import Callable
from typing import Any


def from_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What a JSON text holds. pairs: makes an object of its names and values, in their order.

    Raises ValueError for what is no JSON, bytes that are no UTF-8, and nesting that Python cannot follow.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested deeper than is read") from None


def from_toml(text: str) -> dict[str, Any]:
    """What a TOML text holds. Raises ValueError for what is no TOML, and nesting that Python cannot follow."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested deeper than is read") from None
