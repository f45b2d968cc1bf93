"""The client: what it answers zofed's server."""

from flwr.app import Context
from flwr.clientapp import ClientApp

from zofed.flower import Client
from zofed_digits.task import Net, load_data, loss


def data(context: Context):
    node = context.node_config
    return load_data(node["partition-id"], node["num-partitions"], context.run_config["zofed.batch-size"])


app = Client(Net, loss, data).add_to(ClientApp())
