"""Names of a module's tensors that are the same everywhere, and digests over them."""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from zofed.core import directions, soundness


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by canonical name, a tied tensor once, under its first name.

    Raises UserError where two parameters cannot be told apart by their names.
    """
    named = [(directions.canonical_name(name), parameter) for name, parameter in model.named_parameters()]
    directions.check_distinct(name for name, _ in named)
    return dict(named)


def weights_digest(model: nn.Module, apart_from: Collection[str] = ()) -> str:
    """SHA-256 over all parameters by canonical name, hex, and all buffers that are saved; a tied tensor counts once.

    apart_from: canonical names that are left out, whose bytes are never read.
    """
    buffers = {directions.canonical_name(name): held for name, held in soundness.persistent_buffers(model).items()}
    held = named_parameters(model) | buffers
    return tensors_digest({name: tensor for name, tensor in held.items() if name not in apart_from})


def weights_digest_over(base: str, model: nn.Module, quantised: Collection[str]) -> str:
    """SHA-256, hex, of weights of which some may be held in fewer bits: the same where `model` holds them whole.

    base: `weights_digest` of the unquantised weights the model began with. It stands for the tensors named in
    `quantised`, which are frozen: their bytes are never read, since rounding may differ from machine to machine, and
    some kernels keep codes in an order of their own. All others are read as they are now.
    """
    return hashlib.sha256(f"{base} {weights_digest(model, apart_from=quantised)}".encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors: names sorted, dtype, shape and raw bytes. Hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's elements as they lie in memory, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
