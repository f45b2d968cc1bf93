"""Saved models: every tensor they hold is found, what they never had is drawn and told, what is lost is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.digests import weights_digest
from zofed.data import encoding
from zofed.models import initial, limits, spec
from zofed.training import central

SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 2, "max_position_embeddings": 34, "pad_token_id": 0, "eos_token_id": 0}
GPT2 = GPT2Config(vocab_size=512, n_layer=2, n_head=2, n_embd=16, n_positions=32, bos_token_id=0, eos_token_id=0)
T5 = T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0,
              pad_token_id=1, eos_token_id=0)  # fmt: skip

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return encoding.load_tokenizer("shipped")


def saved(model: PreTrainedModel, folder: Path, change: Change = dict, **written: Any) -> Path:
    """A model's folder, its tensors changed, its config.json with these values."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | written))
    return folder


def classifier(folder: Path, tokenizer: PreTrainedTokenizerBase, labels: int = 2, **values: Any) -> Any:
    settings = {"device": "cpu", "block-size": 16, "task": "classification", "model": str(folder)} | values
    return spec.create_model(config.resolve(settings), tokenizer, labels)


def renamed(old: str, new: str) -> Change:
    return lambda found: {new if name == old else name: tensor.clone() for name, tensor in found.items()}


def without(*beginnings: str) -> Change:
    return lambda found: {name: tensor for name, tensor in found.items() if not name.startswith(beginnings)}


LLAMA_EMBEDDING, BERT_EMBEDDING = "model.embed_tokens.weight", "bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize(
    ("build", "old", "new", "pooling"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)), LLAMA_EMBEDDING, "lm_head.weight",
         "auto"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)), LLAMA_EMBEDDING, "lm_head.weight",
         "mean"),
        (lambda: GPT2LMHeadModel(GPT2), "transformer.wte.weight", "lm_head.weight", "auto"),
        (lambda: BertForMaskedLM(BertConfig(**SHAPE)), BERT_EMBEDDING, "cls.predictions.decoder.weight", "auto"),
        (lambda: T5ForConditionalGeneration(T5), "shared.weight", "lm_head.weight", "auto"),
    ],
    ids=["llama", "llama-pooled", "gpt2", "bert", "t5"],
)  # fmt: skip
def test_an_embedding_stored_under_the_output_layers_name_is_found_by_a_classifier(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], PreTrainedModel],
    old: str,
    new: str,
    pooling: str,
) -> None:
    model = build()
    monkeypatch.setattr(limits, "check_reads", lambda *_: None)  # T5's end token is no matter here
    for change in (dict, renamed(old, new)):
        folder = saved(model, tmp_path, change)
        loaded = classifier(folder, tokenizer, pooling=pooling)
        rows = loaded.get_input_embeddings() if pooling == "auto" else loaded.encoder.get_input_embeddings()
        assert torch.equal(rows.weight, model.get_input_embeddings().weight)
        assert all("embed" not in name and "shared" not in name for name in initial.drawn(loaded))


def test_a_language_model_finds_its_embedding_under_either_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    folder = saved(model, tmp_path, renamed(LLAMA_EMBEDDING, "lm_head.weight"))
    loaded = spec.create_model(config.resolve({"block-size": 16, "model": str(folder)}), tokenizer)
    assert weights_digest(loaded) == weights_digest(model)


@pytest.mark.first(3)
@pytest.mark.parametrize(
    ("build", "change", "lost"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SHAPE)), without("bert.embeddings", "cls.predictions.decoder"),
         r"lacks 5 .*bert\.embeddings\.LayerNorm\.bias, bert\.embeddings\.LayerNorm\.weight, "),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)), without(LLAMA_EMBEDDING), r"lacks 1 .*model\.embed_tokens"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)), without("model.norm"), r"lacks 1 .*model\.norm\.weight"),
        (lambda: GPT2LMHeadModel(GPT2), without("transformer.wpe"), r"lacks 1 .*transformer\.wpe\.weight"),
        (lambda: BertModel(BertConfig(**SHAPE)), without("embeddings.word"), r"lacks 1 .*bert\.embeddings\.word_emb"),
        (lambda: BertForSequenceClassification(BertConfig(**SHAPE)), without("classifier."), r"lacks 2 .*classifier"),
        (lambda: BertForMaskedLM(BertConfig(**SHAPE)),
         lambda found: {f"module.{name}": tensor for name, tensor in found.items()}, r"holds module\.bert.*instead"),
    ],
    ids=["bert", "untied", "norm", "positions", "without-prefix", "own-head", "wrapped"],
)  # fmt: skip
def test_a_base_that_lacks_tensors_of_its_own_is_refused_by_their_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, build: Callable[[], PreTrainedModel], change: Change, lost: str
) -> None:
    folder = saved(build(), tmp_path, change)
    for written in ({}, {"architectures": None}):  # old folders do not say what they were saved as
        config_file = folder / "config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | written))
        if written and "classifier" in lost:
            continue
        with pytest.raises(UserError, match=lost):
            classifier(folder, tokenizer)


HEAD = ("classifier.bias", "classifier.weight")
POOLER = ("bert.pooler.dense.bias", "bert.pooler.dense.weight")


@pytest.mark.parametrize(
    ("build", "change", "fresh"),
    [
        (lambda: BertForSequenceClassification(BertConfig(**SHAPE)), dict, ()),
        (lambda: BertForMaskedLM(BertConfig(**SHAPE)), dict, POOLER + HEAD),
        (lambda: BertModel(BertConfig(**SHAPE)), dict, HEAD),
        (lambda: BertModel(BertConfig(**SHAPE), add_pooling_layer=False), dict, POOLER + HEAD),
        (lambda: BertForTokenClassification(BertConfig(**SHAPE, num_labels=9)), dict, POOLER + HEAD),
        (lambda: BertForMaskedLM(BertConfig(**SHAPE)), lambda found: found | {"extra.weight": torch.ones(3)},
         POOLER + HEAD),
        (lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)), dict, ("score.weight",)),
        (lambda: RobertaForMaskedLM(RobertaConfig(**SHAPE)), dict,
         ("classifier.dense.bias", "classifier.dense.weight", "classifier.out_proj.bias",
          "classifier.out_proj.weight")),
    ],
    ids=["whole", "masked", "base", "no-pooler", "token-head", "extra", "llama", "roberta"],
)  # fmt: skip
def test_only_what_the_saved_model_never_had_is_drawn_and_remembered(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[], PreTrainedModel],
    change: Change,
    fresh: tuple[str, ...],
) -> None:
    folder = saved(build(), tmp_path, change)
    first, second = (classifier(folder, tokenizer, seed=seed) for seed in (1, 2))
    assert initial.drawn(first) == tuple(sorted(fresh))
    weights = second.state_dict()
    differ = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert differ == {name for name in fresh if not name.endswith("bias")}  # a fresh bias is zero
    assert initial.drawn(spec.create_model(config.resolve({}), tokenizer)) == ()


def test_shards_are_read_as_one_file_is(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (classifier(tmp_path / name, tokenizer) for name in ("one", "many"))
    assert weights_digest(one) == weights_digest(many)


def test_a_head_of_another_number_of_classes_is_refused_with_both_ways_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = saved(BertForSequenceClassification(BertConfig(**SHAPE, num_labels=3)), tmp_path)
    with pytest.raises(UserError, match=r"classifier.* but \(2,.*data of 3 classes, or set pooling to mean"):
        classifier(folder, tokenizer)
    classifier(folder, tokenizer, labels=3)
    assert initial.drawn(classifier(folder, tokenizer, pooling="mean")) == HEAD


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_labels": 2, "problem_type": "regression"}, "problem_type 'regression'"),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, "'multi_label_classification'"),
        ({"num_labels": 1}, "a single output, which is a regression"),
    ],
)
def test_a_classifier_of_other_answers_than_one_label_is_refused_and_its_encoder_is_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, values: dict[str, Any], told: str
) -> None:
    folder = saved(BertForSequenceClassification(BertConfig(**SHAPE, **values)), tmp_path)
    with pytest.raises(UserError, match=rf"{told}.*set pooling to mean or last-token"):
        classifier(folder, tokenizer)
    assert classifier(folder, tokenizer, pooling="mean").classifier.out_features == 2
    encoder = saved(BertModel(BertConfig(**SHAPE, **values)), tmp_path / "encoder")
    ids = torch.tensor([[3, 4], [5, 6]])
    loss = classifier(encoder, tokenizer)(input_ids=ids, labels=torch.tensor([0, 1])).loss
    assert loss.dim() == 0 and loss.isfinite()


@pytest.mark.slow
def test_a_run_says_what_it_drew_and_a_run_that_drew_nothing_says_nothing(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    quick: Callable[..., Settings],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = saved(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path / "llama")
    values: dict[str, Any] = {"model": str(folder), "tokenizer": "shipped", "dataset": "sample-sst2", "steps": 1}
    values |= {"task": "classification", "queries": 1, "eval_interval": 1}
    summary = central.train(quick(**values), tmp_path / "run", lambda row: None)
    assert summary["drawn"] == ["score.weight"]
    assert "not in the saved model, drawn from the seed: score.weight" in capsys.readouterr().out
    again = central.train(
        quick(**values | {"model": str(tmp_path / "run" / "model")}), tmp_path / "2", lambda row: None
    )
    assert again["drawn"] == [] and "drawn" not in capsys.readouterr().out


def test_padding_of_another_tokenizer_does_not_move_where_positions_begin(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """RoBERTa counts positions from behind its own padding id, whatever the documents are padded with."""
    folder = saved(RobertaForMaskedLM(RobertaConfig(**SHAPE | {"pad_token_id": 1})), tmp_path)
    model = classifier(folder, tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model.roberta(ids).last_hidden_state, plain.roberta(ids).last_hidden_state)
    description = json.loads(json.dumps(spec.describe(str(folder), model)))
    again: Any = spec.rebuild(description, 0, "float32", str(folder))
    assert weights_digest(again) == weights_digest(model) and again.config.pad_token_id == 0
