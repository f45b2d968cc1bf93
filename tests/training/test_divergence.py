"""A run that ends far above its start is told as diverged, whichever way it ran; an honest one never."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federations import federate, ignore

from zofed.base.errors import DivergenceError
from zofed.config import Settings
from zofed.runs import run_result
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central
from zofed.training.divergence import has_diverged

Quick = Callable[..., Settings]
Command = Callable[..., tuple[int, str, str]]
TINY, LARGE, TWO = 6.2383, 10.825, 0.6931  # losses of uniform guesses: 512 and 50,257 tokens, 2 classes


@pytest.mark.parametrize(
    ("start", "end", "training", "uniform"),
    [
        (6.24, 3.9e8, [6.2, 9e5, 3e8], TINY),
        (6.24, 3.9e8, [6.2], TINY),  # in its only step
        (6.24, 3.9e8, [], TINY),  # clients that withhold their losses
        (6.24, 3.9e8, [6.2, 6.1, 6.0, 6.0], TINY),  # in its last step
        (6.24, 40.0, [6.2, 20.0, 35.0, 50.0], TINY),
        (3.3, 12.0, [3.1, 8.0, 11.5, 11.9, 12.2], LARGE),
        (0.69, 9.0, [0.7, 4.0, 8.0, 0.0, 9.0], TWO),  # one batch that it happens to get right
        (0.001, 30.0, [0.001, 20.0, 31.0], TWO),
    ],
)
def test_both_losses_far_above_the_start_or_one_beyond_all(
    start: float, end: float, training: list[float], uniform: float
) -> None:
    assert has_diverged(start, end, training, uniform)


@pytest.mark.parametrize(
    ("start", "end", "training", "uniform"),
    [
        (6.24, 5.1, [6.2, 5.6, 5.0], TINY),
        (6.24, 6.9, [6.2, 6.5, 7.0], TINY),  # a small rise
        (0.69, 5.3, [0.7, 0.3, 0.01, 0.0, 0.0], TWO),  # a classifier that overfits
        (0.69, 30.0, [0.7, 0.0, 0.0, 11.0, 0.0], TWO),  # with great confidence; one document it had not seen
        (0.0001, 0.4, [0.0001, 0.2, 0.5], TWO),  # a start near 0
        (0.01, 3.0, [0.01, 2.5, 3.1], 4.6),  # still better than guessing among 100 classes
        (3.3, 14.0, [3.2, 1.0, 0.5], LARGE),  # it forgets what the eval-dataset holds
        (0.1, 8.0, [5.0, 2.0, 1.0], TWO),  # labels that contradict those of the eval-dataset
        (0.69, 60.0, [], TWO),  # what was lowered is another objective
    ],
)
def test_an_honest_run_has_not_diverged(start: float, end: float, training: list[float], uniform: float) -> None:
    assert not has_diverged(start, end, training, uniform)


EXPLODES: dict[str, Any] = {"learning_rate": 300.0, "controls": True, "epsilon": 0.01}


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.parametrize("way", ["central", "federated"])
def test_a_run_that_ends_far_above_its_start_has_diverged_and_keeps_what_it_has(
    quick: Quick, tmp_path: Path, way: str
) -> None:
    rate = 300 if way == "central" else 3
    settings, run = quick(**EXPLODES | {"learning_rate": rate}), tmp_path / "run"
    train = (lambda: central.train(settings, run, ignore)) if way == "central" else lambda: federate(settings, run, 2)
    with pytest.raises(
        DivergenceError, match=rf"far above its start, 6\.2.*learning-rate = {rate}; start again"
    ) as told:
        train()
    assert "\n" not in str(told.value)
    summary = RunFolder(run).summary()
    assert summary["status"] == "diverged" and summary["error"] == str(told.value)
    assert summary["eval_loss_end"] > 100 and summary["digest"] == summary["replay_digest"] and summary["controls"]
    assert len(read_table(run / "metrics.csv")) == 7 and (run / "model" / "config.json").exists()
    assert (run / "loss.png").exists() and (way == "central" or (run / "federation.png").exists())
    with pytest.raises(DivergenceError) as again:
        central.resume(run, ignore) if way == "central" else train()
    assert str(again.value) == str(told.value) and RunFolder(run).summary()["digest"] == summary["digest"]
    result = run_result.read(run)
    assert result.has_diverged and not result.is_complete and result.end != result.end


def test_withheld_losses_do_not_hide_it(quick: Quick, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match="far above its start"):
        federate(quick(**EXPLODES | {"learning_rate": 3}, losses_withheld=True), tmp_path / "run", 1)


def test_losses_that_no_server_takes_mean_that_training_diverged(quick: Quick, tmp_path: Path) -> None:
    """Not that the clients gave no usable reply, which a smaller quorum would get over."""
    with pytest.raises(DivergenceError, match=r"the loss of step 3 .* is beyond 1,000,000 nats for all clients"):
        federate(quick(**EXPLODES), tmp_path / "run", 2)
    assert RunFolder(tmp_path / "run").summary()["status"] == "diverged"


def small(corpus: Path) -> dict[str, Any]:
    common = {"dataset": str(corpus), "block-size": 16, "batch-size": 2, "queries": 3, "steps": 4, "epsilon": 0.01}
    return common | {"eval-examples": 8, "eval-interval": 4, "save-interval": 0, "device": "cpu"}


def test_the_command_tells_it(tmp_path: Path, corpus: Path, zofed_command: Command) -> None:
    common = small(corpus)
    options = [word for key, value in common.items() for word in (f"--{key}", str(value))]
    status, told, errors = zofed_command("train", *options, "--learning-rate", 300, "--out", tmp_path / "run")
    assert status == 2 and "training diverged" in errors and "weights SHA-256" not in told
    status, told, errors = zofed_command("eval", tmp_path / "run")
    assert status == 0 and "e+" in told and max(map(len, told.splitlines())) < 200, errors


@pytest.mark.slow
def test_a_sweep_takes_it_for_an_outcome_of_a_rate_it_tries(
    tmp_path: Path, corpus: Path, zofed_command: Command
) -> None:
    """Slow: three processes."""
    common = small(corpus)
    lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in common.items())
    (tmp_path / "sweep.toml").write_text(
        f"about = 'rates'\nseeds = [0, 1]\n[base]\n{lines}[tune]\nlearning-rate = [0.01, 300.0]\n"
    )
    out = tmp_path / "sweep"
    status, told, errors = zofed_command("sweep", tmp_path / "sweep.toml", "--out", out)
    assert status == 0 and "1 diverged while tuning: learning-rate=300,seed=0" in told and "0 failed" in told, errors
    status, told, errors = zofed_command("report", out)
    assert status == 0, errors
    assert "- diverged while tuning, not chosen: learning-rate=300,seed=0" in (out / "summary.md").read_text()
