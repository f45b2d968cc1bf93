"""Train on this machine alone: a new run, or one that goes on from its folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zofed import config
from zofed.base import log
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import kinds, pass_memory
from zofed.core.journal import Journal
from zofed.core.replica import Replica
from zofed.core.slope_quality import Diagnosis, diagnose
from zofed.data.encoding import Examples
from zofed.runs import sinks
from zofed.runs.run_folder import CENTRAL, RunFolder
from zofed.runs.tables import Row
from zofed.training import device_pool, pins
from zofed.training.finalize import finish, status_kept
from zofed.training.measurements import batch_loss
from zofed.training.modes import mode_of
from zofed.training.paths import with_absolute_paths
from zofed.training.problem import TaskProblem
from zofed.training.process import prepare_process
from zofed.training.replicas import tell_placement
from zofed.training.steps import step_function, steps_of
from zofed.training.task import Task
from zofed.training.trainer import Totals, Trainer, sure_lines

Show = Callable[[Row], None]
Expect = Callable[[int], None]


def train(settings: Settings, out: Path, show: Show, expect: Expect = lambda _: None) -> dict[str, Any]:
    """A new central run in folder `out`; returns its summary. Raises UserError before anything is written.

    show: called with each row of the metrics. expect: called once with the number of the run's steps, before them.
    """
    sinks.check(settings)
    device_pool.check_ranks(settings)
    prepare_process(settings.threads)
    task = Task.load(with_absolute_paths(settings))
    task.check_held_out()
    examples, replica = task.shard(0, 1), task.first_replica()
    folder = RunFolder.create(out, task.settings, pins.of(task))
    with Journal.create(folder.journal, replica.genesis) as journal:
        return _run(task, replica, examples, journal, folder, show, expect)


def resume(path: Path, show: Show, expect: Expect = lambda _: None) -> dict[str, Any]:
    """Continue the run in `path` from its journal (zo) or its newest checkpoint (fo), to the same weights.

    A finished run stays as it is, unless its model or lines of its tables are gone: they are made anew. Raises
    UserError for a folder that is no central run, or whose settings, data or model are not those it began with.
    """
    folder = RunFolder.open(path)
    folder.check_way(CENTRAL)
    settings = folder.settings()
    device_pool.check_ranks(settings)
    prepare_process(settings.threads)
    task = Task.load(settings)
    replica = task.replica()
    tell_placement(replica, settings)
    with Journal.open(folder.journal) as journal:
        folder.check_unchanged(pins.of(task), journal.genesis, replica.genesis)
        done = journal.last_round
        examples = task.shard(0, 1)
        total = steps_of(settings, len(examples["labels"]))
        if total < done:
            raise UserError(f"steps = {total}, but {folder.path} has done {done}: set steps to {done} or more")
        summary, (rows, _) = folder.summary(), sure_lines(folder, done)
        is_finished = summary.get("status") == "completed" and summary.get("journal_head") == journal.head.hex()
        is_whole = folder.has_model() and len(rows) == done + 1
        if is_finished and is_whole and (total == done or Totals.of(rows[-1]).spent(settings)):
            return summary
        folder.write_text("settings.toml", config.to_toml(settings))  # an earlier version's had other names
        return _run(task, replica, examples, journal, folder, show, expect)


def _run(
    task: Task, replica: Replica, examples: Examples, journal: Journal, folder: RunFolder, show: Show, expect: Expect
) -> dict[str, Any]:
    settings, problem = task.settings, TaskProblem(task)
    log.tell(f"{problem.told()}\n{settings.steps_told()}")
    total = steps_of(settings, len(examples["labels"]))
    expect(total)
    backprop_examples = task.backprop_examples if mode_of(settings).helps_zeroth_order else None
    trainer = Trainer(replica, journal, folder, settings, task.evaluate, show)
    with status_kept(folder):
        problem.keep_baselines(replica.model, folder)
        with (
            sinks.opened(settings, folder.path, show) as trainer.show,
            device_pool.opened(task, replica, journal, folder.path) as split,
        ):
            totals = trainer.run(total, step_function(settings, replica, examples, total, backprop_examples, split))
        return finish(problem, replica, journal, folder, totals)


def diagnosis(settings: Settings, batches: int) -> Diagnosis:
    """What `diagnose` finds at a run's base weights, on its first batches."""
    task, replica = _loaded(settings)
    examples = task.shard(0, 1)
    losses = [batch_loss(settings, replica, examples, step) for step in range(1, batches + 1)]
    return diagnose(replica, losses, settings.queries, settings.finite_difference, settings.perturbations_per_pass)


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights, of a pass with one perturbed copy and of each further one; copies that fit the budget.

    is_batched: whether copies can share a pass; else each direction is written into the weights, so that `one` counts a
    copy of what trains, and there is no further one.
    """

    weights: int
    one: int
    further: int
    proposed: int
    is_batched: bool = True


def memory_of_passes(settings: Settings, bytes_beside_weights: int) -> Memory:
    """What the forward passes of a zeroth-order run take.

    Raises UserError when not even one copy fits, and for a loss that does not use all that trains.
    """
    if not kinds.terms(settings.directions):
        raise UserError(
            f"directions = {settings.directions!r} run one copy at a time, in the weights themselves: take rank1"
        )
    task, replica = _loaded(settings)
    loss = batch_loss(settings, replica, task.shard(0, 1), 1)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in replica.model.parameters())

    def measured(batched: bool) -> tuple[int, int]:
        if batched:
            return pass_memory.bytes_by_copies(loss, replica.parameters, settings.directions)
        return pass_memory.bytes_one_by_one(loss, replica.parameters), 0

    one, further = replica.measure.batched_or_not(measured, loss)
    if not further:
        pass_memory.copies_within(bytes_beside_weights, one, 1)
        return Memory(weights, one, 0, 1, is_batched=False)
    return Memory(weights, one, further, pass_memory.copies_within(bytes_beside_weights, one, further))


def _loaded(settings: Settings) -> tuple[Task, Replica]:
    prepare_process(settings.threads)
    task = Task.load(with_absolute_paths(settings))
    return task, task.first_replica()
