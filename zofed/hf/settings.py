"""How a Trainer's steps are measured, and which of its arguments have no meaning without gradients."""

import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from zofed.base.errors import UserError
from zofed.core.kinds import OptimizerName
from zofed.core.optimizers import Optimizer

logger = logging.getLogger(__name__)


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ZerothOrderConfig:
    """How the steps of a `ZerothOrderTrainer` are measured, and what trains.

    The rate, its schedule, `weight_decay`, batches and seeds are those of `TrainingArguments`. A dataclass, so that
    `HfArgumentParser((TrainingArguments, ZerothOrderConfig))` makes options of its fields. Raises UserError for an
    optimizer that zofed does not have; what else is wrong the trainer says when it begins.
    """

    queries: int = _setting(16, "directions measured in each step")
    epsilon: float = _setting(3e-4, "step per coordinate of the finite difference")
    directions: str = _setting("rank1", "rank1 (fast), rankR, rademacher or gaussian (as MeZO's, slow)")
    finite_difference: Literal["one-sided", "two-point"] = _setting(
        "one-sided", "one-sided: a pass a query and 1 for all, slopes centred; two-point: 2 a query"
    )
    normalize_slopes: bool = _setting(True, "divide each step by the running spread of the slopes")
    direction_scale: Literal["equal", "rms"] = _setting(
        "equal", "rms: directions and steps of each tensor in proportion to its weights at the start"
    )
    perturbations_per_pass: int = _setting(8, "perturbed copies that share one forward pass")
    trainable: str | None = _setting(
        None, "a scope (full, norms, last-2, ...) or a pattern of names; by default what requires a gradient"
    )
    optimizer: Literal["sgd", "adamw", "mudamw"] = _setting("sgd", "rule that turns a gradient estimate into a step")
    momentum: float = _setting(0.0, "heavy-ball momentum of sgd")
    direction_seed: int | None = _setting(None, "names every direction; by default the seed of TrainingArguments")

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(OptimizerName):
            raise UserError(f"optimizer = {self.optimizer!r}: use {', '.join(get_args(OptimizerName))}")

    def rule(self, weight_decay: float) -> Optimizer:
        """The optimizer of the steps, without a state."""
        return Optimizer(self.optimizer, momentum=self.momentum, weight_decay=weight_decay)


def _default(name: str) -> Any:
    """What transformers sets an argument to where nobody does."""
    (found,) = (each for each in fields(TrainingArguments) if each.name == name)
    return found.default if found.default is not MISSING else None


def check_arguments(args: TrainingArguments, config: ZerothOrderConfig) -> None:
    """Raise UserError for what a Trainer offers and forward passes cannot give; say what has no effect.

    What is left at the value that transformers gives it, such as max_grad_norm = 1.0, is passed over: nobody asked.
    """
    clipped, rule = _default("max_grad_norm"), str(getattr(args.optim, "value", args.optim))
    ours = {"sgd": ("sgd",), "adamw": ("adamw_torch", "adamw_torch_fused"), "mudamw": ()}[config.optimizer]
    betas = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
    refused = (
        (args.deepspeed, "deepspeed", "it shards gradients and their optimizer: zofed has neither to shard"),
        (args.fsdp, "fsdp", "each process would hold a part of every weight, and a record moves whole ones"),
        (args.fp16, "fp16", "it scales gradients, of which there are none: use bf16 = True, or no mixed precision"),
        (
            args.torch_compile,
            "torch_compile",
            "perturbed copies run through the model as it is written, compiled or not",
        ),
        (
            args.max_grad_norm not in (None, 0, clipped),
            "max_grad_norm",
            "it clips by the norm of true gradients, which forward passes do not give: normalize_slopes bounds steps",
        ),
        (
            rule not in (_default("optim"), *ours),
            "optim",
            f"steps are zofed's own: ZerothOrderConfig(optimizer={config.optimizer!r}) says which: sgd, adamw, mudamw",
        ),
        (args.neftune_noise_alpha, "neftune_noise_alpha", "a step's passes must all see the same embeddings"),
        *((getattr(args, name) != _default(name), name, "zofed's AdamW has its moments fixed") for name in betas),
    )
    for wrong, name, why in refused:
        if wrong:
            raise UserError(
                f"{name} = {_value(getattr(args, name))} cannot work by forward passes alone ({why}): leave it out"
            )
    if getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing:
        logger.warning("gradient checkpointing has no effect: forward passes keep nothing for a backward one")
    if config.normalize_slopes and args.learning_rate == _default("learning_rate"):
        logger.warning(
            "learning_rate = %g is transformers' own, made for AdamW: with normalize_slopes a step is in units of the "
            "slopes' spread, and rates are about 0.001 to 0.1",
            args.learning_rate,
        )


def check_processes(args: TrainingArguments) -> None:
    """Raise UserError for more than one process or GPU, of which each would measure a loss of its own."""
    if args.world_size > 1:
        raise UserError(
            f"{args.world_size} processes would each measure and move a model of their own: start one; the queries of "
            "a step are split over several processes or GPUs by torchrun -m zofed train, or zofed train --devices"
        )
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible, over which transformers would copy the model (DataParallel): set "
            "CUDA_VISIBLE_DEVICES=0; zofed train --devices splits the queries of a step over several"
        )


def differences(config: ZerothOrderConfig, before: Mapping[str, Any]) -> list[str]:
    """Fields that another run had otherwise, each as a phrase."""
    now = {each.name: getattr(config, each.name) for each in fields(config)}
    return [
        f"{name} = {now[name]} (before: {before[name]})" for name in now if name in before and before[name] != now[name]
    ]


def _value(value: Any) -> str:
    text = repr(getattr(value, "value", value))
    return text if len(text) < 40 else "..."
