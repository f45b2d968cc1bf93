"""A round's plain functions: what is refused and why, what a merge adds up to, who catches up, what travels."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any, get_args

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zofed import config, federation, metrics, records
from zofed.estimators import Points
from zofed.federation import Answer, Measured, Plan, Reason, catch_up, check, merge, plan_for, position, record_of
from zofed.journal import Entry, genesis_chain, link
from zofed.messages import KEY, Final, Greeting, Introduction, Malformed, pack, size, unpack
from zofed.optimizers import Optimizer
from zofed.records import Record, Seeded, Skipped, Spread
from zofed.worker import Worker, make_genesis

PLAN = Plan(
    genesis=b"g" * 16,
    round=4,
    attempt=2,
    after=b"a" * 16,
    head=b"h" * 16,
    entries=b"\x00raw\xff",
    probe=b"p" * 8,
    client=3,
    queries=2,
    epsilon=3e-4,
    batch_size=4,
    points="two-point",
    threads=1,
    copies_per_pass=8,
    forward_dtype="weights",
)
GOOD = Answer(
    genesis=b"g" * 16,
    round=4,
    attempt=2,
    client=3,
    head=b"h" * 16,
    probe=b"p" * 8,
    coefficients=(2**18 - 1, -(2**18) + 1),
    exponent=-31,
    loss=5.5,
    examples=17,
    seconds=0.25,
)

# --- check ---

BROKEN: list[tuple[dict[str, Any], Reason]] = [
    ({"genesis": b"x" * 16}, "wrong_genesis"),
    ({"genesis": b""}, "wrong_genesis"),
    ({"round": 3}, "wrong_round"),
    ({"round": 5}, "wrong_round"),
    ({"attempt": 1}, "stale_attempt"),
    ({"attempt": 3}, "stale_attempt"),
    ({"client": 2}, "wrong_client"),
    ({"client": -3}, "wrong_client"),
    ({"head": b"a" * 16}, "behind"),
    ({"head": b"a" * 16, "probe": b"", "coefficients": (), "loss": math.nan}, "behind"),
    ({"probe": b"q" * 8}, "desync"),
    ({"probe": b""}, "desync"),
    ({"coefficients": (1,)}, "wrong_length"),
    ({"coefficients": (1, 2, 3)}, "wrong_length"),
    ({"coefficients": ()}, "wrong_length"),
    ({"coefficients": (), "loss": math.nan}, "not_finite"),
    ({"loss": math.nan}, "not_finite"),
    ({"loss": math.inf}, "not_finite"),
    ({"loss": -math.inf}, "not_finite"),
    ({"loss": 1.1e6}, "out_of_range"),
    ({"loss": -1.1e6}, "out_of_range"),
    ({"coefficients": (2**18, 0)}, "out_of_range"),
    ({"coefficients": (0, -(2**18))}, "out_of_range"),
    ({"coefficients": (0, -(2**31))}, "out_of_range"),
    ({"exponent": 101}, "out_of_range"),
    ({"exponent": -1001}, "out_of_range"),
    ({"examples": 0}, "out_of_range"),
    ({"examples": -5}, "out_of_range"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=str)
def test_a_broken_answer_is_refused_with_its_reason(change: dict[str, Any], reason: Reason) -> None:
    assert check(replace(GOOD, **change), PLAN) == reason


def test_the_table_covers_every_reason_that_check_can_give() -> None:
    told_by_the_loop = {"error", "late", "malformed", "duplicate"}
    assert {reason for _, reason in BROKEN} == set(get_args(Reason)) - told_by_the_loop


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"loss": 0.0},
        {"coefficients": (0, 0), "exponent": 0},
        {"exponent": -450},
        {"exponent": -420},
        {"examples": 10**12},
        {"seconds": math.nan},
    ],
    ids=str,
)
def test_a_good_answer_is_taken(change: dict[str, Any]) -> None:
    assert check(replace(GOOD, **change), PLAN) is None


def test_an_answer_to_an_older_round_is_told_by_its_round_and_not_by_its_weights() -> None:
    assert check(replace(GOOD, round=3, attempt=0, head=b"o" * 16, probe=b"o" * 8), PLAN) == "wrong_round"


# --- merge ---


def measured(coefficients: Sequence[int], exponent: int) -> Measured:
    return Measured(tuple(coefficients), exponent, 1.0, 2 * len(coefficients))


def estimates(record: Seeded) -> dict[int, list[Fraction]]:
    """Each client's slopes as the record holds them, before the division."""
    scale = Fraction(2) ** record.exponent
    values = [value * scale for value in record.coefficients]
    return {c: values[i * record.queries : (i + 1) * record.queries] for i, c in enumerate(record.clients)}


COEFFICIENT = st.integers(-(2**18) + 1, 2**18 - 1)
ANSWERS = st.dictionaries(
    st.integers(0, 2**32 - 1),
    st.builds(measured, st.lists(COEFFICIENT, min_size=3, max_size=3), st.integers(-45, -20)),
    min_size=1,
    max_size=6,
)


@given(ANSWERS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None, database=None)
def test_a_merge_does_not_depend_on_the_order_of_arrival(answers: dict[int, Measured], chance: random.Random) -> None:
    order = list(answers)
    chance.shuffle(order)
    assert merge(7, 0.1, 3, {client: answers[client] for client in order}) == merge(7, 0.1, 3, answers)


@given(ANSWERS)
@settings(max_examples=200, deadline=None, database=None)
def test_a_merge_is_the_mean_of_all_slopes_to_half_a_unit(answers: dict[int, Measured]) -> None:
    record = merge(7, 0.1, 3, answers)
    assert (record.round, record.rate, record.queries, record.local_steps) == (7, 0.1, 3, 1)
    assert record.clients == tuple(sorted(answers))
    assert record.divisor == 3 * len(answers)
    assert all(abs(value) < 2**18 for value in record.coefficients)
    again = records.decode(records.encode(record))
    assert isinstance(again, Seeded)
    assert again.seeds(1) == record.seeds(1)
    half = Fraction(2) ** record.exponent / 2
    for client, slopes in estimates(record).items():
        exact = [Fraction(2) ** answers[client].exponent * value for value in answers[client].coefficients]
        assert all(abs(slope - value) <= half for slope, value in zip(slopes, exact, strict=True))
        if answers[client].exponent == record.exponent:
            assert slopes == exact


def test_a_merge_of_equal_exponents_is_exact() -> None:
    record = merge(1, 0.1, 2, {5: measured((1, 2), -20), 0: measured((-3, 2**18 - 1), -20)})
    assert record == replace(record, clients=(0, 5), coefficients=(-3, 2**18 - 1, 1, 2), exponent=-20, divisor=4)


def test_an_answer_of_zeros_rounds_nobody_to_zero() -> None:
    record = merge(1, 0.1, 2, {0: measured((0, 0), records.LARGEST_EXPONENT), 1: measured((-3, 5), -20)})
    assert (record.coefficients, record.exponent) == ((0, 0, -3, 5), -20)


def test_a_merge_of_one_is_the_record_of_a_central_step() -> None:
    coefficients, exponent = records.to_integers([0.5, -3.25, 1e-9])
    record = merge(9, 0.25, 3, {0: measured(coefficients, exponent)})
    assert record.coefficients == coefficients
    assert (record.round, record.rate, record.clients, record.exponent, record.divisor) == (9, 0.25, (0,), exponent, 3)
    slopes = [float(slope) for slope in estimates(record)[0]]
    assert slopes == pytest.approx([0.5, -3.25, 1e-9], abs=2**-29)


def test_a_client_whose_slopes_are_all_zero_takes_nothing_from_the_others() -> None:
    others = records.to_integers([0.5, -0.75])
    record = merge(1, 0.1, 2, {0: measured(*others), 1: measured(*records.to_integers([0.0, 0.0]))})
    assert estimates(record) == {0: [Fraction(1, 2), Fraction(-3, 4)], 1: [0, 0]}


SPREADS = st.none() | st.lists(
    st.tuples(st.lists(COEFFICIENT, min_size=1, max_size=4), st.integers(-45, -20)), max_size=5
)


@given(ANSWERS, st.sampled_from(get_args(Points)), SPREADS)
@settings(max_examples=200, deadline=None, database=None)
def test_a_merge_divides_by_what_the_estimator_and_the_spread_ask(
    answers: dict[int, Measured], points: Points, before: list[tuple[list[int], int]] | None
) -> None:
    spread = None
    if before is not None:
        spread = Spread()
        for coefficients, exponent in before:
            spread = spread.after(coefficients, exponent)
    record = merge(7, 0.1, 3, answers, points, spread)
    plain = merge(7, 0.1, 3, answers)
    assert replace(record, divisor=plain.divisor) == plain
    count = len(answers) * (3 if points == "two-point" else 2)
    if before is None:
        assert record.divisor == count
        return
    steps = [*before, (record.coefficients, record.exponent)]  # the present slopes belong to the spread
    squares = [sum((c * Fraction(2) ** e) ** 2 for c in cs) / Fraction(len(cs)) for cs, e in steps]
    ages = [Fraction(9, 10) ** age for age in reversed(range(len(steps)))]
    mean = sum(age * square for age, square in zip(ages, squares, strict=True)) / sum(ages)
    assert record.divisor == pytest.approx(count * (math.sqrt(mean) if mean else 1.0), rel=1e-12)


def test_one_query_of_one_point_is_divided_by_one() -> None:
    assert merge(1, 0.1, 1, {0: measured((5,), -20), 1: measured((5,), -20)}, "one-sided").divisor == 2.0


def test_a_normalised_step_does_not_depend_on_the_scale_of_the_loss() -> None:
    slopes = [0.5, -3.25, 1.0, 0.125]
    estimates_ = []
    for scale in (1.0, 2.0**7, 2.0**-11):
        answers = {0: measured(*records.to_integers([scale * slope for slope in slopes]))}
        record = merge(1, 0.1, 4, answers, "two-point", Spread())
        estimates_.append([value * 2.0**record.exponent / record.divisor for value in record.coefficients])
    assert estimates_[0] == estimates_[1] == estimates_[2]
    size = math.sqrt(sum(slope**2 for slope in slopes) / 4)
    assert estimates_[0] == pytest.approx([slope / size / 4 for slope in slopes])


@pytest.mark.parametrize("points", get_args(Points))
@pytest.mark.parametrize("normalise", [False, True])
def test_the_record_of_a_round_follows_the_settings_and_the_worker(points: Points, normalise: bool) -> None:
    chosen = config.resolve(
        {"estimator": points, "normalise": normalise, "queries": 3, "learning-rate": 0.5, "quorum": 1}
        | {"schedule": "cosine"}
    )
    worker = standing_at(3)
    answers = {4: measured((9, -8, 7), -12), 1: measured((1, 2**17, 3), -17)}
    record = record_of(chosen, worker, answers, total=8)
    assert (record.round, record.rate, record.queries, record.clients) == (4, 0.25, 3, (1, 4))
    assert record == merge(4, 0.25, 3, answers, points, worker.spread if normalise else None)
    degrees = 2 * (3 if points == "two-point" else 2)
    expected = degrees * worker.spread.after(record.coefficients, record.exponent).value if normalise else degrees
    assert record.divisor == expected
    assert worker.spread != Spread()
    assert worker.spread == standing_at(3).spread, "a record is made before it is applied, and changes nothing"


# --- plan and catch up ---

HISTORY: tuple[Record, ...] = (
    Seeded(1, 0.125, (0, 1), 1, (5, -3), -6, 2),
    Skipped(2),
    Seeded(3, 0.125, (1,), 2, (9, 8), -6, 2),
    Seeded(4, 0.5, (0,), 2, (-1, 2**17), -18, 2),
)


def worker_of(seed: int = 1) -> Worker:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    genesis = make_genesis(
        model, {"name": "test"}, ["weight", "bias"], seed=seed, kind="rank1", optimizer=Optimizer("sgd", 0.5)
    )
    return Worker(model, genesis)


def history(worker: Worker, contents: Sequence[Record] = HISTORY) -> list[Entry]:
    chain, entries = worker.head, []
    for record in contents:
        entries.append(link(chain, record))
        chain = entries[-1].chain
    return entries


def raw(entries: Sequence[Entry]) -> bytes:
    return b"".join(entry.raw for entry in entries)


def standing_at(count: int) -> Worker:
    """A worker that has applied the first `count` entries."""
    worker = worker_of()
    for entry in history(worker)[:count]:
        worker.apply(entry)
    return worker


def state(worker: Worker) -> tuple[Any, ...]:
    moments = {key: value.tolist() for key, value in worker.optimizer.state_dict().items()}
    return worker.digest(), worker.head, worker.round, worker.probe(), worker.spread, moments


LENGTHS = range(len(HISTORY) + 1)


@pytest.mark.parametrize("start", LENGTHS)
@pytest.mark.parametrize("stands", LENGTHS)
def test_a_worker_anywhere_on_the_way_catches_up_to_the_same_state(start: int, stands: int) -> None:
    entries, goal = history(worker_of()), standing_at(len(HISTORY))
    genesis = genesis_chain(goal.genesis)
    after = entries[start - 1].chain if start else genesis
    worker = standing_at(stands)
    reached = catch_up(worker, after, goal.head, raw(entries[start:]))
    assert reached == (stands >= start)
    assert state(worker) == state(goal if reached else standing_at(stands))


@pytest.mark.parametrize("start", LENGTHS)
def test_a_plan_brings_every_client_it_was_made_for_to_the_round(start: int) -> None:
    entries, goal = history(worker_of()), standing_at(len(HISTORY))
    chosen = config.resolve({"queries": 5, "epsilon": 0.5, "batch-size": 3, "threads": 2, "copies-per-pass": 6})
    other = config.resolve({"estimator": "one-sided", "forward-dtype": "bfloat16"})
    after = entries[start - 1].chain if start else genesis_chain(goal.genesis)
    plan = plan_for(chosen, goal, after, entries[start:], client=2, attempt=9)
    assert (plan.round, plan.attempt, plan.client, plan.head, plan.probe) == (5, 9, 2, goal.head, goal.probe())
    assert (plan.queries, plan.epsilon, plan.batch_size, plan.threads, plan.copies_per_pass) == (5, 0.5, 3, 2, 6)
    assert (plan.points, plan.forward_dtype) == ("one-sided", "weights")
    second = plan_for(other, goal, after, entries[start:], client=2)
    assert (second.points, second.forward_dtype, second.attempt) == ("one-sided", "bfloat16", 0)
    assert len(plan.entries) == sum(len(entry.raw) for entry in entries[start:])
    worker = standing_at(start)
    assert catch_up(worker, plan.after, plan.head, plan.entries)
    assert (worker.probe(), worker.head) == (plan.probe, plan.head)


def test_the_first_plan_starts_from_the_genesis() -> None:
    worker = worker_of()
    plan = plan_for(config.resolve({}), worker, worker.head, [], client=0)
    assert plan.genesis == plan.after == plan.head == genesis_chain(worker.genesis)
    assert (plan.round, plan.entries) == (1, b"")
    assert catch_up(worker, plan.after, plan.head, plan.entries)


def broken_ways() -> dict[str, Callable[[list[Entry]], bytes]]:
    flipped = bytes([1])
    return {
        "nothing": lambda entries: b"",
        "a gap": lambda entries: raw([entries[0], *entries[2:]]),
        "the first missing": lambda entries: raw(entries[1:]),
        "the last missing": lambda entries: raw(entries[:-1]),
        "the last cut": lambda entries: raw(entries)[:-1],
        "two swapped": lambda entries: raw([entries[1], entries[0], *entries[2:]]),
        "one twice": lambda entries: raw([entries[0], *entries]),
        "garbage before": lambda entries: flipped + raw(entries),
        "garbage": lambda entries: bytes(range(256)) * 3,
        "another history": lambda entries: raw(history(worker_of(seed=2))),
        "one record exchanged": lambda entries: (
            raw(entries[:2]) + link(entries[1].chain, Skipped(3)).raw + entries[3].raw
        ),
        "a bit flipped": lambda entries: raw(entries)[:-30] + bytes([raw(entries)[-30] ^ 4]) + raw(entries)[-29:],
    }


@pytest.mark.parametrize("way", broken_ways())
@pytest.mark.parametrize("stands", [0, 1, 2])
def test_a_broken_way_is_refused_and_moves_nothing(way: str, stands: int) -> None:
    worker, entries = standing_at(stands), history(worker_of())
    before = state(worker)
    sent = broken_ways()[way](entries)
    assert not catch_up(worker, genesis_chain(worker.genesis), entries[-1].chain, sent)
    assert state(worker) == before


def test_a_worker_of_another_history_is_not_moved() -> None:
    worker, entries = worker_of(), history(worker_of())
    worker.apply(link(worker.head, Skipped(8)))
    before = state(worker)
    assert not catch_up(worker, genesis_chain(worker.genesis), entries[-1].chain, raw(entries))
    assert state(worker) == before


def test_a_worker_ahead_of_the_plan_is_not_moved() -> None:
    worker, entries = standing_at(4), history(worker_of())
    before = state(worker)
    assert not catch_up(worker, genesis_chain(worker.genesis), entries[1].chain, raw(entries[:2]))
    assert state(worker) == before


def test_a_position_is_counted_in_entries() -> None:
    worker = worker_of()
    entries = history(worker)
    heads = [worker.head, *(entry.chain for entry in entries)]
    assert [position(entries, worker.head, head) for head in heads] == [0, 1, 2, 3, 4]
    assert position(entries, worker.head, b"x" * 16) is None


def test_measuring_is_a_function_of_seed_round_and_client_alone() -> None:
    ids = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 1)

        def forward(self, input_ids: torch.Tensor) -> Any:
            class Output:
                loss = self.map(input_ids).square().mean()

            return Output

    model = Model()
    genesis = make_genesis(model, {}, ["map.weight", "map.bias"], seed=1, kind="rank1", optimizer=Optimizer("sgd"))
    worker = Worker(model, genesis)
    plan = replace(PLAN, queries=4, epsilon=0.01, batch_size=5)
    first = federation.measure(worker, {"input_ids": ids}, plan)
    assert len(first.coefficients) == 4
    assert first.forward_passes == 8
    assert federation.measure(worker, {"input_ids": ids}, replace(plan, attempt=7)) == first
    for change in ({"round": 5}, {"client": 4}):
        other = federation.measure(worker, {"input_ids": ids}, replace(plan, **change))
        assert other.coefficients != first.coefficients
    with pytest.raises(ValueError, match="finite"):
        federation.measure(worker, {"input_ids": ids * math.inf}, plan)
    centred = federation.measure(worker, {"input_ids": ids}, replace(plan, points="one-sided", epsilon=1e-3))
    assert centred.forward_passes == 5
    slopes = [value * 2.0**centred.exponent for value in centred.coefficients]
    assert sum(slopes) == pytest.approx(0.0, abs=2**-15 * max(map(abs, slopes)))  # 18 bits each
    two_point = [value * 2.0**first.exponent for value in first.coefficients]
    middle = sum(two_point) / 4
    assert slopes == pytest.approx([slope - middle for slope in two_point], abs=0.05 * max(map(abs, two_point)))
    assert centred.loss != first.loss


def test_a_client_measures_in_the_forward_type_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def loss_of(model: nn.Module, batch: Any, forward_dtype: str, objective: str) -> torch.Tensor:
        asked.append(forward_dtype)
        return model(batch["input_ids"]).square().mean()

    monkeypatch.setattr(metrics, "loss_of", loss_of)
    for forward_dtype in ("weights", "bfloat16"):
        federation.measure(worker_of(), {"input_ids": torch.ones(6, 3)}, replace(PLAN, forward_dtype=forward_dtype))
        assert set(asked) == {forward_dtype}
        asked.clear()


# --- messages ---

CONTENTS: tuple[Any, ...] = (
    PLAN,
    GOOD,
    replace(GOOD, coefficients=(), loss=math.inf),
    replace(GOOD, coefficients=(-(2**31), 2**31 - 1, 0)),
    Greeting(b'{"a":1}'),
    Introduction(1, 4, 100, "", "/path 0.1.0"),
    Introduction(1, 4, 100, "no such dätä", "/päth"),
    Final(2, "ab" * 32),
)


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: type(content).__name__)
def test_a_message_comes_back_as_it_was(content: Any) -> None:
    packed = pack(content)
    again = unpack(type(content), packed)
    assert again == content
    assert [type(getattr(again, field.name)) for field in fields(content)] == [
        type(getattr(content, field.name)) for field in fields(content)
    ]


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: type(content).__name__)
def test_a_message_comes_back_from_flowers_wire(content: Any) -> None:
    packed = pack(content)
    parts = {object_id: part.deflate() for object_id, part in get_all_nested_objects(packed).items()}
    assert size(packed) == sum(len(part) for part in parts.values())
    received = inflate_object_from_contents(packed.object_id, parts)
    assert isinstance(received, RecordDict)
    assert unpack(type(content), received) == content


def test_a_nan_loss_travels() -> None:
    again = unpack(Answer, pack(replace(GOOD, coefficients=(), loss=math.nan)))
    assert math.isnan(again.loss)


def test_a_hundred_slopes_cost_four_bytes_each() -> None:
    short, long = (size(pack(replace(GOOD, coefficients=(2**18 - 1,) * count))) for count in (10, 110))
    assert 400 <= long - short <= 410


WRONG_VALUES: tuple[Any, ...] = (True, 7, 0.5, "text", b"bytes", [1, 2], [0.5], ["a"], [b"b"], [], [True])


def malformed(content: Any, chance: random.Random) -> tuple[str, RecordDict]:
    """One way to break the packed content, with its name."""
    packed = pack(content)
    record = packed[KEY]
    assert isinstance(record, ConfigRecord)
    name = chance.choice(list(record))
    texts = [field.name for field in fields(content) if isinstance(getattr(content, field.name), tuple)]
    way = chance.choice(
        ["missing", "extra", "type", "type", "bool", "odd", "key", "record", "kind", "empty", "renamed"]
    )
    if way == "missing":
        del record[name]
    elif way == "extra":
        record[chance.choice(["extra", name + " ", name.upper(), ""])] = record[name]
    elif way == "renamed":
        record[name + "s"] = record[name]
        del record[name]
    elif way == "type":
        record[name] = chance.choice([value for value in WRONG_VALUES if type(value) is not type(record[name])])
    elif way == "bool":
        name = chance.choice([key for key, value in record.items() if isinstance(value, int)] or [name])
        record[name] = chance.random() < 0.5
    elif way == "odd" and texts:
        value = record[texts[0]]
        assert isinstance(value, bytes)
        record[texts[0]] = value + bytes(chance.randint(1, 3))
    elif way == "key":
        packed = RecordDict({"zofed2": record})
    elif way == "record":
        packed["more"] = ConfigRecord()
    elif way == "kind":
        packed = RecordDict({KEY: MetricRecord({"loss": 1.0})})
    else:
        way, packed = "empty", chance.choice([RecordDict(), RecordDict({KEY: ConfigRecord()})])
    return way, packed


def test_malformed_messages_are_refused_and_nothing_else_is_raised() -> None:
    chance, ways = random.Random(20), Counter[str]()
    for index in range(600):
        content = CONTENTS[index % len(CONTENTS)]
        way, packed = malformed(content, chance)
        ways[way] += 1
        with pytest.raises(Malformed):
            unpack(type(content), packed)
    assert len(ways) == 10
    assert min(ways.values()) > 10


def test_a_message_of_another_kind_is_malformed() -> None:
    for content, other in itertools.permutations((PLAN, GOOD, CONTENTS[4], CONTENTS[5], CONTENTS[7]), 2):
        with pytest.raises(Malformed, match="missing or too many"):
            unpack(type(content), pack(other))


def test_the_complaint_names_the_field() -> None:
    packed = pack(GOOD)
    record = packed[KEY]
    assert isinstance(record, ConfigRecord)
    record["examples"] = True
    with pytest.raises(Malformed, match=r"examples is a bool, not a int"):
        unpack(Answer, packed)
