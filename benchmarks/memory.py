"""Peak memory of a zeroth-order step over that of inference: high-water marks of fresh processes."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

WAYS = ("inference", "one copy", "two copies", "many copies", "MeZO", "backpropagation, AdamW")


def status(field: str) -> int:
    """Bytes of one line of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


def measure(way: str, size: str, shape: tuple[int, int], copies: int) -> int:
    """High-water mark of this process, less its size after the imports, once it has worked in one way."""
    import torch

    from benchmarks import common, query

    torch.set_num_threads(1)
    ids = common.batch_of(shape)
    query.step(*_smallest(), 1, 1)  # loads what torch and transformers load late
    before = status("VmRSS")
    model = common.plain_gpt2(size)
    loss = common.loss_of(model, ids)
    if way == "inference":
        with torch.inference_mode():
            for _ in range(2):
                loss()
    elif way == "MeZO":
        common.mezo_query(model, loss, 1, 1e-3, 1e-9)
    elif way.startswith("backpropagation"):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-9)
        for _ in range(2):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    else:
        replica = common.replica_of(common.fused(model))
        for _ in range(2):
            query.step(replica, loss, 8, {"one copy": 1, "two copies": 2}.get(way, copies))
    return status("VmHWM") - before


def _smallest() -> tuple[Any, Any]:
    """A replica and its loss, as small as they come."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks import common

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1)).eval()
    return common.replica_of(model), common.loss_of(model, common.batch_of((1, 4)) % 64)


def report(size: str, shape: tuple[int, int], copies: int) -> None:
    """Print one row a way of working, each in a process of its own."""
    base = 0
    for way in WAYS:
        one = [sys.executable, "-m", "benchmarks", "memory-of", way, size, *map(str, shape), str(copies)]
        found = int(subprocess.run(one, check=True, capture_output=True, text=True).stdout.split()[-1])
        base = base or found
        shown = f"{copies} copies" if way == "many copies" else way
        print(f"| {size} | {shape[0]}x{shape[1]} | {shown} | {found / 2**20:,.0f} | {found / base:.2f} |", flush=True)
