"""A causal language model that chooses among continuations of a prompt: their scores, each prompt computed once.

A candidate's score is the mean log-probability of its tokens after the prompt (Malladi et al., "Fine-tuning language
models with just forward passes", 2023, as MeZO's code has it). Where all candidates are one token the prompt alone
runs, and of its logits only the last position's. Longer ones follow the prompt in one sequence, each seeing the prompt
and itself, at the positions it would have there alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Examples = dict[str, Tensor]

NO_TOKEN = -100  # behind a candidate that is shorter than others
KEY = "candidates"  # of a batch: int64 (n, classes, width)


@dataclass(frozen=True, slots=True)
class Output:
    """loss: mean cross-entropy over the candidates, float32 scalar; logits: their scores, float32 (n, classes)."""

    loss: Tensor
    logits: Tensor


def output(model: nn.Module, batch: Examples) -> Output:
    """Scores of each example's candidates, and how well they tell the right ones.

    batch: 'input_ids' and 'attention_mask' int64 (n, block), prompts padded on the left; 'candidates' int64
    (n, classes, width); 'labels' int64 (n,), the right candidate's number.
    """
    found = scores(model, batch["input_ids"], batch["attention_mask"], batch[KEY])
    return Output(F.cross_entropy(found, batch["labels"]), found)


def scores(model: nn.Module, prompts: Tensor, mask: Tensor, candidates: Tensor) -> Tensor:
    """Mean log-probability of each candidate's tokens: float32 (n, classes)."""
    count, classes, width = candidates.shape
    behind = width - 1  # tokens of a candidate that are fed: the last is predicted, and nothing is behind it
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    after = mask.sum(1)[:, None, None] + torch.arange(behind, device=mask.device)
    logits = model(
        input_ids=torch.cat([prompts, candidates[:, :, :behind].clamp(min=0).flatten(1)], 1),
        attention_mask=_tree(mask, classes, behind, next(model.parameters()).dtype),
        position_ids=torch.cat([positions, after.expand(count, classes, behind).flatten(1)], 1),
        use_cache=False,
        logits_to_keep=1 + classes * behind,
    ).logits.float()
    logs = logits.log_softmax(-1)
    first = logs[:, :1].unsqueeze(1).expand(count, classes, 1, -1)
    rest = logs[:, 1:].reshape(count, classes, behind, logs.shape[-1])
    each = torch.cat([first, rest], 2).gather(3, candidates.clamp(min=0)[..., None])[..., 0]
    counts = candidates != NO_TOKEN
    return (each * counts).sum(2) / counts.sum(2)


def _tree(mask: Tensor, classes: int, width: int, dtype: torch.dtype) -> Tensor:
    """What each token sees: an additive mask (n, 1, length, length), 0 or the type's lowest number.

    A prompt's token sees the prompt up to itself; a candidate's the prompt and its own candidate up to itself; padding
    sees itself alone, so that no row is empty.
    """
    count, block = mask.shape
    length = block + classes * width
    at = torch.arange(length, device=mask.device)
    owner = torch.where(at < block, -1, (at - block) // max(1, width))
    is_prompt = at < block
    sees = (at[:, None] >= at) & (is_prompt | (owner[:, None] == owner))
    there = torch.cat([mask.bool(), torch.ones(count, length - block, dtype=torch.bool, device=mask.device)], 1)
    sees = (sees & there[:, None, :]) | torch.eye(length, dtype=torch.bool, device=mask.device)
    return torch.zeros(sees.shape, dtype=dtype, device=mask.device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]
