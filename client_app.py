"""What Flower loads as the client: a shim over `zofed.federated.client`."""

from zofed.federated import client

app = client.app  # Flower looks for an assignment to this name
