"""A snapshot is all that a replica is, or it is refused and moves nothing."""

import math

import pytest
import torch
from exchanges import HISTORY, UPDATE, history, replica_of, standing_at, state
from safetensors.torch import load, save

from zofed.core import snapshots
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Guided

OPTIMIZERS = [Optimizer("sgd"), Optimizer("sgd", 0.5), Optimizer("adamw", weight_decay=0.1), Optimizer("mudamw")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda one: f"{one.name} {one.momentum}")
@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_snapshot_is_all_that_a_replica_is(optimizer: Optimizer, count: int) -> None:
    """What it moves afterwards shows that no state of the optimizer and no spread was lost."""
    there, replica = standing_at(count, optimizer), standing_at(2, optimizer)
    raw = snapshots.taken(there)
    snapshots.restore(replica, raw)
    assert state(replica) == state(there)
    for entry in history(replica_of(optimizer=optimizer))[count:]:
        for one in (there, replica):
            one.apply(entry, UPDATE if isinstance(entry.record, Dense | Guided) else None)
    assert state(replica) == state(there) == state(standing_at(len(HISTORY), optimizer))
    assert snapshots.size(there) <= len(snapshots.taken(there))


def broken_snapshots() -> dict[str, bytes]:
    raw = snapshots.taken(standing_at(3))
    parts = load(raw)
    return {
        "nothing": b"",
        "cut": raw[:-1],
        "garbage": bytes(range(256)),
        "no round": save({key: tensor for key, tensor in parts.items() if key != "round"}),
        "no head": save({key: tensor for key, tensor in parts.items() if key != "head"}),
        "a short head": save(parts | {"head": torch.zeros(3, dtype=torch.uint8)}),
        "a head of negatives": save(parts | {"head": torch.full((16,), -1)}),
        "a weight missing": save({key: tensor for key, tensor in parts.items() if key != "weight/bias"}),
        "a weight of another shape": save(parts | {"weight/bias": torch.zeros(3)}),
        "a weight of another type": save(parts | {"weight/bias": torch.zeros(2, dtype=torch.float64)}),
        "a round that is no number": save(parts | {"round": torch.zeros(2)}),
        "an endless round": save(parts | {"round": torch.tensor(math.inf)}),
        "a round before the first": save(parts | {"round": torch.tensor(-1)}),
        "a weight too many": save(parts | {"weight/more": torch.zeros(2)}),
        "something else": save(parts | {"more": torch.zeros(2)}),
        "no spread": save({key: tensor for key, tensor in parts.items() if key != "state/spread"}),
        "a spread of another shape": save(parts | {"state/spread": torch.zeros(3, dtype=torch.float64)}),
        "no powers": save({key: tensor for key, tensor in parts.items() if key != "state/powers"}),
        "powers of another type": save(parts | {"state/powers": torch.ones(2)}),
        "a moment missing": save({key: tensor for key, tensor in parts.items() if key != "state/momentum/bias"}),
        "a moment of another shape": save(parts | {"state/momentum/bias": torch.zeros(3)}),
        "a moment of another rule": save(parts | {"state/mean/bias": torch.zeros(2)}),
        "a state of backprop's": save(parts | {"state/backprop/powers": torch.ones(2, dtype=torch.float64)}),
    }


@pytest.mark.parametrize("way", broken_snapshots())
def test_a_broken_snapshot_is_refused_and_moves_nothing(way: str) -> None:
    replica = standing_at(2)
    before = state(replica)
    with pytest.raises(ValueError, match="snapshot"):
        snapshots.restore(replica, broken_snapshots()[way])
    assert state(replica) == before
