"""Zeroth-order training of language models, alone or together, replayable bit for bit."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_LIBRARY = {
    "ZerothOrder": "library",
    "replay": "library",
    "create_model": "model_info",
    "get_model_info": "model_info",
    "list_available_models": "model_info",
}


def __getattr__(name: str) -> Any:
    """The names for use in scripts, loaded (with torch) when first asked for."""
    if name not in _LIBRARY:
        raise AttributeError(f"module 'zofed' has no attribute {name!r}")
    return getattr(import_module(f"zofed.{_LIBRARY[name]}"), name)
