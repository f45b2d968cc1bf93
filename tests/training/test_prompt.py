"""The task `prompt`: a language model chooses among label words, in every mode and way, and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federate, ignore, records_of
from masked import save_masked
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
)

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import candidates
from zofed.core.metrics import evaluate
from zofed.data import prompts
from zofed.data.encoding import Document, load_tokenizer
from zofed.models.limits import attention_window
from zofed.preflight.check import check
from zofed.training import central, pins
from zofed.training.task import Task

Quick = Callable[..., Settings]
WAY: dict[str, Any] = {"task": "prompt", "template": "{{ text }} It was", "label_words": " bad, good"}


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Forty short reviews of two classes."""
    texts = ("a fine film", "not worth the time", "a long and quiet story", "it may be seen")
    rows = [{"text": f"{texts[n % 4]}, number {n}", "label": n % 4 in (0, 2)} for n in range(40)]
    path = tmp_path / "films.jsonl"
    path.write_text("".join(json.dumps(row | {"label": int(row["label"])}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"batch_order": "stratified"},
        {"mode": "subspace", "subspace_size": 9, "batch_order": "stratified"},
        {"mode": "fo"},
        {"mode": "instruct", "bp_interval": 2},
    ],
    ids=str,
)
def test_every_mode_trains_on_prompts_and_what_replays_is_the_same_in_a_federation_of_one(
    quick: Quick, films: Path, tmp_path: Path, mode: dict[str, Any]
) -> None:
    settings = quick(dataset=str(films), **WAY, **mode)
    alone = central.train(settings, tmp_path / "alone", ignore)
    assert alone["classes"] == ["0", "1"] and 0 <= alone["accuracy"] <= 1
    assert set(alone["baselines"]) >= {"uniform", "prior", "majority_accuracy", "zero_shot_auc", "threshold_accuracy"}
    together = federate(settings, tmp_path / "together", 1)
    if mode.get("mode") in ("fo", "instruct"):  # whose updates and guides are not the same on their way
        assert together["digest"] in together["client_digests"].values()
        return
    assert alone["replay_digest"] == alone["digest"]
    assert together["digest"] == alone["digest"]
    assert records_of(tmp_path / "together") == records_of(tmp_path / "alone")


def test_the_score_is_that_of_a_plain_loop_over_the_words(quick: Quick, films: Path) -> None:
    task = Task.load(quick(dataset=str(films), block_size=48, eval_examples=100, **WAY))
    model = task.replica().model
    hits, losses = 0, []
    for document in task.held_out:
        assert document.text.endswith(" It was")
        ids, means = task.tokenizer(document.text)["input_ids"], []
        for word in (" bad", " good"):
            tokens = task.tokenizer(word)["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
            means.append(sum(logs[len(ids) - 1 + at, token] for at, token in enumerate(tokens)) / len(tokens))
        scores = torch.stack(means)
        hits += int(scores.argmax()) == document.label
        losses.append(-float(scores.log_softmax(0)[document.label]))
    found = evaluate(model, task.held_out_sample.examples)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.accuracy == pytest.approx(hits / len(losses))


def test_a_long_prompt_loses_its_beginning_and_that_is_said() -> None:
    tokenizer = load_tokenizer("shipped")
    long = Document(" ".join(["word"] * 60) + " It was", "films", 1)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than block-size = 8 tokens"):
        encoding = prompts.Encoding(tokenizer, 8, (" yes", " no"))
        found = prompts.prompt_examples([long, Document("fine It was", "films", 0)], encoding)
    assert tokenizer.decode(found["input_ids"][0]).endswith("word It was")
    assert found["attention_mask"].sum(1).tolist()[0] == 8 - (found["candidates"].shape[2] - 1)
    assert found["attention_mask"][1, 0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_words": ""}, "give a word for each class"),
        ({"label_words": " bad, good, fine"}, "are 3 words .*, but there are 2 classes"),
        ({"label_words": " bad, bad"}, "has one word twice"),
        ({"template": "{{ premise }}"}, "has no column 'premise'"),
        ({"model": "bert"}, r"set task to .* prompt with \[MASK\] in the template"),
        ({"template": "{{ text }} It was [MASK]."}, r"template has \[MASK\], but the tokenizer has no mask"),
        ({"calibration_prompt": "[MASK]"}, "is with .MASK., but the template is without it"),
        ({"label_words": "bad= bad, good= good"}, "name 'bad', which is none of the classes 0, 1"),
        ({"label_words": " {{ candidate }}"}, r"line 1 of .* has no candidates"),
        ({"label_words": "{{ candidate }},{{ text }}"}, "that one alone writes each of a row's candidates"),
        ({"shots": 36}, "shots = 36 takes as many documents"),
        ({"block_size": 200}, "longer than the 128 positions"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    quick: Quick, films: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if change.get("model") == "bert":
        change = change | {"model": str(save_masked("bert", tmp_path / "bert"))}
    with pytest.raises(UserError, match=message):
        central.train(quick(dataset=str(films), **WAY | change), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


MASKED: dict[str, Any] = {"task": "prompt", "template": "{{ text }} It was [MASK].", "label_words": " terrible, great"}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("mode", [{}, {"mode": "subspace", "subspace_size": 9}, {"mode": "fo"}], ids=str)
def test_masked_models_train_in_every_mode_and_replay(
    quick: Quick, films: Path, tmp_path: Path, kind: str, mode: dict[str, Any]
) -> None:
    model = save_masked(kind, tmp_path / kind)
    settings = quick(dataset=str(films), model=str(model), block_size=30, **MASKED, **mode)
    found = central.train(settings, tmp_path / "run", ignore)
    assert found["digest"] == found["replay_digest"] or mode.get("mode") == "fo"
    saved = AutoModelForMaskedLM.from_pretrained(tmp_path / "run" / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "model").mask_token
    again = Task.load(settings.model_copy(update={"model": str(tmp_path / "run" / "model")}))
    score = evaluate(saved.eval(), again.held_out_sample.examples)
    assert score.loss == pytest.approx(found["eval_loss_end"], rel=1e-5)


def test_a_masked_model_is_the_same_in_a_federation_of_one(quick: Quick, films: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(films), model=str(save_masked("bert", tmp_path / "m")), block_size=30, **MASKED)
    alone = central.train(settings, tmp_path / "alone", ignore)
    assert federate(settings, tmp_path / "together", 1)["digest"] == alone["digest"]


@pytest.fixture
def causes(tmp_path: Path) -> Path:
    """Rows in the manner of COPA, each with two choices of its own."""
    rows = [
        {"premise": f"The man {n} ran", "first": "he was late", "second": f"it rained {n} days", "label": n % 2}
        for n in range(20)
    ]
    path = tmp_path / "causes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CAUSES: dict[str, Any] = {
    "task": "prompt",
    "template": "{{ premise }} because",
    "label_words": " {{ first }}, {{ second }}",
    "block_size": 40,
}


@pytest.mark.parametrize("loss", ["choice", "teacher-forcing"])
def test_rows_with_candidates_of_their_own_train_and_are_scored(
    quick: Quick, causes: Path, tmp_path: Path, loss: str
) -> None:
    settings = quick(dataset=str(causes), prompt_loss=loss, **CAUSES)
    task = Task.load(settings)
    assert task.train[0].candidates[0] == " he was late" and task.labels == 0 and task.class_names == ()
    found = central.train(settings, tmp_path / "run", ignore)
    assert found["replay_digest"] == found["digest"] and "classes" not in found
    blind = {"uniform": pytest.approx(0.6931, abs=1e-4), "uniform_accuracy": 0.5}
    assert {name: found["baselines"][name] for name in blind} == blind and "auc" not in found
    assert set(found["baselines"]) - set(blind) == {"zero_shot_loss", "zero_shot_accuracy"}
    assert federate(settings, tmp_path / "together", 1)["digest"] == found["digest"]


def test_teacher_forcing_trains_on_the_right_candidate_and_scores_all(quick: Quick, films: Path) -> None:
    task = Task.load(quick(dataset=str(films), prompt_loss="teacher-forcing", **WAY))
    trained, scored = task.shard(0, 1), task.held_out_sample.examples
    assert trained["candidates"].shape[1] == 1 and scored["candidates"].shape[1] == 2
    assert set(scored["labels"].tolist()) <= {0, 1} and set(trained["labels"].tolist()) == {0}
    assert set(task.baselines()) == {"uniform", "prior", "majority_accuracy"}
    assert task.client_parts(0, 1, 0.3)[1]["candidates"].shape[1] == 2  # type: ignore[index]


def test_shots_are_the_same_for_all_and_nobody_trains_on_them(quick: Quick, films: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(films), shots=3, **WAY | {"block_size": 90})
    task, plain = Task.load(settings), Task.load(quick(dataset=str(films), **WAY))
    assert len(task.demonstrations) == 3 and len(task.train) == len(plain.train) - 3
    assert not set(task.demonstrations) & {*task.train, *task.held_out} and task.held_out == plain.held_out
    start = task.tokenizer.decode(task.held_out_sample.examples["input_ids"][0], skip_special_tokens=True)
    for one in task.demonstrations:
        assert f"{one.text}{(' bad', ' good')[one.label or 0]}\n\n" in start
    assert "shots" in pins.digests(task) and "shots" not in pins.digests(plain)
    assert any("3 of the training documents stand before each prompt" in line for line in task.told().splitlines())
    with pytest.raises(UserError, match="the 3 shots come from the run's own data set"):
        Task.own(settings, str(films))
    alone = central.train(settings, tmp_path / "alone", ignore)
    assert federate(settings, tmp_path / "together", 1)["digest"] == alone["digest"]


def test_calibration_moves_predictions_and_not_the_loss(quick: Quick, films: Path) -> None:
    way = {"dataset": str(films), **WAY, "block_size": 48, "eval_examples": 100}
    plain, task = Task.load(quick(**way)), Task.load(quick(**way, calibration_prompt="It was"))
    model = task.replica().model
    sample = task.held_out_sample
    assert sample.empty is not None and len(sample.empty["labels"]) == 1, "once for all that have the same candidates"
    one, other = (each.evaluate(model).whole for each in (plain, task))
    assert one.loss == other.loss
    with torch.no_grad():
        logits = [candidates.scores(model, batch) for batch in (sample.examples, sample.empty)]
    guesses = (logits[0] - logits[1]).argmax(1)
    assert other.accuracy == pytest.approx(float((guesses == sample.examples["labels"]).double().mean()))
    assert not torch.equal(guesses, logits[0].argmax(1)), "or the test says nothing"


def test_each_row_is_calibrated_by_its_own_candidates(quick: Quick, causes: Path) -> None:
    task = Task.load(quick(dataset=str(causes), calibration_prompt="because", **CAUSES))
    sample = task.held_out_sample
    assert sample.empty is not None and torch.equal(sample.empty["candidates"], sample.examples["candidates"])
    assert task.evaluate(task.replica().model).whole.accuracy is not None


def test_words_by_name_go_to_the_classes_of_these_names(quick: Quick, tmp_path: Path) -> None:
    words = {"label_words": "positive= good, negative= bad"}
    task = Task.load(quick(dataset="sample-sst2", **WAY | words))
    assert "label words: negative ' bad', positive ' good'" in task.told()
    plain = Task.load(quick(dataset="sample-sst2", **WAY))
    for one, other in zip(task.held_out_sample.examples.values(), plain.held_out_sample.examples.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(sliding_window=16), 16),
        (MistralConfig(sliding_window=None), None),
        (Gemma2Config(sliding_window=12, num_hidden_layers=2), 12),
        (Qwen2Config(use_sliding_window=False, sliding_window=8), None),
        (LlamaConfig(), None),
    ],
    ids=lambda value: str(getattr(value, "model_type", value)),
)
def test_windows_of_attention_are_found(config: Any, window: int | None) -> None:
    assert attention_window(config) == window


def test_a_block_beyond_the_window_of_attention_is_refused(quick: Quick, films: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = load_tokenizer("shipped")
    config = MistralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, sliding_window=20, **shape)
    MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    way = {"dataset": str(films), "model": str(tmp_path / "m"), **WAY}
    with pytest.raises(UserError, match="block-size = 21 is longer than the window of 20 tokens"):
        Task.load(quick(**way, block_size=21)).replica()
    Task.load(quick(**way, block_size=20)).replica()


def test_a_model_without_masks_of_attention_is_refused(quick: Quick, films: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("shipped")
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"candidates .* in one pass"):
        Task.load(quick(dataset=str(films), model=str(tmp_path / "m"), **WAY)).replica()


@pytest.mark.slow
@pytest.mark.skipif("ZOFED_REAL_MODELS" not in os.environ, reason="ZOFED_REAL_MODELS names no folder of real models")
@pytest.mark.parametrize("words", [" terrible, great", " a terrible film, a great one"])
def test_scores_of_a_real_model_are_those_of_a_plain_loop_row_by_row(quick: Quick, words: str) -> None:
    folder = Path(os.environ["ZOFED_REAL_MODELS"]) / "smollm2"
    task = Task.load(quick(dataset="sample-sst2", model=str(folder), block_size=64, **WAY | {"label_words": words}))
    model, rows = task.replica().model, task.held_out[:8]
    found = candidates.scores(model, task.examples(rows))
    for row, document in enumerate(rows):
        prompt = task.tokenizer(document.text)["input_ids"]
        for number, word in enumerate(words.split(",")):
            ids = task.tokenizer(word, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([prompt + ids])).logits[0].float().log_softmax(-1)
            mean = sum(float(logs[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)) / len(ids)
            assert float(found[row, number]) == pytest.approx(mean, abs=1e-5 * max(1, abs(mean)))


def test_a_check_before_the_run_reads_rows_by_the_template(quick: Quick, films: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(films), model=str(save_masked("bert", tmp_path / "m")), block_size=30, **MASKED)
    assert {line.what: line.verdict for line in check(settings, ["zo"])}["data"] == "ok"
