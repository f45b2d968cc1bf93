"""One client of three lies, each time in another way: it is refused by name, and the others end as without it."""

import functools
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lies
import pytest
import torch
from federations import records_of
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from lies import PLANS, Asked, Lie
from torch import Tensor, nn

from zofed.federated.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from zofed.flower import Client, Strategy
from zofed.runs.tables import read_table

pytestmark = pytest.mark.usefixtures("no_waiting")

SECONDS, MEGABYTES = 5.0, 200  # of a processor, which a busy machine does not stretch
HONEST, LIAR, NODES = (0, 1), 2, 3
CLASSES, WIDTH = 4, 6
BASE: dict[str, Any] = {
    "rounds": 2, "batch-size": 8, "eval-interval": 2, "learning-rate": 0.05, "save-interval": 0,
    "quorum": len(HONEST), "link-megabits": 1e-6,
}  # fmt: skip


class Net(nn.Module):
    """Small enough that a run costs what its messages do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.gelu(self.first(x)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def share(model: nn.Module, batches: Any) -> dict[str, float]:
    return {"right": float(torch.cat([model(x).argmax(-1) == y for x, y in batches]).float().mean())}


def points(index: int) -> tuple[Tensor, Tensor]:
    """(count, WIDTH) and the class of each."""
    x = torch.randn(40 + 8 * index, WIDTH, generator=torch.Generator().manual_seed(1 + index))
    return x, x[:, :CLASSES].argmax(-1)


def own_points(context: Context) -> tuple[Tensor, Tensor]:
    return points(int(context.node_config["partition-id"]))


LIES = lies.all_of({name: tuple(parameter.shape) for name, parameter in Net().named_parameters()})


class Grid(LocalGrid):
    """Three clients, the last of which tells the lie; without one all are honest."""

    def __init__(self, run_config: dict[str, Any], lie: Lie | None = None) -> None:
        super().__init__(Client(Net, loss, own_points, metrics=share).add_to(ClientApp()), NODES, run_config)
        self.lie, self.chance = lie, random.Random(11)
        self.others, self.own = list[RecordDict](), list[RecordDict]()  # true answers
        self._held: list[tuple[float, Message]] = []  # when each of the liar's is there
        self._true, self._app = self._app, self._told  # type: ignore[assignment]

    def leave_out_the_liar(self) -> None:
        self._contexts.pop(1001 + LIAR)

    def _told(self, message: Message, context: Context) -> Message:
        true = functools.partial(self._true, message, context)
        kind = message.metadata.message_type
        if self.lie is None or not kind.startswith(self.lie.to):
            return true()
        if context.node_config["partition-id"] != LIAR:
            reply = true()
            self.others.append(reply.content)
            return reply
        told = self.lie.tell(Asked(message, lambda: true().content, self.others, self.own, self.chance))
        if isinstance(told, Error):
            return Message(told, reply_to=message)
        return Message(content=told, reply_to=message)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """What is there by now; of the liar's lies, each as late and as often as it says."""
        if (lie := self.lie) is None:
            return list(super().pull_messages(message_ids))
        found = list[Message]()
        for reply in super().pull_messages(message_ids):
            is_lie = reply.metadata.src_node_id == 1001 + LIAR and reply.metadata.message_type.startswith(lie.to)
            if is_lie:
                self._held.append((time.monotonic() + lie.delay, reply))
            else:
                found.append(reply)
        now = time.monotonic()
        due = [reply for at, reply in self._held if at <= now]
        self._held = [(at, reply) for at, reply in self._held if at > now]
        return found + [reply for reply in due for _ in range(lie.times)]


@dataclass(frozen=True)
class Outcome:
    """What a run left. replies: how those of each client fared, by index."""

    digest: str
    records: list[bytes]
    replies: dict[str, dict[str, int]]
    digests: dict[str, str]
    folder: Path


def run_of(out: Path, settings: dict[str, Any], lie: Lie | None = None, *, alone: bool = False) -> Outcome:
    """alone: only the honest clients are there, with the same shares of the data."""
    values = BASE | {"clients": len(HONEST) if alone else NODES, "out": str(out)} | settings
    run_config = {f"zofed.{key}": value for key, value in values.items()}
    grid = Grid(run_config, lie)
    if alone:
        grid.leave_out_the_liar()
    strategy = Strategy(Net, loss, points(9), metrics=share)
    found = strategy.start(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), run_config))
    assert found.summary["status"] == "completed"
    assert found.summary["replay_digest"] == found.summary["digest"]
    return Outcome(
        found.summary["digest"], records_of(out), found.summary["replies"], found.summary["client_digests"], out
    )


@pytest.fixture(scope="module", autouse=True)
def no_disk() -> Iterator[None]:
    """Nobody pulls the plug here, and two hundred runs would wait for the disk three times as long as they compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(os, "fdatasync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """The run in which the liar takes no part, or tells the truth: once for each that a lie is compared with."""

    @functools.cache
    def told(plan: str, rounds: int, *, alone: bool) -> Outcome:
        return run_of(tmp_path_factory.mktemp("truth") / "run", PLANS[plan] | {"rounds": rounds}, alone=alone)

    return told


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused_by_name_and_moves_nothing(
    tmp_path: Path, truth: Callable[..., Outcome], capfd: pytest.CaptureFixture[str], name: str
) -> None:
    lie = LIES[name]
    settings = PLANS[lie.plan] | lie.settings
    rounds = settings.get("rounds", BASE["rounds"])
    as_it_should = truth(lie.plan, rounds, alone=not lie.is_heard)
    capfd.readouterr()
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = run_of(tmp_path / "run", settings, lie)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    assert time.process_time() - began < SECONDS and grown < MEGABYTES
    assert (found.digest, found.records) == (as_it_should.digest, as_it_should.records)
    assert [found.digests[str(client)] for client in HONEST] == [found.digest] * len(HONEST)
    asked = rounds * (2 if lie.plan == "guided" else 1)
    assert [found.replies[str(client)] for client in HONEST] == [{"used": asked}] * len(HONEST)
    assert set(found.replies.get(str(LIAR), {})) == set(lie.results)
    rows = [row for row in read_table(found.folder / "clients.csv") if row["client"] == str(LIAR)]
    assert Counter(row["result"] for row in rows) == found.replies.get(str(LIAR), {})
    told = read_table(found.folder / "rounds.csv")
    assert sum(int(row["replies_used"]) for row in told) == asked * (len(HONEST) + lie.is_heard)
    if not lie.delay:
        refused = len(rows) * (lie.times - lie.is_heard)  # each answer that comes again is a duplicate
        assert sum(int(row["replies_rejected"]) for row in told) == refused
    out, errors = capfd.readouterr()
    assert lie.said in out + errors, errors
    assert all(line.isprintable() and len(line) < 1000 for line in (out + errors).split("\n"))
    assert "Traceback" not in out + errors


@pytest.mark.parametrize("plan", PLANS)
def test_what_the_liar_might_have_said_counts(truth: Callable[..., Outcome], plan: str) -> None:
    """Else no lie could move anything, and the table above would hold whatever a server did."""
    alone, heard = (truth(plan, BASE["rounds"], alone=alone) for alone in (True, False))
    assert alone.digest != heard.digest
    assert set(heard.replies[str(LIAR)]) == {"used"} and str(LIAR) not in alone.replies
