"""Rates follow the schedule, and a run stops where its budget says."""

import math
from pathlib import Path
from typing import Any

import pytest
from federations import Quick, ignore
from trainings import SHORT, WAYS, contents, train_cut

from zofed.base.errors import UserError
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, schedules


@pytest.mark.parametrize("warmup", [0, 1, 4, 10, 12])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_rates_follow_the_schedule(quick: Quick, schedule: str, warmup: int) -> None:
    settings = quick(
        schedule=schedule, warmup_steps=warmup, learning_rate=0.5, min_learning_rate=0.125, bp_learning_rate=2.0
    )
    total = 10
    for step in range(1, total + 1):
        if step <= warmup:
            shape = end = step / warmup
        elif schedule == "constant":
            shape = end = 1.0
        else:
            shape = (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
            end = None
        for height, rate in ((0.5, schedules.learning_rate), (2.0, schedules.backprop_rate)):
            wanted = height * shape if end is not None else 0.125 + (height - 0.125) * shape
            assert rate(settings, step, total) == pytest.approx(wanted, rel=1e-12)
    if schedule == "cosine" and warmup < total:
        assert schedules.learning_rate(settings, total, total) == 0.125


@pytest.mark.slow
def test_records_carry_the_rate_of_their_round(quick: Quick, tmp_path: Path) -> None:
    course = {"schedule": "cosine", "warmup_steps": 1, "learning_rate": 0.01, "bp_learning_rate": 0.004}
    wanted = [1.0, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(1, 5))]
    for way, backprop in {"zo": (), "calibrate": (2, 4), "hybrid-rank1": (1, 3, 5), "fo": range(1, 6)}.items():
        central.train(quick(**SHORT | WAYS.get(way, {"mode": "zo"}) | course), tmp_path / way, ignore)
        heights = [0.004 if round_ in backprop else 0.01 for round_ in range(1, 6)]
        rates = [record.rate for record in contents(tmp_path / way)]
        assert rates == pytest.approx([h * w for h, w in zip(heights, wanted, strict=True)], abs=1e-15), way


def edit(out: Path, **values: Any) -> None:
    settings = RunFolder(out).settings().model_copy(update=values)
    from zofed.config import to_toml

    (out / "settings.toml").write_text(to_toml(settings))


@pytest.mark.slow
def test_a_run_on_a_cosine_refuses_another_length(quick: Quick, tmp_path: Path) -> None:
    train_cut(quick(schedule="cosine"), tmp_path / "run", 3)
    edit(tmp_path / "run", steps=9)
    with pytest.raises(UserError, match="another steps"):
        central.resume(tmp_path / "run", ignore)
    train_cut(quick(), tmp_path / "constant", 3)
    edit(tmp_path / "constant", steps=7)
    assert central.resume(tmp_path / "constant", ignore)["digest"]
    assert len(contents(tmp_path / "constant")) == 7


@pytest.mark.first(1)
@pytest.mark.parametrize("mode", ["zo", "fo", "instruct", "subspace"])
@pytest.mark.parametrize("budget", ["max_forward_equivalents", "max_tokens"])
def test_a_budget_stops_at_its_step(quick: Quick, tmp_path: Path, mode: str, budget: str) -> None:
    settings = quick(mode=mode, bp_interval=1, subspace_size=4, subspace_interval=2, eval_examples=4, eval_interval=50)
    one = {  # of a step: examples run forward, and tokens
        "zo": (4 * 2, 2 * 16),
        "fo": (3 * 2, 2 * 16),
        "instruct": (3 * 2 + 6 * 2, 4 * 16),
        "subspace": (3 * 4, 4 * 16),
    }[mode][budget == "max_tokens"]
    out = tmp_path / "run"
    summary = central.train(settings.model_copy(update={budget: 2 * one + 1}), out, ignore)
    rows = read_table(out / "metrics.csv")
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [int(row[budget.removeprefix("max_")]) for row in rows] == [0, one, 2 * one, 3 * one]
    assert float(rows[-1]["eval_loss"]) == summary["eval_loss_end"] and not rows[-2]["eval_loss"]
    assert summary["stopped_by"] == f"{budget.replace('_', '-')} = {2 * one + 1}"
    assert (out / "checkpoints" / "step-00000003.safetensors").exists() == (mode in ("fo", "instruct"))
    assert central.resume(out, ignore) == summary
    assert len(contents(out)) == 3
    edit(out, **{budget: 3 * one + 1})
    again = central.resume(out, ignore)
    assert len(contents(out)) == 4 and again["digest"] != summary["digest"]
    exact = central.train(settings.model_copy(update={budget: 2 * one}), tmp_path / "exact", ignore)
    assert len(contents(tmp_path / "exact")) == 2 and exact["stopped_by"]


def test_a_budget_of_seconds_stops_once_for_the_row_the_loop_and_a_resumption(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever passes while the last row, evaluation and checkpoint are written."""
    from zofed.training import trainer

    late, monotonic = 0.0, trainer.time.monotonic

    def clock() -> float:
        """Every look at it takes a second."""
        nonlocal late
        late += 1.0
        return monotonic() + late

    monkeypatch.setattr(trainer.time, "monotonic", clock)
    for limit in (1.3, 2.5, 3.1):
        late = 0.0
        out = tmp_path / str(limit)
        settings = quick(mode="fo", max_seconds=limit, steps=50, eval_interval=100, eval_examples=4)
        summary = central.train(settings, out, ignore)
        rows = read_table(out / "metrics.csv")
        assert rows[-1]["eval_loss"] and summary["stopped_by"] == f"max-seconds = {limit:g}"
        assert float(rows[-1]["seconds"]) >= limit > float(rows[-2]["seconds"])
        assert RunFolder(out).checkpoints()[-1].stem == f"step-{len(rows) - 1:08d}"
        assert central.resume(out, ignore) == summary


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        ({}, 2),
        ({"query_batches": "per-query"}, 6),
        ({"query_batches": "per-query", "query_batch_size": 5}, 15),
        ({"mode": "fo", "gradient_accumulation": 3}, 6),
        ({"mode": "subspace", "subspace_interval": 7}, 14),
        ({"mode": "instruct", "gradient_accumulation": 3}, 2),
    ],
)
def test_epochs_are_passes_over_the_data(quick: Quick, overrides: dict[str, Any], seen: int) -> None:
    assert central.steps_of(quick(epochs=1.5, **overrides), 101) == math.ceil(151.5 / seen)
    assert central.steps_of(quick(epochs=0.001, **overrides), 101) == 1
    assert central.steps_of(quick(**overrides), 101) == 6


def test_a_run_of_epochs_stopped_by_a_budget_says_so(quick: Quick, tmp_path: Path) -> None:
    settings = quick(epochs=50, steps=1, max_tokens=3 * 32, eval_examples=4)
    assert central.train(settings, tmp_path / "run", ignore)["stopped_by"] == "max-tokens = 96"
    short = quick(steps=2, max_tokens=2 * 32, eval_examples=4)
    assert central.train(short, tmp_path / "short", ignore)["stopped_by"] == ""
