"""The Flower client: one message in, one answer out.

No state but a cache: one replica of the model per process, moved by replay to whatever history a message names. It
serves every virtual client of a simulation, a long-lived worker and a process started for one message alike.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from zofed import config
from zofed.base import bounded, environment
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import gradient_codec, sanitize
from zofed.core.aggregation import Measured
from zofed.core.journal import differences, outline
from zofed.data.classes import Classes
from zofed.federated import admission, ledger, messages, policy, protocol, reads
from zofed.federated.client_session import ClientSession, place
from zofed.federated.policy import Policy, Refused
from zofed.federated.protocol import NO_LOSS, Answer, Contribution, Plan
from zofed.federated.wire import Evaluation, Final, Greeting, Introduction, Malformed
from zofed.training import measurements
from zofed.training.paths import with_absolute_paths
from zofed.training.problem import TaskProblem
from zofed.training.process import prepare_process
from zofed.training.shards import Data
from zofed.training.task import Task

AFTER_END_S = 1.0  # until a worker lets go of a run that is over
WITHHELD = "this node cannot do what the run asks; its own log says why (details = false in its policy)"


@lru_cache(maxsize=1)
def _session(written: str, own: str, named: Classes) -> ClientSession:
    settings = Settings.model_validate_json(written)
    prepare_process(settings.threads)
    task = Task.own(settings, own, named) if own else Task.load(with_absolute_paths(settings), named or None)
    return ClientSession(TaskProblem(task, is_own=bool(own)))


def forget() -> None:
    """Let go of the replica and the data of every run."""
    _session.cache_clear()
    _allowed.cache_clear()
    _rest.seconds = math.inf


@dataclass
class Rest:
    """seconds: without a message, until what `session` keeps is of no more use; infinity where it keeps nothing."""

    seconds: float = math.inf


_rest = Rest()


def forget_after(idle: float) -> bool:
    """Let go of all, after `idle` seconds without a message, if it is time to; whether it was."""
    if idle <= _rest.seconds:
        return False
    let_go()
    return True


def let_go() -> None:
    """`forget`, and give the memory back to the machine and its GPU."""
    forget()
    gc.collect()
    environment.give_back_freed_memory()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def session(context: Context, asked: Plan | Greeting | None = None) -> ClientSession:
    """This process's replica and data for a run's settings: made at their first message, kept until others come.

    asked: tells the run's classes, by whose names the node numbers the labels it reads; None: the data tell.
    """
    try:
        named = Classes.unpacked(asked.classes, asked.names) if asked else Classes.numbered(0)
    except ValueError as error:
        raise UserError(f"the server's message is damaged ({error}): give all machines the same zofed") from error
    device, own = (str(context.node_config.get(key) or "") for key in ("device", "dataset"))
    own_policy: Any = policy.of(context)  # frozen, hence hashable, which is not seen from its class
    written = _allowed(json.dumps(dict(context.run_config)), device, own, own_policy)
    return _session(written, own, named)


@lru_cache(maxsize=1)  # as `_session`: whatever has data and model read again is held against the policy again
def _allowed(given: str, device: str, own: str, own_policy: Policy) -> str:
    """`of_node` of settings as JSON that the node's policy allows, as JSON again: once, not in each of the messages
    to a thousand clients. Raises Refused, or UserError.
    """
    values = json.loads(given)
    admission.check_given(values, own_policy)
    settings = of_node(config.resolve(config.given(values)), device)
    admission.check_settings(settings, own_policy)
    admission.check_names(settings, own_policy, own)
    return settings.model_dump_json(by_alias=True)


def of_node(settings: Settings, device: str) -> Settings:
    """A run's settings as a node takes them: on its own device, if it names one.

    Raises UserError for what a federation cannot run with.
    """
    protocol.check_settings(settings)
    if device:
        own_device = {"device": device, "placement": "none"}  # the node's word counts before the run's
        settings = config.resolve(settings.model_dump(by_alias=True) | own_device)
    return settings


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
            if theirs is None or not all(isinstance(digest, str) for digest in theirs.values()):
                raise UserError("the server's greeting holds no outline of a genesis: give all machines the same zofed")
            if different := differences(theirs, outline(here.replica.genesis)):
                raise UserError(f"it has another {' and '.join(different)} than the server: give both the same")
            examples, mode = here.examples(context), capability(here, context)
            own_policy = policy.of(context)
            admission.check_held(examples, own_policy)
            counts = json.dumps(here.counts(context)) if own_policy.details else ""
            if len(counts) > sanitize.LARGEST_TABLE:  # than the server reads
                counts = ""
            code, takes = environment.code(), int(own_policy.snapshots)
            return Introduction(client, clients, examples, mode, here.replica.head, counts, "", code, takes)
        except UserError as error:
            return Introduction(client, 0, 0, "", b"", "", self._told(error, context), environment.code())

    def _told(self, error: Exception, context: Context) -> str:
        """What the server hears of an error; the node's own log has it whole where that is less, or a refusal."""
        reason = str(error) if isinstance(error, UserError) else repr(error)
        if withheld := not isinstance(error, Refused) and not _tells_details(context):
            print(reason, file=sys.stderr, flush=True)
        elif isinstance(error, Refused):
            print(f"refused: {reason}", file=sys.stderr, flush=True)
        return WITHHELD if withheld else reason

    def measure(self, plan: Plan, context: Context) -> Answer:
        """Catch up and answer with integers: slopes, or the coefficients of a subspace."""
        here = self._admitted(plan, "train.zo", context)
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
        here = self._admitted(plan, "train.guide" if plan.task == "gradient" else "train.fo", context)
        settings = here.settings
        if capability(here, context) == "zo":
            raise Refused("the server asks for a gradient, and this client runs forward passes only (mode = zo)")

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
        here, (client, _) = self._admitted(plan, "evaluate.zofed", context), place(context)
        held_out = here.parts(context)[1]
        if held_out is None or here.settings.losses_withheld or not here.catch_up(plan):
            return Evaluation(client, here.replica.head, NO_LOSS, 0)
        score, examples = here.problem.evaluate_part(here.replica.model, held_out)
        own_policy = policy.of(context)
        admission.check_held(examples, own_policy, "to evaluate on")
        if _counts_slopes(own_policy):  # two losses at weights that a server chose are a slope
            name, read = f"{here.name_of_data(context)}, held out", np.arange(examples)
            ledger.of(own_policy.ledger, client).spend(name, examples, [(read, 1)], 1, own_policy)
        own = json.dumps(dict(score.own)) if score.own else ""
        return Evaluation(client, here.replica.head, score.loss, examples, own)

    def final(self, plan: Plan, context: Context) -> Final:
        """Catch up and name the weights this client has."""
        here = self._admitted(plan, "query.digest", context)
        arrived = here.catch_up(plan)
        return Final(place(context)[0], here.replica.digest() if arrived or here.is_unsound else "", here.replica.head)

    def _admitted(self, plan: Plan, kind: str, context: Context) -> ClientSession:
        """This process's replica and data, for a plan that the run's settings and the node's policy allow."""
        here = self._open(context, plan)
        admission.check_plan(plan, kind, here.settings, policy.of(context))
        return here

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
        plan = messages.unpack(Plan, message.content)
        reply = _reply(message, self.final(plan, context))
        if plan.task == "end":
            _rest.seconds = AFTER_END_S
        return reply

    @property
    def handlers(self) -> dict[str, Callable[[Message, Context], Message]]:
        """What answers a message, by its type."""
        of_kinds = {
            "query.status": self.on_status,
            "query.digest": self.on_digest,
            "train.zo": self.on_measure,
            "train.fo": self.on_backpropagate,
            "train.guide": self.on_backpropagate,
            "evaluate.zofed": self.on_evaluate,
        }
        return {kind: partial(self._answered, answer) for kind, answer in of_kinds.items()}

    def _answered(self, answer: Callable[[Message, Context], Message], message: Message, context: Context) -> Message:
        """A message's answer, within what the node's policy allows a run to do and the server to hear."""
        own_policy = policy.of(context)
        _rest.seconds = own_policy.idle_seconds
        admission.check_message(messages.payload(message.content) / 1e6, own_policy)
        _runs.check(context.run_id, own_policy)
        try:
            return answer(message, context)
        except Exception as error:
            if isinstance(error, Refused) or own_policy.details:
                raise
            if bounded.is_of_memory(error):  # which is the worker's to bound
                raise MemoryError from None
            raise UserError(self._told(error, context)) from None

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
        _spend(plan, here, context, data)
        torch.set_num_threads(here.settings.threads)
        try:
            found = work(client, data)
        except ValueError:  # a loss or a gradient that is not finite
            problem = "not_finite"
    return {
        "found": found,
        "genesis": protocol.name_of(here.replica),
        "round": plan.round,
        "attempt": plan.attempt,
        "client": client,
        "head": b"" if arrived or here.is_unsound else here.replica.head,
        "probe": here.probe or here.replica.probe(),
        "problem": problem,
        "examples": here.examples(context),
        "milliseconds": round(1000 * (time.monotonic() - began)),
    }


def _spend(plan: Plan, here: ClientSession, context: Context, data: Data) -> None:
    """Count the slopes that a plan asks of the data, where the node's policy limits them. Raises Refused beyond it."""
    own_policy, (client, _) = policy.of(context), place(context)
    admission.check_held(here.examples(context), own_policy)
    if plan.round != here.replica.round + 1:
        raise Refused(f"a plan of round {plan.round} whose records lead to round {here.replica.round}: there is none")
    if _counts_slopes(own_policy):
        asked, slopes = reads.of(plan, here.settings, here.replica, data, client)
        held = ledger.of(own_policy.ledger, client)
        held.spend(here.name_of_data(context), here.examples(context), asked, slopes, own_policy)


def _counts_slopes(own_policy: Policy) -> bool:
    return bool(own_policy.slopes_per_example or own_policy.slopes_in_all)


def _tells_details(context: Context) -> bool:
    try:
        return policy.of(context).details
    except UserError:  # of the policy's own file
        return False


def _reply(message: Message, content: Answer | Contribution | Introduction | Evaluation | Final) -> Message:
    return Message(content=messages.pack(content), reply_to=message)


_runs = ledger.Runs()
answers = Answers(session)  # of a client whose model and data the run's settings name
app = answers.added_to(ClientApp())
