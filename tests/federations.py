"""Whole federations in this process, and what a run leaves."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from zofed.config import Settings
from zofed.core import journal
from zofed.core.records import Seeded
from zofed.federated import client, messages, server
from zofed.federated.local_grid import LocalGrid
from zofed.federated.protocol import Plan
from zofed.federated.wire import Malformed
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row, read_table

Quick = Callable[..., Settings]


def ignore(row: Row) -> None:
    """A reporter that says nothing."""


def federate(settings: Settings, out: Path, clients: int) -> dict[str, Any]:
    """A federated run in this process."""
    client.forget()
    settings = settings.model_copy(update={"out": str(out), "clients": clients})
    return server.run(LocalGrid(client.app, clients, settings.model_dump(by_alias=True)), settings, "")


def records_of(out: Path) -> list[bytes]:
    return [entry.raw for entry in journal.read(RunFolder(out).journal).entries]


def seeded_of(out: Path) -> list[Seeded]:
    """The records of a run that has no others."""
    found = [entry.record for entry in journal.read(RunFolder(out).journal).entries]
    seeded = [record for record in found if isinstance(record, Seeded)]
    assert len(seeded) == len(found)
    return seeded


class Meddling(LocalGrid):
    """A grid that calls `before` with every plan (and whose it is) and lets `alter` change every reply.

    `before` may raise, as a client that fails. plans: all that were sent, in order.
    """

    def __init__(self, settings: Settings, nodes: int) -> None:
        super().__init__(client.app, nodes, settings.model_dump(by_alias=True))
        self.before: Callable[[int, Plan], Any] = lambda _, __: None
        self.alter: Callable[[int, Message, Message], Message] = lambda _, __, reply: reply
        self.plans: list[Plan] = []
        self._forward, self._app = self._app, self._meddled  # type: ignore[assignment]

    def context(self, index: int) -> Context:
        return list(self._contexts.values())[index]

    def keep(self, indices: Iterable[int]) -> dict[int, Context]:
        """Only these nodes stay; returns the others, to be put back with `bring`."""
        kept = {1001 + index for index in indices}
        away = {node: context for node, context in self._contexts.items() if node not in kept}
        for node in away:
            self._contexts.pop(node)
        return away

    def bring(self, contexts: dict[int, Context]) -> None:
        self._contexts.update(contexts)

    def _meddled(self, message: Message, context: Context) -> Message:
        index = int(context.node_config["partition-id"])
        try:
            plan = messages.unpack(Plan, message.content)
        except Malformed:
            plan = None
        if plan is not None:
            self.plans.append(plan)
            self.before(index, plan)
        return self.alter(index, message, self._forward(message, context))


Start = Callable[..., tuple[Meddling, Settings]]


def run(started: tuple[Meddling, Settings]) -> dict[str, Any]:
    return server.run(*started, "")


def assert_one_model(summary: dict[str, Any], clients: Iterable[int]) -> None:
    """All clients end with the server's weights, which are not those it began with."""
    assert summary["client_digests"] == {str(index): summary["digest"] for index in clients}
    assert summary["replay_digest"] in (summary["digest"], None)


def results(settings: Settings) -> list[tuple[int, int, str]]:
    """(round, client, result) of every reply."""
    rows = read_table(Path(settings.out) / "clients.csv")
    return [(int(row["round"]), int(row["client"]), row["result"]) for row in rows]


SUBSPACE = {"mode": "subspace", "optimizer": "adamw", "subspace_size": 9, "subspace_interval": 2}

BACKPROP = {"bp_interval": 2, "bp_learning_rate": 0.1}
