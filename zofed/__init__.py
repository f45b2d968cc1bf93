"""Zeroth-order training of language models, alone or together, replayable bit for bit."""

from importlib import import_module
from typing import Any

from zofed.base.arithmetic import make_reproducible

make_reproducible()  # before torch computes anything

__version__ = "0.1.0"
_HOMES = {
    "train": "experiments.from_python",
    "simulate": "experiments.from_python",
    "Run": "experiments.from_python",
    "ZerothOrder": "training.zeroth_order",
    "replay": "training.zeroth_order",
    "Optimizer": "core.optimizers",
    "UserError": "base.errors",
    "create_model": "preflight.model_info",
    "get_model_info": "preflight.model_info",
    "list_available_models": "preflight.model_info",
    "get_dataloader": "training.dataloader",
    "get_dataset_info": "data.catalog",
    "list_available_datasets": "data.catalog",
}


def __getattr__(name: str) -> Any:
    """The names for use in scripts, loaded (with torch) when first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'zofed' has no attribute {name!r}")
    return getattr(import_module(f"zofed.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """What scripts use, for completion in a notebook; nothing is loaded."""
    return sorted(["__version__", *_HOMES])
