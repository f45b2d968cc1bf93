"""A record moves the weights by exactly what it says, and digest and probe tell whether replicas agree."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import prod, sqrt
from typing import Any

import pytest
import torch
from reference import normal_stream, sign_stream
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.core import directions
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.directions import tensor_id
from zofed.core.genesis import make_genesis
from zofed.core.journal import Entry, Genesis, genesis_chain, link
from zofed.core.kinds import Kind
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Record, Seeded, Skipped, Spread
from zofed.core.replica import Replica

RUN_SEED = 11
KINDS: tuple[Kind, ...] = ("rank1", "rank4", "rademacher", "gaussian")
EXACT: tuple[Kind, ...] = ("rank1", "rank4", "rademacher")  # sums of few entries times powers of two


def model_of(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two matrices and three vectors, entries multiples of 1/16."""
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            pattern = torch.arange(parameter.numel()) % 9 - 4
            parameter.copy_(pattern.reshape(parameter.shape) / 16)
    return model.to(dtype)


def genesis_of(model: nn.Module, trainable: Iterable[str] | None = None, **changes: Any) -> Genesis:
    names = named_parameters(model) if trainable is None else trainable
    arguments = {"seed": RUN_SEED, "kind": "rank1", "optimizer": Optimizer("sgd")} | changes
    return make_genesis(model, {"name": "test"}, names, **arguments)


def replica_of(dtype: torch.dtype = torch.float32, **changes: Any) -> Replica:
    model = model_of(dtype)
    return Replica(model, genesis_of(model, **changes))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def moved(replica: Replica, history: Sequence[Record]) -> Replica:
    for record in history:
        replica.apply(link(replica.head, record), {name: p.detach() / 2 for name, p in replica.parameters.items()})
    return replica


def seeded(round_: int, coefficients: Sequence[int] = (5, -3, 1, 7), rate: float = 0.125, exponent: int = -6) -> Seeded:
    return Seeded(round_, rate, (2, 9), len(coefficients) // 2, tuple(coefficients), exponent, len(coefficients))


HISTORY: tuple[Record, ...] = (seeded(1), Skipped(2), Dense(3, 0.1), seeded(4, (-100, 3, 77, 0, 1, 2)))


def entries_of(kind: Kind, seed: int, name: str, shape: Sequence[int]) -> list[Fraction]:
    """The direction's entries from the plain twin of the generator, exact for a rank that is a square."""
    tensor, size = tensor_id(name), prod(shape)
    if kind == "gaussian":
        return [Fraction(value, 2**16) for value in normal_stream(seed, tensor, size)]
    if kind == "rademacher":
        return [Fraction(value) for value in sign_stream(seed, tensor, 0, size)]
    count = int(kind.removeprefix("rank"))
    total = [0] * size
    for term in range(count):
        a = sign_stream(seed, tensor, 2 * term, shape[0] if len(shape) > 1 else size)
        b = sign_stream(seed, tensor, 2 * term + 1, prod(shape[1:])) if len(shape) > 1 else [1]
        total = [kept + new for kept, new in zip(total, (left * right for left in a for right in b), strict=True)]
    return [Fraction(value) / Fraction(sqrt(count)) for value in total]


def exact_gradient(kind: Kind, record: Seeded, name: str, shape: Sequence[int]) -> list[Fraction]:
    seeds = [
        directions.derive_seed("zofed-direction", RUN_SEED, record.round, client, local, query)
        for client in record.clients
        for local in range(record.local_steps)
        for query in range(record.queries)
    ]
    columns = zip(*(entries_of(kind, seed, name, shape) for seed in seeds), strict=True)
    scale = Fraction(2) ** record.exponent / Fraction(record.divisor)
    return [scale * sum(c * z for c, z in zip(record.coefficients, column, strict=True)) for column in columns]


# A power of two for each of some tensors: what multiplies its direction and its step.
SIZES = {"0.weight": -3, "1.bias": 2, "2.weight": 1}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("sizes", [{}, SIZES], ids=["equal", "sizes"])
@pytest.mark.parametrize(
    ("record", "tolerance"),
    [
        (seeded(1), 0),  # every number is a small multiple of a power of two: nothing may round
        (Seeded(3, 0.5, (4,), 2, (1, -2, 3, 9), -4, 4, local_steps=2), 0),
        (Seeded(3, 0.5, (4,), 4, (1, -2, 3, 9), -4, 0.25), 0),
        (Seeded(2, 0.3, (0, 1, 7), 1, (2**18 - 1, -(2**18) + 1, 123456), -19, 3), 2**-19),
    ],
)
def test_a_seeded_record_moves_the_weights_by_its_exact_sum(
    kind: Kind, sizes: dict[str, int], record: Seeded, tolerance: float
) -> None:
    replica = replica_of(kind=kind, size_exponents=sizes)
    before = {name: parameter.detach().clone() for name, parameter in replica.parameters.items()}
    norm = replica.apply(link(replica.head, record))
    squares = Fraction(0)
    for name, parameter in replica.parameters.items():
        gradient = exact_gradient(kind, record, name, parameter.shape)
        squares += sum(value**2 for value in gradient)
        start = before[name].flatten().tolist()
        rate = Fraction(record.rate) * Fraction(2) ** sizes.get(name, 0)
        expected = [Fraction(w) - rate * g for w, g in zip(start, gradient, strict=True)]
        errors = [abs(Fraction(w) - e) for w, e in zip(parameter.flatten().tolist(), expected, strict=True)]
        assert max(errors) <= tolerance
        assert not torch.equal(parameter, before[name])
    assert norm == pytest.approx(sqrt(squares), rel=1e-5)
    assert (replica.round, replica.head) == (record.round, link(genesis_chain(replica.genesis), record).chain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("divisor", [3.0, 0.7071])
def test_an_estimate_is_the_exact_sum_rounded_once_times_one_float32(kind: Kind, divisor: float) -> None:
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    replica = Replica(model, genesis_of(model, kind=kind))
    coefficients = (2**24, -(2**24) + 1, 12345678, -9876543, 3, 5555555)
    record = Seeded(2, 1.0, (0, 1, 7), 2, coefficients, -25, divisor)
    replica.apply(link(replica.head, record))  # from zero with rate 1: the weights are now minus the estimate
    for name, parameter in replica.parameters.items():
        exact = exact_gradient(kind, record, name, parameter.shape)
        for weight, value in zip(parameter.flatten().tolist(), exact, strict=True):
            assert abs(Fraction(-weight) - value) <= abs(value) * 3 * Fraction(2**-24) * Fraction(1.000001)


def test_a_size_multiplies_what_is_asked_and_what_is_moved() -> None:
    """Of a loss linear in the weights the slopes are known, and a step goes down by the size squared."""
    pull = torch.arange(12.0).reshape(3, 4) / 8 - 0.5
    losses = {}
    for exponent in (0, 2):
        replica = replica_of(trainable=["0.weight"], size_exponents={"0.weight": exponent, "0.bias": 5})
        assert replica.sizes == {"0.bias": 32.0} | ({"0.weight": 4.0} if exponent else {})
        weight = replica.parameters["0.weight"]
        seeds = directions.direction_seeds(RUN_SEED, 1, 0, 3)
        for points in ("two-point", "one-sided"):
            found = replica.measure.slopes(
                lambda weight=weight: (weight * pull).sum(), seeds, 2.0**-8, 4, points
            ).slopes
            exact = [float((directions.direction("rank1", s, "0.weight", (3, 4)) * pull).sum()) for s in seeds]
            middle = sum(exact) / 3 if points == "one-sided" else 0.0
            assert found == pytest.approx([2**exponent * (slope - middle) for slope in exact], rel=1e-3, abs=1e-3)
        before = float((weight.detach() * pull).sum())
        scaled = tuple(round(2**exponent * slope * 2**8) for slope in exact)
        replica.apply(link(replica.head, Seeded(1, 2.0**-6, (0,), 3, scaled, -8, 3.0)))
        losses[exponent] = before - float((weight.detach() * pull).sum())
    assert losses[0] > 0
    assert losses[2] == pytest.approx(16 * losses[0], rel=1e-3)


def test_only_what_trains_moves() -> None:
    model = model_of()
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moved(Replica(model, genesis_of(model, ["0.weight", "1.bias"])), HISTORY)
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, frozen[name])]
    assert still == ["0.bias", "1.weight", "2.weight"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == ["0.weight", "1.bias"]


def test_a_parameter_moves_alike_whatever_else_trains() -> None:
    alone, together = model_of(), model_of()
    moved(Replica(alone, genesis_of(alone, ["2.weight"])), HISTORY)
    moved(Replica(together, genesis_of(together)), HISTORY)
    assert torch.equal(alone.get_parameter("2.weight"), together.get_parameter("2.weight"))


def test_a_skipped_round_moves_the_head_alone() -> None:
    replica = moved(replica_of(optimizer=Optimizer("adamw")), [seeded(1)])
    digest, state = replica.digest(), replica.state_dict()
    entry = link(replica.head, Skipped(2))
    assert replica.apply(entry) == 0.0
    assert (replica.digest(), replica.round, replica.head) == (digest, 2, entry.chain)
    assert same(replica.state_dict(), state)


def test_a_dense_record_without_its_update_is_refused_and_moves_nothing() -> None:
    replica = replica_of()
    digest, head = replica.digest(), replica.head
    with pytest.raises(UserError, match=r"round 6 .*not kept.*checkpoint"):
        replica.apply(link(replica.head, Dense(6, 0.1)))
    assert (replica.digest(), replica.head, replica.round) == (digest, head, 0)


def test_a_dense_record_is_a_gradient_step() -> None:
    replica = replica_of()
    before = {name: parameter.detach().clone() for name, parameter in replica.parameters.items()}
    update = {name: torch.ones_like(parameter) for name, parameter in replica.parameters.items()}
    norm = replica.apply(link(replica.head, Dense(1, 0.5)), update)
    assert all(torch.equal(parameter, before[name] - 0.5) for name, parameter in replica.parameters.items())
    assert norm == pytest.approx(sqrt(sum(parameter.numel() for parameter in before.values())))


def test_another_base_is_refused() -> None:
    genesis = genesis_of(model_of())
    other = model_of()
    with torch.no_grad():
        other.get_parameter("2.weight")[0, 0] += 2**-20
    with pytest.raises(UserError, match=r"base weights have SHA-256 .*starts from"):
        Replica(other, genesis)
    with pytest.raises(UserError, match="base weights"):
        Replica(model_of(torch.bfloat16), genesis)


def test_everything_a_replay_depends_on_is_in_the_genesis() -> None:
    model = model_of()
    changed = model_of()
    with torch.no_grad():
        changed.get_parameter("0.bias")[0] += 1
    genesis = [
        genesis_of(model),
        genesis_of(changed),
        genesis_of(model, ["0.weight"]),
        genesis_of(model, seed=12),
        genesis_of(model, kind="rademacher"),
        genesis_of(model, optimizer=Optimizer("adamw")),
        genesis_of(model, optimizer=Optimizer("sgd", momentum=0.5)),
        genesis_of(model, optimizer=Optimizer("sgd", weight_decay=0.5)),
        genesis_of(model, optimizer=Optimizer("mudamw")),
        genesis_of(model, optimizer=Optimizer("mudamw", cautious=True)),
        genesis_of(model, optimizer=Optimizer("mudamw", orthogonal=frozenset({"0.weight"}))),
        genesis_of(model, size_exponents={"0.weight": 1}),
        genesis_of(model, size_exponents={"0.weight": -1}),
        genesis_of(model, size_exponents={"0.bias": 1}),
        make_genesis(model, {"name": "other"}, ["0.weight"], seed=RUN_SEED, kind="rank1", optimizer=Optimizer("sgd")),
    ]
    assert len({genesis_chain(one) for one in genesis}) == len(genesis)
    nothing: list[dict[str, int]] = [{}, {"0.weight": 0}]
    for sizes in nothing:
        assert genesis_chain(genesis_of(model_of(), size_exponents=sizes)) == genesis_chain(genesis[0])
    names = ("0.weight", "2.weight", "1.bias")
    rules = [Optimizer("mudamw", orthogonal=frozenset(order)) for order in (names, names[::-1])]
    orthogonal = [genesis_of(model, optimizer=rule) for rule in rules]
    assert orthogonal[0]["optimizer"]["orthogonal"] == sorted(names)
    assert genesis_chain(orthogonal[0]) == genesis_chain(orthogonal[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_cannot_be_moved_exactly_is_refused_by_name(dtype: torch.dtype) -> None:
    model = model_of()
    model[1].to(dtype)
    told = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=rf"'1\.weight' is {told}, but only float32 and bfloat16 .*set dtype .*scope"):
        genesis_of(model)
    with pytest.raises(UserError, match=rf"'1\.bias' is {told}"):
        genesis_of(model, iter(["0.weight", "1.bias"]))
    genesis = genesis_of(model, iter(["0.weight", "2.weight"]))  # what does not train may be of any type
    assert [name for name, _, _ in genesis["trainable"]] == ["0.weight", "2.weight"]
    moved(Replica(model, genesis), HISTORY)
    model[2].to(torch.bfloat16)
    assert genesis_of(model, ["2.weight"])["trainable"] == [["2.weight", "bfloat16", [2, 3]]]


OPTIMIZERS = {
    "sgd": Optimizer("sgd"),
    "momentum": Optimizer("sgd", 0.5, 0.125),
    "adamw": Optimizer("adamw", weight_decay=0.125),
    "mudamw": Optimizer("mudamw", weight_decay=0.125, orthogonal=frozenset({"0.weight", "2.weight"})),
    "cautious": Optimizer("mudamw", cautious=True, orthogonal=frozenset({"0.weight"})),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_histories_end_in_equal_bits(kind: Kind, dtype: torch.dtype, optimizer: Optimizer) -> None:
    one, other = (replica_of(dtype, kind=kind, optimizer=optimizer) for _ in range(2))
    start = one.digest(), one.probe()
    for record in HISTORY:
        moved(one, [record])
        moved(other, [record])
        assert (one.digest(), one.probe(), one.head) == (other.digest(), other.probe(), other.head)
    assert one.digest() != start[0]
    assert one.probe() != start[1]
    assert all(parameter.dtype == dtype for parameter in one.parameters.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_worker_goes_on_from_a_checkpoint_bit_for_bit(dtype: torch.dtype, optimizer: Optimizer) -> None:
    whole = moved(replica_of(dtype, optimizer=optimizer), HISTORY)
    first = moved(replica_of(dtype, optimizer=optimizer), HISTORY[:3])
    weights = {name: parameter.detach().clone() for name, parameter in first.parameters.items()}
    second = replica_of(dtype, optimizer=optimizer)
    saved = {key: value.clone() for key, value in first.state_dict().items()}
    second.load(weights, saved, round_=first.round, head=first.head)
    assert second.spread == first.spread != Spread()
    moved(second, HISTORY[3:])
    assert (second.digest(), second.head, second.round) == (whole.digest(), whole.head, whole.round)
    assert second.spread == whole.spread
    assert same(second.state_dict(), whole.state_dict())
    assert "spread" in saved, "loading must leave what it was given as it was"


# --- replay ---

ROUNDS = 12


def long_history() -> list[Record]:
    """Seeded and skipped records of unlike sizes, clients and divisors."""
    history: list[Record] = []
    for round_ in range(1, ROUNDS + 1):
        if round_ in (1, 5, 6, ROUNDS):
            history.append(Skipped(round_))
            continue
        clients, queries = ((3,), (0, 7), (1, 2, 9))[round_ % 3], 1 + round_ % 4
        count = len(clients) * queries
        coefficients = tuple((7919 * round_ * (index + 1)) % 2**20 - 2**19 for index in range(count))
        history.append(Seeded(round_, 0.01 * round_, clients, queries, coefficients, -21, 0.7 * count))
    return history


def chained(head: bytes, history: Sequence[Record]) -> list[Entry]:
    entries: list[Entry] = []
    for record in history:
        entries.append(link(entries[-1].chain if entries else head, record))
    return entries


def odd_model(dtype: torch.dtype) -> nn.Module:
    """Tensors of zero to three dimensions, one of them with its columns apart in memory."""
    values = {
        "scalar": torch.tensor(0.5),
        "vector": torch.arange(11.0) / 8,
        "matrix": torch.arange(35.0).reshape(7, 5) / 32 - 0.5,
        "cube": torch.arange(30.0).reshape(5, 2, 3) / 16 - 1,
        "turned": (torch.arange(24.0).reshape(4, 6) / 16).T,
    }
    model = nn.Module()
    for name, value in values.items():
        turned = value.to(dtype)
        model.register_parameter(name, nn.Parameter(turned.T.clone().T if name == "turned" else turned))
    return model


def state_of(replica: Replica) -> tuple[Any, ...]:
    return replica.digest(), replica.round, replica.head, replica.spread, replica.probe()


ODD_OPTIMIZERS = OPTIMIZERS | {
    "mudamw": Optimizer("mudamw", weight_decay=0.125, orthogonal=frozenset({"matrix", "turned"})),
    "cautious": Optimizer("mudamw", weight_decay=0.125, cautious=True, orthogonal=frozenset({"turned"})),
    "mudamw in blocks": Optimizer("mudamw", weight_decay=0.125),
}
ODD_SIZES = {"scalar": 1, "cube": -2, "turned": 3}


@pytest.mark.first(6)
@pytest.mark.parametrize("optimizer", ODD_OPTIMIZERS.values(), ids=ODD_OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_ends_where_applying_one_by_one_ends(
    kind: Kind, dtype: torch.dtype, optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = odd_model(dtype)
    genesis = genesis_of(model, kind=kind, optimizer=optimizer, size_exponents=ODD_SIZES)
    single = Replica(model, genesis)
    assert not single.parameters["turned"].is_contiguous()
    entries = chained(single.head, long_history())
    halfway = None
    for entry in entries:
        single.apply(entry)
        if entry.record.round == 4:
            halfway = state_of(single)
    start = weights_digest(odd_model(dtype))
    assert single.digest() != start
    for block, at_once in ((2**17, 1024), (1, 1), (7, 5), (11, 3), (16, 1024), (2**17, 4)):
        monkeypatch.setattr("zofed.core.replica.BLOCK", block)
        monkeypatch.setattr("zofed.core.replica.DIRECTIONS_AT_ONCE", at_once)
        replica = Replica(odd_model(dtype), genesis)
        replica.replay(iter(entries[:4]))
        assert state_of(replica) == halfway
        replica.replay(iter(entries[4:]))
        assert state_of(replica) == state_of(single)
        assert same(replica.state_dict(), single.state_dict())
        assert not replica.parameters["turned"].is_contiguous()


def test_a_replay_moves_a_group_of_entries_through_each_block_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped by directions, in order, none left out: 1 for a skipped round, a single larger record by itself."""
    monkeypatch.setattr("zofed.core.replica.DIRECTIONS_AT_ONCE", 6)
    groups: list[list[int]] = []
    move = Replica._apply_entries

    def noting(self: Replica, entries: Sequence[Entry], update: Any = None) -> list[float]:
        groups.append([len(e.record.coefficients) if isinstance(e.record, Seeded) else 1 for e in entries])
        return move(self, entries, update)

    monkeypatch.setattr(Replica, "_apply_entries", noting)
    replica = replica_of()
    replica.replay([])
    assert groups == []
    history = [seeded(1), Skipped(2), Skipped(3), seeded(4, (1, 2)), seeded(5, (1,) * 10), seeded(6, (5, 6))]
    replica.replay(chained(replica.head, history))
    assert groups == [[4, 1, 1], [2], [10], [2]]


def test_a_replay_refuses_a_dense_record_and_another_history() -> None:
    """It stops whole: before a history that is not its own, right before a round whose gradient was not kept."""
    replica = replica_of()
    before = state_of(replica)
    with pytest.raises(UserError, match=r"round 2 does not follow"):
        replica.replay([*chained(replica.head, [seeded(1)]), link(bytes(16), Skipped(2))])
    assert state_of(replica) == before
    entries = chained(replica.head, [seeded(1), Dense(2, 0.1), seeded(3)])
    with pytest.raises(UserError, match=r"round 2 .*not kept.*checkpoint"):
        replica.replay(entries)
    assert state_of(replica) == state_of(moved(replica_of(), [seeded(1)]))


@pytest.mark.parametrize("kind", KINDS)
def test_odd_shapes_move_by_their_exact_sum(kind: Kind) -> None:
    model = odd_model(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    replica = Replica(model, genesis_of(model, kind=kind))
    record = seeded(3, (9, -3, 4, 8), rate=0.5, exponent=-3)
    replica.apply(link(replica.head, record))
    for name, parameter in replica.parameters.items():
        gradient = exact_gradient(kind, record, name, parameter.shape)
        start = before[name].flatten().tolist()  # row by row, however the tensor lies in memory
        expected = [Fraction(w) - g / 2 for w, g in zip(start, gradient, strict=True)]
        found = [Fraction(value) for value in parameter.flatten().tolist()]
        limit = 0 if kind in EXACT else Fraction(2) ** -22
        assert max(abs(f - e) for f, e in zip(found, expected, strict=True)) <= limit, name


def test_a_dense_step_moves_odd_shapes_too() -> None:
    model = odd_model(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    replica = Replica(model, genesis_of(model, size_exponents=ODD_SIZES))
    update = {name: parameter.detach().clone() / 4 for name, parameter in replica.parameters.items()}
    norm = replica.apply(link(replica.head, Dense(1, 0.5)), update)
    for name, parameter in replica.parameters.items():
        assert torch.equal(parameter, before[name] - 0.5 * update[name])  # sizes are for directions
    assert norm == pytest.approx(sqrt(sum(float((value**2).sum()) for value in update.values())), rel=1e-6)


def test_the_spread_follows_the_seeded_records_alone() -> None:
    replica = replica_of()
    expected = Spread()
    for record in (seeded(1), Skipped(2), Dense(3, 0.1), seeded(4, (-100, 3, 77, 0, 1, 2))):
        moved(replica, [record])
        if isinstance(record, Seeded):
            expected = expected.after(record.coefficients, record.exponent)
        assert replica.spread == expected
    assert expected.value != 1.0


def test_steps_far_below_a_bfloat16_move_the_weights_on_average() -> None:
    """Rounding to nearest would lose every one of these steps."""
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    replica = Replica(model, genesis_of(model))
    for round_ in range(1, 41):
        replica.apply(link(replica.head, Dense(round_, 2.0**-14)), {"weight": torch.ones(64, 64)})
    step = 2.0**-14  # against 2^-8 between 1 and the bfloat16 below
    assert 1 - float(model.weight.detach().float().mean()) == pytest.approx(40 * step, rel=0.1)


def test_asking_the_gradient_gives_zero_for_what_is_unused() -> None:
    replica = replica_of()
    weight = replica.parameters["0.weight"]
    update, loss = replica.measure.gradient(lambda: (weight**2).sum())
    assert loss == pytest.approx(float((weight.detach() ** 2).sum()))
    assert torch.allclose(update["0.weight"], 2 * weight.detach())
    assert all(not gradient.any() for name, gradient in update.items() if name != "0.weight")


@pytest.mark.parametrize("name", [name for name, _ in model_of().named_parameters()])
def test_the_probe_sees_a_move_of_any_one_tensor(name: str) -> None:
    replica = replica_of()
    before = replica.probe()
    assert len(before) == 8
    with torch.no_grad():
        replica.parameters[name].add_(2**-10)
    assert replica.probe() != before


def test_the_probe_reads_large_tensors_in_places_that_change_from_round_to_round() -> None:
    model = nn.Linear(100, 100, bias=False)
    replica = Replica(model, genesis_of(model))
    probes = {replica.probe()}
    for round_ in range(1, 6):
        replica.apply(link(replica.head, Skipped(round_)))
        probes.add(replica.probe())
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
    one, other = Replica(wrapped, genesis_of(plain)), Replica(plain, genesis_of(plain))
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


def test_a_record_of_more_directions_than_sum_up_exactly_moves_nothing() -> None:
    replica = replica_of(kind="gaussian")
    entry = link(replica.head, seeded(1, [2**24, -(2**24)] * 1000))
    before = replica.digest(), replica.head
    for move in (replica.apply, lambda entry: replica.replay([entry])):
        with pytest.raises(UserError, match=r"^the record of round 1 adds 2000 gaussian directions .* above 2\^53"):
            move(entry)
        assert (replica.digest(), replica.head) == before
