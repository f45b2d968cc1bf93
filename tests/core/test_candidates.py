"""Scores of a prompt's candidates are those of a plain loop over each of them, and run batched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zofed.core import candidates
from zofed.core.estimators import FiniteDifference

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 61
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
HEADS = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
NO_TOKEN = candidates.NO_TOKEN

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_layer=2, n_head=3, n_embd=15, n_positions=40, eos_token_id=0)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**HEADS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**HEADS, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**HEADS)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**HEADS, head_dim=8, pad_token_id=0)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**HEADS)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY, hidden_size=24, word_embed_proj_dim=24, ffn_dim=30, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64,
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SHAPE, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
    ),
}  # fmt: skip


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of 5, 9 and 1 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [8]])).long()
    return ids * mask, mask


def choices(width: int) -> Tensor:
    """Three candidates for each prompt, of up to `width` tokens."""
    found = torch.randint(1, VOCABULARY, (3, 3, width), generator=torch.Generator().manual_seed(2))
    if width > 1:
        found[:, 0, width - 1 :], found[:, 2, 1:] = NO_TOKEN, NO_TOKEN
    return found


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_are_those_of_each_candidate_alone_behind_its_prompt(family: str, width: int) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().double()
    (ids, mask), chosen = prompts(), choices(width)
    found = candidates.scores(model, {"input_ids": ids, "attention_mask": mask, "candidates": chosen})
    for row in range(3):
        prompt = ids[row][mask[row] > 0].tolist()
        for number in range(3):
            word = [token for token in chosen[row, number].tolist() if token != NO_TOKEN]
            logs = model(input_ids=torch.tensor([prompt + word])).logits[0].log_softmax(-1)
            each = [float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(word)]
            assert float(found[row, number]) == pytest.approx(sum(each) / len(each), abs=2e-6)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_slopes_of_a_prompted_loss_run_batched(family: str, width: int) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    (ids, mask), parameters = prompts(), dict(model.named_parameters())
    batch = {"input_ids": ids, "attention_mask": mask, "candidates": choices(width), "labels": torch.tensor([0, 2, 1])}
    way = FiniteDifference("rank1", 1e-2, "two-point", 4)
    loss = lambda: candidates.output(model, batch).loss  # noqa: E731
    together, apart = (way.slopes(loss, parameters, [3, 1, 4], batched=batched).slopes for batched in (True, False))
    assert together == pytest.approx(apart, abs=1e-4) and max(map(abs, apart)) > 0.1


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_over_candidates() -> None:
    torch.manual_seed(0)
    model = FAMILIES["gpt2"]().eval()
    (ids, mask), labels = prompts(), torch.tensor([0, 2, 1])
    batch = {"input_ids": ids, "attention_mask": mask, "candidates": choices(1), "labels": labels}
    found = candidates.output(model, batch)
    expected = -found.logits.log_softmax(-1)[torch.arange(3), labels].mean()
    assert float(found.loss) == pytest.approx(float(expected)) and found.logits.shape == (3, 3)
