"""The client: what it answers zofed's server."""

from flwr.clientapp import ClientApp

from zofed.flower import Client
from zofed_digits.task import Net, load_data, loss

app = Client(Net, loss, load_data).add_to(ClientApp())
