"""What Flower loads as the server: a shim over `zofed.federated.server`."""

from zofed.federated import server

app = server.app  # Flower looks for an assignment to this name
