"""A federation in this one process: the same apps that separate machines run, without Ray or a SuperLink."""

from typing import Any

from zofed.config import Settings
from zofed.federated import client, server
from zofed.federated.local_grid import LocalGrid

NODES = 2  # made where the settings name no number of clients


def simulate(settings: Settings, nodes: int = 0) -> dict[str, Any]:
    """Run it, or go on from the journal in the folder `out`, which is absolute; returns the run's summary.

    nodes: among which the data are dealt out; 0: one for each client of the settings.
    """
    if not settings.clients:  # there are as many nodes as are made here
        settings = settings.model_copy(update={"clients": nodes or NODES})
    grid = LocalGrid(client.app, nodes or settings.clients, settings.model_dump(by_alias=True))
    return server.run(grid, settings, "")
