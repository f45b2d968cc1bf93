"""Architectures people use: do many perturbed copies share a pass, how exactly, with adapters, and at what cost?"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from benchmarks import common, tiny_models
from zofed.base.environment import keep_freed_memory
from zofed.base.errors import UserError
from zofed.core import estimators, metrics, perturbed
from zofed.core.digests import named_parameters
from zofed.core.estimators import Parameters
from zofed.core.kinds import Kind
from zofed.core.measure import Measure
from zofed.models import scopes

KINDS: tuple[Kind, ...] = ("rank1", "rank4")
SEEDS, STEP = (3, 1), 0.05
BOUND = 1e-10  # of a loss, relative, in float64
LARGEST_SLOPE_ERROR = 2e-3  # in float32, where losses are differences of rounded numbers
RANK, SPREAD = 4, 0.1  # of adapters
SCOPES = ("last-1", "reduced", "norms", "biases", "head")
TASKS = {
    "causal": "next token",
    "masked": "masked token",
    "classifier": "classes",
    "sequence to sequence": "sequence to sequence",
}
COPIES = 8  # a pass
WIDER, SHAPE = 8, (2, 64)  # of what is timed: times a tiny model; examples x tokens

ALL = {"target_modules": "all-linear"}


@dataclass(frozen=True, slots=True)
class Architecture:
    """kind: its type in transformers. lora: what peft's LoraConfig is told. alone: why it runs one copy a pass."""

    name: str
    task: str
    kind: str
    lora: Mapping[str, Any] = field(default_factory=lambda: ALL)
    lora_note: str = ""
    alone: str = ""

    def build(self, times: int = 1) -> PreTrainedModel:
        """With random weights, in evaluation mode."""
        return tiny_models.build(self.task, self.kind, times)

    def examples(self, shape: tuple[int, int] = (tiny_models.EXAMPLES, tiny_models.TOKENS)) -> dict[str, Tensor]:
        return tiny_models.examples(self.task, *shape)


ARCHITECTURES = (
    Architecture("GPT-2", "causal", "gpt2"),
    Architecture("Llama", "causal", "llama"),
    Architecture("Qwen3", "causal", "qwen3"),
    Architecture("BERT", "masked", "bert"),
    Architecture("T5", "sequence to sequence", "t5"),
    Architecture("Mixtral", "causal", "mixtral"),
    Architecture("Mamba", "causal", "mamba", {"target_modules": ["in_proj", "x_proj"]}, "others peft refuses"),
    Architecture("Reformer", "classifier", "reformer", alone="its hashing draws random numbers"),
    Architecture("ALBERT", "masked", "albert"),
    Architecture("BART", "sequence to sequence", "bart"),
    Architecture("BLOOM", "causal", "bloom"),
    Architecture("Cohere", "causal", "cohere"),
    Architecture("DeBERTa-v2, v3", "masked", "deberta-v2"),
    Architecture("DeBERTa-v2, v3", "classifier", "deberta-v2"),
    Architecture("DeepSeek-V3", "causal", "deepseek_v3"),
    Architecture("DistilBERT", "masked", "distilbert"),
    Architecture("ELECTRA", "masked", "electra"),
    Architecture("Falcon", "causal", "falcon"),
    Architecture("Gemma", "causal", "gemma"),
    Architecture("Gemma 2", "causal", "gemma2"),
    Architecture("Gemma 3, text", "causal", "gemma3_text"),
    Architecture("GPT-J", "causal", "gptj"),
    Architecture("GPT-Neo", "causal", "gpt_neo"),
    Architecture("GPT-NeoX, Pythia", "causal", "gpt_neox"),
    Architecture("gpt-oss", "causal", "gpt_oss"),
    Architecture("Granite", "causal", "granite"),
    Architecture(
        "Jamba", "causal", "jamba", ALL | {"exclude_modules": ["dt_proj"]}, "without dt_proj, which is never called"
    ),
    Architecture("LFM2", "causal", "lfm2"),
    Architecture("Mamba-2", "causal", "mamba2", {"target_modules": ["in_proj"]}, "others peft refuses"),
    Architecture("Mistral", "causal", "mistral"),
    Architecture("ModernBERT", "masked", "modernbert"),
    Architecture("MPT", "causal", "mpt"),
    Architecture("OLMo", "causal", "olmo"),
    Architecture("OLMo 2", "causal", "olmo2"),
    Architecture("OLMoE", "causal", "olmoe"),
    Architecture("OPT", "causal", "opt"),
    Architecture("Phi", "causal", "phi"),
    Architecture("Phi-3", "causal", "phi3"),
    Architecture("Qwen2", "causal", "qwen2"),
    Architecture("Qwen2-MoE", "causal", "qwen2_moe"),
    Architecture("Qwen3-MoE", "causal", "qwen3_moe"),
    Architecture("Qwen3.5, text", "causal", "qwen3_5_text"),
    Architecture("RecurrentGemma", "causal", "recurrent_gemma"),
    Architecture("RoBERTa", "masked", "roberta"),
    Architecture("RWKV", "causal", "rwkv"),
    Architecture("SmolLM3", "causal", "smollm3"),
    Architecture("StableLM", "causal", "stablelm"),
    Architecture("StarCoder2", "causal", "starcoder2"),
    Architecture("T5", "classifier", "t5"),
    Architecture("XLM-RoBERTa", "masked", "xlm-roberta"),
)


class Doubled(TorchFunctionMode):
    """What a model converts to float32 by its own code goes to float64 instead, so that no rounding hides a fault."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(map(_doubled, args))
        kwargs = {key: _doubled(value) for key, value in (kwargs or {}).items()}
        return Tensor.double(*args) if func is Tensor.float else func(*args, **kwargs)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def doubled(model: PreTrainedModel) -> None:
    """Turn the model to float64, its experts to another implementation: torch's grouped product has no float64."""
    if hasattr(model, "set_experts_implementation") and model.config._experts_implementation == "grouped_mm":
        model.set_experts_implementation("batched_mm")
    model.double()


def loss_of(model: nn.Module, architecture: Architecture) -> perturbed.Loss:
    """The mean cross-entropy of the examples in float64, by the logits, whatever type the library's loss has."""
    examples = architecture.examples()
    labels = examples["labels"]
    if architecture.task != "sequence to sequence":  # whose decoder reads the labels
        del examples["labels"]

    def loss() -> Tensor:
        with Doubled():
            logits = model(**examples).logits
            if architecture.task == "classifier":
                return F.cross_entropy(logits, labels)
            if architecture.task == "causal":
                return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return loss


def adapt(model: nn.Module, architecture: Architecture) -> Parameters:
    """Inject LoRA of random A and B; the adapter's parameters."""
    import peft  # seconds, which no other benchmark need wait

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it left out is counted from the names
        peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, **architecture.lora), model)
    adapter = {name: tensor for name, tensor in named_parameters(model).items() if "lora_" in name}
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * SPREAD)
    return adapter


def error_of(loss: perturbed.Loss, parameters: Parameters, kind: Kind) -> float:
    """The largest relative difference of batched losses from those of moved weights; infinite if these are all one."""
    found = perturbed.losses(loss, parameters, kind, SEEDS, [STEP], COPIES)
    moved = estimators.materialised_losses(loss, parameters, kind, SEEDS, [STEP])
    is_seen = float(moved.max() - moved.min()) > 1e-6 * float(moved.max())
    return float(((found - moved).abs() / moved.abs()).max()) if is_seen else torch.inf


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of some parameters: `told` by a run in float32, nothing where it runs batched.

    slope_error: of that run's slopes from those of moved weights, as a share of their root mean square. error: the
    largest of losses in float64, relative; none where the run is one copy a pass.
    """

    told: tuple[str, ...]
    slope_error: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """What was found of an architecture: of all its weights, and of an adapter alone.

    layers: with an adapter. experts: `adapted` or `left` where there are 3-dimensional ones. refused: scopes with
    nothing to train.
    """

    full: Found
    lora: Found
    layers: int
    experts: str
    refused: tuple[str, ...]


def examine(architecture: Architecture) -> Row:
    """Build the model and look at all of it."""
    model = architecture.build()
    refused = tuple(scope for scope in SCOPES if not chosen(model, scope))
    has_experts = any(parameter.dim() == 3 and "experts" in name for name, parameter in model.named_parameters())
    full = _found(model, named_parameters(model), architecture)
    model = architecture.build()
    adapter = adapt(model, architecture)
    lora = _found(model, adapter, architecture)
    experts = ("adapted" if any("experts" in name for name in adapter) else "left") if has_experts else ""
    return Row(full, lora, len(adapter) // 2, experts, refused)


def chosen(model: nn.Module, scope: str) -> list[str]:
    """Names of what a scope trains; none where it is refused."""
    try:
        return scopes.trainable_names(model, scope)
    except UserError:
        return []


def _found(model: PreTrainedModel, parameters: Parameters, architecture: Architecture) -> Found:
    """The model is afterwards in float64."""
    told, slope_error = as_a_run(model, parameters, architecture)
    doubled(model)
    loss = loss_of(model, architecture)
    return Found(told, slope_error, None if told else max(error_of(loss, parameters, kind) for kind in KINDS))


def as_a_run(model: nn.Module, parameters: Parameters, architecture: Architecture) -> tuple[tuple[str, ...], float]:
    """What a run says of the model, measured twice, and how far its slopes are from those of moved weights."""
    examples, epsilon = architecture.examples(), 2.0**-6

    def loss() -> Tensor:
        return metrics.loss_of(model, examples)

    measure = Measure(model, parameters, "rank1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = torch.tensor(measure.slopes(loss, SEEDS, epsilon, COPIES).slopes)
        if said:
            measure.slopes(loss, SEEDS, epsilon, COPIES)
    how = estimators.FiniteDifference("rank1", epsilon, "two-point", COPIES)
    moved = torch.tensor(how.slopes(loss, parameters, SEEDS, batched=False).slopes)
    told = tuple(str(one.message) for one in said)
    return told, float((found - moved).square().mean().sqrt() / moved.square().mean().sqrt())


HEADER = (
    "| architecture | type | trained as | copies share a pass | their losses, relative | LoRA of all linear layers "
    "| scopes with nothing to train |",
    "| --- " * 7 + "|",
)


def line(architecture: Architecture, row: Row) -> str:
    """Markdown: a line of the table."""
    shared = f"no: {architecture.alone}" if architecture.alone else "yes"
    exact = "moved weights" if row.full.error is None else f"{BOUND:.0e}"
    told = {"": "", "adapted": "experts too", "left": "not the experts"}[row.experts]
    lora = ", ".join(part for part in (f"{row.layers} layers", architecture.lora_note, told) if part)
    cells = (
        architecture.name,
        architecture.kind,
        TASKS[architecture.task],
        shared,
        exact,
        lora,
        ", ".join(row.refused),
    )
    return f"| {' | '.join(cells)} |"


def cost(architecture: Architecture, pairs: int) -> list[list[float]]:
    """Seconds of a perturbed copy over those of a plain pass of the same model: of all weights, and of an adapter."""
    found = []
    for is_adapted in (False, True):
        model = architecture.build(WIDER)
        parameters = adapt(model, architecture) if is_adapted else named_parameters(model)
        found.append(_ratios(model, parameters, architecture, pairs))
    return found


def _ratios(model: nn.Module, parameters: Parameters, architecture: Architecture, pairs: int) -> list[float]:
    examples, seeds = architecture.examples(SHAPE), range(COPIES // 2)

    def loss() -> Tensor:
        return metrics.loss_of(model, examples)

    measure = Measure(model, parameters, "rank1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measure.check(loss)

        @torch.inference_mode()
        def plain() -> None:
            for _ in range(COPIES):
                loss()

        return common.ratios({"": lambda: measure.slopes(loss, seeds, 1e-2, COPIES)}, plain, pairs)[""]


def report(pairs: int, only: list[str]) -> None:
    """Print the table of docs/models.md, and then what a copy costs where copies share a pass."""
    keep_freed_memory()
    print("\n".join(HEADER), flush=True)
    some = [one for one in ARCHITECTURES if not only or one.kind in only]
    for one in some:
        print(line(one, examine(one)), flush=True)
    print("\n| architecture | trained as | all weights | LoRA |\n| --- | --- | --- | --- |", flush=True)
    for one in some:
        if one.alone:
            continue
        full, lora = (common.median(ratios) for ratios in cost(one, pairs))
        print(f"| {one.name} | {TASKS[one.task]} | {full} | {lora} |", flush=True)
