"""Every setting, its type, its limits, its default; one schema for the command line, TOML files and Flower."""

import difflib
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zofed import directions
from zofed.errors import UserError

WITH_BACKPROP = ("instruct", "calibrate")  # modes of zeroth order that backpropagation helps
OBJECTIVES = ("loss", "accuracy", "f1")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Settings(BaseModel):
    """The settings of one run. Written kebab-case outside (`learning-rate`), read as attributes inside."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_kebab, allow_inf_nan=False)

    mode: Literal["zo", "fo", "instruct", "calibrate", "subspace"] = Field(
        "zo",
        description="zo: forward passes only; fo: backpropagation; instruct: a gradient shapes the directions; "
        "calibrate: zo with a backprop step now and then; subspace: backprop on the coefficients of seeded directions",
    )
    model: str = Field(
        "tiny",
        description="tiny, 20M, 200M, 500M, 1B (fresh, GPT-2 shaped), a saved model's folder, or OWNER/NAME of the hub",
    )
    revision: str = Field(
        "", description="commit, branch or tag of a hub model; empty: main as it is cached; a run records the commit"
    )
    task: Literal["language-model", "classification"] = Field(
        "language-model", description="predict the next token, or the label of each document"
    )
    freeze_encoder: bool = Field(
        False, description="train a classifier's head alone, on features of the encoder computed once"
    )
    pooling: Literal["auto", "mean", "pooler", "last-token"] = Field(
        "auto",
        description="what a classifier's head reads; auto: as the model's own does, mean if the encoder is frozen",
    )
    dataset: str = Field(
        "sample-dclm", description="sample-dclm, sample-pubmedqa, sample-sst2, pydoc, or a local file or folder"
    )
    tokenizer: str = Field("", description="shipped, gpt2 or a folder; empty: the one that fits the model")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of the documents kept for evaluation, never trained on")
    block_size: int = Field(64, ge=2, description="tokens per training example")
    scope: str = Field(
        "full", description="what trains: full, reduced, norms, biases, head, last-K, or a regular expression of names"
    )
    directions: str = Field(
        "rank1",
        pattern=f"^({directions.KIND_PATTERN})$",
        description="rank1 (fast), rankR (a sum of R of them), rademacher or gaussian (dense, slow) (zo)",
    )
    direction_sizes: Literal["equal", "rms"] = Field(
        "equal", description="rms: each tensor's directions and steps in proportion to its weights at the start (zo)"
    )
    estimator: Literal["two-point", "one-sided"] = Field(
        "one-sided", description="one-sided: a pass a query and 1 for all, slopes centred; two-point: 2 a query (zo)"
    )
    normalise: bool = Field(True, description="divide each step by the running spread of the slopes (zo)")
    queries: int = Field(32, ge=1, le=16384, description="directions measured per step and client (zo)")
    epsilon: float = Field(3e-4, ge=1e-6, le=1, description="step per coordinate of the finite difference (zo)")
    optimizer: Literal["sgd", "adamw", "mudamw"] = Field(
        "sgd", description="rule that turns a gradient estimate into a step; mudamw orthogonalises AdamW's"
    )
    learning_rate: float = Field(0.01, gt=0, description="step size of the optimizer")
    momentum: float = Field(0.0, ge=0, lt=1, description="heavy-ball momentum of sgd")
    weight_decay: float = Field(0.0, ge=0, lt=1, description="decoupled weight decay")
    cautious: bool = Field(False, description="mudamw leaves out entries whose step points up the present gradient")
    bp_optimizer: Literal["", "sgd", "adamw", "mudamw"] = Field(
        "", description="rule for the steps that backprop gives, with a state of its own; empty: as optimizer"
    )
    bp_learning_rate: float = Field(0.0, ge=0, description="their step size; 0: as learning-rate")
    schedule: Literal["constant", "cosine"] = Field("constant", description="course of the rates after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rates rise linearly from 0")
    min_learning_rate: float = Field(0.0, ge=0, description="rate at which cosine ends")
    clip_norm: float = Field(0.0, ge=0, description="largest norm of a step's gradient estimate; 0: no limit")
    batch_size: int = Field(4, ge=1, description="examples per step and client")
    gradient_accumulation: int = Field(1, ge=1, description="backprop batches whose gradients make up one step")
    bp_batch_size: int = Field(0, ge=0, description="examples of a backprop pass (instruct, calibrate); 0: batch-size")
    bp_interval: int = Field(10, ge=1, description="steps from one backprop pass to the next (instruct, calibrate)")
    bp_dataset: str = Field("", description="other data for backprop (instruct, calibrate); empty: the same")
    split_dataset_for_bp_zo: float = Field(
        0.0, ge=0, lt=1, description="share of the documents that backprop alone sees (instruct, calibrate); 0: shared"
    )
    zo_data: Literal["shared", "per-query"] = Field(
        "shared", description="shared: all directions see one batch; per-query: each sees examples of its own"
    )
    zo_query_batch_size: int = Field(0, ge=0, description="examples of a query's own (per-query); 0: batch-size")
    objective: str = Field(
        "loss", description="what zo lowers: loss, accuracy or f1 (as 1 - score), or module:function of (model, batch)"
    )
    instruct_kind: Literal["hybrid", "hybrid-rank1", "cosine", "guide-only", "line"] = Field(
        "hybrid-rank1",
        description="hybrid: the gradient's largest coordinates, noise on the others; hybrid-rank1: noise on all, "
        "batched; cosine: all of the gradient and noise; guide-only, line: arms that tell what the rest adds",
    )
    instruct_weighting: Literal["raw", "projected", "unbiased"] = Field(
        "projected", description="raw: mean of slope * direction; projected: over its mean square; unbiased"
    )
    blend: bool = Field(True, description="mean of the guided estimate and the backprop gradient (instruct)")
    instruct_cosine_target: float = Field(
        0.9, gt=0, lt=1, description="cosine of the kept coordinates, or of the whole direction, with the gradient"
    )
    instruct_noise_scale: float = Field(0.5, gt=0, description="norm of full noise over the gradient's (hybrid)")
    guide_step: float = Field(0.01, gt=0, description="Euclidean length of the finite difference along a guide")
    subspace_size: int = Field(1024, ge=1, le=65536, description="coefficients trained in a subspace")
    subspace_variant: Literal["core", "diagonal"] = Field(
        "core", description="core: all pairs of sqrt(size) left and right factors; diagonal: size directions, slower"
    )
    subspace_interval: int = Field(16, ge=1, description="backprop passes in each step's fresh subspace")
    steps: int = Field(100, ge=1, description="steps of a central run")
    epochs: float = Field(0.0, ge=0, description="instead of steps: passes over the data; 0: steps decide")
    max_forward_equivalents: int = Field(
        0, ge=0, description="stop after so many examples run forward, a backward counting two; 0: no limit"
    )
    max_seconds: float = Field(0.0, ge=0, description="stop after so many seconds of training; 0: no limit")
    max_tokens: int = Field(0, ge=0, description="stop after so many tokens of training data; 0: no limit")
    rounds: int = Field(100, ge=1, description="rounds of a federated run; each is one step")
    clients: int = Field(0, ge=0, description="clients a federated run waits for; 0: all nodes that are there")
    partition: Literal["iid", "dirichlet", "source"] = Field(
        "iid",
        description="how clients share the documents; dirichlet: skewed by label, else topic or source; source: each "
        "client one, or whole ones",
    )
    dirichlet_alpha: float = Field(0.5, gt=0, description="evenness of a dirichlet partition; small: one label each")
    round_timeout: float = Field(600.0, gt=0, description="seconds after which a round stops waiting for replies")
    node_timeout: float = Field(60.0, gt=0, description="seconds a federated run waits for its nodes to appear")
    quorum: int = Field(0, ge=0, description="replies a round needs; 0: all clients asked")
    participation: float = Field(
        1.0, gt=0, description="clients asked in each round: a share up to 1, or a number above it"
    )
    zo_clients: int = Field(
        0, ge=0, description="so many clients, the last ones, run forward passes only, besides nodes that say mode = zo"
    )
    seeds: Literal["distinct", "shared"] = Field(
        "distinct", description="distinct: each client measures directions of its own; shared: all the same (zo)"
    )
    local_steps: int = Field(1, ge=1, le=1024, description="steps a client takes on its own in each round (zo, fo)")
    local_learning_rate: float = Field(0.0, ge=0, description="step size of plain SGD there; 0: as learning-rate")
    steps_per_message: int = Field(1, ge=1, le=1024, description="rounds asked for in one exchange (zo)")
    proximal: float = Field(0.0, ge=0, description="pull of a client's local steps towards the round's start (fo)")
    weighting: Literal["equal", "examples"] = Field(
        "equal", description="what a client counts in the merge: all alike, or by its examples up to example-cap"
    )
    example_cap: int = Field(10_000, ge=1, description="examples a client can count with at most")
    merge: Literal["mean", "trimmed", "median"] = Field(
        "mean", description="how answers along the same directions, or updates, become one; the others bear liars"
    )
    trim: float = Field(0.2, gt=0, lt=0.5, description="share of the answers that trimmed leaves out at either end")
    clip_slopes: float = Field(
        10.0, ge=0, description="bound on a client's slopes, times the size common among the clients; 0: none"
    )
    largest_update: float = Field(0.0, ge=0, description="largest norm of a client's update or gradient; 0: any (fo)")
    guide_source: Literal["clients", "server"] = Field(
        "clients", description="who backpropagates: clients that can, or the server on bp-dataset (instruct, calibrate)"
    )
    guide_rank: int = Field(
        4, ge=0, le=1024, description="singular factors of each matrix that a guide keeps on its way; 0: all of it"
    )
    client_held_out: float = Field(
        0.0, ge=0, lt=1, description="share of its data on which each client evaluates; 0: only the server does"
    )
    coefficient_bits: int = Field(
        18, ge=3, le=18, description="bits of the largest slope or coefficient on its way; 6: a byte each, 18: three"
    )
    losses_withheld: bool = Field(False, description="clients report no losses")
    digest_interval: int = Field(
        50, ge=0, description="rounds between checks of every client's whole weights; 0: the end"
    )
    link_megabits: float = Field(10.0, gt=0, description="speed of a client's link, to choose snapshot or replay by")
    seed: int = Field(0, ge=0, lt=2**63, description="names every random choice of the run")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    devices: str = Field(
        "",
        pattern=r"^((cpu|cuda(:\d+)?)(, ?(cpu|cuda(:\d+)?))*)?$",
        description="instead of device: several, as cuda:0,cuda:1 or cpu,cpu, each with a process that measures its "
        "share of the queries (zo, central); the first is the run's own",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type the weights are kept and run in")
    forward_dtype: Literal["weights", "bfloat16"] = Field(
        "weights", description="type of the forward passes; bfloat16: autocast (part of the result)"
    )
    copies_per_pass: int = Field(
        8, ge=1, le=4096, description="perturbed copies that share one forward pass (rankR; part of the result)"
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of each process (part of the result)")
    eval_interval: int = Field(20, ge=1, description="steps or rounds between evaluations on the held-out part")
    eval_examples: int = Field(256, ge=1, description="held-out examples each evaluation reads, at most")
    eval_dataset: str = Field("", description="evaluate on this data set; empty: on the held-out part")
    save_interval: int = Field(50, ge=0, description="steps between checkpoints; 0: none (a zo run needs none)")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay")
    keep_best: bool = Field(False, description="also keep the weights with the lowest held-out loss: zofed eval --best")
    keep_gradients: bool = Field(
        False, description="keep every gradient and guide beside the journal, so that it replays in every mode (large)"
    )
    controls: bool = Field(False, description="after the run, also report random slopes of the same size")
    tensorboard: bool = Field(
        False, description="also write the metrics for TensorBoard, in the run's folder (the extra zofed[tensorboard])"
    )
    out: str = Field("", description="folder of the run; empty: a new one, printed at the start")

    @field_validator("mode", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_number(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (int, float, str):
            raise ValueError("true and false are not allowed here")
        return value


SETTINGS = {_kebab(name): field for name, field in Settings.model_fields.items()}


def resolve(values: Mapping[str, Any]) -> Settings:
    """The settings that `values` (kebab-case keys) and the defaults give.

    Raises UserError, one line that names every wrong key or value with its limit and remedy.
    """
    try:
        settings = Settings.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None
    if clashes := _clashes(settings):
        raise UserError("; ".join(clashes))
    return settings


def _clashes(settings: Settings) -> list[str]:
    """What is wrong with settings that are each within their limits."""
    found = []
    if settings.schedule == "cosine" and settings.min_learning_rate > settings.learning_rate:
        found.append(
            f"min-learning-rate = {settings.min_learning_rate:g} is above learning-rate = {settings.learning_rate:g}: "
            "lower it"
        )
    if settings.objective not in OBJECTIVES and not re.fullmatch(r"[\w.]+:\w+", settings.objective):
        found.append(f"{unknown(settings.objective, list(OBJECTIVES), 'objective')}, or module:function")
    if settings.objective != "loss" and settings.mode != "zo":
        found.append(f"objective = {settings.objective!r} takes mode = zo: backprop follows the loss alone")
    if settings.devices and settings.mode != "zo":
        found.append(f"devices = {settings.devices!r} takes mode = zo: {settings.mode} runs on one; set device")
    if settings.bp_dataset and settings.split_dataset_for_bp_zo:
        found.append("bp-dataset and split-dataset-for-bp-zo both say where backprop's data come from: leave one out")
    if settings.mode == "instruct":
        if settings.blend and settings.instruct_weighting == "raw":
            found.append(
                "blend = true takes a gradient and an estimate in one unit: set instruct-weighting to projected or "
                "unbiased, or blend to false"
            )
        if settings.instruct_weighting == "unbiased" and settings.queries < 2:
            found.append(f"instruct-weighting = 'unbiased' takes 2 queries or more, not {settings.queries}")
        if settings.dtype == "bfloat16":
            found.append("mode = 'instruct' shifts weights by less than bfloat16 can hold: set dtype to float32")
    if settings.mode == "subspace":
        if settings.clip_norm:
            found.append(f"clip-norm = {settings.clip_norm:g}: a subspace has no gradient to clip; leave it out")
        side = math.isqrt(settings.subspace_size)
        if settings.subspace_variant == "core" and side * side != settings.subspace_size:
            found.append(
                f"subspace-size = {settings.subspace_size} is no square, as the variant core needs: take {side**2} or "
                f"{(side + 1) ** 2}"
            )
        if settings.subspace_variant == "diagonal" and not directions.terms(settings.directions):
            found.append(f"directions = {settings.directions!r} have no factors to train along: take rank1")
    return found


def _explain(problem: Any) -> str:
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return unknown(key, list(SETTINGS), "setting")
    field = SETTINGS[key]
    limit = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{key} = {problem['input']!r}: {limit}; the default is {field.default!r} ({field.description})"


def unknown(name: str, known: list[str], what: str) -> str:
    """The sentence for a name that does not exist: what was meant, or what there is."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
    return f"unknown {what} {name!r}: {meant}"


# What may change when a run goes on: its length and place, what it reports; and names whose content is pinned.
FREE_ON_RESUME = (
    "model", "revision", "dataset", "tokenizer", "steps", "rounds", "round-timeout", "node-timeout", "device",
    "eval-interval", "eval-examples", "eval-dataset", "epochs", "max-forward-equivalents", "max-seconds", "max-tokens",
    "save-interval", "keep-checkpoints", "keep-best", "controls", "out", "bp-dataset", "devices", "digest-interval",
    "link-megabits", "clients", "tensorboard",
)  # fmt: skip


def pinned(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a run's steps are, by key; the length too where the rate follows it."""
    lengths = ("steps", "rounds", "epochs") if settings.schedule == "cosine" else ()
    free = set(FREE_ON_RESUME).difference(lengths)
    return {key: value for key, value in settings.model_dump(by_alias=True).items() if key not in free}


def absolute(path: str | Path, key: str) -> Path:
    """`path` with ~ expanded, absolute. Raises UserError naming the setting `key` for the home of an unknown user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{key} = {str(path)!r}: no such user; choose another --{key}")
    return Path(expanded).absolute()


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a TOML file with flat kebab-case keys."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors may begin with a mark
    except OSError as error:
        raise UserError(f"cannot read settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        encoding = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"settings file {path} is not valid TOML: {error}{encoding}") from error


def to_toml(settings: Settings) -> str:
    """The resolved settings as TOML that `read_toml` and `resolve` take back."""
    return tomli_w.dumps(settings.model_dump(by_alias=True))


def documented_toml() -> str:
    """Every setting with its default and, as a comment, what it is: a settings file to start from.

    The same text is the block of run settings in pyproject.toml, where Flower wants every key declared.
    """
    lines = (f"{tomli_w.dumps({key: field.default}).strip()}  # {field.description}" for key, field in SETTINGS.items())
    return "\n".join(lines) + "\n"
