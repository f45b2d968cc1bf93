"""Low-rank adapters (Hu et al., "LoRA: low-rank adaptation of large language models", 2021), by the library peft.

Its layers are set into the model itself, which stays of its own class: y = W x + alpha / rank * B (A x), where A and B
train in float32, whatever type W has. A is drawn from (run seed, its name), B begins at zero, so that a run starts from
what the base computes. A folder of an adapter is the one that peft writes and reads.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.config import unknown
from zofed.core import directions
from zofed.core.digests import named_parameters, weights_digest
from zofed.models import adapter_files, initial
from zofed.models.adapter_files import Folder
from zofed.models.classifier import PooledClassifier

ALL_LINEAR = "all-linear"  # peft's word for every linear map but the output layer

_NAME = "default"  # of the one adapter, as peft calls it
_MATRICES = ("lora_A", "lora_B")


@dataclass(frozen=True, slots=True)
class Lora:
    """What settings say of an adapter. targets: names of modules, or `all-linear`; empty: as peft's for the kind."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Adapted:
    """What a model remembers of the adapter that was set into it. base: digest of the weights below, in float32."""

    config: Mapping[str, Any]
    base: str


def of(model: nn.Module) -> Adapted | None:
    """What was set into a model; None: nothing."""
    return getattr(_inner(model), "zofed_adapter", None)


def base_digest(model: nn.Module) -> str:
    """SHA-256, hex, over what a model's folder held: without a head that was drawn, or that pools an encoder."""
    inner = _inner(model)
    return weights_digest(inner, apart_from=initial.drawn(inner))


def names(model: nn.Module) -> set[str]:
    """Names of an adapter's own parameters in a model, canonical; empty where `inject` set none into it."""
    if of(model) is None:
        return set()
    own = {id(part[_NAME].weight) for _, layer in _layers(model) for part in (layer.lora_A, layer.lora_B)}
    return {directions.canonical_name(name) for name, tensor in model.named_parameters() if id(tensor) in own}


@torch.no_grad()
def inject(model: nn.Module, wanted: Lora | Folder | Mapping[str, Any], seed: int, base: str) -> None:
    """Set an adapter into a model, in place: a new one by settings or by what a genesis describes, or a folder's.

    base: `base_digest` of the model in float32; empty for an outline on the meta device, whose adapter has no
    values. Raises UserError for targets that are not there, a rank above a matrix's sides, a folder of another base.
    """
    inner = _inner(model)
    config = _config(inner, wanted)
    with torch.random.fork_rng(devices=[]):  # what the library draws is drawn anew below
        _injected(inner, config)
    key = directions.derive_seed("zofed-initial", seed)
    for name, layer in _layers(inner):
        _check_rank(layer, name, config)
        for part in _MATRICES:
            weight = getattr(layer, part)[_NAME].weight
            weight.data = weight.data.to(torch.float32)
            if part == "lora_B":
                weight.zero_()
            else:  # with the variance of peft's default
                initial.fill(weight, key, f"{name}.lora_A", 1 / math.sqrt(3 * weight.shape[1]))
    if isinstance(wanted, Folder) and base:
        _set(inner, wanted, base)
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    inner.zofed_adapter = Adapted(  # type: ignore[assignment]
        {key: described[key] for key in adapter_files.KEPT if described[key] is not None}, base
    )


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add what a model's adapter computes to the weights that it shifts, and take the adapter out; in place.

    Term by term in float64, so that the sums have the same bits on every machine.
    """
    inner = _inner(model)
    for name, layer in list(_layers(inner)):
        base = layer.get_base_layer()
        a, b = (getattr(layer, part)[_NAME].weight.double() for part in _MATRICES)
        total = base.weight.double()
        for row, column in zip(a, b.T, strict=True):
            product = torch.outer(row, column) if layer.fan_in_fan_out else torch.outer(column, row)
            total += product * layer.scaling[_NAME]
        base.weight.copy_(total)
        _replace(inner, name, base)
    del inner.zofed_adapter, inner.peft_config


def save(model: nn.Module, folder: Path, base: tuple[str, str], heads: Mapping[str, Tensor]) -> None:
    """The adapter of a model in peft's own format, nothing of the base.

    base: its name and revision, as whoever loads the adapter will find it. heads: parameters beside the adapter that
    train, by their names in the model, such as a new classification head.
    """
    inner, adapted = _inner(model), of(model)
    assert adapted is not None
    adapter_files.write(folder, inner, _tensors(inner), adapted.config, base, adapted.base, heads)


def _tensors(inner: nn.Module) -> dict[str, Tensor]:
    """The adapter's matrices by the names that peft's files give them, without the prefix."""
    return {
        f"{name}.{part}.weight": getattr(layer, part)[_NAME].weight
        for name, layer in _layers(inner)
        for part in _MATRICES
    }


def _inner(model: nn.Module) -> Any:
    """The model that the library made: of a pooled classifier its encoder."""
    return model.encoder if isinstance(model, PooledClassifier) else model


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that an adapter shifts, with their names."""
    for name, module in model.named_modules():
        if all(_NAME in getattr(module, part, ()) for part in _MATRICES):
            yield name, module


def keep(model: nn.Module, trained: Collection[str]) -> None:
    """Take those layers' adapters out of a model, in place, of which nothing trains: they would add zero for ever.

    trained: canonical names.
    """
    inner = _inner(model)
    layers = dict(_layers(model))
    used = {name for name in layers if any(one.startswith(f"{name}.") for one in trained)}
    for name in layers.keys() - used:
        _replace(model, name, layers[name].get_base_layer())
    if len(used) < len(layers):
        prefix = "encoder." if isinstance(model, PooledClassifier) else ""
        left = sorted(name.removeprefix(prefix) for name in used)
        config = dict(inner.zofed_adapter.config) | {"target_modules": left}
        inner.zofed_adapter = replace(inner.zofed_adapter, config=config)


def described(model: nn.Module) -> str:
    """A line for people on a model's adapter; empty where it has none."""
    adapted = of(model)
    if adapted is None:
        return ""
    config, own = adapted.config, names(model)
    count = sum(tensor.numel() for name, tensor in named_parameters(model).items() if name in own)
    targets = config["target_modules"]
    parts = [targets] if isinstance(targets, str) else [one.rpartition(".")[2] for one in targets]
    on = ", ".join(dict.fromkeys(parts))
    return (
        f"adapter: LoRA of rank {config['r']}, alpha {config['lora_alpha']:g}, on {on} ({len(own) // 2} matrices): "
        f"{count:,} parameters"
    )


def check_same(wanted: Lora, usual: Lora, saved: Folder) -> None:
    """Raise UserError where settings speak of another adapter than the folder that is trained on. usual: defaults."""
    own = saved.config
    targets = own["target_modules"]
    held = {
        "lora-rank": (wanted.rank, usual.rank, own["r"]),
        "lora-alpha": (wanted.alpha, usual.alpha, own["lora_alpha"]),
        "lora-targets": (
            set(wanted.targets), set(usual.targets), set([targets] if isinstance(targets, str) else targets)
        ),
    }  # fmt: skip
    for key, (given, default, there) in held.items():
        if given not in (default, there):
            shown = ", ".join(sorted(there)) if isinstance(there, set) else there
            raise UserError(
                f"{key} is given, but {saved.where} has {shown}, which a run that goes on with it keeps: leave {key} "
                "out, or set adapter to none to add this adapter to its base and train the whole"
            )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _config(model: Any, wanted: Lora | Folder | Mapping[str, Any]) -> Any:
    if isinstance(wanted, Lora):
        _check_targets(model, wanted.targets)
        given: Any = ALL_LINEAR if wanted.targets == (ALL_LINEAR,) else list(wanted.targets) or None
        alpha = int(wanted.alpha) if wanted.alpha == int(wanted.alpha) else wanted.alpha
        transposed = any(isinstance(module, Conv1D) for module in model.modules())  # of GPT-2's kind
        return _lora_config(r=wanted.rank, lora_alpha=alpha, target_modules=given, fan_in_fan_out=transposed)
    return _lora_config(**(wanted.config if isinstance(wanted, Folder) else wanted))


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


def _set(model: Any, folder: Folder, base: str) -> None:
    """Give an adapter, and the heads beside it, the values that a folder holds."""
    tensors, told = folder.tensors()
    if told and told != base:
        raise UserError(
            f"{folder.where} was trained on a base of SHA-256 {told[:16]}..., but {folder.base!r} has {base[:16]}...: "
            f"write where its own base lies into base_model_name_or_path of its {adapter_files.CONFIG}"
        )
    own = _tensors(model)
    own |= {
        name: tensor for name, tensor in model.named_parameters() if any(name.startswith(f"{h}.") for h in folder.heads)
    }
    if own.keys() != tensors.keys():
        lacking, more = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        what = f"lacks {lacking[0]}" if lacking else f"holds {more[0]}, for which there is no place"
        raise UserError(f"{folder.where} {what}: give the folder that was saved for its base, {folder.base!r}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{folder.where} holds {name} of shape {tuple(tensors[name].shape)}, but {tuple(tensor.shape)} is "
                f"needed: {folder.base!r} is not its base; correct base_model_name_or_path of {adapter_files.CONFIG}"
            )
        tensor.copy_(tensors[name])
