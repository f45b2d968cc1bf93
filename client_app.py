"""What Flower loads as the client: a shim over `zofed.client`."""

from zofed import client

app = client.app  # Flower looks for an assignment to this name
