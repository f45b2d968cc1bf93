"""A module of a person's own in their own Flower app: the server side, the client side, both in one process."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result as FlowerResult
from torch import nn

from zofed import config
from zofed.base.errors import UserError
from zofed.core import sanitize
from zofed.core.metrics import MEASURES
from zofed.federated import admission, policy, server
from zofed.federated.client import Answers, ClientSession
from zofed.federated.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from zofed.runs.run_folder import IN_APP
from zofed.runs.tables import Row, read_table
from zofed.training import own_settings
from zofed.training.own_data import OwnLoss
from zofed.training.own_module import Metrics, OwnModule, OwnProblem
from zofed.training.process import prepare_process


class Client:
    """The client side: what a node answers a server whose strategy is `Strategy`.

    model: the class of the module, or a function that makes it: untrained, and the same at each call under one seed of
    torch, which every node and the server give it. loss: of (module, batch), a scalar tensor, the mean over the batch.
    data: of Flower's `Context`, what the node trains on: a tensor, a tuple or a dict of tensors, a map-style Dataset,
    or a DataLoader of one, of which `dataset` and `collate_fn` are used. metrics: of (module, batches), numbers by
    name, of the node's own held-out part, where `zofed.client-held-out-fraction` makes one.

    The settings are those of the app's run configuration that begin with `zofed.`, such as `zofed.queries`. What keeps
    a node from taking part (another module than the server's, data without an example, a loss that is no finite scalar
    or that draws random numbers) the server is told in one line.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        loss: OwnLoss,
        data: Callable[[Context], Any],
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._own = OwnModule(model, loss, metrics)
        if not callable(data):
            raise UserError(f"data = {data!r} cannot be called: give a function of Flower's context")
        self._data = data
        self._session: tuple[object, ClientSession] | None = None
        self._answers = Answers(self._opened)

    def _opened(self, context: Context, _: object) -> ClientSession:
        """This process's replica and data for a run: made at its first message, kept until another run comes."""
        own_policy = policy.of(context)
        given = json.dumps(context.run_config, sort_keys=True)
        asked = context.run_id, given, context.node_config.get("device"), own_policy
        if self._session is None or self._session[0] != asked:
            self._session = None  # before its successor takes the same memory again
            values = own_settings.among(context.run_config)
            if device := context.node_config.get("device"):  # the node's word counts before the run's
                values["device"] = device
            admission.check_given(values, own_policy)
            problem = OwnProblem(values, self._own, data=self._data)
            admission.check_settings(problem.settings, own_policy)
            prepare_process(problem.settings.threads)
            self._session = asked, ClientSession(problem)
        return self._session[1]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The types of message that `answer` takes."""
        return tuple(self._answers.handlers)

    def answer(self, message: Message, context: Context) -> Message:
        """Answer one message of these kinds, in a handler of one's own. Raises UserError for another."""
        kind = message.metadata.message_type
        if kind not in self.kinds:
            raise UserError(f"a message of type {kind!r} is not of zofed: it takes {', '.join(self.kinds)}")
        return self._answers.handlers[kind](message, context)

    def add_to(self, app: ClientApp, *kinds: str) -> ClientApp:
        """The app, which from now on answers messages of these kinds, all by default; its own handlers stay."""
        return self._answers.added_to(app, *kinds)


@dataclass
class Result(FlowerResult):
    """What a run found, as Flower's strategies give it, and the run's folder with all the rest.

    arrays: the state dict of the trained module. train_metrics_clientapp: `loss` by round, the mean of the clients'.
    evaluate_metrics_serverapp, evaluate_metrics_clientapp: `loss` and one's own metrics by round, of the server's
    held-out examples and, weighted by examples, of the clients'. folder: absolute. summary: what `summary.json` says.
    """

    folder: Path = field(default_factory=Path)
    summary: dict[str, Any] = field(default_factory=dict)


class Strategy:
    """The server side, in the place of Flower's strategies: zofed's rounds for a module of one's own.

    model, loss: as the clients have them. held_out: what the server scores, in one of the forms of a client's data.
    metrics: of (module, batches), numbers by name; those called accuracy, f1 and auc have columns in the run's tables.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        loss: OwnLoss,
        held_out: Any,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self._own, self._held_out = OwnModule(model, loss, metrics), held_out

    def start(self, grid: Grid, context: Context) -> Result:
        """Carry out a run, or go on with the one in the folder `zofed.out`, and wait for its end.

        The settings are those of the app's run configuration that begin with `zofed.`. Raises UserError, one line, for
        whatever keeps the run from beginning or ending.
        """
        try:
            return self._run(grid, context)
        except UserError as error:
            raise error.with_traceback(None) from None  # the line says it all

    def _run(self, grid: Grid, context: Context) -> Result:
        server.hasten(grid)
        values = config.given(own_settings.among(context.run_config))
        if self._held_out is None:
            raise UserError("held_out = None: give examples that no client trains on, for the server to score")
        problem = OwnProblem(values, self._own, held_out=self._held_out)
        if idle := config.without_effect(problem.settings, values, config.FEDERATED):
            warnings.warn("; ".join(idle), stacklevel=4)
        problem.settings, out = server.prepared(problem.settings, f"flower-{context.run_id}")
        summary = server.carry_out(grid, problem, out, IN_APP)
        arrays = ArrayRecord(problem.trained().state_dict())
        return Result(arrays, *_histories(out), folder=out, summary=summary)


def _histories(folder: Path) -> tuple[dict[int, MetricRecord], ...]:
    """Of training on the clients, evaluation on the clients and on the server: what the tables say, by round."""
    losses = {row["step"]: {"loss": row["loss"]} for row in read_table(folder / "metrics.csv") if row["loss"]}
    scored = {row["step"]: _measures(row) for row in read_table(folder / "evaluations.csv")}
    by_round: dict[str, list[Row]] = {}
    for row in read_table(folder / "client_evaluations.csv"):
        by_round.setdefault(row["round"], []).append(row)
    return _records(losses), _records({round_: _mean(rows) for round_, rows in by_round.items()}), _records(scored)


def _measures(row: Mapping[str, str]) -> dict[str, Any]:
    """What a line of scores says: the measures that it has, and one's own."""
    own = sanitize.json_object(row.get("metrics") or "{}") or {}
    return {name: row[name] for name in MEASURES if row.get(name)} | own


def _mean(rows: list[Row]) -> dict[str, float]:
    """The mean over clients, by their examples, of each number that some of them gave."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in _measures(row).items():
            found.setdefault(name, []).append((int(row["examples"]), float(value)))
    return {name: sum(n * value for n, value in of) / sum(n for n, _ in of) for name, of in found.items()}


def _records(found: Mapping[str, Mapping[str, Any]]) -> dict[int, MetricRecord]:
    return {int(at): MetricRecord({key: float(value) for key, value in own.items()}) for at, own in found.items()}


def simulate(server_app: ServerApp, client_app: ClientApp, num_supernodes: int, run_config: Mapping[str, Any]) -> None:
    """Run both apps in this process, without Ray and SuperLink: the way `flwr run` goes, in a fraction of the time.

    num_supernodes: nodes, each with its partition-id. run_config: as the app's pyproject has it, flat:
    `{"zofed.rounds": 10}`.
    """
    if num_supernodes < 1:
        raise UserError(f"num_supernodes = {num_supernodes}: use at least 1")
    grid = LocalGrid(client_app, num_supernodes, dict(run_config))
    server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), dict(run_config)))
