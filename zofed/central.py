"""Train on this machine alone: a new run, or one that goes on from its folder."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zofed import data, federation, metrics
from zofed.config import Settings
from zofed.data import Examples
from zofed.errors import UserError
from zofed.finish import finish, status_kept
from zofed.journal import Journal
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
        different += [key for key in journal.genesis if worker.genesis.get(key) != journal.genesis[key]]
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
    ask = _zo(worker, examples, settings) if settings.mode == "zo" else _fo(worker, examples, settings)
    trainer = Trainer(worker, journal, folder, settings, task.evaluate, show)
    with status_kept(folder):
        totals = trainer.run(settings.steps, ask)
        return finish(task, worker, journal, folder, totals)


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
            record=federation.merge(round_, settings.learning_rate, settings.queries, {0: measured}),
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
