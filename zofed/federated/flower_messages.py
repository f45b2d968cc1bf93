"""What messages and the in-process grid take from Flower's private interfaces; light to import, as every client does.

Written against flwr 1.41, which requirements.txt pins.
"""

from flwr.app import Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.task_identity import TaskIdentity


def size(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it, without the transport's own framing."""
    with no_object_id_recompute():  # or each part would be serialised and hashed once for every part above it
        return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def speak_as(node: int, run: int) -> None:
    """Have the messages that are made from now on in this process come from a node of a run.

    Flower's message constructor reads both from one place for the whole process.
    """
    TaskIdentity.task_id = TaskIdentity.run_id = run
    TaskIdentity.node_id = node


def give_id(message: Message, number: int) -> None:
    """Give a message an id, as Flower's grid does when it is pushed: there a digest, here a number, at no cost."""
    message.metadata.__dict__["_message_id"] = f"{number:064x}"
