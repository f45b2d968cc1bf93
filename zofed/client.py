"""The Flower client: one message in, one answer out.

No state but a cache: one replica of the model per process, moved by replay to whatever history a message names. It
serves every virtual client of a simulation, a long-lived worker and a process started for one message alike.
"""

import json
import time
from functools import lru_cache
from math import nan
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import zofed
from zofed import config, federation, messages
from zofed.config import Settings
from zofed.data import Examples
from zofed.errors import UserError
from zofed.federation import Answer, Plan
from zofed.journal import differences, genesis_chain
from zofed.messages import Final, Greeting, Introduction
from zofed.task import Task, prepare_process, with_absolute_paths

app = ClientApp()


class Replica:
    """This process's one copy of the model, and the shards of the clients it has served."""

    def __init__(self, settings: Settings) -> None:
        prepare_process(settings.threads)
        self.task = Task.load(with_absolute_paths(settings))
        self.worker = self.task.worker()
        self.genesis = genesis_chain(self.worker.genesis)
        self._shards: dict[tuple[int, int], Examples] = {}

    def shard(self, client: int, clients: int) -> Examples:
        return self._shards.setdefault((client, clients), self.task.shard(client, clients))

    def catch_up(self, plan: Plan) -> bool:
        """Move to the plan's head and weights; from the base, anew, when the plan brings the whole history.

        False when this process cannot get there: the answer then tells the server, which sends everything.
        """
        if self._follow(plan):
            return True
        if plan.after != self.genesis:
            return False
        self.worker = self.task.worker()
        return self._follow(plan)

    def _follow(self, plan: Plan) -> bool:
        arrived = federation.catch_up(self.worker, plan.after, plan.head, plan.entries)
        return arrived and self.worker.probe() == plan.probe


@lru_cache(maxsize=1)
def _replica(written: str) -> Replica:
    return Replica(Settings.model_validate_json(written))


def replica(context: Context) -> Replica:
    """This process's replica for a run's settings: built at their first message, kept until others come."""
    return _replica(config.resolve(dict(context.run_config)).model_dump_json(by_alias=True))


def _place(context: Context) -> tuple[int, int]:
    """Index of this client and how many there are, from the node's configuration."""
    try:
        return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    except KeyError as error:
        raise UserError(
            f"this node has no {error}: start it with --node-config 'partition-id=0 num-partitions=2'"
        ) from error


def greet(greeting: Greeting, context: Context) -> Introduction:
    """Say who this client is, or in one line why it cannot take part in the run."""
    code = f"{zofed.__version__} {Path(zofed.__file__).parent}"
    try:
        client, clients = _place(context)
        here = replica(context)
        theirs = json.loads(greeting.genesis)
        if different := differences(theirs, here.worker.genesis):
            raise UserError(
                f"client {client} has another {' and '.join(different)} than the server: give both the same"
            )
        return Introduction(client, clients, len(here.shard(client, clients)["labels"]), "", code)
    except UserError as error:
        return Introduction(-1, 0, 0, str(error), code)


def train(plan: Plan, context: Context) -> Answer:
    """Catch up, measure slopes along this client's own directions on its own data, answer with integers."""
    began = time.monotonic()
    client, clients = _place(context)
    here = replica(context)
    examples = here.shard(client, clients)

    def answer(coefficients: tuple[int, ...] = (), exponent: int = 0, loss: float = nan) -> Answer:
        return Answer(
            genesis=here.genesis,
            round=plan.round,
            attempt=plan.attempt,
            client=client,
            head=here.worker.head,
            probe=here.worker.probe(),
            coefficients=coefficients,
            exponent=exponent,
            loss=loss,
            examples=len(examples["labels"]),
            seconds=time.monotonic() - began,
        )

    if ":" in plan.objective:
        raise UserError(f"objective = {plan.objective!r}: no server names code that runs here")
    if not here.catch_up(plan):
        return answer()
    torch.set_num_threads(plan.threads)
    try:
        measured = federation.measure(here.worker, examples, plan)
    except ValueError:  # a loss that is not finite: no slopes to send
        return answer()
    return answer(measured.coefficients, measured.exponent, measured.loss)


def final(plan: Plan, context: Context) -> Final:
    """Catch up and name the weights this client ends with."""
    here = replica(context)
    return Final(_place(context)[0], here.worker.digest() if here.catch_up(plan) else "")


@app.query("status")
def on_status(message: Message, context: Context) -> Message:
    return _reply(message, greet(messages.unpack(Greeting, message.content), context))


@app.train("zo")
def on_train(message: Message, context: Context) -> Message:
    return _reply(message, train(messages.unpack(Plan, message.content), context))


@app.query("digest")
def on_digest(message: Message, context: Context) -> Message:
    return _reply(message, final(messages.unpack(Plan, message.content), context))


def _reply(message: Message, content: Introduction | Answer | Final) -> Message:
    return Message(content=messages.pack(content), reply_to=message)
