"""The task `instruction`: conversations in every mode and way, what is told of them, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federations import federate, ignore, records_of
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.metrics import evaluate
from zofed.data import partitions
from zofed.data.chat_templates import Writer
from zofed.data.encoding import load_tokenizer
from zofed.runs.run_folder import RunFolder
from zofed.training import central, pins, scoring
from zofed.training.paths import with_absolute_paths
from zofed.training.task import Task

Quick = Callable[..., Settings]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WAY: dict[str, Any] = {"task": "instruction", "block_size": 64, "chat_template": TEMPLATE}


def row(number: int) -> dict[str, Any]:
    answer = ("far", "near", "red", "blue")[number % 4]
    return {
        "instruction": f"Say {number}.",
        "input": "",
        "output": f"It is {answer}.",
        "category": f"kind {number % 2}",
    }


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Forty Alpaca rows of two categories."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(40)))
    return path


@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"packing": True},
        {"mode": "subspace", "subspace_size": 9},
        {"mode": "fo", "loss_on": "all"},
        {"mode": "instruct", "bp_interval": 2},
        {"mode": "calibrate", "bp_interval": 2},
    ],
    ids=str,
)
def test_every_mode_trains_and_what_replays_is_the_same_in_a_federation_of_one(
    quick: Quick, questions: Path, tmp_path: Path, mode: dict[str, Any]
) -> None:
    settings = quick(dataset=str(questions), **WAY, **mode)
    alone = central.train(settings, tmp_path / "alone", ignore)
    assert set(alone["baselines"]) >= {"uniform", "unigram", "base_loss", "base_rouge_l"} and "accuracy" not in alone
    assert alone["perplexity"] == pytest.approx(math.exp(alone["eval_loss_end"]), rel=1e-6)
    assert alone["data_read"][0]["shape"] == "Alpaca: instruction, input, output"
    together = federate(settings, tmp_path / "together", 1)
    if mode.get("mode") in ("fo", "instruct", "calibrate"):  # whose updates are not the same on their way
        assert together["digest"] in together["client_digests"].values()
        return
    assert alone["replay_digest"] == alone["digest"] == together["digest"]
    assert records_of(tmp_path / "together") == records_of(tmp_path / "alone")


def test_the_loss_is_that_of_a_plain_loop_over_the_responses_tokens(quick: Quick, questions: Path) -> None:
    task = Task.load(quick(dataset=str(questions), eval_examples=100, **WAY))
    model, losses = task.replica().model, []
    for document in task.held_out:
        text = f"user: {document.turns[0].text}\nassistant: "
        ids = task.tokenizer(text)["input_ids"]
        answer = [*task.tokenizer(document.turns[1].text)["input_ids"], task.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    wanted = float(torch.cat(losses).mean())
    found = evaluate(model, task.held_out_sample.examples)
    assert found.loss == pytest.approx(wanted, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(wanted), rel=1e-4)


def test_packed_conversations_score_what_they_score_alone(quick: Quick, questions: Path) -> None:
    scores = []
    for packing in (False, True):
        task = Task.load(quick(dataset=str(questions), eval_examples=100, packing=packing, **WAY | {"block_size": 120}))
        scores.append(task.evaluate(task.replica().model))
    assert scores[1].coverage.examples < scores[0].coverage.examples
    assert scores[1].whole.loss == pytest.approx(scores[0].whole.loss, rel=1e-5)


def test_a_model_that_would_let_packed_conversations_see_one_another_is_refused(
    quick: Quick, questions: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    load_tokenizer("shipped").save_pretrained(tmp_path / "mamba")
    settings = quick(dataset=str(questions), model=str(tmp_path / "mamba"), packing=True, **WAY)
    with pytest.raises(UserError, match="lets packed conversations see one another: set packing to false"):
        Task.load(settings).replica()


def test_the_template_file_is_read_once_pinned_and_saved_with_the_model(
    quick: Quick, questions: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    settings = quick(dataset=str(questions), **WAY | {"chat_template": str(path)})
    assert with_absolute_paths(settings).chat_template == TEMPLATE
    central.train(settings, tmp_path / "run", ignore)
    folder = RunFolder.open(tmp_path / "run")
    path.write_text("{{ 1 }}")
    assert folder.settings().chat_template == TEMPLATE
    assert AutoTokenizer.from_pretrained(folder.model).chat_template == TEMPLATE
    again = central.resume(tmp_path / "run", ignore)
    assert again["status"] == "completed"
    other = scoring.score_run(tmp_path / "run", {"dataset": str(questions)})
    assert other.scores.whole.perplexity is not None


def test_other_templates_are_other_inputs(quick: Quick, questions: Path) -> None:
    one, other = (
        pins.digests(Task.load(quick(dataset=str(questions), **WAY | {"chat_template": name})))
        for name in ("none", TEMPLATE)
    )
    assert {key for key in one if one[key] != other[key]} == {"chat template"}


def test_clients_hold_categories_and_a_node_its_own_rows(quick: Quick, questions: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(questions), partition="dirichlet", dirichlet_alpha=0.1, clients=2, **WAY)
    task = Task.load(settings)
    counts = [partitions.counts(task.client_documents(client, 2), "dirichlet") for client in range(2)]
    assert {name for held in counts for name in held} == {"kind 0", "kind 1"} and counts[0] != counts[1]
    summary = federate(settings, tmp_path / "run", 2)
    assert summary["digest"] in summary["client_digests"].values()
    own = tmp_path / "own.csv"
    own.write_text("ask,reply\nWhat is it?,It is red.\nAnd that?,It is blue.\n")
    node = Task.own(settings.model_copy(update={"columns": "prompt=ask, completion=reply"}), str(own))
    assert [document.turns[1].text for document in node.train] == ["It is red.", "It is blue."]
    assert len(node.shard(0, 1)["labels"]) == 2


def test_columns_apply_to_every_data_set_of_a_run(quick: Quick, tmp_path: Path) -> None:
    rows = [{"ask": f"What is {number}?", "reply": f"It is {number}."} for number in range(8)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    names = {"dataset": str(path), "eval_dataset": str(path), "bp_dataset": str(path)}
    task = Task.load(quick(mode="instruct", columns="prompt=ask, completion=reply", **names, **WAY))
    assert [document.turns for document in task.train] == [document.turns for document in task.held_out]
    assert len(task.backprop) == 8 and len(task.readings) == 3
    told = task.told()
    assert told.count("read from prompt and response: ask, reply") == 3
    scored = Task.to_score(quick(columns="prompt=ask, completion=reply", **names, **WAY))
    assert len(scored.held_out) == 8
    with pytest.raises(UserError, match="no column 'question', which the setting columns gives as its prompt"):
        Task.load(quick(columns="prompt=question, completion=reply", **names, **WAY))


def test_a_prompt_asks_for_the_decision_of_pubmedqa(quick: Quick, tmp_path: Path) -> None:
    decisions = ("yes", "no", "maybe")
    rows = {
        str(number): {
            "QUESTION": f"Is it {number}?",
            "CONTEXTS": ["One.", "Two."],
            "LONG_ANSWER": "It may be.",
            "final_decision": decisions[number % 3],
        }
        for number in range(12)
    }
    path = tmp_path / "pqal.json"
    path.write_text(json.dumps(rows))
    template = "{{ CONTEXTS | join(' ') }} {{ QUESTION }} Answer:"
    settings = quick(dataset=str(path), task="prompt", template=template, label_words=" yes, no, maybe", block_size=64)
    task = Task.load(settings)
    assert task.train[0].text.startswith("One. Two. Is it") and task.class_names == decisions
    assert "LONG_ANSWER" not in task.readings[0].read
    summary = central.train(settings, tmp_path / "run", ignore)
    assert summary["classes"] == list(decisions)


def test_a_longer_vocabulary_than_the_embedding_is_refused_by_name(
    quick: Quick, questions: Path, tmp_path: Path
) -> None:
    central.train(quick(dataset=str(questions), steps=1, **WAY), tmp_path / "run", ignore)
    folder = tmp_path / "run" / "model"
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = TEMPLATE.replace("'\n'", "'<|end|>'")
    tokenizer.save_pretrained(folder)
    task = Task.load(quick(dataset=str(questions), model=str(folder), **WAY | {"chat_template": ""}))
    assert Writer(task.tokenizer).stops[0] == 512
    with pytest.raises(UserError, match=r"513 entries but model .* only 512"):
        task.check_held_out()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chat_template": "away.jinja"}, "chat-template = 'away.jinja' is no file that can be read"),
        ({"dataset": "sample-sst2"}, "holds no conversation"),
        ({"dataset": "pydoc"}, "without columns or conversations"),
        ({"columns": "answer=output"}, "'answer' is no role"),
        ({"template": "{{ nothing }}"}, "no column 'nothing'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_a_line(quick: Quick, questions: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        Task.load(with_absolute_paths(quick(**{"dataset": str(questions)} | WAY | changes)))
    assert "\n" not in str(raised.value)
