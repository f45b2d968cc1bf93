"""The same ServerApp and ClientApps in one process: no Ray, no SuperLink, a millisecond a round."""

import itertools
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from zofed.federated import flower_messages

RUN_ID = 1
SERVER_NODE = 1
CLIENT_FAILED = 2  # Flower's own code for a ClientApp that raised


class LocalGrid(Grid):
    """A grid of `nodes` virtual clients that answer at once, in the order they are asked.

    Flower's message constructor reads the identity of the running task from a process-wide place; the grid sets it for
    the server and, while a client works, for that client.
    """

    def __init__(self, client_app: ClientApp, nodes: int, run_config: dict[str, Any]) -> None:
        self._app = client_app
        self._contexts = {
            1001 + index: Context(
                run_id=RUN_ID,
                node_id=1001 + index,
                node_config={"partition-id": index, "num-partitions": nodes},
                state=RecordDict(),
                run_config=run_config,
            )
            for index in range(nodes)
        }
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count(1)  # of messages
        flower_messages.speak_as(SERVER_NODE, RUN_ID)

    def set_run(self, run: Any) -> None:
        """Nothing to set: the grid serves one run."""

    @property
    def run(self) -> Any:
        return None

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: Any = None):
        """As Flower's deprecated constructor does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._deliver(message) for message in messages]

    def _deliver(self, message: Message) -> str:
        flower_messages.give_id(message, next(self._numbers))
        node = message.metadata.dst_node_id
        flower_messages.speak_as(node, RUN_ID)
        try:
            reply = self._app(message, self._contexts[node])
        except Exception as error:  # what the real grid answers with when a ClientApp raises anything
            reply = Message(Error(code=CLIENT_FAILED, reason=repr(error)), reply_to=message)
        finally:
            flower_messages.speak_as(SERVER_NODE, RUN_ID)
        self._replies[message.metadata.message_id] = reply
        return message.metadata.message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in list(message_ids) if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
