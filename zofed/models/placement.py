"""One model whose layers lie on several devices, so that its weights need not fit on one: placement = auto.

Which layer lies where says the library accelerate, by the sizes of all and by what is free. A tensor that a layer is
called with is brought to the layer's device; the model's outputs come back to where its inputs were. Parameters stay
the objects they were: a replica moves them wherever they lie.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zofed.base.errors import UserError
from zofed.base.texts import said_by
from zofed.core import directions
from zofed.core.deferred_logits import Logits
from zofed.core.devices import input_device
from zofed.models import scopes, virtual_tokens
from zofed.models.classifier import PooledClassifier

STEPS = 200  # into which a model's size is divided where shares are weighed
ROOM = 0.2  # share of what is free on a device that stays for passes and for an optimizer's moments


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's parts lie. parts: devices by the names of modules and parameters; "" is the whole model."""

    parts: Mapping[str, torch.device]

    def device_of(self, name: str) -> torch.device:
        """Of a module or tensor, by its name in the model."""
        steps = name.split(".")
        found = (".".join(steps[:count]) for count in range(len(steps), -1, -1))
        return next(self.parts[part] for part in found if part in self.parts)


def over(
    model: nn.Module, devices: Sequence[torch.device], free: Sequence[int], rounded: Mapping[str, float] | None = None
) -> Placement:
    """Where the layers of a model go: in their order, so that the devices hold about as much of it each.

    free: bytes on each device. rounded: bytes an entry of the parameters that will be held in fewer bits, by canonical
    name. On one device all lies there, whatever is free. Raises UserError where the model does not fit, or accelerate
    is missing.
    """
    if len(devices) == 1:
        return Placement({"": devices[0]})
    library = _library()
    fewer = _types(library, model, rounded or {})
    room, whole = [int(size * (1 - ROOM)) for size in free], sorted(_kept_whole(model))

    def within(limit: int) -> dict[str, int] | None:
        """The number of each part's device, none of which holds more than that; None: some part has no place."""
        # On the first device accelerate keeps room for layers that it would load from other memory: an empty one.
        limits = {number: min(limit, size) for number, size in enumerate((0, *room))}
        found = library.infer_auto_device_map(model, limits, whole, special_dtypes=fewer, clean_result=False)
        return None if "disk" in found.values() else found

    size = library.utils.compute_module_sizes(model, special_dtypes=fewer)[""]
    low, high = int(size / len(devices)), max(room)
    parts = within(high)
    if parts is None:
        raise UserError(
            f"placement = 'auto': the model takes {_gb(size)}, but of the {_gb(sum(free))} that are free on "
            f"{len(devices)} devices {_gb(sum(room))} may be filled, the rest being for the passes: hold it in fewer "
            "bits (dtype = bfloat16, or quantisation), take a smaller model, or free the devices"
        )
    while high - low > size / STEPS:  # the least that each must hold, so that all have about as much room for passes
        middle = (low + high) // 2
        if found := within(middle):
            parts, high = found, middle
        else:
            low = middle
    return Placement(_together(model, {name: devices[number - 1] for name, number in parts.items()}))


def bring(model: nn.Module, placement: Placement) -> None:
    """Move a model's tensors to where they belong, in place, and what its parts are called with behind them.

    Call it once. Raises UserError where the model's own code brings tensors of different devices together, and for
    virtual tokens in a model whose layers are not known.
    """
    if len(devices := set(placement.parts.values())) == 1:
        nn.Module.to(model, devices.pop())
        return
    ran = scopes.runs(model)
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:  # a tied one twice, to one device
                tensor.data = tensor.data.to(placement.device_of(f"{path}.{name}" if path else name))
    for name, device in placement.parts.items():
        for module in _called(model, name) if name else ():
            module.register_forward_pre_hook(partial(_arriving, device), prepend=True, with_kwargs=True)
    first = input_device(model)
    model.register_forward_pre_hook(partial(_starting, first, _output_device(model)), prepend=True, with_kwargs=True)
    model.register_forward_hook(partial(_returning, first))
    virtual_tokens.place(model, [_device(layer) for layer in scopes.layers(model)])
    if ran and not scopes.runs(model):
        raise UserError(
            f"placement = 'auto': code of {type(model).__name__} does not run with its layers on different devices: "
            "set placement to none, and dtype or quantisation so that the model fits one"
        )


def described(model: nn.Module) -> str:
    """A line for people: how many layers lie where; of a model whose layers are not known, how much of it."""
    sizes: Counter[str] = Counter()
    for tensor in model.parameters():
        sizes[str(tensor.device)] += tensor.nbytes
    parts = [f"{_gb(size)} on {device}" for device, size in sorted(sizes.items())]
    if layers := scopes.layers(model):
        counts = Counter(str(_device(layer)) for layer in layers)
        parts = [f"{counts[device]} on {device}" for device in sorted(sizes)]
        first, where = next(iter(sorted(sizes))), parts[0].partition(" ")[2]
        parts[0] = f"{counts[first]} layer{'s' * (counts[first] != 1)} {where}"
    return f"placement: {', '.join(parts)}{', which holds all of the model' if len(parts) == 1 else ''}"


def _arriving(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _moved(args, device), _moved(kwargs, device)


def _starting(first: torch.device, last: torch.device, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Labels meet the logits where these are made: not every model of the library brings them together itself."""
    return _moved(args, first), {key: _moved(kwargs[key], last if key == "labels" else first) for key in kwargs}


def _returning(device: torch.device, _: nn.Module, __: Any, found: Any) -> Any:
    return _moved(found, device)


def _output_device(model: nn.Module) -> torch.device:
    """Where a model's logits are made: by its output embeddings, which may be its input's, or by its last parameter."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return _device(output) if isinstance(output, nn.Module) else list(model.parameters())[-1].device


def _moved(value: Any, device: torch.device) -> Any:
    """Nested arguments with all tensors on a device; keys and values of earlier tokens stay with their layers."""
    return pytree.tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor | Logits) and leaf.device != device else leaf, value
    )


def _called(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules of a part that are called as a whole: of a list those that it holds."""
    parent, _, own = name.rpartition(".")
    part = getattr(model.get_submodule(parent), own) if name else model
    if isinstance(part, nn.ModuleList):
        for number in range(len(part)):
            yield from _called(model, f"{name}.{number}")
    elif isinstance(part, nn.Module):
        yield part


def _together(model: nn.Module, parts: Mapping[str, torch.device]) -> dict[str, torch.device]:
    """The parts, of which those with buffers alone, such as tables of positions, lie with the first that has
    parameters, and those that share a tensor with an earlier one lie with that. What is named in none lies with the
    first, too; parts without tensors run wherever they are called.
    """

    def owners(names: Iterable[str]) -> set[str]:
        known = [f"{name}." for name in names]
        return {part for part in parts if any(name.startswith(f"{part}.") for name in known)}

    with_parameters = owners(name for name, _ in model.named_parameters(remove_duplicate=False))
    with_buffers = owners(name for name, _ in model.named_buffers()) - with_parameters
    first = next(device for name, device in parts.items() if name in with_parameters)
    found = {"": first} | {name: device for name, device in parts.items() if name in with_parameters}
    found |= dict.fromkeys(with_buffers, first)
    begins: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if begins.setdefault(id(tensor), name) != name:
            place = Placement(found).device_of(begins[id(tensor)])
            if Placement(found).device_of(name) != place:
                found[name.rpartition(".")[0]] = place
    return found


def _kept_whole(model: nn.Module) -> set[str]:
    """Names of the classes whose modules lie on one device: the library's list, layers, and what holds no layers."""
    inner = model.encoder if isinstance(model, PooledClassifier) else model
    named: Collection[str] = getattr(inner, "_no_split_modules", None) or ()
    layers = {*named, *(type(layer).__name__ for layer in scopes.layers(model))}
    of_layers = [module for module in model.modules() if type(module).__name__ in layers]
    inside = {id(part) for module in of_layers for part in module.modules()}
    above = {id(module) for module in model.modules() if any(id(part) in inside for part in module.modules())} - inside

    def beside(module: nn.Module) -> Iterator[str]:
        for child in module.children():
            if id(child) in above or isinstance(child, nn.ModuleList | nn.Sequential):
                yield from beside(child)
            else:
                yield type(child).__name__

    return {*layers, *(beside(model) if layers else ())}


def _types(library: ModuleType, model: nn.Module, rounded: Mapping[str, float]) -> dict[str, Any]:
    """Types as large as the entries will be, as accelerate takes them: by names in the model."""
    sizes = {1.0: torch.int8, 0.5: library.utils.CustomDtype.INT4}
    names = {name: directions.canonical_name(name) for name, _ in model.named_parameters()}
    return {name: sizes[rounded[known]] for name, known in names.items() if known in rounded}


def _library() -> ModuleType:
    try:
        import accelerate
        import accelerate.utils
    except ImportError as error:
        raise UserError(
            f"placement = 'auto', but accelerate is not installed ({said_by(error)}): pip install accelerate, or set "
            "placement to none"
        ) from error
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # what does not fit is said here
    return accelerate


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
