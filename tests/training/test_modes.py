"""Every mode obeys the law: steps, records and data are what the settings say."""

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
from federations import SUBSPACE, Quick, ignore, records_of
from torch import Tensor
from trainings import SHORT, WAYS, contents, steps_of, train_cut

from zofed import config
from zofed.base.errors import UserError
from zofed.core import directions, journal, metrics, subspace
from zofed.core.measure import Measure
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Guided, Seeded
from zofed.core.replica import Replica, update_digest
from zofed.data import encoding
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, measurements, modes, tasks
from zofed.training.finalize import replay_run
from zofed.training.steps import step_function
from zofed.training.task import Task


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
    steps, _, replica = steps_of(quick(**SUBSPACE, learning_rate=0.01, direction_scale="equal", quantization_bits=18))
    record = steps.in_subspace(1).record
    assert isinstance(record, Seeded)
    seeds = directions.direction_seeds(0, 1, 0, 9)[:3]
    batches = measurements.batches(steps.settings, replica, steps.examples, 0, 2, 2)
    found = subspace.trained(batches, replica.parameters, "core", seeds, 9, Optimizer("adamw"), 0.01)
    moved = [-math.ldexp(c * record.rate / record.divisor, record.exponent) for c in record.coefficients]
    assert moved == pytest.approx(found.coefficients, abs=2**-17 * max(map(abs, found.coefficients)))


def test_with_server_momentum_a_subspace_moves_by_the_running_mean_of_its_rounds(quick: Quick) -> None:
    def moves(momentum: float, records: list[Seeded]) -> list[torch.Tensor]:
        """How far each record moves the weights."""
        _, _, replica = steps_of(quick(**SUBSPACE, server_momentum=momentum))
        found = []
        for record in records:
            start = torch.cat([tensor.detach().flatten() for tensor in replica.parameters.values()])
            replica.apply(journal.link(replica.head, record))
            found.append(torch.cat([tensor.detach().flatten() for tensor in replica.parameters.values()]) - start)
        return found

    steps, _, replica = steps_of(quick(**SUBSPACE, server_momentum=0.8))
    made = []
    for round_ in (1, 2, 3):
        record = steps.in_subspace(round_).record
        assert isinstance(record, Seeded)
        made.append(record)
        replica.apply(journal.link(replica.head, record))
    plain = moves(0.0, [replace(record, divisor=record.rate) for record in made])
    mean = torch.zeros_like(plain[0])
    for one, smoothed in zip(plain, moves(0.8, made), strict=True):
        mean = 0.8 * mean + 0.2 * one
        torch.testing.assert_close(smoothed, mean, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_a_clients_own_steps_are_torchs_and_begin_anew_in_each_round(quick: Quick, rule: str, clip: float) -> None:
    settings = quick(mode="fo", local_steps=3, local_optimizer=rule, learning_rate=0.01, clip_norm=clip)
    steps, _, replica = steps_of(settings)
    update, loss = measurements.update(settings, replica, steps.examples, 0)
    assert all(map(torch.equal, update.values(), measurements.update(settings, replica, steps.examples, 0)[0].values()))
    start = {name: parameter.detach().clone() for name, parameter in replica.parameters.items()}
    rules = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    theirs = rules[rule](replica.parameters.values(), lr=0.01, weight_decay=0.0)
    met = []
    for batch in measurements.batches(settings, replica, steps.examples, 0, 3, settings.batch_size):
        theirs.zero_grad()
        value = batch()
        value.backward()
        if clip:
            assert torch.nn.utils.clip_grad_norm_(replica.parameters.values(), clip) > clip
        theirs.step()
        met.append(float(value.detach()))
    assert loss == pytest.approx(sum(met) / 3)
    for name, parameter in replica.parameters.items():  # the server's SGD of the local rate moves it as far
        gap, moved = start[name] - 0.01 * update[name] - parameter, start[name] - parameter
        # A key's bias has a gradient of zero, but for rounding, which AdamW makes as large as any.
        assert gap.norm() < 1e-3 * moved.norm() or name.endswith("c_attn.bias"), name


@pytest.mark.slow
def test_seeds_are_fresh_in_every_round_and_mode(quick: Quick, tmp_path: Path) -> None:
    for way in ("core", "hybrid-rank1", "calibrate"):
        central.train(quick(**SHORT | WAYS[way]), tmp_path / way, ignore)
        seeds = []
        for record in contents(tmp_path / way):
            part = record.seeded if isinstance(record, Guided) else record
            seeds += part.seeds(0) if isinstance(part, Seeded) else []
        assert len(set(seeds)) == len(seeds) > 0


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
