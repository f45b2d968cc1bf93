"""Settings of federations, of what a run leaves, and of the machine, section by section."""

from typing import Literal

from pydantic import field_validator

from zofed.config.fields import CENTRAL, FEDERATED, Section, Unlike, setting, when
from zofed.config.training_sections import WITH_BACKPROP, ZEROTH_ORDER
from zofed.core.kinds import AggregationName


class Federation(Section):
    """Who takes part, and what each does in a round."""

    clients: int = setting(
        0,
        "clients a federated run waits for; 0: all nodes that are there (zofed simulate: makes 2)",
        ge=0,
        acts_when=when(run=FEDERATED),
        pins=False,
        first=True,
    )
    participation: float = setting(
        1.0,
        "clients asked in each round: a share up to 1, or a number above it",
        gt=0,
        acts_when=when(run=FEDERATED, only_client=-1),
    )
    only_client: int = setting(
        -1,
        "ask this client alone, the first being 0: what it reaches with its own data; -1: as participation says",
        ge=-1,
        acts_when=when(run=FEDERATED),
    )
    quorum: int = setting(0, "replies a round needs; 0: all clients asked", ge=0, acts_when=when(run=FEDERATED))
    partition: Literal["iid", "dirichlet", "source"] = setting(
        "iid",
        "how clients share the documents; dirichlet: skewed by label, else topic or source; source: each "
        "client one, or whole ones",
        acts_when=when(run=FEDERATED),
    )
    dirichlet_alpha: float = setting(
        0.5,
        "evenness of a dirichlet partition; small: one label each",
        gt=0,
        acts_when=when(run=FEDERATED, partition="dirichlet"),
    )
    direction_seeds: Literal["distinct", "shared"] = setting(
        "distinct",
        "distinct: each client measures directions of its own; shared: all the same (zo)",
        acts_when=when(run=FEDERATED, mode=ZEROTH_ORDER),
    )
    local_steps: int = setting(
        1,
        "steps a client takes on its own in each round (zo, fo)",
        ge=1,
        le=1024,
        acts_when=when({"mode": ZEROTH_ORDER}, mode="fo", run=FEDERATED),
    )
    local_optimizer: Literal["sgd", "adamw"] = setting(
        "sgd",
        "rule of a client's own steps: plain sgd, or adamw, whose state begins anew in each round (fo)",
        acts_when=when(run=FEDERATED, mode="fo", local_steps=Unlike((1,))),
    )
    local_learning_rate: float = setting(
        0.0,
        "step size there; 0: as learning-rate",
        ge=0,
        acts_when=when(
            {"mode": ZEROTH_ORDER, "local_steps": Unlike((1,))},
            {"mode": "fo", "run": FEDERATED, "local_steps": Unlike((1,))},
            mode="zo",
            run=FEDERATED,
            steps_per_message=Unlike((1,)),
        ),
    )
    steps_per_message: int = setting(
        1, "rounds asked for in one exchange (zo)", ge=1, le=1024, acts_when=when(run=FEDERATED, mode="zo")
    )
    proximal: float = setting(
        0.0,
        "pull of a client's local steps towards the round's start (fo)",
        ge=0,
        acts_when=when(run=FEDERATED, mode="fo", local_steps=Unlike((1,))),
    )
    forward_only_clients: int = setting(
        0,
        "so many clients, the last ones, run forward passes only, besides nodes that say mode = zo",
        ge=0,
        acts_when=when(run=FEDERATED),
    )
    client_held_out_fraction: float = setting(
        0.0,
        "share of its data on which each client evaluates; 0: only the server does",
        ge=0,
        lt=1,
        acts_when=when(run=FEDERATED),
    )
    round_timeout: float = setting(
        600.0,
        "seconds after which a round, or a step over several devices, stops waiting for replies",
        gt=0,
        acts_when=when({"run": FEDERATED}, {"devices": Unlike(("",)), "mode": "zo"}, ranks=True, mode="zo"),
        pins=False,
    )
    node_timeout: float = setting(
        60.0, "seconds a federated run waits for its nodes to appear", gt=0, acts_when=when(run=FEDERATED), pins=False
    )


class Aggregation(Section):
    """How answers become one, and what is checked and sent."""

    aggregation: AggregationName = setting(
        "mean",
        "how clients' answers are aggregated; trimmed and median tolerate malicious clients",
        acts_when=when(run=FEDERATED),
    )
    trim: float = setting(
        0.2,
        "share of the answers that trimmed leaves out at either end",
        gt=0,
        lt=0.5,
        acts_when=when(run=FEDERATED, aggregation="trimmed"),
    )
    weighting: Literal["equal", "examples"] = setting(
        "equal",
        "weight of a client in the mean: all equal, or by its number of examples, up to max-examples",
        acts_when=when(run=FEDERATED, aggregation="mean"),
    )
    max_examples: int = setting(
        10_000,
        "largest number of examples that a client is weighted by",
        ge=1,
        acts_when=when(run=FEDERATED, aggregation="mean", weighting="examples"),
    )
    server_momentum: float = setting(
        0.0,
        "share of the earlier rounds' moves in each round's, against drift where clients' data differ (subspace)",
        ge=0,
        lt=1,
        acts_when=when(mode="subspace"),
    )
    clip_slopes: float = setting(
        10.0,
        "limit of a client's slopes, in multiples of the typical size among clients; 0: none",
        ge=0,
        le=1e9,
        acts_when=when(run=FEDERATED, mode=Unlike(("fo",))),
    )
    max_update_norm: float = setting(
        0.0,
        "largest norm of a client's update or gradient; 0: any (fo)",
        ge=0,
        acts_when=when(run=FEDERATED, mode=("fo", *WITH_BACKPROP)),
    )
    gradient_source: Literal["clients", "server"] = setting(
        "clients",
        "who backpropagates: clients that can, or the server on bp-dataset (instruct, calibrate)",
        acts_when=when(run=FEDERATED, mode=WITH_BACKPROP),
    )
    gradient_rank: int = setting(
        4,
        "singular factors of each matrix that a guide keeps on its way; 0: all of it",
        ge=0,
        le=1024,
        acts_when=when(run=FEDERATED, mode=WITH_BACKPROP),
    )
    quantization_bits: int = setting(
        0,
        "bits of the largest slope or coefficient on its way, 3 to 18; all take this and 0.4 more as a mean; "
        "0: 4 in mode subspace, otherwise 18",
        ge=0,
        le=18,
        acts_when=when(mode=Unlike(("fo",))),
    )
    losses_withheld: bool = setting(False, "clients report no losses", acts_when=when(run=FEDERATED))
    weight_check_interval: int = setting(
        50,
        "rounds between checks of every client's whole weights; 0: the end",
        ge=0,
        acts_when=when(run=FEDERATED),
        pins=False,
    )
    link_megabits: float = setting(
        10.0,
        "speed of a client's link in Mbit/s, by which the server chooses snapshot or replay",
        gt=0,
        acts_when=when(run=FEDERATED),
        pins=False,
    )

    @field_validator("quantization_bits")
    @classmethod
    def _enough_bits(cls, value: int) -> int:
        if value in (1, 2):
            raise ValueError("should be 3 to 18, or 0 for what suits the mode")
        return value


class Output(Section):
    """What is evaluated, kept and reported."""

    eval_interval: int = setting(20, "steps or rounds between evaluations on the held-out part", ge=1, pins=False)
    eval_examples: int = setting(
        256, "held-out examples each evaluation reads, at most: a sample by the seed", ge=1, pins=False, scores=True
    )
    eval_dataset: str = setting("", "evaluate on this data set; empty: on the held-out part", pins=False, scores=True)
    save_interval: int = setting(
        50, "steps between checkpoints; 0: none (a zo run needs none)", ge=0, pins=False, shapes_result=False
    )
    keep_checkpoints: int = setting(
        2,
        "newest checkpoints that stay",
        ge=1,
        acts_when=when(save_interval=Unlike((0,))),
        pins=False,
        shapes_result=False,
    )
    keep_best: bool = setting(
        False, "also keep the weights with the lowest held-out loss: zofed eval --best", pins=False, shapes_result=False
    )
    keep_gradients: bool = setting(
        False,
        "keep every gradient and guide beside the journal, so that it replays in every mode (large)",
        acts_when=when(mode=("fo", *WITH_BACKPROP)),
    )
    controls: bool = setting(
        False, "after the run, also report random slopes of the same size", pins=False, shapes_result=False
    )
    report_to: str = setting(
        "",
        "also send the metrics to tensorboard, wandb, trackio or mlflow, several by commas (the extras zofed[wandb], "
        "...)",
        pins=False,
        shapes_result=False,
    )


class Machine(Section):
    """Where it computes."""

    device: str = setting(
        "auto",
        "auto, cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        acts_when=when(devices=""),
        pins=False,
        shapes_result=False,
        first=True,
    )
    devices: str = setting(
        "",
        "instead of device: several, as cuda:0,cuda:1 or cpu,cpu, each with a process that measures its "
        "share of the queries (zo, central); the first is the run's own",
        pattern=r"^((cpu|cuda(:\d+)?)(, ?(cpu|cuda(:\d+)?))*)?$",
        acts_when=when(run=CENTRAL, mode="zo"),
        pins=False,
        shapes_result=False,
    )
    placement: Literal["none", "auto"] = setting(
        "none",
        "auto: the layers of one model over all GPUs of this machine, in their order, for a model that one cannot hold "
        "(instead of device, devices and torchrun; the extra memory of several, not their speed)",
        pins=False,
        shapes_result=False,
    )
    threads: int = setting(1, "CPU threads of each process (part of the result)", ge=1, le=1024)
    hidden_states_gigabytes: float = setting(
        8.0,
        "hidden states of frozen layers kept in the folder of ZOFED_CACHE, for all runs, at most; 0: none",
        ge=0,
        le=1e6,
        acts_when=when(scope=Unlike(("full",))),
        pins=False,
        shapes_result=False,
    )
