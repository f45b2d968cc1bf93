"""How much memory a step takes in each mode, from watching its passes on tensors that have shapes and no storage.

What stays (weights, optimizer state) has exact sizes. What comes and goes is watched: the very functions of a step run
under torch's FakeTensorMode, so that a model of any size costs a second and no memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from zofed.base.errors import UserError
from zofed.config import Settings, in_mode
from zofed.core import directions, kinds, metrics, perturbed
from zofed.core.digests import named_parameters
from zofed.core.optimizers import Optimizer
from zofed.core.pass_memory import bytes_of, peak_bytes
from zofed.core.perturbation_mode import in_pieces
from zofed.core.replica import BLOCK
from zofed.core.subspace import frozen
from zofed.training.measurements import backprop_batch_size
from zofed.training.modes import MODES, Passes
from zofed.training.tasks import TASKS

EVALUATED_TOGETHER = 32  # examples; what metrics.evaluate takes at once


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one mode: weights and the optimizer's state stay, `step` comes and goes, `evaluation` between steps.

    step: the most that a step's passes, its gradient and its move hold at once, beside weights and state.
    """

    weights: int
    state: int
    step: int
    evaluation: int

    @property
    def peak(self) -> int:
        """The most a step holds."""
        return self.weights + self.state + self.step


def footprints(
    outline: nn.Module, settings: Settings, trainable: Sequence[str], orthogonal: Sequence[str], modes: Sequence[str]
) -> dict[str, Footprint]:
    """What each of `modes` takes for a model on the meta device, which loses its tensors to ones of FakeTensorMode.

    trainable: names of the parameters that train; orthogonal: those that mudamw orthogonalises. Let W be the weights,
    S the optimizer's state, G a gradient (all that trains, in its own type), F and B what a zeroth-order pass and a
    backpropagation hold besides, B with its gradient, M what moving the weights holds:

    zo          W + S + max(F, M); directions that are written into the weights need a copy of what trains as well
    fo          W + S + max(B, G + M); a client's own steps: with the weights they began at, the state of the client's
                optimizer, and what it sends in the place of G, if that is more
    instruct    as fo, or as zo with a saved copy of what trains and a gradient as guide, whichever takes more, with 2 S
                where plain steps come between the guided ones
    calibrate   W + 2 S + the larger step of the two: an optimizer for either kind of step
    subspace    W + max(backpropagation to the subspace's coefficients, M): no gradient of weights, no state for them
                but the rounds' momentum
    """
    if unknown := [mode for mode in modes if mode not in MODES]:
        raise UserError(f"unknown mode {unknown[0]!r}: known are {', '.join(MODES)}")
    with FakeTensorMode(allow_non_fake_inputs=True):  # directions are drawn as real integers
        _without_storage(outline)
        everything = named_parameters(outline)
        parameters: dict[str, Tensor] = {name: everything[name] for name in trainable}
        for name, parameter in everything.items():
            parameter.requires_grad_(name in parameters)
        loss = _loss(outline, settings, settings.batch_size, settings.forward_dtype)
        evaluation = peak_bytes(_evaluation(outline, settings))
        whole, gradient = sum(map(bytes_of, everything.values())), sum(map(bytes_of, parameters.values()))
        in_float32 = sum(4 * parameter.numel() for parameter in parameters.values())

        @cache  # watched when first wanted: backpropagation through the largest models takes a second of its own
        def forward() -> int:
            return _forward(loss, parameters, settings)

        @cache
        def backward(examples: int) -> int:
            own = _loss(outline, settings, examples, "weights")
            return peak_bytes(_backward(own, parameters))

        def of_mode(name: str) -> Footprint:
            mode = MODES[name](own := in_mode(settings, name))
            optimizer = Optimizer(own.step_rule, own.momentum, own.weight_decay, own.cautious, frozenset(orthogonal))
            state, move = _state(optimizer, parameters), _move(optimizer, parameters)
            own_state, examples = _state(Optimizer(own.local_optimizer), parameters), backprop_batch_size(own)
            passes = Passes(
                gradient,
                forward=lambda: max(forward(), move),
                backward=lambda: max(backward(examples), gradient + move),
                own_steps=lambda: gradient + own_state + max(backward(examples), gradient + move, in_float32),
                subspace=lambda: max(peak_bytes(_subspace(loss, parameters, settings)), move),
            )
            rounds = in_float32 if own.server_momentum else 0
            kept = rounds if mode.trains_coefficients else state * mode.optimizer_states
            return Footprint(whole, kept, mode.step_bytes(passes), evaluation)

        return {name: of_mode(name) for name in modes}


def _state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> int:
    """S: what an optimizer keeps of all that trains."""
    return sum(bytes_of(kept) for name, one in parameters.items() for kept in optimizer.moments(name, one).values())


def _forward(loss: perturbed.Loss, parameters: Mapping[str, Tensor], settings: Settings) -> int:
    """F: what a zeroth-order pass holds, with the factors of all the directions that are drawn together."""
    steps = (settings.epsilon, -settings.epsilon)[: 2 if settings.finite_difference == "two-point" else 1]
    if kinds.terms(settings.directions):
        drawn = min(settings.queries, perturbed.QUERIES_AT_ONCE)
        asked = min(drawn, -(-settings.perturbations_per_pass // len(steps)))
        seeds, copies = list(range(asked)), settings.perturbations_per_pass
        try:
            one = peak_bytes(lambda: perturbed.losses(loss, parameters, settings.directions, seeds, steps, copies))
        except perturbed.CannotBatch:
            pass  # then a run writes its directions into the weights, too
        else:
            shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
            of_a_query = sum(
                part.numel() for _, own in directions.draw(settings.directions, [0], shapes) for part in own
            )
            return one + (drawn - asked) * of_a_query  # entries of a byte
    copy = sum(map(bytes_of, parameters.values()))
    block = min(BLOCK, max(parameter.numel() for parameter in parameters.values()))
    return copy + max(peak_bytes(torch.no_grad()(loss)), 2 * 4 * block)  # a block's integers and their float32


def _backward(loss: perturbed.Loss, parameters: Mapping[str, Tensor]) -> Callable[[], None]:
    """B: the gradient, and the look whether all of it is finite."""

    def run() -> None:
        for gradient in torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True):
            if gradient is not None:
                torch.isfinite(gradient).all()

    return run


def _subspace(loss: perturbed.Loss, parameters: Mapping[str, Tensor], settings: Settings) -> Callable[[], object]:
    kind = "core" if settings.subspace_variant == "core" else settings.directions
    seeds = list(range(kinds.seeds_needed(kind, settings.subspace_size)))

    def run() -> object:
        coefficients = torch.zeros(settings.subspace_size, requires_grad=True)
        with frozen(parameters):
            return torch.autograd.grad(perturbed.along(loss, parameters, kind, seeds, coefficients), coefficients)

    return run


def _evaluation(model: nn.Module, settings: Settings) -> Callable[[], object]:
    loss = _loss(model, settings, min(EVALUATED_TOGETHER, settings.eval_examples), "weights")

    @torch.no_grad()
    def run() -> object:
        with in_pieces():
            return loss()

    return run


def _move(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> int:
    """M: what moving the weights holds at once: a block of a tensor, or the largest that has to move as a whole."""
    name = max(parameters, key=lambda name: (optimizer.needs_whole(name), parameters[name].numel()))
    shape = tuple(parameters[name].shape)
    rows, columns = (shape or (1,))[0], prod(shape[1:])
    at_once = rows if optimizer.needs_whole(name) else min(rows, max(1, BLOCK // max(1, columns)))
    with _disable_current_modes():  # real numbers: some rules look at them
        kept = torch.ones((at_once, *shape[1:]), dtype=parameters[name].dtype)
        trial = Optimizer(
            optimizer.name, optimizer.momentum, optimizer.weight_decay, optimizer.cautious, optimizer.orthogonal
        )
        state = trial.moments(name, kept)

        def run() -> None:
            weight, gradient = kept.to(torch.float32), torch.ones(kept.shape)
            trial.step(name, weight, gradient, state, 1e-3, trial.begin_step())

        return peak_bytes(torch.no_grad()(run))


def _loss(model: nn.Module, settings: Settings, examples: int, forward_dtype: str) -> perturbed.Loss:
    """The loss of a batch of zeros, of the shapes a run has."""
    batch = TASKS[settings.task].blank(examples, settings)
    return lambda: metrics.loss_of(model, batch, forward_dtype)


def _without_storage(model: nn.Module) -> None:
    """Put a tensor of the active FakeTensorMode, as if on the CPU, in the place of each of the model's; ties stay."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old tensor, whose id must not be given away
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    # What trains is said afterwards, and bytes never do.
                    made[id(tensor)] = (nn.Parameter(new, requires_grad=False) if is_parameter else new, tensor)
                if tensor is not None:
                    held[name] = made[id(tensor)][0]  # type: ignore[assignment]
