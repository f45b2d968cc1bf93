"""Every mode obeys the law; rates, budgets, batches, data and scores are what the settings say."""

import csv
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_law import federate, ignore, records_of
from torch import Tensor, nn
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from zofed import config
from zofed.base.errors import UserError
from zofed.config import WITH_BACKPROP, Settings
from zofed.core import directions, journal, metrics, subspace
from zofed.core.digests import weights_digest
from zofed.core.measure import Measure
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Guided, Seeded
from zofed.core.replica import Replica, update_digest
from zofed.data import documents, encoding
from zofed.federated import client, protocol
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, measurements, modes, schedules, scoring, tasks
from zofed.training.finalize import replay_run
from zofed.training.process import prepare_process
from zofed.training.steps import Steps, step_function
from zofed.training.task import Task

Quick = Callable[..., Settings]

SHORT = {"steps": 5, "save_interval": 2, "eval_examples": 4, "bp_interval": 2, "eval_interval": 5}
SUBSPACE = {"mode": "subspace", "optimizer": "adamw", "subspace_size": 9, "subspace_interval": 2}
WAYS: dict[str, dict[str, Any]] = {
    "fo": {"mode": "fo", "optimizer": "mudamw", "clip_norm": 0.5, "gradient_accumulation": 2},
    "calibrate": {"mode": "calibrate", "bp_optimizer": "adamw", "bp_learning_rate": 1e-3, "momentum": 0.5},
    "hybrid": {"mode": "instruct", "instruct_kind": "hybrid", "directions": "rademacher", "optimizer": "mudamw"},
    "hybrid-rank1": {"mode": "instruct", "direction_scale": "rms", "schedule": "cosine", "warmup_steps": 2},
    "raw": {"mode": "instruct", "instruct_weighting": "raw", "instruct_blend": False, "bp_optimizer": "adamw"},
    "cosine": {"mode": "instruct", "instruct_kind": "cosine", "instruct_weighting": "unbiased", "clip_norm": 0.1},
    "guide-only": {"mode": "instruct", "instruct_kind": "guide-only", "bp_data_fraction": 0.5},
    "line": {"mode": "instruct", "instruct_kind": "line", "query_batches": "per-query", "bp_batch_size": 3},
    "core": SUBSPACE | {"weight_decay": 0.1},
    "core to rate zero": SUBSPACE | {"schedule": "cosine"},
    "diagonal": SUBSPACE | {"subspace_variant": "diagonal", "directions": "rank2", "direction_scale": "rms"},
}


def train_cut(settings: Settings, out: Path, at: int) -> None:
    def cut(row: dict[str, Any]) -> None:
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        central.train(settings, out, cut)


def contents(out: Path) -> list[Any]:
    return [entry.record for entry in journal.read(RunFolder(out).journal).entries]


@pytest.mark.first(1)
@pytest.mark.parametrize("way", WAYS)
def test_with_kept_gradients_every_way_gives_one_digest(quick: Quick, tmp_path: Path, way: str) -> None:
    """Uninterrupted, replayed from the files alone, and cut before any checkpoint and after one."""
    settings = quick(**SHORT | {"keep_gradients": True} | WAYS[way])
    whole = central.train(settings, tmp_path / "whole", ignore)
    replayed, start = replay_run(RunFolder(tmp_path / "whole"))
    assert (replayed.digest(), start) == (whole["digest"], 0)
    assert whole["replay_digest"] == whole["digest"] != replayed.genesis["weights"]
    cut = tmp_path / "cut"
    train_cut(settings, cut, 1)
    with pytest.raises(KeyboardInterrupt):
        central.resume(cut, lambda row: (_ for _ in ()).throw(KeyboardInterrupt) if row["step"] == 4 else None)
    resumed = central.resume(cut, ignore)
    assert resumed["digest"] == resumed["replay_digest"] == whole["digest"]
    assert records_of(cut) == records_of(tmp_path / "whole")
    names = ("eval_loss_start", "eval_loss_end", "forward_passes", "backward_passes", "forward_equivalents", "tokens")
    assert all(resumed[name] == whole[name] for name in names)
    kept = {path.stem for path in (cut / "updates").glob("*")}
    assert kept == {digest.hex() for digest in map(update_digest, contents(cut)) if digest}
    assert journal.read(RunFolder(cut).journal).torn == 0


@pytest.mark.first(1)
@pytest.mark.parametrize("way", ["fo", "calibrate", "hybrid-rank1", "cosine", "raw"])
def test_without_kept_gradients_a_resumed_run_asks_again(quick: Quick, tmp_path: Path, way: str) -> None:
    settings = quick(**SHORT | {"bp_interval": 1 if way in ("cosine", "raw") else 2} | WAYS[way])
    whole = central.train(settings, tmp_path / "whole", ignore)
    assert not (tmp_path / "whole" / "updates").exists() and whole["replay_digest"] is None
    replayed, start = replay_run(RunFolder(tmp_path / "whole"))
    assert (replayed.digest(), start) == (whole["digest"], 5), "from the last checkpoint"
    for at in (1, 4):
        train_cut(settings, tmp_path / f"cut{at}", at)
        assert central.resume(tmp_path / f"cut{at}", ignore)["digest"] == whole["digest"]
    assert records_of(tmp_path / "cut1") == records_of(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoints")
    with pytest.raises(UserError, match=r"not kept.*checkpoint"):
        replay_run(RunFolder(tmp_path / "whole"))


@pytest.mark.first(1)
@pytest.mark.parametrize("way", ["fo", "calibrate", "hybrid-rank1"])
def test_a_replay_that_lacks_a_gradient_starts_at_the_checkpoint(quick: Quick, tmp_path: Path, way: str) -> None:
    folder = RunFolder(tmp_path / "run")
    whole = central.train(quick(**SHORT | {"keep_gradients": True} | WAYS[way]), folder.path, ignore)
    lost = next(digest for digest in map(update_digest, contents(folder.path)) if digest)
    kept = folder.path / "updates" / f"{lost.hex()}.safetensors"
    body = kept.read_bytes()
    kept.unlink()
    assert folder.update(lost) is None
    replayed, start = replay_run(folder)
    assert (replayed.digest(), start) == (whole["digest"], 5)
    kept.write_bytes(body[:-3] + b"xyz")
    assert folder.update(lost) is None, "a damaged file is no gradient"
    kept.write_bytes(body)
    assert replay_run(folder)[1] == 0


def flipped(body: bytes, at: int) -> bytes:
    """The bytes with one of them changed."""
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a byte of its header": lambda body: flipped(body, 12),
    "a byte of its tensors": lambda body: flipped(body, len(body) // 2),
    "its last byte": lambda body: flipped(body, len(body) - 1),
    "half of it": lambda body: body[: len(body) // 2],
    "all of it": lambda body: b"",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_gradient_is_one_that_was_not_kept(quick: Quick, tmp_path: Path, damage: str) -> None:
    """A replay starts at the checkpoint, and without one names the file; a resumed run asks again and keeps it anew."""
    settings = quick(**SHORT | {"keep_gradients": True, "controls": True} | WAYS["calibrate"])
    whole, run = central.train(settings, tmp_path / "whole", ignore), tmp_path / "run"
    assert whole["controls"].keys() == {"frozen", "random_slopes"}
    train_cut(settings, run, 3)
    shutil.rmtree(run / "checkpoints")
    (lost,) = (digest for digest in map(update_digest, contents(run)) if digest)
    (kept,) = (run / "updates").iterdir()
    body = kept.read_bytes()
    kept.write_bytes(DAMAGES[damage](body))
    assert RunFolder(run).update(lost) is None
    with pytest.raises(UserError, match=f"{kept}, .* is damaged, .*: restore the file from a copy") as told:
        replay_run(RunFolder(run))
    assert "\n" not in str(told.value)
    resumed = central.resume(run, ignore)
    assert resumed["digest"] == resumed["replay_digest"] == whole["digest"]
    assert RunFolder(run).update(lost) is not None, "it is whole again"
    kept.write_bytes(DAMAGES[damage](body))
    replayed, start = replay_run(RunFolder(run))
    assert (replayed.digest(), start) == (whole["digest"], 5)


@pytest.mark.slow
def test_a_run_whose_gradient_was_damaged_before_a_checkpoint_ends_without_its_replay(
    quick: Quick, tmp_path: Path
) -> None:
    settings = quick(**SHORT | {"keep_gradients": True, "controls": True} | WAYS["calibrate"])
    whole = central.train(settings, tmp_path / "whole", ignore)
    train_cut(settings, tmp_path / "run", 3)
    (kept,) = (tmp_path / "run" / "updates").iterdir()
    kept.write_bytes(b"")
    resumed = central.resume(tmp_path / "run", ignore)
    assert (resumed["digest"], resumed["replay_digest"]) == (whole["digest"], None)
    assert resumed["controls"] == {"frozen": whole["controls"]["frozen"]}


def test_a_gradient_asked_again_must_be_the_journals(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_cut(quick(**SHORT | {"keep_gradients": True} | WAYS["fo"]), tmp_path / "run", 1)
    shutil.rmtree(tmp_path / "run" / "updates")
    gradient = Measure.gradient

    def other(self: Replica, loss: Any) -> Any:
        update, value = gradient(self, loss)
        return {name: tensor * 1.01 for name, tensor in update.items()}, value

    monkeypatch.setattr(Measure, "gradient", other)
    with pytest.raises(UserError, match="round 1 comes out otherwise"):
        central.resume(tmp_path / "run", ignore)


@pytest.mark.slow
def test_every_kind_of_record_is_where_the_mode_puts_it(quick: Quick, tmp_path: Path) -> None:
    kinds = {}
    for way in ("fo", "calibrate", "hybrid-rank1", "core"):
        central.train(quick(**SHORT | WAYS[way]), tmp_path / way, ignore)
        kinds[way] = [type(record) for record in contents(tmp_path / way)]
    assert kinds == {
        "fo": [Dense] * 5,
        "calibrate": [Seeded, Dense, Seeded, Dense, Seeded],
        "hybrid-rank1": [Guided, Seeded, Guided, Seeded, Guided],
        "core": [Seeded] * 5,
    }
    rows = read_table(tmp_path / "hybrid-rank1" / "metrics.csv")[1:]
    assert [bool(row["cosine_kept"]) for row in rows] == [True, False, True, False, True]
    assert all(0.9 <= float(row["cosine_kept"]) < 0.95 for row in rows[::2])


# --- steps ---


def steps_of(settings: Settings) -> tuple[Steps, Task, Replica]:
    prepare_process(1)
    task = Task.load(settings)
    replica = task.replica()
    examples = task.shard(0, 1)
    own = task.backprop_examples if settings.mode in WITH_BACKPROP else examples
    return Steps(settings, replica, examples, settings.steps, own, None), task, replica


def test_accumulated_gradients_are_those_of_one_large_batch(quick: Quick) -> None:
    small, *_ = steps_of(quick(mode="fo", batch_size=2, gradient_accumulation=3))
    large, *_ = steps_of(quick(mode="fo", batch_size=6))
    for round_ in (1, 2):
        one, other = small.first_order(round_), large.first_order(round_)
        assert one.update and other.update
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        for name, tensor in one.update.items():
            assert torch.allclose(tensor, other.update[name], rtol=1e-3, atol=1e-5), name
        assert (one.tokens, one.forward_passes, one.forward_equivalents) == (6 * 16, 3, 18)
        assert other.tokens == 6 * 16 and other.forward_equivalents == 18


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


@pytest.mark.parametrize("mode", ["fo", "calibrate"])
def test_a_clipped_gradient_has_the_norm_and_its_direction(quick: Quick, mode: str) -> None:
    plain, *_ = steps_of(quick(mode=mode, gradient_accumulation=2))
    whole = plain.first_order(2).update
    assert whole
    norm = norm_of(whole)
    for limit in (norm / 3, norm * 2):
        steps, *_ = steps_of(quick(mode=mode, gradient_accumulation=2, clip_norm=limit))
        clipped = steps.first_order(2).update
        assert clipped
        share = min(1.0, limit / norm)
        assert norm_of(clipped) == pytest.approx(norm * share, rel=1e-5)
        assert all(torch.allclose(clipped[name], tensor * share, rtol=1e-4) for name, tensor in whole.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [{}, {"normalize_slopes": False}, {"finite_difference": "two-point", "normalize_slopes": False}]
)
def test_a_clipped_estimate_has_the_norm(quick: Quick, overrides: dict[str, Any]) -> None:
    settings = quick(queries=8, **overrides)
    plain, _, replica = steps_of(settings)
    norm = replica.apply(journal.link(replica.head, plain.zeroth_order(1).record))
    for limit in (norm / 5, norm * 2):
        steps, _, replica = steps_of(settings.model_copy(update={"clip_norm": limit}))
        found = replica.apply(journal.link(replica.head, steps.zeroth_order(1).record))
        assert found == pytest.approx(min(limit, norm), rel=0.02)


@pytest.mark.first(1)
@pytest.mark.parametrize("overrides", [{}, {"instruct_kind": "hybrid"}, {"instruct_blend": False}])
def test_a_clipped_guided_estimate_has_the_norm(quick: Quick, overrides: dict[str, Any]) -> None:
    settings = quick(mode="instruct", queries=8, **overrides)
    plain, _, replica = steps_of(settings)
    step = plain.guided(1)
    norm = replica.apply(journal.link(replica.head, step.record), step.update)
    assert norm > 0
    for limit in (norm / 5, norm * 2):
        steps, _, replica = steps_of(settings.model_copy(update={"clip_norm": limit}))
        step = steps.guided(1)
        found = replica.apply(journal.link(replica.head, step.record), step.update)
        assert found <= limit * 1.02 and (limit > norm or found > 0.9 * limit)


def test_calibrate_keeps_two_optimizers_apart(quick: Quick) -> None:
    """Heavy-ball SGD for slopes and AdamW for gradients, each as if the other were not there."""
    settings = quick(
        mode="calibrate",
        bp_interval=2,
        momentum=0.5,
        bp_optimizer="adamw",
        bp_learning_rate=1e-3,
        normalize_slopes=False,
    )
    steps, task, replica = steps_of(settings)
    ask = step_function(task.settings, replica, steps.examples, 6, steps.backprop_examples)
    name = next(iter(replica.parameters))
    weight = replica.parameters[name].detach().double().clone()
    velocity, mean, square = torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros_like(weight)
    count = 0
    for round_ in range(1, 7):
        step = ask(round_)
        replica.apply(journal.link(replica.head, step.record), step.update)
        if round_ % 2:
            record = step.record
            assert isinstance(record, Seeded) and record.rate == 0.01
            estimate = directions.weighted_sum(
                "rank1", record.seeds(settings.seed), record.coefficients, name, weight.shape
            ).double() * math.ldexp(1 / record.divisor, record.exponent)
            velocity = 0.5 * velocity + estimate
            weight -= 0.01 * velocity
        else:
            assert step.record == Dense(round_, 1e-3) and step.update
            count += 1
            gradient = step.update[name].double()
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            weight -= 1e-3 * (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        assert torch.allclose(replica.parameters[name].detach().double(), weight, rtol=1e-4, atol=1e-6), round_


def test_a_subspace_decays_by_its_rate_and_interval_once_a_record(quick: Quick) -> None:
    ends = {}
    for decay in (0.0, 0.25):
        steps, _, replica = steps_of(quick(**SUBSPACE | {"weight_decay": decay, "subspace_interval": 3}))
        before = {name: parameter.detach().clone() for name, parameter in replica.parameters.items()}
        record = steps.in_subspace(1).record
        replica.apply(journal.link(replica.head, record))
        ends[decay] = {name: parameter.detach() for name, parameter in replica.parameters.items()}
    assert isinstance(record, Seeded) and record.rate == pytest.approx(0.03)
    for name, old in before.items():
        expected = ends[0.0][name] - old * (0.01 * 3 * 0.25)
        assert torch.allclose(ends[0.25][name], expected, rtol=1e-5, atol=1e-7), name


def test_a_subspace_record_holds_what_was_trained(quick: Quick) -> None:
    """The weights go down the estimate, hence the coefficients are written with the sign turned."""
    steps, _, replica = steps_of(quick(**SUBSPACE))
    record = steps.in_subspace(1).record
    assert isinstance(record, Seeded)
    seeds = directions.direction_seeds(0, 1, 0, 9)[:3]
    batches = measurements.batches(steps.settings, replica, steps.examples, 0, 2, 2)
    found = subspace.trained(batches, replica.parameters, "core", seeds, 9, Optimizer("adamw"), 0.01)
    moved = [-math.ldexp(c * record.rate / record.divisor, record.exponent) for c in record.coefficients]
    assert moved == pytest.approx(found.coefficients, abs=2**-17 * max(map(abs, found.coefficients)))


@pytest.mark.slow
def test_seeds_are_fresh_in_every_round_and_mode(quick: Quick, tmp_path: Path) -> None:
    for way in ("core", "hybrid-rank1", "calibrate"):
        central.train(quick(**SHORT | WAYS[way]), tmp_path / way, ignore)
        seeds = []
        for record in contents(tmp_path / way):
            part = record.seeded if isinstance(record, Guided) else record
            seeds += part.seeds(0) if isinstance(part, Seeded) else []
        assert len(set(seeds)) == len(seeds) > 0


# --- rates and budgets ---


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


# --- data ---


def test_each_query_has_examples_of_its_own(quick: Quick, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = quick(query_batches="per-query", query_batch_size=3, queries=4)
    steps, _, replica = steps_of(settings)
    _, own = measurements.query_loss(settings, replica, steps.examples, 1, 0)
    assert own and own["input_ids"].shape == (4, 3, 16)
    rows = {tuple(row) for row in own["input_ids"].flatten(0, 1).tolist()}
    assert len(rows) == 12
    step = steps.zeroth_order(1)
    assert (step.forward_passes, step.forward_equivalents, step.tokens) == (8, 24, 12 * 16)
    seeds = directions.direction_seeds(settings.seed, 1, 0, 4)
    slopes = []
    for query, seed in enumerate(seeds):
        batch = {name: tensor[query] for name, tensor in own.items()}
        found = replica.measure.slopes(
            lambda batch=batch: metrics.loss_of(replica.model, batch), [seed], settings.epsilon, 1
        )
        slopes.append(found.slopes[0])
    two_point = settings.model_copy(update={"finite_difference": "two-point"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot run for many")
        measured = measurements.slopes(two_point, replica, steps.examples, 0)
    found = [math.ldexp(c, measured.exponent) for c in measured.coefficients]
    assert found == pytest.approx(slopes, rel=0.05, abs=0.05 * max(map(abs, slopes)))


def texts(documents: list[Any]) -> set[str]:
    return {document.text for document in documents}


@pytest.mark.parametrize("mode", ["instruct", "calibrate"])
def test_split_data_share_no_document(quick: Quick, mode: str) -> None:
    task = Task.load(quick(mode=mode, bp_data_fraction=0.25))
    parts = [texts(task.train), texts(task.backprop), texts(task.held_out)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 40
    assert len(task.backprop) == 9
    shared = Task.load(quick(mode=mode))
    assert shared.backprop is shared.train
    assert Task.load(quick(mode="zo", bp_data_fraction=0.25)).train == shared.train


def test_backprop_sees_its_own_part_and_zeroth_order_the_other(quick: Quick) -> None:
    settings = quick(mode="calibrate", bp_data_fraction=0.5, batch_size=4)
    steps, task, replica = steps_of(settings)
    seen: list[Tensor] = []
    handle = replica.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    steps.first_order(2)
    handle.remove()
    own = {tuple(row) for row in task.backprop_examples["input_ids"].tolist()}
    assert all(tuple(row) in own for batch in seen for row in batch.tolist())
    others = {tuple(row) for row in steps.examples["input_ids"].tolist()}
    assert not own & others


def corpus_of(path: Path, start: int, count: int, **extra: Any) -> Path:
    chosen = encoding.load_documents("sample-dclm")[start : start + count]
    path.write_text("".join(json.dumps({"text": document.text} | extra) + "\n" for document in chosen))
    return path


def test_other_data_for_backprop_and_evaluation_are_pinned(quick: Quick, corpus: Path, tmp_path: Path) -> None:
    other, judged = corpus_of(tmp_path / "bp.jsonl", 50, 12), corpus_of(tmp_path / "eval.jsonl", 70, 9)
    settings = quick(**SHORT | {"mode": "calibrate", "bp_dataset": str(other), "eval_dataset": str(judged)})
    task = Task.load(settings)
    assert len(task.train) == 40 and texts(task.held_out) == texts(encoding.load_documents(str(judged)))
    assert texts(task.backprop) == texts(encoding.load_documents(str(other)))
    assert not texts(task.train) & (texts(task.held_out) | texts(task.backprop))
    train_cut(settings, tmp_path / "run", 3)
    pinned = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert pinned["backprop"] == encoding.documents_digest(task.backprop)
    body = other.read_bytes()
    corpus_of(other, 51, 12)
    with pytest.raises(UserError, match="another backprop"):
        central.resume(tmp_path / "run", ignore)
    other.write_bytes(body)
    assert central.resume(tmp_path / "run", ignore)["digest"]


def test_a_part_for_backprop_smaller_than_a_batch_is_refused(quick: Quick, tmp_path: Path) -> None:
    settings = quick(mode="instruct", bp_data_fraction=0.03, bp_batch_size=500)
    with pytest.raises(UserError, match="less than one batch of 500"):
        central.train(settings, tmp_path / "run", ignore)


# --- objectives and scores ---


def mean_f1(found: list[int], wanted: list[int]) -> float:
    scores = []
    for label in sorted(set(found) | set(wanted)):
        hits = sum(f == w == label for f, w in zip(found, wanted, strict=True))
        scores.append(2 * hits / (found.count(label) + wanted.count(label)))
    return sum(scores) / len(scores)


def language_model() -> GPT2LMHeadModel:
    from test_models import GPT2

    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2).eval()


def classifier() -> GPT2ForSequenceClassification:
    from test_models import GPT2

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

    client._session.cache_clear()
    with pytest.raises(UserError, match="clients run code"):
        client.measure(plan, Context())  # type: ignore[arg-type]


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

    def of_two(dataset: str) -> documents.Reading:
        found = read(dataset)
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


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"bp_interval": 0}, "bp-interval = 0.*greater than or equal to 1"),
        ({"mode": "subspace", "subspace_size": 10}, "subspace-size = 10 is no square.*take 9 or 16"),
        ({"mode": "subspace", "subspace_variant": "diagonal", "directions": "gaussian"}, "no factors"),
        ({"mode": "instruct", "instruct_weighting": "raw"}, "instruct-blend = true"),
        ({"mode": "instruct", "instruct_weighting": "unbiased", "queries": 1}, "takes 2 queries"),
        ({"mode": "instruct", "dtype": "bfloat16"}, "set dtype to float32"),
        ({"objective": "acuracy"}, "did you mean 'accuracy'"),
        ({"objective": "loss", "mode": "sorted"}, "mode = 'sorted'"),
        ({"objective": "a:b:c"}, "or module:function"),
        ({"objective": "f1", "mode": "fo"}, "takes mode = zo"),
        ({"schedule": "cosine", "min_learning_rate": 0.1}, "min-learning-rate = 0.1 is above"),
        ({"bp_dataset": "pydoc", "bp_data_fraction": 0.5}, "leave one out"),
        ({"bp_data_fraction": 1.0}, "less than 1"),
        ({"instruct_cosine_target": 1.0}, "less than 1"),
        ({"subspace_size": 65537}, "less than or equal to 65536"),
    ],
)
def test_settings_that_cannot_be_are_named_with_a_remedy(quick: Quick, values: dict[str, Any], wanted: str) -> None:
    with pytest.raises(UserError, match=wanted) as refused:
        quick(**values)
    assert "\n" not in str(refused.value)


def test_a_mode_is_read_in_any_case(quick: Quick) -> None:
    assert [quick(mode=name).mode for name in ("ZO", "Fo", "InStruct")] == ["zo", "fo", "instruct"]


@pytest.mark.first(1)
@pytest.mark.parametrize("way", ["fo", "calibrate", "hybrid", "hybrid-rank1", "line", "guide-only", "core"])
def test_a_loss_that_is_no_number_stops_the_run_at_its_step(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """One line that names the step; what was written before stays, and goes on once the cause is gone."""
    settings = quick(**SHORT | {"keep_gradients": True, "bp_interval": 1} | WAYS[way] | {"bp_interval": 1})
    whole = central.train(settings, tmp_path / "whole", ignore)
    spoilt = False
    loss_of = metrics.loss_of

    def spoiling(*arguments: Any) -> Tensor:
        return loss_of(*arguments) * (math.nan if spoilt else 1.0)

    def spoil(row: dict[str, Any]) -> None:
        nonlocal spoilt
        spoilt = row["step"] == 3

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "loss_of", spoiling)
        with pytest.raises(UserError, match=r"the loss of step 4 \(seed 0\) is not finite") as stopped:
            central.train(settings, tmp_path / "run", spoil)
    assert "\n" not in str(stopped.value)
    assert RunFolder(tmp_path / "run").summary()["status"] == "diverged"
    assert len(contents(tmp_path / "run")) == 3
    assert central.resume(tmp_path / "run", ignore)["digest"] == whole["digest"]


def test_the_command_refuses_in_one_line(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from zofed.commands import cli

    common = ["zofed", "train", "--dataset", str(corpus), "--block-size", "16", "--out", str(tmp_path / "run")]
    for extra in (
        ["--objective", "nowhere:function"],
        ["--mode", "instruct", "--bp-data-fraction", "0.03", "--bp-batch-size", "999"],
        ["--mode", "calibrate", "--bp-dataset", str(tmp_path / "none.jsonl")],
        ["--eval-dataset", str(tmp_path / "none.jsonl")],
    ):
        monkeypatch.setattr(sys, "argv", [*common, *extra])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        errors = capfd.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in errors and len(errors.splitlines()) == 1, errors
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_every_mode_and_every_task_of_the_settings_is_one_class() -> None:
    assert tuple(modes.MODES) == get_args(config.Settings.model_fields["mode"].annotation)
    assert tuple(tasks.TASKS) == get_args(config.Settings.model_fields["task"].annotation)


@pytest.mark.parametrize(
    ("mode", "asked", "examples", "cost"),
    [
        ("zo", ["slopes"] * 4, 6, 4 * 6),
        ("fo", ["update"] * 4, 2 * 6, 3 * 2 * 6),
        ("instruct", ["guided", "slopes", "slopes", "guided"], 6, 4 * 6 + 3 * 2 * 5 / 3),
        ("calibrate", ["slopes", "slopes", "gradient", "slopes"], 6, 4 * 6 + 3 * 2 * 5 / 3),
        ("subspace", ["coefficients"] * 4, 7 * 6, 3 * 7 * 6),
    ],
)
def test_a_mode_says_what_it_asks_and_what_that_costs(mode: str, asked: list[str], examples: int, cost: float) -> None:
    """3 queries one-sided are 4 passes of 6 examples; a backward pass counts two."""
    values = {"mode": mode, "batch-size": 6, "queries": 3, "bp-interval": 3, "bp-batch-size": 5}
    own = modes.mode_of(config.resolve(values | {"gradient-accumulation": 2, "subspace-interval": 7}))
    assert [own.request(round_) for round_ in (1, 2, 3, 4)] == asked
    assert (own.examples_of_a_step, own.cost) == (examples, cost)
