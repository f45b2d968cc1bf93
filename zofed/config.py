"""Every setting, its type, its limits, its default; one schema for the command line, TOML files and Flower."""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zofed import directions
from zofed.errors import UserError


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Settings(BaseModel):
    """The settings of one run. Written kebab-case outside (`learning-rate`), read as attributes inside."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_kebab, allow_inf_nan=False)

    mode: Literal["zo", "fo"] = Field("zo", description="zo: forward passes only; fo: backpropagation")
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
    batch_size: int = Field(4, ge=1, description="examples per step and client")
    steps: int = Field(100, ge=1, description="steps of a central run")
    rounds: int = Field(100, ge=1, description="rounds of a federated run; each is one step")
    clients: int = Field(0, ge=0, description="clients a federated run waits for; 0: all nodes that are there")
    round_timeout: float = Field(600.0, gt=0, description="seconds after which a round stops waiting for replies")
    node_timeout: float = Field(60.0, gt=0, description="seconds a federated run waits for its nodes to appear")
    quorum: int = Field(0, ge=0, description="replies a round needs; 0: all clients")
    seed: int = Field(0, ge=0, lt=2**63, description="names every random choice of the run")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
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
    checkpoint_interval: int = Field(50, ge=0, description="steps between checkpoints; 0: none (a zo run needs none)")
    controls: bool = Field(False, description="after the run, also report random slopes of the same size (zo)")
    out: str = Field("", description="folder of the run; empty: a new one, printed at the start")

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
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(problem) for problem in error.errors())) from None


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
    "eval-interval", "eval-examples", "checkpoint-interval", "controls", "out",
)  # fmt: skip


def pinned(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a run's steps are, by key."""
    return {key: value for key, value in settings.model_dump(by_alias=True).items() if key not in FREE_ON_RESUME}


def absolute(path: str | Path, key: str) -> Path:
    """`path` with ~ expanded, absolute. Raises UserError naming the setting `key` for the home of an unknown user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"{key} = {str(path)!r}: no such user; choose another --{key}")
    return Path(expanded).absolute()


def read_toml(path: Path) -> dict[str, Any]:
    """Settings from a TOML file with flat kebab-case keys."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read settings file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"settings file {path} is not valid TOML: {error}") from error


def to_toml(settings: Settings) -> str:
    """The resolved settings as TOML that `read_toml` and `resolve` take back."""
    return tomli_w.dumps(settings.model_dump(by_alias=True))


def documented_toml() -> str:
    """Every setting with its default and, as a comment, what it is: a settings file to start from.

    The same text is the block of run settings in pyproject.toml, where Flower wants every key declared.
    """
    lines = (f"{tomli_w.dumps({key: field.default}).strip()}  # {field.description}" for key, field in SETTINGS.items())
    return "\n".join(lines) + "\n"
