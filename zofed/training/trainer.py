"""Measure, record, apply: the one loop of every way to run, and what it goes on from."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from zofed.base.errors import DivergenceError, UserError
from zofed.config import Settings
from zofed.core import snapshots
from zofed.core.journal import Entry, Journal
from zofed.core.measure import Update
from zofed.core.metrics import Scores
from zofed.core.records import Record, Skipped
from zofed.core.replica import NotKept, Replica, update_digest
from zofed.runs import memory, samples
from zofed.runs.run_folder import EVALUATIONS, METRICS, RunFolder, timestamp
from zofed.runs.tables import Row, Table, keep_rows, sure_rows
from zofed.training.modes import mode_of
from zofed.training.rebuilding import restore


@dataclass(frozen=True)
class Step:
    """What one step found out: the record to write down, the update a dense record needs, and what it cost.

    bytes: sent up and down by all clients, payload as serialised. forward_equivalents: examples run forward, a
    backward pass counting two. tokens: of training data read. facts: further columns of the metrics.
    """

    record: Record
    loss: float
    epoch: float
    batch_size: int
    update: Update | None = None
    forward_passes: int = 0
    backward_passes: int = 0
    forward_equivalents: int = 0
    tokens: int = 0
    bytes: int = 0
    facts: Row = field(default_factory=dict)


# Round -> its step, or those of the rounds from it on that one exchange gave; must not move the weights.
Measurement = Callable[[int], Step | Sequence[Step]]
Evaluate = Callable[[torch.nn.Module], Scores]

# Modes whose journal does not replay from the start unless gradients are kept beside it.
SUMS = ("forward_passes", "backward_passes", "forward_equivalents", "tokens", "bytes")


@dataclass
class Totals:
    """What the run has cost so far; the metrics file holds running sums, so any row tells the whole cost.

    seconds: of training up to the last step's end, those before a resumption included: with them a budget is spent for
    the row, the loop and a later resumption alike. stopped_by: the budget that ended the run before its last step.
    scores: of the final weights on the held-out part; None where this process did not score them. memory: most bytes
    that training held above what this process held when it began; None where the system does not tell.
    """

    forward_passes: int = 0
    backward_passes: int = 0
    forward_equivalents: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    stopped_by: str = field(default="", init=False)
    scores: Scores | None = field(default=None, init=False)
    memory: int | None = field(default=None, init=False)
    _told: float = field(default_factory=time.monotonic, init=False)

    @classmethod
    def of(cls, row: dict[str, str] | None) -> "Totals":
        if row is None:
            return cls()
        return cls(**{name: int(row[name]) for name in SUMS}, seconds=float(row["seconds"]))

    def add(self, step: Step) -> None:
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(step, name))
        now = time.monotonic()
        self.seconds, self._told = round(self.seconds + now - self._told, 3), now

    def columns(self) -> Row:
        return {name: getattr(self, name) for name in SUMS} | {"seconds": self.seconds}

    def spent(self, settings: Settings) -> str:
        """The budget that is used up, in words; empty while none is."""
        budgets = (
            ("max-forward-equivalents", settings.max_forward_equivalents, self.forward_equivalents),
            ("max-tokens", settings.max_tokens, self.tokens),
            ("max-seconds", settings.max_seconds, self.seconds),
        )
        return next((f"{key} = {limit:g}" for key, limit, used in budgets if limit and used >= limit), "")


@dataclass
class Trainer:
    """Drives a replica through rounds and keeps the run's folder true at every moment.

    show: called with every row of the metrics file before it is written, so that a line there stands for all that
    belongs to its round. latest: a round whose line and what belongs to it are sure; None: the tables tell. note:
    called with steps before they are written down.
    """

    replica: Replica
    journal: Journal
    folder: RunFolder
    settings: Settings
    evaluate: Evaluate
    show: Callable[[Row], None]
    latest: int | None = None
    note: Callable[[Sequence[Step]], None] = lambda _: None
    seconds_moving: float = field(default=0.0, init=False)  # since this process began

    def __post_init__(self) -> None:
        last = self.journal.last_round
        self._rows, scored = sure_lines(self.folder, last if self.latest is None else min(last, self.latest))
        keep_rows(self.folder.path / "metrics.csv", METRICS, self._rows)
        keep_rows(self.folder.path / "evaluations.csv", EVALUATIONS, scored)
        samples.keep(self.folder.path, {int(row["step"]) for row in scored})
        self._best = min((float(row["eval_loss"]) for row in self._rows if row.get("eval_loss")), default=math.inf)
        self._scored: tuple[int, Scores | None] = -1, None  # the round scored last, and what it gave
        self._saved = -1  # the round of the checkpoint saved last

    def run(self, total: int, measure: Measurement) -> Totals:
        """Catch up with the journal, then train up to round `total`, or until a budget is spent.

        Returns what the whole run cost.

        Raises UserError when the loss is no longer finite.
        """
        rows = self._rows
        totals = Totals.of(rows[-1] if rows else None)
        told = len(rows) - 1  # killed between journal and metrics: the journal is ahead
        table = Table(self.folder.path / "metrics.csv", METRICS)
        training = memory.Training.begin()
        try:
            if told < 0:
                self._tell(table, self._row(0, totals) | {"eval_loss": self._score(0)})
            for entry in self._behind(told):
                round_ = entry.record.round
                if round_ <= self.replica.round:  # behind a checkpoint that had to be taken
                    continue
                is_new = round_ > told
                # A step is measured again for its line of metrics, or for a gradient that was not kept.
                digest = update_digest(entry.record)
                update = self.folder.update(digest) if digest else None
                step = _first(measure(round_)) if is_new or (digest is not None and update is None) else None
                if step and digest and update is None and update_digest(step.record) != digest:
                    raise UserError(
                        f"the gradient of round {round_} comes out otherwise than the journal says: go on with the "
                        "machine, the threads and the versions it began with"
                    )
                if step and update is None:
                    self._keep(step)
                try:
                    norm = self.replica.apply(entry, update if update or step is None else step.update)
                except NotKept:
                    self._pass_over(round_, told, table, totals, measure)
                    continue
                if step and is_new:
                    self._account(table, totals, step, norm, total)
                del step  # its gradient would stay while the next one is made
            while self.replica.round < total and not totals.spent(self.settings):
                self._take(measure(self.replica.round + 1), table, totals, total)
            # Killed between the last line and its checkpoint, or that is damaged.
            if self._is_due(last := self.replica.round, True) and self._saved != last:
                self._save_checkpoint(last)
        finally:
            table.close()
        totals.stopped_by = totals.spent(self.settings) if self.replica.round < total else ""
        scored, scores = self._scored
        totals.scores = scores if scored == self.replica.round else None
        totals.memory = training.bytes_above() if training else None
        return totals

    def _pass_over(self, round_: int, told: int, table: Table, totals: Totals, measure: Measurement) -> None:
        """Go on from a checkpoint behind a gradient that is gone for good, as that of a federation's round is.

        The rounds on the way get the lines that what was logged of them gives: without a norm, and without scores of
        weights that are passed over. Raises NotKept where no such checkpoint is.
        """
        if (
            not restore(self.replica, self.journal.entries, self.folder, self.journal.last_round)
            or self.replica.round < round_
        ):
            raise NotKept(
                f"round {round_} is a step by backpropagation whose gradient is not kept, and no whole checkpoint lies "
                f"behind it in {self.folder.path / 'checkpoints'}: bring one back from a copy"
            )
        self._saved = self.replica.round
        for passed in range(max(round_, told + 1), self.replica.round + 1):
            step = _first(measure(passed))
            totals.add(step)
            self._tell(table, self._row(passed, totals, step))

    def _take(self, measured: Step | Sequence[Step], table: Table, totals: Totals, total: int) -> None:
        """Write new steps down, all at once, and move by one after the other."""
        steps = [measured] if isinstance(measured, Step) else measured
        for step in steps:
            self.replica.check_exact(step.record)
            self._keep(step)
        self.note(steps)
        for step, entry in zip(steps, self.journal.append_all([step.record for step in steps]), strict=True):
            began = time.monotonic()
            norm = self.replica.apply(entry, step.update)
            self.seconds_moving += time.monotonic() - began
            self._account(table, totals, step, norm, total)

    def _keep(self, step: Step) -> None:
        """Keep the step's gradient or guide beside the journal where that is wanted, in place of a damaged one."""
        if self.settings.keep_gradients and step.update and (digest := update_digest(step.record)):
            self.folder.save_update(digest, step.update)

    def _account(self, table: Table, totals: Totals, step: Step, norm: float, total: int) -> None:
        """Tell what a step that was just applied found and cost, and save a checkpoint where one is due."""
        round_ = step.record.round
        totals.add(step)
        row = self._row(round_, totals, step, norm)
        is_last = round_ == total or bool(totals.spent(self.settings))
        if round_ % self.settings.eval_interval == 0 or is_last:
            row["eval_loss"] = self._score(round_)
            if self.settings.keep_best and row["eval_loss"] < self._best:
                self._best = row["eval_loss"]
                tensors = {f"weight/{name}": tensor for name, tensor in self.replica.parameters.items()}
                self.folder.save_best(tensors, {"round": round_, "eval_loss": self._best})
        self._tell(table, row)
        is_due = self._is_due(round_, is_last)
        if is_due or "eval_loss" in row:
            self.folder.sync_tables()
        if is_due:
            self._save_checkpoint(round_)

    def _score(self, round_: int) -> float:
        """The held-out loss of all sources together; what else the scores tell goes into evaluations.csv."""
        scores = self.evaluate(self.replica.model)
        self._scored = round_, scores
        whole = scores.whole.loss
        if not math.isfinite(whole):
            if round_ == 0:  # nothing has moved, so that no rate is to blame
                raise UserError(
                    "the held-out loss is not finite before the first step: the model gives no number for some of "
                    f"{scores.coverage.examples:,} held-out examples; give other weights or data, or dtype float32"
                )
            raise diverged(round_, self.settings)
        samples.add(self.folder.path, round_, scores.answered)  # durable before the scores that they gave
        with Table(self.folder.path / "evaluations.csv", EVALUATIONS) as table:
            # The whole comes first, under a name that no source has.
            told = (("", scores.whole), *scores.sources.items())
            table.write(*({"step": round_, "source": source} | score.row() for source, score in told))
            table.sync()  # a line of metrics that tells of a score stands for these
        return whole

    def _behind(self, told: int) -> Sequence[Entry]:
        """Entries the replica has not applied, after it took over the newest checkpoint that fits.

        told: last round the metrics know; a later checkpoint would leave rounds without their line.
        """
        if restore(self.replica, self.journal.entries, self.folder, told):
            self._saved = self.replica.round
        chains = [entry.chain for entry in self.journal.entries]
        start = chains.index(self.replica.head) + 1 if self.replica.head in chains else 0
        return tuple(self.journal.entries[start:])

    def _tell(self, table: Table, row: Row) -> None:
        self.show(row)
        table.write(row)

    def _row(self, round_: int, totals: Totals, step: Step | None = None, norm: float | None = None) -> Row:
        settings, mode = self.settings, mode_of(self.settings)
        row: Row = {
            "timestamp": timestamp(),
            "step": round_,
            "mode": settings.mode,
            "scope": settings.scope,
            "q": settings.queries if mode.measures_slopes else 0,
            "batch_size": settings.batch_size,
            "optimizer": settings.optimizer,
            "bp_interval": mode.bp_interval,
            "grad_norm": norm,
        }
        if step is not None:
            row |= {"epoch": step.epoch, "batch_size": step.batch_size} | step.facts
            row["loss"] = step.loss if math.isfinite(step.loss) else None
            row["lr"] = None if isinstance(step.record, Skipped) else step.record.rate
        return row | totals.columns()

    def _is_due(self, round_: int, is_last: bool) -> bool:
        """Whether a round ends with a checkpoint."""
        interval = self.settings.save_interval
        return bool(interval) and (
            round_ % interval == 0 or (is_last and mode_of(self.settings).has_gradients and round_ > 0)
        )

    def _save_checkpoint(self, round_: int) -> None:
        replica = self.replica
        facts = {"round": round_, "head": replica.head.hex()}
        self.folder.save_checkpoint(_name(round_), snapshots.tensors(replica), facts, self.settings.keep_checkpoints)
        self._saved = round_


def _first(measured: Step | Sequence[Step]) -> Step:
    return measured if isinstance(measured, Step) else measured[0]


def _name(round_: int) -> str:
    """Name of the checkpoint of a round."""
    return f"step-{round_:08d}"


def sure_lines(folder: RunFolder, last: int) -> tuple[list[Row], list[Row]]:
    """Lines of metrics.csv and evaluations.csv that surely stand, of the rounds from 0 to at most `last`.

    Each round has one line of metrics, whole; one that tells a held-out loss has its lines of evaluations, too, of as
    many sources as any round has.
    """

    def stands(index: int, row: Mapping[str, str]) -> bool:
        counts = (row.get(name, "") for name in ("step", *SUMS))
        whole = all(map(str.isdecimal, counts)) and bool(row.get("seconds"))
        return whole and index <= last and row["step"] == str(index)

    rows = sure_rows(folder.path / "metrics.csv", METRICS, stands)
    scores: dict[int, dict[str, Row]] = {}
    told = sure_rows(folder.path / "evaluations.csv", EVALUATIONS, lambda _, row: str.isdecimal(row.get("step", "")))
    for score in told:
        scores.setdefault(int(score["step"]), {}).setdefault(score["source"], score)
    sources = max(map(len, scores.values()), default=0)

    def is_scored(row: Row) -> bool:
        own = scores.get(int(row["step"]), {})
        return not row.get("eval_loss") or (
            len(own) == sources and next(iter(own.values())).get("loss") == row["eval_loss"]
        )

    rows = list(itertools.takewhile(is_scored, rows))
    return rows, [score for row in rows if row.get("eval_loss") for score in scores[int(row["step"])].values()]


def diverged(round_: int, settings: Settings, more: str = "", what: str = "is not finite") -> DivergenceError:
    """What to say when a loss is no number any more, or (what) far above where it began. more: what else is known."""
    own = f" and local-learning-rate = {settings.local_learning_rate:g}" if settings.local_learning_rate else ""
    return DivergenceError(
        f"the loss of step {round_} (seed {settings.seed}) {what}: training diverged with learning-rate = "
        f"{settings.learning_rate:g}{own}; start again with a tenth of it{more}"
    )
