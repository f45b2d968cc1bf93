"""Answers: greedy whatever a model's folder says, alike alone and in a batch, kept at evaluations, lowered by zo."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federate, ignore, records_of
from networks import GPT2
from torch import nn
from trainings import train_cut
from transformers import GenerationConfig, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from zofed.base import text_scores
from zofed.base.errors import DiskError, UserError
from zofed.config import Settings
from zofed.core.metrics import Answered
from zofed.data.encoding import load_tokenizer
from zofed.runs import samples
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, generation, measurements, tasks
from zofed.training.finalize import replay_run
from zofed.training.task import Task

Quick = Callable[..., Settings]
NAMES = ("exact_match", "token_f1", "rouge_l")


def gpt2() -> nn.Module:
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(8)  # so that the next tokens differ
    return model.eval()


def llama() -> nn.Module:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=GPT2.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.eval()


def greedy(model: nn.Module, prompt: list[int], stop: set[int], limit: int) -> tuple[list[int], bool]:
    """Token by token, each time all of it anew."""
    ids = list(prompt)
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


PROMPTS = [[5, 6, 7], [9], [3, 3, 8, 1, 2, 12, 4], [20, 21], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_answers_are_the_likeliest_tokens_each_alone(make: Callable[[], nn.Module]) -> None:
    model = make()
    free = [greedy(model, prompt, set(), 9)[0] for prompt in PROMPTS]
    assert len({tuple(answer) for answer in free}) == len(PROMPTS), "else a mix-up would not show"
    stop = {free[0][4], free[3][0]}
    wanted = [greedy(model, prompt, stop, 9) for prompt in PROMPTS]
    assert {whole for _, whole in wanted} == {True, False} and wanted[3] == ([], True)
    found = generation.answers(model, PROMPTS, sorted(stop), 0, 9)
    assert [(list(answer.ids), answer.is_whole) for answer in found] == wanted


def test_what_a_folder_says_of_generation_and_dropout_do_not_count() -> None:
    model: Any = gpt2()
    wanted = generation.answers(model, PROMPTS, [0], 0, 9)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_length=4, eos_token_id=wanted[0].ids[1]
    )
    model.generation_config = own
    model.transformer.drop.p = 0.5
    model.train()
    state = torch.get_rng_state()
    assert generation.answers(model, PROMPTS, [0], 0, 9) == wanted
    assert torch.equal(state, torch.get_rng_state()) and model.generation_config is own
    assert all(module.training for module in model.modules())


def test_an_answer_ends_where_the_context_does_and_prompts_without_room_are_told() -> None:
    model: Any = gpt2()
    longest = model.config.n_positions
    prompt = [1 + at % 20 for at in range(longest - 3)]
    short, cut = generation.answers(model, [[5, 6], prompt], [], 0, 8)
    assert len(short.ids) == 8 and len(cut.ids) == 3 and not cut.is_whole
    assert list(short.ids) == greedy(model, [5, 6], set(), 8)[0]
    with pytest.raises(UserError, match=rf"{longest:,} tokens leaves no room .* shorten it"):
        generation.answers(model, [[5], [1] * longest], [], 0, 8)
    with pytest.raises(UserError, match="0 tokens"):
        generation.answers(model, [[5], []], [], 0, 8)
    encoder = tasks.Encoder(load_tokenizer("shipped"), 16)
    asked = [tasks.Question((5,), "a"), tasks.Question((1,) * longest, "b")]
    with pytest.warns(UserWarning, match="1 of 2 prompts leave no room"):
        found = generation.answered(model, asked, encoder, [], 4)
    assert [one.wanted for one in found] == ["a"]


def test_what_a_batch_asks_is_what_lies_before_its_last_response() -> None:
    tokenizer = load_tokenizer("shipped")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("ask", "first", "more", "second")]
    ask, first, more, second = ids
    whole = [*ask, *first, *more, *second]
    hidden = -100
    labels = [*[hidden] * len(ask), *first, *[hidden] * len(more), *second]
    batch = {
        "input_ids": torch.tensor([[*whole, 0, 0], [0, 0, *whole]]),
        "labels": torch.tensor([[*labels, hidden, hidden], [hidden, hidden, *labels]]),
        "attention_mask": torch.tensor([[*[1] * len(whole), 0, 0], [0, 0, *[1] * len(whole)]]),
    }
    wanted = tasks.Question((*ask, *first, *more), "second")
    assert generation.questions_of(batch, tokenizer) == [wanted, wanted]
    for spoilt in (torch.full_like(batch["labels"], hidden), batch["input_ids"]):
        with pytest.raises(ValueError, match="no prompt before its response"):
            generation.questions_of(batch | {"labels": spoilt}, tokenizer)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Forty prompts of one answer."""
    path = tmp_path / "questions.jsonl"
    rows = ({"prompt": f"ask {n % 5} =>", "completion": "the yes it is"} for n in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


WAY: dict[str, Any] = {"task": "instruction", "block_size": 32, "max_new_tokens": 6, "generated_examples": 3}
LEARN: dict[str, Any] = {"mode": "fo", "optimizer": "adamw", "learning_rate": 0.01, "steps": 30, "eval_interval": 15}


def test_evaluations_answer_held_out_prompts_and_tell_their_scores(
    quick: Quick, questions: Path, tmp_path: Path
) -> None:
    settings = quick(dataset=str(questions), **WAY | LEARN)
    summary = central.train(settings, tmp_path / "run", ignore)
    rows = read_table(tmp_path / "run" / "evaluations.csv")
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in (0, 15, 30) for _ in range(3)]
    for row in rows:
        own = [(line["answer"], line["wanted"]) for line in lines if str(line["step"]) == row["step"]]
        for name, value in text_scores.means(own).items():
            assert float(row[name]) == pytest.approx(value)
    assert {line["prompt"] for line in lines if line["step"] == 0} == {line["prompt"] for line in lines[-3:]}
    assert summary["exact_match"] == summary["token_f1"] == summary["rouge_l"] == 1.0, "learnt by heart, and stopped"
    assert lines[-1]["answer"] == "the yes it is" and summary["perplexity"] > 1.0
    baselines = summary["baselines"]
    assert baselines["base_rouge_l"] == float(rows[0]["rouge_l"]) < 1.0
    assert baselines["base_loss"] == summary["eval_loss_start"]
    model = replay_run(RunFolder(tmp_path / "run"))[0].model
    again = Task.load(settings).evaluate(model)
    assert [one.answer for one in again.answered] == [line["answer"] for line in lines[-3:]]


def test_a_run_that_goes_on_keeps_each_answer_once(quick: Quick, questions: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(questions), **WAY | {"steps": 6, "eval_interval": 2, "save_interval": 2})
    central.train(settings, tmp_path / "whole", ignore)
    for at in (2, 4, 5):
        out = tmp_path / f"cut-{at}"
        train_cut(settings, out, at)
        central.resume(out, ignore)
        assert (out / samples.SAMPLES).read_bytes() == (tmp_path / "whole" / samples.SAMPLES).read_bytes()
    train_cut(settings, tmp_path / "half", 5)
    with (tmp_path / "half" / samples.SAMPLES).open("a") as file:
        file.write('{"step": 4, "prompt": "cut')
    central.resume(tmp_path / "half", ignore)
    assert samples.read(tmp_path / "half") == samples.read(tmp_path / "whole")


def test_samples_that_do_not_stand_are_left_out(tmp_path: Path) -> None:
    samples.add(tmp_path, 0, [])
    assert not (tmp_path / samples.SAMPLES).exists() and samples.read(tmp_path) == samples.newest(tmp_path) == []
    for step in (0, 3):
        samples.add(tmp_path, step, [Answered("a\nb", "x", "y\u2028"), Answered("c", "", "")])
    assert [one["step"] for one in samples.newest(tmp_path)] == [3, 3]
    samples.keep(tmp_path, {0})
    assert [(one["step"], one["wanted"]) for one in samples.read(tmp_path)] == [(0, "y\u2028"), (0, "")]
    for spoilt in (
        b"\xff\n",
        b"[1]\n",
        b'{"step": true, "prompt": "", "answer": "", "wanted": ""}\n',
        b'{"step": 9}\n',
    ):
        with (tmp_path / samples.SAMPLES).open("ab") as file:
            file.write(spoilt)
        assert len(samples.read(tmp_path)) == 2, spoilt
        samples.keep(tmp_path, {0})
    with pytest.raises(DiskError, match="cannot write"):
        samples.add(tmp_path / "none", 0, [Answered("", "", "")])


@pytest.mark.parametrize("each", ["shared", "per-query"])
@pytest.mark.parametrize("objective", ["exact-match", "token-f1", "rouge-l"])
def test_zeroth_order_lowers_what_has_no_derivative_without_a_try_to_batch(
    quick: Quick, questions: Path, tmp_path: Path, objective: str, each: str
) -> None:
    settings = quick(
        dataset=str(questions), objective=objective, query_batches=each, epsilon=0.03, steps=1, eval_interval=1, **WAY
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the loss cannot run for many perturbed copies")
        summary = central.train(settings, tmp_path / "run", ignore)
    assert summary["replay_digest"] == summary["digest"]
    loss = float(read_table(tmp_path / "run" / "metrics.csv")[1]["loss"])
    task = Task.load(settings)
    replica = task.replica()
    call, own = measurements.query_loss(settings, replica, task.shard(0, 1), 1, 0)
    batches = [None] if own is None else [{name: tensor[at] for name, tensor in own.items()} for at in range(3)]
    losses = []
    for batch in batches:
        value = call() if batch is None else call(batch)
        examples = call._batch if batch is None else batch  # type: ignore[attr-defined]
        pairs = generation.generated(replica.model, examples, task.tokenizer, settings.max_new_tokens)
        score = text_scores.TEXT_SCORES[objective.replace("-", "_")]
        assert value == pytest.approx(1 - sum(score(one.answer, one.wanted) for one in pairs) / len(pairs))
        losses.append(float(value))
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_a_federation_of_one_lowers_it_alike(quick: Quick, questions: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(questions), objective="token-f1", epsilon=0.03, steps=3, rounds=3, **WAY)
    alone = central.train(settings, tmp_path / "alone", ignore)
    together = federate(settings, tmp_path / "together", 1)
    assert records_of(tmp_path / "alone") == records_of(tmp_path / "together")
    assert {name: alone[name] for name in NAMES} == {name: together[name] for name in NAMES}
    assert samples.read(tmp_path / "alone") == samples.read(tmp_path / "together")
    assert alone["baselines"] == together["baselines"]


def test_objectives_of_text_need_responses(quick: Quick) -> None:
    for wrong in ({}, {"task": "prompt", "label_words": "a,b"}, {"task": "instruction", "loss_on": "all"}):
        with pytest.raises(UserError, match="scores generated responses: it takes task = instruction"):
            quick(objective="rouge-l", **wrong)
    with pytest.raises(UserError, match="takes mode = zo"):
        quick(objective="rouge-l", task="instruction", mode="fo")


def answer_length(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """An objective of one's own: short answers."""
    found = generation.generated(model, batch, load_tokenizer("shipped"), max_new_tokens=4)
    return torch.tensor([float(len(one.answer)) for one in found]).mean()


def test_a_function_of_the_generated_text_is_lowered(quick: Quick, questions: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(questions), objective=f"{__name__}:answer_length", epsilon=0.03, steps=2, **WAY)
    with pytest.warns(UserWarning, match="cannot run for many perturbed copies"):
        summary = central.train(settings, tmp_path / "run", ignore)
    assert summary["replay_digest"] == summary["digest"]
    assert float(read_table(tmp_path / "run" / "metrics.csv")[1]["loss"]) > 1.0
