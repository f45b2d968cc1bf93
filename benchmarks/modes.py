"""The modes beside each other on real text: held-out loss by backward passes, forward-equivalents and seconds.

python -m benchmarks.modes tune  --out FOLDER [--size tiny|20M] [--arms NAME ...]    run, or go on
python -m benchmarks.modes seeds --out FOLDER [--size ...] [--arms ...] [--seeds 1 2 3]
python -m benchmarks.modes report --out FOLDER                                       markdown and FOLDER/SIZE.png

Data: pages and abstracts merged (dclm-web and pubmedqa of the folder that ZOFED_REAL_DATA names).
Rule for the rate, the same for every arm: a grid of ratio 3, climbed until both neighbours of the best are worse, by
the final held-out loss of seed 0. Seeds 1, 2 and 3 at that rate are reported. A run is an ordinary run folder: it goes
on where it was cut, and one that is finished is not run again.
"""

import argparse
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from zofed import config
from zofed.base.errors import UserError
from zofed.data import documents
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import Row, read_table
from zofed.training import central

Values = dict[str, Any]

GUIDED: Values = {
    "mode": "instruct",
    "bp-interval": 1,
    "queries": 16,
    "query-batches": "per-query",
    "query-batch-size": 2,
}
BACKPROP: Values = {"batch-size": 2, "bp-batch-size": 2, "optimizer": "mudamw"}
# Name: first rate to try, settings. A guided step costs 6 + 64 examples run forward, a backward pass counting two; with
# 64 queries 6 + 256.
ARMS: dict[str, tuple[float, Values]] = {
    "fo": (1e-2, {"mode": "fo"}),
    "fo, accumulated to equal cost": (1e-2, {"mode": "fo", "gradient-accumulation": 12}),
    "fo, more steps to equal cost": (3e-3, {"mode": "fo", "length": 12}),
    "guide alone": (1e-2, GUIDED | {"instruct-kind": "guide-only", "instruct-blend": False}),
    "instruct hybrid": (1e-2, GUIDED | {"instruct-kind": "hybrid"}),
    "instruct hybrid-rank1": (1e-2, GUIDED),
    "instruct hybrid-rank1, 64 queries": (1e-2, GUIDED | {"queries": 64}),
    "instruct hybrid-rank1, 64 queries share 128 examples": (
        1e-2,
        GUIDED | {"queries": 64, "query-batches": "shared", "batch-size": 128, "length": 0.2},
    ),
    "instruct hybrid-rank1, queries share 2 examples": (1e-2, GUIDED | {"query-batches": "shared"}),
    "instruct hybrid-rank1, not blended": (1e-2, GUIDED | {"instruct-blend": False}),
    "instruct hybrid-rank1, raw": (1e-2, GUIDED | {"instruct-blend": False, "instruct-weighting": "raw"}),
    "instruct hybrid-rank1, unbiased": (1e-2, GUIDED | {"instruct-weighting": "unbiased"}),
    "instruct cosine": (1e-2, GUIDED | {"instruct-kind": "cosine"}),
    "line": (1e-2, GUIDED | {"instruct-kind": "line"}),
    "idea: guide from other documents": (1e-2, GUIDED | {"bp-data-fraction": 0.5}),
    "idea: few coordinates kept": (1e-2, GUIDED | {"instruct-cosine-target": 0.3, "instruct-weighting": "unbiased"}),
    "idea: a guide for ten steps": (1e-2, GUIDED | {"bp-interval": 10, "bp-batch-size": 20}),
    "calibrate": (
        1e-2,
        {
            "mode": "calibrate",
            "length": 5,
            "bp-interval": 5,
            "queries": 16,
            "optimizer": "sgd",
            "bp-optimizer": "mudamw",
        },
    ),
    "zo": (1e-2, {"mode": "zo", "queries": 64, "batch-size": 4, "optimizer": "sgd"}),
    "subspace": (1e-2, {"mode": "subspace", "optimizer": "adamw", "subspace-interval": 16, "length": 1 / 16}),
}
for optimizer, momentum in (("sgd", 0.0), ("sgd", 0.9), ("adamw", 0.0), ("mudamw", 0.0)):
    label = "momentum" if momentum else optimizer
    first = 1e-2 if optimizer == "sgd" else 1e-3
    for count in (8, 64):
        own: Values = {"optimizer": optimizer, "momentum": momentum, "queries": count}
        ARMS[f"zo {label}, q = {count}"] = (first, {"mode": "zo", "batch-size": 4, **own})
        ARMS[f"instruct {label}, q = {count}"] = (1e-2 if optimizer != "sgd" else 1.0, GUIDED | own)

# Steps of a run that only tunes the rate, and the most that any run takes, where the whole length is too dear.
TUNING, MOST = {"20M": 15}, {"20M": 100}
FIRST = {"20M": 0.1}  # times an arm's first rate
SIZES: dict[str, Values] = {
    "tiny": {"model": "tiny", "steps": 150, "eval-examples": 256, "scope": "full"},
    # AdamW: MuDaMW's exact orthogonalisation of 24 matrices takes longer than a step's passes on two cores.
    "20M": {"model": "20M", "steps": 300, "eval-examples": 64, "scope": "full", "optimizer": "adamw"},
}


def merged(out: Path) -> Path:
    """The merged text as one file of rows, written once."""
    path = out / "merged.jsonl"
    if not path.exists():
        real = Path(os.environ["ZOFED_REAL_DATA"])
        rows = []
        for source, file in (("dclm-web", "dclm-web/pages.jsonl"), ("pubmedqa", "pubmedqa/pqal.json")):
            rows += [{"text": d.text, "source": source} for d in documents.load_documents(str(real / file))]
        order = documents.random_order(len(rows), "merge", 0)
        out.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(rows[at]) + "\n" for at in order), encoding="utf-8")
    return path


def _folder(out: Path, size: str, arm: str) -> Path:
    """Where the runs of an arm lie."""
    return out / size / arm.translate(str.maketrans(" ", "_", ":,="))


def run(out: Path, size: str, arm: str, rate: float, seed: int, *, tuning: bool = False) -> float:
    """Final held-out loss of one run; infinite where it diverged. tuning: a run that only tells which rate is good."""
    own = dict(ARMS[arm][1])
    shared = dict(SIZES[size])
    steps = max(1, round(shared.pop("steps") * own.pop("length", 1)))
    steps = min(steps, TUNING.get(size, steps) if tuning else MOST.get(size, steps))
    values = BACKPROP | own | shared if size == "20M" and own["mode"] in ("fo", "instruct") else BACKPROP | shared | own
    if size == "20M" and own["mode"] == "zo":
        values |= {"queries": 16}
    if size == "20M" and own["mode"] == "calibrate":
        values |= {"bp-optimizer": "adamw"}
    if "bp-optimizer" in own and own["mode"] == "calibrate":  # the zeroth-order rate is that arm's own
        values |= {"bp-learning-rate": rate, "learning-rate": 0.01, "steps": steps}
    else:
        values |= {"learning-rate": rate, "steps": steps}
    values |= {
        "dataset": str(merged(out)),
        "block-size": 64,
        "seed": seed,
        "eval-interval": max(1, values["steps"] // (15 if size == "tiny" else 6)),
        "save-interval": 50,
        "device": "cpu",
    }
    folder = _folder(out, size, arm) / f"{rate:.3g}-{'tuning' if tuning else seed}"
    try:
        if (folder / "journal.zofed").exists():
            if RunFolder(folder).summary().get("status") == "failed":
                return math.inf
            summary = central.resume(folder, ignore)
        else:
            summary = central.train(config.resolve(values), folder, ignore)
    except UserError as error:
        print(f"  {arm} {rate:g} {seed}: {error}", file=sys.stderr)
        return math.inf
    print(f"  {arm}, rate {rate:.3g}, seed {seed}: {summary['eval_loss_end']:.4f} {summary['seconds']} s", flush=True)
    return summary["eval_loss_end"]


def ignore(row: Row) -> None:
    """No progress: the table comes at the end."""


def tune(out: Path, size: str, arm: str) -> float:
    """The rate whose neighbours are both worse."""
    first = ARMS[arm][0] * (FIRST.get(size, 1.0) if ARMS[arm][1]["mode"] in ("fo", "instruct", "calibrate") else 1.0)
    losses: dict[int, float] = {}

    def loss(power: int) -> float:
        if power not in losses:
            losses[power] = run(out, size, arm, first * 3.0**power, 0, tuning=True)
        return losses[power]

    best = min((-1, 0, 1), key=loss)
    while abs(best) < 5 and (better := min((best - 1, best, best + 1), key=loss)) != best:
        best = better
    rate = first * 3.0**best
    results = out / size / "rates.jsonl"
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"arm": arm, "rate": rate, "loss": losses[best]}) + "\n")
    print(f"{arm}: rate {rate:.3g}", flush=True)
    return rate


def rates(out: Path, size: str) -> dict[str, float]:
    path = out / size / "rates.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["arm"]: row["rate"] for row in map(json.loads, lines)}


def report(out: Path) -> None:
    for size in SIZES:
        found = rates(out, size)
        if not found:
            continue
        print(f"\n{size}\n")
        print("| arm | rate | held-out loss | seeds | backward passes | forward-equivalents | seconds |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for arm, rate in found.items():
            stem = _folder(out, size, arm)
            folders = [RunFolder(path) for path in sorted(stem.glob(f"{rate:.3g}-[0-9]*"))]
            done = [(f.path.name.split("-")[-1], f.summary()) for f in folders if f.summary().get("digest")]
            reported = [summary for seed, summary in done if seed != "tuning"]
            if not reported:
                continue
            losses = [summary["eval_loss_end"] for summary in reported]
            spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            costs = [statistics.median(summary[key] for summary in reported) for key in COSTS]
            shown = " | ".join(f"{cost:,.0f}" for cost in costs)
            print(f"| {arm} | {rate:.3g} | {statistics.mean(losses):.4f}{spread} | {len(losses)} | {shown} |")
        draw(out, size, found)


COSTS = ("backward_passes", "forward_equivalents", "seconds")
SHOWN = ("fo", "fo, accumulated to equal cost", "fo, more steps to equal cost", "guide alone", "instruct hybrid-rank1",
         "instruct cosine", "calibrate", "zo", "subspace")  # fmt: skip


def draw(out: Path, size: str, found: dict[str, float]) -> None:
    """Mean held-out loss of the seeds against what it cost, with a band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import seaborn as sns

    sns.set_theme(style="whitegrid", context="notebook")
    figure, panels = plt.subplots(1, 3, figsize=(16, 5), sharey=True)
    styles = ["-", "--", "-.", ":"]
    for index, arm in enumerate(name for name in SHOWN if name in found):
        stem = _folder(out, size, arm)
        tables = [read_table(path / "metrics.csv") for path in sorted(stem.glob(f"{found[arm]:.3g}-[0-9]*"))]
        rows = [[row for row in table if row["eval_loss"]] for table in tables]
        length = min(map(len, rows), default=0)
        if not length:
            continue
        losses = [[float(row["eval_loss"]) for row in own[:length]] for own in rows]
        middle = [statistics.mean(at) for at in zip(*losses, strict=True)]
        for panel, cost in zip(panels, COSTS, strict=True):
            along = [max(0.5, float(row[cost])) for row in rows[0][:length]]
            color = sns.color_palette("colorblind")[index % 10]
            panel.plot(along, middle, styles[index % 4], color=color, lw=2, label=arm)
            panel.fill_between(
                along,
                [min(a) for a in zip(*losses, strict=True)],
                [max(a) for a in zip(*losses, strict=True)],
                color=color,
                alpha=0.15,
            )
            panel.set(xscale="log", xlabel=cost.replace("_", " "))
    panels[0].set_ylabel("held-out loss (nats a token)")
    panels[0].legend(fontsize="x-small")
    figure.suptitle(f"{size}: mean of the seeds, band from lowest to highest")
    figure.tight_layout()
    figure.savefig(out / f"{size}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("tune", "seeds", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    given = parser.parse_args()
    if given.what == "report":
        report(given.out)
        return
    known = rates(given.out, given.size)
    for arm in given.arms:
        rate = known.get(arm)
        if given.what == "tune":
            rate = rate or tune(given.out, given.size, arm)
        elif rate:
            for seed in given.seeds:
                run(given.out, given.size, arm, rate, seed)


if __name__ == "__main__":
    main()
