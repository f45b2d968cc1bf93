"""The Flower client: one message in, one answer out.

No state but a cache: one replica of the model per process, moved by replay to whatever history a message names. It
serves every virtual client of a simulation, a long-lived worker and a process started for one message alike.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from zofed import config
from zofed.base import environment
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import gradient_codec, sanitize, snapshots
from zofed.core.aggregation import Measured
from zofed.core.digests import tensors_digest
from zofed.core.journal import differences, genesis_chain
from zofed.core.measure import Update
from zofed.core.replica import catch_up
from zofed.data.classes import Classes
from zofed.federated import messages, protocol
from zofed.federated.protocol import NO_LOSS, Answer, Contribution, Plan
from zofed.federated.wire import Evaluation, Final, Greeting, Introduction, Malformed
from zofed.training import measurements, shards
from zofed.training.paths import with_absolute_paths
from zofed.training.problem import Place, Problem, TaskProblem
from zofed.training.process import prepare_process
from zofed.training.replicas import tell_placement
from zofed.training.shards import Data
from zofed.training.task import Task

UPDATES_KEPT = 2  # guides and updates that entries soon to come will name


class ClientSession:
    """This process's one copy of the model, and the data of the clients it has served."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.settings = problem, problem.settings
        self.replica = problem.replica()
        tell_placement(self.replica, self.settings)
        self.genesis = genesis_chain(self.replica.genesis)
        self._parts: dict[Place, tuple[Data, Data | None]] = {}
        self._updates: dict[bytes, Update] = {}
        self.is_unsound = False  # at the head of the last plan, but with other weights

    def parts(self, context: Context) -> tuple[Data, Data | None]:
        """What the node trains and, with `client-held-out-fraction`, evaluates on."""
        share = place(context)
        if share not in self._parts:
            self._parts[share] = self.problem.parts(share, context)
        return self._parts[share]

    def examples(self, context: Context) -> int:
        """How many examples the node trains on."""
        return len(shards.of(self.settings, self.parts(context)[0]))

    def counts(self, context: Context) -> dict[str, int]:
        """What the node holds, by label or source."""
        return self.problem.counts(place(context), context)

    def catch_up(self, plan: Plan) -> bool:
        """Move to the plan's head and weights; from the base, anew, when the plan brings the whole history.

        False when this process cannot get there: the answer then tells the server, which sends everything.
        """
        try:
            brought = [gradient_codec.decoded(raw, self.replica.shapes) for raw in gradient_codec.split(plan.updates)]
        except ValueError as error:
            return self._unreachable(plan, error)
        for update in brought:
            self.keep(update, len(brought))
        if not plan.rebuild and not plan.snapshot and self._follow(plan):
            return True
        if plan.rebuild:
            self.replica = self.problem.replica()
        if plan.snapshot:
            try:
                snapshots.restore(self.replica, plan.snapshot)
            except ValueError as error:
                return self._unreachable(plan, error)
        elif plan.after != self.genesis:
            return False
        elif not plan.rebuild:
            self.replica = self.problem.replica()
        return self._follow(plan)

    def _unreachable(self, plan: Plan, error: ValueError) -> bool:
        """Tell of updates or a snapshot that cannot be used; the answer will be that the replica is behind."""
        self.is_unsound = False
        print(f"round {plan.round} cannot be reached: {error}", file=sys.stderr, flush=True)
        return False

    def keep(self, update: Update, count: int = UPDATES_KEPT) -> None:
        """Have an update or a guide at hand for the entry that names it. count: that are kept together, at least."""
        digest = bytes.fromhex(tensors_digest(update))
        self._updates.pop(digest, None)  # the newest stand last
        self._updates[digest] = update
        while len(self._updates) > max(UPDATES_KEPT, count):
            del self._updates[next(iter(self._updates))]

    def _follow(self, plan: Plan) -> bool:
        arrived = catch_up(self.replica, plan.after, plan.entries, self._updates)
        self.is_unsound = arrived and self.replica.probe() != plan.probe
        return arrived and not self.is_unsound


@lru_cache(maxsize=1)
def _session(written: str, own: str, named: Classes) -> ClientSession:
    settings = Settings.model_validate_json(written)
    prepare_process(settings.threads)
    task = Task.own(settings, own, named) if own else Task.load(with_absolute_paths(settings), named or None)
    return ClientSession(TaskProblem(task, is_own=bool(own)))


def forget() -> None:
    """Let go of the replica and the data of every run."""
    _session.cache_clear()


def session(context: Context, asked: Plan | Greeting | None = None) -> ClientSession:
    """This process's replica and data for a run's settings: made at their first message, kept until others come.

    asked: tells the run's classes, by whose names the node numbers the labels it reads; None: the data tell.
    """
    try:
        named = Classes.unpacked(asked.classes, asked.names) if asked else Classes.numbered(0)
    except ValueError as error:
        raise UserError(f"the server's message is damaged ({error}): give all machines the same zofed") from error
    settings = of_node(config.resolve(config.given(context.run_config)), context)
    own = str(context.node_config.get("dataset", ""))
    return _session(settings.model_dump_json(by_alias=True), own, named)


def of_node(settings: Settings, context: Context) -> Settings:
    """A run's settings as a node takes them: on its own device, if it names one.

    Raises UserError for what a federation cannot run with.
    """
    protocol.check_settings(settings)
    if device := context.node_config.get("device"):
        own_device = {"device": device, "placement": "none"}  # the node's word counts before the run's
        settings = config.resolve(settings.model_dump(by_alias=True) | own_device)
    return settings


def place(context: Context) -> tuple[int, int]:
    """Index of this client and how many there are, from the node's configuration.

    Raises UserError where one is missing or no whole number, or where the two are no place.
    """
    found = []
    for key in ("partition-id", "num-partitions"):
        value = context.node_config.get(key)
        if value is None:
            raise UserError(f"this node has no {key!r}: start it with --node-config 'partition-id=0 num-partitions=2'")
        found.append(int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value) else value)
    client, clients = found
    if problem := sanitize.misplaced(client, clients):
        raise UserError(problem)
    return client, clients


def capability(here: ClientSession, context: Context) -> str:
    """`zo` where this client runs forward passes only, as its node or the run's settings say, else `fo`: it can both.

    Raises UserError for another word in the node's configuration.
    """
    mode = str(context.node_config.get("mode", "fo")).lower()
    if mode not in ("fo", "zo"):
        raise UserError(f"mode = {mode!r} in this node's configuration: use fo or zo")
    client, clients = place(context)
    return "zo" if client >= clients - here.settings.forward_only_clients else mode


Open = Callable[[Context, Plan | Greeting], ClientSession]


class Answers:
    """What a client answers each kind of message. open: this process's replica and data for a run's message."""

    def __init__(self, open_session: Open) -> None:
        self._open = open_session

    def greet(self, greeting: Greeting, context: Context) -> Introduction:
        """Say who this client is, or in one line why it cannot take part in the run."""
        client = -1
        try:
            client, clients = place(context)
            here = self._open(context, greeting)
            theirs = sanitize.json_object(greeting.genesis)
            if theirs is None:
                raise UserError("the server's greeting holds no genesis: give all machines the same zofed")
            if different := differences(theirs, here.replica.genesis):
                raise UserError(f"it has another {' and '.join(different)} than the server: give both the same")
            examples, counts = here.examples(context), json.dumps(here.counts(context))
            mode = capability(here, context)
            return Introduction(client, clients, examples, mode, here.replica.head, counts, "", environment.code())
        except UserError as error:
            return Introduction(client, 0, 0, "", b"", "", str(error), environment.code())

    def measure(self, plan: Plan, context: Context) -> Answer:
        """Catch up and answer with integers: slopes, or the coefficients of a subspace."""
        here = self._open(context, plan)
        settings = here.settings
        by_backprop = capability(here, context) == "fo"

        def work(client: int, data: Data) -> Measured:
            replica = here.replica  # that of the plan's head
            if plan.task == "coefficients":
                total = settings.rounds
                return measurements.coefficients(settings, replica, data, client, total, by_backprop=by_backprop)
            if plan.task == "guided":
                guide = gradient_codec.decoded(plan.guide, here.replica.shapes)
                here.keep(guide)
                return measurements.guided_slopes(settings, replica, data, client, guide)
            return measurements.slopes(settings, replica, data, client, plan.steps)

        fields = _report(plan, here, context, work)
        found: Measured | None = fields.pop("found")
        if found is None:
            return Answer(**fields, coefficients=(), exponent=0, loss=NO_LOSS)
        loss = NO_LOSS if settings.losses_withheld else found.loss
        return Answer(**fields, coefficients=found.coefficients, exponent=found.exponent, loss=loss)

    def backpropagate(self, plan: Plan, context: Context) -> Contribution:
        """Catch up and answer with a gradient for a guide, or with the update of local training."""
        here = self._open(context, plan)
        settings = here.settings

        def work(client: int, data: Data) -> tuple[bytes, float]:
            if plan.task == "gradient":
                gradient, loss = measurements.gradient(settings, here.replica, data, client)
                return gradient_codec.compressed(gradient, settings.gradient_rank), loss
            update, loss = measurements.update(settings, here.replica, data, client)
            return gradient_codec.whole(update), loss

        fields = _report(plan, here, context, work)
        update, loss = fields.pop("found") or (b"", NO_LOSS)
        return Contribution(**fields, update=update, loss=NO_LOSS if settings.losses_withheld else loss)

    def evaluate(self, plan: Plan, context: Context) -> Evaluation:
        """Catch up and score the client's own held-out part, of which the same sample is read each time."""
        here, (client, _) = self._open(context, plan), place(context)
        held_out = here.parts(context)[1]
        if held_out is None or not here.catch_up(plan):
            return Evaluation(client, here.replica.head, NO_LOSS, 0)
        score, examples = here.problem.evaluate_part(here.replica.model, held_out)
        own = json.dumps(dict(score.own)) if score.own else ""
        return Evaluation(client, here.replica.head, score.loss, examples, own)

    def final(self, plan: Plan, context: Context) -> Final:
        """Catch up and name the weights this client has."""
        here = self._open(context, plan)
        arrived = here.catch_up(plan)
        return Final(place(context)[0], here.replica.digest() if arrived or here.is_unsound else "", here.replica.head)

    def on_status(self, message: Message, context: Context) -> Message:
        """Answer `query.status`."""
        try:
            greeting = messages.unpack(Greeting, message.content)
        except Malformed:
            code = environment.code()
            told = f"runs zofed {code}, which reads the server's messages otherwise: give all machines the same"
            return _reply(message, Introduction(-1, 0, 0, "", b"", "", told, code))
        return _reply(message, self.greet(greeting, context))

    def on_measure(self, message: Message, context: Context) -> Message:
        """Answer `train.zo`."""
        return _reply(message, self.measure(messages.unpack(Plan, message.content), context))

    def on_backpropagate(self, message: Message, context: Context) -> Message:
        """Answer `train.fo` and `train.guide`."""
        return _reply(message, self.backpropagate(messages.unpack(Plan, message.content), context))

    def on_evaluate(self, message: Message, context: Context) -> Message:
        """Answer `evaluate.zofed`."""
        return _reply(message, self.evaluate(messages.unpack(Plan, message.content), context))

    def on_digest(self, message: Message, context: Context) -> Message:
        """Answer `query.digest`."""
        return _reply(message, self.final(messages.unpack(Plan, message.content), context))

    @property
    def handlers(self) -> dict[str, Callable[[Message, Context], Message]]:
        """What answers a message, by its type."""
        return {
            "query.status": self.on_status,
            "query.digest": self.on_digest,
            "train.zo": self.on_measure,
            "train.fo": self.on_backpropagate,
            "train.guide": self.on_backpropagate,
            "evaluate.zofed": self.on_evaluate,
        }

    def added_to(self, app: ClientApp, *kinds: str) -> ClientApp:
        """The app, which from now on answers these types of messages, all by default; all else of it stays."""
        for kind in kinds or self.handlers:
            category, action = kind.split(".")
            getattr(app, category)(action)(self.handlers[kind])
        return app


def _report(plan: Plan, here: ClientSession, context: Context, work: Callable[[int, Data], Any]) -> dict[str, Any]:
    """The fields that all answers have; `found` is what the work gave, None where there was none to do or to give."""
    began = time.monotonic()
    client, _ = place(context)
    data = here.parts(context)[0]
    found, problem = None, ""
    arrived = here.catch_up(plan)
    if arrived:
        torch.set_num_threads(here.settings.threads)
        try:
            found = work(client, data)
        except ValueError:  # a loss or a gradient that is not finite
            problem = "not_finite"
    return {
        "found": found,
        "genesis": protocol.name_of(here.replica.genesis),
        "round": plan.round,
        "attempt": plan.attempt,
        "client": client,
        "head": b"" if arrived or here.is_unsound else here.replica.head,
        "probe": here.replica.probe(),
        "problem": problem,
        "examples": here.examples(context),
        "milliseconds": round(1000 * (time.monotonic() - began)),
    }


def _reply(message: Message, content: Answer | Contribution | Introduction | Evaluation | Final) -> Message:
    return Message(content=messages.pack(content), reply_to=message)


answers = Answers(session)  # of a client whose model and data the run's settings name
app = answers.added_to(ClientApp())
