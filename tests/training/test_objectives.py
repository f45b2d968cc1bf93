"""What a run lowers, and the scores it tells of its weights."""

import csv
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import Quick, federate, ignore, records_of
from torch import Tensor, nn
from trainings import SHORT, WAYS, steps_of
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from zofed.base.errors import UserError
from zofed.core import metrics
from zofed.core.digests import weights_digest
from zofed.data import documents, encoding
from zofed.federated import client, protocol
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, scoring
from zofed.training.finalize import replay_run
from zofed.training.task import Task


def mean_f1(found: list[int], wanted: list[int]) -> float:
    scores = []
    for label in sorted(set(found) | set(wanted)):
        hits = sum(f == w == label for f, w in zip(found, wanted, strict=True))
        scores.append(2 * hits / (found.count(label) + wanted.count(label)))
    return sum(scores) / len(scores)


def language_model() -> GPT2LMHeadModel:
    from networks import GPT2

    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2).eval()


def classifier() -> GPT2ForSequenceClassification:
    from networks import GPT2

    torch.manual_seed(3)
    config = type(GPT2)(**GPT2.to_dict() | {"num_labels": 3, "pad_token_id": 0})
    return GPT2ForSequenceClassification(config).eval()


def batch_of(model: nn.Module, count: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 30, (count, 7), generator=generator)
    if isinstance(model, GPT2LMHeadModel):
        return {"input_ids": tokens, "labels": tokens}
    return {"input_ids": tokens, "labels": torch.randint(0, 3, (count,), generator=generator)}


@pytest.mark.parametrize("make", [language_model, classifier])
def test_objectives_are_one_less_the_score(make: Callable[[], nn.Module]) -> None:
    model = make()
    batch = batch_of(model)
    with torch.no_grad():
        logits = model(**batch).logits
        if isinstance(model, GPT2LMHeadModel):  # make some of its guesses right
            model.transformer.wte.weight.mul_(3)
            logits = model(**batch).logits
    wanted = batch["labels"]
    if isinstance(model, GPT2LMHeadModel):
        logits, wanted = logits[:, :-1], wanted[:, 1:]
    found, labels = logits.argmax(-1).flatten().tolist(), wanted.flatten().tolist()
    accuracy = sum(f == w for f, w in zip(found, labels, strict=True)) / len(found)
    assert float(metrics.loss_of(model, batch, objective="accuracy")) == pytest.approx(1 - accuracy, abs=1e-6)
    assert float(metrics.loss_of(model, batch, objective="f1")) == pytest.approx(1 - mean_f1(found, labels), abs=1e-6)
    with torch.no_grad():
        assert metrics.loss_of(model, batch) == model(**batch).loss


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
@pytest.mark.parametrize("make", [language_model, classifier])
def test_scores_are_measured_for_many_copies_at_once(make: Callable[[], nn.Module], objective: str) -> None:
    from zofed.core.estimators import materialised_losses
    from zofed.core.perturbed import losses

    model = make()
    batch = batch_of(model, 40)
    parameters = dict(model.named_parameters())

    def loss() -> Tensor:
        return metrics.loss_of(model, batch, objective=objective)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = losses(loss, parameters, "rank1", [1, 2, 3], (0.05, -0.05), 4)
    expected = materialised_losses(loss, parameters, "rank1", [1, 2, 3], (0.05, -0.05))
    assert torch.allclose(found.double(), expected.double(), atol=1e-6)
    assert expected.unique().numel() > 1


def stated(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """An objective of a user's own."""
    return model(**batch).loss * 2 + 1


def test_an_objective_of_ones_own_is_found_by_its_name(quick: Quick, tmp_path: Path) -> None:
    model = language_model()
    batch = batch_of(model)
    found = metrics.loss_of(model, batch, objective=f"{__name__}:stated")
    assert found.item() == pytest.approx(2 * model(**batch).loss.item() + 1)
    summary = central.train(quick(objective=f"{__name__}:stated", steps=2), tmp_path / "run", ignore)
    assert summary["replay_digest"] == summary["digest"]
    plain = central.train(quick(steps=2), tmp_path / "plain", ignore)
    assert float(read_table(tmp_path / "run" / "metrics.csv")[1]["loss"]) == pytest.approx(
        2 * float(read_table(tmp_path / "plain" / "metrics.csv")[1]["loss"]) + 1, rel=1e-4
    )
    assert plain["eval_loss_start"] == summary["eval_loss_start"], "evaluation tells the loss, whatever is lowered"
    for wrong in ("no.such:thing", f"{__name__}:nothing"):
        with pytest.raises(UserError, match="cannot be loaded"):
            metrics.loss_of(model, batch, objective=wrong)


def test_a_federation_runs_no_code_that_the_other_side_names(quick: Quick, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clients run code"):
        federate(quick(objective=f"{__name__}:stated"), tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
    settings = quick(clients=1)
    _, _, replica = steps_of(settings)
    plan = protocol.plan_for(replica, replica.head, (), client=0)

    class Context:
        run_config = settings.model_dump(by_alias=True) | {"objective": "os:getcwd"}
        node_config = {"partition-id": 0, "num-partitions": 1}  # noqa: RUF012

    client.forget()
    with pytest.raises(UserError, match="clients run code"):
        client.answers.measure(plan, Context())  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled documents."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    rows = [
        {"text": document.text, "label": document.label} for document in encoding.load_documents("sample-sst2")[:80]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FEDERATED: dict[str, dict[str, Any]] = {
    "per-query": {"query_batches": "per-query", "query_batch_size": 3},
    "cosine": {"schedule": "cosine", "warmup_steps": 2, "clip_norm": 0.5},
    "f1": {"task": "classification", "objective": "f1", "epsilon": 0.05, "batch_size": 8},
    "accuracy": {"task": "classification", "objective": "accuracy", "epsilon": 0.05, "query_batches": "per-query"},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", FEDERATED)
def test_a_federation_of_one_is_central_in_the_new_settings(
    quick: Quick, tmp_path: Path, reviews: Path, way: str
) -> None:
    overrides = {"dataset": str(reviews)} if "task" in FEDERATED[way] else {}
    settings = quick(**{"steps": 4, "rounds": 4, "eval_examples": 4} | overrides | FEDERATED[way])
    alone = central.train(settings, tmp_path / "alone", ignore)
    federated = federate(settings, tmp_path / "federated", 1)
    assert records_of(tmp_path / "alone") == records_of(tmp_path / "federated")
    assert alone["digest"] == federated["digest"] == federated["replay_digest"]
    assert federated["client_digests"] == {"0": alone["digest"]}
    for name in ("forward_passes", "forward_equivalents", "tokens"):
        assert alone[name] == federated[name], name


@pytest.fixture
def two_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data set comes from two sources by turns."""
    read = documents.read

    def of_two(*asked: Any, **how: Any) -> documents.Reading:
        found = read(*asked, **how)
        two = [replace(document, source="ab"[index % 2]) for index, document in enumerate(found.documents)]
        return replace(found, documents=two)

    monkeypatch.setattr(documents, "read", of_two)


@pytest.mark.usefixtures("two_sources")
def test_evaluations_tell_each_source_and_each_measure(quick: Quick, tmp_path: Path, reviews: Path) -> None:
    settings = quick(task="classification", dataset=str(reviews), steps=2, eval_interval=1, eval_examples=64)
    central.train(settings, tmp_path / "run", ignore)
    with open(tmp_path / "run" / "evaluations.csv") as file:
        rows = list(csv.DictReader(file))
    task = Task.load(settings)
    model = replay_run(RunFolder(tmp_path / "run"))[0].model
    assert [(row["step"], row["source"]) for row in rows[:3]] == [("0", "")] + [
        ("0", source) for source in sorted({document.source for document in task.held_out})
    ]
    assert len(rows) == 9
    assert len({row["loss"] for row in rows[6:]}) == 3
    for row in rows[6:]:
        own = [d for d in task.held_out if row["source"] in ("", d.source)]
        examples = task.examples(own)
        with torch.no_grad():
            output = model(**examples)
        found, wanted = output.logits.argmax(-1).tolist(), examples["labels"].tolist()
        assert float(row["loss"]) == pytest.approx(float(output.loss), rel=1e-5)
        assert float(row["accuracy"]) == pytest.approx(sum(map(int.__eq__, found, wanted)) / len(found))
        assert float(row["f1"]) == pytest.approx(mean_f1(found, wanted), rel=1e-6)
        assert not row["perplexity"] and not row["bits_per_byte"]


@pytest.mark.first(1)
@pytest.mark.usefixtures("two_sources")
@pytest.mark.parametrize("task", ["language-model", "classification"])
def test_the_final_weights_are_scored_once_and_the_summary_tells_that_score(
    quick: Quick, tmp_path: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Also where a process that ended between the last step and the summary left the score to the next one."""
    scored: list[str] = []
    evaluate = Task.evaluate

    def counting(self: Task, model: nn.Module) -> Any:
        scored.append(weights_digest(model))
        return evaluate(self, model)

    def cut(row: dict[str, Any]) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Task, "evaluate", counting)
    own, measures = {}, ("perplexity", "bits_per_byte")
    if task == "classification":
        own, measures = {"dataset": str(reviews)}, ("accuracy", "f1")
    settings = quick(task=task, steps=4, eval_interval=3, **own)
    whole = central.train(settings, tmp_path / "whole", ignore)
    assert len(scored) == len(set(scored)) == 3, "at steps 0, 3 and 4"
    assert scored[-1] == whole["digest"]
    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "cut", cut)
    scored.clear()
    resumed = central.resume(tmp_path / "cut", ignore)
    assert scored == [whole["digest"]]
    names = ("eval_loss_end", "sources", *measures)
    assert {name: resumed[name] for name in names} == {name: whole[name] for name in names}
    assert whole["eval_loss_end"] == float(read_table(tmp_path / "whole" / "metrics.csv")[-1]["eval_loss"])


@pytest.mark.usefixtures("two_sources")
def test_a_language_model_is_scored_in_perplexity_and_bits_a_byte(quick: Quick, tmp_path: Path) -> None:
    settings = quick(steps=1, eval_examples=10_000, held_out_fraction=0.3)
    summary = central.train(settings, tmp_path / "run", ignore)
    task = Task.load(settings)
    model = replay_run(RunFolder(tmp_path / "run"))[0].model
    rows = read_table(tmp_path / "run" / "evaluations.csv")[3:]
    assert [row["source"] for row in rows] == ["", "a", "b"]
    for row in rows:
        own = [d for d in task.held_out if row["source"] in ("", d.source)]
        examples = task.examples(own)
        with torch.no_grad():
            logits = model(input_ids=examples["input_ids"]).logits[:, :-1]
        nats = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), examples["input_ids"][:, 1:].flatten()))
        # What the predicted tokens stand for; those of the shipped tokenizer are bytes, or several.
        predicted = examples["input_ids"][:, 1:].flatten().tolist()
        text_bytes = sum(
            len(token) for token in task.tokenizer.convert_ids_to_tokens(predicted, skip_special_tokens=True)
        )
        density = text_bytes / len(predicted)
        assert float(row["loss"]) == pytest.approx(nats, rel=1e-5)
        assert float(row["perplexity"]) == pytest.approx(math.exp(nats), rel=1e-4)
        assert float(row["bits_per_byte"]) == pytest.approx(nats / math.log(2) / density, rel=1e-4)
    assert summary["perplexity"] == pytest.approx(float(rows[0]["perplexity"]))
    assert set(summary["sources"]) == {row["source"] for row in rows[1:]}


@pytest.mark.parametrize("way", ["fo", "calibrate"])
def test_the_best_weights_are_kept_and_scored_apart_from_the_last(quick: Quick, tmp_path: Path, way: str) -> None:
    """With a rate at which the loss falls and then rises."""
    settings = quick(**SHORT | WAYS[way] | {"eval_interval": 1, "keep_best": True, "learning_rate": 0.05, "steps": 7})
    run = tmp_path / "run"
    last = central.train(settings, run, ignore)["eval_loss_end"]
    losses = [float(row["eval_loss"]) for row in read_table(run / "metrics.csv")[1:]]
    assert min(losses) < last, "else the two could not be told apart"
    assert scoring.score_run(run, {}, best=True).scores.whole.loss == min(losses)
    assert scoring.score_run(run, {}).scores.whole.loss == pytest.approx(last, rel=1e-6)
