"""A CNN on scikit-learn's digits, ten clients of two digits each: accuracy beside bytes, in one process each way.

Zeroth order, a subspace, first order and DeComFL's recipe run through `zofed.flower` in the app of
examples/flower_digits; FedAvg is Flower's own, in the app of examples/flower_digits_fedavg.
"""

import logging
import statistics
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from zofed.federated import flower_messages
from zofed.federated.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from zofed.runs.run_folder import RunFolder
from zofed.runs.tables import read_table

EXAMPLES = Path(__file__).parents[1] / "examples"
CLIENTS = 10
FEDAVG = {"num-server-rounds": 30, "local-epochs": 1, "learning-rate": 0.3}
ALL = {"eval-examples": 360, "clients": CLIENTS, "save-interval": 0, "weight-check-interval": 0, "batch-size": 16}
ARMS: dict[str, dict[str, Any]] = {
    "subspace": {
        "mode": "subspace", "subspace-size": 1024, "subspace-interval": 9, "rounds": 30, "optimizer": "adamw",
        "learning-rate": 0.03, "quantization-bits": 6,
    },
    "fo": {"mode": "fo", "local-steps": 9, "rounds": 30, "learning-rate": 0.3},
    "zo": {
        "queries": 16, "rounds": 200, "optimizer": "adamw", "learning-rate": 0.01, "batch-size": 32,
        "quantization-bits": 6,
    },
    "DeComFL's recipe": {
        "direction-seeds": "shared", "directions": "gaussian", "finite-difference": "two-point", "queries": 10,
        "epsilon": 1e-3, "normalize-slopes": False, "rounds": 100, "learning-rate": 0.03, "batch-size": 32,
    },
}  # fmt: skip
WAYS = ("subspace", "fo", "FedAvg", "zo", "DeComFL's recipe")


class Counting(LocalGrid):
    """Counts the bytes of all contents, both ways, as Flower serialises them."""

    bytes = 0

    def _deliver(self, message: Message) -> str:
        self.bytes += flower_messages.size(message.content)
        name = super()._deliver(message)
        self.bytes += flower_messages.size(self._replies[name].content)
        return name


def one(arm: str, seed: int, **changes: Any) -> tuple[float, float, float]:
    """Accuracy on the server's 360 images (%), bytes and passes of a client, both ways and in the whole run."""
    if arm == "FedAvg":
        return fedavg(seed)
    from zofed_digits.client_app import app as client_app  # type: ignore[import-not-found]
    from zofed_digits.server_app import app as server_app  # type: ignore[import-not-found]

    from zofed.flower import simulate

    with tempfile.TemporaryDirectory() as out:
        settings = ALL | ARMS[arm] | {"seed": seed, "out": f"{out}/run"} | changes
        settings["eval-interval"] = settings["rounds"]
        with redirect_stdout(StringIO()):
            simulate(server_app, client_app, CLIENTS, {f"zofed.{key}": value for key, value in settings.items()})
        folder = RunFolder(Path(out) / "run")
        summary, rows = folder.summary(), read_table(folder.path / "clients.csv")
        assert set(summary["client_digests"].values()) == {summary["digest"]}
        sent = sum(int(row["bytes_up"]) + int(row["bytes_down"]) for row in rows)
        return 100 * summary["accuracy"], sent / CLIENTS, summary["forward_passes"] / CLIENTS


def fedavg(seed: int) -> tuple[float, float, float]:
    """The same of Flower's own FedAvg."""
    import torch
    from fedavg_digits.client_app import app as client_app  # type: ignore[import-not-found]
    from fedavg_digits.server_app import app as server_app  # type: ignore[import-not-found]

    grid, told = Counting(client_app, CLIENTS, dict(FEDAVG)), StringIO()
    torch.manual_seed(seed)
    with redirect_stdout(told):
        server_app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), FEDAVG | {"seed": seed}))
    passes = FEDAVG["num-server-rounds"] * 9
    return 100 * float(told.getvalue().split()[-1]), grid.bytes / CLIENTS, passes


def report(seeds: int, arms: Iterable[str]) -> None:
    """The table. seeds: 0 to one less."""
    sys.path[:0] = [str(EXAMPLES / name) for name in ("flower_digits", "flower_digits_fedavg")]
    logging.getLogger("flwr").setLevel(logging.WARNING)
    print("| way | accuracy, mean and spread | bytes of a client, both ways | passes of a client |")
    print("| --- | --- | --- | --- |")
    for arm in arms:
        found = [one(arm, seed) for seed in range(seeds)]
        accuracy, sent, passes = zip(*found, strict=True)
        spread = statistics.stdev(accuracy) if seeds > 1 else 0.0
        mean, bytes_, count = statistics.fmean(accuracy), statistics.fmean(sent), statistics.fmean(passes)
        print(f"| {arm} | {mean:.1f} % ± {spread:.1f} | {bytes_:,.0f} | {count:,.0f} |", flush=True)
