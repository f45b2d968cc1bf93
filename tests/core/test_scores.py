"""Scores of classes and texts, against values worked out by hand or pair by pair."""

import itertools
import math

import pytest
import torch

from zofed.base import text_scores
from zofed.core import metrics
from zofed.core.metrics import Score, auc, score_of_classes


def by_pairs(scores: list[float], positive: list[bool]) -> float:
    pairs = [(a, b) for a, b in itertools.product(zip(scores, positive, strict=True), repeat=2) if a[1] and not b[1]]
    return sum((a[0] > b[0]) + (a[0] == b[0]) / 2 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_auc_is_the_share_of_pairs_in_order_ties_counting_half(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(0, levels, (40,), generator=generator).double() / 7
    positive = torch.rand(40, generator=generator) < 0.3
    assert auc(scores, positive) == pytest.approx(by_pairs(scores.tolist(), positive.tolist()), abs=1e-15)
    assert auc(scores, ~positive) == pytest.approx(1 - by_pairs(scores.tolist(), positive.tolist()), abs=1e-15)


def test_auc_of_what_has_none() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3])
    assert auc(scores, torch.tensor([True] * 3)) is None and auc(scores, torch.tensor([False] * 3)) is None
    assert auc(torch.tensor([0.1, math.nan]), torch.tensor([True, False])) is None
    assert auc(torch.tensor([math.inf, 0.0, -math.inf]), torch.tensor([True, False, False])) == 1.0
    assert auc(torch.zeros(4), torch.tensor([True, False, True, False])) == 0.5


def test_a_lean_to_one_class_costs_accuracy_and_no_auc() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]])
    found = score_of_classes(0.5, logits, labels)
    assert (found.accuracy, found.auc) == (0.5, 1.0)
    assert score_of_classes(0.5, logits - torch.tensor([0.0, 2.5]), labels).accuracy == 1.0
    three = torch.cat([logits, torch.zeros(4, 1)], 1)
    assert score_of_classes(0.5, three, labels).auc is None
    ignored = torch.tensor([0, metrics.IGNORED_LABEL, 1, 1])
    assert score_of_classes(0.5, logits, ignored).accuracy == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("a an the", ""),
        ("Theatre, anthem", "theatre anthem"),
        ("U.S.A.", "usa"),
        ("it's\n3.5 €", "its 35 €"),
        ("", ""),
    ],
)
def test_texts_are_normalised_as_squad_has_it(text: str, wanted: str) -> None:
    assert text_scores.normalised(text) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted", "exact", "f1", "rouge"),
    [
        ("The cat sat.", "a cat sat", 1.0, 1.0, 2 / 3),
        ("cat cat dog", "cat bird", 0.0, 0.4, 0.4),
        ("", "cat", 0.0, 0.0, 0.0),
        ("the", "", 1.0, 1.0, 0.0),
        ("sat cat", "cat sat", 0.0, 1.0, 0.5),
        ("one two three four", "one three four five", 0.0, 0.75, 0.75),
        ("котик", "котик", 1.0, 1.0, 0.0),  # rouge-score knows the words of a to z alone
    ],
)
def test_texts_are_scored(answer: str, wanted: str, exact: float, f1: float, rouge: float) -> None:
    found = text_scores.means([(answer, wanted)])
    assert found == pytest.approx({"exact_match": exact, "token_f1": f1, "rouge_l": rouge})


def test_means_are_over_the_answers() -> None:
    assert text_scores.means([]) == {}
    found = text_scores.means([("yes", "yes"), ("no", "yes")])
    assert found == {"exact_match": 0.5, "token_f1": 0.5, "rouge_l": 0.5}


def test_perplexity_is_of_every_loss_by_token() -> None:
    assert Score(2.0).perplexity is None
    assert Score(2.0, is_per_token=True).columns() == {"loss": 2.0, "perplexity": math.exp(2.0)}


def test_losses_and_scores_among_baselines_are_told_apart() -> None:
    found = {
        "uniform": 0.7,
        "zero_shot_loss": 0.6,
        "zero_shot_auc": 0.5,
        "few_shot_accuracy": 0.8,
        "base_token_f1": 0.1,
        "base_f1": 0.2,
        "base_exact_match": 0.0,
        "base_rouge_l": 0.3,
        "majority_accuracy": 0.5,
    }
    assert metrics.losses_among(found) == {"uniform": 0.7, "zero_shot_loss": 0.6}
    assert metrics.scores_among(found) == {
        "zero_shot": {"auc": 0.5},
        "few_shot": {"accuracy": 0.8},
        "base": {"token_f1": 0.1, "f1": 0.2, "exact_match": 0.0, "rouge_l": 0.3},
        "majority": {"accuracy": 0.5},
    }


def test_every_measure_has_a_column_of_the_tables() -> None:
    from zofed.runs.run_folder import EVALUATIONS

    assert EVALUATIONS[2:-1] == metrics.MEASURES and set(metrics.SCORES) < set(metrics.MEASURES)
