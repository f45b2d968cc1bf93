"""A server that is cut and starts again, and clients that answer nonsense: the same weights, and exact reasons."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from test_law import federate, records_of

from zofed import client, messages, server
from zofed.config import Settings
from zofed.errors import UserError
from zofed.federation import Answer
from zofed.grid import LocalGrid
from zofed.journal import Journal
from zofed.runs import RunFolder, read_table
from zofed.server import Server

Quick = Callable[..., Settings]

WAYS: dict[str, dict[str, Any]] = {
    "zo": {"optimizer": "adamw", "learning_rate": 1e-3},
    "fo": {"mode": "fo", "local_steps": 2},
    "calibrate": {"mode": "calibrate", "bp_interval": 2, "optimizer": "adamw", "learning_rate": 1e-3},
    "subspace": {"mode": "subspace", "subspace_size": 16, "subspace_interval": 2},
}
CUTS = ("before the journal", "after the journal", "after the move")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("at", [1, 5])
def test_a_server_that_was_cut_goes_on_to_the_same_weights(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, cut: str, at: int
) -> None:
    settings = quick(**WAYS[way], save_interval=2)
    whole = federate(settings, tmp_path / "whole", 2)
    append, show = Journal.append_all, Server._show

    def appending(self: Journal, some: Any) -> Any:
        if cut == "before the journal" and some[0].round == at:
            raise KeyboardInterrupt
        found = append(self, some)
        if cut == "after the journal" and some[0].round == at:
            raise KeyboardInterrupt
        return found

    def showing(self: Server, row: Any) -> None:
        show(self, row)
        if cut == "after the move" and row["step"] == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append_all", appending)
        patched.setattr(Server, "_show", showing)
        with pytest.raises(KeyboardInterrupt):
            federate(settings, tmp_path / "cut", 2)
    held = records_of(tmp_path / "cut")
    assert len(held) == (at - 1 if cut == "before the journal" else at)
    again = federate(settings, tmp_path / "cut", 2)
    assert again["digest"] == whole["digest"]
    assert records_of(tmp_path / "cut") == records_of(tmp_path / "whole")
    assert records_of(tmp_path / "cut")[: len(held)] == held
    assert [row["step"] for row in read_table(tmp_path / "cut" / "metrics.csv")] == [str(step) for step in range(7)]


def test_a_federation_goes_on_with_its_own_settings_only(quick: Quick, tmp_path: Path) -> None:
    federate(quick(rounds=3), tmp_path / "run", 2)
    before = records_of(tmp_path / "run")
    with pytest.raises(UserError, match="began with another learning-rate"):
        federate(quick(rounds=6, learning_rate=0.5), tmp_path / "run", 2)
    with pytest.raises(UserError, match=r"rounds = 2, but .* has done 3"):
        federate(quick(rounds=2), tmp_path / "run", 2)
    assert records_of(tmp_path / "run") == before
    longer = federate(quick(rounds=6), tmp_path / "run", 2)
    assert longer["digest"] == federate(quick(rounds=6), tmp_path / "whole", 2)["digest"]


NONSENSE: dict[str, tuple[str, Callable[[Answer, random.Random], Any]]] = {
    "nan loss": ("not_finite", lambda a, _: replace(a, loss=float("nan"))),
    "infinite loss": ("not_finite", lambda a, _: replace(a, loss=float("inf"))),
    "great loss": ("out_of_range", lambda a, _: replace(a, loss=-1e7)),
    "great slopes": ("out_of_range", lambda a, _: replace(a, exponent=100)),
    "an exponent beyond": ("out_of_range", lambda a, _: replace(a, exponent=10**6)),
    "a great integer": ("out_of_range", lambda a, c: replace(a, coefficients=(2 ** c.randrange(19, 62), 0, 0))),
    "no examples": ("out_of_range", lambda a, c: replace(a, examples=-c.randrange(10**9))),
    "many examples": ("out_of_range", lambda a, _: replace(a, examples=2**50)),
    "too few": ("wrong_length", lambda a, _: replace(a, coefficients=a.coefficients[:-1])),
    "too many": ("wrong_length", lambda a, c: replace(a, coefficients=a.coefficients * c.randrange(2, 9))),
    "far beyond the others": ("implausible", lambda a, _: replace(a, exponent=a.exponent + 20)),
    "another run": ("wrong_genesis", lambda a, _: replace(a, genesis=b"none")),
    "another round": ("wrong_round", lambda a, c: replace(a, round=a.round + c.choice((-1, 1, 10**9)))),
    "another attempt": ("stale_attempt", lambda a, _: replace(a, attempt=a.attempt + 1)),
    "another client": ("wrong_client", lambda a, _: replace(a, client=0)),
    "bytes": ("malformed", lambda a, c: RecordDict({messages.KEY: ConfigRecord({messages.KEY: c.randbytes(90)})})),
    "a bool": ("malformed", lambda a, _: RecordDict({messages.KEY: ConfigRecord({messages.KEY: True})})),
    "two fields": ("malformed", lambda a, _: RecordDict({messages.KEY: ConfigRecord({messages.KEY: b"", "b": 1})})),
    "nothing": ("malformed", lambda a, _: RecordDict()),
}


class Hostile(LocalGrid):
    """A grid whose last client answers nonsense of one kind after the other."""

    def __init__(self, settings: Settings, clients: int) -> None:
        super().__init__(client.app, clients, settings.model_dump(by_alias=True))
        self._last, self._chance = 1000 + clients, random.Random(1)
        self.expected: list[str] = []

    def _deliver(self, message: Message) -> str:
        name = super()._deliver(message)
        if message.metadata.message_type == "train.zo" and message.metadata.dst_node_id == self._last:
            answer = messages.unpack(Answer, self._replies[name].content)
            reason, alter = list(NONSENSE.values())[len(self.expected) % len(NONSENSE)]
            found = alter(answer, self._chance)
            self._replies[name].content = found if isinstance(found, RecordDict) else messages.pack(found)
            self.expected.append(reason)
        return name


def run_hostile(settings: Settings, out: Path) -> tuple[dict[str, Any], Hostile]:
    client._replica.cache_clear()
    settings = settings.model_copy(update={"out": str(out), "clients": 4})
    grid = Hostile(settings, 4)
    return server.run(grid, settings, ""), grid


def test_nonsense_is_refused_for_the_one_right_reason_and_moves_nothing(
    quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zofed.members.PATIENCE", 10**6)  # asked every round, whatever it says
    settings = quick(rounds=3 * len(NONSENSE), quorum=3, eval_interval=1000, save_interval=0, digest_interval=0)
    summary, grid = run_hostile(settings, tmp_path / "hostile")
    rows = [row for row in read_table(tmp_path / "hostile" / "clients.csv") if row["client"] == "3"]
    told = {name: count for name, count in summary["replies"]["3"].items() if count}
    assert told == {reason: grid.expected.count(reason) for reason in set(grid.expected)}
    assert len(rows) == len(grid.expected) == 3 * len(NONSENSE)
    assert all(set(summary["replies"][str(index)]) == {"used"} for index in range(3))

    class Silent(LocalGrid):
        def _deliver(self, message: Message) -> str:
            name = super()._deliver(message)
            if message.metadata.message_type == "train.zo" and message.metadata.dst_node_id == 1004:
                self._replies.pop(name)
            return name

    client._replica.cache_clear()
    quiet = settings.model_copy(update={"out": str(tmp_path / "silent"), "clients": 4, "round_timeout": 0.02})
    silent = server.run(Silent(client.app, 4, quiet.model_dump(by_alias=True)), quiet, "")
    assert silent["digest"] == summary["digest"]
    assert RunFolder(tmp_path / "silent").summary()["replies"]["3"] == {"late": 3 * len(NONSENSE)}
