"""How each mode asks: the one difference between the ways to train on a single machine."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from zofed import data, directions, federation, instruct, metrics, schedules, subspace
from zofed.config import WITH_BACKPROP, Settings
from zofed.data import Examples
from zofed.estimators import Split
from zofed.optimizers import Optimizer
from zofed.perturbed import Loss
from zofed.records import Dense, Guided, Seeded, to_integers
from zofed.trainer import Ask, Step, diverged
from zofed.worker import Update, Worker, tensors_digest


def asker(
    settings: Settings,
    worker: Worker,
    examples: Examples,
    total: int,
    backprop_examples: Examples | None = None,
    split: Split | None = None,
) -> Ask:
    """What asks one round of a mode, out of `total`.

    examples: what zeroth order sees; backprop_examples: what backpropagation sees, None: the same. split: measures
    shares of a step's queries in several places (zo).
    """
    steps = Steps(settings, worker, examples, total, backprop_examples or examples, split)
    mode, interval = settings.mode, settings.bp_interval

    def ask(round_: int) -> Step:
        try:
            if mode == "fo" or (mode == "calibrate" and round_ % interval == 0):
                return steps.first_order(round_)
            if mode == "instruct" and (round_ - 1) % interval == 0:
                return steps.guided(round_)
            return steps.in_subspace(round_) if mode == "subspace" else steps.zeroth_order(round_)
        except ValueError as error:
            raise diverged(round_, settings) from error

    return ask


class Steps:
    """Steps of every kind for one worker. All raise ValueError when a loss or a gradient is not finite."""

    def __init__(
        self,
        settings: Settings,
        worker: Worker,
        examples: Examples,
        total: int,
        backprop_examples: Examples,
        split: Split | None,
    ) -> None:
        self.settings, self.worker, self.total, self.split = settings, worker, total, split
        self.examples, self.backprop_examples = examples, backprop_examples

    def zeroth_order(self, round_: int) -> Step:
        """A federated round with this machine as its only client."""
        settings = self.settings
        plan = federation.plan_for(settings, self.worker, self.worker.head, (), client=0)
        measured = federation.measure(self.worker, self.examples, plan, self.split)
        seen = federation.examples_seen(settings)
        return Step(
            record=federation.record_of(settings, self.worker, {0: measured}, self.total),
            loss=measured.loss,
            epoch=self._epoch(round_, seen),
            batch_size=seen,
            forward_passes=measured.forward_passes,
            forward_equivalents=measured.sequences,
            tokens=seen * settings.block_size,
        )

    def first_order(self, round_: int) -> Step:
        """One gradient by backpropagation."""
        settings = self.settings
        update, loss = self._gradient(round_)
        digest = bytes.fromhex(tensors_digest(update)) if settings.keep_gradients else bytes(32)
        passes, size = settings.gradient_accumulation, self._backprop_batch_size()
        return Step(
            record=Dense(round_, schedules.backprop_rate(settings, round_, self.total), digest),
            loss=loss,
            epoch=self._epoch(round_, passes * size, self.backprop_examples),
            batch_size=size,
            update=update,
            forward_passes=passes,
            backward_passes=passes,
            forward_equivalents=3 * passes * size,
            tokens=passes * size * settings.block_size,
        )

    def guided(self, round_: int) -> Step:
        """A gradient by backpropagation, and slopes along the directions that it shapes."""
        settings = self.settings
        gradient, backprop_loss = self._gradient(round_)
        guide = instruct.on_grid(gradient)
        plan = federation.plan_for(settings, self.worker, self.worker.head, (), client=0)
        loss, own_examples = federation.query_loss(self.worker, self.examples, plan)
        found, guidance = instruct.guided(
            self.worker,
            loss,
            guide,
            _shape(settings),
            directions.direction_seeds(self.worker.genesis["seed"], round_, 0, settings.queries),
            round_=round_,
            rate=schedules.backprop_rate(settings, round_, self.total),
            examples=own_examples,
        )
        passes, size = settings.gradient_accumulation, self._backprop_batch_size()
        seen = federation.examples_seen(settings) if found.forward_passes else 0
        per_pass = plan.examples_per_query or plan.batch_size
        return Step(
            record=_clipped(found.record, guidance, settings.clip_norm),
            loss=backprop_loss if math.isnan(found.loss) else found.loss,
            epoch=self._epoch(round_, federation.examples_seen(settings)),
            batch_size=size,
            update=guide,
            forward_passes=passes + found.forward_passes,
            backward_passes=passes,
            forward_equivalents=3 * passes * size + found.forward_passes * per_pass,
            tokens=(passes * size + seen) * settings.block_size,
            facts=dict(guidance.facts),
        )

    def in_subspace(self, round_: int) -> Step:
        """Coefficients of this round's own directions, trained by backpropagation on one batch after the other."""
        settings, worker = self.settings, self.worker
        size, count = settings.subspace_size, settings.subspace_interval
        seeds = directions.direction_seeds(worker.genesis["seed"], round_, 0, size)
        rate = schedules.learning_rate(settings, round_, self.total)
        matrices = frozenset({subspace.NAME}) if worker.kind == "core" else frozenset[str]()
        trained = subspace.trained(
            self._batches(self.examples, round_, count, settings.batch_size),
            worker.parameters,
            worker.kind,
            seeds[: directions.seeds_needed(worker.kind, size)],
            size,
            Optimizer(settings.optimizer, settings.momentum, 0.0, settings.cautious, matrices),
            rate,
            worker.sizes,
        )
        coefficients, exponent = to_integers([-value for value in trained.coefficients])
        # The weights move by rate * the sum / divisor, hence by the coefficients themselves; the decay takes the rate.
        step = rate * count
        # A rate of 0, at which a cosine may end, leaves all of them 0.
        record = Seeded(round_, step, (0,), size, coefficients, exponent, step or 1.0)
        seen = count * settings.batch_size
        return Step(
            record=record,
            loss=trained.loss,
            epoch=self._epoch(round_, seen),
            batch_size=settings.batch_size,
            forward_passes=count,
            backward_passes=count,
            forward_equivalents=3 * seen,
            tokens=seen * settings.block_size,
        )

    def _gradient(self, round_: int) -> tuple[Update, float]:
        """Mean gradient over the round's backprop batches, clipped, and the mean loss."""
        settings = self.settings
        losses = self._batches(
            self.backprop_examples, round_, settings.gradient_accumulation, self._backprop_batch_size()
        )
        update, total = self.worker.gradient(losses[0])
        for loss in losses[1:]:
            further, value = self.worker.gradient(loss)
            total += value
            for name, tensor in further.items():
                update[name].add_(tensor)
        norm = math.sqrt(sum(float(torch.dot(flat, flat)) for flat in (t.flatten() for t in update.values())))
        if not math.isfinite(total) or not math.isfinite(norm):
            raise ValueError(f"loss {total}, norm of the gradient {norm}")
        share = 1.0 / len(losses)
        if 0.0 < settings.clip_norm < norm * share:
            share = settings.clip_norm / norm
        if share != 1.0:
            for tensor in update.values():
                tensor.mul_(share)
        return update, total / len(losses)

    def _batches(self, examples: Examples, round_: int, count: int, size: int) -> Sequence[Loss]:
        """Losses of `count` batches of the round; backpropagation beside zeroth order draws an order of its own."""
        settings = self.settings
        purpose = "backprop batch" if settings.mode in WITH_BACKPROP else "batch"
        chosen = {"seed": settings.seed, "client": 0, "step": round_, "purpose": purpose}
        drawn = data.batch(examples, **chosen, batch_size=count * size)
        parts = [{name: tensor[i * size : (i + 1) * size] for name, tensor in drawn.items()} for i in range(count)]
        return [
            lambda part=part: metrics.loss_of(self.worker.model, part, settings.forward_dtype)  # type: ignore[misc]
            for part in parts
        ]

    def _backprop_batch_size(self) -> int:
        settings = self.settings
        return (settings.mode in WITH_BACKPROP and settings.bp_batch_size) or settings.batch_size

    def _epoch(self, round_: int, seen: int, examples: Examples | None = None) -> float:
        return round_ * seen / len((examples or self.examples)["labels"])


def _clipped(record: Guided, own: instruct.Guidance, limit: float) -> Guided:
    """The record with a norm of at most `limit` (0: any); noise counts as orthogonal to the guide, as it nearly is."""
    noise = federation.estimate_norm(record.seeded, own.size - own.kept_count if record.masked else own.size)
    kept, spared = (record.kept + record.whole) ** 2 * own.kept_square, own.square - own.kept_square
    norm = math.sqrt(kept + record.whole**2 * spared + noise**2)
    if not 0.0 < limit < norm:
        return record
    share = limit / norm
    seeded = replace(record.seeded, divisor=record.seeded.divisor / share)
    return replace(record, seeded=seeded, kept=record.kept * share, whole=record.whole * share)


def _shape(settings: Settings) -> instruct.Shape:
    return instruct.Shape(
        settings.instruct_kind,
        settings.instruct_weighting,
        settings.blend,
        settings.instruct_cosine_target,
        settings.instruct_noise_scale,
        settings.guide_step,
        settings.epsilon,
        settings.copies_per_pass,
    )
