"""Adapters of the peft library train like any other parameters, and nothing else of the model does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import gpt2_config, ids_of, llama_config, relative
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from zofed.core import directions, estimators, metrics, perturbed
from zofed.core.digests import named_parameters
from zofed.core.genesis import make_genesis
from zofed.core.journal import Genesis, genesis_chain, link
from zofed.core.optimizers import Optimizer
from zofed.core.records import Seeded, to_integers
from zofed.core.replica import Replica

pytestmark = pytest.mark.usefixtures("one_thread")
peft: Any = pytest.importorskip("peft", reason="peft is not installed")

SEEDS = [3, 1, 4, 15, 9]


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(gpt2_config())


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(llama_config())


def lora(**more: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **more)


def ia3(**more: Any) -> Any:
    return peft.IA3Config(task_type="CAUSAL_LM", **more)


def prompt() -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


# The model, its adapter, and what trainable names say.
ADAPTERS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], Any], str]] = {
    "lora of gpt2": (gpt2, lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), "lora_"),
    "lora of llama": (llama, lambda: lora(target_modules=["q_proj", "v_proj", "down_proj"]), "lora_"),
    "lora of llama, scaled by rank": (llama, lambda: lora(target_modules=["o_proj"], use_rslora=True), "lora_"),
    "prompts of gpt2": (gpt2, prompt, "prompt_encoder"),
    "ia3 of gpt2": (
        gpt2,
        lambda: ia3(target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True),
        "ia3_",
    ),
    "ia3 of llama": (llama, lambda: ia3(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), "ia3_"),
}


def drawn(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).mul(0.2).add(len(shape) == 1)


def adapted(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor], Any]:
    """A model with an adapter that does something, the adapter's parameters, a loss."""
    build, configure, _ = ADAPTERS[name]
    model = build()
    model.config.use_cache = False
    wrapped = peft.get_peft_model(model, configure()).to(dtype).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():  # LoRA begins at a product of zero: there half of it has no effect
            parameter.copy_(drawn(parameter.shape))
    ids = ids_of((3, 7), model.config.vocab_size, lowest=3)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    adapter: dict[str, Tensor] = {
        key: parameter for key, parameter in named_parameters(wrapped).items() if parameter.requires_grad
    }
    return wrapped, adapter, lambda: logits_loss(wrapped, batch)


def logits_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in the model's own type, whatever the adapter puts before the tokens."""
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return nn.functional.cross_entropy(logits[:, -labels.shape[1] - 1 : -1].flatten(0, 1), labels.flatten())


@pytest.mark.first(4)
@pytest.mark.parametrize("kind", ["rank1", "rank4"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_batched_losses_of_an_adapter_are_those_of_moved_weights(name: str, kind: str) -> None:
    _, adapter, loss = adapted(name)
    assert adapter
    assert all(ADAPTERS[name][2] in key for key in adapter)
    for part in ({key: value} for key, value in [*adapter.items()][:4]):
        assert_equal(loss, part, kind)
    assert_equal(loss, adapter, kind)


def assert_equal(loss: Any, parameters: dict[str, Tensor], kind: str) -> None:
    got = perturbed.losses(loss, parameters, kind, SEEDS, (0.125, -0.125), 4)
    wanted = estimators.materialised_losses(loss, parameters, kind, SEEDS, (0.125, -0.125))
    assert relative(got, wanted) < 1e-10
    assert relative(wanted[:, :1], wanted[:, 1:]) > 1e-9  # the perturbation is seen at all


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_librarys_own_loss_runs_batched_in_float32(name: str) -> None:
    model, adapter, _ = adapted(name, torch.float32)
    ids = ids_of((3, 7), 53, lowest=3)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    def loss() -> Tensor:
        return metrics.loss_of(model, batch)

    got = perturbed.losses(loss, adapter, "rank1", SEEDS, (0.1, -0.1), 4)
    wanted = estimators.materialised_losses(loss, adapter, "rank1", SEEDS, (0.1, -0.1))
    assert relative(got, wanted) < 2e-6
    exact = estimators.exact_slopes(loss, adapter, "rank1", SEEDS)
    slopes = estimators.FiniteDifference("rank1", 2**-8).slopes(loss, adapter, SEEDS).slopes
    assert slopes == pytest.approx(exact, abs=0.02 * estimators.root_mean_square(exact))


def genesis_of(model: nn.Module, adapter: dict[str, Tensor]) -> Genesis:
    return make_genesis(model, {}, adapter, seed=11, kind="rank1", optimizer=Optimizer("sgd", momentum=0.5))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_replay_of_the_records_gives_the_same_weights_and_the_base_never_moves(name: str) -> None:
    model, adapter, loss = adapted(name, torch.float32)
    genesis = genesis_of(model, adapter)
    base = {key: value.detach().clone() for key, value in named_parameters(model).items()}
    replica = Replica(model, genesis)
    assert {key for key, value in named_parameters(model).items() if value.requires_grad} == set(adapter)
    entries, head = [], genesis_chain(genesis)
    for round_ in (1, 2, 3):
        seeds = directions.direction_seeds(11, round_, 0, 3)
        integers, exponent = to_integers(replica.measure.slopes(loss, seeds, 1e-3, 4).slopes)
        entries.append(link(head, Seeded(round_, 0.05, (0,), 3, integers, exponent, 3)))
        head = entries[-1].chain
        assert replica.apply(entries[-1]) > 0
    for key, value in named_parameters(model).items():
        assert torch.equal(value, base[key]) == (key not in adapter), key
    other_model, other_adapter, _ = adapted(name, torch.float32)
    other = Replica(other_model, genesis_of(other_model, other_adapter))
    other.replay(entries)
    assert (other.digest(), other.head) == (replica.digest(), replica.head)


@pytest.mark.parametrize("name", ["lora of gpt2", "lora of llama"])
def test_a_float32_adapter_of_a_bfloat16_model_runs_both_ways(name: str) -> None:
    """As peft sets it up by itself."""
    build, configure, _ = ADAPTERS[name]
    model = peft.get_peft_model(build().bfloat16(), configure()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(drawn(parameter.shape))
    adapter: dict[str, Tensor] = {
        key: parameter for key, parameter in named_parameters(model).items() if parameter.requires_grad
    }
    assert {parameter.dtype for parameter in adapter.values()} == {torch.float32}
    ids = ids_of((3, 7), 53, lowest=3)

    def loss() -> Tensor:
        return metrics.loss_of(model, {"input_ids": ids, "labels": ids})

    got = perturbed.losses(loss, adapter, "rank1", SEEDS, (0.1, -0.1), 4)
    wanted = estimators.materialised_losses(loss, adapter, "rank1", SEEDS, (0.1, -0.1))
    assert relative(got, wanted) < 0.005
    assert relative(wanted[:, :1], wanted[:, 1:]) > 0.02
