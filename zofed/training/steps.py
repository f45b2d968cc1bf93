"""Steps of every kind on a single machine, and the one that a mode asks in a round."""

import math
from collections.abc import Callable

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.digests import tensors_digest
from zofed.core.estimators import Split
from zofed.core.records import Dense
from zofed.core.replica import Replica
from zofed.training import guided, guides, measurements, schedules, shards, step_records
from zofed.training.modes import Request, mode_of
from zofed.training.shards import Data
from zofed.training.trainer import Step, diverged


def steps_of(settings: Settings, count: int) -> int:
    """How many steps a central run takes: those asked for, or enough to see its `count` examples `epochs` times."""
    if not settings.epochs:
        return settings.steps
    return max(1, math.ceil(settings.epochs * count / mode_of(settings).examples_of_a_step))


def step_function(
    settings: Settings,
    replica: Replica,
    examples: Data,
    total: int,
    backprop_examples: Data | None = None,
    split: Split | None = None,
) -> Callable[[int], Step]:
    """What measures one round of a mode, out of `total`.

    examples: what zeroth order sees; backprop_examples: what backpropagation sees, None: the same. split: measures
    shares of a step's queries in several places (zo).
    """
    steps = Steps(settings, replica, examples, total, backprop_examples or examples, split)
    mode = mode_of(settings)
    answers: dict[Request, Callable[[int], Step]] = {
        "slopes": steps.zeroth_order,
        "coefficients": steps.in_subspace,
        "gradient": steps.first_order,
        "guided": steps.guided,
        "update": steps.first_order,  # of the only client, whose update is its gradient
    }

    def measure(round_: int) -> Step:
        try:
            return answers[mode.request(round_)](round_)
        except ValueError as error:
            told = diverged(round_, settings)
            if ":" in settings.objective:  # a function of the user's, which may have raised it
                raise UserError(f"{told}, or mend objective = {settings.objective!r}: {error}") from error
            raise told from error

    return measure


class Steps:
    """Steps of every kind for one replica. All raise ValueError when a loss or a gradient is not finite."""

    def __init__(
        self,
        settings: Settings,
        replica: Replica,
        examples: Data,
        total: int,
        backprop_examples: Data,
        split: Split | None,
    ) -> None:
        self.settings, self.replica, self.total, self.split = settings, replica, total, split
        self.examples, self.backprop_examples = examples, backprop_examples

    def zeroth_order(self, round_: int) -> Step:
        """A federated round with this machine as its only client."""
        settings = self.settings
        measured = measurements.slopes(settings, self.replica, self.examples, 0, split=self.split)
        seen = measurements.examples_seen(settings)
        return Step(
            record=step_records.record_of(settings, self.replica, {0: measured}, self.total),
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
        update, loss = measurements.gradient(settings, self.replica, self.backprop_examples, 0)
        digest = bytes.fromhex(tensors_digest(update)) if settings.keep_gradients else bytes(32)
        passes, size = settings.gradient_accumulation, measurements.backprop_batch_size(settings)
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
        gradient, backprop_loss = measurements.gradient(settings, self.replica, self.backprop_examples, 0)
        guide = guides.on_grid(gradient)
        loss, own_examples = measurements.query_loss(settings, self.replica, self.examples, round_, 0)
        found, guidance = guided.guided(
            self.replica,
            loss,
            guide,
            guides.Shape.of(settings),
            measurements.seeds_of(settings, self.replica, round_, 0),
            round_=round_,
            rate=schedules.backprop_rate(settings, round_, self.total),
            examples=own_examples,
        )
        passes, size = settings.gradient_accumulation, measurements.backprop_batch_size(settings)
        seen = measurements.examples_seen(settings) if found.forward_passes else 0
        per_pass = measurements.examples_per_query(settings) or settings.batch_size
        return Step(
            record=guided.clipped(found.record, guidance, settings.clip_norm),
            loss=backprop_loss if math.isnan(found.loss) else found.loss,
            epoch=self._epoch(round_, measurements.examples_seen(settings)),
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
        settings = self.settings
        measured = measurements.coefficients(settings, self.replica, self.examples, 0, self.total)
        rate, count = measurements.subspace_rate(settings, round_, self.total), settings.subspace_interval
        seen = count * settings.batch_size
        return Step(
            record=step_records.subspace_record(settings, round_, rate, {0: measured}),
            loss=measured.loss,
            epoch=self._epoch(round_, seen),
            batch_size=settings.batch_size,
            forward_passes=count,
            backward_passes=count,
            forward_equivalents=3 * seen,
            tokens=seen * settings.block_size,
        )

    def _epoch(self, round_: int, seen: int, examples: Data | None = None) -> float:
        return round_ * seen / len(shards.of(self.settings, examples or self.examples))
