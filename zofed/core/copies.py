"""What `torch.vmap` refuses a pass of many copies, granted where it is the same for all of them.

A loss may read numbers out of its tensors: whether any document is padded, how many tokens an expert gets, which
entries a mask picks. For many copies at once there is no such number, unless all of them agree on it. Where they do
not, `Differ` says which ones do, and they run as passes of their own.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from zofed.core.deferred_logits import copies_first

# What gives Python a number or a truth of a tensor. Of floating point it is left alone: copies would never agree.
_READS = ("__bool__", "__int__", "__index__", "__contains__", "item", "tolist", "numpy", "is_nonzero", "equal")

_OPERATORS = ("__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor", "pow")))


class Differ(Exception):  # noqa: N818, a property of the copies
    """The copies of a pass do not agree on a number that the loss reads. groups: positions of those that do."""

    def __init__(self, groups: Sequence[list[int]]) -> None:
        super().__init__()
        self.groups = groups


class NeedsOwn(Exception):  # noqa: N818, a property of the loss
    """The loss writes one copy's values into a tensor that all copies share."""


class Copies:
    """Answers calls of torch for the copies of one pass.

    like: any tensor that differs from copy to copy. owns: every tensor the loss makes is made once for each copy, so
    that it can be written into; that takes memory, so it is off until a pass raised NeedsOwn.
    """

    def __init__(self, like: Tensor, owns: bool) -> None:
        self._mark = like.flatten()[0] == 0
        self._owns = owns

    def call(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """func(*args, **kwargs). Raises Differ, NeedsOwn, or what torch.vmap raises."""
        name = getattr(func, "__name__", "")
        if name == "requires_grad_":
            return args[0]  # of a pass there is no gradient to ask for
        if name in _READS:
            args, kwargs = self._agreed(args), self._agreed(kwargs)
            return func(*args, **kwargs)
        writes = _writes(name)
        try:
            value = func(*args, **kwargs)
        except RuntimeError as error:
            if writes and not self._owns and not _is_batched(args[0]) and any(map(_is_batched, args[1:])):
                raise NeedsOwn from error
            first = args[:1] if writes else self._agreed(args[:1])
            rest, named = self._agreed(args[1:], numbers=True), self._agreed(kwargs, numbers=True)
            if [*map(id, _leaves((first, rest, named)))] == [*map(id, _leaves((args[:1], args[1:], kwargs)))]:
                raise
            return func(*first, *rest, **named)
        if self._owns and isinstance(value, Tensor) and _makes(name, args, kwargs):
            return torch.where(self._mark.to(value.device), value, value)
        return value

    def _agreed(self, value: Any, numbers: bool = False) -> Any:
        """Arguments with every tensor of integers or truths replaced by the one that all copies have in common.

        numbers: a tensor of a single integer becomes a Python number.
        """
        if isinstance(value, slice):
            return slice(*(self._agreed(part, numbers) for part in (value.start, value.stop, value.step)))
        if isinstance(value, list | tuple):
            return type(value)(self._agreed(item, numbers) for item in value)
        if isinstance(value, dict):
            return {key: self._agreed(item, numbers) for key, item in value.items()}
        if type(value) is not Tensor or value.is_floating_point() or value.is_complex():
            return value
        found = _values(value)
        if found is None or bool((found == found[:1]).all()):
            one = value if found is None else found[0]
            return one.item() if numbers and not one.dim() and one.dtype != torch.bool else one
        rows = found.reshape(len(found), -1)
        groups: dict[bytes, list[int]] = {}
        for position, row in enumerate(rows.cpu().numpy()):
            groups.setdefault(row.tobytes(), []).append(position)
        raise Differ(list(groups.values()))


def _writes(name: str) -> bool:
    """Whether a method of this name changes its tensor."""
    return name in _OPERATORS if name.endswith("__") else name.endswith("_")


def _makes(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call of this name makes a tensor that nobody else holds, to be written into perhaps."""
    if name.endswith("_like") or name.startswith("new_") or name == "clone":
        return True
    return not any(isinstance(leaf, Tensor) for leaf in _leaves((args, kwargs)))


def _leaves(value: Any) -> list[Any]:
    """All that nested arguments hold, slices taken apart."""
    parts = ((x.start, x.stop, x.step) if isinstance(x, slice) else (x,) for x in pytree.tree_leaves(value))
    return [part for some in parts for part in some]


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and _values(value) is not None


def _values(tensor: Tensor) -> Tensor | None:
    """The tensors of all copies, (copies, ...); None where all share one."""
    found = _Found()
    _Seen.apply(tensor.detach(), found)
    return found.values


class _Found:
    values: Tensor | None = None


class _Seen(torch.autograd.Function):
    """Its rule for vmap is given the tensors of all copies."""

    @staticmethod
    def forward(tensor: Tensor, found: _Found) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # used without gradients only

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int | None]:
        tensor, found = args
        found.values = copies_first(tensor, in_dims[0], info.batch_size)
        return tensor.view_as(tensor), in_dims[0]


class _Context:
    """Stands in for what a custom function keeps for its backward pass, where there will be none."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor) -> None: ...
    def mark_dirty(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def run_forward(function: type[torch.autograd.Function], args: Sequence[Any], kwargs: Any) -> Any:
    """What a custom function gives, without a backward pass: its own operations, which vmap can see through."""
    if function.setup_context is not torch.autograd.Function.setup_context:
        return function.forward(*args, **kwargs)
    return function.forward(_Context(len(args)), *args, **kwargs)


def has_rule(function: type[torch.autograd.Function]) -> bool:
    """Whether a custom function says itself how it runs under vmap."""
    return function.generate_vmap_rule or function.vmap is not torch.autograd.Function.vmap


_ORIGINAL = torch.autograd.Function.__dict__["apply"]  # a classmethod
_USERS: list["CustomFunctions"] = []  # of all threads
_LOCK = threading.Lock()


class _Here(threading.local):
    hook: Callable[..., Any] | None = None


_HERE = _Here()


class CustomFunctions:
    """While active in a thread, `apply` of every custom autograd function is asked of `hook` there.

    hook: of the original `apply`, the function's class, args, kwargs. Torch's modes do not see `Function.apply`, so it
    is replaced meanwhile; other threads notice nothing of it.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook, self._before = hook, None

    def __enter__(self) -> None:
        with _LOCK:
            _USERS.append(self)
            torch.autograd.Function.apply = classmethod(_apply)  # type: ignore[method-assign,assignment]
        self._before, _HERE.hook = _HERE.hook, self._hook

    def __exit__(self, *_: Any) -> None:
        _HERE.hook = self._before
        with _LOCK:
            _USERS.remove(self)
            if not _USERS:
                torch.autograd.Function.apply = _ORIGINAL  # type: ignore[method-assign]


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    original = _ORIGINAL.__get__(None, function)
    return _HERE.hook(original, function, args, kwargs) if _HERE.hook else original(*args, **kwargs)
