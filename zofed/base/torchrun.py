"""Where this process stands among those of torchrun, by the variables that it sets in their environment."""

import os
from typing import NamedTuple


class Place(NamedTuple):
    """Of one process among those of a run. local: among those of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def place() -> Place:
    """Of this process; that of a run's only one where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Place()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
