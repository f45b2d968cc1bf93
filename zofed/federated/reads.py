"""Which examples a plan has a client read, and for how many slopes each: as `measurements` draws them."""

import numpy as np

from zofed.config import Settings
from zofed.core.replica import Replica
from zofed.data import encoding
from zofed.federated import protocol
from zofed.federated.ledger import Reads
from zofed.federated.protocol import Plan
from zofed.training import measurements, shards
from zofed.training.shards import Data


def of(plan: Plan, settings: Settings, replica: Replica, data: Data, client: int) -> tuple[Reads, int]:
    """The positions of the examples of each batch, with the slopes that an answer holds of it; and all these slopes.

    A gradient or an update counts as many slopes as it has numbers, and each of a subspace's coefficients as one. Of
    data that say of no batch which examples are in it, every slope may be of every example.
    """
    if plan.task in ("gradient", "update"):
        numbers = sum(parameter.numel() for parameter in replica.parameters.values())
    else:
        numbers = protocol.integers_asked(settings, plan.task, plan.steps)
    held = len(shards.of(settings, data))
    if not isinstance(data, dict):
        return [(np.arange(held), numbers)], numbers
    classes = data["labels"].numpy().tobytes() if _is_stratified(settings, data) else b""

    def positions(size: int, seed: int, step: int, purpose: str = "batch") -> np.ndarray:
        return np.array(encoding.positions(held, seed, client, step, size, purpose, classes))

    if plan.task in ("slopes", "guided"):
        each, steps = measurements.examples_per_query(settings), plan.steps if plan.task == "slopes" else 1
        size, slopes = (each * settings.queries, 1) if each else (settings.batch_size, settings.queries)
        first = (plan.round - 1) * settings.local_steps + 1
        last = first + (settings.local_steps * steps if plan.task == "slopes" else 1)
        seed = replica.genesis["seed"]
        return [(positions(size, seed, step), slopes) for step in range(first, last)], numbers
    if plan.task == "coefficients":
        size = settings.subspace_interval * settings.batch_size
    elif plan.task == "update" and settings.local_steps > 1:
        size = settings.local_steps * settings.batch_size
    else:
        size = settings.gradient_accumulation * measurements.backprop_batch_size(settings)
    return [(positions(size, settings.seed, plan.round, measurements.backprop_purpose(settings)), numbers)], numbers


def _is_stratified(settings: Settings, data: encoding.Examples) -> bool:
    return settings.batch_order == "stratified" and data["labels"].dim() == 1
