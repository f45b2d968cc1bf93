"""What a module's weights are measured by, slopes and gradients; the weights are afterwards what they were."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from zofed.base import arithmetic
from zofed.core import kinds, refusals, soundness
from zofed.core.estimators import Estimate, FiniteDifference, Parameters, Points, Split
from zofed.core.perturbed import CannotBatch, Loss, Unseen

LARGEST_ROUNDING = 0.1  # share of a slope that the resolution of the losses may have

Update = dict[str, Tensor]  # a first-order step's gradient or a guide, by parameter name
T = TypeVar("T")


class Measure:
    """Measures losses around a module's present weights. No method changes them: a replica's `apply` alone does.

    parameters: those that train, by canonical name. kind: of the directions. sizes: what multiplies each parameter's
    direction, 1 where absent. Remembers of the module what needs finding out only once: whether a loss is a function of
    the weights alone, and whether it can run for many perturbed copies at once.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        kind: kinds.Kind,
        sizes: Mapping[str, float] | None = None,
    ) -> None:
        self._model, self._parameters, self._kind, self._sizes = model, parameters, kind, sizes
        self._batches, self._warned = kinds.terms(kind) > 0, False
        self._sound: tuple[Any, ...] = ()  # signature of the loss that was last found sound
        self._is_coarse = False  # whether the passes of that loss are
        self._rough: float | None = None  # its `roughness`, once measured

    def slopes(
        self,
        loss: Loss,
        seeds: Sequence[int],
        epsilon: float,
        perturbations_per_pass: int,
        points: Points = "two-point",
        examples: Any = None,
        split: Split | None = None,
    ) -> Estimate:
        """Slopes of `loss` along the seeds' directions; the weights are afterwards what they were, bit for bit.

        examples: one batch for every seed, handed to `loss`; None: all share the batch that `loss` holds. A loss that
        cannot run for many copies at once is measured one direction after the other, which is said once. split:
        measures shares of the queries in several places; None: all here.
        """
        arithmetic.warn_if_not_reproducible()
        how = FiniteDifference(self._kind, epsilon, points, perturbations_per_pass, self._sizes)

        def run(batched: bool) -> Estimate:
            own = replace(how, roughness=self._roughness_once(how, loss, seeds[0], examples, batched))
            found = own.slopes(loss, self._parameters, seeds, examples, batched=batched, split=split)
            return self._guarded(found, epsilon)

        return self.batched_or_not(run, loss, examples)

    def roughness(
        self, how: FiniteDifference, loss: Loss, seed: int, examples: Any = None, *, batched: bool = True
    ) -> float:
        """How far losses lie off a smooth curve where passes run in 16 bits or TF32; 0 where they are exact.

        Of a loss that `check` has looked at. Nine passes, or two of many copies.
        """
        if not self._is_coarse:
            return 0.0
        return how.measured_roughness(loss, self._parameters, seed, examples, batched=batched)

    def _roughness_once(self, how: FiniteDifference, loss: Loss, seed: int, examples: Any, batched: bool) -> float:
        """The same, at the first slopes of each kind of loss."""
        if self._rough is None:
            self._rough = self.roughness(how, loss, seed, examples, batched=batched)
        return self._rough

    def batched_or_not(self, run: Callable[[bool], T], loss: Loss, examples: Any = None) -> T:
        """`run(True)`, or `run(False)` where the loss cannot run for many perturbed copies at once, which is said once.

        Raises UserError for a loss that is no function of the weights alone, see `check`.
        """
        self.check(loss, examples)
        if self._can_batch(loss):
            try:
                return run(True)
            except CannotBatch as reason:
                self._cannot_batch(reason)
            except Unseen as unused:  # by this batch, though the first one used it
                raise refusals.never_used(self._model, self._parameters, unused.names) from unused
        return run(False)

    def check(self, loss: Loss, examples: Any = None, *, batched: bool = True) -> None:
        """Find out, at a loss's first measurement, whether slopes of it mean anything; a few forward passes, once.

        Once for the loss's code, and again where `train()` or `eval()` was called since. Raises UserError for a loss
        that draws random numbers, changes weights or buffers, or never uses some parameter. One whose batched passes
        give another loss than shifted weights do is from then on measured one direction after the other. batched:
        whether it will run batched at all.
        """
        signature = soundness.signature(self._model, loss)
        if signature == self._sound:
            return
        base = soundness.check_repeats(self._model, self._parameters, loss, examples)
        if not math.isfinite(base.value):
            return
        try:
            soundness.check_shifted(
                self._model, self._parameters, loss, base, examples, batched=batched and self._can_batch(loss)
            )
        except CannotBatch as reason:
            self._cannot_batch(reason)
        self._sound, self._is_coarse, self._rough = signature, base.is_coarse, None

    def _can_batch(self, loss: Loss) -> bool:
        """Whether copies may share a pass; a loss that knows better says so itself, by an attribute `batches`."""
        return self._batches and getattr(loss, "batches", True)

    def _cannot_batch(self, reason: CannotBatch) -> None:
        self._batches = False
        warnings.warn(
            f"the loss cannot run for many perturbed copies at once ({reason}): each direction is written into "
            "the weights instead, which takes longer and the memory of a second copy of what trains",
            stacklevel=4,
        )

    def _guarded(self, estimate: Estimate, epsilon: float) -> Estimate:
        """The estimate; a word, once, where the losses' own resolution drowns the slopes, or all of them are zero."""
        if LARGEST_ROUNDING < estimate.rounding < inf and not self._warned:
            self._warned = True
            wanted = LARGEST_ROUNDING if self._is_coarse else 0.01  # less takes steps that leave the tangent
            warnings.warn(
                f"with epsilon = {epsilon:g} the losses differ by little more than their own rounding, about "
                f"{estimate.rounding:.0%} of a slope: set epsilon to {epsilon * estimate.rounding / wanted:.0e} or so",
                stacklevel=3,
            )
        if estimate.rounding == inf and not self._warned and len(estimate.slopes) > 1:
            self._warned = True
            warnings.warn(
                f"the loss is the same at all shifted weights, so that nothing moves: raise epsilon = {epsilon:g} "
                "(a loss that moves in steps and passes in 16 bits round smaller shifts away)",
                stacklevel=3,
            )
        return estimate

    def gradient(self, loss: Callable[[], Tensor]) -> tuple[Update, float]:
        """Gradient of `loss` by backpropagation, and the loss."""
        value = loss()
        gradients = torch.autograd.grad(value, list(self._parameters.values()), allow_unused=True)
        update = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for (name, parameter), gradient in zip(self._parameters.items(), gradients, strict=True)
        }
        return update, float(value.detach())
