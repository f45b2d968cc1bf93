"""Memory, slopes and losses over a base in float32, bfloat16, int8 and nf4, of a causal model whose folder is given."""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.footprint import GIVE_BACK
from benchmarks.memory import status
from zofed import config
from zofed.config import Settings
from zofed.core import estimators
from zofed.core.digests import named_parameters
from zofed.core.journal import link
from zofed.core.replica import Replica
from zofed.data import encoding
from zofed.models import quantised, scopes, spec
from zofed.preflight import model_info
from zofed.training import central
from zofed.training.process import prepare_process
from zofed.training.replicas import replica_of
from zofed.training.steps import step_function

PARTS = ("memory", "slopes", "losses")
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantisation": "int8"},
    "nf4": {"quantisation": "nf4"},
    "nf4, bfloat16": {"quantisation": "nf4", "dtype": "bfloat16"},
}
SHAPE = (4, 64)
QUERIES, COPIES = 2, 2  # of the step whose memory is measured
EPSILONS = (1e-3, 1e-2, 1e-1)
SEEDS = tuple(range(4))
# Zeroth order on norms by prompt: what a person with little memory would run.
PROMPTED: dict[str, Any] = {"task": "prompt", "template": "{{ text }} It was", "label-words": " terrible, great"}
PROMPTED |= {"scope": "norms", "block-size": 32, "batch-size": 4, "queries": 4, "steps": 30, "eval-interval": 30}
PROMPTED |= {
    "optimizer": "adamw",
    "learning-rate": 0.002,
    "epsilon": 0.01,
    "eval-examples": 32,
    "controls": False,
    "baselines": False,
}


def report(model: str, data: Path, parts: Sequence[str], bases: Sequence[str], repeats: int, seeds: int) -> None:
    """Print the tables of some parts. repeats: processes a row of memory; seeds: runs a base."""
    if "memory" in parts:
        columns = ("base", "trains", "weights", "read", "held", "inference", "first step", "step", "over inference")
        print(f"| {' | '.join((*columns, 'predicted', 'error'))} |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for base in bases:
            trained = {"float32": ("full", "norms", "lora"), "nf4": ("norms", "lora")}
            for trains in trained.get(base, ("norms",)):
                print(_memory_row(model, base, trains, repeats), flush=True)
    if "slopes" in parts:
        print(f"| layers | {' | '.join(f'epsilon {epsilon:g}' for epsilon in EPSILONS)} |")
        print(f"| --- |{' --- |' * len(EPSILONS)}", flush=True)
        for row in _slope_rows(model):
            print(row, flush=True)
    if "losses" in parts:
        print("| base | start | end | CPU seconds |\n| --- | --- | --- | --- |", flush=True)
        for base in bases:
            print(_loss_row(model, data, base, seeds), flush=True)


def _settings(model: str, base: str, **more: Any) -> Settings:
    return config.resolve({"model": model, "device": "cpu", "threads": 1} | BASES[base] | more)


def _shaped(model: str, base: str, trains: str) -> Settings:
    """Settings of a step on random tokens. trains: a scope, or lora."""
    shape = {"batch-size": SHAPE[0], "block-size": SHAPE[1], "queries": QUERIES, "perturbations-per-pass": COPIES}
    return _settings(model, base, **({"adapter": "lora"} if trains == "lora" else {"scope": trains}), **shape)


def measure(model: str, base: str, trains: str) -> dict[str, int]:
    """Bytes beside the imports, in this process: while reading, held after it, at the peaks of inference and two steps.

    The first of them looks whether the loss is a function of the weights, once a run.
    """
    settings = _shaped(model, base, trains)
    prepare_process(1)
    tokenizer = encoding.load_tokenizer(model)
    small = config.resolve({"model": "tiny", "device": "cpu", "scope": "norms"} | BASES[base])
    _step(_replica(small, encoding.load_tokenizer("shipped")), small)  # loads what is loaded late
    gc.collect()
    before = status("VmRSS")
    replica = _replica(settings, tokenizer)
    gc.collect()
    found = {"read": status("VmHWM") - before, "held": status("VmRSS") - before}
    ids = _ids(settings, len(tokenizer))

    @torch.inference_mode()
    def infer() -> None:
        replica.model(input_ids=ids)

    found["inference"] = found["held"] + _most_more(infer)
    found["first"] = found["held"] + _most_more(lambda: _step(replica, settings))
    found["step"] = found["held"] + _most_more(lambda: _step(replica, settings))
    found["weights"] = sum(tensor.nbytes for tensor in replica.model.parameters())
    return found


def _replica(settings: Settings, tokenizer: Any) -> Replica:
    return replica_of(settings, spec.create_model(settings, tokenizer))


def _ids(settings: Settings, entries: int) -> Tensor:
    return torch.randint(0, entries, (settings.batch_size, settings.block_size))


def _step(replica: Replica, settings: Settings) -> None:
    ids = _ids(settings, replica.model.config.vocab_size)  # type: ignore[arg-type]
    ask = step_function(settings, replica, {"input_ids": ids, "labels": ids}, 4)
    found = ask(replica.round + 1)
    replica.apply(link(replica.head, found.record), found.update)


def _most_more(run: Callable[[], object]) -> int:
    """Most bytes of its own that this process holds during `run`, looked at every two milliseconds, over those before.

    Not its high-water mark: pages of libraries come and go beside other processes.
    """
    before, found, ended = status("RssAnon"), [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.002):
            found.append(status("RssAnon") - before)

    watcher = threading.Thread(target=look)
    watcher.start()
    run()
    ended.set()
    watcher.join()
    return max(found)


def _memory_row(model: str, base: str, trains: str, repeats: int) -> str:
    one = [sys.executable, "-m", "benchmarks", "quantised-of", model, base, trains]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": GIVE_BACK}
    rows = [
        json.loads(
            subprocess.run(one, check=True, capture_output=True, text=True, env=environment).stdout.split("\n")[-2]
        )
        for _ in range(repeats)
    ]
    cells = [_mib([row[key] for row in rows]) for key in ("weights", "read", "held", "inference", "first", "step")]
    ratio = common.median([row["step"] / row["inference"] for row in rows])
    size = model_info.info(_shaped(model, base, trains), ("zo",)).memory["zo"].peak
    errors = [size / row["step"] - 1 for row in rows]
    predicted = [f"{size / 2**20:,.0f}", f"{statistics.median(errors):+.0%}"]
    return f"| {base} | {trains} | {' | '.join([*cells, ratio, *predicted])} |"


def _mib(sizes: Sequence[int]) -> str:
    low, middle, high = (size / 2**20 for size in (min(sizes), statistics.median(sizes), max(sizes)))
    return f"{middle:,.0f}" if high - low < 1 else f"{middle:,.0f} ({low:,.0f}-{high:,.0f})"


def _slope_rows(model: str) -> list[str]:
    """Errors of two-point slopes, along weights that are really moved, by the slopes' own root mean square."""
    prepare_process(1)
    tokenizer = encoding.load_tokenizer(model)
    ids = torch.randint(0, len(tokenizer), (1, 64), generator=torch.Generator().manual_seed(1))
    rows = []
    for name, base, theirs in (
        ("float32", "float32", False),
        ("int8, zofed's", "int8", False),
        ("int8, bitsandbytes' own", "int8", True),
        ("nf4, zofed's", "nf4", False),
        ("nf4, bitsandbytes' own", "nf4", True),
        ("bfloat16", "bfloat16", False),
    ):
        replica = replica_of(
            _settings(model, base, scope="norms"), spec.create_model(_settings(model, base), tokenizer)
        )
        loss = common.loss_of(replica.model, ids)
        exact = estimators.exact_slopes(loss, replica.parameters, "rank1", SEEDS)
        if theirs:
            other = spec.create_model(_settings(model, base), tokenizer)
            names = scopes.trainable_names(other, "norms")
            chosen = quantised.names(other, base, names, "norms")  # type: ignore[arg-type]
            _put_librarys_layers(other, base, chosen)
            trained: estimators.Parameters = {name: named_parameters(other)[name] for name in replica.parameters}
            loss = common.loss_of(other, ids)
        else:
            trained = replica.parameters
        cells = []
        for epsilon in EPSILONS:
            losses = estimators.materialised_losses(loss, trained, "rank1", SEEDS, (epsilon, -epsilon))
            slopes = ((losses[:, 0] - losses[:, 1]).double() / (2 * epsilon)).tolist()
            misses = [slope - truth for slope, truth in zip(slopes, exact, strict=True)]
            cells.append(f"{estimators.root_mean_square(misses) / estimators.root_mean_square(exact):.1%}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def _put_librarys_layers(model: nn.Module, kind: str, chosen: Sequence[str]) -> None:
    """bitsandbytes' own layers, with their own forwards, in the place of linear ones."""
    import bitsandbytes

    layers: Any = bitsandbytes.nn
    for name in chosen:
        path = name.removesuffix(".weight")
        plain = model.get_submodule(path)
        assert type(plain) is nn.Linear and plain.bias is None
        sizes = plain.in_features, plain.out_features
        if kind == "int8":
            made = layers.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            made.weight = layers.Int8Params(plain.weight.data, requires_grad=False).to("cpu")
        else:
            how = {"compress_statistics": False, "quant_type": "nf4"}
            made = layers.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, **how)
            made.weight = layers.Params4bit(plain.weight.data, requires_grad=False, module=made, **how).to("cpu")
        parent, _, last = path.rpartition(".")
        setattr(model.get_submodule(parent), last, made.eval())


def _loss_row(model: str, data: Path, base: str, seeds: int) -> str:
    """Held-out losses before and after short runs, which also prove that each replays."""
    starts, ends, seconds = [], [], []
    for seed in range(1, seeds + 1):
        values = PROMPTED | {"dataset": str(data), "seed": seed}
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            summary = central.train(_settings(model, base, **values), Path(folder) / "run", lambda row: None)
        if summary["replay_digest"] != summary["digest"]:
            raise SystemExit(f"the replay over {base} ends elsewhere")
        starts.append(summary["eval_loss_start"])
        ends.append(summary["eval_loss_end"])
        seconds.append(time.process_time() - began)
    return f"| {base} | {common.median(starts)} | {common.median(ends)} | {statistics.median(seconds):.0f} |"
