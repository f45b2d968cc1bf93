"""What a loss may silently do to zeroth-order slopes, looked for before the first of them is measured.

A slope is a small difference of two losses. It is right only where the loss is a function of the weights alone: the
same number at the same weights, weights and buffers left as they were, and for a perturbed copy the number it has at
shifted weights. Two passes at the present weights show the first two, one at shifted weights and a batched one the
third.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.core import directions, perturbed, refusals
from zofed.core.directions import Factors
from zofed.core.estimators import SIZE_FLOOR, Parameters, bound_loss, unused
from zofed.core.observed_pass import ObservedPass, random_state
from zofed.core.perturbed import CannotBatch, Loss

BLOCK = 2**16  # entries that are summed up together: what is computed of them stays in the cache
SHIFTED = 2**20  # entries of each tensor that are shifted at most
ALL_SHIFTED = 2**23  # and about so many of all: what is saved of them is little beside a large model
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
    call = bound_loss(loss, examples, 0)
    everything = dict(model.named_parameters())
    weights = {name: checksum(parameter) for name, parameter in everything.items()}
    saved, states = persistent_buffers(model), [_buffers(model)]
    runs: list[ObservedPass] = []
    try:
        for _ in range(2):
            runs.append(ObservedPass(model, call))
            if not math.isfinite(runs[-1].value):
                return Base(runs[-1].value, 0.0, False)
            states.append(_buffers(model))
        if written := [name for name, parameter in everything.items() if checksum(parameter) != weights[name]]:
            raise refusals.written(model, written[0], "changes", "its value is lost, so load the module anew, and ")
        since = {name: states[0 if name in saved else 1] for name in states[2]}
        if moved := [name for name, now in states[2].items() if not _same(since[name].get(name), now)]:
            raise refusals.moved(
                model, moved, is_once=all(_same(states[1].get(name), states[2][name]) for name in moved)
            )
        first, second = runs
        coarsest = max(first.coarsest, second.coarsest)
        is_coarse = coarsest >= COARSE or torch.get_float32_matmul_precision() != "highest"
        tolerance = (COARSE_ROUNDING if is_coarse else ROUNDING) * max(abs(first.value), abs(second.value))
        _refuse_draws(model, first, second, tolerance)
    except BaseException:
        _restore(model, states[0])
        raise
    if idle := unused(second.seen, loss, parameters, examples):
        raise refusals.never_used(model, parameters, idle)
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
    call = bound_loss(loss, examples, 0)
    factors = _direction(parameters)
    share = COARSE_SHARE if base.is_coarse else SHARE
    drawn_before = random_state(())
    change, step = 0.0, STEPS[0]
    for step in STEPS:
        with _shifted(parameters, factors, step):
            run = ObservedPass(model, call)
        change = run.value - base.value
        if drawn := run.drawn_since(drawn_before):
            raise refusals.draws(model, drawn, "at shifted weights")
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


def _refuse_draws(model: nn.Module, first: ObservedPass, second: ObservedPass, tolerance: float) -> None:
    values = f"{first.value:.8g}, then {second.value:.8g} at the same weights"
    if drawn := second.drawn_since(first.state):
        raise refusals.draws(model, drawn, values)
    if abs(first.value - second.value) > tolerance:
        raise UserError(
            f"the loss is another at each pass ({values}), so that slopes of it would be noise: it reads another batch "
            "at each call, or draws from a generator of its own; take the batch and draw before asking, so that all "
            "passes of a step see the same, or hand each query its own with examples"
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


def checksum(tensor: Tensor) -> int:
    """64 bits of the bits of a tensor, computed where it lies: a change of any one entry changes them."""
    flat = tensor.detach().contiguous().reshape(-1)
    width = next(width for width in (8, 4, 2, 1) if flat.element_size() % width == 0)
    bits = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width])
    odd = torch.arange(BLOCK, device=bits.device) * 0x1E3779B97F4A7C15 | 1  # wraps: odd factors, all different
    sums = [(block.to(torch.int64) * odd[: len(block)]).sum() for block in bits.split(BLOCK)]
    return hash(tuple(torch.stack(sums).tolist()))


def _direction(parameters: Parameters) -> dict[str, Factors]:
    """Factors of one direction in proportion to the weights, non-zero in about SHIFTED entries of a tensor at most, and
    ALL_SHIFTED of all matrices.

    (1, 1, rows) and (1, 1, columns) of a matrix, (1, 1, entries) of a vector. Every row has its share, so that each
    token's embedding moves.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    of_all = -(-sum(parameter.numel() for parameter in parameters.values()) // ALL_SHIFTED)
    found = dict[str, Factors]()
    for name, (*first, last) in directions.draw("rank1", [SEED], shapes):
        parameter = parameters[name].detach()
        stride = max(of_all, -(-parameter.numel() // SHIFTED)) if first else 1
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
