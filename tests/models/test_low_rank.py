"""What changed of a model's matrices as factors of low rank: the best there are, and told how good they are."""

import copy
from typing import Any

import pytest
import torch
from networks import gpt2_config, llama_config, randomised
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from zofed.core.digests import named_parameters
from zofed.models import initial, low_rank
from zofed.models.low_rank import Matrix

pytestmark = pytest.mark.usefixtures("one_thread")

MATRIX = Matrix("model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj.weight", False)


def falling(outputs: int, inputs: int, by: float = 0.8) -> Tensor:
    """A matrix whose singular values fall by a factor: float64."""
    generator = torch.Generator().manual_seed(3)
    sides = [torch.randn(size, min(outputs, inputs), generator=generator).double() for size in (outputs, inputs)]
    left, right = (torch.linalg.qr(side).Q for side in sides)
    return left * by ** torch.arange(min(outputs, inputs)) @ right.T


def product(change: low_rank.Change) -> Tensor:
    return change.second.double() @ change.first.double()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_factors_are_the_best_approximation_of_their_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = falling(*shape)
    change = low_rank.factored(MATRIX, matrix, rank)
    values = torch.linalg.svdvals(matrix)
    assert change.first.shape == (rank, shape[1]) and change.second.shape == (shape[0], rank)
    missed = float((matrix - product(change)).square().sum())
    assert missed == pytest.approx(float(values[rank:].square().sum()), rel=1e-4, abs=1e-11)
    assert change.missing == pytest.approx(float(values[rank:].square().sum()), rel=1e-9, abs=1e-25)
    assert change.held + change.missing == pytest.approx(change.whole)


@pytest.mark.parametrize("by", [0.99, 0.8])
def test_the_first_factors_of_a_large_matrix_are_nearly_those_of_all(
    monkeypatch: pytest.MonkeyPatch, by: float
) -> None:
    matrix = falling(300, 220, by)
    whole = low_rank.factored(MATRIX, matrix, 8)
    monkeypatch.setattr(low_rank, "LARGEST_WHOLE", 100)
    before = torch.get_rng_state()
    some, again = low_rank.factored(MATRIX, matrix, 8), low_rank.factored(MATRIX, matrix, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(some.first, again.first) and torch.equal(some.second, again.second)
    assert some.is_cut and len(some.squares) == 40 and not whole.is_cut
    assert some.held == pytest.approx(whole.held, rel=1e-3)
    assert some.missing == pytest.approx(whole.missing, rel=1e-3, abs=1e-12)
    left = float((matrix - product(some)).square().sum())
    assert left == pytest.approx(whole.missing, rel=1e-3, abs=1e-11)


def test_a_large_matrix_of_which_many_values_are_wanted_is_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "LARGEST_WHOLE", 100)
    assert not low_rank.factored(MATRIX, falling(300, 120), 8).is_cut


def test_the_smallest_rank_of_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def delta(*changes: low_rank.Change) -> low_rank.Delta:
        return low_rank.Delta(changes, 1, {}, (), False)

    diagonal = low_rank.factored(MATRIX, torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)), 1)
    assert [delta(diagonal).smallest_rank(share) for share in (9 / 14, 13 / 14, 0.99)] == [1, 2, 3]
    one = low_rank.factored(MATRIX, torch.eye(2, dtype=torch.float64)[:, :1], 1)
    assert delta(diagonal, one).smallest_rank(10 / 15) == 1
    monkeypatch.setattr(low_rank, "LARGEST_WHOLE", 100)
    cut = delta(low_rank.factored(MATRIX, falling(300, 220, 0.99), 8))
    assert cut.smallest_rank(0.5) and cut.smallest_rank(0.999) is None


def moved(model: nn.Module, rank: int, names: set[str]) -> nn.Module:
    """A copy whose named parameters moved, matrices by this rank, a tied one once."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in named_parameters(other).items():
            if name in names and parameter.dim() == 2:
                sides = [torch.randn(size, rank, generator=generator) for size in parameter.shape]
                parameter += 0.05 * sides[0] @ sides[1].T
            elif name in names:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return other


BLOCK = {f"self_attn.{name}_proj" for name in "qkvo"} | {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
MODELS: dict[str, tuple[Any, int, set[str]]] = {
    "llama": (lambda: LlamaForCausalLM(llama_config()), 15, {"lm_head"} | BLOCK),
    "tied llama": (lambda: LlamaForCausalLM(llama_config(tie_word_embeddings=True)), 14, BLOCK),
    "gpt2": (lambda: GPT2LMHeadModel(gpt2_config()), 8, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_change_of_low_rank_is_held_exactly_from_that_rank_on(name: str) -> None:
    build, count, kinds = MODELS[name]
    base = randomised(build())
    names = set(named_parameters(base))
    end = moved(base, 3, names)
    for rank, is_exact in ((2, False), (3, True), (5, True)):
        delta = low_rank.delta(base, end, names, rank, 1)
        assert delta.is_exact == is_exact
        assert (delta.share > 1 - 1e-9) == is_exact
    assert len(delta.changes) == count and set(delta.by_kind()) == kinds
    assert sum(number for number, _, _ in delta.by_kind().values()) == count
    after = named_parameters(end)
    for change in delta.changes:
        difference = after[change.matrix.name].double() - named_parameters(base)[change.matrix.name].double()
        wanted = difference.T if change.matrix.is_transposed else difference
        torch.testing.assert_close(product(change), wanted, rtol=0, atol=1e-6)
    held = {change.matrix.name for change in delta.changes}
    assert sum(rest.tensors for rest in delta.rest) == len(names - held)
    assert sum(rest.numbers for rest in delta.rest) == sum(after[name].numel() for name in names - held)
    assert [rest.what for rest in delta.rest if rest.what == low_rank.OTHERS] == []


def test_what_no_lora_holds_is_told_by_what_it_is() -> None:
    base = randomised(GPT2LMHeadModel(gpt2_config()))
    names = set(named_parameters(base))
    delta = low_rank.delta(base, moved(base, 2, names), names, 2, 1)
    assert [(rest.what, rest.tensors) for rest in delta.rest] == [
        (low_rank.EMBEDDINGS, 2), (low_rank.NORMS, 10), (low_rank.BIASES, 8),
    ]  # fmt: skip
    assert 0 < delta.share_of_all < delta.share
    some = {name for name in names if "ln_" in name or name.endswith("c_fc.weight")}
    delta = low_rank.delta(base, moved(base, 2, some), some, 2, 1)
    assert [rest.what for rest in delta.rest] == [low_rank.NORMS] and len(delta.changes) == 2


def test_matrices_that_did_not_change_are_left_out() -> None:
    base = randomised(LlamaForCausalLM(llama_config()))
    names = set(named_parameters(base))
    end = moved(base, 2, {"model.layers.1.self_attn.q_proj.weight"})
    assert [change.matrix.path for change in low_rank.delta(base, end, names, 2, 1).changes] == [
        "model.layers.1.self_attn.q_proj"
    ]
    with pytest.raises(ValueError, match="no matrix changed"):
        low_rank.delta(base, copy.deepcopy(base), names, 2, 1)


def test_a_layer_under_several_names_is_one_that_no_lora_holds() -> None:
    """What is added to it would be added as often as peft meets it."""
    config = AlbertConfig(
        vocab_size=31,
        embedding_size=8,
        hidden_size=12,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_groups=1,
    )
    base = randomised(AlbertForMaskedLM(config))
    base.albert.more = base.albert.encoder  # type: ignore[union-attr]
    names = set(named_parameters(base))
    delta = low_rank.delta(base, moved(base, 2, names), names, 2, 1)
    assert {change.matrix.kind for change in delta.changes} == {"predictions.dense"}
    assert low_rank.OTHERS in {rest.what for rest in delta.rest}


def test_a_classifiers_head_and_what_its_folder_lacked_go_whole() -> None:
    shape = {"vocab_size": 47, "hidden_size": 18, "intermediate_size": 25, "num_hidden_layers": 1}
    base = randomised(BertForSequenceClassification(BertConfig(num_attention_heads=3, num_labels=3, **shape)))  # type: ignore[arg-type]
    initial.remember(base, ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.weight"])
    names = set(named_parameters(base))
    end = moved(base, 2, names)
    delta = low_rank.delta(base, end, names, 2, 1)
    assert list(delta.heads) == ["classifier", "bert.pooler.dense"]
    assert torch.equal(delta.heads["classifier"]["weight"], named_parameters(end)["classifier.weight"])
    assert not {"classifier", "bert.pooler.dense"} & {change.matrix.path for change in delta.changes}
    assert {rest.what for rest in delta.rest} == {low_rank.EMBEDDINGS, low_rank.NORMS, low_rank.BIASES}
