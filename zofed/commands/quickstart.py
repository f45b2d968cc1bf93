"""`zofed quickstart`: a pretrained model, four clients with private reviews, three ways to learn from them."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from zofed import config
from zofed.base import shell
from zofed.commands.console import console

# What all ways share: film reviews that four clients keep to themselves, unevenly by label, and a prompt.
TASK: dict[str, Any] = {
    "model": "sample",
    "dataset": "sample-sst2",
    "task": "prompt",
    "template": "{{ text }} . it was",
    "label-words": " bad, good",
    "partition": "dirichlet",
    "held-out-fraction": 0.25,
    "eval-examples": 600,
    "batch-size": 16,
    "block-size": 64,
    "schedule": "cosine",
    "optimizer": "adamw",
    "save-interval": 0,
    "clients": 4,
    "device": "cpu",
}
# A folder's name, what the table calls it, and its settings.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "zo": (
        "forward passes (zo)",
        {"mode": "zo", "queries": 4, "direction-scale": "rms", "learning-rate": 0.02, "rounds": 100},
    ),
    "subspace": (
        "backpropagation in a subspace",
        {
            "mode": "subspace",
            "subspace-interval": 2,
            "direction-scale": "rms",
            "learning-rate": 0.03,
            "rounds": 20,
            "baselines": False,  # they are those of the first run
        },
    ),
    "fo": (
        "backpropagation, whole updates",
        {"mode": "fo", "local-steps": 2, "learning-rate": 0.003, "rounds": 20, "baselines": False},
    ),
}
EVALUATIONS = 5
BYTES = ("bytes", "bytes_beside_rounds")  # of the rounds; of greetings and checks


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("quickstart")(quickstart)


def quickstart(
    out: Annotated[Path, typer.Option(help="folder of the runs; an earlier one is moved aside")] = Path(
        "runs/quickstart"
    ),
    rounds: Annotated[int | None, typer.Option(min=1, help="at most this many rounds of each way")] = None,
) -> None:
    """Adapt a small pretrained model to the reviews of 4 simulated clients by three ways, `flwr run` first."""
    from zofed.deployment import flower_run

    out = config.absolute(out, "out")
    runs: dict[str, dict[str, Any]] = {
        name: TASK | way | _rounds(way["rounds"], rounds) for name, (_, way) in WAYS.items()
    }
    if status := flower_run.quickstart(out, "zo", runs.pop("zo")):
        raise typer.Exit(status)
    from zofed.experiments.from_python import simulate  # torch takes seconds to load

    for name, settings in runs.items():  # the same apps in this process: the same bits, without Ray's start
        console.print(f"zofed quickstart: {name}, in this process")
        simulate(out=out / name, **{key.replace("-", "_"): value for key, value in settings.items()})
    _tell(out)


def _rounds(usual: int, most: int | None) -> dict[str, int]:
    count = min(usual, most or usual)
    return {"rounds": count, "eval-interval": max(1, count // EVALUATIONS)}


def _tell(out: Path) -> None:
    """What the runs scored, beside what the model scores untouched; and the picture of it."""
    from zofed.experiments import arms, plot_scores
    from zofed.runs import run_result

    results = {name: run_result.read(out / name) for name in WAYS}
    baselines = results["zo"].summary["baselines"]
    table = Table("on held-out reviews", "accuracy", "AUC", "loss", "bytes of a client", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("most frequent class", f"{baselines['majority_accuracy']:.1%}")
    untouched = [baselines[f"zero_shot_{name}"] for name in ("accuracy", "auc", "loss")]
    table.add_row("untouched", f"{untouched[0]:.1%}", f"{untouched[1]:.3f}", f"{untouched[2]:.3f}", "0")
    table.add_row("untouched, one fitted threshold", f"{baselines['threshold_accuracy']:.1%}", f"{untouched[1]:.3f}")
    for name, result in results.items():
        own, sent = result.summary, sum(result.summary[key] for key in BYTES) / TASK["clients"]
        table.add_row(
            WAYS[name][0], f"{own['accuracy']:.1%}", f"{own['auc']:.3f}", f"{own['eval_loss_end']:.3f}", f"{sent:,.0f}"
        )
    console.print(table)
    digests = [(own["replay_digest"], own["digest"]) for own in (result.summary for result in results.values())]
    is_equal = all(again == first for again, first in digests if again)
    console.print(f"replay of the journals: {'equal' if is_equal else 'DIFFERENT'}")
    shown = [arms.Arm(WAYS[name][0], {}, [result]) for name, result in results.items()]
    picture = plot_scores.scores(shown, "bytes", (out / "scores.png").absolute(), metric="accuracy")
    console.print(f"wrote {picture}", markup=False)
    folder = out / "zo"
    for words in (("journal", "replay", folder), ("generate", folder, "the plot is elegant", "--compare")):
        console.print(f"next: {shell.command('zofed', *words)}", markup=False)
