"""How fast records become weights, against drawing Gaussian directions anew as MeZO, FedKSeed and DeComFL do."""

import torch

from benchmarks import common
from zofed.base.environment import keep_freed_memory
from zofed.core.journal import Entry, link
from zofed.core.records import Seeded
from zofed.core.replica import Replica

RANDN_DIRECTIONS = 2


def history(replica: Replica, records: int, queries: int) -> list[Entry]:
    """Entries that follow the replica's head, with coefficients of full size."""
    entries, head = [], replica.head
    for index in range(records):
        coefficients = tuple((-1) ** k * (2**17 + 123 * k + index) for k in range(queries))
        entries.append(link(head, Seeded(replica.round + 1 + index, 1e-9, (0,), queries, coefficients, -17, queries)))
        head = entries[-1].chain
    return entries


@torch.no_grad()
def redraw(model: torch.nn.Module, count: int) -> None:
    """Update with `count` directions of torch.randn, tensor by tensor."""
    for seed in range(count):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.sub_(torch.randn_like(parameter) * 1e-9)


def report(size: str, threads: int, pairs: int) -> None:
    """Print directions a second, ours over redrawn ones, for one large record and for streams of small ones."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    other = common.plain_gpt2(size)
    replica = common.replica_of(common.plain_gpt2(size))
    for records, queries in ((1, 256), (1, 8), (16, 8), (32, 8)):
        count = records * queries

        def ours(records: int = records, queries: int = queries) -> None:
            replica.replay(history(replica, records, queries))

        found = common.ratios({"ours": ours}, lambda: redraw(other, RANDN_DIRECTIONS), pairs)["ours"]
        rate = count / common.seconds(ours)
        speedup = [count / RANDN_DIRECTIONS / ratio for ratio in found]
        print(f"| {size} | {records} x {queries} | {rate:.0f} | {common.median(speedup)} |", flush=True)
