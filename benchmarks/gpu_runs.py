"""Whole runs on a GPU, replayed on the CPU: one digest for prompts, adapters, rounded bases and bfloat16."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common, query
from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import journal
from zofed.core.replica import Replica
from zofed.models import adapters, spec
from zofed.runs.run_folder import RunFolder
from zofed.training import central

PROMPT: dict[str, Any] = {"task": "prompt", "template": "{{ text }} It was", "label-words": " terrible, great"}
LORA: dict[str, Any] = PROMPT | {"adapter": "lora"}
RUNS: dict[str, dict[str, Any]] = {
    "prompt, last-1": PROMPT | {"scope": "last-1"},
    "prompt, bfloat16": PROMPT | {"dtype": "bfloat16", "scope": "last-1"},
    "LoRA": LORA,
    "LoRA, subspace": LORA | {"mode": "subspace", "subspace-size": 64, "subspace-interval": 2},
    "LoRA, bfloat16": LORA | {"dtype": "bfloat16"},
    "LoRA over int8": LORA | {"quantisation": "int8"},
    "LoRA over nf4, bfloat16": LORA | {"quantisation": "nf4", "dtype": "bfloat16"},
}
PLACED = {"": {}, "LoRA over nf4": LORA | {"quantisation": "nf4"}, "fo": {"mode": "fo", "optimizer": "adamw"}}
QUERIES = 8  # of a step that is timed, two passes each
BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32_000}
BILLION |= {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}  # TinyLlama's shape


def checks(device: str, model: str) -> Iterator[tuple[str, bool]]:
    """Of each kind of run what it is, and whether the CPU's replay from base and journal gives its digest."""
    for name, values in RUNS.items():
        try:
            yield f"run on {device}, replayed on cpu: {name}", _replays(device, model, values)
        except UserError as error:
            yield f"run on {device}: {name}: {error}", False
    if device == "cuda" and (count := torch.cuda.device_count()) > 1:
        for name, values in PLACED.items():
            told = f"layers over {count} GPUs, steps of one: {name or 'zo'}"
            try:
                yield told, _digest("auto", model, values | {"placement": "auto"}) == _digest("cuda:0", model, values)
            except UserError as error:
                yield f"{told}: {error}", False


def left_out(device: str) -> list[str]:
    """What this machine cannot check, a line each."""
    if device == "cuda" and torch.cuda.device_count() > 1:
        return []
    return ["layers over several GPUs (placement = auto): this machine has fewer than two, or --device names one"]


def _settings(device: str, model: str, values: dict[str, Any]) -> Settings:
    short = {"model": model, "dataset": "sample-sst2", "block-size": 48, "batch-size": 4, "queries": 4, "steps": 4}
    short |= {"eval-examples": 16, "eval-interval": 4, "baselines": False, "controls": False, "save-interval": 0}
    return config.resolve(short | {"device": device} | values)


def _digest(device: str, model: str, values: dict[str, Any]) -> str:
    """Of the weights that a short run ends with."""
    with tempfile.TemporaryDirectory() as place:
        found = central.train(_settings(device, model, values), Path(place) / "run", lambda _: None)
        return str(found["digest"])


def _replays(device: str, model: str, values: dict[str, Any]) -> bool:
    settings = _settings(device, model, values)
    with tempfile.TemporaryDirectory() as place:
        found = central.train(settings, Path(place) / "run", lambda _: None)
        contents = journal.read(RunFolder(Path(place) / "run").journal)
        base = spec.rebuild(contents.genesis["model"], contents.genesis["seed"], settings.dtype, model)
        replica = Replica(base, contents.genesis)
        replica.replay(contents.entries)
        return replica.digest() == found["digest"]


def billion(device: str) -> None:
    """Print what a step costs on a Llama of 1.1 billion random weights in bfloat16, LoRA of rank 8 on q and v."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**BILLION))  # type: ignore[arg-type]
    torch.set_default_dtype(torch.float32)
    model.eval()
    ids = common.batch_of((4, 128), device) % BILLION["vocab_size"]
    forward = common.loss_of(model, ids)

    @torch.inference_mode()
    def unit() -> None:
        for _ in range(2 * QUERIES):
            forward()

    base = common.peak(unit)
    adapters.inject(model, adapters.Lora(8, 16.0), 0, "")
    replica = common.replica_of(model)
    loss = common.loss_of(model, ids)
    for copies in (2, 8):
        run = partial(query.step, replica, loss, QUERIES, copies)
        found = common.median(common.ratios({"step": run}, unit, 5)["step"])
        print(f"Llama 1.1B, LoRA, 4x128, {copies} copies: {found} of {2 * QUERIES} passes with the adapter, memory "
              f"{common.peak(run) / base:.2f}")  # fmt: skip
