"""A first-order step over that of a plain PyTorch loop: same model, batch and optimizer."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

from zofed import config
from zofed.core.journal import Journal
from zofed.data import encoding
from zofed.training.process import prepare_process
from zofed.training.steps import step_function
from zofed.training.task import Task

OPTIMIZERS = ("sgd", "adamw")


def report(size: str, shape: tuple[int, int], threads: int, pairs: int) -> None:
    """Print one row for each optimizer: median of alternating pairs, with the lowest and the highest ratio."""
    for optimizer in OPTIMIZERS:
        ratios, plain_seconds = _ratios(size, shape, threads, pairs, optimizer)
        print(
            f"| {size} | {shape[0]}x{shape[1]} | {optimizer} | {plain_seconds:.3f} s | "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |",
            flush=True,
        )


def _ratios(size: str, shape: tuple[int, int], threads: int, pairs: int, optimizer: str) -> tuple[list[float], float]:
    prepare_process(threads)
    settings = config.resolve(
        {
            "mode": "fo",
            "model": size,
            "block-size": shape[1],
            "batch-size": shape[0],
            "optimizer": optimizer,
            "learning-rate": 1e-4,
            "device": "cpu",
            "threads": threads,
        }
    )
    task = Task.load(settings)
    replica, examples = task.replica(), task.shard(0, 1)
    ask = step_function(settings, replica, examples, 10**6)
    with (
        tempfile.TemporaryDirectory() as folder,
        Journal.create(Path(folder) / "journal.zofed", replica.genesis) as journal,
    ):

        def ours() -> None:
            step = ask(replica.round + 1)
            replica.apply(journal.append(step.record), step.update)

        plain = _plain_loop(task, examples, shape[0], optimizer)
        for run in (ours, plain, ours, plain):
            run()
        found = [(_seconds(ours), _seconds(plain)) for _ in range(pairs)]
    return [own / other for own, other in found], statistics.median(other for _, other in found)


def _plain_loop(task: Task, examples: encoding.Examples, batch_size: int, optimizer: str) -> Callable[[], None]:
    model = GPT2LMHeadModel(task.replica().model.config).train()  # dropout is 0 in the config's run below
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rule = (
        torch.optim.SGD(model.parameters(), 1e-4) if optimizer == "sgd" else torch.optim.AdamW(model.parameters(), 1e-4)
    )
    order = torch.randperm(len(examples["labels"]))
    position = 0

    def step() -> None:
        nonlocal position
        chosen = order[position : position + batch_size]
        position += batch_size
        loss = model(**{name: tensor[chosen] for name, tensor in examples.items()}).loss
        loss.backward()
        float(loss.detach())
        rule.step()
        rule.zero_grad()

    return step


def _seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
