"""Packed examples are read as each would be alone: equal losses and slopes; a model that leaks is known."""

import pytest
import torch
import torch.nn.functional as F
from test_candidates import FAMILIES
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from zofed.core import metrics, packed
from zofed.core.estimators import FiniteDifference

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = ((4, 3, 5), (9, 2))  # of the examples in each block of 13


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(3)
    return FAMILIES[family]().eval()


def blocks() -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Packed blocks, and their examples as tokens and labels."""
    torch.manual_seed(5)
    batch = {
        "input_ids": torch.zeros(2, 13, dtype=torch.int64),
        "labels": torch.full((2, 13), -100),
        packed.KEY: torch.zeros(2, 13, dtype=torch.int64),
    }
    alone = []
    for block, lengths in enumerate(LENGTHS):
        at = 0
        for number, length in enumerate(lengths, 1):
            ids, labels = torch.randint(0, 61, (length,)), torch.full((length,), -100)
            labels[-2:] = ids[-2:]
            labels[0] = -100
            place = slice(at, at + length)
            batch["input_ids"][block, place], batch["labels"][block, place] = ids, labels
            batch[packed.KEY][block, place] = number
            alone.append((ids, labels))
            at += length
    return batch, alone


def losses_alone(model: PreTrainedModel, alone: list[tuple[Tensor, Tensor]]) -> Tensor:
    found = []
    for ids, labels in alone:
        logits = model(input_ids=ids[None]).logits[0]
        each = F.cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)
        found.append(each[labels[1:] != -100])
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_token_loses_what_it_loses_alone(family: str) -> None:
    model, (batch, alone) = model_of(family), blocks()
    output = packed.output(model, batch)
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    assert each[labels.flatten() != -100] == pytest.approx(wanted := losses_alone(model, alone), rel=1e-4, abs=1e-5)
    assert float(output.loss) == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert float(metrics.loss_of(model, batch)) == pytest.approx(float(wanted.mean()), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("is_own", [False, True])
def test_slopes_are_those_of_one_copy_after_the_other(family: str, is_own: bool) -> None:
    model, (batch, _) = model_of(family), blocks()
    examples = {name: torch.stack([tensor, tensor.flip(0)]) for name, tensor in batch.items()} if is_own else None
    how = FiniteDifference("rank1", 1e-3, "two-point", 4, None)
    parameters = dict(model.named_parameters())

    def loss(*own: dict[str, Tensor]) -> Tensor:
        return metrics.loss_of(model, own[0] if own else batch)

    found = [how.slopes(loss, parameters, [1, 2], examples, batched=batched).slopes for batched in (True, False)]
    assert found[0] == pytest.approx(found[1], rel=2e-2, abs=2e-3)


def test_a_model_without_a_mask_or_places_of_its_own_is_known() -> None:
    shape = {"vocab_size": 61, "hidden_size": 32}
    torch.manual_seed(1)
    assert packed.leaks(MambaForCausalLM(MambaConfig(**shape, num_hidden_layers=1, state_size=4)).eval())
    assert packed.leaks(BloomForCausalLM(BloomConfig(**shape, n_layer=1, n_head=2)).eval())
    assert not any(packed.leaks(model_of(family)) for family in FAMILIES)
    assert not packed.leaks(model_of("llama").to(torch.bfloat16))
