"""Everything that must hold on a GPU, checked with one command; until it has run there, nothing is promised there."""

import copy
import itertools

import torch

from benchmarks import common, gpu_runs, query
from zofed.core.digests import weights_digest
from zofed.core.journal import link
from zofed.core.optimizers import Optimizer
from zofed.core.records import Seeded
from zofed.core.replica import Replica
from zofed.models.scopes import inner_matrices

KINDS = ("rank1", "rank4", "rademacher", "gaussian")
OPTIMIZERS = ("sgd", "momentum", "adamw", "mudamw")


def report(device: str, size: str, model: str) -> bool:
    """Run all checks on `device` against the CPU; prints one line each, returns whether all held.

    model: folder of a causal language model, for whole runs.
    """
    results = [
        *(replay_is_equal(device, kind, rule, dtype) for kind, rule, dtype in itertools.product(
            KINDS, OPTIMIZERS, (torch.float32, torch.bfloat16)
        )),
        *(asking_restores(device, kind) for kind in KINDS),
        slopes_agree(device),
    ]  # fmt: skip
    found = []
    for what, holds in itertools.chain(results, gpu_runs.checks(device, model)):
        print(f"{'well ' if holds else 'WRONG'}  {what}", flush=True)
        found.append(holds)
    for what in gpu_runs.left_out(device):
        print(f"left out  {what}", flush=True)
    cost(device, size)
    if device.startswith("cuda"):
        gpu_runs.billion(device)
    return all(found)


def replay_is_equal(device: str, kind: str, rule: str, dtype: torch.dtype) -> tuple[str, bool]:
    """The same records replayed on the CPU and on the device: one SHA-256?"""
    digests = []
    for where in ("cpu", device):
        replica = _replica(where, kind, rule, dtype)
        for round_ in range(1, 6):
            coefficients = tuple((-1) ** k * (2**17 // (k + round_)) for k in range(6))
            replica.apply(link(replica.head, Seeded(round_, 3e-3, (0,), 6, coefficients, -17, 6.0)))
        digests.append(replica.digest())
    return f"replay on cpu == {device}: {kind}, {rule}, {dtype}", digests[0] == digests[1]


def asking_restores(device: str, kind: str) -> tuple[str, bool]:
    """Slopes leave every bit of the weights."""
    replica = _replica(device, kind, "sgd", torch.float32)
    before = weights_digest(replica.model)
    replica.measure.slopes(common.loss_of(replica.model, common.batch_of((2, 32), device)), [1, 2, 3], 1e-3, 4)
    return f"asking leaves the weights: {kind}", weights_digest(replica.model) == before


def slopes_agree(device: str) -> tuple[str, bool]:
    """Slopes are inputs and may differ between devices, but only by rounding."""
    found = []
    for where in ("cpu", device):
        replica = _replica(where, "rank1", "sgd", torch.float32)
        loss = common.loss_of(replica.model, common.batch_of((2, 32), where))
        found.append(torch.tensor(replica.measure.slopes(loss, list(range(8)), 1e-3, 8).slopes))
    error = float((found[0] - found[1]).norm() / found[0].norm())
    return f"slopes on cpu and {device} differ by {error:.1e}", error < 0.02  # TF32 would show here


def cost(device: str, size: str) -> None:
    """Print time and memory of a step over two plain forward passes, at several copies a pass."""
    model = common.plain_gpt2(size, device)
    ids = common.batch_of((8, 128), device)
    forward = common.loss_of(model, ids)
    replica = common.replica_of(common.fused(copy.deepcopy(model)))
    loss = common.loss_of(replica.model, ids)

    @torch.inference_mode()
    def unit() -> None:
        for _ in range(4):
            forward()

    base = common.peak(unit)
    for copies in (1, 2, 8, 16):
        run = lambda copies=copies: query.step(replica, loss, 8, copies)  # noqa: E731
        found = common.ratios({"step": run}, unit, 5)["step"]
        memory = f"{common.peak(run) / base:.2f}" if base else "not measured"
        print(f"{size} 8x128, {copies} copies: {common.median([r / 4 for r in found])} of 2 forwards, memory {memory}")
    mezo = common.ratios({"mezo": lambda: common.mezo_query(model, forward, 1, 1e-3, 1e-9)}, unit, 5)["mezo"]
    print(f"{size} 8x128, MeZO: query / 2 forwards {common.median([2 * r for r in mezo])}")


def _replica(device: str, kind: str, rule: str, dtype: torch.dtype) -> Replica:
    model = torch.nn.Module.to(common.fused(common.plain_gpt2("20M")), dtype=dtype)
    names = ("transformer.wte.weight", "transformer.h.0.", "transformer.ln_f.")
    matrices = inner_matrices(model, [name for name, _ in model.named_parameters()]) if rule == "mudamw" else []
    optimizer = Optimizer(
        "sgd" if rule == "momentum" else rule,  # type: ignore[arg-type]
        0.9 if rule == "momentum" else 0.0,
        0.01,
        orthogonal=frozenset(matrices),
    )
    scope = "|".join(name.replace(".", r"\.") for name in names)
    return common.replica_of(model.to(device), kind, scope, optimizer)
