"""Steps whose examples' hidden states are kept over steps that compute them, in pairs: `scope = last-4`, prompts."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from zofed import config
from zofed.core import metrics
from zofed.core.journal import link
from zofed.training.process import prepare_process
from zofed.training.steps import step_function
from zofed.training.task import Task

STEPS: dict[str, dict[str, Any]] = {
    "forward": {},
    "subspace": {"mode": "subspace", "subspace-interval": 2, "optimizer": "adamw"},
    "fo": {"mode": "fo", "optimizer": "adamw"},
    "zo": {"mode": "zo", "queries": 8},
    "zo-per-query": {"mode": "zo", "queries": 8, "query-batches": "per-query", "query-batch-size": 2},
}


def report(model: str, data: Path, threads: int, pairs: int, names: Sequence[str]) -> None:
    """Print one row for each kind of step. data: a file of reviews and labels, of which the first 64 are read."""
    prepare_process(threads)
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder) / f"some{data.suffix}"
        with data.open(encoding="utf-8") as file:
            some.write_text("".join(line for line, _ in zip(file, range(64), strict=False)), encoding="utf-8")
        for name in names:
            print(_row(name, _settings(model, some, threads) | STEPS[name], pairs), flush=True)


def _settings(model: str, data: Path, threads: int) -> dict[str, Any]:
    return {
        "model": model,
        "dataset": str(data),
        "eval-dataset": str(data),
        "task": "prompt",
        "template": "{{ text }} It was",
        "label-words": " terrible, great",
        "scope": "last-4",
        "block-size": 40,
        "batch-size": 16,
        "learning-rate": 1e-4,
        "device": "cpu",
        "threads": threads,
    }


def _row(name: str, values: dict[str, Any], pairs: int) -> str:
    full, kept = (_step(name, values | {"hidden-states-gigabytes": size}) for size in (0, 8))
    for _ in range(1 if name == "forward" else 7):  # an epoch and more: from now on all is kept
        kept()
    full()
    found: list[tuple[float, float]] = []
    for _ in range(pairs):
        found.append((_cpu_seconds(full), _cpu_seconds(kept)))
    ratios = [ours / other for other, ours in found]
    seconds = [f"{common.median(column)} s" for column in zip(*found, strict=True)]
    times = common.median([1 / ratio for ratio in ratios])
    return f"| {name} | {seconds[0]} | {seconds[1]} | {common.median(ratios)} | {times} |"


def _step(name: str, values: dict[str, Any]) -> Callable[[], None]:
    """A whole step of a replica of its own, measured and applied; `forward`: an evaluation of all examples."""
    settings = config.resolve(values)
    task = Task.load(settings)
    replica, examples = task.replica(), task.shard(0, 1)
    if name == "forward":
        return lambda: metrics.evaluate(replica.model, examples, settings.batch_size) and None
    ask = step_function(settings, replica, examples, 10**6)

    def step() -> None:
        found = ask(replica.round + 1)
        replica.apply(link(replica.head, found.record), found.update)

    return step


def _cpu_seconds(run: Callable[[], None]) -> float:
    """Of this process alone: others on the machine do not count."""
    began = time.process_time()
    run()
    return time.process_time() - began
