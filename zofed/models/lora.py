"""Low-rank adapters (Hu et al., "LoRA: low-rank adaptation of large language models", 2021), by the library peft.

Its layers are set into the model itself, which stays of its own class: y = W x + alpha / rank * B (A x), where A and B
train in float32, whatever type W has. A is drawn from (run seed, its name), B begins at zero, so that a run starts from
what the base computes."""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.config import unknown
from zofed.core import directions
from zofed.models import adapter_files, initial

ALL_LINEAR = "all-linear"  # peft's word for every linear map but the output layer

_NAME = "default"  # of the one adapter, as peft calls it
_MATRICES = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class Lora:
    """What settings say of an adapter. targets: names of modules, or `all-linear`; empty: as peft's for the kind."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    adapter: ClassVar[str] = "lora"
    type: ClassVar[str] = "LORA"  # as peft calls it

    def values(self) -> dict[str, Any]:
        """By the settings' names."""
        return {"lora-rank": self.rank, "lora-alpha": self.alpha, "lora-targets": set(self.targets)}

    @staticmethod
    def saved(config: Mapping[str, Any]) -> dict[str, Any]:
        """The same of a folder's configuration."""
        targets = config["target_modules"]
        targets = {targets} if isinstance(targets, str) else set(targets)
        return {"lora-rank": config["r"], "lora-alpha": config["lora_alpha"], "lora-targets": targets}


def set_in(model: nn.Module, wanted: "Lora | Mapping[str, Any]", seed: int) -> dict[str, Any]:
    """Set matrices beside those of a model, in place; what of peft's configuration describes them.

    wanted: settings, or such a description. Raises UserError for targets that are not there, and a rank above a
    matrix's sides.
    """
    config = _config(model, wanted)
    with torch.random.fork_rng(devices=[]):  # what the library draws is drawn anew below
        _injected(model, config)
    key = directions.derive_seed("zofed-initial", seed)
    for name, layer in _layers(model):
        _check_rank(layer, name, config)
        for part in _MATRICES:
            weight = getattr(layer, part)[_NAME].weight
            weight.data = weight.data.to(torch.float32)
            if part == "lora_B":
                weight.zero_()
            else:  # with the variance of peft's default
                initial.fill(weight, key, f"{name}.lora_A", 1 / math.sqrt(3 * weight.shape[1]))
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {key: described[key] for key in adapter_files.KEPT["LORA"] if described[key] is not None}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """What trains, by the names that peft's files give it, without their prefix."""
    return {
        f"{name}.{part}.weight": getattr(layer, part)[_NAME].weight
        for name, layer in _layers(model)
        for part in _MATRICES
    }


def merge(model: nn.Module) -> None:
    """Add what the matrices compute to the weights that they shift, and take them out; in place.

    Term by term in float64, so that the sums have the same bits on every machine.
    """
    for name, layer in list(_layers(model)):
        base = layer.get_base_layer()
        a, b = (getattr(layer, part)[_NAME].weight.double() for part in _MATRICES)
        total = base.weight.double()
        for row, column in zip(a, b.T, strict=True):
            product = torch.outer(row, column) if layer.fan_in_fan_out else torch.outer(column, row)
            total += product * layer.scaling[_NAME]
        base.weight.copy_(total)
        _replace(model, name, base)
    del model.peft_config


def keep(model: nn.Module, trained: Collection[str]) -> list[str] | None:
    """Take the matrices of those layers out of a model, in place, of which nothing trains: they would add zero.

    trained: names of parameters in the model. Returns the names of the layers that are left; None: all.
    """
    layers = dict(_layers(model))
    used = {name for name in layers if any(one.startswith(f"{name}.") for one in trained)}
    for name in layers.keys() - used:
        _replace(model, name, layers[name].get_base_layer())
    return sorted(used) if len(used) < len(layers) else None


def described(model: nn.Module, config: Mapping[str, Any]) -> str:
    """A line for people."""
    targets = config["target_modules"]
    parts = [targets] if isinstance(targets, str) else [one.rpartition(".")[2] for one in targets]
    on = ", ".join(dict.fromkeys(parts))
    count = sum(1 for _ in _layers(model))
    return f"LoRA of rank {config['r']}, alpha {config['lora_alpha']:g}, on {on} ({count} matrices)"


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that an adapter shifts, with their names."""
    for name, module in model.named_modules():
        if all(_NAME in getattr(module, part, ()) for part in _MATRICES):
            yield name, module


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _config(model: Any, wanted: "Lora | Mapping[str, Any]") -> Any:
    if not isinstance(wanted, Lora):
        return _lora_config(**wanted)
    _check_targets(model, wanted.targets)
    given: Any = ALL_LINEAR if wanted.targets == (ALL_LINEAR,) else list(wanted.targets) or None
    alpha = int(wanted.alpha) if wanted.alpha == int(wanted.alpha) else wanted.alpha
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # of GPT-2's kind
    return _lora_config(r=wanted.rank, lora_alpha=alpha, target_modules=given, fan_in_fan_out=transposed)


def _peft() -> ModuleType:
    """The library, whose import takes seconds, for those alone who adapt."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which it imports, and which warns of unused kernels
    import peft

    return peft


def _lora_config(**values: Any) -> Any:
    return _peft().LoraConfig(**values)


def _injected(model: Any, config: Any) -> None:
    try:
        _peft().inject_adapter_in_model(config, model)
    except ValueError as error:
        kind = model.config.model_type
        if config.target_modules is None:
            raise UserError(
                f"adapter = 'lora': peft has no default for models of the type {kind!r}: set lora-targets to "
                f"{ALL_LINEAR}, or to names such as {', '.join(_linear_names(model)[:4])}"
            ) from error
        raise UserError(f"an adapter does not fit the model of the type {kind!r}: {said_by(error)}") from error


def _linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of linear maps inside a model, each once, without the output layer."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    ]
    return list(dict.fromkeys(found))


def _check_targets(model: nn.Module, targets: tuple[str, ...]) -> None:
    """Refuse names of which there is no linear map; peft leaves such out if another is there."""
    if targets in ((), (ALL_LINEAR,)):
        return
    if ALL_LINEAR in targets:
        raise UserError(f"lora-targets = {', '.join(targets)!r}: {ALL_LINEAR} stands alone, or names stand alone")
    known = _linear_names(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            raise UserError(f"lora-targets: {unknown(target, [*known, ALL_LINEAR], 'linear map')}")
    output, embedding = (getattr(model, f"get_{end}put_embeddings", lambda: None)() for end in ("out", "in"))
    if output is None or embedding is None or output.weight is not embedding.weight:
        return
    name = next(name for name, module in model.named_modules() if module is output)
    if any(name == target or name.endswith("." + target) for target in targets):
        raise UserError(
            f"lora-targets: {name} shares its weights with the embedding, which an adapter would move with it: leave "
            "it out"
        )


def _check_rank(layer: Any, name: str, config: Any) -> None:
    rank = layer.r[_NAME]
    smallest = min(layer.lora_A[_NAME].weight.shape[1], layer.lora_B[_NAME].weight.shape[0])
    if rank > smallest:
        raise UserError(
            f"lora-rank = {rank}, but {name} is a matrix of {smallest} on its smaller side: {smallest} at most, or "
            "leave it out of lora-targets"
        )
