"""Many clients that lie at once, by chance or beside other faults; `test_hostile_clients.py` has each lie by itself."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from federations import Meddling, Quick, Start, records_of, run
from flwr.app import Error, Message, RecordDict
from lies import ESCAPES, IMPLAUSIBLE, ON_WIRE, QUERIES, SLOPES, answer, raw

from zofed.base.errors import UserError
from zofed.base.texts import one_line
from zofed.core import journal
from zofed.federated import client, membership, messages, wire
from zofed.federated.local_grid import CLIENT_FAILED
from zofed.federated.protocol import Answer, Plan
from zofed.federated.wire import Evaluation, Final, Introduction
from zofed.runs import pictures
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table

pytestmark = pytest.mark.usefixtures("no_waiting")


class Hostile(Meddling):
    """Client 0 is honest; the others train nothing and forge. told: the reasons their replies deserve, by client."""

    def forge_by(self, forge: Callable[[Plan], tuple[str, Callable[[], RecordDict]]]) -> None:
        self.told: dict[int, Counter[str]] = {}
        honest = self._forward

        def forward(message: Message, context: Any) -> Message:
            index = int(context.node_config["partition-id"])
            if not index or not message.metadata.message_type.startswith("train"):
                return honest(message, context)
            plan = messages.unpack(Plan, message.content)
            reason, content = forge(plan)
            self.told.setdefault(index, Counter())[reason] += 1
            return Message(content=content(), reply_to=message)

        self._forward = forward  # type: ignore[assignment]


def hostile(start: Start, settings: Any, nodes: int, name: str = "run") -> tuple[Hostile, Any]:
    grid, settings = start(settings, nodes, name)
    return Hostile(settings, len(grid._contexts)), settings


def without_them(start: Start, settings: Any, nodes: int) -> tuple[str, list[bytes]]:
    """Digest and records of the same run where client 0 is alone."""
    grid, settings = start(settings, nodes, "alone", clients=1)
    grid.keep([0])
    return run((grid, settings))["digest"], records_of(Path(settings.out))


def assert_counted(grid: Hostile, settings: Any, summary: dict[str, Any]) -> None:
    """Every table and the summary hold the reasons that were deserved, to the number."""
    rows = read_table(Path(settings.out) / "clients.csv")
    for one, expected in grid.told.items():
        assert Counter(row["result"] for row in rows if row["client"] == str(one)) == expected
        assert summary["replies"][str(one)] == dict(expected)
    assert summary["replies"]["0"] == {"used": settings.rounds}
    rounds = read_table(Path(settings.out) / "rounds.csv")
    assert [row["replies_used"] for row in rounds] == ["1"] * settings.rounds
    assert sum(int(row["replies_rejected"]) for row in rounds) == sum(map(Counter.total, grid.told.values()))


@pytest.mark.slow
def test_a_thousand_forged_slopes_are_refused_each_for_its_reason(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(membership, "PATIENCE", 10**9)
    settings = quick(
        quorum=1,
        rounds=112,
        eval_interval=112,
        save_interval=0,
        link_megabits=1e-6,
        queries=QUERIES,
        aggregation="mean",
    )
    grid, settings = hostile(start, settings, 10)
    chance, names = random.Random(11), Counter[str]()

    def forge(plan: Plan) -> tuple[str, Callable[[], RecordDict]]:
        name = chance.choice([*SLOPES, *(["implausible"] * (plan.client == 1))])
        names[name] += 1
        reason, way = IMPLAUSIBLE if name == "implausible" else SLOPES[name]
        return reason, lambda: way(plan, chance)

    grid.forge_by(forge)
    summary = run((grid, settings))
    assert names.total() >= 1000
    assert min(names[name] for name in [*SLOPES, "implausible"]) > 0
    assert_counted(grid, settings, summary)
    assert "Traceback" not in capfd.readouterr().err
    assert (summary["digest"], records_of(Path(settings.out))) == without_them(start, settings, 10)
    assert set(summary["client_digests"].values()) == {summary["digest"]}


@pytest.mark.first(1)
@pytest.mark.parametrize("seeds", ["distinct", "shared"])
def test_a_claim_of_a_million_million_examples_counts_up_to_the_cap(quick: Quick, start: Start, seeds: str) -> None:
    settings = quick(quorum=1, weighting="examples", max_examples=10, direction_seeds=seeds, rounds=2)
    summaries = []
    for claim in (10, 10**12):
        grid, own = hostile(start, settings, 2, name=f"claims {claim}")
        grid.forge_by(lambda plan, claim=claim: ("used", lambda: answer(plan, examples=claim)))
        summaries.append(run((grid, own)))
    assert summaries[0]["digest"] == summaries[1]["digest"]


@pytest.mark.slow
def test_a_reply_of_an_earlier_round_or_attempt_is_told_by_its_place(quick: Quick, start: Start) -> None:
    """True replies, held back and sent when another is due."""
    grid, settings = start(quick(quorum=2), 2)
    held: list[RecordDict] = []
    due: list[tuple[int, int]] = []

    def alter(index: int, message: Message, reply: Message) -> Message:
        if index == 0 or not message.metadata.message_type.startswith("train"):
            return reply
        held.append(reply.content)
        plan = messages.unpack(Plan, message.content)
        due.append((plan.round, plan.attempt))
        if plan.round == 3 and plan.attempt == 0:
            return Message(content=held[-2], reply_to=message)
        if plan.round == 3 and plan.attempt == 1:
            return Message(content=held[-2], reply_to=message)
        return reply

    grid.alter = alter
    summary = run((grid, settings))
    assert due.count((3, 2)) == 1
    assert summary["replies"]["1"] == {"used": 6, "wrong_round": 1, "stale_attempt": 1}
    assert set(summary["client_digests"].values()) == {summary["digest"]}
    assert summary["digest"] == run(start(quick(quorum=2), 2, "whole"))["digest"], "asked again, it says the same"


# --- what a node says of itself, of its weights and of its failures ---


def saying(grid: Meddling, message_type: str, changes: Iterable[dict[str, Any]]) -> None:
    """Have the last nodes' replies of one type changed, each as one of `changes` says."""
    kinds = {"query.status": Introduction, "query.digest": Final, "evaluate.zofed": Evaluation}
    by_node = dict(zip(reversed(range(len(grid._contexts))), changes, strict=False))

    def alter(index: int, message: Message, reply: Message) -> Message:
        if index not in by_node or message.metadata.message_type != message_type:
            return reply
        told = replace(messages.unpack(kinds[message_type], reply.content), **by_node[index])
        return Message(content=messages.pack(told), reply_to=message)

    grid.alter = alter


def assert_printable(told: str) -> None:
    assert all(line.isprintable() for line in told.split("\n")), told
    assert "Traceback" not in told


@pytest.mark.parametrize("place", [(-1, 3), (2**32, 2**33), (3, 3), (1.5, 3), ("x\x1b", 3), (True, 3)], ids=str)
def test_a_node_whose_own_place_is_none_says_so(quick: Quick, start: Start, place: tuple[Any, Any]) -> None:
    grid, settings = start(quick(), 3)
    grid._app = client.app
    context = grid.context(1)
    context.node_config["partition-id"], context.node_config["num-partitions"] = place
    with pytest.raises(UserError, match=r"a node: partition-id = .* of num-partitions = .*: give each of N nodes"):
        run((grid, settings))


COUNTS = [
    "[" * 100_000,
    '{"a": 1' + "0" * 400 + "}",
    json.dumps({f"label {'9' * 5000}": 3, "label 2": 1}),
    json.dumps({"$\\frac$": 3, "_hidden": 2, "\ud800": 1, "\x1b[31m": 4, "a\nb": 2, "": 1}),
    json.dumps({f"label {n}": n for n in range(3000)}),
    "",
]


@pytest.mark.slow
@pytest.mark.pictures
def test_no_table_of_what_nodes_hold_ends_the_run(
    quick: Quick, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    grid, settings = start(quick(quorum=1, rounds=1, eval_interval=1), 1 + len(COUNTS))
    saying(grid, "query.status", ({"counts": counts} for counts in COUNTS))
    assert len(run((grid, settings))["client_digests"]) == 1 + len(COUNTS)
    out, told = capfd.readouterr()
    assert_printable(out + told)
    assert "could not be drawn" not in told
    assert (Path(settings.out) / "partition.png").exists()
    rows = read_table(Path(settings.out) / "partition.csv")
    assert [row["client"] for row in rows] == [str(index) for index in range(1 + len(COUNTS))]
    assert len(rows[0]) <= 1002


@pytest.mark.pictures
def test_a_picture_that_cannot_be_drawn_ends_no_run(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no such glyph\x1b[2J\nat all")

    names = ("partition", "plot_loss", "federation")
    for name in names:
        monkeypatch.setattr(pictures, name, fails)
    assert run(start(quick(rounds=1, eval_interval=1)))["status"] == "completed"
    told = capfd.readouterr()[1]
    for name in names:
        assert f"a picture ({name}) could not be drawn: no such glyph\\x1b[2J at all; the run goes on" in told


# What a client that fails may give as its reason.
REASONS = ["", " \n\t ", "\n", ESCAPES, "x" * 10**6, "\x00"]


@pytest.mark.first(1)
@pytest.mark.parametrize("quorum", [0, 2])
@pytest.mark.parametrize("digest", ["0" * 64, ON_WIRE, ""], ids=["another", "no digest", "none"])
def test_a_client_that_ends_with_other_weights_is_listed_and_the_run_completes(
    quick: Quick, start: Start, capfd: pytest.CaptureFixture[str], quorum: int, digest: str
) -> None:
    whole = run(start(quick(rounds=1, eval_interval=1), 2, "whole"))
    grid, settings = start(quick(quorum=quorum, rounds=1, eval_interval=1), 2)
    saying(grid, "query.digest", [{"digest": digest}])
    summary = run((grid, settings))
    assert summary["status"] == "completed" and summary["digest"] == whole["digest"]
    said = one_line(digest)
    assert summary["wrong_digests"] == ({"1": said} if said or not quorum else {})
    assert summary["client_digests"] == {"0": summary["digest"], "1": said}
    assert RunFolder(Path(settings.out)).summary()["wrong_digests"] == summary["wrong_digests"]
    out, told = capfd.readouterr()
    assert_printable(out + told)
    assert ("client 1 ends with" in told) == bool(summary["wrong_digests"])
    assert "1 of 2 clients end with the server's weights" in out
    assert whole["wrong_digests"] == {}


def test_a_time_that_a_client_claims_is_believed_up_to_what_the_server_waited(quick: Quick, start: Start) -> None:
    grid, settings = start(quick(quorum=1, rounds=1, eval_interval=1), 3)
    claims = {1: 2**62, 2: -(2**62)}

    def alter(index: int, message: Message, reply: Message) -> Message:
        if index not in claims or not message.metadata.message_type.startswith("train"):
            return reply
        told = replace(messages.unpack(Answer, reply.content), milliseconds=claims[index])
        return Message(content=messages.pack(told), reply_to=message)

    grid.alter = alter
    run((grid, settings))
    rows = read_table(Path(settings.out) / "clients.csv")
    (whole,) = read_table(Path(settings.out) / "rounds.csv")
    assert all(0.0 <= float(row["seconds_compute"]) <= float(whole["seconds_waiting"]) for row in rows)
    assert {row["result"] for row in rows} == {"used"}


@pytest.mark.slow
@pytest.mark.pictures
def test_no_reply_that_chance_spoils_ends_the_run(
    quick: Quick, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of all kinds: bytes changed, cut, added, exchanged for another kind's; numbers and texts of any size."""
    chance, kinds = random.Random(5), Counter[str]()
    settings = quick(
        quorum=1, rounds=3, eval_interval=1, client_held_out_fraction=0.3, weight_check_interval=1, link_megabits=1e-6
    )
    grid, settings = start(settings, 8)
    numbers = (0, 1, -1, 2**31, 2**32, -(2**63), 2**63 - 1)
    floats, texts = (
        (math.nan, math.inf, -1e38, 1e30, 0.0),
        ("", ON_WIRE, "[" * 3000, '{"a": 1' + "0" * 400 + "}", "\x00"),
    )

    def other(value: Any) -> Any:
        choices: dict[type, Callable[[], Any]] = {
            int: lambda: chance.choice(numbers), float: lambda: chance.choice(floats),
            str: lambda: chance.choice(texts), bytes: lambda: chance.randbytes(chance.choice([0, 1, 16, 300])),
            tuple: lambda: tuple(chance.choice(numbers) for _ in range(chance.choice([0, 1, 2, 2, 9]))),
        }  # fmt: skip
        return choices[type(value)]()

    def alter(index: int, message: Message, reply: Message) -> Message:
        kind = message.metadata.message_type
        if index == 0 or chance.random() < 0.2 or (kind == "query.status" and index < 5):
            return reply
        kinds[kind] += 1
        whole = bytes(reply.content[messages.KEY][messages.KEY])  # type: ignore[index, arg-type]
        if chance.random() < 0.1:
            return Message(Error(code=CLIENT_FAILED, reason=chance.choice(REASONS)), reply_to=message)
        if chance.random() < 0.5:
            told = wire.decoded(wire.KINDS[whole[0]], whole)
            name = chance.choice(fields(told)).name
            return Message(content=messages.pack(replace(told, **{name: other(getattr(told, name))})), reply_to=message)
        at = chance.randrange(len(whole))
        spoilt = chance.choice([
            whole[:at], whole + chance.randbytes(9), bytes([chance.randrange(9)]) + whole[1:],
            whole[:at] + bytes([chance.randrange(256)]) + whole[at + 1 :], chance.randbytes(at),
        ])  # fmt: skip
        return Message(content=raw(spoilt), reply_to=message)

    grid.alter = alter
    summary = run((grid, settings))
    assert summary["status"] == "completed" and summary["replay_digest"] == summary["digest"]
    assert summary["client_digests"]["0"] == summary["digest"]
    assert set(kinds) == {"query.status", "train.zo", "evaluate.zofed", "query.digest"} and kinds.total() > 30
    out, told = capfd.readouterr()
    assert_printable(out + told)
    assert "could not be drawn" not in told
    assert len(journal.read(RunFolder(Path(settings.out)).journal).entries) == 3


def test_one_liar_that_is_asked_alone_is_skipped_and_not_told_as_divergence(quick: Quick, start: Start) -> None:
    grid, settings = hostile(start, quick(quorum=1, participation=0.5, rounds=6), 2)
    grid.forge_by(lambda plan: ("out_of_range", lambda: answer(plan, examples=0)))
    summary = run((grid, settings))
    assert summary["status"] == "completed"
    assert set(grid.told[1]) == {"out_of_range"} and summary["replies"]["0"]["used"] > 0
