"""A language model that chooses among candidates for a place in a text: their scores, each prompt computed once.

A causal model's candidates continue a prompt, and one's score is the mean log-probability of its tokens there (Malladi
et al., "Fine-tuning language models with just forward passes", 2023, as MeZO's code has it). Where all candidates are
one token the prompt alone runs, and of its logits only the last position's. Longer ones follow the prompt in one
sequence, each seeing the prompt and itself, at the positions it would have there alone. A masked model's candidates are
one token each, scored where the mask token stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zofed.core import masks

Examples = dict[str, Tensor]

NO_TOKEN = -100  # behind a candidate that is shorter than others; one of nothing else is absent
KEY = "candidates"  # of a batch: int64 (n, classes, width)
PLACE = "place"  # of a batch for a masked model: int64 (n,), where the mask token stands


@dataclass(frozen=True, slots=True)
class Output:
    """loss: float32 scalar; logits: the candidates' scores, float32 (n, classes), -inf of an absent one."""

    loss: Tensor
    logits: Tensor


def output(model: nn.Module, batch: Examples) -> Output:
    """Scores of each example's candidates, and how well they tell the right ones.

    batch: 'input_ids' and 'attention_mask' int64 (n, block), prompts padded on the left for a causal model and on the
    right for a masked one, which takes 'place' int64 (n,) too; 'candidates' int64 (n, classes, width); 'labels' int64
    (n,), the right candidate's number. The loss is the mean cross-entropy over the candidates; with one candidate
    there is nothing to choose among, and it is minus the mean of their scores.
    """
    found = scores(model, batch)
    loss = F.cross_entropy(found, batch["labels"]) if found.shape[1] > 1 else -found.mean()
    return Output(loss, found)


def scores(model: nn.Module, batch: Examples) -> Tensor:
    """Mean log-probability of each candidate's tokens: float32 (n, classes), -inf of an absent candidate."""
    each = _in_place(model, batch) if PLACE in batch else _behind(model, batch)
    counts = batch[KEY] != NO_TOKEN
    lengths = counts.sum(2)
    return ((each * counts).sum(2) / lengths.clamp(min=1)).masked_fill(lengths == 0, -torch.inf)


def calibrated(found: Tensor, empty: Tensor) -> Tensor:
    """Scores less those of the same candidates under a prompt without content (Zhao et al., 2021; Holtzman et al.,
    2021): float32 (n, classes). empty: (n, classes), or (1, classes) where all have the same candidates.
    """
    return found - torch.where(empty.isfinite(), empty, 0.0)  # an absent one's score stays what it is


def _behind(model: nn.Module, batch: Examples) -> Tensor:
    """Log-probability of each candidate's tokens behind the prompt: float32 (n, classes, width)."""
    prompts, mask, candidates = batch["input_ids"], batch["attention_mask"], batch[KEY]
    count, classes, width = candidates.shape
    behind = width - 1  # tokens of a candidate that are fed: the last is predicted, and nothing is behind it
    fed = candidates[:, :, :behind]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    predicts = candidates[:, :, 1:] != NO_TOKEN  # what else is fed may lie beyond the model's positions
    after = (mask.sum(1)[:, None, None] + torch.arange(behind, device=mask.device)) * predicts
    logits = model(
        input_ids=torch.cat([prompts, fed.clamp(min=0).flatten(1)], 1),
        attention_mask=_tree(mask, classes, behind, next(model.parameters()).dtype),
        position_ids=torch.cat([positions, after.flatten(1)], 1),
        use_cache=False,
        logits_to_keep=1 + classes * behind,
    ).logits.float()
    logs, tokens = logits.log_softmax(-1), candidates.clamp(min=0)
    first = logs[:, 0].gather(1, tokens[:, :, 0])[..., None]
    rest = logs[:, 1:].gather(2, tokens[:, :, 1:].reshape(count, -1, 1))
    return torch.cat([first, rest.view(count, classes, behind)], 2)


def _tree(mask: Tensor, classes: int, width: int, dtype: torch.dtype) -> Tensor:
    """What each token sees: an additive mask (n, 1, length, length), 0 or the type's lowest number.

    A prompt's token sees the prompt up to itself; a candidate's the prompt and its own candidate up to itself; padding
    sees itself alone.
    """
    count, block = mask.shape
    length = block + classes * width
    at = torch.arange(length, device=mask.device)
    owner = torch.where(at < block, -1, (at - block) // max(1, width))
    is_prompt = at < block
    sees = (at[:, None] >= at) & (is_prompt | (owner[:, None] == owner))
    there = torch.cat([mask.bool(), torch.ones(count, length - block, dtype=torch.bool, device=mask.device)], 1)
    return masks.additive(sees & there[:, None, :], dtype)


def _in_place(model: nn.Module, batch: Examples) -> Tensor:
    """Log-probability of each candidate's token where the mask stands: float32 (n, classes, 1)."""
    place = batch[PLACE]
    with _hidden_at(model, place):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if logits.shape[1] != 1:  # a model whose head does not read the base model's first output
        logits = logits.gather(1, place.view(-1, 1, 1).expand(-1, 1, logits.shape[-1]))
    return logits[:, 0].float().log_softmax(-1).gather(1, batch[KEY][..., 0].clamp(min=0))[..., None]


@contextmanager
def _hidden_at(model: nn.Module, place: Tensor) -> Iterator[None]:
    """Meanwhile the head reads one position of each example: its vocabulary is not spread over all the others."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    if not isinstance(base, nn.Module):
        yield
        return

    def chosen(_: nn.Module, __: Any, found: Any) -> Any:
        hidden = found[0]
        found["last_hidden_state"] = hidden.gather(1, place.view(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))
        return found

    hook = base.register_forward_hook(chosen)
    try:
        yield
    finally:
        hook.remove()
