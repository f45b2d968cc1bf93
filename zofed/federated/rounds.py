"""One round in each mode: clients asked, their answers merged, and a step made of them for the trainer to take."""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from zofed.base.errors import UserError
from zofed.core import aggregation, gradient_codec
from zofed.core.journal import Journal
from zofed.core.measure import Update
from zofed.core.records import Dense, Skipped
from zofed.core.replica import Replica, update_digest
from zofed.federated.exchanges import Exchanges
from zofed.federated.membership import Members
from zofed.federated.protocol import Answer, Reply
from zofed.federated.traffic import Traffic
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row
from zofed.training import guided, guides, measurements, schedules, step_records
from zofed.training.modes import Request, mode_of
from zofed.training.problem import Problem
from zofed.training.trainer import SUMS, Step, diverged

LOGGED = ("loss", "epoch", "batch_size", *SUMS, "facts")  # what a step found out beside its record and update


class Rounds:
    """A federation's answer to what the trainer asks: the steps of the next rounds. It moves no weights.

    slope_size: median over the clients of the size of their slopes in the present round; None where it has no slopes.
    """

    def __init__(
        self,
        members: Members,
        exchanges: Exchanges,
        problem: Problem,
        replica: Replica,
        journal: Journal,
        folder: RunFolder,
        traffic: Traffic,
    ) -> None:
        self.members, self.exchanges, self.traffic = members, exchanges, traffic
        self.problem, self.settings, self.replica = problem, problem.settings, replica
        self.journal, self.folder = journal, folder
        self.slope_size: float | None = None

    def measure(self, round_: int) -> Step | Sequence[Step]:
        """Ask clients about the next round, or several, and merge what is usable."""
        if round_ <= self.journal.last_round:
            return self._step_again(round_)
        self.members.look()
        self.traffic.begin()
        self.slope_size = None
        answers: dict[Request, Callable[[int], Step | Sequence[Step]]] = {
            "slopes": self._zeroth_order,
            "coefficients": self._in_subspace,
            "gradient": self._calibrated,
            "guided": self._guided,
            "update": self._first_order,
        }
        return answers[mode_of(self.settings).request(round_)](round_)

    def _step_again(self, round_: int) -> Step:
        """Killed between the journal and the tables: what was announced is not asked again."""
        entry = next(entry for entry in self.journal.entries if entry.record.round == round_)
        digest = update_digest(entry.record)
        update = self.folder.update(digest) if digest else None
        self.traffic.begin()
        self.slope_size = None
        if (facts := self.traffic.log.exchanges.get(round_)) is None:  # an earlier version kept none
            return Step(entry.record, math.nan, 0.0, 0, update=update)
        self.traffic.again(facts)
        self.slope_size = facts["slope_size"]
        return Step(entry.record, update=update, **facts["step"])

    def note(self, steps: Sequence[Step]) -> None:
        """Log what an exchange found out, before the journal takes its records."""
        facts, first = [], steps[0].record.round
        for step in steps:
            round_ = step.record.round
            exchange = self.traffic.facts() if round_ == first else Traffic.NOTHING | {"of": first}
            found = {name: getattr(step, name) for name in LOGGED}
            facts.append({"round": round_, "step": found, "slope_size": self.slope_size} | exchange)
        self.traffic.log.write(*facts)

    def _zeroth_order(self, round_: int) -> list[Step]:
        settings = self.settings
        steps = min(settings.steps_per_message, settings.rounds - round_ + 1)
        good = self.exchanges.slopes(round_, "slopes", self.members.sampled(round_), steps=steps)
        if not good:
            return [self._skipped(round_)]
        made = step_records.records_of(settings, self.replica, good, settings.rounds, steps)
        passes = settings.local_steps * measurements.passes(settings)
        first = self._step(made[0], good, passes, measurements.examples_per_query(settings) or settings.batch_size)
        rest = [Step(record, first.loss, first.epoch, first.batch_size) for record in made[1:]]
        return [first, *rest]

    def _in_subspace(self, round_: int) -> Step:
        settings = self.settings
        good = self.exchanges.slopes(round_, "coefficients", self.members.sampled(round_))
        if not good:
            return self._skipped(round_)
        rate = measurements.subspace_rate(settings, round_, settings.rounds)
        able = set(self.members.able())
        count = settings.subspace_interval
        forward = sum(count if client in able else 2 * settings.queries * count for client in good)
        backward = count * len(able & set(good))
        return self._step(
            step_records.subspace_record(settings, round_, rate, good, self.replica.spread.value),
            good,
            forward / len(good),
            settings.batch_size,
            backward=backward,
            seen=count * settings.batch_size,
        )

    def _guided(self, round_: int) -> Step:
        settings = self.settings
        guide = self._guide(round_)
        if guide is None:
            return self._skipped(round_)
        raw, digest, update, _, backward = guide
        good = self.exchanges.slopes(round_, "guided", self.members.sampled(round_), guide=raw)
        if not good:
            return self._skipped(round_)
        shape = guides.Shape.of(settings)
        guidance = guides.guidance(update, shape, digest)
        rate = schedules.backprop_rate(settings, round_, settings.rounds)
        found = {client: (answer.coefficients, answer.exponent) for client, answer in good.items()}
        record = guided.weighed(self.replica, guidance, shape, found, round_=round_, rate=rate)
        record = guided.clipped(record, guidance, settings.clip_norm)
        per_pass = measurements.examples_per_query(settings) or settings.batch_size
        return self._step(
            record, good, 2 * settings.queries, per_pass, backward=backward, update=update, facts=guidance.facts
        )

    def _calibrated(self, round_: int) -> Step:
        guide = self._guide(round_)
        if guide is None:
            return self._skipped(round_)
        _, digest, update, loss, backward = guide
        rate = schedules.backprop_rate(self.settings, round_, self.settings.rounds)
        return self._dense(
            round_, rate, digest, update, loss, backward, measurements.backprop_batch_size(self.settings)
        )

    def _first_order(self, round_: int) -> Step:
        found = self.exchanges.contributions(round_, "update", self.members.sampled(round_, self.members.able()))
        if not found:
            return self._skipped(round_)
        update = step_records.merged_updates(self.settings, {c: (own, a.examples) for c, (own, a) in found.items()})
        digest = self._remember(gradient_codec.whole(update), update)
        loss = self._mean_loss(answer for _, answer in found.values())
        rate = schedules.learning_rate(self.settings, round_, self.settings.rounds)
        passes = (
            len(found)
            * self.settings.local_steps
            * (self.settings.gradient_accumulation if self.settings.local_steps == 1 else 1)
        )
        return self._dense(round_, rate, digest, update, loss, passes, self.settings.batch_size)

    def _guide(self, round_: int) -> tuple[bytes, bytes, Update, float, int] | None:
        """(encoded, digest, decoded, loss, backward passes) of the round's gradient, from clients or on public data."""
        settings = self.settings
        if settings.gradient_source == "server":
            try:
                gradient, loss = measurements.gradient(settings, self.replica, self.problem.backprop_data(), 0)
                raw = gradient_codec.compressed(gradient, settings.gradient_rank)
            except ValueError as error:
                raise diverged(round_, settings) from error
            passes = settings.gradient_accumulation
        else:
            found = self.exchanges.contributions(round_, "gradient", self.members.sampled(round_, self.members.able()))
            if not found:
                return None
            merged = step_records.merged_updates(settings, {c: (own, a.examples) for c, (own, a) in found.items()})
            raw = gradient_codec.compressed(merged, settings.gradient_rank)
            loss = self._mean_loss(answer for _, answer in found.values())
            passes = settings.gradient_accumulation * len(found)
        update = gradient_codec.decoded(raw, self.replica.shapes)
        if not gradient_codec.norm(update):
            raise UserError("the gradient is zero everywhere and shapes no direction: set mode to zo, or scope wider")
        return raw, self._remember(raw, update), update, loss, passes

    def _remember(self, raw: bytes, update: Update) -> bytes:
        """Keep an update for the clients that will need it and, on disk, for a server that starts again: its digest."""
        digest = self.exchanges.remember(raw, update)
        if self.settings.keep_gradients:
            return digest  # the trainer keeps them all
        self.folder.save_update(digest, update)
        if self.settings.save_interval:
            oldest = self.journal.last_round - self.settings.save_interval * (self.settings.keep_checkpoints + 1)
            late = itertools.takewhile(lambda entry: entry.record.round > oldest, reversed(self.journal.entries))
            self.folder.keep_updates({digest, *(needed for e in late if (needed := update_digest(e.record)))})
        return digest

    def _mean_loss(self, answers: Iterable[Reply]) -> float:
        """NaN where the clients keep their losses to themselves."""
        return math.nan if self.settings.losses_withheld else statistics.fmean(answer.loss for answer in answers)

    def _skipped(self, round_: int) -> Step:
        return Step(Skipped(round_), math.nan, 0.0, 0, bytes=self.traffic.now.up + self.traffic.now.down)

    def _dense(
        self, round_: int, rate: float, digest: bytes, update: Update, loss: float, passes: int, size: int
    ) -> Step:
        return Step(
            record=Dense(round_, rate, digest),
            loss=loss,
            epoch=0.0,
            batch_size=size,
            update=update,
            forward_passes=passes,
            backward_passes=passes,
            forward_equivalents=3 * passes * size,
            tokens=passes * size * self.problem.tokens_per_example,
            bytes=self.traffic.now.up + self.traffic.now.down,
        )

    def _step(
        self,
        record: Any,
        good: Mapping[int, Answer],
        passes: float,
        per_pass: int,
        *,
        backward: int = 0,
        update: Update | None = None,
        seen: int = 0,
        facts: Row | None = None,
    ) -> Step:
        """A step from integers. passes: forward, of one client. seen: examples one client read; 0: as for slopes."""
        settings = self.settings
        seen = (seen or measurements.examples_seen(settings)) * len(good)
        self.slope_size = statistics.median_low(map(aggregation.size, good.values()))
        forward = round(passes * len(good))
        extra = measurements.backprop_batch_size(settings) * backward
        return Step(
            record=record,
            loss=self._mean_loss(good.values()),
            epoch=record.round * seen / max(1, sum(answer.examples for answer in good.values())),
            batch_size=seen,
            update=update,
            forward_passes=forward,
            backward_passes=backward,
            forward_equivalents=forward * per_pass + (2 if mode_of(settings).trains_coefficients else 3) * extra,
            tokens=seen * self.problem.tokens_per_example,
            bytes=self.traffic.now.up + self.traffic.now.down,
            facts=facts or {},
        )
