"""What the measurements share: the model, a MeZO twin, timing in pairs."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from zofed.core.genesis import make_genesis
from zofed.core.optimizers import Optimizer
from zofed.core.replica import Replica
from zofed.models import precision, scopes

SIZES = {"20M": {"n_embd": 256, "n_layer": 6, "n_head": 4}, "124M": {}}
Loss = Callable[[], Tensor]


def plain_gpt2(size: str, device: str = "cpu") -> GPT2LMHeadModel:
    """GPT-2 as Hugging Face builds it, random weights (the same for every call), in evaluation mode."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES[size]))
    model.config.use_cache = False
    nn.Module.to(model, device)
    return model.eval()


def replica_of(
    model: nn.Module, kind: str = "rank1", scope: str = "full", optimizer: Optimizer | None = None
) -> Replica:
    """The model as zofed trains it."""
    names = scopes.trainable_names(model, scope)
    return Replica(model, make_genesis(model, {}, names, seed=1, kind=kind, optimizer=optimizer or Optimizer("sgd")))


def fused(model: GPT2LMHeadModel) -> nn.Module:
    """The model as `zofed.models.spec` hands it out: float32, the activation in one pass."""
    return precision.ready(model, "float32")


def batch_of(shape: tuple[int, int], device: str = "cpu") -> Tensor:
    """Token ids (examples, tokens), the same for every call."""
    return torch.randint(0, 50257, shape, generator=torch.Generator().manual_seed(1)).to(device)


def loss_of(model: nn.Module, ids: Tensor) -> Loss:
    return lambda: model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def mezo_query(model: nn.Module, loss: Loss, seed: int, epsilon: float, rate: float) -> None:
    """One step of MeZO (Malladi et al., 2023): Gaussian noise drawn anew in each of four passes over the weights."""

    def shift(factor: float) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * factor)

    shift(epsilon)
    above = float(loss())
    shift(-2 * epsilon)
    below = float(loss())
    shift(epsilon)
    shift(-rate * (above - below) / (2 * epsilon))


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock of one call, the accelerator's queue included."""
    _settle()
    began = time.perf_counter()
    run()
    _settle()
    return time.perf_counter() - began


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(runs: dict[str, Callable[[], object]], unit: Callable[[], object], pairs: int) -> dict[str, list[float]]:
    """Seconds of each run over those of `unit`, timed right before it, `pairs` times after one round of warming up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for turn in range(pairs + 1):
        for name, run in runs.items():
            base = seconds(unit)
            ratio = seconds(run) / base
            if turn:
                found[name].append(ratio)
    return found


def median(values: Sequence[float]) -> str:
    """Median with its range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def machine() -> str:
    """The processor, in words."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, threads: {threads}, Python {platform.python_version()}, torch {torch.__version__}"


def peak(run: Callable[[], object]) -> int:
    """Most bytes allocated on the GPU while `run` worked; 0 where there is none."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated()
