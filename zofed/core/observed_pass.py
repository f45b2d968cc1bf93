"""One forward pass, watched: what it gave, used, wrote into and drew, and how coarse its arithmetic is."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zofed.base.errors import UserError
from zofed.core import refusals
from zofed.core.estimators import scalar
from zofed.core.perturbation_mode import Watch
from zofed.core.refusals import Draw

_SOURCES = {"numpy": "NumPy's generator", "python": "Python's module random", "cpu": "torch's generator"}


class ObservedPass(TorchDispatchMode):
    """One forward pass, and what it did besides.

    value: of the loss. seen: ids of what calls of torch were given. coarsest: largest machine epsilon of a tensor it
    made. draws: operations that drew random numbers, each with the generator it was handed and, if `named`, the module
    around it. Raises UserError before anything is written into a parameter.
    """

    def __init__(self, model: nn.Module, ask: Callable[[], Any], *, named: bool = False) -> None:
        super().__init__()
        self.coarsest = 0.0
        self.draws: list[Draw] = []
        self._model = model
        self._ask = ask
        self._around: list[tuple[str, nn.Module]] = []
        self._storages = {_storage(parameter): name for name, parameter in model.named_parameters()}
        with self._entered() if named else nullcontext(), Watch() as watch, self:
            value = ask()
        self.seen = watch.seen
        self.value = _number(value)
        self.state = random_state(draw.generator for draw in self.draws if draw.generator is not None)

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """While active, every module of the model says when it is entered and left."""
        hooks: list[Any] = []
        try:
            for name, module in self._model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks of Python's
                enter = lambda *_, at=(name, module): self._around.append(at)  # noqa: E731
                hooks.append(module.register_forward_pre_hook(enter))
                hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        self._around.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self._check_writes(func, args, kwargs)
        may_draw, own = torch.Tag.nondeterministic_seeded in func.tags, kwargs.get("generator")
        before = _torch_state(own) if may_draw else {}
        result = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.coarsest = max(self.coarsest, torch.finfo(leaf.dtype).eps)
        if may_draw:
            after = _torch_state(own)  # an attention without dropout leaves the generator as it is
            self._add_draw(func, result, own, [key for key in after if not torch.equal(before[key], after[key])])
        return result

    def _check_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is torch.ops.aten.set_.source_Tensor and _place(args[0]) == _place(args[1]):
            return  # as parametrizations do that come and go within a pass
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and _storage(leaf) in self._storages:
                    how = f"writes ({func.overloadpacket.__name__}) into"
                    raise refusals.written(self._model, self._storages[_storage(leaf)], how)

    def _add_draw(self, func: Any, result: Any, generator: torch.Generator | None, sources: Sequence[Any]) -> None:
        around = self._around[-1] if self._around else ("", None)
        # A data loader draws one 64-bit number for its workers' seeds whenever it is gone through, shuffled or not:
        # what it hands out is seen in the loss.
        is_loader = func is torch.ops.aten.random_.default and result.dtype == torch.int64 and result.dim() == 0
        name = func.overloadpacket.__name__
        self.draws += [Draw(name, source, generator, *around, is_loader) for source in sources]

    def drawn_since(self, state: Mapping[Any, Any]) -> list[Draw]:
        """What drew numbers that the pass which ended in `state` did not draw, by its generators.

        A pass that seeds its generators itself draws the same again, and ends in the same state. Once more is run to
        find the modules where there is any.
        """
        if found := self._drawn_since(state):
            again = ObservedPass(self._model, self._ask, named=True)
            return again._drawn_since(self.state) or found
        return []

    def _drawn_since(self, state: Mapping[Any, Any]) -> list[Draw]:
        found = []
        for key, value in self.state.items():
            if key not in state or _equal(state[key], value):
                continue
            own = [draw for draw in self.draws if draw.source == key]
            if own and all(draw.is_loader for draw in own):
                continue
            found += own or [Draw(_SOURCES.get(key, "a generator"), key, None, "", None, False)]
        return found


def random_state(generators: Iterable[torch.Generator]) -> dict[Any, Any]:
    """State of every generator that all code shares, and of some others."""
    _, words, *rest = np.random.get_state(legacy=True)
    state: dict[Any, Any] = {"python": random.getstate(), "numpy": (np.asarray(words).tobytes(), *rest)}
    return state | _torch_state(*generators)


def _torch_state(*generators: torch.Generator | None) -> dict[Any, Tensor]:
    """State of torch's generators that all code shares, and of some others."""
    state: dict[Any, Tensor] = {"cpu": torch.default_generator.get_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cat(torch.cuda.get_rng_state_all())
    return state | {id(generator): generator.get_state() for generator in generators if generator is not None}


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def _storage(tensor: Tensor) -> int:
    """Where a tensor's memory begins; of one without memory of its own a number that no other has."""
    place = tensor.untyped_storage().data_ptr()
    return place or -id(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """All that says where a tensor's entries lie, and how they are read."""
    return _storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _number(value: Any) -> float:
    """The loss as a number. Raises UserError for what is none."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise UserError(f"the loss is a tensor of shape {tuple(value.shape)}, but must be one number: take its mean")
    try:
        return float(scalar(value))
    except (TypeError, RuntimeError) as error:
        raise UserError(f"the loss is a {type(value).__name__}, but must be one number") from error
