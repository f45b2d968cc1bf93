"""What no learning scores, beside every result: on the same examples, measured once, before anything moves."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federate, ignore
from trainings import train_cut

from zofed.config import Settings
from zofed.data.encoding import Document, sample
from zofed.data.prompts import drawn
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import baselines, central
from zofed.training.task import Task

Quick = Callable[..., Settings]
WAY: dict[str, Any] = {"task": "prompt", "template": "{{ text }} It was", "label_words": " bad, good"}


def best_of_all(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The highest accuracy of any biases on a grid fine enough."""
    grid = torch.linspace(-6, 6, 121).tolist()
    best = 0.0
    for some in itertools.product(grid, repeat=logits.shape[1] - 1):
        guesses = (logits + torch.tensor([0.0, *some])).argmax(-1)
        best = max(best, float((guesses == labels).double().mean()))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_a_threshold_is_the_best_there_is(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (25,), generator=generator)
    logits = torch.randn(25, 2, generator=generator)
    logits[:, 1] += labels * 1.0 + 2.0
    biases = baselines.fitted_biases(logits, labels)
    accuracy = float(((logits + biases).argmax(-1) == labels).double().mean())
    assert accuracy >= best_of_all(logits, labels) and biases[0] == 0.0
    assert accuracy > float((logits.argmax(-1) == labels).double().mean()), "else nothing was fitted"


def test_biases_of_three_classes_are_fitted_one_beside_the_others() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (60,), generator=generator)
    logits = torch.randn(60, 3, generator=generator) + 3.0 * torch.nn.functional.one_hot(labels, 3)
    logits += torch.tensor([0.0, 9.0, -4.0])
    found = ((logits + baselines.fitted_biases(logits, labels)).argmax(-1) == labels).double().mean()
    assert float((logits.argmax(-1) == labels).double().mean()) < 0.5 < 0.9 < float(found)
    constant = torch.zeros(4, 3)
    assert torch.isfinite(baselines.fitted_biases(constant, torch.tensor([2, 2, 2, 0]))).all()


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Eighty short reviews of two classes, one of them thrice as often."""
    texts = ("a fine film", "not worth the time", "a long story", "it may be seen")
    rows = [{"text": f"{texts[n % 4]} {n % 9}", "label": int(n % 4 != 1)} for n in range(80)]
    path = tmp_path / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_prompted_run_tells_what_its_untrained_model_scores(quick: Quick, films: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(films), held_out_fraction=0.4, eval_examples=20, learning_rate=0.03, **WAY)
    summary = central.train(settings, tmp_path / "run", ignore)
    found = summary["baselines"]
    first = read_table(tmp_path / "run" / "evaluations.csv")[0]
    for name in ("loss", "accuracy", "auc", "f1"):
        assert found[f"zero_shot_{name}"] == float(first[name])
    assert summary["auc"] != found["zero_shot_auc"], "else a run's end could be taken for its start"
    task = Task.load(settings)
    model = task.replica().model
    chosen = sample(len(task.held_out), 20, settings.seed).tolist()
    scored = [task.held_out[at] for at in chosen]
    assert scored == task.scored_documents and len(scored) == 20 < len(task.held_out)

    def scores(documents: list[Document]) -> torch.Tensor:
        """Of the words after each prompt, each alone, by a plain loop."""
        rows = []
        for document in documents:
            prompt = task.tokenizer(document.text, add_special_tokens=False)["input_ids"]
            row = []
            for word in (" bad", " good"):
                ids = task.tokenizer(word, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
                logs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
                row.append(float(logs[range(len(ids)), ids].mean()))
            rows.append(row)
        return torch.tensor(rows)

    labels = torch.tensor([document.label for document in scored])
    shown = summary["baselines"]
    biases = baselines.fitted_biases(scores(task.train), torch.tensor([one.label for one in task.train]))
    assert shown["threshold_accuracy"] == pytest.approx(
        float(((scores(scored) + biases).argmax(-1) == labels).double().mean())
    )


def test_they_are_measured_once_and_a_run_that_goes_on_finds_them(
    quick: Quick, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = quick(dataset=str(films), **WAY)
    whole = central.train(settings, tmp_path / "whole", ignore)
    train_cut(settings, tmp_path / "cut", 4)
    measured = baselines.measured
    monkeypatch.setattr(baselines, "measured", lambda *_: pytest.fail("measured again"))
    assert central.resume(tmp_path / "cut", ignore)["baselines"] == whole["baselines"]
    monkeypatch.setattr(baselines, "measured", measured)
    for spoilt in ("{", '{"threshold_accuracy": "high"}', "[]"):
        train_cut(settings, tmp_path / "spoilt", 4)
        (tmp_path / "spoilt" / baselines.KEPT).write_text(spoilt)
        assert central.resume(tmp_path / "spoilt", ignore)["baselines"] == whole["baselines"]
        for path in sorted((tmp_path / "spoilt").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    without = central.train(quick(dataset=str(films), baselines=False, **WAY), tmp_path / "without", ignore)
    assert without["digest"] == whole["digest"] and not (tmp_path / "without" / baselines.KEPT).exists()
    assert set(whole["baselines"]) - set(without["baselines"]) >= {"threshold_accuracy"}


def test_a_server_measures_them_too(quick: Quick, films: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(films), **WAY)
    alone = central.train(settings, tmp_path / "alone", ignore)
    assert federate(settings, tmp_path / "together", 2)["baselines"] == alone["baselines"]


def test_solved_examples_stand_before_each_prompt_where_they_fit(
    quick: Quick, films: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = quick(dataset=str(films), **(WAY | {"block_size": 32}))
    task = Task.load(settings)
    demonstrations = tuple(drawn(task.train, 2, settings.seed)[1])
    asked = replace(task, demonstrations=demonstrations)
    need = asked.block_for(task.scored_documents)
    wider = replace(asked, settings=settings.model_copy(update={"block_size": need}))
    words = (" bad", " good")
    before = "".join(f"{one.text}{words[one.label or 0]}\n\n" for one in demonstrations)
    examples, document = wider.examples(task.scored_documents[:1]), task.scored_documents[0]
    ids = examples["input_ids"][0][examples["attention_mask"][0] > 0]
    assert task.tokenizer.decode(ids) == before + document.text and int(examples["labels"][0]) == document.label
    model = task.replica().model
    monkey = pytest.MonkeyPatch()
    monkey.setattr(baselines, "SHOTS", 3)
    try:
        found = baselines.measured(task, model)
        assert {"few_shot_accuracy", "few_shot_loss", "threshold_accuracy"} <= set(found)
        monkey.setattr(baselines, "SHOTS", 20)
        assert "few_shot_accuracy" not in baselines.measured(task, model)
        assert "no few-shot score: 20 solved examples before a prompt take" in capfd.readouterr().out
        monkey.setattr(baselines, "SHOTS", 3)
        cut = replace(task, settings=settings.model_copy(update={"block_size": 8}))
        assert "few_shot_accuracy" not in baselines.measured(cut, model)
        assert "more than 4 times block-size = 8, which cuts the rows" in capfd.readouterr().out
    finally:
        monkey.undo()


def test_the_end_of_a_run_and_its_report_set_scores_beside_baselines(
    quick: Quick, films: Path, tmp_path: Path, zofed_command: Callable[..., tuple[int, str, str]]
) -> None:
    from zofed.config import to_toml
    from zofed.experiments import report

    settings = quick(dataset=str(films), steps=2, held_out_fraction=0.5, eval_examples=30, **WAY)
    (tmp_path / "settings.toml").write_text(to_toml(settings))
    status, told, errors = zofed_command("train", tmp_path / "settings.toml", "--out", tmp_path / "run")
    assert status == 0, errors
    summary = RunFolder(tmp_path / "run").summary()
    lines = [line.split() for line in told.splitlines()]
    assert [f"{summary[name]:.4f}" for name in ("accuracy", "auc", "f1")] == lines[
        lines.index(next(line for line in lines if line[:1] == ["score"])) + 1
    ][1:]
    assert any(line[:3] == ["baseline", "zero", "shot"] for line in lines)
    page, short = report.write_report(tmp_path / "run", 0)
    for text in (page.read_text(), short.read_text()):
        assert "zero shot" in text and f"{summary['auc']:.4f}" in text and "threshold" in text
