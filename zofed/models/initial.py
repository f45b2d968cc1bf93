"""Tensors that begin anew, each a function of (run seed, its name): equal on all machines."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from zofed.core import directions

BLOCK = 2**20  # entries of a fresh tensor that are drawn together: all at once would take several times the tensor
SHOWN = 6  # names in a line
INITIAL_STD = 0.02  # Radford et al., "Language models are unsupervised multitask learners", 2019


@torch.no_grad()
def draw(model: nn.Module, seed: int, fresh: Collection[str] | None) -> None:
    """Draw the parameters named in `fresh` (None: all) in GPT-2's manner; a tied one if any of its names is there."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", 1)
    residual = INITIAL_STD / (2 * depth) ** 0.5
    key = directions.derive_seed("zofed-initial", seed)
    everything = model.named_parameters(remove_duplicate=False)
    chosen = {id(parameter) for name, parameter in everything if fresh is None or name in fresh}
    for name, parameter in model.named_parameters():
        if id(parameter) not in chosen:
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            std = residual if name.endswith("c_proj.weight") else INITIAL_STD
            fill(parameter, key, name, std)


@torch.no_grad()
def fill(parameter: Tensor, key: int, name: str, std: float) -> None:
    """Set a tensor to normal values, mean 0, that are a function of (key, name)."""
    flat = parameter.view(-1)
    for start in range(0, len(flat), BLOCK):
        some = flat[start : start + BLOCK]
        some.copy_(directions.normal(key, name, some.shape, start) * std)


def remember(model: nn.Module, names: Iterable[str]) -> None:
    """Note on the model which of its parameters its folder did not hold, so that they were drawn."""
    model.zofed_drawn = tuple(sorted(names))  # type: ignore[assignment]


def described(names: Collection[str]) -> str:
    """A line on the parameters that a saved model lacks and a run draws, for the names of `drawn`."""
    shown = ", ".join(list(names)[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return f"not in the saved model, drawn from the seed: {shown}"


def drawn(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters a saved model lacked and got drawn, such as a new classification head; sorted.

    Empty for a model that is fresh as a whole.
    """
    return getattr(model, "zofed_drawn", ())
