"""Settings of training, section by section: run, model, data, optimizer, and what each mode has of its own."""

from typing import Literal

from zofed.config.fields import CENTRAL, FEDERATED, Section, Unlike, setting, when
from zofed.core import kinds
from zofed.core.kinds import OptimizerName

WITH_BACKPROP = ("instruct", "calibrate")  # modes of zeroth order that backpropagation helps
ZEROTH_ORDER = ("zo", *WITH_BACKPROP)  # modes that measure slopes along seeded directions


class Run(Section):
    """What kind of training, how long, and where its folder lies."""

    mode: Literal["zo", "fo", "instruct", "calibrate", "subspace"] = setting(
        "zo",
        "zo: forward passes only; fo: backpropagation; instruct: a gradient shapes the directions; "
        "calibrate: zo with a backprop step now and then; subspace: backprop on the coefficients of seeded directions",
        first=True,
    )
    seed: int = setting(0, "names every random choice of the run", ge=0, lt=2**63, shapes_result=False, first=True)
    out: str = setting(
        "", "folder of the run; empty: a new one, printed at the start", pins=False, shapes_result=False, first=True
    )
    steps: int = setting(
        100, "steps of a central run", ge=1, acts_when=when(run=CENTRAL, epochs=0), pins=False, first=True
    )
    epochs: float = setting(
        0.0,
        "instead of steps: passes over the data; 0: steps decide",
        ge=0,
        le=1e9,
        acts_when=when(run=CENTRAL),
        pins=False,
    )
    rounds: int = setting(
        100, "rounds of a federated run; each is one step", ge=1, acts_when=when(run=FEDERATED), pins=False, first=True
    )
    max_forward_equivalents: int = setting(
        0, "stop after so many examples run forward, a backward counting two; 0: no limit", ge=0, pins=False
    )
    max_seconds: float = setting(0.0, "stop after so many seconds of training; 0: no limit", ge=0, pins=False)
    max_tokens: int = setting(0, "stop after so many tokens of training data; 0: no limit", ge=0, pins=False)


class Model(Section):
    """What is trained, and which of its parameters."""

    model: str = setting(
        "tiny",
        "tiny, 20M, 200M, 500M, 1B (fresh, GPT-2 shaped), sample (small, pretrained, ships with zofed), a saved "
        "model's folder, or OWNER/NAME of the hub",
        pins=False,
        first=True,
    )
    revision: str = setting(
        "", "commit, branch or tag of a hub model; empty: main as it is cached; a run records the commit", pins=False
    )
    freeze_encoder: bool = setting(
        False,
        "train a classifier's head alone, on features of the encoder computed once",
        acts_when=when(task="classification"),
    )
    pooling: Literal["auto", "mean", "pooler", "last-token"] = setting(
        "auto",
        "what a classifier's head reads; auto: as the model's own does, mean if the encoder is frozen",
        acts_when=when(task="classification"),
    )
    tokenizer: str = setting(
        "", "shipped, gpt2 or a folder; empty: the one that fits the model", pins=False, scores=True
    )
    scope: str = setting(
        "full", "what trains: full, reduced, norms, biases, head, last-K, or a regular expression of names", first=True
    )
    adapter: Literal["none", "lora", "prefix", "prompt"] = setting(
        "none",
        "what trains in the model's place, saved as peft reads it: lora: low-rank matrices beside its own, within "
        "scope; prompt: embeddings of virtual tokens before each text; prefix: their keys and values in every layer",
        first=True,
    )
    lora_rank: int = setting(8, "rank of an adapter's matrices", ge=1, le=4096, acts_when=when(adapter="lora"))
    lora_alpha: float = setting(
        16.0, "an adapter counts alpha / rank times", gt=0, le=1e6, acts_when=when(adapter="lora")
    )
    lora_targets: str = setting(
        "",
        "modules that get an adapter, by commas: q_proj, v_proj; or all-linear; empty: as peft has it for the model",
        acts_when=when(adapter="lora"),
    )
    virtual_tokens: int = setting(
        8,
        "how many stand before each text, block-size not counting them",
        ge=1,
        le=4096,
        acts_when=when(adapter=("prefix", "prompt")),
    )
    dtype: Literal["float32", "bfloat16"] = setting("float32", "type of the weights, and of computing with them")
    forward_dtype: Literal["weights", "bfloat16"] = setting(
        "weights", "type of the forward passes; bfloat16: autocast (part of the result)"
    )
    quantisation: Literal["none", "int8", "nf4"] = setting(
        "none",
        "int8, nf4: frozen matrices of the blocks held in 8 or 4 bits (the extra zofed[quantised])",
        acts_when=when(freeze_encoder=False),
    )


class Data(Section):
    """What it reads."""

    dataset: str = setting(
        "sample-dclm",
        "sample-dclm, sample-pubmedqa, sample-alpaca, sample-sst2, pydoc, or a local file or folder",
        pins=False,
        scores=True,
        first=True,
    )
    held_out_fraction: float = setting(
        0.1,
        "share of the documents kept for evaluation, never trained on",
        gt=0,
        lt=1,
        acts_when=when(eval_dataset=""),
        scores=True,
    )
    block_size: int = setting(64, "tokens per training example", ge=2, scores=True)
    batch_size: int = setting(4, "examples per step and client", ge=1, le=2**20, first=True)
    batch_order: Literal["shuffled", "stratified"] = setting(
        "shuffled",
        "stratified: each batch holds the classes in the shares that the data hold them, so that slopes are less noisy",
        acts_when=when(task=("classification", "prompt")),
    )


class ZerothOrder(Section):
    """Slopes by forward passes along seeded directions (modes zo, instruct, calibrate)."""

    queries: int = setting(
        32,
        "directions measured per step and client (zo)",
        ge=1,
        le=16384,
        acts_when=when({"mode": ZEROTH_ORDER}, mode="subspace", run=FEDERATED),
        first=True,
    )
    epsilon: float = setting(
        3e-4,
        "step per coordinate of the finite difference (zo)",
        ge=1e-6,
        le=1,
        acts_when=when({"mode": ZEROTH_ORDER}, mode="subspace", run=FEDERATED),
    )
    directions: str = setting(
        "rank1",
        "rank1 (fast), rankR (a sum of R of them), rademacher or gaussian (dense, slow) (zo)",
        pattern=f"^({kinds.KIND_PATTERN})$",
        acts_when=when({"mode": ZEROTH_ORDER}, mode="subspace", subspace_variant="diagonal"),
    )
    direction_scale: Literal["auto", "equal", "rms"] = setting(
        "auto",
        "rms: each tensor's directions and steps in proportion to its weights at the start; auto: rms in mode "
        "subspace and in zo with adamw, otherwise equal",
        acts_when=when(mode=(*ZEROTH_ORDER, "subspace")),
    )
    finite_difference: Literal["two-point", "one-sided"] = setting(
        "one-sided",
        "one-sided: a pass a query and 1 for all, slopes centred; two-point: 2 a query (zo)",
        acts_when=when(mode=ZEROTH_ORDER),
    )
    normalize_slopes: bool = setting(
        True, "divide each step by the running spread of the slopes (zo)", acts_when=when(mode=ZEROTH_ORDER)
    )
    query_batches: Literal["shared", "per-query"] = setting(
        "shared",
        "shared: all directions see one batch; per-query: each sees examples of its own",
        acts_when=when(mode=ZEROTH_ORDER),
    )
    query_batch_size: int = setting(
        0,
        "examples of a query's own (per-query); 0: batch-size",
        ge=0,
        le=2**20,
        acts_when=when(mode=ZEROTH_ORDER, query_batches="per-query"),
    )
    objective: str = setting(
        "loss",
        "what zo lowers: loss; accuracy or f1, or of generated responses exact-match, token-f1 or rouge-l (as 1 - "
        "score); or module:function of (model, batch)",
    )
    perturbations_per_pass: int = setting(
        8,
        "perturbed copies that share one forward pass (rankR; part of the result)",
        ge=1,
        le=4096,
        acts_when=when(mode=ZEROTH_ORDER, directions=Unlike(("rademacher", "gaussian"))),
    )


class Optimizer(Section):
    """From a gradient estimate to a step."""

    optimizer: Literal["auto", OptimizerName] = setting(
        "auto",
        "rule that turns a gradient estimate into a step; auto: adamw in modes fo and subspace, otherwise sgd; mudamw "
        "orthogonalises AdamW's",
        first=True,
    )
    learning_rate: float = setting(
        0.0, "step size of the optimizer; 0: what suits mode, optimizer and model", ge=0, first=True
    )
    momentum: float = setting(
        0.0,
        "heavy-ball momentum of sgd",
        ge=0,
        lt=1,
        acts_when=when({"optimizer": "sgd"}, mode=WITH_BACKPROP, bp_optimizer="sgd"),
    )
    weight_decay: float = setting(0.0, "decoupled weight decay", ge=0, lt=1)
    cautious: bool = setting(
        False,
        "mudamw leaves out entries whose step points up the present gradient",
        acts_when=when({"optimizer": "mudamw"}, mode=WITH_BACKPROP, bp_optimizer="mudamw"),
    )
    schedule: Literal["constant", "cosine"] = setting("constant", "learning-rate schedule after the warm-up")
    warmup_steps: int = setting(0, "steps over which the rates rise linearly from 0", ge=0)
    min_learning_rate: float = setting(0.0, "rate at which cosine ends", ge=0, acts_when=when(schedule="cosine"))
    clip_norm: float = setting(0.0, "largest norm of a step's gradient estimate; 0: no limit", ge=0)


class Backpropagation(Section):
    """What backprop adds (modes fo, instruct, calibrate)."""

    bp_interval: int = setting(
        10, "steps from one backprop pass to the next (instruct, calibrate)", ge=1, acts_when=when(mode=WITH_BACKPROP)
    )
    bp_batch_size: int = setting(
        0,
        "examples of a backprop pass (instruct, calibrate); 0: batch-size",
        ge=0,
        le=2**20,
        acts_when=when(mode=WITH_BACKPROP),
    )
    gradient_accumulation: int = setting(
        1,
        "backprop batches whose gradients make up one step",
        ge=1,
        le=2**20,
        acts_when=when({"mode": WITH_BACKPROP}, {"mode": "fo", "run": CENTRAL}, mode="fo", local_steps=1),
    )
    bp_optimizer: Literal["", OptimizerName] = setting(
        "",
        "rule for the steps that backprop gives, with a state of its own; empty: as optimizer",
        acts_when=when(mode=WITH_BACKPROP),
    )
    bp_learning_rate: float = setting(
        0.0,
        "their step size; 0: as learning-rate",
        ge=0,
        acts_when=when({"mode": WITH_BACKPROP}, mode="fo", run=CENTRAL),
    )
    bp_dataset: str = setting(
        "",
        "other data for backprop (instruct, calibrate); empty: the same",
        acts_when=when({"mode": WITH_BACKPROP, "run": CENTRAL}, mode=WITH_BACKPROP, gradient_source="server"),
        pins=False,
    )
    bp_data_fraction: float = setting(
        0.0,
        "share of the documents that backprop alone sees (instruct, calibrate); 0: shared",
        ge=0,
        lt=1,
        acts_when=when(mode=WITH_BACKPROP, run=CENTRAL),
    )


class Instruct(Section):
    """Directions that a gradient shapes (mode instruct)."""

    instruct_kind: Literal["hybrid", "hybrid-rank1", "cosine", "guide-only", "line"] = setting(
        "hybrid-rank1",
        "hybrid: the gradient's largest coordinates, noise on the others; hybrid-rank1: noise on all, "
        "batched; cosine: all of the gradient and noise; guide-only, line: arms that tell what the rest adds",
        acts_when=when(mode="instruct"),
    )
    instruct_weighting: Literal["raw", "projected", "unbiased"] = setting(
        "projected",
        "raw: mean of slope * direction; projected: over its mean square; unbiased",
        acts_when=when(mode="instruct"),
    )
    instruct_cosine_target: float = setting(
        0.9,
        "cosine of the kept coordinates, or of the whole direction, with the gradient",
        gt=0,
        lt=1,
        acts_when=when(mode="instruct"),
    )
    instruct_noise_scale: float = setting(
        0.5,
        "norm of full noise over the gradient's (hybrid)",
        gt=0,
        acts_when=when(mode="instruct", instruct_kind=("hybrid", "hybrid-rank1")),
    )
    instruct_blend: bool = setting(
        True, "mean of the guided estimate and the backprop gradient (instruct)", acts_when=when(mode="instruct")
    )
    instruct_step: float = setting(
        0.01, "Euclidean length of the finite difference along a guide", gt=0, acts_when=when(mode="instruct")
    )


class Subspace(Section):
    """Backprop on the coefficients of seeded directions (mode subspace)."""

    subspace_size: int = setting(
        1024, "coefficients trained in a subspace", ge=1, le=65536, acts_when=when(mode="subspace")
    )
    subspace_variant: Literal["core", "diagonal"] = setting(
        "core",
        "core: all pairs of sqrt(size) left and right factors; diagonal: size directions, slower",
        acts_when=when(mode="subspace"),
    )
    subspace_interval: int = setting(
        16, "backprop passes in each step's fresh subspace", ge=1, acts_when=when(mode="subspace")
    )
