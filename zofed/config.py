"""Every setting, its type, its limits, its default; one schema for the command line, TOML files and Flower."""

import difflib
import math
import os
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from zofed.base.errors import UserError
from zofed.core import directions

WITH_BACKPROP = ("instruct", "calibrate")  # modes of zeroth order that backpropagation helps
ZEROTH_ORDER = ("zo", *WITH_BACKPROP)  # modes that measure slopes along seeded directions
LONGEST_SHOWN = 200  # characters of a wrong value in its message
OBJECTIVES = ("loss", "accuracy", "f1")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Unlike:
    """A condition: any value but these."""

    values: tuple[Any, ...]


Condition = Mapping[str, Any]  # what settings must be, by attribute: a value, a tuple of values, or Unlike
CENTRAL, FEDERATED = "central", "federated"  # the ways to run, which a condition knows as `run`


def acts_when(*alternatives: Condition, **condition: Any) -> dict[str, Any]:
    """For a field: it has an effect only where one of the conditions holds. `run`: CENTRAL or FEDERATED."""
    return {"acts_when": (*alternatives, *([condition] if condition else []))}


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
        False,
        description="train a classifier's head alone, on features of the encoder computed once",
        json_schema_extra=acts_when(task="classification"),
    )
    pooling: Literal["auto", "mean", "pooler", "last-token"] = Field(
        "auto",
        description="what a classifier's head reads; auto: as the model's own does, mean if the encoder is frozen",
        json_schema_extra=acts_when(task="classification"),
    )
    dataset: str = Field(
        "sample-dclm", description="sample-dclm, sample-pubmedqa, sample-sst2, pydoc, or a local file or folder"
    )
    tokenizer: str = Field("", description="shipped, gpt2 or a folder; empty: the one that fits the model")
    held_out: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of the documents kept for evaluation, never trained on",
        json_schema_extra=acts_when(eval_dataset=""),
    )
    block_size: int = Field(64, ge=2, description="tokens per training example")
    scope: str = Field(
        "full", description="what trains: full, reduced, norms, biases, head, last-K, or a regular expression of names"
    )
    directions: str = Field(
        "rank1",
        pattern=f"^({directions.KIND_PATTERN})$",
        description="rank1 (fast), rankR (a sum of R of them), rademacher or gaussian (dense, slow) (zo)",
        json_schema_extra=acts_when({"mode": ZEROTH_ORDER}, mode="subspace", subspace_variant="diagonal"),
    )
    direction_sizes: Literal["equal", "rms"] = Field(
        "equal",
        description="rms: each tensor's directions and steps in proportion to its weights at the start (zo)",
        json_schema_extra=acts_when(mode=(*ZEROTH_ORDER, "subspace")),
    )
    estimator: Literal["two-point", "one-sided"] = Field(
        "one-sided",
        description="one-sided: a pass a query and 1 for all, slopes centred; two-point: 2 a query (zo)",
        json_schema_extra=acts_when(mode=ZEROTH_ORDER),
    )
    normalise: bool = Field(
        True,
        description="divide each step by the running spread of the slopes (zo)",
        json_schema_extra=acts_when(mode=ZEROTH_ORDER),
    )
    queries: int = Field(
        32,
        ge=1,
        le=16384,
        description="directions measured per step and client (zo)",
        json_schema_extra=acts_when({"mode": ZEROTH_ORDER}, mode="subspace", run=FEDERATED),
    )
    epsilon: float = Field(
        3e-4,
        ge=1e-6,
        le=1,
        description="step per coordinate of the finite difference (zo)",
        json_schema_extra=acts_when({"mode": ZEROTH_ORDER}, mode="subspace", run=FEDERATED),
    )
    optimizer: Literal["sgd", "adamw", "mudamw"] = Field(
        "sgd", description="rule that turns a gradient estimate into a step; mudamw orthogonalises AdamW's"
    )
    learning_rate: float = Field(0.01, gt=0, description="step size of the optimizer")
    momentum: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="heavy-ball momentum of sgd",
        json_schema_extra=acts_when({"optimizer": "sgd"}, mode=WITH_BACKPROP, bp_optimizer="sgd"),
    )
    weight_decay: float = Field(0.0, ge=0, lt=1, description="decoupled weight decay")
    cautious: bool = Field(
        False,
        description="mudamw leaves out entries whose step points up the present gradient",
        json_schema_extra=acts_when({"optimizer": "mudamw"}, mode=WITH_BACKPROP, bp_optimizer="mudamw"),
    )
    bp_optimizer: Literal["", "sgd", "adamw", "mudamw"] = Field(
        "",
        description="rule for the steps that backprop gives, with a state of its own; empty: as optimizer",
        json_schema_extra=acts_when(mode=WITH_BACKPROP),
    )
    bp_learning_rate: float = Field(
        0.0,
        ge=0,
        description="their step size; 0: as learning-rate",
        json_schema_extra=acts_when({"mode": WITH_BACKPROP}, mode="fo", run=CENTRAL),
    )
    schedule: Literal["constant", "cosine"] = Field("constant", description="course of the rates after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps over which the rates rise linearly from 0")
    min_learning_rate: float = Field(
        0.0, ge=0, description="rate at which cosine ends", json_schema_extra=acts_when(schedule="cosine")
    )
    clip_norm: float = Field(0.0, ge=0, description="largest norm of a step's gradient estimate; 0: no limit")
    batch_size: int = Field(4, ge=1, le=2**20, description="examples per step and client")
    gradient_accumulation: int = Field(
        1,
        ge=1,
        le=2**20,
        description="backprop batches whose gradients make up one step",
        json_schema_extra=acts_when({"mode": WITH_BACKPROP}, {"mode": "fo", "run": CENTRAL}, mode="fo", local_steps=1),
    )
    bp_batch_size: int = Field(
        0,
        ge=0,
        le=2**20,
        description="examples of a backprop pass (instruct, calibrate); 0: batch-size",
        json_schema_extra=acts_when(mode=WITH_BACKPROP),
    )
    bp_interval: int = Field(
        10,
        ge=1,
        description="steps from one backprop pass to the next (instruct, calibrate)",
        json_schema_extra=acts_when(mode=WITH_BACKPROP),
    )
    bp_dataset: str = Field(
        "",
        description="other data for backprop (instruct, calibrate); empty: the same",
        json_schema_extra=acts_when({"mode": WITH_BACKPROP, "run": CENTRAL}, mode=WITH_BACKPROP, guide_source="server"),
    )
    split_dataset_for_bp_zo: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the documents that backprop alone sees (instruct, calibrate); 0: shared",
        json_schema_extra=acts_when(mode=WITH_BACKPROP, run=CENTRAL),
    )
    zo_data: Literal["shared", "per-query"] = Field(
        "shared",
        description="shared: all directions see one batch; per-query: each sees examples of its own",
        json_schema_extra=acts_when(mode=ZEROTH_ORDER),
    )
    zo_query_batch_size: int = Field(
        0,
        ge=0,
        le=2**20,
        description="examples of a query's own (per-query); 0: batch-size",
        json_schema_extra=acts_when(mode=ZEROTH_ORDER, zo_data="per-query"),
    )
    objective: str = Field(
        "loss", description="what zo lowers: loss, accuracy or f1 (as 1 - score), or module:function of (model, batch)"
    )
    instruct_kind: Literal["hybrid", "hybrid-rank1", "cosine", "guide-only", "line"] = Field(
        "hybrid-rank1",
        description="hybrid: the gradient's largest coordinates, noise on the others; hybrid-rank1: noise on all, "
        "batched; cosine: all of the gradient and noise; guide-only, line: arms that tell what the rest adds",
        json_schema_extra=acts_when(mode="instruct"),
    )
    instruct_weighting: Literal["raw", "projected", "unbiased"] = Field(
        "projected",
        description="raw: mean of slope * direction; projected: over its mean square; unbiased",
        json_schema_extra=acts_when(mode="instruct"),
    )
    blend: bool = Field(
        True,
        description="mean of the guided estimate and the backprop gradient (instruct)",
        json_schema_extra=acts_when(mode="instruct"),
    )
    instruct_cosine_target: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="cosine of the kept coordinates, or of the whole direction, with the gradient",
        json_schema_extra=acts_when(mode="instruct"),
    )
    instruct_noise_scale: float = Field(
        0.5,
        gt=0,
        description="norm of full noise over the gradient's (hybrid)",
        json_schema_extra=acts_when(mode="instruct", instruct_kind=("hybrid", "hybrid-rank1")),
    )
    guide_step: float = Field(
        0.01,
        gt=0,
        description="Euclidean length of the finite difference along a guide",
        json_schema_extra=acts_when(mode="instruct"),
    )
    subspace_size: int = Field(
        1024,
        ge=1,
        le=65536,
        description="coefficients trained in a subspace",
        json_schema_extra=acts_when(mode="subspace"),
    )
    subspace_variant: Literal["core", "diagonal"] = Field(
        "core",
        description="core: all pairs of sqrt(size) left and right factors; diagonal: size directions, slower",
        json_schema_extra=acts_when(mode="subspace"),
    )
    subspace_interval: int = Field(
        16,
        ge=1,
        description="backprop passes in each step's fresh subspace",
        json_schema_extra=acts_when(mode="subspace"),
    )
    steps: int = Field(
        100, ge=1, description="steps of a central run", json_schema_extra=acts_when(run=CENTRAL, epochs=0)
    )
    epochs: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="instead of steps: passes over the data; 0: steps decide",
        json_schema_extra=acts_when(run=CENTRAL),
    )
    max_forward_equivalents: int = Field(
        0, ge=0, description="stop after so many examples run forward, a backward counting two; 0: no limit"
    )
    max_seconds: float = Field(0.0, ge=0, description="stop after so many seconds of training; 0: no limit")
    max_tokens: int = Field(0, ge=0, description="stop after so many tokens of training data; 0: no limit")
    rounds: int = Field(
        100, ge=1, description="rounds of a federated run; each is one step", json_schema_extra=acts_when(run=FEDERATED)
    )
    clients: int = Field(
        0,
        ge=0,
        description="clients a federated run waits for; 0: all nodes that are there (zofed simulate: makes 2)",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    partition: Literal["iid", "dirichlet", "source"] = Field(
        "iid",
        description="how clients share the documents; dirichlet: skewed by label, else topic or source; source: each "
        "client one, or whole ones",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    dirichlet_alpha: float = Field(
        0.5,
        gt=0,
        description="evenness of a dirichlet partition; small: one label each",
        json_schema_extra=acts_when(run=FEDERATED, partition="dirichlet"),
    )
    round_timeout: float = Field(
        600.0,
        gt=0,
        description="seconds after which a round stops waiting for replies",
        json_schema_extra=acts_when({"run": FEDERATED}, devices=Unlike(("",))),
    )
    node_timeout: float = Field(
        60.0,
        gt=0,
        description="seconds a federated run waits for its nodes to appear",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    quorum: int = Field(
        0, ge=0, description="replies a round needs; 0: all clients asked", json_schema_extra=acts_when(run=FEDERATED)
    )
    participation: float = Field(
        1.0,
        gt=0,
        description="clients asked in each round: a share up to 1, or a number above it",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    zo_clients: int = Field(
        0,
        ge=0,
        description="so many clients, the last ones, run forward passes only, besides nodes that say mode = zo",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    seeds: Literal["distinct", "shared"] = Field(
        "distinct",
        description="distinct: each client measures directions of its own; shared: all the same (zo)",
        json_schema_extra=acts_when(run=FEDERATED, mode=ZEROTH_ORDER),
    )
    local_steps: int = Field(
        1,
        ge=1,
        le=1024,
        description="steps a client takes on its own in each round (zo, fo)",
        json_schema_extra=acts_when({"mode": ZEROTH_ORDER}, mode="fo", run=FEDERATED),
    )
    local_learning_rate: float = Field(
        0.0,
        ge=0,
        description="step size of plain SGD there; 0: as learning-rate",
        json_schema_extra=acts_when(
            {"mode": ZEROTH_ORDER, "local_steps": Unlike((1,))},
            {"mode": "fo", "run": FEDERATED, "local_steps": Unlike((1,))},
            mode="zo",
            run=FEDERATED,
            steps_per_message=Unlike((1,)),
        ),
    )
    steps_per_message: int = Field(
        1,
        ge=1,
        le=1024,
        description="rounds asked for in one exchange (zo)",
        json_schema_extra=acts_when(run=FEDERATED, mode="zo"),
    )
    proximal: float = Field(
        0.0,
        ge=0,
        description="pull of a client's local steps towards the round's start (fo)",
        json_schema_extra=acts_when(run=FEDERATED, mode="fo", local_steps=Unlike((1,))),
    )
    weighting: Literal["equal", "examples"] = Field(
        "equal",
        description="what a client counts in the merge: all alike, or by its examples up to example-cap",
        json_schema_extra=acts_when(run=FEDERATED, merge="mean"),
    )
    example_cap: int = Field(
        10_000,
        ge=1,
        description="examples a client can count with at most",
        json_schema_extra=acts_when(run=FEDERATED, merge="mean", weighting="examples"),
    )
    merge: Literal["mean", "trimmed", "median"] = Field(
        "mean",
        description="how answers along the same directions, or updates, become one; the others bear liars",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    trim: float = Field(
        0.2,
        gt=0,
        lt=0.5,
        description="share of the answers that trimmed leaves out at either end",
        json_schema_extra=acts_when(run=FEDERATED, merge="trimmed"),
    )
    clip_slopes: float = Field(
        10.0,
        ge=0,
        le=1e9,
        description="bound on a client's slopes, times the size common among the clients; 0: none",
        json_schema_extra=acts_when(run=FEDERATED, mode=Unlike(("fo",))),
    )
    largest_update: float = Field(
        0.0,
        ge=0,
        description="largest norm of a client's update or gradient; 0: any (fo)",
        json_schema_extra=acts_when(run=FEDERATED, mode=("fo", *WITH_BACKPROP)),
    )
    guide_source: Literal["clients", "server"] = Field(
        "clients",
        description="who backpropagates: clients that can, or the server on bp-dataset (instruct, calibrate)",
        json_schema_extra=acts_when(run=FEDERATED, mode=WITH_BACKPROP),
    )
    guide_rank: int = Field(
        4,
        ge=0,
        le=1024,
        description="singular factors of each matrix that a guide keeps on its way; 0: all of it",
        json_schema_extra=acts_when(run=FEDERATED, mode=WITH_BACKPROP),
    )
    client_held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of its data on which each client evaluates; 0: only the server does",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    coefficient_bits: int = Field(
        18,
        ge=3,
        le=18,
        description="bits of the largest slope or coefficient on its way; 6: a byte each, 18: three",
        json_schema_extra=acts_when(mode=Unlike(("fo",))),
    )
    losses_withheld: bool = Field(
        False, description="clients report no losses", json_schema_extra=acts_when(run=FEDERATED)
    )
    digest_interval: int = Field(
        50,
        ge=0,
        description="rounds between checks of every client's whole weights; 0: the end",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    link_megabits: float = Field(
        10.0,
        gt=0,
        description="speed of a client's link, to choose snapshot or replay by",
        json_schema_extra=acts_when(run=FEDERATED),
    )
    seed: int = Field(0, ge=0, lt=2**63, description="names every random choice of the run")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda or cuda:N",
        json_schema_extra=acts_when(devices=""),
    )
    devices: str = Field(
        "",
        pattern=r"^((cpu|cuda(:\d+)?)(, ?(cpu|cuda(:\d+)?))*)?$",
        description="instead of device: several, as cuda:0,cuda:1 or cpu,cpu, each with a process that measures its "
        "share of the queries (zo, central); the first is the run's own",
        json_schema_extra=acts_when(run=CENTRAL, mode="zo"),
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type the weights are kept and run in")
    forward_dtype: Literal["weights", "bfloat16"] = Field(
        "weights", description="type of the forward passes; bfloat16: autocast (part of the result)"
    )
    copies_per_pass: int = Field(
        8,
        ge=1,
        le=4096,
        description="perturbed copies that share one forward pass (rankR; part of the result)",
        json_schema_extra=acts_when(mode=ZEROTH_ORDER, directions=Unlike(("rademacher", "gaussian"))),
    )
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of each process (part of the result)")
    eval_interval: int = Field(20, ge=1, description="steps or rounds between evaluations on the held-out part")
    eval_examples: int = Field(
        256, ge=1, description="held-out examples each evaluation reads, at most: a sample by the seed"
    )
    eval_dataset: str = Field("", description="evaluate on this data set; empty: on the held-out part")
    save_interval: int = Field(50, ge=0, description="steps between checkpoints; 0: none (a zo run needs none)")
    keep_checkpoints: int = Field(
        2, ge=1, description="newest checkpoints that stay", json_schema_extra=acts_when(save_interval=Unlike((0,)))
    )
    keep_best: bool = Field(False, description="also keep the weights with the lowest held-out loss: zofed eval --best")
    keep_gradients: bool = Field(
        False,
        description="keep every gradient and guide beside the journal, so that it replays in every mode (large)",
        json_schema_extra=acts_when(mode=("fo", *WITH_BACKPROP)),
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

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_kept(cls, value: Any) -> Any:
        """Text that a TOML file and a path can hold and a person sees whole; numbers of 64 bits, as Flower's are."""
        if isinstance(value, str):
            if value != value.strip():
                raise ValueError("begins or ends with white space, leave it out")
            if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
                raise ValueError("holds a line break, a control character or a byte that is no UTF-8, leave it out")
        if isinstance(value, int) and not isinstance(value, bool) and value >= 2**63:
            raise ValueError("should be less than 2**63")
        return value


SETTINGS: dict[str, FieldInfo] = {_kebab(name): field for name, field in Settings.model_fields.items()}


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


def without_effect(settings: Settings, keys: Iterable[str], run: str = "") -> list[str]:
    """A sentence for each of the keys whose setting has no effect beside the others, with what makes it act.

    run: how the settings are run, CENTRAL or FEDERATED; empty: it is not known, and no condition fails by it.
    """
    found = []
    for key in keys:
        field = SETTINGS[key]
        extra = field.json_schema_extra
        alternatives = extra["acts_when"] if isinstance(extra, dict) else ()
        if alternatives and not any(_holds(condition, settings, run) for condition in alternatives):  # type: ignore[union-attr]
            value = _written(getattr(settings, _attribute(key)))
            words = ", or with ".join(map(_in_words, alternatives))  # type: ignore[arg-type]
            found.append(f"{key} = {value} has no effect here: it acts with {words}")
    return found


def _attribute(key: str) -> str:
    return key.replace("-", "_")


def _holds(condition: Condition, settings: Settings, run: str) -> bool:
    def holds(name: str, wanted: Any) -> bool:
        value = run if name == "run" else getattr(settings, name)
        if isinstance(wanted, Unlike):
            return value not in wanted.values
        return value in wanted if isinstance(wanted, tuple) else value == wanted

    return all(holds(name, wanted) for name, wanted in condition.items() if name != "run" or run)


def _in_words(condition: Condition) -> str:
    ways = {CENTRAL: "zofed train", FEDERATED: "a federation (zofed simulate, zofed run, flwr run)"}

    def words(name: str, wanted: Any) -> str:
        if name == "run":
            return ways[wanted]
        if isinstance(wanted, Unlike):
            return f"{_kebab(name)} other than {' or '.join(map(_written, wanted.values))}"
        return f"{_kebab(name)} = {' or '.join(map(_written, wanted if isinstance(wanted, tuple) else (wanted,)))}"

    return " and ".join(words(*pair) for pair in condition.items())


def _written(value: Any) -> str:
    """A value as a person types it."""
    return str(value).lower() if isinstance(value, bool) else repr(value) if value == "" else f"{value}"


def changed(settings: Settings) -> list[str]:
    """Keys of the settings that are not at their defaults."""
    return [key for key, field in SETTINGS.items() if getattr(settings, _attribute(key)) != field.default]


def _explain(problem: Any) -> str:
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        return unknown(key, list(SETTINGS), "setting")
    field = SETTINGS[key]
    limit = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    given = repr(problem["input"])
    given = given if len(given) <= LONGEST_SHOWN else f"{given[:LONGEST_SHOWN]}... ({len(given)} characters)"
    return f"{key} = {given}: {limit}; the default is {field.default!r} ({field.description})"


def unknown(name: str, known: list[str], what: str) -> str:
    """The sentence for a name that does not exist: what was meant, or what there is."""
    if len(name) > LONGEST_SHOWN:
        return f"unknown {what} {name[:LONGEST_SHOWN]!r}...: {len(name)} characters are too long, give a shorter name"
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
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number too long to read, nesting too deep
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
