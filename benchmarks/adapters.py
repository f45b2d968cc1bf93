"""What a step along directions of an adapter costs, in units of the plain passes of the same model without it."""

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import common
from zofed import config
from zofed.config import Settings
from zofed.core.journal import link
from zofed.data import encoding
from zofed.models import spec
from zofed.training.process import prepare_process
from zofed.training.replicas import replica_of
from zofed.training.steps import step_function

WAYS: dict[str, dict[str, object]] = {
    "zo, 2 copies": {"perturbations-per-pass": 2},
    "zo, 4 copies": {"perturbations-per-pass": 4},
    "zo, 8 copies": {"perturbations-per-pass": 8},
    "fo": {"mode": "fo"},
}
QUERIES, EXAMPLES, TOKENS = 7, 4, 64


def report(folder: Path, threads: int, pairs: int) -> None:
    """Print a row for each way: LoRA of rank 8 on q and v of all layers, and all weights; ratios of `pairs` runs."""
    prepare_process(threads)
    print("| step | over | LoRA, rank 8 | full |\n| --- | --- | --- | --- |", flush=True)
    for way, values in WAYS.items():
        unit = "a pass forward and backward" if way == "fo" else f"{QUERIES + 1} passes forward"
        cells = [_ratio(_settings(folder, threads, values | adapter), pairs) for adapter in ({"adapter": "lora"}, {})]
        print(f"| {way} | {unit} | {' | '.join(cells)} |", flush=True)


def _settings(folder: Path, threads: int, values: dict[str, object]) -> Settings:
    sizes = {"batch-size": EXAMPLES, "block-size": TOKENS, "queries": QUERIES, "threads": threads, "device": "cpu"}
    return config.resolve({"model": str(folder), "learning-rate": 1e-9} | sizes | values)


def _ratio(settings: Settings, pairs: int) -> str:
    tokenizer = encoding.load_tokenizer(settings.model)
    plain = spec.create_model(settings.model_copy(update={"adapter": "none"}), tokenizer)
    replica = replica_of(settings, spec.create_model(settings, tokenizer))
    ids = torch.randint(0, len(tokenizer), (EXAMPLES, TOKENS), generator=torch.Generator().manual_seed(0))
    ask = step_function(settings, replica, {"input_ids": ids, "labels": ids}, 10**6)

    def ours() -> None:
        step = ask(replica.round + 1)
        replica.apply(link(replica.head, step.record), step.update)

    run = {"step": ours}
    return common.median(common.ratios(run, _plain(plain, ids, settings), pairs)["step"])


def _plain(model: torch.nn.Module, ids: torch.Tensor, settings: Settings) -> Callable[[], None]:
    @torch.inference_mode()
    def forwards() -> None:
        for _ in range(QUERIES + 1):
            model(input_ids=ids, labels=ids, use_cache=False)

    def both() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return both if settings.mode == "fo" else forwards
