"""What a model can read: the longest block, the tokens it has rows for, the end token a classifier wants."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    CamembertConfig,
    CamembertModel,
    Data2VecTextConfig,
    Data2VecTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    LongformerModel,
    MPNetConfig,
    MPNetModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLNetConfig,
    XLNetModel,
)

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import perturbed
from zofed.data import encoding
from zofed.data.tokenizers import SHIPPED_TOKENIZER
from zofed.models import limits, spec
from zofed.training import central
from zofed.training.task import Task

SHAPE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "max_position_embeddings": 36, "pad_token_id": 1, "eos_token_id": 0}
LONGFORMER = {"attention_window": [8]}
Quick = Callable[..., Settings]


def folder_of(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or encoding.load_tokenizer("shipped")).save_pretrained(folder)
    return str(folder)


def create(model: str, size: int, task: str = "classification") -> Any:
    settings = config.resolve({"device": "cpu", "block-size": size, "task": task, "model": model})
    return spec.create_model(settings, encoding.load_tokenizer(model), 2 if task == "classification" else 0)


@pytest.mark.parametrize(
    ("build", "longest"),
    [
        (lambda: RobertaModel(RobertaConfig(**SHAPE)), 34),
        (lambda: XLMRobertaModel(XLMRobertaConfig(**SHAPE)), 34),
        (lambda: CamembertModel(CamembertConfig(**SHAPE)), 34),
        (lambda: MPNetModel(MPNetConfig(**SHAPE)), 34),
        (lambda: Data2VecTextModel(Data2VecTextConfig(**SHAPE)), 34),
        (lambda: LongformerModel(LongformerConfig(**SHAPE, **LONGFORMER)), 34),
        (lambda: RobertaModel(RobertaConfig(**SHAPE | {"pad_token_id": 5})), 30),
        (lambda: OPTForCausalLM(OPTConfig(vocab_size=512, hidden_size=16, ffn_dim=24, num_hidden_layers=1,
                                          num_attention_heads=2, max_position_embeddings=36, word_embed_proj_dim=16)),
         36),
    ],
    ids=["roberta", "xlm-r", "camembert", "mpnet", "data2vec", "longformer", "padding-5", "opt"],
)  # fmt: skip
def test_the_longest_block_is_the_one_the_model_can_run(
    tmp_path: Path, build: Callable[[], PreTrainedModel], longest: int
) -> None:
    model = build()
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED_TOKENIZER))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    folder = folder_of(model, tmp_path, tokenizer)
    model = create(folder, longest)
    assert limits.positions(model) == longest
    for size in (longest + 1, longest + 2, 500):
        with pytest.raises(UserError, match=rf"block-size = {size} is longer than the {longest} .* to {longest} or"):
            create(folder, size)


def test_a_limit_that_no_config_tells_is_found_by_running_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(RobertaModel(RobertaConfig(**SHAPE)), tmp_path)
    monkeypatch.setattr(limits, "positions", lambda model: None)
    with pytest.raises(UserError, match=r"block-size = 36 is longer than the 34 positions .* set block-size to 34 or"):
        create(folder, 36)


@pytest.mark.parametrize(
    "build",
    [
        lambda: XLNetModel(XLNetConfig(vocab_size=512, d_model=16, n_layer=1, n_head=2, d_inner=24)),
        lambda: BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=16, n_layer=1, n_head=2)),
    ],
    ids=["xlnet", "bloom"],
)
def test_a_model_without_positions_takes_any_block(tmp_path: Path, build: Callable[[], PreTrainedModel]) -> None:
    assert limits.positions(create(folder_of(build(), tmp_path), 300)) is None


@pytest.fixture(scope="module")
def one_too_many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer has one token more than it has rows, as some multimodal families come."""
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED_TOKENIZER))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    return folder_of(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path_factory.mktemp("many"), tokenizer)


@pytest.mark.parametrize("task", ["language-model", "classification"])
def test_a_token_above_the_embedding_matters_only_where_a_document_uses_it(
    tmp_path: Path, quick: Quick, one_too_many: str, task: str
) -> None:
    def rows(text: str) -> Path:
        file = tmp_path / f"{len(text)}.jsonl"
        lines = [{"text": f"{text} number {number} of a few words more", "label": number % 2} for number in range(40)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return file

    settings = quick(model=one_too_many, dataset=str(rows("plain")), task=task, steps=1, queries=1, eval_interval=1)
    assert central.train(settings, tmp_path / "run", lambda row: None)["status"] == "completed"
    settings = settings.model_copy(update={"dataset": str(rows("an <image_soft_token>"))})
    told = r"has 513 entries but model .* only 512: set tokenizer .* or take '<image_soft_token>', id 512, out of"
    with pytest.raises(UserError, match=told):
        central.train(settings, tmp_path / "refused", lambda row: None)
    assert not (tmp_path / "refused").exists()


def test_padding_above_the_embedding_is_named(tmp_path: Path, quick: Quick) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED_TOKENIZER))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = folder_of(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path / "model", tokenizer)
    settings = quick(model=folder, dataset="sample-sst2", task="classification")
    with pytest.raises(UserError, match=r"pads with '\[PAD\]', id 512: set the pad_token .* to a token below 512"):
        Task.load(settings).shard(0, 1)


def with_end(pad: str) -> Any:
    """The shipped tokenizer, which ends each document with the token of id 2, as T5's own does with its."""
    tokenizer = AutoTokenizer.from_pretrained(str(SHIPPED_TOKENIZER))
    end = tokenizer.convert_ids_to_tokens(2)
    tokenizer.eos_token, tokenizer.pad_token = end, pad or end
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 2)])
    return tokenizer


@pytest.mark.slow
def test_a_classifier_that_reads_at_the_end_token_needs_it_once_in_each_document(tmp_path: Path, quick: Quick) -> None:
    shape = {"vocab_size": 512, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**shape, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))
    end = encoding.load_tokenizer("shipped").convert_ids_to_tokens(2)
    plain = folder_of(model, tmp_path / "plain")
    whole = folder_of(model, tmp_path / "whole", with_end("<|endoftext|>"))
    padded = folder_of(model, tmp_path / "padded", with_end(""))
    values: dict[str, Any] = {"task": "classification", "dataset": "sample-sst2", "steps": 1, "queries": 1}
    with pytest.raises(UserError, match=r"reads a document's class at the end token .* which this tokenizer does not"):
        central.train(quick(model=plain, **values), tmp_path / "run", lambda row: None)
    with pytest.raises(limits.Unreadable, match=r"set tokenizer to the model's own$"):
        Task.load(quick(model=plain, **values)).check_held_out()  # and no word of a larger held-out part
    with pytest.raises(UserError, match=r"with which this tokenizer also pads"):
        central.train(quick(model=padded, **values), tmp_path / "run", lambda row: None)
    lines = [{"text": f"good{end * (n % 2)} film", "label": n // 2 % 2} for n in range(40)]
    (tmp_path / "ends.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"some documents have 1 of it and some 2: take its text out"):
        central.train(quick(model=whole, **values | {"dataset": str(tmp_path / "ends.jsonl")}), tmp_path / "run",
                      lambda row: None)  # fmt: skip
    summary = central.train(quick(model=whole, **values), tmp_path / "run", lambda row: None)
    assert summary["status"] == "completed"


def test_a_model_that_does_not_run_on_token_ids_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path)

    def fail(self: Any, *_: Any, **__: Any) -> Any:
        raise AttributeError("no pixels were given")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fail)
    with pytest.raises(UserError, match=r"\(LlamaForCausalLM\) does not run on token ids alone \(no pixels"):
        create(folder, 16, "language-model")


@pytest.mark.slow
def test_memory_and_diagnosis_of_a_model_whose_copies_cannot_share_a_pass(
    tmp_path: Path, quick: Quick, monkeypatch: pytest.MonkeyPatch, zofed_command: Callable[..., tuple[int, str, str]]
) -> None:
    def cannot(*_: Any, **__: Any) -> Any:
        raise perturbed.CannotBatch("one of its operations has no rule")

    monkeypatch.setattr(perturbed, "losses", cannot)
    settings = quick(model=folder_of(LlamaForCausalLM(LlamaConfig(**SHAPE)), tmp_path), dataset="sample-dclm")
    with pytest.warns(UserWarning, match="cannot run for many perturbed copies"):
        found = central.diagnosis(settings, 2)
    assert min(error for _, error, _ in found.errors) < 0.2
    with pytest.warns(UserWarning, match="cannot run for many perturbed copies"):
        memory = central.memory_of_passes(settings, 2**30)
    assert not memory.is_batched and memory.one > memory.weights and memory.proposed == 1
    with pytest.warns(UserWarning, match="cannot run"), pytest.raises(UserError, match="more than the budget"):
        central.memory_of_passes(settings, memory.weights)
    options = ["--model", settings.model, "--dataset", "sample-dclm", "--block-size", 16, "--device", "cpu"]
    status, out, _ = zofed_command("memory", *options)
    assert status == 0 and "perturbations-per-pass changes nothing" in " ".join(out.split())


@pytest.mark.slow
def test_a_check_of_a_model_whose_memory_cannot_be_predicted_goes_on(
    tmp_path: Path, zofed_command: Callable[..., tuple[int, str, str]]
) -> None:
    folder = folder_of(LongformerModel(LongformerConfig(**SHAPE, **LONGFORMER)), tmp_path)
    options = ["--model", folder, "--task", "classification", "--dataset", "sample-sst2", "--block-size", 16]
    status, out, errors = zofed_command("check", *options, "--batch-size", 2, "--queries", 2, "--device", "cpu")
    assert status == 0, errors
    assert "cannot be predicted for this model" in out and "drawn from the seed: classifier.dense" in out
    status, out, errors = zofed_command("models", *options)
    assert status == 0 and "34" in out and "cannot be predicted" in out, errors
    assert torch.is_tensor(create(folder, 16).classifier.dense.weight)
