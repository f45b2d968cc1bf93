"""What one client does in a round: slopes, coefficients, gradients, updates; its weights are afterwards what they were.

Batches and seeds are functions of (run seed, round, client, local step) alone.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from zofed.config import WITH_BACKPROP, Settings
from zofed.core import directions, gradient_codec, kinds, records, subspace
from zofed.core.aggregation import Measured
from zofed.core.estimators import (
    Estimate,
    FiniteDifference,
    Split,
    degrees_of_freedom,
    forward_passes,
    weights_restored,
)
from zofed.core.measure import Update
from zofed.core.optimizers import Optimizer
from zofed.core.perturbed import Loss
from zofed.core.replica import Replica
from zofed.training import guided, guides, schedules, shards
from zofed.training.shards import Batch, Data


def slopes(
    settings: Settings, replica: Replica, examples: Data, client: int, steps: int = 1, split: Split | None = None
) -> Measured:
    """Slopes along one client's directions of the `steps` rounds that follow the replica's.

    From one local step to the next the weights move as those slopes say, by plain or normalised SGD of the local rate,
    and come back at the end, from a copy. split: measures shares of the queries in several places, as `raw_losses`
    does. Raises ValueError when a loss is not finite.
    """
    plan = [(replica.round + 1 + step, local) for step in range(steps) for local in range(settings.local_steps)]
    found: list[Estimate] = []
    spread = replica.spread
    with weights_restored(replica.parameters) if len(plan) > 1 else nullcontext():
        for index, (round_, local) in enumerate(plan):
            loss, own = query_loss(settings, replica, examples, round_, client, local)
            seeds = seeds_of(settings, replica, round_, client, local)
            how = (settings.epsilon, settings.perturbations_per_pass, settings.finite_difference)
            found.append(replica.measure.slopes(loss, seeds, *how, own, split))
            coefficients, exponent = records.to_integers(found[-1].slopes)
            spread = spread.after(coefficients, exponent)
            if index + 1 < len(plan):
                divisor = degrees_of_freedom(settings.finite_difference, settings.queries)
                rate = settings.local_learning_rate or settings.learning_rate
                size = divisor * spread.value if settings.normalize_slopes else divisor
                _move(replica, seeds, coefficients, math.ldexp(rate / size, exponent))
    coefficients, exponent = records.to_integers(
        [slope for one in found for slope in one.slopes], settings.quantization_bits
    )
    passes = sum(one.forward_passes for one in found)
    return Measured(
        coefficients,
        exponent,
        math.fsum(one.loss for one in found) / len(found),
        passes,
        passes * (examples_per_query(settings) or settings.batch_size),
        len(shards.of(settings, examples)),
    )


@torch.no_grad()
def _move(replica: Replica, seeds: Sequence[int], coefficients: Sequence[int], scale: float) -> None:
    """weights -= scale * sum of coefficient * direction: a move that nobody else takes, undone by who asked for it."""
    kind, shapes = replica.kind, replica.shapes
    drawn = dict(directions.draw(kind, seeds, shapes)) if kinds.terms(kind) else {}  # all from one generator's run
    for name, parameter in replica.parameters.items():
        shape, own = shapes[name], scale * kinds.unit(kind) * replica.sizes.get(name, 1.0)
        total = directions.WeightedSum(kind, seeds, coefficients, name, shape, parameter.device, drawn.get(name))
        parameter.sub_(total.rows(0, shape[0] if shape else 1).mul_(own).view(shape).to(parameter))


def raw_losses(settings: Settings, replica: Replica, examples: Data, client: int, some: slice, batched: bool) -> Tensor:
    """Losses at the shifted weights of some of a round's queries, as `slopes` meets them: (queries, steps)."""
    round_ = replica.round + 1
    loss, own = query_loss(settings, replica, examples, round_, client)
    how = FiniteDifference(
        replica.kind, settings.epsilon, settings.finite_difference, settings.perturbations_per_pass, replica.sizes
    )
    return how.losses(loss, replica.parameters, seeds_of(settings, replica, round_, client), own, some, batched=batched)


def seeds_of(settings: Settings, replica: Replica, round_: int, client: int, local: int = 0) -> list[int]:
    """Seeds of the directions of one client, or of all where they share them, in one local step of a round."""
    own = 0 if settings.direction_seeds == "shared" else client
    return directions.local_step_seeds(replica.genesis["seed"], round_, own, local, settings.queries)


def query_loss(
    settings: Settings, replica: Replica, examples: Data, round_: int, client: int, local: int = 0
) -> tuple[Loss, Batch | None]:
    """The loss that a local step's queries measure, and the examples handed to it: those of each query, or None."""
    shard, model, each = shards.of(settings, examples), replica.model, examples_per_query(settings)
    step = (round_ - 1) * settings.local_steps + local + 1
    chosen = {"seed": replica.genesis["seed"], "client": client, "step": step}
    if each:
        return shard.measured(model, None), shard.of_queries(model, settings.queries, each, **chosen)
    (batch,) = shard.batches(1, settings.batch_size, **chosen)
    return shard.measured(model, shard.prepared(model, batch)), None


def batch_loss(settings: Settings, replica: Replica, examples: Data, step: int) -> Loss:
    """The loss of the batch that a run alone has in a step, whatever its objective."""
    shard = shards.of(settings, examples)
    (batch,) = shard.batches(1, settings.batch_size, seed=settings.seed, client=0, step=step)
    return lambda: shard.loss(replica.model, batch)


def examples_per_query(settings: Settings) -> int:
    """Examples that each query has of its own; 0: all share one batch."""
    return (settings.query_batch_size or settings.batch_size) if settings.query_batches == "per-query" else 0


def passes(settings: Settings) -> int:
    """Forward passes of one local step of zeroth order."""
    if examples_per_query(settings):
        return 2 * settings.queries
    return forward_passes(settings.finite_difference, settings.queries)


def examples_seen(settings: Settings) -> int:
    """Examples that one step of zeroth order reads on one client."""
    return settings.local_steps * (examples_per_query(settings) * settings.queries or settings.batch_size)


def guided_slopes(settings: Settings, replica: Replica, examples: Data, client: int, guide: Update) -> Measured:
    """Slopes along one client's directions that a guide shapes. Raises ValueError when a loss is not finite."""
    round_, shape = replica.round + 1, guides.Shape.of(settings)
    loss, own = query_loss(settings, replica, examples, round_, client)
    seeds = seeds_of(settings, replica, round_, client)
    found = guided.slopes(replica, loss, guides.guidance(guide, shape), shape, seeds, own)
    sequences = found.forward_passes * (examples_per_query(settings) or settings.batch_size)
    integers = records.to_integers(found.values, settings.quantization_bits)
    return Measured(*integers, found.loss, found.forward_passes, sequences, len(shards.of(settings, examples)))


def gradient(settings: Settings, replica: Replica, examples: Data, client: int) -> tuple[Update, float]:
    """Mean gradient over the round's backprop batches, clipped, and the mean loss.

    Raises ValueError when one of them is not finite.
    """
    losses = batches(settings, replica, examples, client, settings.gradient_accumulation, backprop_batch_size(settings))
    update, total = replica.measure.gradient(losses[0])
    for loss in losses[1:]:
        further, value = replica.measure.gradient(loss)
        total += value
        for name, tensor in further.items():
            update[name].add_(tensor)
    norm = math.sqrt(sum(float(torch.dot(flat, flat)) for flat in (t.flatten() for t in update.values())))
    if not math.isfinite(total) or not math.isfinite(norm):
        raise ValueError(f"loss {total}, norm of the gradient {norm}")
    share = 1.0 / len(losses)
    if 0.0 < settings.clip_norm < norm * share:
        share = settings.clip_norm / norm
    if share != 1.0:
        for tensor in update.values():
            tensor.mul_(share)
    return update, total / len(losses)


def update(settings: Settings, replica: Replica, examples: Data, client: int) -> tuple[Update, float]:
    """What `local-steps` steps of backpropagation changed, over minus the local rate; and the mean loss.

    In units of a gradient: the server's SGD of the local rate moves the weights by the mean of what the clients moved
    theirs (FedAvg: McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS
    2017), its AdamW is FedAdam's (Reddi et al., "Adaptive federated optimization", ICLR 2021). With one local step it
    is the gradient itself. The local optimizer begins without a state in every round. clip_norm: of each step's
    gradient. proximal: pulls towards the round's start (FedProx: Li et al., MLSys 2020).
    """
    if settings.local_steps == 1:
        return gradient(settings, replica, examples, client)
    rate, optimizer = settings.local_learning_rate or settings.learning_rate, Optimizer(settings.local_optimizer)
    losses = batches(settings, replica, examples, client, settings.local_steps, settings.batch_size)
    met = []
    with weights_restored(replica.parameters) as start:
        for loss in losses:
            change, value = replica.measure.gradient(loss)
            met.append(value)
            corrections, norm = optimizer.begin_step(), gradient_codec.norm(change)
            with torch.no_grad():
                if 0.0 < settings.clip_norm < norm:
                    for tensor in change.values():
                        tensor.mul_(settings.clip_norm / norm)
                for name, parameter in replica.parameters.items():
                    if settings.proximal:
                        change[name].add_(parameter - start[name], alpha=settings.proximal)
                    own, moments = change[name].to(torch.float32), optimizer.moments(name, parameter)
                    optimizer.step(name, parameter, own, moments, rate, corrections)
        with torch.no_grad():
            found = {
                name: (start[name].to(torch.float32) - parameter).div_(rate)
                for name, parameter in replica.parameters.items()
            }
    norm = gradient_codec.norm(found)
    if not all(map(math.isfinite, (*met, norm))):
        raise ValueError(f"losses {met}, norm of the update {norm}")
    return found, math.fsum(met) / len(met)


def coefficients(
    settings: Settings, replica: Replica, examples: Data, client: int, total: int, *, by_backprop: bool = True
) -> Measured:
    """Integer coefficients trained in the subspace of the round that follows the replica's, which all clients share.

    by_backprop: else by slopes along random directions of the coefficients, forward passes only. The integers are those
    of the sum that the weights go *against*, as with slopes. Raises ValueError when a loss is not finite.
    """
    round_, size, count = replica.round + 1, settings.subspace_size, settings.subspace_interval
    seeds = directions.direction_seeds(replica.genesis["seed"], round_, 0, size)
    matrices = frozenset({subspace.NAME}) if replica.kind == "core" else frozenset[str]()
    losses = batches(settings, replica, examples, client, count, settings.batch_size)
    replica.measure.check(losses[0], batched=False)
    asked = (
        losses,
        replica.parameters,
        replica.kind,
        seeds[: kinds.seeds_needed(replica.kind, size)],
        size,
        Optimizer(settings.step_rule, settings.momentum, 0.0, settings.cautious, matrices),
        subspace_rate(settings, round_, total) / count,
        replica.sizes,
    )
    ways = (
        None if by_backprop else subspace.Probing(settings.queries, settings.epsilon, replica.genesis["seed"], client)
    )
    trained = subspace.trained(*asked, probing=ways)
    integers, exponent = records.to_integers([-value for value in trained.coefficients], settings.quantization_bits)
    passes = count if by_backprop else 2 * settings.queries * count
    held = len(shards.of(settings, examples))
    return Measured(integers, exponent, trained.loss, passes, passes * settings.batch_size, held)


def subspace_rate(settings: Settings, round_: int, total: int) -> float:
    """The rate of all inner steps of a round's subspace together."""
    return schedules.learning_rate(settings, round_, total) * settings.subspace_interval


def batches(settings: Settings, replica: Replica, examples: Data, client: int, count: int, size: int) -> Sequence[Loss]:
    """Losses of `count` batches of the round after the replica's; backpropagation beside zeroth order has its own."""
    shard = shards.of(settings, examples)
    purpose = backprop_purpose(settings)
    chosen = {"seed": settings.seed, "client": client, "step": replica.round + 1, "purpose": purpose}

    def loss(batch: Batch) -> Tensor:
        return shard.loss(replica.model, shard.prepared(replica.model, batch))

    return [lambda batch=batch: loss(batch) for batch in shard.batches(count, size, **chosen)]  # type: ignore[misc]


def backprop_purpose(settings: Settings) -> str:
    """What the batches of backpropagation are drawn for."""
    return "backprop batch" if settings.mode in WITH_BACKPROP else "batch"


def backprop_batch_size(settings: Settings) -> int:
    """Examples of one backprop pass."""
    return (settings.mode in WITH_BACKPROP and settings.bp_batch_size) or settings.batch_size
