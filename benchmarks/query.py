"""What a zeroth-order query costs, everything included, in units of two plain Hugging Face forward passes."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks import common
from zofed.base.environment import keep_freed_memory
from zofed.core import perturbation_mode
from zofed.core.journal import link
from zofed.core.records import Seeded, to_integers
from zofed.core.replica import Replica

# examples x tokens: (queries, copies per pass) that suit two small cores; memory stays below twice inference's
SHAPES = {(1, 64): (8, 16), (2, 128): (8, 4), (8, 128): (8, 2)}


def step(replica: Replica, loss: common.Loss, queries: int, copies: int) -> None:
    """One whole step: slopes, record, update."""
    seeds = list(range(queries))
    estimate = replica.measure.slopes(loss, seeds, 1e-3, copies)
    coefficients, exponent = to_integers(estimate.slopes)
    record = Seeded(replica.round + 1, 1e-9, (0,), queries, coefficients, exponent, float(queries))
    replica.apply(link(replica.head, record))


def in_pieces(loss: common.Loss) -> None:
    """The plain forward pass with zofed's own chunked loss: what is left when perturbing costs nothing."""
    with perturbation_mode.in_pieces():
        loss()


def report(size: str, shape: tuple[int, int], threads: int, pairs: int) -> None:
    """Print one row for full scope; ratios of medians over `pairs`, each run timed beside its own plain passes."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    queries, copies = SHAPES[shape]
    ids = common.batch_of(shape)
    plain, ours = common.plain_gpt2(size), common.fused(common.plain_gpt2(size))
    forward, loss = common.loss_of(plain, ids), common.loss_of(ours, ids)
    replica, mezo = common.replica_of(ours), common.plain_gpt2(size)
    with torch.inference_mode():
        forward()
    count = max(1, queries // 4)

    @torch.inference_mode()
    def unit() -> None:
        for _ in range(2 * count):
            forward()

    @torch.no_grad()
    def chunked() -> None:
        for _ in range(2 * count):
            in_pieces(loss)

    found = common.ratios(
        {
            "step": lambda: step(replica, loss, queries, copies),
            "chunked": chunked,
            "mezo": lambda: [common.mezo_query(mezo, common.loss_of(mezo, ids), k, 1e-3, 1e-9) for k in range(count)],
        },
        unit,
        pairs,
    )
    ours_ratio = [ratio * count / queries for ratio in found["step"]]
    print(
        f"| {size} | {shape[0]}x{shape[1]} | {queries} | {copies} | {common.median(ours_ratio)} "
        f"| {common.median([a / b for a, b in zip(ours_ratio, found['chunked'], strict=True)])} "
        f"| {common.median(found['mezo'])} "
        f"| {common.median([b / a for a, b in zip(ours_ratio, found['mezo'], strict=True)])} |",
        flush=True,
    )


def report_scopes(size: str, shape: tuple[int, int], threads: int, pairs: int) -> None:
    """Print one row for each scope that leaves the lower layers alone, and one for dense directions."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    queries, copies = 8, 16
    ids = common.batch_of(shape)
    forward = common.loss_of(common.plain_gpt2(size), ids)

    @torch.inference_mode()
    def unit() -> None:
        for _ in range(4):
            forward()

    for what, kind, scope, asked in (
        ("last-1", "rank1", "last-1", queries),
        ("final norm", "rank1", "ln_f", queries),
        ("full, rademacher", "rademacher", "full", 2),
        ("full, gaussian", "gaussian", "full", 2),
    ):
        model = common.fused(common.plain_gpt2(size))
        replica, loss = common.replica_of(model, kind, scope), common.loss_of(model, ids)
        run: dict[str, Callable[[], object]] = {what: partial(step, replica, loss, asked, copies)}
        found = common.ratios(run, unit, pairs)[what]
        print(
            f"| {size} | {shape[0]}x{shape[1]} | {what} | {common.median([2 * r / asked for r in found])} |", flush=True
        )
