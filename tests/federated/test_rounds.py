"""Whole federations in one process: every way of training, who is asked, who comes late, what is healed."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from federations import (
    BACKPROP,
    SUBSPACE,
    Meddling,
    Quick,
    Start,
    assert_one_model,
    ignore,
    records_of,
    results,
    run,
    seeded_of,
)
from flwr.app import Context, Message, RecordDict

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import directions, journal
from zofed.core.records import Skipped
from zofed.core.replica import PROBE_POSITIONS, Replica
from zofed.federated import client, membership, messages, server
from zofed.federated.local_grid import LocalGrid
from zofed.federated.membership import Member, Members
from zofed.federated.protocol import Plan
from zofed.federated.wire import Introduction
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table
from zofed.training import central, paths

pytestmark = pytest.mark.usefixtures("no_waiting")


# --- a node's own data ---


@pytest.mark.first(1)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_node_whose_own_data_lack_a_class_takes_part(
    quick: Quick, start: Start, tmp_path: Path, frozen: bool
) -> None:
    """How many classes there are, the server says; a node that forgot it is told again."""
    texts = ("a fine film", "not worth the time", "it may be seen", "a long and quiet story")
    rows = [{"text": f"{texts[n % 4]}, number {n}", "label": n % 3} for n in range(40)]
    for name, some in (("all", rows), ("own", [row for row in rows if row["label"] < 2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    way = {"task": "classification", "dataset": str(tmp_path / "all.jsonl"), "freeze_encoder": frozen}
    grid, settings = start(quick(**way, rounds=3))
    grid.context(1).node_config["dataset"] = str(tmp_path / "own.jsonl")
    assert_one_model(run((grid, settings)), [0, 1])
    assert {plan.classes for plan in grid.plans} == {3}


# --- ways of training ---

MIXED = ("fo", "zo", "fo")
WAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "zo": ({}, ()),
    "zo shared": ({"direction_seeds": "shared", "local_steps": 2}, ()),
    "zo shared trimmed": ({"direction_seeds": "shared", "aggregation": "trimmed"}, ()),
    "zo shared median": ({"direction_seeds": "shared", "aggregation": "median", "steps_per_message": 4}, ()),
    "zo local steps": ({"local_steps": 3, "momentum": 0.5}, ()),
    "zo by examples": ({"weighting": "examples", "max_examples": 5}, ()),
    "zo adamw": ({"optimizer": "adamw", "learning_rate": 1e-3}, ()),
    "fo": ({"mode": "fo", "learning_rate": 0.1}, ()),
    "fo mixed": ({"mode": "fo", "optimizer": "adamw", "learning_rate": 1e-3}, MIXED),
    "fo local steps": ({"mode": "fo", "learning_rate": 0.1, "local_steps": 3, "proximal": 0.1}, ()),
    "fo local adamw": ({"mode": "fo", "local_optimizer": "adamw", "local_steps": 2, "adapter": "lora"}, ()),
    "calibrate": ({"mode": "calibrate", **BACKPROP, "optimizer": "mudamw"}, ()),
    "calibrate mixed": ({"mode": "calibrate", **BACKPROP}, MIXED),
    "instruct": ({"mode": "instruct", **BACKPROP}, ()),
    "instruct mixed": ({"mode": "instruct", **BACKPROP, "gradient_rank": 0}, MIXED),
    "core": (SUBSPACE, ()),
    "core mixed": (SUBSPACE, MIXED),
    "diagonal": (SUBSPACE | {"subspace_variant": "diagonal", "subspace_size": 6}, ()),
}


@pytest.mark.first(2)
@pytest.mark.parametrize(("way", "modes"), WAYS.values(), ids=WAYS)
def test_every_way_of_training_ends_with_one_model(
    quick: Quick, start: Start, way: dict[str, Any], modes: tuple[str, ...]
) -> None:
    grid, settings = start(quick(**{"rounds": 4} | way), 3)
    for index, mode in enumerate(modes):
        grid.context(index).node_config["mode"] = mode
    summary = run((grid, settings))
    takes_part = [0, 2] if way.get("mode") == "fo" and modes else [0, 1, 2]
    assert_one_model(summary, takes_part)
    folder = RunFolder(Path(settings.out))
    assert [entry.record.round for entry in journal.read(folder.journal).entries] == [1, 2, 3, 4]
    assert summary["digest"] != journal.read(folder.journal).genesis["weights"]
    assert {result for _, _, result in results(settings)} == {"used"}
    assert summary["replies"].keys() == {str(index) for index in takes_part}


@pytest.mark.parametrize("mode", ["instruct", "calibrate"])
def test_the_server_makes_the_guide_from_public_data(quick: Quick, start: Start, corpus: Path, mode: str) -> None:
    way = {"mode": mode, **BACKPROP, "gradient_source": "server", "bp_dataset": str(corpus), "rounds": 4}
    grid, settings = start(quick(**way), 2)
    for index in range(2):
        grid.context(index).node_config["mode"] = "zo"
    assert_one_model(run((grid, settings)), [0, 1])
    assert {plan.task for plan in grid.plans} <= {"slopes", "guided", "none", "end"}, "none is asked to backpropagate"


@pytest.mark.parametrize("mode", ["fo", "instruct", "calibrate"])
def test_clients_that_cannot_backpropagate_are_named(quick: Quick, start: Start, mode: str) -> None:
    grid, settings = start(quick(mode=mode), 2)
    for index in range(2):
        grid.context(index).node_config["mode"] = "zo"
    with pytest.raises(UserError, match=f"mode = '{mode}' needs a client that can backpropagate, and all 2"):
        run((grid, settings))
    grid, settings = start(quick(mode=mode), 2)
    grid.context(0).node_config["mode"] = "both"
    with pytest.raises(UserError, match="use fo or zo"):
        run((grid, settings))


ALONE: dict[str, dict[str, Any]] = {
    "zo": {},
    "local steps": {"local_steps": 3},
    "local steps shared": {"local_steps": 3, "direction_seeds": "shared", "local_learning_rate": 0.003},
    "subspace": SUBSPACE,
    "diagonal": SUBSPACE | {"subspace_variant": "diagonal"},
}


@pytest.mark.first(1)
@pytest.mark.parametrize("way", ALONE.values(), ids=ALONE)
def test_a_federation_of_one_is_central_training_record_for_record(
    quick: Quick, start: Start, tmp_path: Path, way: dict[str, Any]
) -> None:
    alone = central.train(quick(**way), tmp_path / "alone", ignore)
    summary = run(start(quick(**way), 1))
    assert records_of(tmp_path / "run") == records_of(tmp_path / "alone")
    assert summary["digest"] == alone["digest"]


# --- steps, seeds, messages ---


@pytest.mark.first(1)
@pytest.mark.parametrize("way", [{"local_steps": 3}, {"steps_per_message": 3}, {"mode": "fo", "local_steps": 3}])
def test_a_client_comes_back_from_its_own_steps_bit_for_bit(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    moved, digests = [], []

    def watched(name: str) -> None:
        work = getattr(client.measurements, name)

        def noting(settings: Settings, replica: Replica, *arguments: Any, **named: Any) -> Any:
            before, weight = replica.digest(), next(iter(replica.parameters.values()))
            version = weight._version
            found = work(settings, replica, *arguments, **named)
            moved.append(weight._version > version)
            digests.append((before, replica.digest()))
            return found

        monkeypatch.setattr(client.measurements, name, noting)

    watched("update" if way.get("mode") == "fo" else "slopes")
    run(start(quick(rounds=3, **way)))
    assert moved and all(moved)
    assert all(before == after for before, after in digests)


@pytest.mark.first(1)
@pytest.mark.parametrize("seeds", ["distinct", "shared"])
def test_clients_measure_their_own_directions_or_the_same(
    quick: Quick, start: Start, tmp_path: Path, seeds: str
) -> None:
    run(start(quick(direction_seeds=seeds, rounds=2, aggregation="mean")))
    for record in seeded_of(tmp_path / "run"):
        assert record.clients == ((0, 1) if seeds == "distinct" else (0,))
        assert len(set(record.seeds(0))) == len(record.coefficients) == (4 if seeds == "distinct" else 2)


def test_several_rounds_of_one_message_are_consecutive_records(quick: Quick, start: Start, tmp_path: Path) -> None:
    grid, settings = start(quick(steps_per_message=4))
    summary = run((grid, settings))
    assert_one_model(summary, [0, 1])
    assert summary["replay_digest"] == summary["digest"]
    assert [record.round for record in seeded_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert {(plan.round, plan.steps) for plan in grid.plans if plan.task == "slopes"} == {(1, 4), (5, 2)}
    rounds = read_table(tmp_path / "run" / "rounds.csv")
    assert [int(row["round"]) for row in rounds] == [1, 2, 3, 4, 5, 6]
    assert [row["bytes_up"] != "0" for row in rounds] == [True, False, False, False, True, False]


def test_one_round_a_message_and_the_first_of_several_are_the_same_record(
    quick: Quick, start: Start, tmp_path: Path
) -> None:
    run(start(quick(rounds=2), name="one"))
    run(start(quick(rounds=2, steps_per_message=2), name="several"))
    (one, _), (several, _) = seeded_of(tmp_path / "one"), seeded_of(tmp_path / "several")
    scale = 2.0 ** (several.exponent - one.exponent)
    assert [value * scale for value in several.coefficients] == pytest.approx(one.coefficients, abs=scale)


# --- who is asked ---


def members_of(settings: Settings, count: int) -> Members:
    found = Members(LocalGrid(client.app, 0, {}), settings, None)  # type: ignore[arg-type]
    found._present = set(range(count))
    found.found = {c: Member(c, Introduction(c, count, 1, "fo", b"", "", "", "")) for c in range(count)}
    return found


@pytest.mark.parametrize(("participation", "asked"), [(0.3, 3), (1.0, 10), (4.0, 4), (0.01, 1), (99.0, 10)])
def test_a_sample_is_a_function_of_seed_and_round(quick: Quick, participation: float, asked: int) -> None:
    settings = quick(participation=participation, seed=3)
    rounds = [members_of(settings, 10).sampled(round_) for round_ in range(1, 80)]
    again = members_of(settings, 10)
    assert [again.sampled(round_) for round_ in reversed(range(1, 80))] == rounds[::-1]
    assert all(len(set(clients)) == asked and clients == sorted(clients) for clients in rounds)
    assert {one for clients in rounds for one in clients} == set(range(10))
    if asked < 10:
        other = members_of(settings.model_copy(update={"seed": 4}), 10)
        assert [other.sampled(round_) for round_ in range(1, 80)] != rounds


def test_only_the_sampled_clients_are_asked_and_all_end_alike(quick: Quick, start: Start, tmp_path: Path) -> None:
    grid, settings = start(quick(participation=0.5, rounds=5), 4)
    assert_one_model(run((grid, settings)), range(4))
    expected = [tuple(members_of(settings, 4).sampled(round_)) for round_ in range(1, 6)]
    assert [record.clients for record in seeded_of(tmp_path / "run")] == expected
    assert len(set(expected)) > 1


def test_one_client_alone_is_asked_where_that_is_wanted(quick: Quick, start: Start, tmp_path: Path) -> None:
    grid, settings = start(quick(only_client=2, rounds=3), 4)
    assert_one_model(run((grid, settings)), range(4))
    assert [record.clients for record in seeded_of(tmp_path / "run")] == [(2,)] * 3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"only_client": 4}, "only-client = 4: the clients here are 0, 1, 2, 3; name one"),
        ({"only_client": 1, "quorum": 2}, "quorum = 2: only-client asks one client a round; leave one out"),
    ],
)
def test_a_client_alone_must_be_there_and_be_enough(
    quick: Quick, start: Start, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        run(start(quick(**wrong), 4))


def fail(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_a_round_short_of_its_quorum_is_skipped_and_the_run_goes_on(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(quorum=2), 3)
    grid.before = lambda index, plan: fail() if plan.round in (2, 5) and plan.task == "slopes" and index else None
    assert_one_model(run((grid, settings)), range(3))
    found = [entry.record for entry in journal.read(RunFolder(Path(settings.out)).journal).entries]
    assert [record.round for record in found if isinstance(record, Skipped)] == [2, 5]
    assert results(settings).count((2, 1, "error")) == 3, "asked again before it is given up"
    rows = read_table(Path(settings.out) / "metrics.csv")
    assert [row["loss"] == "" for row in rows] == [True, False, True, False, False, True, False]


@pytest.mark.slow
def test_a_client_that_fails_five_rounds_in_a_row_is_paused_for_twenty(
    quick: Quick, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, settings = start(quick(quorum=1, rounds=28, eval_interval=28, queries=1))
    grid.before = lambda index, plan: fail() if index == 1 and plan.round in (1, 3, 4, 5, 6, 7) else None
    assert_one_model(run((grid, settings)), [0, 1])
    asked = [(round_, result) for round_, one, result in results(settings) if one == 1]
    assert asked == [(1, "error"), (2, "used"), *((r, "error") for r in range(3, 8)), (28, "behind"), (28, "used")] or (
        asked == [(1, "error"), (2, "used"), *((r, "error") for r in range(3, 8)), (28, "used")]
    )
    assert "client 1 failed 5 rounds in a row" in capsys.readouterr().out


def test_where_all_are_needed_nobody_is_paused(quick: Quick) -> None:
    found = members_of(quick(), 2)
    for round_ in range(1, 20):
        found.note(1, round_, is_well=False)
        assert found.sampled(round_ + 1) == [0, 1]


# --- who comes late, who forgets ---

LATE: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.5},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
    "mudamw": {"optimizer": "mudamw", "learning_rate": 1e-3, "normalize_slopes": True},
    "calibrate": {"mode": "calibrate", **BACKPROP, "optimizer": "adamw", "learning_rate": 1e-3},
    "instruct": {"mode": "instruct", **BACKPROP},
    "fo": {"mode": "fo", "optimizer": "adamw", "learning_rate": 1e-3},
    "subspace": SUBSPACE,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", LATE.values(), ids=LATE)
def test_a_client_that_forgot_everything_in_any_round_changes_nothing(
    quick: Quick, start: Start, way: dict[str, Any]
) -> None:
    """What it forgot comes by replay, with the updates or a snapshot where records do not tell them."""
    whole = run(start(quick(**way), name="whole"))
    grid, settings = start(quick(**way))
    forgotten: set[tuple[int, str]] = set()

    def forget(index: int, plan: Plan) -> None:
        if index == 1 and (plan.round, plan.task) not in forgotten:
            forgotten.add((plan.round, plan.task))
            client.forget()

    grid.before = forget
    summary = run((grid, settings))
    assert_one_model(summary, [0, 1])
    assert summary["digest"] == whole["digest"]
    assert "behind" in {result for _, _, result in results(settings)}


@pytest.mark.first(1)
@pytest.mark.parametrize("late", [2, 4, 6])
@pytest.mark.parametrize("way", ["adamw", "calibrate"])
def test_a_node_that_comes_in_any_round_is_taken_in(
    quick: Quick, start: Start, capsys: pytest.CaptureFixture[str], way: str, late: int
) -> None:
    grid, settings = start(quick(quorum=1, **LATE[way]), 3, clients=0)
    away = grid.keep([0, 1])

    def come(index: int, plan: Plan) -> None:
        if plan.round == late - 1:
            grid.bring(away)

    grid.before = come
    assert_one_model(run((grid, settings)), range(3))
    first = min(round_ for round_, one, _ in results(settings) if one == 2)
    assert first == late
    assert "client 2 joined" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fast_link_brings_a_snapshot_and_a_slow_one_the_records(quick: Quick, start: Start) -> None:
    digests = set()
    for name, link in (("fast", 1e9), ("slow", 1e-6)):
        grid, settings = start(quick(optimizer="adamw", learning_rate=1e-3, link_megabits=link), name=name)
        forgotten = []

        def forget(index: int, plan: Plan, forgotten: list[int] = forgotten) -> None:
            if plan.round == 5 and not forgotten:
                forgotten.append(index)
                client.forget()

        grid.before = forget
        summary = run((grid, settings))
        assert_one_model(summary, [0, 1])
        digests.add(summary["digest"])
        assert any(plan.snapshot for plan in grid.plans) == (name == "fast")
        carried = [int(row["bytes_updates"]) for row in read_table(Path(settings.out) / "rounds.csv")]
        assert [bool(count) for count in carried] == [False] * 4 + [name == "fast", False]
    assert len(digests) == 1


@pytest.mark.first(1)
@pytest.mark.parametrize("part", ["snapshot", "updates"])
def test_a_snapshot_or_an_update_that_cannot_be_used_leaves_the_client_behind(
    quick: Quick, start: Start, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    """It says so and is sent it again; nothing raises."""
    way = {"optimizer": "adamw", "learning_rate": 1e-3, "link_megabits": 1e9} if part == "snapshot" else {"mode": "fo"}
    whole = run(start(quick(**way), name="whole"))
    grid, settings = start(quick(**way))
    forward, spoilt = grid._forward, []

    def spoil(message: Message, context: Context) -> Message:
        if message.metadata.message_type.startswith("train"):
            plan = messages.unpack(Plan, message.content)
            if plan.round == 5 and not spoilt and part == "snapshot":
                client.forget()
            if plan.round >= 5 and not spoilt and getattr(plan, part):
                spoilt.append(plan.client)
                message.content = messages.pack(replace(plan, **{part: getattr(plan, part)[:-1]}))
        return forward(message, context)

    grid._forward = spoil  # type: ignore[assignment]
    summary = run((grid, settings))
    assert_one_model(summary, [0, 1])
    assert summary["digest"] == whole["digest"]
    assert spoilt
    assert "round 5 cannot be reached" in capsys.readouterr().err
    assert "error" not in {result for _, _, result in results(settings)}


# --- what is found and healed ---


def replica_of(grid: Meddling) -> Replica:
    return client.session(grid.context(0)).replica


def flip(replica: Replica, round_: int, *, seen: bool) -> None:
    """Flip the lowest bit of one weight, at a place that the probe of a round sees or one that it does not."""
    stands, replica.round = replica.round, round_
    before = replica.probe()
    weight = max(replica.parameters.values(), key=torch.Tensor.numel)
    bits = weight.detach().view(-1).view(torch.int32)
    for place in range(bits.numel()):
        bits[place] ^= 1
        if (replica.probe() != before) == seen:
            replica.round = stands
            return
        bits[place] ^= 1
    raise AssertionError("no such place")


def flipping(grid: Meddling, round_: int, *, seen: bool) -> list[int]:
    done: list[int] = []

    def before(index: int, plan: Plan) -> None:
        if plan.round == round_ and not done:
            done.append(index)
            flip(replica_of(grid), round_ - 1, seen=seen)

    grid.before = before
    return done


@pytest.mark.slow
def test_a_flipped_bit_that_the_probe_sees_is_healed_in_its_round(quick: Quick, start: Start) -> None:
    whole = run(start(quick(), name="whole"))
    grid, settings = start(quick())
    done = flipping(grid, 3, seen=True)
    summary = run((grid, settings))
    assert done
    assert_one_model(summary, [0, 1])
    assert summary["digest"] == whole["digest"]
    assert {result for round_, _, result in results(settings) if round_ == 3} > {"used"}


@pytest.mark.first(1)
@pytest.mark.parametrize("interval", [0, 4])
def test_a_flipped_bit_that_the_probe_misses_is_healed_at_the_next_digest(
    quick: Quick, start: Start, interval: int, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, settings = start(quick(weight_check_interval=interval))
    done = flipping(grid, 3, seen=False)
    assert_one_model(run((grid, settings)), [0, 1])
    assert done
    told = capsys.readouterr().out
    assert "its weights are not the run's" in told
    assert (told.index("its weights are not the run's") < told.index("round 5/6")) == (interval == 4)
    if interval:
        assert next(plan.rebuild for plan in grid.plans if plan.round == 5 and plan.task == "slopes") == 1


def unseen_place(replica: Replica, weight: torch.Tensor, round_: int) -> int:
    """An entry of a weight that the probe of a round does not read."""
    name = next(name for name, parameter in replica.parameters.items() if parameter is weight)
    seed = directions.derive_seed("zofed-probe", replica.genesis["seed"], round_)
    read = set(directions.positions(seed, name, weight.numel(), PROBE_POSITIONS).tolist())
    return next(place for place in range(weight.numel()) if place not in read)


@pytest.mark.slow
def test_a_client_whose_weights_are_not_finite_starts_anew(quick: Quick, start: Start) -> None:
    """Where the probe does not look, its losses tell."""
    whole = run(start(quick(), name="whole"))
    grid, settings = start(quick())
    done: list[int] = []

    def before(index: int, plan: Plan) -> None:
        if plan.round == 3 and not done:
            done.append(index)
            replica = replica_of(grid)
            weight = max(replica.parameters.values(), key=torch.Tensor.numel)
            weight.detach().view(-1)[unseen_place(replica, weight, 2)] = math.nan

    grid.before = before
    summary = run((grid, settings))
    assert done
    assert_one_model(summary, [0, 1])
    assert summary["digest"] == whole["digest"]
    assert {"not_finite", "used"} <= {result for round_, _, result in results(settings) if round_ == 3}
    assert sum(plan.rebuild for plan in grid.plans) == 2, "each client once, of one process"


# --- who is not taken in ---


def test_two_nodes_of_one_index_are_named(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(), 3)
    grid.context(2).node_config["partition-id"] = 1
    with pytest.raises(UserError, match="two nodes say they are client 1: give each its own partition-id"):
        run((grid, settings))


def test_another_number_of_partitions_is_named(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(), 3)
    grid.context(2).node_config["num-partitions"] = 4
    with pytest.raises(UserError, match="client 2 says num-partitions = 4, others 3"):
        run((grid, settings))


def test_a_node_without_its_place_is_named(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(), 2)
    grid._forward, context = client.app, grid.context(1)
    grid._app = client.app
    del context.node_config["partition-id"]
    with pytest.raises(UserError, match="a node: this node has no 'partition-id': start it with"):
        run((grid, settings))


def test_a_node_of_another_run_is_named_or_left_out(
    quick: Quick, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, settings = start(quick(), 3)
    grid.context(1).run_config = {**grid.context(1).run_config, "learning-rate": 0.5, "momentum": 0.25}
    with pytest.raises(UserError, match=r"client 1: it has another .*optimizer.* than the server: give both"):
        run((grid, settings))
    grid, settings = start(quick(quorum=1), 3, name="left out")
    grid.context(1).run_config = {**grid.context(1).run_config, "momentum": 0.25}
    assert_one_model(run((grid, settings)), [0, 2])
    assert "goes on without a node: client 1: it has another" in capsys.readouterr().err


@pytest.mark.parametrize("content", [RecordDict(), messages.pack(Introduction(1, 2, 3, "fo", b"", "", "", ""))])
def test_a_node_that_is_too_old_is_named(quick: Quick, start: Start, content: RecordDict) -> None:
    grid, settings = start(quick())
    raw = messages.pack(Introduction(1, 2, 3, "fo", b"", "", "", ""))
    if content:
        record = content[messages.KEY]
        record[messages.KEY] = bytes(record[messages.KEY])[:-1]  # type: ignore[index, arg-type]
    assert content != raw

    def alter(index: int, message: Message, reply: Message) -> Message:
        if index == 1 and message.metadata.message_type == "query.status":
            return Message(content=content, reply_to=message)
        return reply

    grid.alter = alter
    with pytest.raises(UserError, match=r"node 1002 runs another zofed .*: give all machines the same"):
        run((grid, settings))


def silent_until(grid: Meddling, time: Callable[[], bool]) -> list[bool]:
    """Client 1 fails to say who it is until then; returns what came of each greeting."""
    asked: list[bool] = []

    def alter(index: int, message: Message, reply: Message) -> Message:
        if index == 1 and message.metadata.message_type == "query.status":
            asked.append(time())
            if not asked[-1]:
                raise RuntimeError("its model is still being fetched")
        return reply

    grid.alter = alter
    return asked


@pytest.mark.first(1)
@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_node_that_failed_to_say_who_it_is_is_asked_again_later(
    quick: Quick, start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """At later looks, but not at each, and its failure is told once."""
    monkeypatch.setattr(membership, "AGAIN_SECONDS", seconds)
    grid, settings = start(quick(quorum=1))
    asked = silent_until(grid, lambda: grid.plans != [] and grid.plans[-1].round >= 4)
    assert_one_model(run((grid, settings)), [0, 1] if not seconds else [0])
    assert asked == ([False] * 5 + [True] if not seconds else [False])
    out, errors = capsys.readouterr()
    assert errors.count("node 1002 could not be asked who it is") == 1
    assert out.count("client 1 joined") == (not seconds)


def test_a_node_is_not_asked_again_where_all_that_were_wanted_are_there(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "AGAIN_SECONDS", 0.0)
    grid, settings = start(quick(quorum=1), 3, clients=2)
    asked = silent_until(grid, lambda: bool(grid.plans))
    assert_one_model(run((grid, settings)), [0, 2])
    assert asked == [False]


# --- what is told ---


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"mode": "fo"}, {"mode": "calibrate", **BACKPROP}])
def test_a_loss_that_is_withheld_is_told_nowhere(quick: Quick, start: Start, way: dict[str, Any]) -> None:
    """No reply holds it, and no table gives the zero in its place for a loss."""
    grid, settings = start(quick(losses_withheld=True, **way))
    summary = run((grid, settings))
    assert_one_model(summary, [0, 1])
    assert {row["loss"] for row in read_table(Path(settings.out) / "metrics.csv")} == {""}
    assert {row["loss"] for row in read_table(Path(settings.out) / "rounds.csv")} == {""}
    assert {row["loss"] for row in read_table(Path(settings.out) / "clients.csv")} == {""}
    open_ = run(start(quick(**way), name="open"))
    assert open_["digest"] == summary["digest"]


@pytest.mark.parametrize("way", [{}, {"mode": "fo", "adapter": "lora"}], ids=["integers", "arrays"])
def test_megabytes_by_flowertunes_rule_are_those_of_what_stands_for_arrays(
    quick: Quick, start: Start, way: dict[str, Any]
) -> None:
    """Of training messages alone, both ways, of the whole federation, in MB of 2^20 bytes."""
    grid, settings = start(quick(rounds=3, client_held_out_fraction=0.3, eval_interval=1, **way))
    summary = run((grid, settings))
    rows = read_table(Path(settings.out) / "clients.csv")
    counted = sum(int(row["payload_up"]) + int(row["payload_down"]) for row in rows)
    assert summary["flowertune_megabytes"] == counted / 2**20
    assert summary["flowertune_budget_share"] == pytest.approx(counted / 2**20 / 200_000)
    assert counted < summary["bytes"], "Flower's own are not counted"
    if way:  # 3 rounds up, and the merged updates of the first 2 down, to 2 clients
        arrays = 10 * 4 * summary["parameters"]["trainable"]
        assert arrays <= counted <= arrays + 10 * 1000


def test_clients_evaluate_on_their_own_held_out_part(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(client_held_out_fraction=0.3, eval_interval=3))
    summary = run((grid, settings))
    rows = read_table(Path(settings.out) / "client_evaluations.csv")
    assert [(row["round"], row["client"]) for row in rows] == [(r, c) for r in ("0", "3", "6") for c in ("0", "1")]
    assert all(math.isfinite(float(row["loss"])) and int(row["examples"]) > 0 for row in rows)
    assert_one_model(summary, [0, 1])


def test_clients_that_do_not_evaluate_leave_no_table_of_it(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(rounds=1))
    run((grid, settings))
    assert not (Path(settings.out) / "client_evaluations.csv").exists()


def test_an_update_that_is_too_large_names_the_setting(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(mode="fo", max_update_norm=1e-9))
    with pytest.raises(UserError, match=r"'too_large': 6.* raise max-update-norm = 1e-09, or set quorum below"):
        run((grid, settings))


def test_nodes_beyond_the_clients_asked_for_take_no_part(quick: Quick, start: Start) -> None:
    """Nor do they come in later: who takes part would hang on the clock."""
    grid, settings = start(quick(), 3, clients=2)
    assert_one_model(run((grid, settings)), [0, 1])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("dataset", "mine.csv"),
        ("dataset", "data/mine"),
        ("bp-dataset", "./x.jsonl"),
        ("eval-dataset", "x.txt"),
        ("model", "./model"),
        ("model", "a/b/c"),
        ("tokenizer", "../tokenizer"),
    ],
)
def test_flower_refuses_a_path_that_its_own_working_folder_would_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    """Even where a file of that name lies there: it is not the one that was meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("text\nanother file\n")
    context = SimpleNamespace(run_config={key: name, "mode": "instruct"}, run_id=1)
    with pytest.raises(UserError, match=rf"{key} = '{re.escape(name)}' is a relative path.* give the absolute path"):
        server.main(cast(Any, SimpleNamespace()), cast(Any, context))


def test_names_absolute_paths_and_the_hub_are_no_relative_paths(tmp_path: Path) -> None:
    for values in (
        {"dataset": "pydoc"},
        {"dataset": str(tmp_path / "a.csv")},
        {"model": "OWNER/NAME"},
        {"model": "20M"},
    ):
        paths.check_absolute(config.resolve(values))
    paths.check_absolute(config.resolve({"dataset": "~/a.csv", "tokenizer": "gpt2"}))
