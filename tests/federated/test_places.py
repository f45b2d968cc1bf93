"""An index belongs to the node that had it first, among as many as the settings or the nodes say, over restarts too."""

import json
from pathlib import Path
from typing import Any

import pytest
from federations import Meddling, Quick, Start, run
from flwr.app import Context, RecordDict

from zofed.base.errors import UserError
from zofed.federated import client, membership
from zofed.federated.places import FILE, Places

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.mark.parametrize(
    ("said", "wanted", "settled"),
    [
        ([3, 3, 3], 3, 3),
        ([1000, 3], 3, 3),
        ([1000, 1000, 3], 3, 3),
        ([3, 3, 1000], 2, 3),
        ([2, 2], 3, 3),
        ([1000, 3, 3], 0, 3),
        ([5], 0, 5),
        ([], 0, 0),
        ([], 4, 4),
    ],
)
def test_the_setting_decides_and_else_what_most_nodes_say(said: list[int], wanted: int, settled: int) -> None:
    for some in (said, said[::-1]):
        places = Places()
        assert places.settle(some, wanted)
        assert places.clients == settled
        assert places.settle([7] * 9, 7) and (places.clients == settled or not settled), "once settled it stays"


@pytest.mark.parametrize(("said", "wanted"), [([2, 3], 0), ([3, 4], 2), ([5, 4, 4, 5], 0)])
def test_nodes_of_which_as_many_say_another_number_settle_nothing(said: list[int], wanted: int) -> None:
    assert not Places().settle(said, wanted)


REFUSALS: dict[str, tuple[tuple[int, int, int], str]] = {
    "its own": ((10, 0, 3), ""),
    "a free one": ((99, 2, 3), ""),
    "among others": ((99, 2, 4), "client 2 says num-partitions = 4, others 3: give all nodes the same"),
    "taken by one that is there": (
        (99, 1, 3),
        "two nodes say they are client 1: give each its own partition-id; node",
    ),
    "taken by one that is away": ((99, 0, 3), "client 0 is node 10 in this run, which is away, and node 99 says"),
    "another than before": (
        (11, 2, 3),
        "node 11 is client 1 of this run and now says partition-id = 2: start it again",
    ),
    "another's": ((11, 0, 3), "node 11 is client 1 of this run and now says partition-id = 0"),
}


@pytest.mark.parametrize(("place", "named"), REFUSALS.values(), ids=REFUSALS)
def test_a_place_is_refused_by_name_where_it_is_not_the_nodes(place: tuple[int, int, int], named: str) -> None:
    places = Places(3, {0: 10, 1: 11})
    reason = places.refusal(*place, present={11, 99})
    assert named in reason and bool(named) == bool(reason)


def test_where_nodes_have_no_keys_one_that_starts_anew_takes_its_place_again() -> None:
    places = Places(3, {0: 10, 1: 11}, are_lasting=False)
    assert places.refusal(99, 0, 3, present={11, 99}) == ""
    assert "two nodes say" in places.refusal(99, 1, 3, present={11, 99})


def test_places_come_back_from_their_file_and_another_superlink_gives_all_anew(tmp_path: Path) -> None:
    places = Places(3, {0: 10, 1: 11})
    places.keep_in(tmp_path)
    again = Places.read(tmp_path)
    assert again == places
    assert not again.forget_strangers({11, 12}) and again.nodes == {0: 10, 1: 11}
    assert not again.forget_strangers({20}) and again.nodes == {0: 10, 1: 11}  # a stranger that came first
    assert again.forget_strangers({20, 21}) and again == Places(3, {}, path=tmp_path / FILE)
    for spoilt in ("", "{", "[" * 10**5, '{"num-partitions": "3", "nodes": {}}', '{"num-partitions": 3, "nodes": 7}'):
        (tmp_path / FILE).write_text(spoilt)
        assert Places.read(tmp_path) == Places(path=tmp_path / FILE)
    assert Places.read(tmp_path / "nowhere").clients == 0


# --- in a run ---


def one_more(grid: Meddling, settings: Any, node: int, index: int, count: int) -> None:
    """Another node comes that says it were this client."""
    grid.bring({
        node: Context(
            run_id=1, node_id=node, node_config={"partition-id": index, "num-partitions": count}, state=RecordDict(),
            run_config=settings.model_dump(by_alias=True),
        )
    })  # fmt: skip


@pytest.mark.parametrize("clients", [3, 0])
def test_the_first_node_to_greet_does_not_decide_how_many_there_are(
    quick: Quick, start: Start, capfd: pytest.CaptureFixture[str], clients: int
) -> None:
    grid, settings = start(quick(quorum=1, rounds=1, eval_interval=1), 3, clients=clients)
    grid.context(0).node_config["num-partitions"] = 30
    assert set(run((grid, settings))["client_digests"]) == {"1", "2"}
    assert "client 0 says num-partitions = 30, others 3: give all nodes the same" in capfd.readouterr()[1]
    grid, settings = start(quick(rounds=1, eval_interval=1), 2, "tie", clients=0)
    grid.context(0).node_config["num-partitions"] = 3
    with pytest.raises(
        UserError, match=r"num-partitions = 3 \(node 1001\), num-partitions = 2 \(node 1002\): give all"
    ):
        run((grid, settings))


@pytest.mark.slow
def test_nobody_takes_the_place_of_a_node_that_is_away_nor_changes_its_own(
    quick: Quick, start: Start, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, for nodes that come late, and after a restart; the owner comes back to its place."""
    monkeypatch.setattr(membership, "AGAIN_SECONDS", 0.0)
    whole = run(start(quick(rounds=6, quorum=2), 3, "whole", clients=0))
    grid, settings = start(quick(rounds=6, quorum=1), 3, clients=0)
    away: dict[int, Context] = {}

    def before(index: int, plan: Any) -> None:
        if plan.round == 2 and not away:
            away.update(grid.keep([1, 2]))
            one_more(grid, settings, 1500, 0, 3)
            one_more(grid, settings, 1501, 2, 3)
            one_more(grid, settings, 1502, 0, 4)
        if plan.round == 4 and 1500 in grid._contexts:
            for node in (1500, 1501, 1502):
                grid._contexts.pop(node)
            grid.bring(away)

    grid.before = before
    summary = run((grid, settings))
    told = capfd.readouterr()[1]
    assert "client 0 is node 1001 in this run, which is away, and node 1500 says" in told
    assert "two nodes say they are client 2: give each its own partition-id; node 1003 had it first" in told
    assert "client 0 says num-partitions = 4, others 3" in told
    assert summary["client_digests"] == dict.fromkeys("012", summary["digest"])
    assert summary["digest"] != whole["digest"]
    kept = json.loads((Path(settings.out) / FILE).read_text())
    assert kept == {"num-partitions": 3, "nodes": {"0": 1001, "1": 1002, "2": 1003}}

    # after a restart two nodes have swapped their places, and a stranger is the third
    client.forget()
    settings = settings.model_copy(update={"rounds": 7})
    grid = Meddling(settings, 3)
    grid.context(0).node_config["partition-id"], grid.context(1).node_config["partition-id"] = 1, 0
    grid.keep([0, 1])
    one_more(grid, settings, 1500, 2, 3)
    with pytest.raises(UserError, match="only 0 clients are here"):
        run((grid, settings))
    told = capfd.readouterr()[1]
    assert "node 1001 is client 0 of this run and now says partition-id = 1: start it again with" in told
    assert "node 1002 is client 1 of this run and now says partition-id = 0" in told
    assert f"if the former is gone for good, delete {Path(settings.out) / FILE} and start the run again" in told
    grid = Meddling(settings, 3)
    assert set(run((grid, settings))["client_digests"]) == {"0", "1", "2"}
