"""Train on this machine alone: a new run, or one that goes on from its folder."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zofed import budget, data, directions, federation, metrics
from zofed.config import Settings
from zofed.data import Examples
from zofed.diagnostics import Diagnosis, diagnose
from zofed.errors import UserError
from zofed.finish import finish, status_kept
from zofed.journal import Journal, differences
from zofed.records import Dense
from zofed.runs import Row, RunFolder
from zofed.task import Task, prepare_process, with_absolute_paths
from zofed.trainer import Ask, Step, Trainer, diverged
from zofed.worker import Worker

Show = Callable[[Row], None]


def train(settings: Settings, out: Path, show: Show) -> dict[str, Any]:
    """A new central run in folder `out`; returns its summary. Raises UserError before anything is written."""
    prepare_process(settings.threads)
    task = Task.load(with_absolute_paths(settings))
    task.check_held_out()
    examples, worker = task.shard(0, 1), task.worker()
    folder = RunFolder.create(out, task.settings, task.inputs())
    with Journal.create(folder.journal, worker.genesis) as journal:
        return _run(task, worker, examples, journal, folder, show)


def resume(path: Path, show: Show) -> dict[str, Any]:
    """Continue the run in `path` from its journal (zo) or its newest checkpoint (fo), to the same weights.

    A finished run stays as it is. Raises UserError for a folder that is no central run, or whose settings, data or
    model are not those it began with.
    """
    folder = RunFolder.open(path)
    settings = folder.settings()
    if (folder.path / "rounds.csv").exists():
        raise UserError(f"{folder.path} is a federated run, which zofed train cannot continue: start it again")
    prepare_process(settings.threads)
    task = Task.load(settings)
    worker = task.worker()
    before, now = folder.inputs(), task.inputs()
    with Journal.open(folder.journal) as journal:
        different = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
        different += differences(journal.genesis, worker.genesis)
        if different:
            raise UserError(
                f"{folder.path} began with another {', '.join(different)} than its settings give today: "
                "bring back the settings, data, tokenizer and model it began with"
            )
        done = journal.entries[-1].record.round if journal.entries else 0
        if settings.steps < done:
            raise UserError(f"steps = {settings.steps}, but {folder.path} has done {done}: set steps to {done} or more")
        summary = folder.summary()
        is_finished = summary.get("status") == "completed" and summary.get("journal_head") == journal.head.hex()
        if is_finished and settings.steps == done:
            return summary
        return _run(task, worker, task.shard(0, 1), journal, folder, show)


def _run(
    task: Task, worker: Worker, examples: Examples, journal: Journal, folder: RunFolder, show: Show
) -> dict[str, Any]:
    settings = task.settings
    ask = step_of(worker, examples, settings)
    trainer = Trainer(worker, journal, folder, settings, task.evaluate, show)
    with status_kept(folder):
        totals = trainer.run(settings.steps, ask)
        return finish(task, worker, journal, folder, totals)


def step_of(worker: Worker, examples: Examples, settings: Settings) -> Ask:
    """What a central run asks of its worker in each step, by its mode."""
    return _zo(worker, examples, settings) if settings.mode == "zo" else _fo(worker, examples, settings)


def _epoch(round_: int, examples: Examples, batch_size: int) -> float:
    return round_ * batch_size / len(examples["labels"])


def _zo(worker: Worker, examples: Examples, settings: Settings) -> Ask:
    """A zeroth-order step: a federated round with this machine as its only client."""

    def ask(round_: int) -> Step:
        try:
            plan = federation.plan_for(settings, worker, worker.head, (), client=0)
            measured = federation.measure(worker, examples, plan)
        except ValueError as error:
            raise diverged(round_, settings) from error
        return Step(
            record=federation.record_of(settings, worker, {0: measured}),
            loss=measured.loss,
            epoch=_epoch(round_, examples, settings.batch_size),
            batch_size=settings.batch_size,
            forward_passes=measured.forward_passes,
        )

    return ask


def _fo(worker: Worker, examples: Examples, settings: Settings) -> Ask:
    """A first-order step: one batch, one backpropagation."""

    def ask(round_: int) -> Step:
        batch = data.batch(examples, seed=settings.seed, client=0, step=round_, batch_size=settings.batch_size)
        update, loss = worker.gradient(lambda: metrics.loss_of(worker.model, batch))
        if not math.isfinite(loss) or not all(bool(torch.isfinite(gradient).all()) for gradient in update.values()):
            raise diverged(round_, settings)
        return Step(
            record=Dense(round_, settings.learning_rate),
            loss=loss,
            epoch=_epoch(round_, examples, settings.batch_size),
            batch_size=settings.batch_size,
            update=update,
            forward_passes=1,
            backward_passes=1,
        )

    return ask


def diagnosis(settings: Settings, batches: int) -> Diagnosis:
    """What `diagnose` finds at a run's base weights, on its first batches."""
    task, worker = _loaded(settings)
    examples = task.shard(0, 1)

    def loss_at(step: int) -> Callable[[], torch.Tensor]:
        batch = data.batch(examples, seed=settings.seed, client=0, step=step, batch_size=settings.batch_size)
        return lambda: metrics.loss_of(worker.model, batch, settings.forward_dtype)

    losses = [loss_at(step) for step in range(1, batches + 1)]
    return diagnose(worker, losses, settings.queries, settings.estimator, settings.copies_per_pass)


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights, of a pass with one perturbed copy and of each further one; copies that fit the budget."""

    weights: int
    one: int
    further: int
    proposed: int


def memory_of_passes(settings: Settings, bytes_beside_weights: int) -> Memory:
    """What the forward passes of a zeroth-order run take. Raises UserError when not even one copy fits."""
    if not directions.terms(settings.directions):
        raise UserError(
            f"directions = {settings.directions!r} run one copy at a time, in the weights themselves: take rank1"
        )
    task, worker = _loaded(settings)
    batch = data.batch(task.shard(0, 1), seed=settings.seed, client=0, step=1, batch_size=settings.batch_size)
    how = (lambda: metrics.loss_of(worker.model, batch, settings.forward_dtype), worker.parameters, settings.directions)
    one, further = budget.bytes_by_copies(*how)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in worker.model.parameters())
    return Memory(weights, one, further, budget.copies_within(bytes_beside_weights, one, further))


def _loaded(settings: Settings) -> tuple[Task, Worker]:
    prepare_process(settings.threads)
    task = Task.load(with_absolute_paths(settings))
    return task, task.worker()
