"""Scopes name the same parts in every family of models, whatever the order and the names of its modules."""

import re
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from benchmarks import tiny_models
from zofed import config
from zofed.base.errors import UserError
from zofed.models import initial
from zofed.models.classifier import PooledClassifier
from zofed.models.scopes import frozen_though_drawn, inner_matrices, trainable_names
from zofed.training.replicas import replica_of

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def built(task: str, kind: str) -> PreTrainedModel:
    return tiny_models.build(task, kind)


def modules(model: nn.Module, scope: str) -> set[str]:
    """Modules whose parameters a scope trains."""
    return {name.rpartition(".")[0] for name in trainable_names(model, scope)}


HEADS = {
    ("causal", "gpt_neox"): {"lm_head"},
    ("causal", "olmo"): {"lm_head"},
    ("causal", "rwkv"): {"head"},
    ("classifier", "albert"): {"classifier"},
    ("classifier", "bart"): {"classification_head.dense", "classification_head.out_proj"},
    ("classifier", "camembert"): {"classifier.dense", "classifier.out_proj"},
    ("classifier", "distilbert"): {"pre_classifier", "classifier"},
    ("classifier", "modernbert"): {"head.dense", "head.norm", "classifier"},
    ("classifier", "t5"): {"classification_head.dense", "classification_head.out_proj"},
    ("classifier", "xlm-roberta"): {"classifier.dense", "classifier.out_proj"},
    ("classifier", "xlnet"): {"sequence_summary.summary", "logits_proj"},
}


@pytest.mark.parametrize(("task", "kind"), HEADS)
def test_the_head_is_all_that_lies_outside_the_base_model(task: str, kind: str) -> None:
    assert modules(built(task, kind), "head") == HEADS[task, kind]


# Beside the blocks of that prefix and the head: what the forward pass uses after the last block.
LAST = {
    ("causal", "gemma2"): (r"model\.layers\.", {"model.norm"}),
    ("causal", "gpt_neox"): (r"gpt_neox\.layers\.", {"gpt_neox.final_layer_norm", "lm_head"}),
    ("causal", "mamba"): (r"backbone\.layers\.", {"backbone.norm_f"}),
    ("causal", "olmo"): (r"model\.layers\.", {"lm_head"}),
    ("causal", "olmo2"): (r"model\.layers\.", {"model.norm", "lm_head"}),
    ("causal", "opt"): (r"model\.decoder\.layers\.", {"model.decoder.final_layer_norm"}),
    ("causal", "rwkv"): (r"rwkv\.blocks\.", {"rwkv.ln_out", "head"}),
    ("causal", "jamba"): (r"model\.layers\.", {"model.final_layernorm", "lm_head"}),
    ("classifier", "bart"): (r"model\.decoder\.layers\.", HEADS["classifier", "bart"]),
    ("classifier", "camembert"): (r"roberta\.encoder\.layer\.", HEADS["classifier", "camembert"]),
    ("classifier", "distilbert"): (r"distilbert\.transformer\.layer\.", HEADS["classifier", "distilbert"]),
    ("classifier", "modernbert"): (r"model\.layers\.", {"model.final_norm"} | HEADS["classifier", "modernbert"]),
    ("classifier", "t5"): (
        r"transformer\.decoder\.block\.",
        {"transformer.decoder.final_layer_norm"} | HEADS["classifier", "t5"],
    ),
    ("classifier", "xlm-roberta"): (r"roberta\.encoder\.layer\.", HEADS["classifier", "xlm-roberta"]),
}


@pytest.mark.parametrize(("task", "kind"), LAST)
def test_the_last_blocks_take_with_them_what_is_used_after_them(task: str, kind: str) -> None:
    blocks, rest = LAST[task, kind]
    model = built(task, kind)
    for count, numbers in ((1, {1}), (2, {0, 1})):
        chosen = modules(model, f"last-{count}")
        found = {name: match for name in chosen if (match := re.match(blocks + r"(\d+)", name))}
        assert {int(match[1]) for match in found.values()} == numbers
        inside = {
            name
            for name, _ in model.named_parameters()
            if (m := re.match(blocks + r"(\d+)", name)) and int(m[1]) in numbers
        }
        assert {name for name in trainable_names(model, f"last-{count}") if name in inside} == inside
        assert chosen - set(found) == rest


def test_shared_blocks_count_once() -> None:
    model = built("classifier", "albert")
    assert {"albert.pooler", "classifier"} < modules(model, "last-1")
    assert not any("embeddings" in name for name in modules(model, "last-1"))
    with pytest.raises(UserError, match="has 1 blocks of its own; use last-1 at most"):
        trainable_names(model, "last-2")


def test_lists_that_lie_side_by_side_are_one_stack() -> None:
    """XLM keeps its attentions, their norms and its MLPs in lists of their own."""
    chosen = modules(built("classifier", "flaubert"), "last-1")
    assert {"transformer.attentions.1.q_lin", "transformer.ffns.1.lin1"} < chosen
    assert not any(".0." in name for name in chosen)


def test_lists_of_embeddings_or_projections_and_towers_that_texts_pass_by_are_no_blocks() -> None:
    markup = modules(built("classifier", "markuplm"), "last-1")
    assert markup == {name for name in markup if name.startswith(("markuplm.encoder.layer.1.", "markuplm.pooler."))} | {
        "classifier"
    }
    seeing = modules(built("causal", "phi4_multimodal"), "last-1")
    assert all(name.startswith("model.layers.1.") or name in ("model.norm", "lm_head") for name in seeing)


NORMS = {
    ("causal", "opt"): 5,
    ("causal", "rwkv"): 6,  # pre_ln, ln1, ln2, ln_out
    ("causal", "olmo2"): 9,
    ("causal", "mamba"): 3,
    ("classifier", "xlm-roberta"): 5,
    ("classifier", "t5"): 12,
}


@pytest.mark.parametrize(("task", "kind"), NORMS)
def test_norms_are_found_by_their_class(task: str, kind: str) -> None:
    model = built(task, kind)
    found = modules(model, "norms")
    assert len(found) == NORMS[task, kind]
    assert all("norm" in type(model.get_submodule(name)).__name__.lower() for name in found)


def test_norms_without_weights_leave_nothing_to_train() -> None:
    with pytest.raises(UserError, match="scope = 'norms' leaves nothing to train"):
        trainable_names(built("causal", "olmo"), "norms")


REDUCED = {
    ("causal", "opt"): {"model.decoder.layers.1." + part for part in ("fc1", "fc2", "final_layer_norm")},
    ("causal", "gpt_neox"): {
        "gpt_neox.layers.1." + part for part in ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    }
    | {"lm_head"},
    ("causal", "mixtral"): {
        "model.layers.1." + part for part in ("post_attention_layernorm", "mlp.gate", "mlp.experts")
    }
    | {"lm_head"},
    ("classifier", "distilbert"): {
        "distilbert.transformer.layer.1." + part for part in ("sa_layer_norm", "ffn.lin1", "ffn.lin2")
    }
    | {"pre_classifier", "classifier"},
}


@pytest.mark.parametrize(("task", "kind"), REDUCED)
def test_reduced_is_the_last_blocks_mlp_and_the_norm_before_it(task: str, kind: str) -> None:
    assert modules(built(task, kind), "reduced") == REDUCED[task, kind]


@pytest.mark.parametrize(
    ("kind", "more", "norm", "parts"),
    [
        ("jamba", {"attn_layer_offset": 0}, "pre_ff_layernorm", {"feed_forward"}),
        ("lfm2", {"layer_types": ["full_attention", "conv"]}, "ffn_norm", {"feed_forward"}),
        ("recurrent_gemma", {}, "channel_pre_norm", {"mlp_block"}),
    ],
)
def test_reduced_finds_the_mlp_behind_what_stands_in_place_of_an_attention(
    kind: str, more: dict[str, Any], norm: str, parts: set[str]
) -> None:
    config = built("causal", kind).config.to_dict() | more
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config))
    inner = {name.split(".")[3] for name in trainable_names(model, "reduced") if name.startswith("model.layers.1.")}
    assert inner == parts | {norm}
    assert not any(name.startswith("model.layers.0.") for name in trainable_names(model, "reduced"))


def test_what_was_drawn_trains_with_the_top_and_is_named_where_it_does_not() -> None:
    model = tiny_models.build("classifier", "bert")
    fresh = ("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    assert "bert.pooler" not in modules(model, "head")
    initial.remember(model, fresh)
    for scope in ("head", "reduced", "last-1", "full"):
        names = trainable_names(model, scope)
        assert set(fresh) <= set(names)
        assert frozen_though_drawn(model, names) == []
    for scope in ("norms", "query"):
        assert frozen_though_drawn(model, trainable_names(model, scope)) == list(fresh)


def test_matrices_of_a_head_are_not_inner_ones() -> None:
    model = built("classifier", "distilbert")
    found = inner_matrices(model, trainable_names(model, "full"))
    assert found and all(".layer." in name for name in found)


@pytest.mark.parametrize("scope", ["last-1", "reduced", "head"])
def test_an_outline_without_storage_has_the_scopes_of_the_model(scope: str) -> None:
    for task, kind in (("causal", "opt"), ("classifier", "xlm-roberta"), ("classifier", "bert")):
        model = built(task, kind)
        with torch.device("meta"):
            outline = type(model)(model.config)
        if (task, scope) != ("causal", "head"):  # OPT's is tied to the embedding
            assert trainable_names(outline, scope) == trainable_names(model, scope)


def test_a_pooled_classifiers_head_is_its_linear_layer() -> None:
    encoder = built("classifier", "bert").base_model
    model = PooledClassifier(encoder, "mean", 2, is_frozen=False)
    assert modules(model, "head") == {"classifier"}
    assert "encoder.encoder.layer.1.output.dense" in modules(model, "last-1")
    assert "encoder.embeddings.word_embeddings" not in modules(model, "last-1")


def test_a_run_says_what_it_leaves_as_drawn() -> None:
    model = tiny_models.build("classifier", "bert")
    initial.remember(model, ("classifier.bias", "classifier.weight"))
    settings = config.resolve({"model": "any", "task": "classification", "scope": "norms", "device": "cpu"})
    with pytest.warns(UserWarning, match=r"scope = 'norms' leaves classifier\.bias, classifier\.weight as drawn"):
        replica_of(settings, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replica_of(settings.model_copy(update={"scope": "head"}), model)
