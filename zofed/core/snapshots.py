"""All that a replica is, as tensors: weights, optimizer state, where it stands. For checkpoints and cold starts."""

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zofed.core.journal import CHAIN_BYTES
from zofed.core.replica import Worker


def tensors(worker: Worker) -> dict[str, Tensor]:
    """The trainable weights and the state beside them, by name."""
    weights = {f"weight/{name}": tensor for name, tensor in worker.parameters.items()}
    return weights | {f"state/{key}": tensor for key, tensor in worker.state_dict().items()}


def fits(worker: Worker, held: Mapping[str, Tensor]) -> bool:
    """Whether `take_over` can take these tensors: the weights and the state are of the worker's names and shapes."""
    return _types(_part(held, "weight/")) == _types(worker.parameters) and worker.fits(_part(held, "state/"))


def take_over(worker: Worker, held: Mapping[str, Tensor], round_: int, head: bytes) -> None:
    """Bring a worker to what `tensors` gave of another one."""
    worker.load(_part(held, "weight/"), _part(held, "state/"), round_=round_, head=head)


def _part(held: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in held.items() if key.startswith(prefix)}


def taken(worker: Worker) -> bytes:
    """The worker as bytes."""
    place = {"round": torch.tensor(worker.round), "head": torch.frombuffer(bytearray(worker.head), dtype=torch.uint8)}
    held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors(worker).items()}
    return save(held | place)


def size(worker: Worker) -> int:
    """Bytes of `taken`, nearly."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(worker).values())


def restore(worker: Worker, raw: bytes) -> None:
    """Bring a worker to what `taken` gave. Raises ValueError for bytes of another model or none at all."""
    try:
        held = load(raw)
        round_, head = int(held.pop("round")), bytes(held.pop("head").tolist())
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{len(raw)} bytes are no snapshot: {error}") from None
    weights, state = _part(held, "weight/"), _part(held, "state/")
    if len(head) != CHAIN_BYTES or round_ < 0 or len(weights) + len(state) != len(held):
        raise ValueError("the snapshot has another head, round or tensor than it may")
    if _types(weights) != _types(worker.parameters):
        raise ValueError("the snapshot is of another model: weights of other names, types or shapes")
    if not worker.fits(state):
        raise ValueError("the snapshot is of another optimizer: state of other names, types or shapes")
    worker.load(weights, state, round_=round_, head=head)


def _types(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
