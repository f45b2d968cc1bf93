"""bfloat16: every tensor in the type the library would give it, and logits as near to float32's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    XGLMConfig,
    XGLMForCausalLM,
)

from zofed import config
from zofed.config import Settings
from zofed.core import perturbed
from zofed.core.digests import weights_digest
from zofed.core.estimators import FiniteDifference
from zofed.core.genesis import TRAINABLE_DTYPES
from zofed.data import encoding
from zofed.models import spec
from zofed.runs.run_folder import RunFolder
from zofed.training import central
from zofed.training.finalize import replay_run

SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SHAPE |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SMALL = {"vocab_size": 512, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
XGLM = {"vocab_size": 512, "d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, bos_token_id=0, eos_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),  # scales its embedding by a buffer
    "glm4-moe": lambda: Glm4MoeForCausalLM(Glm4MoeConfig(**SHAPE, **EXPERTS)),  # keeps its gates in float32
    "openai-gpt": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**SMALL)),  # its mask is a buffer of the run's type
    "xglm": lambda: XGLMForCausalLM(XGLMConfig(**XGLM)),  # positions in a buffer of the run's type
    "bert": lambda: BertForSequenceClassification(BertConfig(**SHAPE)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny saved models, each with the shipped tokenizer."""
    found = {}
    for name, build in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            build().save_pretrained(found[name])
        encoding.load_tokenizer("shipped").save_pretrained(found[name])
    return found


def create(folder: Path, dtype: str, labels: int = 0) -> Any:
    task = "classification" if labels else "language-model"
    values = {"device": "cpu", "block-size": 16, "dtype": dtype, "model": str(folder), "task": task}
    return spec.create_model(config.resolve(values), encoding.load_tokenizer(str(folder)), labels)


def types(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_has_the_type_that_the_library_loads_it_in(folders: dict[str, Path], name: str) -> None:
    labels = 2 if name == "bert" else 0
    model = create(folders[name], "bfloat16", labels)
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    plain = kind.from_pretrained(folders[name], dtype=torch.bfloat16)
    assert types(model) == types(plain)
    assert all(tensor.dtype in TRAINABLE_DTYPES for tensor in model.parameters())
    whole = create(folders[name], "float32", labels)
    assert {tensor.dtype for tensor in whole.parameters()} == {torch.float32}
    if name == "glm4-moe":
        assert types(model)["model.layers.1.mlp.gate.weight"] == torch.float32


def test_what_the_librarys_own_list_keeps_in_float32_stays_so(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["layers.*.input_layernorm", "lm_head"])
    found = types(create(folders["llama"], "bfloat16"))
    assert found == types(AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16))
    kept = {name for name, dtype in found.items() if dtype == torch.float32 and name.endswith("weight")}
    assert kept == {"lm_head.weight", *(f"model.layers.{number}.input_layernorm.weight" for number in (0, 1))}


@torch.no_grad()
def test_far_positions_are_as_exact_as_the_librarys(tmp_path: Path) -> None:
    """Rotary frequencies in bfloat16 would turn the last positions of a long block by whole radians."""
    shape = SHAPE | {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 2048}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**shape))
        for tensor in model.parameters():
            if tensor.dim() > 1:
                tensor.mul_(6)  # sharper than a fresh model
        model.save_pretrained(tmp_path)
        ids = torch.randint(3, 500, (1, 1024))
    encoding.load_tokenizer("shipped").save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    exact, ours, theirs = (
        each.eval()(input_ids=ids).logits[0, -64:].float() for each in (model, create(tmp_path, "bfloat16"), plain)
    )
    error, their_error = (float((found - exact).norm() / exact.norm()) for found in (ours, theirs))
    assert error < 1.05 * their_error < 0.1


@pytest.mark.first(1)
@pytest.mark.parametrize("name", ["llama", "glm4-moe"])
def test_a_run_in_bfloat16_replays_and_its_export_goes_on(
    folders: dict[str, Path], tmp_path: Path, quick: Callable[..., Settings], name: str
) -> None:
    settings = quick(model=str(folders[name]), dtype="bfloat16", epsilon=0.01, steps=2, queries=2, eval_interval=2)
    summary = central.train(settings, tmp_path / "run", lambda row: None)
    run = RunFolder(tmp_path / "run")
    assert replay_run(run)[0].digest() == summary["digest"] == summary["replay_digest"]
    genesis = json.loads(json.dumps(replay_run(run)[0].genesis))
    kept = {entry[0] for entry in genesis["trainable"] if entry[1] == "float32"}
    assert kept == ({"model.layers.1.mlp.gate.weight"} if name == "glm4-moe" else set())
    again = create(tmp_path / "run" / "model", "bfloat16")
    assert weights_digest(again) == summary["digest"]
    assert types(again) == types(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))


def test_copies_of_a_model_of_two_types_share_a_pass_and_agree_with_copies_alone() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parameters = {
        "embedding": drawn(9, 8).bfloat16(),
        "bias": drawn(8),
        "gate": drawn(4, 8),
        "out": drawn(3, 4).bfloat16(),
    }
    ids, targets = torch.arange(9), torch.arange(9) % 3

    def loss() -> Tensor:
        hidden = nn.functional.embedding(ids, parameters["embedding"])
        gated = nn.functional.linear(hidden.float() + parameters["bias"], parameters["gate"])
        return nn.functional.cross_entropy(nn.functional.linear(gated.bfloat16(), parameters["out"]).float(), targets)

    how = FiniteDifference("rank1", 0.05, "two-point", 8)
    together = how.slopes(loss, parameters, list(range(6)))
    alone = how.slopes(loss, parameters, list(range(6)), batched=False)
    assert torch.cosine_similarity(torch.tensor(together.slopes), torch.tensor(alone.slopes), 0) > 0.98
    coefficients = torch.zeros(6, requires_grad=True)
    along = perturbed.along(loss, parameters, "rank1", list(range(6)), coefficients)
    (exact,) = torch.autograd.grad(along, coefficients)
    assert torch.cosine_similarity(exact, torch.tensor(alone.slopes), 0) > 0.98
