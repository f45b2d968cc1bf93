"""The server: slopes or coefficients from the clients, the weights by a journal of them, scored now and then."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch.utils.data import DataLoader

from zofed.flower import Strategy
from zofed_digits.task import Net, digits, loss, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    held_out = DataLoader(digits()[1], batch_size=64)
    strategy = Strategy(Net, loss, held_out, metrics=test)
    result = strategy.start(grid, context)
    print("accuracy", max(result.evaluate_metrics_serverapp.items())[1]["accuracy"])
