"""Zeroth-order training of language models, alone or together, replayable bit for bit."""

from importlib import import_module
from typing import Any

from zofed.arithmetic import make_reproducible

make_reproducible()  # before torch computes anything

__version__ = "0.1.0"
_HOMES = {
    "ZerothOrder": "library",
    "replay": "library",
    "create_model": "model_info",
    "get_model_info": "model_info",
    "list_available_models": "model_info",
    "get_dataloader": "data",
    "get_dataset_info": "catalog",
    "list_available_datasets": "catalog",
}


def __getattr__(name: str) -> Any:
    """The names for use in scripts, loaded (with torch) when first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'zofed' has no attribute {name!r}")
    return getattr(import_module(f"zofed.{_HOMES[name]}"), name)
