"""Peak memory of a step in each mode, as `zofed models` predicts it and as fresh processes measure it.

python -m benchmarks.footprint [--json FILE]

Measured twice: with freed memory given back at once (MALLOC_MMAP_THRESHOLD_), which is what the tensors need, and as a
run goes by default, with freed memory kept for speed.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import status

SIZES = ("20M", "200M")
MODES = ("zo", "fo", "instruct", "calibrate", "subspace")
SHAPES = ((4, 64), (8, 128))
OPTIMIZERS = ("sgd", "adamw")
STEPS, QUERIES, INTERVAL = 4, 8, 2
GIVE_BACK = str(2**20)  # bytes from which a block is the system's own and returns to it when freed


def options(size: str, mode: str, optimizer: str, examples: int, tokens: int) -> dict[str, Any]:
    """Settings of a cell, everything else as it comes."""
    shape = {"batch-size": examples, "block-size": tokens}
    return {"model": size, "mode": mode, "optimizer": optimizer, "queries": QUERIES, "bp-interval": INTERVAL, **shape}


def measure(given: dict[str, Any]) -> int:
    """High-water mark of this process, less its size after the imports, once a model was made and moved twice."""
    from zofed import config
    from zofed.data import encoding
    from zofed.models import spec
    from zofed.training.process import prepare_process

    settings = config.resolve(given | {"device": "cpu"})
    prepare_process(1)
    tokenizer = encoding.load_tokenizer(spec.tokenizer_name(settings))
    _steps(
        config.resolve({"model": "tiny", "mode": settings.mode, "device": "cpu"}), encoding.load_tokenizer("shipped")
    )
    before = status("VmRSS")
    _steps(settings, tokenizer)
    return status("VmHWM") - before


def _steps(settings: Any, tokenizer: Any) -> None:
    """Steps of a central run on random tokens."""
    import torch

    from zofed.core.journal import link
    from zofed.models import spec
    from zofed.training.replicas import replica_of
    from zofed.training.steps import step_function

    model = spec.create_model(settings, tokenizer)
    shape = (2 * settings.batch_size, settings.block_size)
    ids = torch.randint(0, len(tokenizer), shape, generator=torch.Generator().manual_seed(1))
    replica = replica_of(settings, model)
    ask = step_function(settings, replica, {"input_ids": ids, "labels": ids}, STEPS)
    for round_ in range(1, STEPS + 1):
        step = ask(round_)
        replica.apply(link(replica.head, step.record), step.update)
        del step


def measured(given: dict[str, Any], keep: bool) -> int:
    """`measure` in a process of its own; keep: as a run does, without asking glibc to give back what is freed."""
    environment = os.environ if keep else os.environ | {"MALLOC_MMAP_THRESHOLD_": GIVE_BACK}
    one = [sys.executable, "-m", "benchmarks.footprint", "--cell", json.dumps(given)]
    return int(subprocess.run(one, check=True, capture_output=True, text=True, env=environment).stdout.split()[-1])


def cells(sizes: Sequence[str], shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Predicted and measured MiB of every size, shape, optimizer and mode."""
    from zofed import config
    from zofed.preflight import model_info
    from zofed.training.process import prepare_process

    prepare_process(1)
    rows = []
    for size in sizes:
        for shape in shapes:
            for optimizer in OPTIMIZERS:
                for mode in MODES:
                    given = options(size, mode, optimizer, *shape)
                    predicted = model_info.info(config.resolve(given), (mode,)).memory[mode].peak
                    found, kept = measured(given, keep=False), measured(given, keep=True)
                    row = {"predicted": predicted / 2**20, "measured": found / 2**20, "kept": kept / 2**20}
                    rows.append(given | row | {"error": predicted / found - 1})
                    cell = f"{size} | {shape[0]}x{shape[1]} | {optimizer} | {mode}"
                    told = f"{row['predicted']:,.0f} | {row['measured']:,.0f} | {predicted / found - 1:+.0%}"
                    print(f"| {cell} | {told} | {row['kept']:,.0f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint", description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the cells to")
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="sizes of `zofed models`")
    parser.add_argument("--shape", nargs=2, type=int, metavar=("EXAMPLES", "TOKENS"), help="one shape only")
    parser.add_argument("--cell", help="settings of one cell as JSON, measured in this process")
    given = parser.parse_args()
    if given.cell:
        print(measure(json.loads(given.cell)))
        return
    print("| model | batch | optimizer | mode | predicted MiB | measured MiB | error | freed memory kept |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    rows = cells(given.sizes, [tuple(given.shape)] if given.shape else SHAPES)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
