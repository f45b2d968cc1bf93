"""Rounds over a Flower grid: plan, send, check, merge, write down, move, announce."""

import itertools
import math
import os
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import aggregation, gradient_codec
from zofed.core.journal import Journal
from zofed.core.measure import Update
from zofed.core.metrics import Coverage
from zofed.core.records import Dense, Skipped
from zofed.core.replica import Replica, update_digest
from zofed.data import partitions
from zofed.federated import protocol
from zofed.federated.exchanges import Exchanges
from zofed.federated.membership import Members
from zofed.federated.places import WITHOUT_KEYS, Places
from zofed.federated.protocol import Answer, Reply
from zofed.federated.traffic import Traffic
from zofed.runs import sinks
from zofed.runs.run_folder import DEPLOYED, SIMULATED, RunFolder
from zofed.runs.tables import Row
from zofed.training import guided, measurements, schedules, step_records
from zofed.training.finalize import draw, finish, status_kept
from zofed.training.modes import Ask, mode_of
from zofed.training.task import Task, check_absolute, prepare_process, with_absolute_paths
from zofed.training.trainer import SUMS, Step, Trainer, diverged

GROUPS_KEPT = 1000  # columns of the table of who holds what

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from Flower's run configuration; the output folder is absolute and printed."""
    module = sys.modules[type(grid).__module__]
    if is_deployed := hasattr(module, "pull_objects"):  # separate machines
        from zofed.federated import flower_internals

        flower_internals.hasten(module)
    way = DEPLOYED if is_deployed else SIMULATED
    try:
        settings = config.resolve(dict(context.run_config))
        check_absolute(settings)
        # Flower hands over every setting, so that only those that differ from their defaults can have been given.
        if idle := config.without_effect(settings, config.changed(settings), config.FEDERATED):
            warnings.warn("; ".join(idle), stacklevel=1)
        run(grid, settings, f"flower-{context.run_id}", way)
    except UserError as error:
        # Flower marks a run as failed only if an exception leaves the app, and logs it: one line will do for this one.
        sys.tracebacklimit = 0
        raise error from None


def run(grid: Grid, settings: Settings, name: str, way: str = SIMULATED) -> dict[str, Any]:
    """One federated run over `grid`, new or going on from the journal in its folder; returns its summary.

    name: of the folder, where settings.out is empty. way: on this machine (SIMULATED) or on separate ones (DEPLOYED).
    """
    protocol.check_settings(settings)
    sinks.check(settings)
    out = config.absolute(settings.out or Path.home() / "zofed-runs" / name, "out")
    if settings.out and not Path(os.path.expanduser(settings.out)).is_absolute():
        raise UserError(f"out = {settings.out!r}: the server's working folder is not yours, give an absolute path")
    if settings.direction_seeds == "shared" and settings.local_steps > 1:
        warnings.warn(
            f"direction-seeds = 'shared' with local-steps = {settings.local_steps}: the noise of the clients does not "
            "average out; set direction-seeds to distinct",
            stacklevel=2,
        )
    prepare_process(settings.threads)
    task = Task.load(with_absolute_paths(settings.model_copy(update={"out": str(out)})))
    task.check_held_out()
    if settings.gradient_source == "server" and mode_of(settings).helps_zeroth_order:
        if not settings.bp_dataset:
            raise UserError("gradient-source = 'server' backpropagates on public data: set bp-dataset to it")
        _ = task.backprop_examples
    replica = task.first_replica()
    earlier = (
        _reopened(out, way, task, replica) if os.path.exists(RunFolder(out).journal) else None
    )  # False for a bad name
    try:
        places = Places.read(out, are_lasting=os.environ.get(WITHOUT_KEYS) != "1")
        members = Members(grid, task.settings, replica, earlier, task.named, places)
        members.meet()
        inputs, nodes = task.inputs(), members.partitions
        folder = RunFolder(out) if earlier else RunFolder.create(out, task.settings, inputs, way, nodes)
    except BaseException:
        if earlier:
            earlier.close()
        raise
    folder.write_text("settings.toml", config.to_toml(task.settings))
    # The journal first: without it what a crash leaves here could neither go on nor begin anew.
    with earlier or Journal.create(folder.journal, replica.genesis) as journal, status_kept(folder):
        members.journal = journal
        members.places.keep_in(folder.path)
        last = journal.last_round
        what = f"goes on after round {last}" if earlier else f"{len(task.held_out)} documents held out"
        print(f"run folder: {out}\n{task.told()}\n{len(members.found)} clients, {what}", flush=True)
        _tell_holdings(members, folder)
        with Traffic(folder, last, losses_withheld=task.settings.losses_withheld) as traffic:
            return Server(grid, members, task, replica, journal, folder, traffic).run()


def _reopened(out: Path, way: str, task: Task, replica: Replica) -> Journal:
    """The journal of a run that goes on. Raises UserError where it runs another way, or began otherwise."""
    folder = RunFolder.open(out)
    folder.check_way(way)
    journal = Journal.open(folder.journal)
    try:
        folder.check_unchanged(task.inputs(), journal.genesis, replica.genesis)
        done = journal.last_round
        if done > task.settings.rounds:
            raise UserError(f"rounds = {task.settings.rounds}, but {out} has done {done}: set rounds to {done} or more")
    except UserError:
        journal.close()
        raise
    return journal


def _tell_holdings(members: Members, folder: RunFolder) -> None:
    """Table and picture of who holds what, as the clients say."""
    counts = {client: member.told.held_counts() for client, member in sorted(members.found.items())}
    folder.write_text("partition.csv", partitions.to_csv(partitions.largest(counts, GROUPS_KEPT)))
    draw("partition", counts, folder.path / "partition.png")


LOGGED = ("loss", "epoch", "batch_size", *SUMS, "facts")  # what a step found out beside its record and update


class Server:
    """The server's side of one run; the law of the house is kept by the Trainer it drives."""

    def __init__(
        self,
        grid: Grid,
        members: Members,
        task: Task,
        replica: Replica,
        journal: Journal,
        folder: RunFolder,
        traffic: Traffic,
    ) -> None:
        self.members, self.task, self.settings, self.replica = members, task, task.settings, replica
        self.journal, self.folder, self.traffic = journal, folder, traffic
        self.trainer = Trainer(
            replica,
            journal,
            folder,
            self.settings,
            task.evaluate,
            self._show,
            traffic.latest,
            self._note,
        )
        self.exchanges = Exchanges(
            grid, members, replica, journal, self.settings, folder.path, traffic, lambda: self.trainer.seconds_moving
        )
        self.slope_size: float | None = None

    def run(self) -> dict[str, Any]:
        with sinks.opened(self.settings, self.folder.path, self._show) as self.trainer.show:
            totals = self.trainer.run(self.settings.rounds, self._round)
        digests = self.exchanges.digests(self.members.there())
        wrong = self._wrong(digests)
        if wrong:
            self._rebuild(wrong)
            digests |= self.exchanges.digests(wrong)
            wrong = self._wrong(digests)
        own = self.replica.digest()
        for client in wrong:
            what = f"with {digests[client]}, not {own}" if digests[client] else "without saying with which weights"
            print(f"client {client} ends {what}: do not trust its machine", file=sys.stderr, flush=True)
        extra = self.traffic.summary() | {
            "client_digests": {str(c): digest for c, digest in sorted(digests.items())},
            "wrong_digests": {str(c): digests[c] for c in wrong},
        }
        draw("federation", self.folder, len(self.members.found))  # before the end, which may be that it diverged
        summary = finish(self.task, self.replica, self.journal, self.folder, totals, extra)
        answered = list(digests.values()).count(own)
        print(
            f"held-out {summary['eval_loss_start']:.4f} -> {summary['eval_loss_end']:.4f} "
            f"({Coverage(**summary['evaluated'])}); the replay and "
            f"{'all' if answered == len(digests) else f'{answered} of'} {len(digests)} clients end with the server's "
            f"weights; results in {self.folder.path}",
            flush=True,
        )
        return summary

    # --- rounds ---

    def _round(self, round_: int) -> Step | Sequence[Step]:
        """Ask clients about the next round, or several, and merge what is usable."""
        if round_ <= self.journal.last_round:
            return self._step_again(round_)
        self.members.look()
        self.traffic.begin()
        self.slope_size = None
        answers: dict[Ask, Callable[[int], Step | Sequence[Step]]] = {
            "slopes": self._zeroth_order,
            "coefficients": self._in_subspace,
            "gradient": self._calibrated,
            "guided": self._guided,
            "update": self._first_order,
        }
        return answers[mode_of(self.settings).ask(round_)](round_)

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

    def _note(self, steps: Sequence[Step]) -> None:
        """Log what an exchange found out, before the journal takes its records."""
        facts = []
        for index, step in enumerate(steps):
            found = {name: getattr(step, name) for name in LOGGED}
            exchange = self.traffic.facts() if index == 0 else Traffic.NOTHING
            slope_size = self.slope_size
            facts.append({"round": step.record.round, "step": found, "slope_size": slope_size} | exchange)
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
        shape = guided.Shape.of(settings)
        guidance = guided.guidance(update, shape, digest)
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
                gradient, loss = measurements.gradient(settings, self.replica, self.task.backprop_examples, 0)
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
            tokens=passes * size * self.settings.block_size,
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
            tokens=seen * settings.block_size,
            bytes=self.traffic.now.up + self.traffic.now.down,
            facts=facts or {},
        )

    def _wrong(self, digests: Mapping[int, str]) -> list[int]:
        """Clients with other weights than the server's; where all are needed, also those that gave no answer."""
        own = self.replica.digest()
        return [c for c, digest in sorted(digests.items()) if digest != own and (digest or self.members.strict)]

    def _rebuild(self, clients: Iterable[int]) -> None:
        """Have clients start anew when they are next asked."""
        for client in clients:
            print(f"client {client}: its weights are not the run's; it replays all from the base", flush=True)
            member = self.members.found[client]
            member.rebuild, member.updates = True, set()

    def _show(self, row: Row) -> None:
        round_, now = row["step"], self.traffic.now
        held_out = f"  held-out {row['eval_loss']:.4f}" if row.get("eval_loss") is not None else ""
        if held_out and self.settings.client_held_out_fraction and not self.settings.losses_withheld:
            held_out += self.exchanges.evaluations(round_)
        if round_ == 0:
            print(f"round 0{held_out}", flush=True)
            return
        self.traffic.tell(row, self.slope_size)
        interval = self.settings.weight_check_interval
        if interval and round_ % interval == 0 and round_ < self.settings.rounds:
            self._rebuild(self._wrong(self.exchanges.digests(self.members.there())))
        used, asked = now.results["used"], max(1, now.asked)
        told = "loss withheld" if self.settings.losses_withheld and used else "skipped"
        loss = told if row.get("loss") is None else f"loss {row['loss']:.4f}"
        slopes = "" if self.slope_size is None else f"  slopes {self.slope_size:.3g}"
        lost = "".join(
            f"  {count} {what}" for what, count in (("rejected", now.rejected), ("late", now.results["late"])) if count
        )
        print(
            f"round {round_}/{self.settings.rounds}  {loss}{held_out}{slopes}  {used} of {now.asked} replies{lost}  "
            f"up {now.up // asked} B  down {now.down // asked} B a client  {row['seconds']:.1f} s",
            flush=True,
        )
        self.traffic.begin()  # rounds that the same exchange asked for have cost nothing more
