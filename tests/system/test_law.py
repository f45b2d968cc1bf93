"""The law of the house: weights change only by `apply`, so every way to the same records gives the same bits."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from federations import Quick, federate, ignore, records_of, seeded_of
from transformers import AutoModelForCausalLM

from zofed.base.errors import DivergenceError, UserError
from zofed.config import Settings
from zofed.core import journal
from zofed.core.digests import weights_digest
from zofed.core.journal import Journal
from zofed.core.measure import Measure
from zofed.core.records import Record, Spread
from zofed.core.replica import Replica
from zofed.federated import client
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row, read_table
from zofed.training import central
from zofed.training.finalize import replay_run

BFLOAT16 = {"dtype": "bfloat16", "epsilon": 1e-2}
WAYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rademacher": {"directions": "rademacher"},
    "gaussian": {"directions": "gaussian"},
    "rank4": {"directions": "rank4"},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
    "mudamw": {"optimizer": "mudamw", "learning_rate": 1e-3, "weight_decay": 0.01},
    "cautious": {"optimizer": "mudamw", "learning_rate": 1e-3, "cautious": True},
    "bfloat16": BFLOAT16,
    "bfloat16 passes": {"forward_dtype": "bfloat16", "epsilon": 1e-2},
    "last block": {"scope": "last-1"},
    "not normalised": {"normalize_slopes": False},
    "two-point": {"finite_difference": "two-point"},
    "sizes": {"direction_scale": "rms"},
    "all": BFLOAT16
    | {"normalize_slopes": True, "finite_difference": "one-sided", "direction_scale": "rms", "directions": "rank4"}
    | {"optimizer": "mudamw", "learning_rate": 1e-3, "cautious": True, "weight_decay": 0.01},
    "all dense": {
        "normalize_slopes": True,
        "finite_difference": "one-sided",
        "direction_scale": "rms",
        "directions": "gaussian",
    }
    | {"momentum": 0.9, "forward_dtype": "bfloat16", "epsilon": 1e-2},
}


FAST = ("defaults", "all", "all dense", "adamw")  # the others run with the slow tests and on other instruction sets


@pytest.mark.bits
@pytest.mark.parametrize(
    "overrides",
    [pytest.param(way, id=name, marks=() if name in FAST else pytest.mark.slow) for name, way in WAYS.items()],
)
def test_every_way_to_the_same_records_gives_the_same_bits(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]
) -> None:
    """Central, a federation of one, a replay, and a run cut after a checkpoint that goes on from there."""
    settings = quick(**overrides)
    whole = central.train(settings, tmp_path / "whole", ignore)
    federated = federate(settings, tmp_path / "federated", clients=1)
    replayed, _ = replay_run(RunFolder(tmp_path / "whole"))
    loaded: list[int] = []
    load = Replica.load

    def noting(self: Replica, *arguments: Any, round_: int, head: bytes) -> None:
        loaded.append(round_)
        load(self, *arguments, round_=round_, head=head)

    def cut(row: Row) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Replica, "load", noting)
    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "cut", cut)
    assert loaded == []
    resumed = central.resume(tmp_path / "cut", ignore)
    assert loaded == [4], "the run must go on from its checkpoint, with what that keeps of the optimizer and the spread"
    assert whole["digest"] == federated["digest"] == replayed.digest() == resumed["digest"]
    assert whole["digest"] != replayed.genesis["weights"], "training must have moved the weights"
    assert whole["replay_digest"] == resumed["replay_digest"] == whole["digest"]
    assert federated["client_digests"] == {"0": whole["digest"]}
    expected = records_of(tmp_path / "whole")
    assert len(expected) == 6
    assert records_of(tmp_path / "federated") == records_of(tmp_path / "cut") == expected
    assert whole["forward_passes"] == federated["forward_passes"] == resumed["forward_passes"]
    assert whole["eval_loss_end"] == federated["eval_loss_end"] == resumed["eval_loss_end"]


def test_the_saved_model_holds_the_trained_weights(quick: Quick, tmp_path: Path) -> None:
    summary = central.train(quick(), tmp_path / "run", ignore)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert weights_digest(loaded) == summary["digest"]


@pytest.mark.slow
def test_a_saved_model_trains_on_and_replays(quick: Quick, tmp_path: Path) -> None:
    central.train(quick(), tmp_path / "first", ignore)
    second = quick(model=str(tmp_path / "first" / "model"))
    summary = central.train(second, tmp_path / "second", ignore)
    assert summary["replay_digest"] == summary["digest"]


@pytest.mark.slow
def test_a_way_is_another_way_in_its_genesis_or_in_its_records(quick: Quick, tmp_path: Path) -> None:
    """No setting is ignored: each run ends with weights of its own."""
    digests = {name: central.train(quick(**way), tmp_path / name, ignore)["digest"] for name, way in WAYS.items()}
    assert len(set(digests.values())) == len(WAYS)


def test_a_normalised_run_writes_the_spread_into_its_divisors(quick: Quick, tmp_path: Path) -> None:
    central.train(quick(normalize_slopes=True, finite_difference="one-sided"), tmp_path / "run", ignore)
    spread, divisors = Spread(), []
    for record in seeded_of(tmp_path / "run"):
        spread = spread.after(record.coefficients, record.exponent)
        assert record.divisor == 2 * spread.value
        divisors.append(record.divisor)
    assert len(set(divisors)) == 6


@pytest.mark.first(1)
@pytest.mark.parametrize("way", ["defaults", "all", "all dense"])
def test_two_clients_of_a_changed_run_end_with_the_servers_weights(quick: Quick, tmp_path: Path, way: str) -> None:
    summary = federate(quick(**WAYS[way]), tmp_path / "run", clients=2)
    assert summary["client_digests"] == {"0": summary["digest"], "1": summary["digest"]}
    assert summary["replay_digest"] == summary["digest"]


@pytest.mark.first(2)
@pytest.mark.bits
@pytest.mark.parametrize("mode", ["zo", "fo"])
@pytest.mark.parametrize("stop_at", [1, 4, 5])
@pytest.mark.parametrize("before_apply", [True, False])
def test_a_resumed_run_equals_an_uninterrupted_one(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, stop_at: int, before_apply: bool
) -> None:
    settings = quick(mode=mode, optimizer="adamw", learning_rate=1e-3)
    whole = central.train(settings, tmp_path / "whole", ignore)
    apply = Replica.apply

    def cut(self: Replica, entry: journal.Entry, update: Any = None) -> float:
        if entry.record.round == stop_at and before_apply:
            raise KeyboardInterrupt
        return apply(self, entry, update)

    def cut_after(row: Row) -> None:
        if row["step"] == stop_at and not before_apply:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Replica, "apply", cut)
        with pytest.raises(KeyboardInterrupt):
            central.train(settings, tmp_path / "cut", cut_after)
    resumed = central.resume(tmp_path / "cut", ignore)
    assert resumed["digest"] == whole["digest"]
    assert records_of(tmp_path / "cut") == records_of(tmp_path / "whole")
    for name in ("forward_passes", "backward_passes", "eval_loss_start", "eval_loss_end"):
        assert resumed[name] == whole[name]
    steps = [row["step"] for row in read_table(tmp_path / "cut" / "metrics.csv")]
    assert steps == [str(step) for step in range(7)]


def test_resuming_a_finished_run_changes_nothing(quick: Quick, tmp_path: Path) -> None:
    first = central.train(quick(), tmp_path / "run", ignore)
    before = (tmp_path / "run" / "journal.zofed").read_bytes()
    assert central.resume(tmp_path / "run", ignore)["digest"] == first["digest"]
    assert (tmp_path / "run" / "journal.zofed").read_bytes() == before


def test_a_federation_of_one_is_central_training(quick: Quick, tmp_path: Path) -> None:
    alone = central.train(quick(), tmp_path / "alone", ignore)
    federated = federate(quick(), tmp_path / "federated", clients=1)
    assert federated["digest"] == alone["digest"]
    assert records_of(tmp_path / "federated") == records_of(tmp_path / "alone")
    assert federated["eval_loss_end"] == alone["eval_loss_end"]


def test_two_clients_three_rounds_end_with_the_servers_weights(quick: Quick, tmp_path: Path) -> None:
    summary = federate(quick(rounds=3), tmp_path / "run", clients=2)
    assert summary["client_digests"] == {"0": summary["digest"], "1": summary["digest"]}
    assert summary["replay_digest"] == summary["digest"]
    rounds = read_table(tmp_path / "run" / "rounds.csv")
    assert [row["replies_used"] for row in rounds] == ["2", "2", "2"]
    replies = read_table(tmp_path / "run" / "clients.csv")
    assert len(replies) == 6
    assert sum(int(row["bytes_up"]) for row in replies) == sum(int(row["bytes_up"]) for row in rounds)
    assert summary["bytes_up_per_client_round"] * 6 == sum(int(row["bytes_up"]) for row in replies)
    assert seeded_of(tmp_path / "run")[0].clients == (0, 1)


def test_clients_hold_disjoint_documents(quick: Quick) -> None:
    from zofed.data import encoding
    from zofed.training.task import Task

    task = Task.load(quick())
    shards = [{document.text for document in encoding.shard(task.train, index, 4, 0)} for index in range(4)]
    held_out = {document.text for document in task.held_out}
    assert sum(map(len, shards)) == len(set.union(*shards)) == len(task.train)
    assert not held_out & set.union(*shards)


def test_a_replica_that_lost_its_state_catches_up_to_the_same_weights(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = federate(quick(), tmp_path / "whole", clients=2)
    measure = client.measurements.slopes

    def forgetful(settings: Settings, replica: Replica, examples: Any, index: int, *rest: Any) -> Any:
        measured = measure(settings, replica, examples, index, *rest)
        if index == 1 and replica.round == 2:
            client.forget()  # as if the next message met a new process
        return measured

    monkeypatch.setattr(client.measurements, "slopes", forgetful)
    disturbed = federate(quick(), tmp_path / "disturbed", clients=2)
    assert disturbed["digest"] == whole["digest"]
    assert "behind" in [row["result"] for row in read_table(tmp_path / "disturbed" / "clients.csv")]


def test_a_replica_whose_weights_went_wrong_is_found_in_that_round_and_healed(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = federate(quick(), tmp_path / "whole", clients=2)
    replay = Replica.replay

    def faulty(self: Replica, entries: Iterable[journal.Entry], *arguments: Any) -> None:
        replay(self, entries, *arguments)
        if self.round == 2 and self in clients and not done:
            done.append(True)
            with torch.no_grad():
                next(iter(self.parameters.values())).mul_(1.001)

    done: list[bool] = []
    clients: list[Replica] = []
    monkeypatch.setattr(Replica, "replay", faulty)
    measure = client.measurements.slopes

    def noting(settings: Settings, replica: Replica, *rest: Any) -> Any:
        clients.append(replica)
        return measure(settings, replica, *rest)

    monkeypatch.setattr(client.measurements, "slopes", noting)
    disturbed = federate(quick(), tmp_path / "disturbed", clients=2)
    assert done
    results = [(row["round"], row["result"]) for row in read_table(tmp_path / "disturbed" / "clients.csv")]
    assert ("3", "desync") in results
    assert disturbed["digest"] == whole["digest"]


def test_a_client_that_keeps_failing_ends_the_run_with_its_name(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(client.measurements, "slopes", broken)
    with pytest.raises(UserError, match=r"round 1: clients \[0, 1\] gave no usable reply in 3 attempts"):
        federate(quick(), tmp_path / "run", clients=2)
    assert RunFolder(tmp_path / "run").summary()["status"] == "failed"


def test_a_client_whose_loss_never_is_finite_means_that_training_diverged(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = client.measurements.slopes

    def infinite(settings: Settings, replica: Replica, examples: Any, index: int, *rest: Any) -> Any:
        if index == 1 and replica.round >= first - 1:
            raise ValueError("not finite")
        return measure(settings, replica, examples, index, *rest)

    monkeypatch.setattr(client.measurements, "slopes", infinite)
    first = 2
    told = (
        r"step 2 .* with learning-rate = .* and local-learning-rate = 0.5; start .* clients \[1\]: see clients.csv in"
    )
    with pytest.raises(DivergenceError, match=told):
        federate(quick(local_learning_rate=0.5), tmp_path / "run", clients=2)
    assert RunFolder(tmp_path / "run").summary()["status"] == "diverged"
    first = 1  # before anything moved
    with pytest.raises(UserError, match=r"round 1: clients \[1\] gave no usable reply"):
        federate(quick(), tmp_path / "other", clients=2)
    assert RunFolder(tmp_path / "other").summary()["status"] == "failed"


def test_with_a_quorum_a_failing_client_is_left_out_and_its_absence_is_recorded(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = client.measurements.slopes

    def failing(settings: Settings, replica: Replica, examples: Any, index: int, *rest: Any) -> Any:
        if index == 1 and replica.round == 1:
            raise RuntimeError("out of memory")
        return measure(settings, replica, examples, index, *rest)

    monkeypatch.setattr(client.measurements, "slopes", failing)
    summary = federate(quick(quorum=1, rounds=3), tmp_path / "run", clients=2)
    clients = [record.clients for record in seeded_of(tmp_path / "run")]
    assert clients == [(0, 1), (0,), (0, 1)]
    assert summary["client_digests"] == {"0": summary["digest"], "1": summary["digest"]}


@pytest.mark.slow
def test_random_slopes_of_the_same_size_do_not_learn(quick: Quick, tmp_path: Path) -> None:
    settings = quick(controls=True, steps=8, queries=64, learning_rate=0.03, batch_size=8, eval_examples=32)
    summary = central.train(settings, tmp_path / "run", ignore)
    assert summary["controls"]["frozen"] == summary["eval_loss_start"]
    assert summary["eval_loss_end"] < summary["eval_loss_start"] - 0.1
    assert summary["controls"]["random_slopes"] > summary["eval_loss_start"] - 0.02


def test_the_loop_of_every_way_to_run_is_one(quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever measures, records enter a journal at one place outside the core."""
    append_all = Journal.append_all
    callers: list[CodeType] = []

    def noting(self: Journal, some: Sequence[Record]) -> list[journal.Entry]:
        frame: FrameType | None = sys._getframe(1)
        while frame and frame.f_globals["__name__"].startswith("zofed.core."):
            frame = frame.f_back
        assert frame
        callers.append(frame.f_code)
        return append_all(self, some)

    monkeypatch.setattr(Journal, "append_all", noting)
    central.train(quick(steps=2), tmp_path / "central", ignore)
    federate(quick(rounds=2), tmp_path / "federated", clients=2)
    central.train(quick(mode="fo", steps=2), tmp_path / "backprop", ignore)
    assert len(callers) == 6 and len(set(callers)) == 1


def test_the_weights_move_along_the_directions_that_were_measured(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = Measure.slopes

    def noting(self: Replica, loss: Any, seeds: list[int], *arguments: Any) -> Any:
        asked.extend(seeds)
        return ask(self, loss, seeds, *arguments)

    monkeypatch.setattr(Measure, "slopes", noting)
    federate(quick(rounds=3), tmp_path / "run", clients=2)
    contents = journal.read(RunFolder(tmp_path / "run").journal)
    moved = [record.seeds(contents.genesis["seed"]) for record in seeded_of(tmp_path / "run")]
    assert asked == [seed for seeds in moved for seed in seeds]
    assert len(set(asked)) == len(asked) == 3 * 2 * 3
