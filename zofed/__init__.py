"""Zeroth-order training of language models, alone or together, replayable bit for bit."""

from typing import Any

__version__ = "0.1.0"
_LIBRARY = ("ZerothOrder", "replay")


def __getattr__(name: str) -> Any:
    """The names for use in scripts, loaded (with torch) when first asked for."""
    if name not in _LIBRARY:
        raise AttributeError(f"module 'zofed' has no attribute {name!r}")
    from zofed import library

    return getattr(library, name)
