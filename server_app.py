"""What Flower loads as the server: a shim over `zofed.server`."""

from zofed import server

app = server.app  # Flower looks for an assignment to this name
