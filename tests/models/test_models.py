"""Models: true sizes, fresh weights from a seed, what each scope trains, rebuilding from a description."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import BERT, GPT2, LLAMA
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zofed import config
from zofed.base.errors import UserError
from zofed.core.digests import weights_digest
from zofed.data import encoding
from zofed.models import spec
from zofed.models.precision import ready
from zofed.models.scopes import trainable_names, true_count
from zofed.models.sources import Fresh
from zofed.models.spec import create_model, describe, rebuild


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return encoding.load_tokenizer("shipped")


def settings(**values: Any) -> config.Settings:
    return config.resolve({"device": "cpu", "block-size": 16} | values)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def on_meta(kind: Callable[[Any], nn.Module], model_config: Any) -> nn.Module:
    """The model's shapes without its memory."""
    with torch.device("meta"):
        return kind(model_config)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tiny", 141_056),
        ("20M", 17_867_008),
        ("200M", 124_439_808),
        ("500M", 354_823_168),
        ("1B", 774_030_080),
    ],
)
def test_each_named_size_has_its_known_number_of_parameters(
    monkeypatch: pytest.MonkeyPatch, name: str, parameters: int
) -> None:
    monkeypatch.setattr(Fresh, "create", lambda source, config, *kind, **_: on_meta(source.kind(*kind), config))
    chosen = settings(model=name)
    model = create_model(chosen, encoding.load_tokenizer(spec.tokenizer_name(chosen)))
    assert true_count(model) == parameters


def test_a_named_size_brings_its_tokenizer_a_folder_its_own_and_a_setting_overrides_both(tmp_path: Path) -> None:
    assert spec.tokenizer_name(settings(model="tiny")) == "shipped"
    assert spec.tokenizer_name(settings(model="20M")) == "gpt2"
    assert spec.tokenizer_name(settings(model="20M", tokenizer="shipped")) == "shipped"
    assert spec.tokenizer_name(settings(model=str(tmp_path))) == str(tmp_path)


def test_fresh_weights_are_a_function_of_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    first, again, other = (weights_digest(create_model(settings(seed=seed), tokenizer)) for seed in (7, 7, 8))
    assert first == again != other


def test_a_fresh_model_has_gpt2s_initial_scales(tokenizer: PreTrainedTokenizerBase) -> None:
    weights = create_model(settings(), tokenizer).state_dict()
    assert float(weights["transformer.wte.weight"].std()) == pytest.approx(0.02, rel=0.05)
    residual = 0.02 / (2 * 2) ** 0.5  # two blocks
    assert float(weights["transformer.h.0.mlp.c_proj.weight"].std()) == pytest.approx(residual, rel=0.05)
    assert bool((weights["transformer.ln_f.weight"] == 1).all())
    assert not bool(weights["transformer.h.0.mlp.c_fc.bias"].any())


def test_building_and_loading_leave_the_global_random_state_alone(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = saved(GPT2LMHeadModel(GPT2), tmp_path)
    before = torch.get_rng_state()
    create_model(settings(), tokenizer)
    create_model(settings(model=folder), tokenizer)
    create_model(settings(model=folder, task="classification"), tokenizer, labels=3)  # draws a head
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tokenizer_that_leaves_ids_out_fits_where_its_largest_id_does(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved(create_model(settings(), tokenizer), tmp_path / "whole")
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"a": 0, "b": 600})
    assert create_model(settings(), tokenizer).config.vocab_size == 601
    assert create_model(settings(model=whole), tokenizer).config.vocab_size == 512  # the documents decide


def test_fresh_weights_do_not_depend_on_the_global_random_state(tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(1)
    first = weights_digest(create_model(settings(), tokenizer))
    torch.manual_seed(2)
    assert weights_digest(create_model(settings(), tokenizer)) == first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_comes_in_its_dtype_ready_to_be_asked(tokenizer: PreTrainedTokenizerBase, dtype: str) -> None:
    model = create_model(settings(dtype=dtype), tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert not any(module.training for module in model.modules())


def names(prefix: str, *stems: str) -> set[str]:
    """Weight and bias of each stem below the prefix."""
    return {f"{prefix}.{stem}.{end}" for stem in stems for end in ("weight", "bias")}


GPT2_BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
LLAMA_MLP = {
    f"model.layers.1.{stem}.weight"
    for stem in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")
}
LLAMA_BLOCK = LLAMA_MLP | {
    f"model.layers.1.{stem}.weight"
    for stem in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
}
BERT_MLP = names("bert.encoder.layer.1", "attention.output.LayerNorm", "intermediate.dense", "output.dense")
BERT_BLOCK = BERT_MLP | names(
    "bert.encoder.layer.1",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "output.LayerNorm",
)


@pytest.fixture(scope="module")
def shapes() -> dict[str, nn.Module]:
    return {
        "gpt2": on_meta(GPT2LMHeadModel, GPT2),
        "gpt2-classifier": on_meta(GPT2ForSequenceClassification, GPT2),
        "llama": on_meta(LlamaForCausalLM, LLAMA),
        "bert": on_meta(BertForSequenceClassification, BERT),
    }


@pytest.mark.parametrize(
    ("shape", "scope", "expected"),
    [
        ("gpt2", "reduced", names("transformer.h.1", "ln_2", "mlp.c_fc", "mlp.c_proj")),
        ("gpt2", "norms", names("transformer.h.0", "ln_1", "ln_2") | names("transformer.h.1", "ln_1", "ln_2")
         | names("transformer", "ln_f")),
        ("gpt2", "last-1", names("transformer.h.1", *GPT2_BLOCK) | names("transformer", "ln_f")),
        ("gpt2", "last-2", names("transformer.h.0", *GPT2_BLOCK) | names("transformer.h.1", *GPT2_BLOCK)
         | names("transformer", "ln_f")),
        ("gpt2", "last-0", names("transformer", "ln_f")),
        ("gpt2", r"h\.0\.mlp", names("transformer.h.0", "mlp.c_fc", "mlp.c_proj")),
        ("gpt2-classifier", "head", {"score.weight"}),
        ("gpt2-classifier", "last-1",
         names("transformer.h.1", *GPT2_BLOCK) | names("transformer", "ln_f") | {"score.weight"}),
        ("llama", "reduced", LLAMA_MLP | {"lm_head.weight"}),
        ("llama", "head", {"lm_head.weight"}),
        ("llama", "norms", {f"model.layers.{number}.{norm}.weight" for number in (0, 1)
                            for norm in ("input_layernorm", "post_attention_layernorm")} | {"model.norm.weight"}),
        ("llama", "last-1", LLAMA_BLOCK | {"model.norm.weight", "lm_head.weight"}),
        ("bert", "reduced", BERT_MLP | {"classifier.weight", "classifier.bias"}),
        ("bert", "head", {"classifier.weight", "classifier.bias"}),
        ("bert", "last-1", BERT_BLOCK | names("bert", "pooler.dense") | {"classifier.weight", "classifier.bias"}),
    ],
)  # fmt: skip
def test_a_scope_trains_what_it_says(shapes: dict[str, nn.Module], shape: str, scope: str, expected: set[str]) -> None:
    assert set(trainable_names(shapes[shape], scope)) == expected


@pytest.mark.parametrize("shape", ["gpt2", "gpt2-classifier", "llama", "bert"])
def test_full_is_every_parameter_once_and_biases_are_exactly_those(shapes: dict[str, nn.Module], shape: str) -> None:
    order = [name for name, _ in shapes[shape].named_parameters()]
    assert trainable_names(shapes[shape], "full") == order
    if shape != "llama":
        assert trainable_names(shapes[shape], "biases") == [name for name in order if name.endswith(".bias")]


@pytest.mark.parametrize(
    ("shape", "scope", "told"),
    [
        ("gpt2", "head", "leaves nothing"),  # tied to the embedding
        ("llama", "biases", "leaves nothing"),
        ("gpt2", "no-such-name", "leaves nothing"),
        ("gpt2", "", "leaves nothing"),
        ("gpt2", "last-3", "has 2 blocks"),
        ("gpt2", "(", "regular expression"),
    ],
)
def test_a_scope_that_cannot_be_is_refused_with_a_remedy(
    shapes: dict[str, nn.Module], shape: str, scope: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        trainable_names(shapes[shape], scope)
    message = str(caught.value)
    assert repr(scope) in message and told in message and "use " in message


@pytest.mark.parametrize("labels", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_model_is_rebuilt_from_its_description(
    tokenizer: PreTrainedTokenizerBase, labels: int, dtype: str
) -> None:
    task = "classification" if labels else "language-model"
    model = create_model(settings(seed=3, dtype=dtype, task=task), tokenizer, labels)
    description = json.loads(json.dumps(describe("tiny", model)))  # as it comes back from a journal
    assert weights_digest(rebuild(description, 3, dtype)) == weights_digest(model)
    assert weights_digest(rebuild(description, 4, dtype)) != weights_digest(model)


@pytest.mark.parametrize(
    ("kind", "shape", "labels"),
    [
        (GPT2LMHeadModel, GPT2, 0),
        (LlamaForCausalLM, LLAMA, 0),
        (BertForSequenceClassification, BERT, 2),
        (GPT2LMHeadModel, GPT2, 2),
        (GPT2LMHeadModel, GPT2, 5),
        (BertForMaskedLM, BERT, 5),
    ],
    ids=["gpt2", "llama", "bert-with-head", "gpt2-fresh-head-2", "gpt2-fresh-head-5", "bert-fresh-head-and-pooler"],
)
def test_a_saved_model_is_rebuilt_from_its_description_wherever_it_lies(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, kind: Any, shape: Any, labels: int
) -> None:
    folder = saved(kind(shape), tmp_path / "first")
    task = "classification" if labels else "language-model"
    model = create_model(settings(model=folder, seed=3, task=task), tokenizer, labels)
    description = json.loads(json.dumps(describe(folder, model)))
    Path(folder).rename(tmp_path / "moved")
    again = rebuild(description, 3, "float32", str(tmp_path / "moved"))
    assert type(again) is type(model)
    assert weights_digest(again) == weights_digest(model)
    with pytest.raises(UserError, match="unknown model"):
        rebuild(description, 3, "float32")


def test_a_fresh_head_depends_on_the_seed_and_the_rest_does_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = saved(GPT2LMHeadModel(GPT2), tmp_path)
    first, second = (
        create_model(settings(model=folder, seed=seed, task="classification"), tokenizer, 3).state_dict()
        for seed in (1, 2)
    )
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["score.weight"]


@pytest.mark.parametrize("model", ["tiny", "llama"])
def test_a_saved_folder_reloads_through_transformers_bit_for_bit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, model: str
) -> None:
    source = model if model == "tiny" else saved(LlamaForCausalLM(LLAMA), tmp_path / "llama")
    built = create_model(settings(model=source), tokenizer)
    built.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert weights_digest(loaded) == weights_digest(built)
    tokens = torch.arange(16).view(1, 16)
    with torch.no_grad():
        own = built(input_ids=tokens).logits
        again = create_model(settings(model=str(tmp_path / "saved")), tokenizer)
        assert torch.equal(again(input_ids=tokens).logits, own)
        theirs = loaded(input_ids=tokens).logits
        if model == "tiny":  # transformers computes GPT-2's GELU in eight operations, zofed in one of torch
            assert float((theirs - own).abs().max()) < 1e-5
        else:
            assert torch.equal(theirs, own)


def test_a_bidirectional_model_is_no_language_model(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = saved(BertForMaskedLM(BERT), tmp_path)
    with pytest.raises(UserError, match=r"sees the tokens it should predict.*set task to classification"):
        create_model(settings(model=folder), tokenizer)


def test_a_model_with_untrained_layers_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = saved(GPT2LMHeadModel(GPT2), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text()) | {"n_layer": 3}
    (tmp_path / "config.json").write_text(json.dumps(written))
    for task, labels in (("language-model", 0), ("classification", 2)):
        with pytest.raises(UserError, match=r"lacks 12 of its model's tensors, such as transformer\.h\.2\."):
            create_model(settings(model=folder, task=task), tokenizer, labels)


def test_a_language_model_without_its_head_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = saved(LlamaForCausalLM(LLAMA), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its model's tensors, such as lm_head\.weight"):
        create_model(settings(model=folder), tokenizer)


def test_a_config_with_infinite_numbers_is_described_in_plain_json() -> None:
    """Mamba-2's kin have no upper limit to their time steps."""
    with torch.device("meta"):
        model = Mamba2ForCausalLM(
            Mamba2Config(vocab_size=16, hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1, n_groups=1)
        )
    assert math.inf in model.config.time_step_limit
    described = json.loads(json.dumps(describe("folder", ready(model, "float32")), allow_nan=False))
    assert described["config"]["time_step_limit"] == [0.0, "inf"]
