"""A replica anywhere on the way catches up to the same state, or is not moved at all."""

import itertools
from collections.abc import Callable

import pytest
from exchanges import DIGEST, HISTORY, LENGTHS, UPDATE, history, replica_of, standing_at, state
from hypothesis import given, settings
from hypothesis import strategies as st

from zofed.core import journal
from zofed.core.journal import Entry, genesis_chain, link, position
from zofed.core.records import Skipped
from zofed.core.replica import catch_up


@pytest.mark.parametrize("start", LENGTHS)
@pytest.mark.parametrize("stands", LENGTHS)
def test_a_worker_anywhere_on_the_way_catches_up_to_the_same_state(start: int, stands: int) -> None:
    entries, goal = history(replica_of()), standing_at(len(HISTORY))
    after = entries[start - 1].chain if start else genesis_chain(goal.genesis)
    replica = standing_at(stands)
    reached = catch_up(replica, after, journal.bodies(entries[start:]), {DIGEST: UPDATE})
    assert reached == (stands >= start)
    assert state(replica) == state(goal if reached else standing_at(stands))


@pytest.mark.parametrize("stands", LENGTHS)
def test_without_an_update_that_the_way_names_nothing_is_applied(stands: int) -> None:
    entries, replica = history(replica_of()), standing_at(stands)
    before = state(replica)
    reached = catch_up(replica, genesis_chain(replica.genesis), journal.bodies(entries), {b"o" * 32: UPDATE})
    assert reached == (stands >= 5), "the last update needed is that of round 5"
    assert state(replica) == (state(standing_at(6)) if reached else before)


def broken_ways() -> dict[str, Callable[[list[Entry]], bytes]]:
    return {
        "the last cut": lambda entries: journal.bodies(entries)[:-1],
        "garbage before": lambda entries: b"\x01" + journal.bodies(entries),
        "garbage": lambda entries: bytes(range(256)) * 3,
        "a length of zero": lambda entries: b"\x00" + journal.bodies(entries),
        "a negative length": lambda entries: b"\x01" * 9,
        "an entry of the file": lambda entries: b"".join(entry.raw for entry in entries),
        "rounds that fall": lambda entries: journal.bodies([entries[1], entries[0], *entries[2:]]),
    }


@pytest.mark.parametrize("way", broken_ways())
@pytest.mark.parametrize("stands", [0, 1, 2])
def test_a_broken_way_is_refused_and_moves_nothing(way: str, stands: int) -> None:
    replica, entries = standing_at(stands), history(replica_of())
    before = state(replica)
    assert not catch_up(replica, genesis_chain(replica.genesis), broken_ways()[way](entries), {DIGEST: UPDATE})
    assert state(replica) == before


def other_ways() -> dict[str, Callable[[list[Entry]], list[Entry]]]:
    return {
        "a gap": lambda entries: [entries[0], *entries[2:]],
        "the first missing": lambda entries: entries[1:],
        "another record": lambda entries: [link(b"", Skipped(1)), *entries[1:]],
    }


@pytest.mark.parametrize("way", other_ways())
def test_another_way_from_the_same_start_ends_at_another_head(way: str) -> None:
    """The head does not travel but follows: whoever applied other records says so by its probe or its chain."""
    entries = history(replica_of())
    raw = journal.bodies(other_ways()[way](entries))
    origin = replica_of().origin
    found = journal.following(raw, origin, origin)
    assert found is not None and found[-1].chain != entries[-1].chain
    replica = standing_at(2)
    before = state(replica)
    assert not catch_up(replica, genesis_chain(replica.genesis), raw, {DIGEST: UPDATE})
    assert state(replica) == before


@given(st.binary(max_size=60), st.binary(min_size=16, max_size=16))
@settings(max_examples=300, deadline=None, database=None)
def test_arbitrary_bytes_lead_nowhere_or_are_records(raw: bytes, chain: bytes) -> None:
    try:
        entries = journal.following(raw, chain, chain)
    except ValueError:
        return
    assert entries is not None and journal.bodies(entries) == raw


def test_bodies_are_linked_to_the_entries_they_came_from() -> None:
    entries = history(replica_of())
    for start, end in itertools.combinations(LENGTHS, 2):
        chain = entries[start - 1].chain if start else genesis_chain(replica_of().genesis)
        assert journal.following(journal.bodies(entries[start:end]), chain, chain) == entries[start:end]
    assert len(journal.bodies(entries[3:4])) < 45


def test_records_that_a_replica_holds_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that serves a thousand clients is sent the record of their thousand answers a thousand times."""
    entries = history(replica_of())
    read: list[bytes] = []
    decode = journal.records.decode
    monkeypatch.setattr(journal.records, "decode", lambda body: read.append(body) or decode(body))
    for stands in LENGTHS:
        read.clear()
        replica = standing_at(stands)
        assert catch_up(replica, replica.origin, journal.bodies(entries), {DIGEST: UPDATE})
        assert len(read) == len(entries) - stands


def test_a_worker_ahead_of_the_plan_is_not_moved() -> None:
    replica, entries = standing_at(4), history(replica_of())
    before = state(replica)
    assert not catch_up(replica, genesis_chain(replica.genesis), journal.bodies(entries[:2]), {DIGEST: UPDATE})
    assert state(replica) == before


def test_a_position_is_counted_in_entries() -> None:
    replica = replica_of()
    entries = history(replica)
    heads = [replica.head, *(entry.chain for entry in entries)]
    assert [position(entries, replica.head, head) for head in heads] == list(LENGTHS)
    assert position(entries, replica.head, b"x" * 16) is None
