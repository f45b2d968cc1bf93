"""Attention masks as models add them to their scores."""

import torch
from torch import Tensor


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a token sees another, else the type's lowest number: dtype (n, 1, length, length).

    sees: bool (n, length, length). Each token sees itself besides, so that no row is empty, not even of padding.
    """
    itself = torch.eye(sees.shape[-1], dtype=torch.bool, device=sees.device)
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~(sees | itself), torch.finfo(dtype).min)[:, None]
