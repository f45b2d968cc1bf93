"""A record moves the weights by exactly what it says, and digest and probe tell whether replicas agree."""

from collections.abc import Sequence
from fractions import Fraction
from math import prod, sqrt
from typing import Any

import pytest
import torch
from reference import sign_stream
from torch import Tensor, nn

from zofed import directions
from zofed.directions import Kind, tensor_id
from zofed.errors import UserError
from zofed.journal import Genesis, genesis_chain, link
from zofed.optimizers import Optimizer
from zofed.records import Dense, Record, Seeded, Skipped
from zofed.worker import Worker, make_genesis, named_parameters, weights_digest

RUN_SEED = 11
KINDS: tuple[Kind, ...] = ("rank1", "rademacher")


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two matrices and three vectors, entries multiples of 1/16."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            pattern = torch.arange(parameter.numel()) % 9 - 4
            parameter.copy_(pattern.reshape(parameter.shape) / 16)
    return model.to(dtype)


def genesis_of(model: nn.Module, trainable: Sequence[str] | None = None, **changes: Any) -> Genesis:
    names = named_parameters(model) if trainable is None else trainable
    arguments = {"seed": RUN_SEED, "kind": "rank1", "optimizer": Optimizer("sgd")} | changes
    return make_genesis(model, {"name": "test"}, names, **arguments)


def worker_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Worker:
    model = model_of(dtype)
    return Worker(model, genesis_of(model, **changes))


def moved(worker: Worker, history: Sequence[Record]) -> Worker:
    for record in history:
        worker.apply(link(worker.head, record), {name: p.detach() / 2 for name, p in worker.parameters.items()})
    return worker


def seeded(round_: int, coefficients: Sequence[int] = (5, -3, 1, 7), rate: float = 0.125, exponent: int = -6) -> Seeded:
    return Seeded(round_, rate, (2, 9), len(coefficients) // 2, tuple(coefficients), exponent, len(coefficients))


HISTORY: tuple[Record, ...] = (seeded(1), Skipped(2), Dense(3, 0.1), seeded(4, (-100, 3, 77, 0, 1, 2)))


def entries_of(kind: Kind, seed: int, name: str, shape: Sequence[int]) -> list[int]:
    """The direction's entries from the plain twin of the generator."""
    if kind == "rank1" and len(shape) > 1:
        a, b = sign_stream(seed, tensor_id(name), 0, shape[0]), sign_stream(seed, tensor_id(name), 1, prod(shape[1:]))
        return [left * right for left in a for right in b]
    return sign_stream(seed, tensor_id(name), 0, prod(shape))


def exact_gradient(kind: Kind, record: Seeded, name: str, shape: Sequence[int]) -> list[Fraction]:
    seeds = [
        directions.derive_seed("zofed-direction", RUN_SEED, record.round, client, local, query)
        for client in record.clients
        for local in range(record.local_steps)
        for query in range(record.queries)
    ]
    columns = zip(*(entries_of(kind, seed, name, shape) for seed in seeds), strict=True)
    scale = Fraction(2) ** record.exponent / record.divisor
    return [scale * sum(c * z for c, z in zip(record.coefficients, column, strict=True)) for column in columns]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("record", "tolerance"),
    [
        (seeded(1), 0),  # every number is a small multiple of a power of two: nothing may round
        (Seeded(3, 0.5, (4,), 2, (1, -2, 3, 9), -4, 4, local_steps=2), 0),
        (Seeded(2, 0.3, (0, 1, 7), 1, (2**30 - 1, -(2**30) + 1, 123456789), -31, 3), 2**-22),
    ],
)
def test_a_seeded_record_moves_the_weights_by_its_exact_sum(kind: Kind, record: Seeded, tolerance: float) -> None:
    worker = worker_of(kind=kind)
    before = {name: parameter.detach().clone() for name, parameter in worker.parameters.items()}
    norm = worker.apply(link(worker.head, record))
    squares = Fraction(0)
    for name, parameter in worker.parameters.items():
        gradient = exact_gradient(kind, record, name, parameter.shape)
        squares += sum(value**2 for value in gradient)
        start = before[name].flatten().tolist()
        expected = [Fraction(w) - Fraction(record.rate) * g for w, g in zip(start, gradient, strict=True)]
        errors = [abs(Fraction(w) - e) for w, e in zip(parameter.flatten().tolist(), expected, strict=True)]
        assert max(errors) <= tolerance
        assert not torch.equal(parameter, before[name])
    assert norm == pytest.approx(sqrt(squares), rel=1e-5)
    assert (worker.round, worker.head) == (record.round, link(genesis_chain(worker.genesis), record).chain)


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_rounded_once_to_float32(kind: Kind) -> None:
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    worker = Worker(model, genesis_of(model, kind=kind))
    coefficients = (2**30 - 1, -(2**30) + 1, 123456789, -987654321, 3, 555555555)
    record = Seeded(2, 1.0, (0, 1, 7), 2, coefficients, -31, 3)
    worker.apply(link(worker.head, record))  # from zero with rate 1: the weights are now minus the estimate
    for name, parameter in worker.parameters.items():
        exact = exact_gradient(kind, record, name, parameter.shape)
        for weight, value in zip(parameter.flatten().tolist(), exact, strict=True):
            assert abs(Fraction(-weight) - value) <= abs(value) * Fraction(2**-24) * Fraction(1.000001)


def test_only_what_trains_moves() -> None:
    model = model_of()
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved(Worker(model, genesis_of(model, ["0.weight", "1.bias"])), HISTORY)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, frozen[name])]
    assert still == ["0.bias", "1.weight", "2.weight"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["0.weight", "1.bias"]


def test_a_parameter_moves_alike_whatever_else_trains() -> None:
    alone, together = model_of(), model_of()
    moved(Worker(alone, genesis_of(alone, ["2.weight"])), HISTORY)
    moved(Worker(together, genesis_of(together)), HISTORY)
    assert torch.equal(alone[2].weight, together[2].weight)


def test_a_skipped_round_moves_the_head_alone() -> None:
    worker = worker_of(optimizer=Optimizer("adamw"))
    digest, state = worker.digest(), worker.optimizer.state_dict()["corrections"].tolist()
    entry = link(worker.head, Skipped(1))
    assert worker.apply(entry) == 0.0
    assert (worker.digest(), worker.round, worker.head) == (digest, 1, entry.chain)
    assert worker.optimizer.state_dict()["corrections"].tolist() == state


def test_a_dense_record_without_its_update_is_refused_and_moves_nothing() -> None:
    worker = worker_of()
    digest, head = worker.digest(), worker.head
    with pytest.raises(UserError, match=r"round 6 .*not kept.*checkpoint"):
        worker.apply(link(worker.head, Dense(6, 0.1)))
    assert (worker.digest(), worker.head, worker.round) == (digest, head, 0)


def test_a_dense_record_is_a_gradient_step() -> None:
    worker = worker_of()
    before = {name: parameter.detach().clone() for name, parameter in worker.parameters.items()}
    update = {name: torch.ones_like(parameter) for name, parameter in worker.parameters.items()}
    norm = worker.apply(link(worker.head, Dense(1, 0.5)), update)
    assert all(torch.equal(parameter, before[name] - 0.5) for name, parameter in worker.parameters.items())
    assert norm == pytest.approx(sqrt(sum(parameter.numel() for parameter in before.values())))


def test_another_base_is_refused() -> None:
    genesis = genesis_of(model_of())
    other = model_of()
    with torch.no_grad():
        other[2].weight[0, 0] += 2**-20
    with pytest.raises(UserError, match=r"base weights have SHA-256 .*starts from"):
        Worker(other, genesis)
    with pytest.raises(UserError, match="base weights"):
        Worker(model_of(torch.bfloat16), genesis)


def test_everything_a_replay_depends_on_is_in_the_genesis() -> None:
    model = model_of()
    changed = model_of()
    with torch.no_grad():
        changed[0].bias[0] += 1
    genesis = [
        genesis_of(model),
        genesis_of(changed),
        genesis_of(model, ["0.weight"]),
        genesis_of(model, seed=12),
        genesis_of(model, kind="rademacher"),
        genesis_of(model, optimizer=Optimizer("adamw")),
        genesis_of(model, optimizer=Optimizer("sgd", momentum=0.5)),
        genesis_of(model, optimizer=Optimizer("sgd", weight_decay=0.5)),
        make_genesis(model, {"name": "other"}, ["0.weight"], seed=RUN_SEED, kind="rank1", optimizer=Optimizer("sgd")),
    ]
    assert len({genesis_chain(one) for one in genesis}) == len(genesis)
    assert genesis_chain(genesis_of(model_of())) == genesis_chain(genesis[0])


OPTIMIZERS = [Optimizer("sgd"), Optimizer("sgd", 0.5, 0.125), Optimizer("adamw", weight_decay=0.125)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_histories_end_in_equal_bits(kind: Kind, dtype: torch.dtype, optimizer: Optimizer) -> None:
    one, other = (worker_of(dtype, kind=kind, optimizer=optimizer) for _ in range(2))
    start = one.digest(), one.probe()
    for record in HISTORY:
        moved(one, [record])
        moved(other, [record])
        assert (one.digest(), one.probe(), one.head) == (other.digest(), other.probe(), other.head)
    assert one.digest() != start[0]
    assert one.probe() != start[1]
    assert all(parameter.dtype == dtype for parameter in one.parameters.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_worker_goes_on_from_a_checkpoint_bit_for_bit(dtype: torch.dtype, optimizer: Optimizer) -> None:
    whole = moved(worker_of(dtype, optimizer=optimizer), HISTORY)
    first = moved(worker_of(dtype, optimizer=optimizer), HISTORY[:3])
    weights = {name: parameter.detach().clone() for name, parameter in first.parameters.items()}
    second = worker_of(dtype, optimizer=optimizer)
    second.load(weights, first.optimizer.state_dict(), round_=first.round, head=first.head)
    moved(second, HISTORY[3:])
    assert (second.digest(), second.head, second.round) == (whole.digest(), whole.head, whole.round)


def test_steps_far_below_a_bfloat16_move_the_weights_on_average() -> None:
    """Rounding to nearest would lose every one of these steps."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    worker = Worker(model, genesis_of(model))
    for round_ in range(1, 41):
        worker.apply(link(worker.head, Dense(round_, 2.0**-14)), {"weight": torch.ones(64, 64)})
    step = 2.0**-14  # against 2^-8 between 1 and the bfloat16 below
    assert 1 - float(model.weight.detach().float().mean()) == pytest.approx(40 * step, rel=0.1)


def test_asking_the_gradient_gives_zero_for_what_is_unused() -> None:
    worker = worker_of()
    weight = worker.parameters["0.weight"]
    update, loss = worker.gradient(lambda: (weight**2).sum())
    assert loss == pytest.approx(float((weight.detach() ** 2).sum()))
    assert torch.allclose(update["0.weight"], 2 * weight.detach())
    assert all(not gradient.any() for name, gradient in update.items() if name != "0.weight")


@pytest.mark.parametrize("name", [name for name, _ in model_of().named_parameters()])
def test_the_probe_sees_a_move_of_any_one_tensor(name: str) -> None:
    worker = worker_of()
    before = worker.probe()
    assert len(before) == 8
    with torch.no_grad():
        worker.parameters[name].add_(2**-10)
    assert worker.probe() != before


def test_the_probe_reads_large_tensors_in_places_that_change_from_round_to_round() -> None:
    model = nn.Linear(100, 100, bias=False)
    worker = Worker(model, genesis_of(model))
    probes = {worker.probe()}
    for round_ in range(1, 6):
        worker.apply(link(worker.head, Skipped(round_)))
        probes.add(worker.probe())
    assert len(probes) == 6


class Wrapper(nn.Module):
    """What DataParallel ('module') and torch.compile ('_orig_mod') do to names."""

    def __init__(self, attribute: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(attribute, model)


@pytest.mark.parametrize(
    "wrappers",
    [
        ["module"],
        ["_orig_mod"],
        ["_orig_mod", "module"],
        ["module", "_orig_mod"],
    ],
)
def test_a_wrapper_changes_neither_digest_nor_genesis_nor_moves(wrappers: list[str]) -> None:
    wrapped = model_of()
    for attribute in wrappers:
        wrapped = Wrapper(attribute, wrapped)
    plain = model_of()
    assert weights_digest(wrapped) == weights_digest(plain)
    assert genesis_of(wrapped) == genesis_of(plain)
    one, other = Worker(wrapped, genesis_of(plain)), Worker(plain, genesis_of(plain))
    assert moved(one, HISTORY).digest() == moved(other, HISTORY).digest()


def named(**parameters: Tensor) -> nn.Module:
    model = nn.Module()
    for name, value in parameters.items():
        model.register_parameter(name, nn.Parameter(value))
    return model


def test_the_digest_depends_on_names_values_shapes_and_types_but_not_on_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2)
    digest = weights_digest(named(a=a, b=b))
    assert weights_digest(named(b=b, a=a)) == digest
    flipped = a.clone()
    flipped.view(torch.int32)[3] ^= 1
    others = [
        named(a=flipped, b=b),
        named(a=a.reshape(2, 3), b=b),
        named(a=a, c=b),
        named(b=a, a=b),
        named(a=a.to(torch.bfloat16), b=b),
        named(a=a),
        named(a=-0.0 * a, b=b),
        named(a=0.0 * a, b=b),
    ]
    assert len({digest, *(weights_digest(other) for other in others)}) == 1 + len(others)
    halves = [weights_digest(named(a=torch.zeros(2, dtype=dtype))) for dtype in (torch.float16, torch.bfloat16)]
    assert halves[0] != halves[1]


def test_the_digest_reads_values_and_not_their_place_in_memory() -> None:
    rows = torch.arange(12.0).reshape(3, 4)
    assert weights_digest(named(a=rows.T.contiguous().T)) == weights_digest(named(a=rows))


def test_a_tied_tensor_counts_once_under_its_first_name() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    assert list(named_parameters(model)) == ["0.weight"]
