"""Scores of a prompt's candidates are those of a plain loop over each of them, and run batched."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
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
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
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


def batch_of(width: int) -> dict[str, Tensor]:
    ids, mask = prompts()
    return {"input_ids": ids, "attention_mask": mask, "candidates": choices(width), "labels": torch.tensor([0, 2, 1])}


@pytest.mark.parametrize("width", [1, 3])
def test_an_absent_candidate_changes_nothing_and_its_score_is_minus_infinity(width: int) -> None:
    torch.manual_seed(0)
    model = FAMILIES["gpt2"]().eval()
    alone = batch_of(width)
    absent = torch.full((3, 2, width + 2), NO_TOKEN)
    wider = torch.cat([torch.cat([alone["candidates"], torch.full((3, 3, 2), NO_TOKEN)], 2), absent], 1)
    found, wanted = candidates.output(model, alone | {"candidates": wider}), candidates.output(model, alone)
    assert torch.allclose(found.logits[:, :3], wanted.logits, atol=1e-5) and (found.logits[:, 3:] == -torch.inf).all()
    assert float(found.loss) == pytest.approx(float(wanted.loss), abs=1e-6)
    of_both = [torch.autograd.grad(one.loss, list(model.parameters())) for one in (found, wanted)]
    for one, other in zip(*of_both, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_positions_behind_a_short_candidate_stay_within_the_model() -> None:
    """A row whose prompt fills the block beside another's longer candidate."""
    model = FAMILIES["gpt2"]().eval()
    ids = torch.ones(2, 40, dtype=torch.int64)
    mask = (torch.arange(40) >= torch.tensor([[0], [5]])).long()
    words = torch.full((2, 2, 6), NO_TOKEN)
    words[0, :, 0], words[1] = torch.tensor([3, 4]), torch.arange(12).view(2, 6)
    found = candidates.scores(model, {"input_ids": ids, "attention_mask": mask, "candidates": words})
    assert found.isfinite().all()


@torch.no_grad()
def test_of_one_candidate_the_loss_is_minus_its_score() -> None:
    model, batch = FAMILIES["gpt2"]().eval(), batch_of(3)
    whole = candidates.output(model, batch)
    right = batch["candidates"][torch.arange(3), batch["labels"]][:, None]
    found = candidates.output(model, batch | {"candidates": right, "labels": torch.zeros(3, dtype=torch.int64)})
    assert float(found.loss) == pytest.approx(-float(whole.logits[torch.arange(3), batch["labels"]].mean()), abs=1e-5)


MASKED: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SHAPE, num_attention_heads=4)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SHAPE, num_attention_heads=4, max_position_embeddings=20)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=VOCABULARY, dim=32, hidden_dim=37, n_layers=2, n_heads=4)
    ),
    "electra": lambda: ElectraForMaskedLM(ElectraConfig(**SHAPE, num_attention_heads=4, embedding_size=16)),
    "modernbert": lambda: ModernBertForMaskedLM(
        ModernBertConfig(**SHAPE, num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ),
}


def masked_batch() -> dict[str, Tensor]:
    words, place = choices(1), torch.tensor([2, 8, 0])
    return {
        "input_ids": prompts()[0], "attention_mask": (torch.arange(9) < torch.tensor([[5], [9], [1]])).long(),
        "place": place, "candidates": words, "labels": torch.tensor([0, 2, 1]),
    }  # fmt: skip


@pytest.mark.parametrize("family", MASKED)
@torch.no_grad()
def test_a_masked_model_scores_what_stands_at_the_mask(family: str) -> None:
    torch.manual_seed(0)
    model, batch = MASKED[family]().eval(), masked_batch()
    found = candidates.scores(model, batch)
    for row, (ids, mask, place) in enumerate(
        zip(batch["input_ids"], batch["attention_mask"], batch["place"], strict=True)
    ):
        logs = model(input_ids=ids[mask > 0][None]).logits[0, place].log_softmax(-1)
        assert torch.allclose(found[row], logs[batch["candidates"][row, :, 0]], atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_slopes_of_a_masked_model_run_batched(family: str) -> None:
    torch.manual_seed(0)
    model, batch = MASKED[family]().eval(), masked_batch()
    parameters = {name: tensor for name, tensor in model.named_parameters() if "position" not in name}
    way = FiniteDifference("rank1", 1e-2, "two-point", 4)
    loss = lambda: candidates.output(model, batch).loss  # noqa: E731
    together, apart = (way.slopes(loss, parameters, [3, 1, 4], batched=batched).slopes for batched in (True, False))
    assert together == pytest.approx(apart, abs=1e-4) and max(map(abs, apart)) > 0.1


def test_calibrated_scores_are_less_by_those_of_a_prompt_without_content() -> None:
    found = torch.tensor([[-1.0, -2.0, -torch.inf], [-3.0, -1.0, -2.0]])
    once = candidates.calibrated(found, torch.tensor([[-1.0, -3.0, -torch.inf]]))
    assert once[0].tolist() == [0.0, 1.0, -torch.inf] and once[1].tolist() == [-2.0, 2.0, -2.0]
