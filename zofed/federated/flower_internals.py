"""What deployment takes from Flower's private interfaces: a SuperNode's tasks, connection, sleeps; a SuperLink's waits.

Written against flwr 1.41, which requirements.txt pins. `tests/federated/test_flower_internals.py` names what a newer
one changed.
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any, Self, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, SubStatus
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore import sql_mixin
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime import run_clientapp

T = TypeVar("T")

OBJECTS_LIMIT_S = 7200.0  # for a message's content to arrive at the SuperNode over a thin link
RETRY_S = 0.01
LOCKED_S = 60  # that a SuperLink waits for its database
GIVEN_UP_S = 1.0  # between two looks whether a message that does not arrive was given up
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"


@dataclass(frozen=True)
class Assignment:
    """What a SuperNode asks of its worker. app: PUBLISHER/NAME of the bundle the run came with."""

    message: Message
    context: Context
    app: str


class Runtime:
    """A SuperNode's Runtime API, as its worker sees it.

    address: host:port on this machine. secret: shared with the SuperNode (its `--superexec-auth-secret-file`).
    """

    def __init__(self, address: str, secret: bytes | None = None) -> None:
        self._address = address
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        signing = [SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE})] if secret else []
        self._client = _client(address, version, *signing)
        self._next: Task | None = None
        self._lock = threading.Lock()  # a message's objects are fetched by several threads

    def acquire(self) -> "Task | None":
        """The next message's task, if there is one. Raises httpx.HTTPError while the SuperNode is away."""
        with self._lock:
            task, self._next = self._next or self._ask(), None
            return task

    def offers_another(self) -> bool:
        """Whether there is a task beside the one in hand.

        A SuperNode takes one message after another. If it has come to the next, it has given up the one before, as it
        does without a word where a run ends while its message is fetched.
        """
        with self._lock:
            self._next = self._next or self._ask()
            return self._next is not None

    def _ask(self) -> "Task | None":
        request = AcquireTaskRequest(supported_task_types={TaskType.CLIENT_APP}, agentapp_fab_hashes=set())
        found = self._client.AcquireTask(request)
        if not found.HasField("task") or not found.token:
            return None
        return Task(self._address, found.token, self.offers_another)


class Task:
    """One message's task, between its acquisition and the answer; the SuperNode hears that it is alive meanwhile.

    is_given_up: asked now and then while the message does not arrive.
    """

    def __init__(self, address: str, token: str, is_given_up: Callable[[], bool]) -> None:
        interceptors = (
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        )
        self._client = _client(address, *interceptors)
        self._is_given_up = is_given_up
        self._context: Context | None = None
        self._problem = "no answer was made"
        self._heart = HeartbeatSender(self._beat)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        status = SubStatus.FAILED if self._problem else SubStatus.COMPLETED
        try:
            run_clientapp.push_task_output(self._client, self._context, status, self._problem)
        finally:
            if self._heart.is_running:
                self._heart.stop()
            self._client.close()

    def take(self) -> Assignment:
        """The message and what belongs to it, once the SuperNode has all of it.

        Raises RuntimeError where the SuperNode has given the message up.
        """
        patient: Any = _Patient(self._client, self._is_given_up)
        message, self._context, run, _ = run_clientapp.pull_task_input(patient)
        return Assignment(message, self._context, run.fab_id)

    def answer(self, reply: Message) -> None:
        """Hand the answer to the SuperNode."""
        assert self._context is not None, "there is a message to answer only after take()"
        run_clientapp.push_message(self._client, reply, self._context)
        self._problem = ""

    def _beat(self) -> bool:
        try:
            self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True


def _client(address: str, *interceptors: Any) -> RuntimeHttpClient:
    """Without Flower's retries: they end the process with SIGINT when a SuperNode that started anew knows no task."""
    return RuntimeHttpClient.from_server_address(
        server_address=address, insecure=True, root_certificates=None, interceptors=interceptors
    )


class _Patient:
    """A Runtime client that waits until the SuperNode has fetched what it was asked for.

    A SuperNode offers a task before it has the message; Flower's own client would then sleep for a second.
    """

    def __init__(self, client: RuntimeHttpClient, is_given_up: Callable[[], bool]) -> None:
        self._client, self._is_given_up = client, is_given_up

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802, Flower's name
        return self._until(lambda: self._client.PullMessages(request), lambda answer: bool(answer.messages_list))

    def PullObject(self, request: Any) -> Any:  # noqa: N802, Flower's name
        def is_settled(answer: Any) -> bool:
            return answer.object_available or not answer.object_found

        return self._until(lambda: self._client.PullObject(request), is_settled)

    def _until(self, ask: Callable[[], T], is_settled: Callable[[T], bool]) -> T:
        began = looked = time.monotonic()
        while not is_settled(answer := ask()) and (now := time.monotonic()) < began + OBJECTS_LIMIT_S:
            if now >= looked + GIVEN_UP_S:
                looked = now
                if self._is_given_up() and not is_settled(ask()):  # it may have arrived between the two looks
                    raise RuntimeError("the SuperNode gave its message up and has another")
            time.sleep(RETRY_S)
        return answer


class Node:
    """A node's own standing at its SuperLink, apart from any SuperNode that runs for it.

    The SuperLink admits a node once at a time, and takes one that died silently for alive for a minute more.
    """

    def __init__(self, address: str, root_certificates: Path, key: Path) -> None:
        private = load_ssh_private_key(key.read_bytes(), None)
        assert isinstance(private, EllipticCurvePrivateKey), "key_checks.check_node lets no other pass"
        self._public = public_key_to_bytes(private.public_key())
        interceptors = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, private.public_key()),
        ]
        self._client = partial(
            FleetHttpClient.from_server_address, address, False, root_certificates.read_bytes(), interceptors
        )
        self._id: int | None = None

    def leave(self) -> None:
        """Have the SuperLink take the node for gone, so that nobody waits for what it had in hand.

        The first time it comes to leave, which shows that it is admitted. Raises httpx.HTTPError where the SuperLink
        does not answer, or does not take the node.
        """
        with self._client() as client:
            if self._id is None:
                request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
                self._id = client.ActivateNode(request).node_id
            client.DeactivateNode(DeactivateNodeRequest(node_id=self._id))


def pause(idle: float, shortest: float, longest: float) -> float:
    """Seconds to the next look for a message, `idle` seconds after the last one: a twentieth of it, within bounds.

    Rounds that follow each other in seconds lose little by it, and a node that is idle for hours seldom looks.
    """
    return max(shortest, min(longest, idle / 20))


class Patience:
    """How long a SuperNode sleeps where Flower's sleeps 3 s between looks for a message, 0.5 s for its answer.

    A look for messages costs about a kilobyte on the link, and a write into the SuperLink's database: where looks take
    longer than the quickest did, so many SuperNodes look that each waits for the others, and all leave more room. A
    look for the answer stays on this machine.
    """

    LOOK_S, ANSWER_S = 0.05, 0.02
    SWIFT_S = 0.02  # for a look: quicker ones tell no more of the SuperLink than of this machine

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._real_sleep, self._last = clock, sleep, clock()
        self._woke: float | None = None  # to look
        self._quickest = math.inf

    def sleep(self, seconds: float) -> None:
        """Sleep for `seconds` at most."""
        now = self._clock()
        if seconds < 1:  # it has a message in hand and waits for the answer
            self._last, self._woke = now, None
            self._real_sleep(min(seconds, self.ANSWER_S))
            return
        wait = pause(now - self._last, self.LOOK_S, seconds)
        if self._woke is not None:
            took = max(self.SWIFT_S, now - self._woke)
            self._quickest = min(self._quickest, took)
            wait = max(wait, min(seconds, self.LOOK_S * (took / self._quickest) ** 2))
        self._real_sleep(wait)
        self._woke = self._clock()


def hasten(module: ModuleType) -> None:
    """Have a module of Flower's ask again soon, not a second later, for objects that their sender is still pushing."""
    module.pull_objects = partial(pull_objects, initial_backoff=RETRY_S, backoff_cap=1.0)  # type: ignore[attr-defined]


def run_supernode() -> None:
    """`flower-supernode` with its own arguments (sys.argv), looking for messages as Patience says."""
    hasten(start_client_internal)
    others = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
    start_client_internal.time = SimpleNamespace(**others | {"sleep": Patience().sleep})  # type: ignore[attr-defined]
    flower_supernode()


def run_superlink() -> None:
    """`flower-superlink` with its own arguments (sys.argv), which waits longer for its database.

    Every message, and every look for one, writes to it. Flower gives SQLite 5 seconds, then answers with status 500, at
    which a SuperNode ends; 64 nodes that answer at once exceed that.
    """
    from flwr.superlink.cli import flower_superlink  # not for SuperNodes: it loads what servers need

    wanted = {"busy_timeout": str(1000 * LOCKED_S)}
    sql_mixin.SQLITE_PRAGMAS = tuple((name, wanted.get(name, value)) for name, value in sql_mixin.SQLITE_PRAGMAS)  # type: ignore[misc]
    flower_superlink()


if __name__ == "__main__":
    command = sys.argv[0] = sys.argv.pop(1)
    {"flower-supernode": run_supernode, "flower-superlink": run_superlink}[command]()
