"""What an evaluation reads, what it makes of it, and how it is told."""

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from federations import federate, ignore
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import metrics
from zofed.data import encoding, partitions
from zofed.data.documents import Document
from zofed.runs import pictures
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, scoring, task
from zofed.training.task import Task

Quick = Callable[..., Settings]
Command = Callable[..., tuple[int, str, str]]
WORDS = ["river", "film", "story", "quick", "slow", "mountain", "the", "a"]


@pytest.fixture(scope="session")
def coins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with labels that nothing in them tells, 600 of each class, sorted by label."""
    flips = random.Random(0)
    path = tmp_path_factory.mktemp("coins") / "coins.csv"
    rows = [(" ".join(flips.choices(WORDS, k=6)), label) for label in (0, 1) for _ in range(600)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def of_sources(path: Path, *names: str, each: int = 4) -> Path:
    """Labelled rows of such sources, in turn."""
    rows = [
        {"text": f"{WORDS[at % 8]} {WORDS[at % 7]} film", "label": at % 2, "source": name}
        for at, name in enumerate(names * each)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- which examples ---


def test_a_sample_is_a_function_of_the_seed_alone_and_a_larger_one_holds_it() -> None:
    assert encoding.sample(6000, 8, 0).tolist() == [169, 255, 695, 2147, 2504, 3434, 5599, 5898], "on every machine"
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    state = torch.get_rng_state()
    found = encoding.sample(6000, 256, 7)
    assert torch.equal(found, encoding.sample(6000, 256, 7)) and not torch.equal(found, encoding.sample(6000, 256, 8))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found, found.unique()) and set(encoding.sample(6000, 20, 7).tolist()) < set(found.tolist())
    assert encoding.sample(5, 256, 7).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["central", "federated"])
def test_coin_flips_sorted_by_label_score_about_chance(quick: Quick, tmp_path: Path, coins: Path, way: str) -> None:
    settings = quick(
        task="classification", dataset=str(coins), eval_dataset=str(coins), eval_examples=256, steps=1, rounds=1,
        controls=True,
    )  # fmt: skip
    run = tmp_path / "run"
    found = central.train(settings, run, ignore) if way == "central" else federate(settings, run, 2)
    assert abs(found["accuracy"] - 0.5) < 0.1
    assert found["evaluated"] == {"examples": 256, "held_out": 1200, "sources": 0, "of_sources": 0}
    scored = [0] * 600 + [1] * 600
    labels = [scored[at] for at in encoding.sample(1200, 256, 0)]
    assert 0.4 < sum(labels) / 256 < 0.6 and found["baselines"]["majority_accuracy"] == labels.count(0) / 256
    assert found["controls"]["frozen"] == found["eval_loss_start"], "the same examples"
    assert scoring.score_run(run, {}).scores.whole.loss == pytest.approx(found["eval_loss_end"], rel=1e-6)
    more = scoring.score_run(run, {"eval-examples": "2000"})
    assert str(more.scores.coverage) == "1,200 of 1,200 examples" and more.scores.whole.accuracy == pytest.approx(
        0.5, abs=0.05
    )


def test_baselines_and_bits_a_byte_are_of_the_examples_that_are_scored(quick: Quick) -> None:
    settings = quick(eval_examples=3, held_out_fraction=0.5, seed=4)
    found = Task.load(settings)
    everything = found.examples(found.held_out)["labels"]
    chosen = encoding.sample(len(everything), 3, 4)
    assert torch.equal(found.held_out_sample.examples["labels"], everything[chosen])
    predicted = everything[chosen][:, 1:].flatten().tolist()
    counts = np.bincount(found.examples(found.train)["labels"][:, 1:].flatten(), minlength=len(found.tokenizer)) + 1
    wanted = np.mean([math.log(counts.sum() / counts[token]) for token in predicted])
    assert found.baselines()["unigram"] == pytest.approx(wanted)
    words = found.tokenizer.convert_ids_to_tokens(predicted, skip_special_tokens=True)
    bytes_per_token = sum(map(len, words)) / len(predicted)  # its alphabet has a character for each byte
    score = found.evaluate(found.replica().model).whole
    assert score.bytes_per_token == pytest.approx(bytes_per_token)
    assert score.bits_per_byte == pytest.approx(score.loss / math.log(2) / bytes_per_token)


def test_clients_evaluate_on_a_sample_of_their_own_and_tell_its_size(quick: Quick, tmp_path: Path, coins: Path) -> None:
    settings = quick(
        task="classification",
        dataset=str(coins),
        client_held_out_fraction=0.5,
        eval_examples=40,
        rounds=1,
        eval_interval=1,
    )
    federate(settings, tmp_path / "run", 2)
    rows = read_table(tmp_path / "run" / "client_evaluations.csv")
    assert len(rows) == 4 and {row["examples"] for row in rows} == {"40"}
    found = Task.load(settings)
    held_out = found.client_parts(0, 2, 0.5)[1]
    assert held_out is not None
    score = metrics.evaluate(found.replica().model, found.sampled(held_out))
    assert float(rows[0]["loss"]) == pytest.approx(score.loss, rel=1e-6)


# --- what is made of them ---


TEXTS = ["plain words, 12 of them.", "  naïve café  \n", "日本語 and 🙂🙂", "", "tab\tend\n\n"]


@pytest.mark.parametrize("kind", ["bytes", "words", "slow"])
def test_each_byte_of_a_text_counts_for_one_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = encoding.load_tokenizer("shipped")
    if kind == "words":  # which drop white space, capitals and accents
        words = Tokenizer(models.WordLevel({"<u>": 0, "plain": 1, "cafe": 2, "</s>": 3}, "<u>"))
        words.normalizer = normalizers.BertNormalizer()
        words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<u>")
    documents = [Document(text, "x") for text in TEXTS]
    if kind == "slow":
        monkeypatch.setattr(type(tokenizer), "is_fast", False)
    for block in (2, 5):
        blocks = encoding.language_model_examples(documents, tokenizer, block)["input_ids"]
        found = encoding.token_bytes(documents, tokenizer, block)
        assert found.shape == blocks.shape and int(found.min()) >= 0
    tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in TEXTS]
    whole = encoding.token_bytes(documents, tokenizer, sum(tokens)).squeeze(0)
    assert [int(own.sum()) for own in whole.split(tokens)] == [len(text.encode()) for text in TEXTS]
    if kind == "bytes":
        assert whole[:3].tolist() == [len(t) for t in tokenizer.tokenize(TEXTS[0])][:3]


def language_model(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@torch.no_grad()
def test_every_predicted_token_counts_the_same_whatever_its_batch_and_masked_ones_do_not() -> None:
    model = language_model().eval()
    ids = torch.randint(50, (7, 12))
    labels = ids.masked_fill(torch.rand(7, 12) < 0.4, -100)
    labels[2], labels[3, 2:] = -100, -100
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    wanted = float(nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))
    for size in (1, 2, 3, 7, 32):
        found = metrics.evaluate(model, {"input_ids": ids, "labels": labels}, size)
        assert found.loss == pytest.approx(wanted, rel=1e-6), size
    accuracy = (logits.argmax(-1) == labels[:, 1:].flatten())[labels[:, 1:].flatten() != -100].float().mean()
    batch = {"input_ids": ids, "labels": labels}
    assert float(metrics.loss_of(model, batch, objective="accuracy")) == pytest.approx(1 - float(accuracy))
    with pytest.raises(UserError, match="7 examples hold no token to predict"):
        metrics.evaluate(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})


def test_dropout_is_off_in_an_evaluation_and_the_model_as_before_after_it() -> None:
    model, ids = language_model(0.5).train(), torch.randint(50, (4, 12))
    model.transformer.h.eval()
    modes = [module.training for module in model.modules()]
    found = {metrics.evaluate(model, {"input_ids": ids, "labels": ids}).loss for _ in range(3)}
    assert len(found) == 1 and [module.training for module in model.modules()] == modes and True in modes
    with pytest.raises(IndexError):
        metrics.evaluate(model, {"input_ids": ids + 50, "labels": ids})
    assert [module.training for module in model.modules()] == modes


class Fixed(nn.Module):
    """A classifier whose logits are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor, labels: Tensor) -> Any:
        from zofed.models.classifier import Output

        return Output(nn.functional.cross_entropy(inputs, labels), inputs)


def test_macro_f1_is_the_mean_over_the_classes_that_occur() -> None:
    guesses, labels = torch.tensor([0, 0, 2, 2, 0]), torch.tensor([0, 2, 2, 4, 0])
    found = metrics.evaluate(Fixed(), {"inputs": nn.functional.one_hot(guesses, 6).float(), "labels": labels}, 2)
    assert found.f1 == pytest.approx((4 / 5 + 2 / 4 + 0) / 3), "of classes 0, 2 and 4; 1, 3 and 5 do not occur"
    assert found.accuracy == pytest.approx(3 / 5)
    assert metrics.evaluate(Fixed(), {"inputs": torch.eye(3)[[1, 1]], "labels": torch.tensor([1, 1])}).f1 == 1.0


def test_what_no_file_can_hold_is_left_out_of_the_scores() -> None:
    assert metrics.Score(5e8, bytes_per_token=2.0).perplexity == math.inf
    assert set(metrics.Score(5e8, bytes_per_token=2.0).columns()) == {"loss", "bits_per_byte"}
    assert metrics.Score(709.0, bytes_per_token=2.0).columns()["perplexity"] == pytest.approx(math.exp(709.0))
    assert metrics.Score(math.nan, bytes_per_token=2.0).columns() == {}
    assert set(metrics.Score(3.0, bytes_per_token=0.0).columns()) == {"loss", "perplexity"}


def test_weights_that_give_no_number_at_the_start_are_not_blamed_on_the_rate(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = metrics.evaluate

    def spoilt(*arguments: Any, **named: Any) -> metrics.Score:
        return metrics.Score(evaluate(*arguments, **named).loss * math.nan)

    monkeypatch.setattr(metrics, "evaluate", spoilt)
    with pytest.raises(UserError, match=r"not finite before the first step.*give other weights or data") as refused:
        central.train(quick(steps=1), tmp_path / "run", ignore)
    assert "learning-rate" not in str(refused.value)
    assert RunFolder(tmp_path / "run").summary()["status"] == "failed"


def test_an_eval_dataset_without_an_example_is_named(quick: Quick, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    settings = quick(eval_dataset=str(tmp_path / "short.jsonl"), block_size=64)
    with pytest.raises(UserError, match=r"eval-dataset = .*short.jsonl.*less than one block of 64") as refused:
        central.train(settings, tmp_path / "run", ignore)
    assert "held-out" not in str(refused.value) and not (tmp_path / "run").exists()


# --- sources ---


ODD = ["all", "", " ", "$\\frac$", "two\nlines", "a,b\"c'", "[red]x[/red]", "[/]", "\x1b[31m", "x" * 5000, "held-out"]
NAMED = [name for name in ODD if name.strip()]


def test_sources_stay_apart_from_the_total_whatever_they_are_called(
    quick: Quick, tmp_path: Path, zofed_command: Command
) -> None:
    path, run = of_sources(tmp_path / "odd.jsonl", *NAMED, each=6), tmp_path / "run"
    settings = quick(task="classification", dataset=str(path), eval_dataset=str(path), steps=2, eval_interval=2)
    summary = central.train(settings, run, ignore)
    names = sorted(name.encode("unicode_escape").decode() if name[0] in "t\x1b" else name for name in NAMED)
    assert list(summary["sources"]) == names and summary["evaluated"]["of_sources"] == len(NAMED)
    lines = (run / "evaluations.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    assert len(lines) == 1 + len(rows) == 1 + 2 * (1 + len(names)), "a line each"
    assert [row["source"] for row in rows[len(rows) // 2 :]] == ["", *names]
    assert float(rows[-1 - len(names)]["loss"]) == summary["eval_loss_end"]
    status, told, errors = zofed_command("eval", run)
    assert status == 0 and "[red]x[/red]" in told and "\x1b" not in told and max(map(len, told.splitlines())) < 200, (
        errors
    )
    status, told, errors = zofed_command("train", "--resume", run)
    assert status == 0 and "[red]x[/red]" in told and "\x1b" not in told, errors


def test_a_source_without_a_name_is_refused_and_a_number_is_a_name(tmp_path: Path) -> None:
    for name in ("", " ", None):
        path = of_sources(tmp_path / "some.jsonl", name)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="empty source"):
            encoding.load_documents(str(path))
    found = encoding.load_documents(str(of_sources(tmp_path / "some.jsonl", 3, 12)))  # type: ignore[arg-type]
    assert {document.source for document in found} == {"3", "12"}


def test_of_hundreds_of_sources_those_of_most_documents_are_scored_and_it_is_told(
    quick: Quick, tmp_path: Path, zofed_command: Command
) -> None:
    names = [f"https://example.org/{at}" for at in range(300)]
    path = of_sources(tmp_path / "urls.jsonl", *names, *names[250:270], each=1)
    settings = quick(task="classification", dataset=str(path), eval_dataset=str(path), steps=1)
    summary = central.train(settings, tmp_path / "run", ignore)
    assert list(summary["sources"]) == names[250 : 250 + task.SOURCES], "of equals, the first by name"
    assert summary["evaluated"] == {"examples": 8, "held_out": 320, "sources": task.SOURCES, "of_sources": 300}
    status, told, errors = zofed_command("train", "--resume", tmp_path / "run")
    assert status == 0 and "8 of 320 examples; 16 of 300 sources apart, those of most documents" in told, errors
    status, told, errors = zofed_command("data", "stats", path)
    assert status == 0 and "and 284 more sources" in told and told.count("https://") == 16, errors


def test_groups_called_like_the_rest_or_like_markup_are_drawn(tmp_path: Path) -> None:
    counts = {
        0: {"others": 50, "$\\frac$": 9, "_hidden": 8, "x" * 500: 7, "two $": 6} | {f"s{at}": 1 for at in range(9)}
    }
    shown = partitions.largest(counts, 6)[0]
    assert shown["others"] == 50 and shown["(others)"] == 9 and sum(shown.values()) == 89
    assert pictures.partition(counts, tmp_path / "partition.png").stat().st_size > 1000


# --- scored again ---


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, coins: Path) -> dict[str, Path]:
    """A language model, one with an eval-dataset, a classifier, a federated run; and data to score them on."""
    from zofed import config
    from zofed.data import documents

    folder = tmp_path_factory.mktemp("scored")
    texts = [document.text for document in documents.load_documents("sample-dclm")[:60]]
    data_sets = {"train": texts[:40], "other": texts[40:50], "eval": texts[50:]}
    found = {name: folder / f"{name}.jsonl" for name in data_sets} | {"coins": coins}
    for name, some in data_sets.items():
        found[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    found["three"] = of_sources(folder / "three.jsonl", "x", each=30)
    found["three"].write_text(found["three"].read_text().replace('"label": 1', '"label": 2', 3))
    common: dict[str, Any] = {"dataset": str(found["train"]), "block-size": 16, "batch-size": 2, "queries": 2}
    common |= {"steps": 2, "rounds": 2, "eval-interval": 1, "device": "cpu", "keep-best": True}
    ways: dict[str, dict[str, Any]] = {
        "run": {},
        "with eval": {"eval-dataset": str(found["eval"])},
        "classifier": {"task": "classification", "dataset": str(coins)},
    }
    for name, changes in ways.items():
        found[name] = folder / name.replace(" ", "-")
        central.train(config.resolve(common | changes), found[name], ignore)
    found["federated"] = folder / "federated"
    federate(config.resolve(common), found["federated"], 2)
    return found


def loss_on(run: Path, some: list[Document], limit: int = 256) -> float:
    """Of a run's model, by the library's own loss."""
    from zofed.models import spec

    settings = RunFolder.open(run).settings().model_copy(update={"model": str(run / "model")})
    found = Task.load(settings)
    examples = found.examples(some)
    chosen = encoding.sample(len(examples["labels"]), limit, 0)
    model = spec.create_model(settings, found.tokenizer, found.labels)
    with torch.no_grad():
        return float(model(**{name: tensor[chosen] for name, tensor in examples.items()}).loss)


@pytest.mark.first(1)
@pytest.mark.parametrize("run", ["run", "with eval", "federated"])
@pytest.mark.parametrize("option", ["--dataset", "--eval-dataset"])
def test_data_named_to_eval_are_scored_as_a_whole_and_told(
    runs: dict[str, Path], run: str, option: str, zofed_command: Command
) -> None:
    whole = encoding.load_documents(str(runs["other"]))
    wanted = loss_on(runs[run], whole)
    status, told, errors = zofed_command("eval", runs[run], option, runs["other"])
    assert status == 0 and f"all of {runs['other']}: " in told and f"{wanted:.4f}" in told and "note" not in told, (
        errors
    )
    status, told, errors = zofed_command("eval", runs[run], option, runs["other"], "--eval-examples", 5)
    assert status == 0 and f"{loss_on(runs[run], whole, 5):.4f}" in told and ": 5 of " in told, errors
    status, told, errors = zofed_command("eval", runs[run], "--best", option, runs["other"])
    assert status == 0 and f"all of {runs['other']}: " in told, errors


def test_without_other_data_a_run_is_scored_on_what_scored_it(runs: dict[str, Path]) -> None:
    for name in ("run", "with eval", "classifier", "federated"):
        summary = RunFolder(runs[name]).summary()
        found = scoring.score_run(runs[name], {})
        assert found.scores.whole.loss == pytest.approx(summary["eval_loss_end"], rel=1e-6) and not found.note
        assert summary["evaluated"]["examples"] == found.scores.coverage.examples
    assert scoring.score_run(runs["with eval"], {}).data == str(runs["eval"])
    assert (
        scoring.score_run(runs["run"], {}).data
        == f"the held-out part of {runs['train']} (held-out-fraction = 0.1, seed 0)"
    )


def test_data_that_a_run_trained_on_are_told(runs: dict[str, Path]) -> None:
    whole = encoding.load_documents(str(runs["train"]))
    found = scoring.score_run(runs["run"], {"dataset": str(runs["train"])})
    assert found.scores.whole.loss == pytest.approx(loss_on(runs["run"], whole, limit=10**9), rel=1e-5)
    assert found.scores.coverage.examples == found.scores.coverage.held_out > 256
    assert "trained on" in found.note
    own = scoring.score_run(runs["run"], {"dataset": str(runs["train"]), "held-out-fraction": "0.1"})
    assert own.scores == scoring.score_run(runs["run"], {}).scores and not own.note
    assert (
        "trained on" in scoring.score_run(runs["run"], {"dataset": str(runs["train"]), "held-out-fraction": "0.3"}).note
    )
    assert (
        "trained on"
        in scoring.score_run(runs["with eval"], {"dataset": str(runs["train"]), "held-out-fraction": "0.1"}).note
    )
    assert "trained on" in scoring.score_run(runs["with eval"], {"eval-dataset": ""}).note


def test_a_run_is_scored_on_other_data_where_its_own_are_gone(runs: dict[str, Path]) -> None:
    moved = runs["train"].rename(runs["train"].with_suffix(".gone"))
    try:
        found = scoring.score_run(runs["run"], {"dataset": str(runs["other"])})
    finally:
        moved.rename(runs["train"])
    assert found == scoring.score_run(runs["run"], {"dataset": str(runs["other"])})


@pytest.mark.parametrize(
    ("run", "changes", "wanted"),
    [
        ("run", ["--dataset", "other", "--eval-dataset", "eval"], "both name what to score: give one"),
        (
            "run",
            ["--eval-dataset", "eval", "--held-out-fraction", "0.2"],
            "scored as a whole: leave out --held-out-fraction",
        ),
        ("with eval", ["--held-out-fraction", "0.2"], "scored on all of its eval-dataset"),
        ("run", ["--held-out-fraction", "0.3"], "above the run's 0.1"),
        ("run", ["--learning-rate", "0.1", "--clients", "3"], "--learning-rate, --clients would change no score"),
        ("run", ["--model", "tiny"], "--model would change no score"),
        ("run", ["--seed", "3"], "--seed would change no score"),
        ("run/model", ["--steps", "3"], "--steps would change no score"),
        ("run", ["--eval-examples", "0"], "eval-examples = '0': "),
        ("classifier", ["--dataset", "other"], "without a label"),
    ],
)
def test_what_eval_would_ignore_is_refused(
    runs: dict[str, Path], run: str, changes: list[str], wanted: str, zofed_command: Command
) -> None:
    path = runs["run"] / "model" if run == "run/model" else runs[run]
    status, told, errors = zofed_command("eval", path, *(runs.get(word, word) for word in changes))
    assert status == 2 and wanted in errors and len(errors.splitlines()) == 1 and not told, errors


def test_a_saved_model_is_scored_on_all_of_the_data_named(runs: dict[str, Path], zofed_command: Command) -> None:
    model, common = runs["run"] / "model", ("--block-size", 16)
    wanted = loss_on(runs["run"], encoding.load_documents(str(runs["other"])))
    status, told, errors = zofed_command("eval", model, "--dataset", runs["other"], *common)
    assert status == 0 and f"all of {runs['other']}" in told and f"{wanted:.4f}" in told, errors
    status, told, errors = zofed_command("eval", model, "--dataset", runs["other"], "--held-out-fraction", 0.5, *common)
    assert status == 0 and f"the held-out part of {runs['other']} (held-out-fraction = 0.5, seed 0)" in told, errors
    status, told, errors = zofed_command("eval", model, *common, "--eval-examples", 4)
    assert status == 0 and "the held-out part of sample-dclm" in told and ": 4 of " in told, errors
