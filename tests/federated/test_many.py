"""Many clients in one process, and clocks that jump: a round costs each client the same, and time decides nothing."""

import itertools
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest
from federations import Quick, Start, records_of, run
from flwr.app import Message, RecordDict
from flwr.app.message import message as flower_message

from zofed import config
from zofed.core import records
from zofed.federated import messages
from zofed.federated.places import Places
from zofed.runs import pictures
from zofed.runs.tables import read_table

pytestmark = pytest.mark.usefixtures("no_waiting")


def test_what_is_done_once_a_round_is_not_done_once_a_client(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are read, settings resolved and messages measured as often as there are rounds, runs and messages."""
    counts = dict.fromkeys(("records", "settings"), 0)
    sizes: list[int] = []
    measured = messages.size

    def measuring(content: RecordDict) -> int:
        sizes.append(measured(content))
        return sizes[-1]

    def counted(what: str, owner: object, name: str) -> None:
        function = getattr(owner, name)

        def counting(*arguments: object) -> object:
            counts[what] += 1
            return function(*arguments)

        monkeypatch.setattr(owner, name, counting)

    counted("records", records, "decode")
    counted("settings", config, "resolve")
    monkeypatch.setattr(messages, "size", measuring)
    found: dict[int, dict[str, int]] = {}
    for nodes in (2, 9):
        settings = quick(rounds=3)
        counts.update(dict.fromkeys(counts, 0))
        sizes.clear()
        summary = run(start(settings, nodes, name=f"of {nodes}"))
        found[nodes] = dict(counts)
        # Both ways, of each client, in each round and of the digests; of greetings the first is that of all.
        assert len(sizes) == 2 * nodes * (3 + 1) + 1 + nodes
        assert summary["bytes"] + summary["bytes_beside_rounds"] == sum(sizes) + (nodes - 1) * sizes[0]
    assert found[9]["records"] == found[2]["records"]
    assert found[9]["settings"] == found[2]["settings"]


def set_clock(monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    """From now on the wall clock jumps forwards and backwards by so many days whenever it is read."""
    jumps = itertools.cycle((0, 1, -1, 1, 1, -1, -1))
    now, seconds = flower_message.now, time.time
    monkeypatch.setattr(flower_message, "now", lambda: now() + timedelta(days=days * next(jumps)))
    monkeypatch.setattr(time, "time", lambda: seconds() + 86400 * days * next(jumps))


@pytest.mark.parametrize("days", [1, 400])
def test_a_clock_that_jumps_decides_nothing(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Between any two messages: the same records, and no second below zero."""
    settings = quick(rounds=4)
    summary = run(start(settings, 3, name="steady"))
    set_clock(monkeypatch, days)
    grid, jumping = start(settings, 3, name="jumping")
    assert run((grid, jumping))["digest"] == summary["digest"]
    out = Path(jumping.out)
    assert records_of(out) == records_of(out.with_name("steady"))
    rows = read_table(out / "rounds.csv")
    assert [row["replies_used"] for row in rows] == ["3"] * 4
    assert all(float(row[name]) >= 0 for row in rows for name in row if name.startswith("seconds"))


def test_a_clock_that_jumps_neither_skips_nor_shortens_a_deadline(
    quick: Quick, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = 0.3
    set_clock(monkeypatch, 400)
    grid, settings = start(quick(rounds=2, quorum=1, round_timeout=deadline))
    pull = grid.pull_messages

    def silent_at_first(message_ids: Iterable[str]) -> list[Message]:
        return [
            reply
            for reply in pull(message_ids)
            if (reply.metadata.message_type, len(grid.plans), reply.metadata.src_node_id) != ("train.zo", 2, 1002)
        ]

    grid.pull_messages = silent_at_first  # type: ignore[method-assign]
    summary = run((grid, settings))
    assert summary["replies"] == {"0": {"used": 2}, "1": {"used": 1, "late": 1}}
    first, second = (float(row["seconds_waiting"]) for row in read_table(Path(settings.out) / "rounds.csv"))
    assert deadline <= first and second < 86400
    assert set(summary["client_digests"].values()) == {summary["digest"]}


def test_a_node_is_found_by_its_id_when_another_takes_its_place() -> None:
    """Where nodes have no keys, and each start gives another id."""
    places = Places(2, {0: 10, 1: 11}, are_lasting=False)
    places.give(0, 12)
    assert places.nodes == {0: 12, 1: 11}
    assert "node 12 is client 0" in places.refusal(12, 1, 2, present={11, 12})
    assert "two nodes say they are client 1" in places.refusal(10, 1, 2, present={10, 11, 12}), "free again"
    places.free(1)
    assert places.nodes == {0: 12} and places.refusal(11, 1, 2, present={11, 12}) == ""


def test_a_picture_of_a_thousand_clients_is_a_few_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(
        pictures.plot_style, "save", lambda figure, path: drawn.append(len(figure.axes[0].patches)) or path
    )
    for clients in (40, 1000):
        held = {client: {f"label {n}": 1 + (n * client) % 7 for n in range(3)} for client in range(clients)}
        pictures.partition(held, tmp_path / "a.png")
    assert drawn == [40 * 3, 3]
