"""The server: the mean of the clients' weights, scored after each round."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.utils.data import DataLoader

from fedavg_digits.task import Net, digits, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    held_out = DataLoader(digits()[1], batch_size=64)

    def evaluate(_: int, arrays: ArrayRecord) -> MetricRecord:
        net = Net()
        net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(test(net, held_out))

    strategy = FedAvg(fraction_evaluate=0.0)
    torch.manual_seed(0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
    print("accuracy", max(result.evaluate_metrics_serverapp.items())[1]["accuracy"])
