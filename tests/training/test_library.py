"""The library for scripts of one's own, and what helps to choose settings."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zofed
from zofed.base.errors import UserError
from zofed.core import pass_memory, perturbed
from zofed.core.digests import named_parameters
from zofed.core.genesis import make_genesis
from zofed.core.replica import Replica
from zofed.core.slope_quality import diagnose

ROOT = Path(zofed.__file__).parents[1]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


X, Y = torch.linspace(-1, 1, 60).reshape(12, 5).sin(), torch.arange(12) % 3


def train(model: nn.Module, steps: int, **more: Any) -> Any:
    zo = zofed.ZerothOrder(model, seed=5, queries=12, **more)
    for _ in range(steps):
        zo.apply(zo.measure(lambda: F.cross_entropy(model(X), Y), rate=0.05))
    return zo


@pytest.mark.parametrize("points", ["two-point", "one-sided"])
def test_a_module_learns_and_its_journal_rebuilds_the_weights(tmp_path: Path, points: Any) -> None:
    model = net()
    before = float(F.cross_entropy(model(X), Y).detach())
    zo = train(model, 60, journal=tmp_path / "run.zofed", finite_difference=points)
    assert float(F.cross_entropy(model(X), Y).detach()) < before - 0.03
    assert zofed.replay(net(), tmp_path / "run.zofed") == zo.digest()
    assert zo.estimate.forward_passes == (24 if points == "two-point" else 13)


def test_a_record_that_cannot_be_summed_exactly_is_not_written_down(tmp_path: Path) -> None:
    zo = train(net(), 1, directions="gaussian", journal=tmp_path / "j")
    record = zo.measure(lambda: F.cross_entropy(zo.replica.model(X), Y), rate=0.05)
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(UserError, match=r"the record of round 2 adds 2400 gaussian directions .* above 2\^53"):
        zo.apply(replace(record, queries=2400, coefficients=(2**24,) * 2400))
    assert (tmp_path / "j").read_bytes() == before


def test_asking_moves_nothing_and_a_run_goes_on_from_its_journal(tmp_path: Path) -> None:
    whole = train(net(), 8).digest()
    first = train(net(), 5, journal=tmp_path / "j")
    first.journal.close()
    model = net()
    second = zofed.ZerothOrder(model, seed=5, queries=12, journal=tmp_path / "j")
    assert second.digest() == first.digest()
    for _ in range(3):
        before = second.digest()
        record = second.measure(lambda: F.cross_entropy(model(X), Y), rate=0.05)
        assert second.digest() == before
        second.apply(record)
    assert second.digest() == whole


def test_mistakes_are_named(tmp_path: Path) -> None:
    for wrong, word in (
        ({"directions": "rank0"}, "rank0"),
        ({"queries": 0}, "queries = 0"),
        ({"epsilon": 0.0}, "epsilon = 0"),
        ({"trainable": ["nowhere"]}, "nowhere"),
    ):
        with pytest.raises(UserError, match=word):
            zofed.ZerothOrder(net(), **({"seed": 1} | wrong))
    zofed.ZerothOrder(net(), seed=1, journal=tmp_path / "j").journal.close()
    with pytest.raises(UserError, match="another seed"):
        zofed.ZerothOrder(net(), seed=2, journal=tmp_path / "j")
    with pytest.raises(AttributeError, match="nothing"):
        _ = zofed.nothing


def test_memory_grows_with_the_copies_as_told_and_a_budget_is_kept() -> None:
    model = net()
    parameters: dict[str, Tensor] = dict(named_parameters(model))

    def loss() -> Tensor:
        return F.cross_entropy(model(X), Y)

    one, further = pass_memory.bytes_by_copies(loss, parameters, "rank1")
    copies = pass_memory.copies_within(10 * one, one, further)
    assert copies > 5

    def run() -> None:
        perturbed.losses(loss, parameters, "rank1", list(range(copies)), (1e-3,), copies)

    assert 0.8 * 10 * one < pass_memory.peak_bytes(run) <= 1.05 * 10 * one
    with pytest.raises(UserError, match="smaller batch-size"):
        pass_memory.copies_within(one - 1, one, further)


def test_peak_bytes_counts_what_lives_together() -> None:
    x = torch.zeros(1000)

    def run() -> None:
        y = x * 2
        z = y * 2
        del y
        _ = z * 2

    assert pass_memory.peak_bytes(run) == 8000


def test_a_diagnosis_finds_the_epsilon_and_a_fair_cosine() -> None:
    model = net()
    names = list(named_parameters(model))
    replica = Replica(model, make_genesis(model, {}, names, seed=1, kind="rank1", optimizer=zofed_sgd()))
    losses = [lambda part=part: F.cross_entropy(model(X[part]), Y[part]) for part in (slice(0, 6), slice(6, 12))]
    found = diagnose(replica, losses, queries=64)
    errors = {epsilon: error for epsilon, error, _ in found.errors}
    assert errors[found.best_epsilon] < 0.01 < errors[1e-5]
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.random_cosine == found.parameters**-0.5
    assert found.expected_cosine == pytest.approx(8 * found.random_cosine)  # of 64 directions
    assert 0.3 < found.cosine / found.expected_cosine < 2
    with pytest.raises(UserError, match="too few"):
        diagnose(replica, losses[:1], queries=4)


def zofed_sgd() -> Any:
    from zofed.core.optimizers import Optimizer

    return Optimizer("sgd")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["diagnose", "memory"])
def test_the_commands_tell_what_to_set(command: str) -> None:
    options = ["--block-size", "16", "--batch-size", "2", "--queries", "4", "--device", "cpu"]
    run = [sys.executable, "-c", "from zofed.commands.cli import main; main()", command, *options]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert ("epsilon = " if command == "diagnose" else "perturbations-per-pass = ") in told


@pytest.mark.slow
def test_the_example_runs() -> None:
    told = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "any_module.py")], capture_output=True, text=True, check=True
    ).stdout
    assert "the same weights" in told
