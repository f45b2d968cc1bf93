"""Flower's private interfaces that `federated/flower_internals` uses: whoever raises flwr's version looks here."""

import inspect
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from importlib.metadata import version
from types import ModuleType
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import Result
from flwr.supercore import sql_mixin
from flwr.superlink.grid import http_grid

from zofed.federated import flower_internals, flower_messages
from zofed.federated.flower_internals import Patience


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_flowers_private_interfaces_are_those_zofed_was_written_against() -> None:
    known = version("flwr").split(".")[:2]
    assert known == ["1", "41"], "another Flower: run this file, then zofed's slow tests, then move the pin"
    internals = flower_internals
    assert parameters(internals.run_clientapp.pull_task_input) == ["client"]
    assert parameters(internals.run_clientapp.push_message) == ["client", "message", "context"]
    assert parameters(internals.run_clientapp.push_task_output) == ["client", "context", "sub_status", "details"]
    for name in ("PullMessages", "PullObject", "SendTaskHeartbeat", "AcquireTask"):
        assert parameters(getattr(internals.RuntimeHttpClient, name)) == ["self", "request"], name
    for name in ("ActivateNode", "DeactivateNode"):
        assert parameters(getattr(internals.FleetHttpClient, name)) == ["self", "request"], name
    assert {"server_address", "insecure", "root_certificates", "interceptors"} <= set(
        parameters(internals.RuntimeHttpClient.from_server_address)
    )
    assert {"initial_backoff", "backoff_cap"} <= set(parameters(internals.pull_objects))
    source = inspect.getsource(internals.start_client_internal.start_client_internal)
    assert "time.sleep(3)" in source, "the SuperNode's pause between looks for messages is another"
    source = inspect.getsource(internals.start_client_internal._push_messages)
    assert "time.sleep(0.5)" in source, "the SuperNode's pause while it waits for an answer is another"
    assert {"task_id", "run_id", "node_id"} <= set(dir(type(flower_messages.TaskIdentity)))
    assert parameters(flower_messages.get_all_nested_objects) == ["obj"]
    assert parameters(flower_messages.no_object_id_recompute) == []
    for decorator in (ClientApp.train, ClientApp.evaluate, ClientApp.query):
        assert parameters(decorator)[:2] == ["self", "action"]
    assert parameters(ServerApp.__call__) == ["self", "grid", "context"]
    assert [field.name for field in fields(Result)] == [
        "arrays", "train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp",
    ], "`own_app.Result` fills them in this order"  # fmt: skip
    for module in (internals.start_client_internal, http_grid):
        assert module.pull_objects is internals.pull_objects, f"{module.__name__} pulls objects another way"


def test_a_module_asks_again_sooner_for_objects_that_are_on_their_way() -> None:
    module = ModuleType("some")
    flower_internals.hasten(module)
    given = module.pull_objects.keywords  # type: ignore[attr-defined]
    defaults = inspect.signature(flower_internals.pull_objects).parameters
    assert given["initial_backoff"] < defaults["initial_backoff"].default / 10
    assert given["backoff_cap"] < defaults["backoff_cap"].default


def test_a_superlink_waits_longer_for_its_database_than_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    waits = list[int]()

    def superlink() -> None:
        with closing(sqlite3.connect(":memory:")) as database:
            sql_mixin._set_sqlite_pragmas(database, None)
            waits.extend(database.execute("PRAGMA busy_timeout").fetchone())

    monkeypatch.setattr("flwr.superlink.cli.flower_superlink", superlink)
    superlink()
    flower_internals.run_superlink()
    flowers, ours = waits
    assert ours == 60_000 >= 10 * flowers > 0


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_node_that_has_been_idle_for_long_looks_seldom() -> None:
    clock = Clock()
    patience = Patience(lambda: clock.now, clock.sleep)
    while clock.now < 3600:
        patience.sleep(3)
    assert clock.slept[0] == Patience.LOOK_S
    assert clock.slept == sorted(clock.slept)  # ever longer
    assert max(clock.slept) == 3  # and never longer than Flower's own
    assert len(clock.slept) < 3600 / 3 + 150
    patience.sleep(0.5)  # a message is in hand
    assert clock.slept[-1] == Patience.ANSWER_S
    patience.sleep(3)
    assert clock.slept[-1] == Patience.LOOK_S  # and the next may follow soon


@pytest.mark.parametrize("gap", [0.5, 2.0, 10.0, 60.0])
def test_a_message_waits_a_twentieth_of_the_pause_before_it(gap: float) -> None:
    clock = Clock()
    patience = Patience(lambda: clock.now, clock.sleep)
    while clock.now < gap:
        patience.sleep(3)
    assert clock.now - gap <= max(Patience.LOOK_S, gap / 20) + 1e-9


@pytest.mark.parametrize(("quickest", "look", "least", "most"), [
    (0.004, 0.015, 0.05, 0.05),  # as quick as a machine that has other work, too
    (0.2, 0.25, 0.05, 0.1),  # a slow link: as ever
    (0.008, 0.1, 1.0, 1.5),  # the SuperLink is busy with others
    (0.008, 2.0, 3.0, 3.0),
])  # fmt: skip
def test_looks_that_take_longer_than_the_quickest_follow_each_other_less_often(
    quickest: float, look: float, least: float, most: float
) -> None:
    clock = Clock()
    patience = Patience(lambda: clock.now, clock.sleep)
    for took in (quickest, quickest, look):
        patience.sleep(0.5)  # a message was there, so that no pause is long by itself
        patience.sleep(3)
        clock.now += took
        patience.sleep(3)
    assert least <= clock.slept[-1] <= most


class Fake:
    """A SuperNode's client whose answers come late."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        return self.answers.pop(0)

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        return self.answers.pop(0)


class Answer:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


FETCHING = Answer(object_found=True, object_available=False)


def patient(answers: list[Any], is_given_up: Callable[[], bool] = lambda: False) -> Any:
    return flower_internals._Patient(Fake(answers), is_given_up)  # type: ignore[arg-type]


def test_a_task_waits_for_its_message_and_its_objects() -> None:
    late = [Answer(messages_list=[]), Answer(messages_list=[]), Answer(messages_list=["it"])]
    assert patient(late).PullMessages(None).messages_list == ["it"]
    there = Answer(object_found=True, object_available=True)
    assert patient([FETCHING, FETCHING, there]).PullObject(None) is there
    gone = Answer(object_found=False, object_available=False)
    assert patient([gone, there]).PullObject(None) is gone


def test_a_task_whose_message_was_given_up_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_internals, "GIVEN_UP_S", 0.02)
    offered: list[str] = []
    runtime = flower_internals.Runtime("127.0.0.1:1")
    monkeypatch.setattr(runtime, "_client", Acquiring(offered))
    asked = 0

    def is_given_up() -> bool:
        nonlocal asked
        asked += 1
        if asked == 3:  # the SuperNode comes to the next message
            offered.append("token of the next")
        return runtime.offers_another()

    with pytest.raises(RuntimeError, match="gave its message up"):
        patient([FETCHING] * 10_000, is_given_up).PullObject(None)
    assert asked == 3 and runtime.offers_another() and not offered
    task = runtime.acquire()
    assert task, "the task that was seen is the next to be done"
    assert runtime.acquire() is None
    given: list[Any] = []
    monkeypatch.setattr(flower_internals.run_clientapp, "pull_task_input", lambda client: given.append(client) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        task.take()
    offered.append("another")
    assert given[0]._is_given_up(), "a task asks the runtime it came from"


class Acquiring:
    """A SuperNode's client with tasks to offer."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def AcquireTask(self, request: Any) -> Any:  # noqa: N802
        token = self.tokens.pop(0) if self.tokens else ""
        return Answer(HasField=lambda name: bool(token), token=token)
