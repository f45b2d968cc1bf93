"""A tabular model federated by forward passes: scikit-learn's breast cancer table on five nodes, an app in one file.

python examples/flower_tabular.py FOLDER

Both apps run in this process; in files of their own they are what `flwr run` takes, as in examples/flower_digits.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

from zofed.flower import Client, Strategy, simulate

HELD_OUT = 169


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    columns, benign = batch
    return F.binary_cross_entropy_with_logits(model(columns), benign)


def table() -> tuple[Tensor, Tensor]:
    """Columns of mean 0 and variance 1 (569, 30), and what is benign, in an order drawn once."""
    found = load_breast_cancer()
    columns = torch.tensor(found.data, dtype=torch.float32)
    columns = (columns - columns.mean(0)) / columns.std(0)
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(0))
    return columns[order], torch.tensor(found.target, dtype=torch.float32)[order]


def rows_of(context: Context) -> tuple[Tensor, Tensor]:
    """Those of one node."""
    node = context.node_config
    some = slice(HELD_OUT + int(node["partition-id"]), None, int(node["num-partitions"]))
    columns, benign = table()
    return columns[some], benign[some]


def scores(model: nn.Module, batches) -> dict[str, float]:
    right = torch.cat([(model(columns) > 0) == (benign > 0) for columns, benign in batches])
    return {"accuracy": float(right.float().mean())}


client_app = Client(net, loss, rows_of, metrics=scores).add_to(ClientApp())
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    held_out = tuple(tensor[:HELD_OUT] for tensor in table())
    found = Strategy(net, loss, held_out, metrics=scores).start(grid, context)
    print(f"accuracy {found.summary['accuracy']:.3f}, each client's weights {found.summary['digest'][:16]}")


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tabular").absolute()
    settings = {
        "rounds": 40, "queries": 8, "learning-rate": 0.1, "batch-size": 16, "client-held-out-fraction": 0.2,
        "out": str(out),
    }  # fmt: skip
    simulate(server_app, client_app, 5, {f"zofed.{key}": value for key, value in settings.items()})
