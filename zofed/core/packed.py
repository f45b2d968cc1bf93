"""Several examples in one block, none of which sees another: each is read as it would be alone."""

from typing import Any

import torch
from torch import Tensor, nn

from zofed.core import masks
from zofed.core.devices import input_device

Examples = dict[str, Tensor]

KEY = "segments"  # of a batch: int64 (n, block): 1, 2, ... for each example's tokens, 0 for padding


def output(model: nn.Module, batch: Examples) -> Any:
    """The model's own loss and logits of packed blocks.

    batch: 'input_ids', 'labels' and 'segments' int64 (n, block). The label of each example's first token must be
    -100: the token before it is another's. The mask is made here, since it is block times as large as its key.
    """
    segments = batch[KEY]
    is_token = (segments != 0)[..., :, None]
    return model(
        input_ids=batch["input_ids"],
        attention_mask=masks.additive(_same(segments) & is_token, next(model.parameters()).dtype),
        position_ids=_positions(segments),
        labels=batch["labels"],
        use_cache=False,
    )


def _same(segments: Tensor) -> Tensor:
    """Whether two tokens are of one example, the second not after the first: bool (n, block, block)."""
    at = torch.arange(segments.shape[-1], device=segments.device)
    return (segments[..., :, None] == segments[..., None, :]) & (at[:, None] >= at)


def _positions(segments: Tensor) -> Tensor:
    """Of each token within its example: int64 (n, block)."""
    return _same(segments).sum(-1) - 1


@torch.no_grad()
def leaks(model: nn.Module) -> bool:
    """Whether a model lets packed examples see one another, or counts their positions on: it ignores mask or places.

    It reads two blocks of a few tokens, on its device.
    """
    dtype, device = next(model.parameters()).dtype, input_device(model)
    ids = torch.tensor([[0, 1, 2, 1, 2, 0], [0, 1, 2, 2, 1, 0]], device=device)
    labels, segments = ids.clone(), torch.tensor([[1, 1, 1, 2, 2, 2]] * 2, device=device)
    try:
        together = output(model, {"input_ids": ids, "labels": labels, KEY: segments}).logits[:, 3:].float()
    except Exception:  # it takes no places, or no such mask: whatever its layers raise
        return True
    alone = model(input_ids=ids[:, 3:], use_cache=False).logits.float()
    tolerance = 100 * torch.finfo(dtype).eps  # of the largest: rounding alone
    return bool((together - alone).abs().max() > tolerance * alone.abs().max())
