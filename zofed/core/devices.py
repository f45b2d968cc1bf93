"""Where a model reads its inputs: its parameters need not all lie on one device."""

from typing import Any

import torch
from torch import nn


def input_device(model: nn.Module) -> torch.device:
    """The device of a model's input embeddings; of its first parameter where it tells of none."""
    try:
        embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
        return next(embeddings.parameters()).device
    except (AttributeError, NotImplementedError, StopIteration):
        return next(model.parameters()).device
