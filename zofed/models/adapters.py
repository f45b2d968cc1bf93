"""What trains beside a model that stands still: a LoRA or virtual tokens, set into the model itself.

The model stays of its own class. Adapters train in float32, whatever type the model has, and begin as a function of
(run seed, name). A folder of an adapter is the one that the library peft writes and reads. A new kind is a module like
`lora` and `virtual_tokens`, a row of `_KINDS` and one of `adapter_files`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.core import directions
from zofed.core.digests import named_parameters, weights_digest
from zofed.models import adapter_files, initial, lora, virtual_tokens
from zofed.models.adapter_files import Folder
from zofed.models.classifier import PooledClassifier
from zofed.models.lora import Lora
from zofed.models.virtual_tokens import Virtual

Wanted = Lora | Virtual  # what settings say of an adapter


class Kind(Protocol):
    """How one kind of adapter works; `model` is the model that the library made."""

    def set_in(self, model: nn.Module, wanted: Any, seed: int) -> dict[str, Any]:
        """Set it into a model, in place; what of peft's configuration describes it."""
        ...

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What trains, by the names that peft's files give it, without their prefix."""
        ...

    def described(self, model: nn.Module, config: Mapping[str, Any]) -> str:
        """A line for people."""
        ...


_KINDS: dict[str, Kind] = {"LORA": lora, virtual_tokens.PREFIX: virtual_tokens, virtual_tokens.PROMPT: virtual_tokens}


@dataclass(frozen=True, slots=True)
class Adapted:
    """What a model remembers of the adapter that was set into it. base: digest of the weights below, in float32."""

    config: Mapping[str, Any]
    base: str

    @property
    def kind(self) -> Kind:
        """How it works."""
        return _KINDS[adapter_files.type_of(self.config)]


def of(model: nn.Module) -> Adapted | None:
    """What was set into a model; None: nothing."""
    return getattr(_inner(model), "zofed_adapter", None)


def base_digest(model: nn.Module) -> str:
    """SHA-256, hex, over what a model's folder held: without a head that was drawn, or that pools an encoder."""
    inner = _inner(model)
    return weights_digest(inner, apart_from=initial.drawn(inner))


def names(model: nn.Module) -> set[str]:
    """Names of an adapter's own parameters in a model, canonical; empty where `inject` set none into it."""
    if (adapted := of(model)) is None:
        return set()
    own = {id(tensor) for tensor in adapted.kind.tensors(_inner(model)).values()}
    return {directions.canonical_name(name) for name, tensor in model.named_parameters() if id(tensor) in own}


@torch.no_grad()
def inject(model: nn.Module, wanted: Wanted | Folder | Mapping[str, Any], seed: int, base: str) -> None:
    """Set an adapter into a model, in place: a new one by settings or by what a genesis describes, or a folder's.

    base: `base_digest` of the model in float32; empty for an outline on the meta device, whose adapter has no
    values. Raises UserError where it does not fit the model, and for a folder of another base.
    """
    inner = _inner(model)
    given = wanted.config if isinstance(wanted, Folder) else wanted
    type_ = given.type if isinstance(given, Wanted) else adapter_files.type_of(given)
    inner.zofed_adapter = Adapted(_KINDS[type_].set_in(inner, given, seed), base)
    if isinstance(wanted, Folder) and base:
        _set(inner, wanted, base)


@torch.no_grad()
def merge(model: nn.Module, folder: Folder | None = None) -> None:
    """Add what a model's adapter computes to the weights that it shifts, and take the adapter out; in place.

    folder: where it came from. Raises UserError for virtual tokens, which no weights can stand for.
    """
    inner = _inner(model)
    if inner.zofed_adapter.kind is not lora:
        where = folder.where if folder else "the model"
        raise UserError(
            f"{where} holds virtual tokens, which cannot be added to the weights of a model: set adapter to "
            f"{adapter_files.setting_of(inner.zofed_adapter.config)} to train them further"
        )
    lora.merge(inner)
    del inner.zofed_adapter


def save(model: nn.Module, folder: Path, base: tuple[str, str], heads: Mapping[str, Tensor]) -> None:
    """The adapter of a model in peft's own format, nothing of the base.

    base: its name and revision, as whoever loads the adapter will find it. heads: parameters beside the adapter that
    train, by their names in the model, such as a new classification head.
    """
    inner, adapted = _inner(model), of(model)
    assert adapted is not None
    adapter_files.write(folder, inner, adapted.kind.tensors(inner), adapted.config, base, adapted.base, heads)


def _inner(model: nn.Module) -> Any:
    """The model that the library made: of a pooled classifier its encoder."""
    return model.encoder if isinstance(model, PooledClassifier) else model


def keep(model: nn.Module, trained: Collection[str]) -> None:
    """Take the matrices of a LoRA out of those layers of a model, in place, of which nothing trains.

    trained: canonical names.
    """
    inner = _inner(model)
    prefix = "encoder." if isinstance(model, PooledClassifier) else ""
    left = lora.keep(inner, [name.removeprefix(prefix) for name in trained])
    if left is not None:
        config = dict(inner.zofed_adapter.config) | {"target_modules": left}
        inner.zofed_adapter = replace(inner.zofed_adapter, config=config)


def described(model: nn.Module) -> str:
    """A line for people on a model's adapter; empty where it has none."""
    if (adapted := of(model)) is None:
        return ""
    own = names(model)
    count = sum(tensor.numel() for name, tensor in named_parameters(model).items() if name in own)
    return f"adapter: {adapted.kind.described(_inner(model), adapted.config)}: {count:,} parameters"


def check_same(wanted: Wanted, usual: Wanted, saved: Folder) -> None:
    """Raise UserError where settings speak of another adapter than the folder that is trained on. usual: defaults."""
    if wanted.type != saved.type:
        raise UserError(
            f"adapter = {wanted.adapter!r} is given, but {saved.where} holds one of the type {saved.type}: set adapter "
            f"to {adapter_files.setting_of(saved.config)} to go on with it"
        )
    given, default, there = wanted.values(), usual.values(), type(wanted).saved(saved.config)
    for key, value in given.items():
        if value not in (default[key], there[key]):
            shown = ", ".join(sorted(there[key])) if isinstance(there[key], set) else there[key]
            remedy = ", or set adapter to none to add this adapter to its base and train the whole"
            raise UserError(
                f"{key} is given, but {saved.where} has {shown}, which a run that goes on with it keeps: leave {key} "
                f"out{remedy if saved.type == 'LORA' else ''}"
            )


def _set(model: Any, folder: Folder, base: str) -> None:
    """Give an adapter, and the heads beside it, the values that a folder holds."""
    tensors, told = folder.tensors()
    if told and told != base:
        raise UserError(
            f"{folder.where} was trained on a base of SHA-256 {told[:16]}..., but {folder.base!r} has {base[:16]}...: "
            f"write where its own base lies into base_model_name_or_path of its {adapter_files.CONFIG}"
        )
    own: dict[str, Tensor] = _KINDS[folder.type].tensors(model)
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
