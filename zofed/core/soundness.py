"""What a loss may silently do to zeroth-order slopes, looked for before the first of them is measured.

A slope is a small difference of two losses. It is right only where the loss is a function of the weights alone: the
same number at the same weights, weights and buffers left as they were, and for a perturbed copy the number it has at
shifted weights. Two passes at the present weights show the first two, one at shifted weights and a batched one the
third.
"""

import itertools
import math
import random
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from zofed.base.errors import UserError
from zofed.core import directions, perturbed
from zofed.core.directions import Factors
from zofed.core.estimators import SIZE_FLOOR, Parameters, asked, scalar, unused
from zofed.core.perturbed import CannotBatch, Loss, Watch

BLOCK = 2**16  # entries that are summed up together: what is computed of them stays in the cache
SHIFTED = 2**20  # entries of each tensor that are shifted at most: what is saved of them is little beside a large model
STEPS = (2.0**-6, 2.0**-3, 1.0)  # relative to the weights; the first that moves the loss by enough decides
SEED = 1  # of the direction along which batched and shifted weights are compared

# What rounding may change in a loss, as a share of it. In float32 64 roundings: a pass on a processor repeats to the
# bit, but sums by atomics (index_add on a GPU) come in any order, and products may depend on where tensors lie. In 16
# bits, or TF32, a sum in another order tips single activations by 2^-8, of which a mean over a batch keeps little.
ROUNDING, COARSE_ROUNDING = 2.0**-17, 2.0**-8
# What batched and shifted weights may differ by, as a share of how far the shift moved the loss. Coarse weights are
# rounded when they are shifted; a use of a parameter that is counted twice or not at all costs more than either.
SHARE, COARSE_SHARE = 0.02, 0.3
COARSE = 2.0**-12  # machine epsilon from which on arithmetic is coarse


@dataclass(frozen=True, slots=True)
class Base:
    """A loss at the present weights, what rounding may change of it, and whether its arithmetic is coarse."""

    value: float
    tolerance: float
    is_coarse: bool


def signature(model: nn.Module, loss: Loss) -> tuple[Any, ...]:
    """What a check holds for: the loss's code, and which modules are in train mode."""
    return (getattr(loss, "__code__", type(loss)), *(module.training for module in model.modules()))


@torch.no_grad()
def check_repeats(model: nn.Module, parameters: Parameters, loss: Loss, examples: Any = None) -> Base:
    """Run the loss twice at the present weights.

    examples: as for `Measure.slopes`; the first query's are read. Raises UserError where the passes differ by more than
    rounding, draw random numbers anew, write into a parameter, change a buffer or never use a parameter; buffers are
    then as before. A buffer that is not saved with the model may be filled by the first pass: such are caches. Where
    the loss is not finite nothing is checked, and `Base.value` says so.
    """
    ask = asked(loss, examples, 0)
    everything = dict(model.named_parameters())
    weights = {name: checksum(parameter) for name, parameter in everything.items()}
    saved, states = persistent_buffers(model), [_buffers(model)]
    runs: list[_Pass] = []
    try:
        for _ in range(2):
            runs.append(_Pass(model, ask))
            if not math.isfinite(runs[-1].value):
                return Base(runs[-1].value, 0.0, False)
            states.append(_buffers(model))
        if written := [name for name, parameter in everything.items() if checksum(parameter) != weights[name]]:
            raise _written(model, written[0], "changes", "its value is lost, so load the module anew, and ")
        since = {name: states[0 if name in saved else 1] for name in states[2]}
        if moved := [name for name, now in states[2].items() if not _same(since[name].get(name), now)]:
            raise _moved(model, moved, is_once=all(_same(states[1].get(name), states[2][name]) for name in moved))
        first, second = runs
        coarsest = max(first.coarsest, second.coarsest)
        is_coarse = coarsest >= COARSE or torch.get_float32_matmul_precision() != "highest"
        tolerance = (COARSE_ROUNDING if is_coarse else ROUNDING) * max(abs(first.value), abs(second.value))
        _refuse_draws(model, first, second, tolerance)
    except BaseException:
        _restore(model, states[0])
        raise
    if idle := unused(second.seen, loss, parameters, examples):
        raise never_used(model, parameters, idle)
    return Base(second.value, tolerance, is_coarse)


@torch.no_grad()
def check_shifted(
    model: nn.Module, parameters: Parameters, loss: Loss, base: Base, examples: Any = None, *, batched: bool
) -> None:
    """Run the loss at shifted weights and, if `batched`, for perturbed copies; the weights are afterwards as before.

    At most SHIFTED entries of each tensor are shifted, so that no second copy of the model is held. Raises UserError
    where the loss draws random numbers there, CannotBatch where the two ways give another loss or the batched one
    cannot run.
    """
    ask = asked(loss, examples, 0)
    factors = _direction(parameters)
    share = COARSE_SHARE if base.is_coarse else SHARE
    random_state = _random_state(())
    change, step = 0.0, STEPS[0]
    for step in STEPS:
        with _shifted(parameters, factors, step):
            run = _Pass(model, ask)
        change = run.value - base.value
        if drawn := run.drawn_since(random_state):
            raise _random(model, drawn, "at shifted weights")
        if not batched or not math.isfinite(change):
            return
        if share * abs(change) > base.tolerance:
            break
    own = None if examples is None else perturbed.each_tensor(examples, lambda tensor: tensor[0])
    here, there = perturbed.losses_along(loss, parameters, factors, (0.0, step), own).to(torch.float64).tolist()
    allowed = max(share * abs(change), base.tolerance)
    if not (abs(here - base.value) <= 8 * allowed and abs(there - here - change) <= allowed):
        raise CannotBatch(
            f"its loss for a perturbed copy is {there:.6g}, at weights shifted alike {base.value + change:.6g}, and at "
            f"the present ones {here:.6g} and {base.value:.6g}"
        )


class _Pass(TorchDispatchMode):
    """One forward pass, and what it did besides.

    value: of the loss. seen: ids of what calls of torch were given. coarsest: largest machine epsilon of a tensor it
    made. draws: operations that drew random numbers, each with the generator it was handed and, if `named`, the module
    around it. Raises UserError before anything is written into a parameter.
    """

    def __init__(self, model: nn.Module, ask: Callable[[], Any], *, named: bool = False) -> None:
        super().__init__()
        self.coarsest = 0.0
        self.draws: list[_Draw] = []
        self._model = model
        self._ask = ask
        self._around: list[tuple[str, nn.Module]] = []
        self._storages = {_storage(parameter): name for name, parameter in model.named_parameters()}
        with self._entered() if named else nullcontext(), Watch() as watch, self:
            value = ask()
        self.seen = watch.seen
        self.value = _number(value)
        self.state = _random_state(draw.generator for draw in self.draws if draw.generator is not None)

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
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name) if argument.kwarg_only or position >= len(args) else args[position]
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and _storage(leaf) in self._storages:
                    how = f"writes ({func.overloadpacket.__name__}) into"
                    raise _written(self._model, self._storages[_storage(leaf)], how)

    def _add_draw(self, func: Any, result: Any, generator: torch.Generator | None, sources: Sequence[Any]) -> None:
        around = self._around[-1] if self._around else ("", None)
        # A data loader draws one 64-bit number for its workers' seeds whenever it is gone through, shuffled or not:
        # what it hands out is seen in the loss.
        is_loader = func is torch.ops.aten.random_.default and result.dtype == torch.int64 and result.dim() == 0
        name = func.overloadpacket.__name__
        self.draws += [_Draw(name, source, generator, *around, is_loader) for source in sources]

    def drawn_since(self, state: Mapping[Any, Any]) -> list["_Draw"]:
        """What drew numbers that the pass which ended in `state` did not draw, by its generators.

        A pass that seeds its generators itself draws the same again, and ends in the same state. Once more is run to
        find the modules where there is any.
        """
        if found := self._drawn_since(state):
            again = _Pass(self._model, self._ask, named=True)
            return again._drawn_since(self.state) or found
        return []

    def _drawn_since(self, state: Mapping[Any, Any]) -> list["_Draw"]:
        found = []
        for key, value in self.state.items():
            if key not in state or _equal(state[key], value):
                continue
            own = [draw for draw in self.draws if draw.source == key]
            if own and all(draw.is_loader for draw in own):
                continue
            found += own or [_Draw(_SOURCES.get(key, "a generator"), key, None, "", None, False)]
        return found


@dataclass(frozen=True, slots=True)
class _Draw:
    """One draw of random numbers: by which operation, from which generator, in which module."""

    operation: str
    source: Any  # key of the generator in `_random_state`
    generator: torch.Generator | None  # that it was handed
    name: str  # of the module around it
    module: nn.Module | None
    is_loader: bool


_SOURCES = {"numpy": "NumPy's generator", "python": "Python's module random", "cpu": "torch's generator"}


def _random_state(generators: Iterable[torch.Generator]) -> dict[Any, Any]:
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


def _refuse_draws(model: nn.Module, first: _Pass, second: _Pass, tolerance: float) -> None:
    values = f"{first.value:.8g}, then {second.value:.8g} at the same weights"
    if drawn := second.drawn_since(first.state):
        raise _random(model, drawn, values)
    if abs(first.value - second.value) > tolerance:
        raise UserError(
            f"the loss is another at each pass ({values}), so that slopes of it would be noise: it reads another batch "
            "at each call, or draws from a generator of its own; take the batch and draw before asking, so that all "
            "passes of a step see the same, or hand each query its own with examples"
        )


def _random(model: nn.Module, drawn: Sequence[_Draw], values: str) -> UserError:
    """What to say of random numbers in a loss. values: where, or what it gave."""
    what = f"the loss draws random numbers at each pass ({values}), so that slopes of it would be noise: "
    inside = {draw.name: draw.module for draw in drawn if draw.module is not None}
    if not inside:
        who = " and ".join(dict.fromkeys(draw.operation for draw in drawn))
        layer = "call model.eval() if one of its layers does that, else " if model.training else ""
        return UserError(
            f"{what}it calls {who}; {layer}draw before asking, so that all passes of a step see the same, "
            "seed it within the loss, or hand each query its own with examples"
        )
    named = [f"{name or 'the model'} ({type(module).__name__})" for name, module in inside.items()]
    more = f" and {len(named) - 3} more" if len(named) > 3 else ""
    if all(module.training for module in inside.values()):
        remedy = "call model.eval(), or set their rates (p, dropout) to 0"
    else:
        operations = ", ".join(dict.fromkeys(draw.operation for draw in drawn))
        remedy = (
            f"they draw ({operations}) in eval mode too, so pass training=self.training to what they call, set its "
            "rate to 0, or seed it in the module's forward"
        )
    return UserError(f"{what}{', '.join(named[:3])}{more}; {remedy}")


def _written(model: nn.Module, name: str, how: str, first: str = "") -> UserError:
    path, _, _ = name.rpartition(".")
    module = model.get_submodule(path)
    limit = getattr(module, "max_norm", None)
    if limit is not None:
        remedy = f"set max_norm = None instead of {limit:g}, which rescales weights while they are read"
    else:
        remedy = "move that out of the forward pass, and use a changed copy of the parameter there"
    return UserError(
        f"a forward pass {how} the parameter {name!r} of {type(module).__name__}, but only a record may move weights, "
        f"or no replay gives them again: {first}{remedy}"
    )


def _moved(model: nn.Module, names: Sequence[str], *, is_once: bool) -> UserError:
    path, _, _ = names[0].rpartition(".")
    module = model.get_submodule(path)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    if is_once:
        remedy = "run the loss once before, so that the buffer is part of what the journal starts from"
    elif module.training:
        remedy = (
            "put that module into eval mode (model.eval() does all), where it reads its buffers and leaves them, or "
            "take one without buffers (a norm without running statistics)"
        )
    else:
        remedy = "move that out of the forward pass, and do it once a step, after apply, outside the module"
    return UserError(
        f"a forward pass changes the buffer {names[0]!r} of {type(module).__name__}{more}: every perturbed pass would, "
        f"and no record tells, so that no replay gives it again; {remedy}"
    )


def check_apart(parameters: Parameters) -> None:
    """Raise UserError where two parameters share memory: each record would move it twice."""
    spans = []
    for name, parameter in parameters.items():
        last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
        if parameter.data_ptr() and last + 1 == parameter.numel():  # of slices with gaps, no ends tell who owns what
            begin = parameter.data_ptr()
            spans.append((str(parameter.device), begin, begin + parameter.nbytes, name))
    for (device, _, end, one), (other_device, begin, _, other) in itertools.pairwise(sorted(spans)):
        if device == other_device and begin < end:
            raise UserError(
                f"the trainable parameters {one!r} and {other!r} lie in the same memory, so that each step would move "
                "it twice: tie them by assigning the parameter itself, not its data, or leave one out of trainable"
            )


def never_used(model: nn.Module, parameters: Collection[str], idle: Collection[str]) -> UserError:
    """What to say of trainable parameters that the loss never used, with the pattern that leaves out just these."""
    names = list(idle)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    what = f"the loss never used the trainable parameters {', '.join(names[:3])}{more}"
    rest = [name for name in parameters if name not in set(names)]
    if not rest:
        return UserError(f"{what}, which are all that train: compute the loss with the model that is trained")
    every = [directions.canonical_name(name) for name, _ in model.named_parameters()]
    return UserError(f"{what}: set scope (trainable, in a script) to '{pattern_of(rest, every)}'")


def pattern_of(names: Collection[str], every: Collection[str]) -> str:
    """A regular expression that is found in just these of all names: in the fewer prefixes of them or of the others."""
    chosen = set(names)
    others = [name for name in every if name not in chosen]
    wanted = [name for name in every if name in chosen]
    yes, no = _prefixes(wanted, others), _prefixes(others, wanted)
    return f"^(?!{'|'.join(no)})" if len(no) < len(yes) else f"^({'|'.join(yes)})"


def _prefixes(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """The shortest dotted prefixes of the names that none of the others begins with, as regular expressions."""
    found = dict[str, None]()
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:count]) + "." for count in range(1, len(parts)))
        head = next((head for head in heads if not any(other.startswith(head) for other in others)), None)
        found[re.escape(head) if head else f"{re.escape(name)}$"] = None
    return list(found)


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved with a model, by name; a shared one once, under its first name."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in passing}


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every buffer."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in before and buffer.shape == before[name].shape and not _same(before[name], buffer):
            buffer.copy_(before[name])


def _same(one: Tensor | None, other: Tensor) -> bool:
    """Whether two tensors are of one type, shape and value; two that are no numbers are equal."""
    if one is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one, other) or checksum(one) == checksum(other)


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def checksum(tensor: Tensor) -> int:
    """64 bits of the bits of a tensor, computed where it lies: a change of any one entry changes them."""
    flat = tensor.detach().contiguous().reshape(-1)
    width = next(width for width in (8, 4, 2, 1) if flat.element_size() % width == 0)
    bits = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width])
    odd = torch.arange(BLOCK, device=bits.device) * 0x1E3779B97F4A7C15 | 1  # wraps: odd factors, all different
    sums = [(block.to(torch.int64) * odd[: len(block)]).sum() for block in bits.split(BLOCK)]
    return hash(tuple(torch.stack(sums).tolist()))


def _storage(tensor: Tensor) -> int:
    """Where a tensor's memory begins; of one without memory of its own a number that no other has."""
    place = tensor.untyped_storage().data_ptr()
    return place or -id(tensor)


def _number(value: Any) -> float:
    """The loss as a number. Raises UserError for what is none."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise UserError(f"the loss is a tensor of shape {tuple(value.shape)}, but must be one number: take its mean")
    try:
        return float(scalar(value))
    except (TypeError, RuntimeError) as error:
        raise UserError(f"the loss is a {type(value).__name__}, but must be one number") from error


def _direction(parameters: Parameters) -> dict[str, Factors]:
    """Factors of one direction in proportion to the weights, non-zero in at most about SHIFTED entries of each tensor.

    (1, 1, rows) and (1, 1, columns) of a matrix, (1, 1, entries) of a vector. Every row has its share, so that each
    token's embedding moves.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = dict[str, Factors]()
    for name, (*first, last) in directions.draw("rank1", [SEED], shapes):
        parameter = parameters[name].detach()
        stride = -(-parameter.numel() // SHIFTED) if first else 1
        some = parameter.reshape(parameter.shape[0], -1)[:, ::stride] if first else parameter
        size = 2.0 ** round(math.log2(float(some.to(torch.float32).square().mean().sqrt()) + SIZE_FLOOR))
        last = last.to(torch.float32) * size
        if first:
            last[..., torch.arange(last.shape[-1]) % stride != 0] = 0.0
        found[name] = (*first, last)
    return found


@contextmanager
def _shifted(parameters: Parameters, factors: Mapping[str, Factors], step: float) -> Iterator[None]:
    """While active, every parameter is shifted by step * its direction; on leaving, every bit is as before."""
    saved: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for name, parameter in parameters.items():
            first, last = factors[name] if len(factors[name]) > 1 else (factors[name][0], torch.ones(1, 1, 1))
            left, right = first[0, 0].to(parameter), last[0, 0].to(parameter)
            columns = right.nonzero()[:, 0]
            before = _columns(parameter, len(right))[:, columns].clone()
            saved.append((parameter, columns, before))
            _write(parameter, len(right), columns, before + left[:, None] * (step * right[columns]))
        yield
    finally:
        for parameter, columns, before in saved:
            _write(parameter, max(1, math.prod(parameter.shape[1:])), columns, before)


def _columns(parameter: Tensor, count: int) -> Tensor:
    return parameter.detach().reshape(-1, count)


def _write(parameter: Tensor, count: int, columns: Tensor, values: Tensor) -> None:
    whole = _columns(parameter, count)  # a copy where the tensor does not lie row by row
    whole[:, columns] = values
    if whole.data_ptr() != parameter.data_ptr():
        parameter.detach().copy_(whole.view(parameter.shape))
