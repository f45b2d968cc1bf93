"""What a journal begins with: all that a replay depends on beside the records."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zofed.base.errors import UserError
from zofed.core import directions, kinds, optimizers, soundness
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.journal import Genesis

TRAINABLE_DTYPES = (torch.float32, torch.bfloat16)  # moved in float32: float64 would lose bits, float16 overflow


def make_genesis(
    model: nn.Module,
    description: dict[str, Any],
    trainable: Iterable[str],
    *,
    seed: int,
    kind: kinds.Kind,
    optimizer: optimizers.Optimizer,
    size_exponents: Mapping[str, int] | None = None,
    backprop_optimizer: optimizers.Optimizer | None = None,
    quantised: Sequence[str] = (),
) -> Genesis:
    """All that a replay depends on: the base weights, what trains, how seeds become directions, the optimizer.

    size_exponents: the power of two that multiplies each tensor's direction and step; 0 where absent.
    backprop_optimizer: the rule, with a state of its own, of the steps that are no function of seeds alone; None: the
    same. quantised: names of frozen matrices that whoever measures slopes may hold in fewer bits; the model has them
    whole here, so that the digest is that of the unquantised source. Raises UserError for a trainable tensor of another
    type than float32 and bfloat16, the two whose steps are exact, and for two that lie in the same memory.
    """
    parameters = named_parameters(model)
    trainable = list(trainable)
    soundness.check_apart({name: parameters[name] for name in trainable})
    for name in trainable:
        if parameters[name].dtype not in TRAINABLE_DTYPES:
            raise UserError(
                f"parameter {name!r} is {str(parameters[name].dtype).removeprefix('torch.')}, but only float32 and "
                "bfloat16 can be trained: set dtype to one of them, or set scope to leave it out"
            )
    return {
        "generator": directions.GENERATOR,
        "seed": seed,
        "directions": kind,
        "model": description,
        "weights": weights_digest(model),
        "trainable": [
            [name, str(parameters[name].dtype).removeprefix("torch."), list(parameters[name].shape)]
            for name in trainable
        ],
        "optimizer": _described(optimizer),
        "size-exponents": {name: exponent for name, exponent in (size_exponents or {}).items() if exponent},
        **({"backprop-optimizer": _described(backprop_optimizer)} if backprop_optimizer else {}),
        **({"quantised": list(quantised)} if quantised else {}),
    }


def _described(optimizer: optimizers.Optimizer) -> dict[str, Any]:
    return {
        "name": optimizer.name,
        "momentum": optimizer.momentum,
        "weight-decay": optimizer.weight_decay,
        "cautious": optimizer.cautious,
        "orthogonal": sorted(optimizer.orthogonal),
    }


def optimizer_of(rule: Mapping[str, Any]) -> optimizers.Optimizer:
    """The rule, without a state, that a genesis describes."""
    return optimizers.Optimizer(
        rule["name"], rule["momentum"], rule["weight-decay"], rule["cautious"], frozenset(rule["orthogonal"])
    )
