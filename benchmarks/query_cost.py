"""What a two-point query costs, in units of its two plain forward passes, measured in pairs within one process.

python benchmarks/query_cost.py [--pairs 7] [--threads 2]
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from zofed import config, estimators, metrics, perturbed
from zofed.memory import keep_freed_memory
from zofed.task import Task

SHAPES = [("tiny", 4, 64), ("20M", 1, 64), ("20M", 2, 128)]
COPIES_PER_PASS = 8
QUERIES = 4


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(model: str, batch_size: int, block: int, pairs: int) -> dict[str, float]:
    """Medians over pairs of (query / its two forward passes), and milliseconds of one forward pass."""
    settings = config.resolve({"model": model, "block-size": block, "device": "cpu"})
    task = Task.load(settings)
    worker, examples = task.worker(), task.examples(task.train[:200])
    batch = {name: tensor[:batch_size] for name, tensor in examples.items()}

    def loss() -> torch.Tensor:
        return metrics.loss_of(worker.model, batch)

    seeds = list(range(QUERIES))
    ways: dict[str, Callable[[], object]] = {
        "batched": lambda: perturbed.losses(loss, worker.parameters, seeds, 3e-4, COPIES_PER_PASS),
        "materialised": lambda: estimators.materialised_losses(loss, worker.parameters, "rank1", seeds, 3e-4),
    }
    forward, found = [], {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(pairs + 1):
            for way, run in ways.items():
                plain = sum(seconds(loss) for _ in range(2 * QUERIES))
                forward.append(plain / (2 * QUERIES))
                found[way].append(seconds(run) / plain)
    return {"forward_ms": 1e3 * statistics.median(forward[2:])} | {
        way: statistics.median(ratios[1:]) for way, ratios in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=4, metavar=("MODEL", "BATCH", "BLOCK", "KEEP"), help="measure one row only")
    given = parser.parse_args()
    if given.one is None:
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {given.threads} threads")
        print("| model | batch | freed memory | forward ms | batched / 2 forwards | materialised / 2 forwards |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        for shape in SHAPES:
            for keep in ("kept", "returned"):  # a process of its own each: the allocator cannot be set back
                one = ["--one", *map(str, shape), keep, "--pairs", str(given.pairs), "--threads", str(given.threads)]
                subprocess.run([sys.executable, __file__, *one], check=True)
        return
    model, batch_size, block, keep = given.one
    torch.set_num_threads(given.threads)
    if keep == "kept":
        keep_freed_memory()
    row = measure(model, int(batch_size), int(block), given.pairs)
    print(
        f"| {model} | {batch_size}x{block} | {keep} | {row['forward_ms']:.1f} | {row['batched']:.2f} "
        f"| {row['materialised']:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
