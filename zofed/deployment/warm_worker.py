"""A client that stays: one process beside a SuperNode that keeps the model between messages and runs.

Flower's own way starts a new process for each message, which loads torch and the model anew. This one takes the
SuperNode's tasks one after another. It runs the zofed that is installed here, never code that a run brings along.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from flwr.app import Error, Message

from zofed.base import bounded
from zofed.base.errors import UserError
from zofed.deployment import app_folder
from zofed.federated import client, policy
from zofed.federated.flower_internals import Assignment, Runtime, Task, pause
from zofed.federated.local_grid import CLIENT_FAILED
from zofed.federated.policy import Policy

APP = f"{app_folder.PUBLISHER}/{app_folder.NAME}"
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0


def serve(runtime: Runtime, device: str = "", *, is_over: Callable[[], bool] = lambda: False) -> None:
    """Take tasks until `is_over`, or for ever. A task that fails is answered with an error; the worker lives on.

    device: where the model runs, whatever the run's settings say; empty: as they say.
    """
    last, is_away = time.monotonic(), False
    while not is_over():
        try:
            task = runtime.acquire()
            is_away = False
        except httpx.HTTPError as error:
            if not is_away:  # once; the SuperNode may start later, or start anew
                print(f"the SuperNode does not answer ({error}): waiting for it", file=sys.stderr, flush=True)
            task, is_away = None, True
        if task is None:
            if client.forget_after(time.monotonic() - last):
                print("no run asks any more: let go of its model and data", flush=True)
            time.sleep(pause(time.monotonic() - last, SHORTEST_PAUSE_S, LONGEST_PAUSE_S))
            continue
        work(task, device)
        last = time.monotonic()


def work(task: Task, device: str) -> None:
    """One task, from its message to its answer."""
    began = time.monotonic()
    try:
        with task:
            assignment = task.take()
            task.answer(reply_to(assignment, device))
    except (httpx.HTTPError, RuntimeError, OSError) as error:  # the SuperNode went away or gave the task up
        print(f"a task was lost: {error}", file=sys.stderr, flush=True)
        return
    kind = assignment.message.metadata.message_type
    print(f"{kind}: {1000 * (time.monotonic() - began):.0f} ms", flush=True)


@contextmanager
def _bounded(own: Policy) -> Iterator[None]:
    """Hold a message to the time and memory of the node's policy. Raises Refused beyond, the model being let go of."""
    try:
        with bounded.within(own.seconds_per_message, own.memory_per_message):
            yield
    except bounded.Exceeded as error:
        client.let_go()
        line = f"{error.limit}-per-message"
        raise policy.refusal(f"a message was given up: {error}", line, own, "ask for less at once") from None


def reply_to(assignment: Assignment, device: str) -> Message:
    """What the client says, or an error that says in one line why it cannot."""
    message, context = assignment.message, assignment.context
    try:
        if assignment.app != APP:
            raise UserError(
                f"the run brings the app {assignment.app!r}: this worker answers {APP!r} alone; submit its settings "
                "with zofed run, or have its code run by flower-supernode"
            )
        if device:
            context.node_config["device"] = device
        with _bounded(policy.of(context)):
            return client.app(message, context)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else repr(error)
        print(f"{message.metadata.message_type}: {reason}", file=sys.stderr, flush=True)
        return Message(Error(code=CLIENT_FAILED, reason=reason), reply_to=message)
