"""All that a replica is, as tensors: weights, optimizer state, where it stands. For checkpoints and cold starts."""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zofed.core.journal import CHAIN_BYTES
from zofed.core.replica import Replica


def tensors(replica: Replica) -> dict[str, Tensor]:
    """The trainable weights and the state beside them, by name."""
    weights = {f"weight/{name}": tensor for name, tensor in replica.parameters.items()}
    return weights | {f"state/{key}": tensor for key, tensor in replica.state_dict().items()}


def fits(replica: Replica, held: Mapping[str, Tensor]) -> bool:
    """Whether `take_over` can take these tensors: the weights and the state are of the replica's names and shapes."""
    return _types(_part(held, "weight/")) == _types(replica.parameters) and replica.fits(_part(held, "state/"))


def take_over(replica: Replica, held: Mapping[str, Tensor], round_: int, head: bytes) -> None:
    """Bring a replica to what `tensors` gave of another one."""
    replica.load(_part(held, "weight/"), _part(held, "state/"), round_=round_, head=head)


def _part(held: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in held.items() if key.startswith(prefix)}


def taken(replica: Replica) -> bytes:
    """The replica as bytes."""
    place = {"round": torch.tensor(replica.round), "head": torch.frombuffer(bytearray(replica.head), dtype=torch.uint8)}
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors(replica).items()}
    return save(held | place)


def size(replica: Replica) -> int:
    """Bytes of `taken`, nearly."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(replica).values())


def restore(replica: Replica, raw: bytes) -> None:
    """Bring a replica to what `taken` gave. Raises ValueError for bytes of another model or none at all."""
    try:
        held = load(raw)
        round_, head = int(held.pop("round")), bytes(held.pop("head").tolist())
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{len(raw)} bytes are no snapshot: {error}") from None
    weights, state = _part(held, "weight/"), _part(held, "state/")
    if len(head) != CHAIN_BYTES or round_ < 0 or len(weights) + len(state) != len(held):
        raise ValueError("the snapshot has another head, round or tensor than it may")
    if _types(weights) != _types(replica.parameters):
        raise ValueError("the snapshot is of another model: weights of other names, types or shapes")
    if not replica.fits(state):
        raise ValueError("the snapshot is of another optimizer: state of other names, types or shapes")
    replica.load(weights, state, round_=round_, head=head)


def _types(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
