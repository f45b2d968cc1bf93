"""The task `prompt`: a language model chooses among label words, in every mode and way, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federate, ignore, records_of

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.metrics import evaluate
from zofed.data import prompts
from zofed.data.encoding import Document, load_tokenizer
from zofed.training import central
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
    [{}, {"mode": "subspace", "subspace_size": 9}, {"mode": "fo"}, {"mode": "instruct", "bp_interval": 2}],
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
        found = prompts.prompt_examples([long, Document("fine It was", "films", 0)], tokenizer, 8, (" bad", " good"))
    assert tokenizer.decode(found["input_ids"][0]).endswith("word It was")
    assert found["attention_mask"].sum(1).tolist()[0] == 8 and found["attention_mask"][1, 0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_words": ""}, "give a word for each class"),
        ({"label_words": " bad, good, fine"}, "are 3 words, but .* has 2 classes"),
        ({"label_words": " bad, bad"}, "has one word twice"),
        ({"template": "{{ premise }}"}, "has no column 'premise'"),
        ({"model": "bert"}, "set task to"),
        ({"block_size": 200}, "longer than the 128 positions"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    quick: Quick, films: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if change.get("model") == "bert":
        from transformers import BertConfig, BertForMaskedLM

        small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertForMaskedLM(BertConfig(vocab_size=600, **small)).save_pretrained(tmp_path / "bert")
        change = {"model": str(tmp_path / "bert"), "tokenizer": "shipped"}
    with pytest.raises(UserError, match=message):
        central.train(quick(dataset=str(films), **WAY | change), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()
