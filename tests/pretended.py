"""Pretended devices: tensors of the processor that say they lie elsewhere, and operations that refuse to mix them.

What a machine with several GPUs would refuse is refused here: an operation whose tensors lie in two places, or a value
that is read into NumPy where it lies on a GPU. Values are those of the processor, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
GPUS = torch.device("cuda:0"), torch.device("cuda:1")

_Disabled = torch._C.DisableTorchFunction
_MAY_MIX = {torch.ops.aten.copy_.default, torch.ops.aten.set_.source_Tensor}
_INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
_READ = ("numpy", "__array__")


def place_of(tensor: Tensor) -> torch.device:
    """Where a tensor says it lies: what was noted at its storage."""
    with _Disabled():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        return CPU if tensor.is_meta else getattr(tensor.untyped_storage(), "pretended", CPU)


def _note(tensor: Tensor, place: torch.device) -> None:
    with _Disabled():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if not tensor.is_meta:
            tensor.untyped_storage().pretended = place  # type: ignore[attr-defined]


class _Refusing(TorchDispatchMode):
    """Below all of torch: what an operation is given lies in one place, and so does what it makes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _INDEXED:  # indices of the processor do everywhere
            given = [leaf for leaf in given if leaf is args[0] or place_of(leaf) != CPU]
        places = {place_of(leaf) for leaf in given if leaf.dim() or place_of(leaf) != CPU}
        if len(places) > 1 and func not in _MAY_MIX:
            raise RuntimeError(f"{func} expects all tensors on one device, but found {sorted(map(str, places))}")
        made = func(*args, **kwargs)
        if places and func not in _MAY_MIX:
            for leaf in pytree.tree_leaves(made):
                if isinstance(leaf, Tensor):
                    _note(leaf, next(iter(places)))
        return made


class Pretending(TorchFunctionMode):
    """Above it: what asks for a device, names one, or moves a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ is Tensor.device:
            return place_of(args[0]) if not args[0].is_meta else torch.device("meta")
        if name == "__get__" and func.__self__ is Tensor.is_cuda:
            return place_of(args[0]).type == "cuda"
        if name == "cpu":
            return _moved(args[0], CPU, {})
        if name == "to" and args and isinstance(args[0], Tensor):
            return _to(*args, **kwargs)
        if name in _READ and place_of(args[0]) != CPU:
            raise TypeError(f"can't convert {place_of(args[0])} device type tensor to numpy")
        if name == "histc":  # for which the library turns integers to numbers on the processor alone
            return func(args[0].float(), *args[1:], **kwargs)
        if name == "new":
            made = func(*args, **kwargs)
            _note(made, place_of(args[0]))
            return made
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type not in ("cpu", "meta"):
            made = func(*args, **kwargs | {"device": "cpu"})
            _note(made, torch.device(wanted))
            return made
        return func(*args, **kwargs)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        rest = {name: value for name, value in kwargs.items() if name in ("copy",)}
        return _moved(tensor, place_of(other), {"dtype": other.dtype} | rest)
    copies = kwargs.pop("copy", False) or (len(args) > 3 and args[3])
    device, dtype, *_ = torch._C._nn._parse_to(*args[:3], **kwargs)
    if device is not None and device.type == "meta":
        return tensor.to("meta")
    options = {} if dtype is None else {"dtype": dtype}
    return _moved(tensor, place_of(tensor) if device is None else device, options | ({"copy": True} if copies else {}))


def _moved(tensor: Tensor, place: torch.device, options: dict[str, Any]) -> Tensor:
    place = torch.device("cuda:0") if place == torch.device("cuda") else place
    before = place_of(tensor)
    made = tensor.to(**options) if options else tensor
    if before == place:
        return made
    if made.requires_grad and torch.is_grad_enabled():
        return _apply(made, place)
    made = made.clone() if made is tensor else made
    _note(made, place)
    return made


class _Move(torch.autograd.Function):
    """A move whose gradient moves back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, place: torch.device) -> Tensor:
        ctx.before = place_of(tensor)
        made = tensor.clone()
        _note(made, place)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        made = gradients[0].clone()
        _note(made, ctx.before)
        return made, None


_apply = _Move.apply  # torch's own, which a perturbation does not see


class _OnlyPretending:
    """In the place of torch._C.DisableTorchFunction: all other modes pause, the pretence goes on."""

    mode: Pretending

    def __enter__(self) -> None:
        self._paused: list[Any] = []
        while torch._C._len_torch_function_stack():
            self._paused.append(_pop_mode())
        _push_mode(self.mode)

    def __exit__(self, *_: Any) -> None:
        _pop_mode()
        while self._paused:
            _push_mode(self._paused.pop())


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While active, `cuda:0` and `cuda:1` are devices, and no operation mixes tensors of them or of the processor."""
    mode, autocast = Pretending(), torch.autocast
    with monkeypatch.context() as patch, _Refusing(), mode:
        patch.setattr(_OnlyPretending, "mode", mode, raising=False)
        patch.setattr(torch._C, "DisableTorchFunction", _OnlyPretending)
        patch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
        patch.setattr(torch, "autocast", lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs))
        yield
