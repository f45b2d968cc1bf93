"""What MKL's reproducible mode costs: the same work with it and without, each in processes of its own, in pairs."""

import os
import subprocess
import sys
import time

import torch

from benchmarks import common, query
from zofed.base import arithmetic

WORK = ("forward", "step")


def measure(size: str, shape: tuple[int, int], threads: int) -> None:
    """In this process: print the CPU seconds of a plain forward pass and of a zeroth-order step, after warming up."""
    torch.set_num_threads(threads)
    queries, copies = query.SHAPES[shape]
    ids = common.batch_of(shape)
    model = common.fused(common.plain_gpt2(size))
    loss, replica = common.loss_of(model, ids), common.replica_of(model)

    @torch.inference_mode()
    def forward() -> None:
        for _ in range(queries):
            loss()

    runs = {"forward": forward, "step": lambda: query.step(replica, loss, queries, copies)}
    for name in WORK:
        runs[name]()
        took = []
        for _ in range(3):
            began = time.process_time()
            runs[name]()
            took.append(time.process_time() - began)
        print(name, min(took), arithmetic.mkl_mode())


def report(size: str, threads: int, pairs: int) -> None:
    """Print a row a shape: CPU seconds with the mode over those without, medians over `pairs` of processes."""
    for shape in query.SHAPES:
        ratios: dict[str, list[float]] = {name: [] for name in WORK}
        modes = ("", "")
        for _ in range(pairs):
            off, on = (_child(size, shape, threads, mode) for mode in ("", None))
            modes = (off["mode"], on["mode"])
            for name in WORK:
                ratios[name].append(float(on[name]) / float(off[name]))
        shown = " | ".join(common.median(ratios[name]) for name in WORK)
        print(f"| {size} | {shape[0]}x{shape[1]} | {modes[1]} over {modes[0]} | {shown} |", flush=True)


def _child(size: str, shape: tuple[int, int], threads: int, mode: str | None) -> dict[str, str]:
    """Seconds by name, and MKL's mode, of one process. mode: of MKL_CBWR; None: as zofed chooses."""
    environment = {key: value for key, value in os.environ.items() if key != arithmetic.VARIABLE}
    if mode is not None:
        environment[arithmetic.VARIABLE] = mode
    command = [sys.executable, "-m", "benchmarks", "blas-of", size, *map(str, shape), str(threads)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in out.splitlines() if line.startswith(WORK)]
    return {name: seconds for name, seconds, _ in rows} | {"mode": rows[0][2]}
