"""A round's plain functions: what is refused and why, what a merge adds up to, who catches up, what travels."""

import contextlib
import itertools
import math
import random
import statistics
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
from safetensors.torch import load, save
from torch import Tensor, nn

from zofed import config
from zofed.core import aggregation, gradient_codec, journal, records, snapshots, subspace, varint
from zofed.core.aggregation import Measured
from zofed.core.digests import tensors_digest
from zofed.core.estimators import Points
from zofed.core.genesis import make_genesis
from zofed.core.journal import Entry, genesis_chain, link, position
from zofed.core.measure import Update
from zofed.core.optimizers import Optimizer
from zofed.core.records import Dense, Guided, Record, Seeded, Skipped, Spread
from zofed.core.replica import Replica, catch_up
from zofed.federated import wire
from zofed.federated.messages import KEY, pack, payload, size, unpack
from zofed.federated.protocol import (
    Answer,
    Contribution,
    Plan,
    Reason,
    check,
    check_update,
    plan_for,
)
from zofed.federated.wire import Evaluation, Final, Greeting, Introduction, Malformed
from zofed.training import schedules, step_records

EPSILON = 3e-4
PLAN = Plan(
    genesis=b"gggg",
    round=4,
    attempt=2,
    task="slopes",
    steps=1,
    client=3,
    after=b"a" * 16,
    entries=b"\x00raw\xff",
    probe=b"p" * 8,
)
HEAD: dict[str, Any] = {
    "genesis": b"gggg",
    "round": 4,
    "attempt": 2,
    "client": 3,
    "head": b"",
    "probe": b"p" * 8,
    "problem": "",
}
GOOD = Answer(
    **HEAD, coefficients=(2**18 - 1, -(2**18) + 1), exponent=-31, loss=5.5, examples=17, milliseconds=250
)  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {"weight": (2, 3), "bias": (2,)}


def update_of(value: float = 0.5) -> Update:
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


GIVEN = Contribution(**HEAD, update=gradient_codec.whole(update_of()), loss=5.5, examples=17, milliseconds=250)

# --- check ---

Changes = list[tuple[dict[str, Any], Reason]]
BROKEN_HEAD: Changes = [
    ({"genesis": b"x" * 4}, "wrong_genesis"),
    ({"genesis": b""}, "wrong_genesis"),
    ({"round": 3}, "wrong_round"),
    ({"round": 5}, "wrong_round"),
    ({"attempt": 1}, "stale_attempt"),
    ({"attempt": 3}, "stale_attempt"),
    ({"client": 2}, "wrong_client"),
    ({"client": -3}, "wrong_client"),
    ({"head": b"a" * 16}, "behind"),
    ({"head": b"a" * 16, "probe": b"", "loss": math.nan}, "behind"),
    ({"probe": b"q" * 8}, "desync"),
    ({"probe": b""}, "desync"),
    ({"problem": "not_finite"}, "not_finite"),
    ({"problem": "no such reason"}, "malformed"),
    ({"examples": 0}, "out_of_range"),
    ({"examples": -5}, "out_of_range"),
    ({"examples": 2**40 + 1}, "out_of_range"),
    ({"loss": math.nan}, "not_finite"),
    ({"loss": math.inf}, "not_finite"),
    ({"loss": -math.inf}, "not_finite"),
    ({"loss": 1.1e6}, "out_of_range"),
    ({"loss": -1.1e6}, "out_of_range"),
]
BROKEN: Changes = [
    *BROKEN_HEAD,
    ({"coefficients": (1,)}, "wrong_length"),
    ({"coefficients": (1, 2, 3)}, "wrong_length"),
    ({"coefficients": ()}, "wrong_length"),
    ({"coefficients": (), "problem": "not_finite"}, "not_finite"),
    ({"coefficients": (2**18, 0)}, "out_of_range"),
    ({"coefficients": (0, -(2**18))}, "out_of_range"),
    ({"coefficients": (0, -(2**63))}, "out_of_range"),
    ({"exponent": 101}, "out_of_range"),
    ({"exponent": -451}, "out_of_range"),
    ({"exponent": 2**63 - 1}, "out_of_range"),
    ({"exponent": 14}, "out_of_range"),  # 2^32 a unit of length: a loss of 10^6 at epsilon could not differ so
    ({"exponent": 82}, "out_of_range"),  # 1e30
]


def encoded_with(**changes: Tensor | None) -> bytes:
    """An update with tensors replaced, or left out where None."""
    parts = {f"float:{name}": tensor for name, tensor in update_of().items()}
    parts |= {f"float:{name}": tensor for name, tensor in changes.items() if tensor is not None}
    return save({key: tensor for key, tensor in parts.items() if changes.get(key[6:], ...) is not None})


BROKEN_UPDATES: Changes = [
    *BROKEN_HEAD,
    ({"update": b""}, "wrong_tensors"),
    ({"update": GIVEN.update[:-1]}, "wrong_tensors"),
    ({"update": encoded_with(bias=None)}, "wrong_tensors"),
    ({"update": encoded_with(more=torch.ones(2))}, "wrong_tensors"),
    ({"update": encoded_with(bias=torch.ones(3))}, "wrong_tensors"),
    ({"update": encoded_with(bias=torch.ones(2, dtype=torch.float64))}, "wrong_tensors"),
    ({"update": encoded_with(bias=torch.ones(2, dtype=torch.int16))}, "wrong_tensors"),
    ({"update": encoded_with(bias=torch.tensor([1.0, math.nan]))}, "not_finite"),
    ({"update": encoded_with(weight=torch.full((2, 3), -math.inf))}, "not_finite"),
    ({"update": gradient_codec.whole(update_of(2.0))}, "too_large"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN, ids=str)
def test_a_broken_answer_is_refused_with_its_reason(change: dict[str, Any], reason: Reason) -> None:
    assert check(replace(GOOD, **change), PLAN, 2, EPSILON) == reason


@pytest.mark.parametrize(("change", "reason"), BROKEN_UPDATES, ids=lambda value: str(value)[:60])
def test_a_broken_update_is_refused_with_its_reason(change: dict[str, Any], reason: Reason) -> None:
    assert check_update(replace(GIVEN, **change), PLAN, replica_of(), 5.0) == (None, reason)


def test_the_tables_cover_every_reason_that_a_check_can_give() -> None:
    told_by_the_loop = {"error", "late", "duplicate", "implausible"}
    assert {reason for _, reason in BROKEN + BROKEN_UPDATES} == set(get_args(Reason)) - told_by_the_loop


@pytest.mark.parametrize("problem", [*sorted(set(get_args(Reason)) - {"not_finite"}), "used", "\x00"])
def test_a_client_cannot_choose_the_reason_of_its_refusal(problem: str) -> None:
    """It may say that its loss is no number; the rest is for the server to find."""
    assert check(replace(GOOD, problem=problem), PLAN, 2, EPSILON) == "malformed"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"loss": 0.0},
        {"coefficients": (0, 0), "exponent": 0},
        {"coefficients": (0, 0), "exponent": 100},
        {"exponent": -450},
        {"exponent": 13},
        {"examples": 2**40},
        {"milliseconds": -1},
    ],
    ids=str,
)
def test_a_good_answer_is_taken(change: dict[str, Any]) -> None:
    assert check(replace(GOOD, **change), PLAN, 2, EPSILON) is None


def test_a_good_update_is_taken_and_decoded() -> None:
    for limit in (0.0, 5.0):
        update, reason = check_update(GIVEN, PLAN, replica_of(), limit)
        assert reason is None and update is not None
        assert tensors_digest(update) == tensors_digest(update_of())


def test_an_answer_to_an_older_round_is_told_by_its_round_and_not_by_its_weights() -> None:
    assert check(replace(GOOD, round=3, attempt=0, probe=b"o" * 8), PLAN, 2, EPSILON) == "wrong_round"


# --- merge ---


def measured(coefficients: Sequence[int], exponent: int, examples: int = 1) -> Measured:
    return Measured(tuple(coefficients), exponent, 1.0, 2 * len(coefficients), examples=examples)


def exact(slopes: aggregation.Slopes | aggregation.Merged) -> list[Fraction]:
    return [value * Fraction(2) ** slopes.exponent for value in slopes.coefficients]


COEFFICIENT = st.integers(-(2**18) + 1, 2**18 - 1)
ANSWERS = st.dictionaries(
    st.integers(0, 2**32 - 1),
    st.builds(
        measured,
        st.lists(COEFFICIENT, min_size=3, max_size=3),
        st.integers(-45, -20),
        st.integers(1, 1000) | st.just(2**40),
    ),
    min_size=1,
    max_size=6,
)
WAYS: tuple[dict[str, Any], ...] = (
    {"shared": False},
    {"shared": False, "limit": 2.0, "largest_weight": 50},
    {"shared": True},
    {"shared": True, "largest_weight": 50},
    {"shared": True, "rule": "median"},
    {"shared": True, "rule": "trimmed", "trim": 0.3, "limit": 2.0},
)


@given(ANSWERS, st.sampled_from(WAYS), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None, database=None)
def test_a_merge_does_not_depend_on_the_order_of_arrival(
    answers: dict[int, Measured], way: dict[str, Any], chance: random.Random
) -> None:
    order = list(answers)
    chance.shuffle(order)
    assert aggregation.merged({client: answers[client] for client in order}, **way) == aggregation.merged(
        answers, **way
    )


@given(ANSWERS, st.sampled_from(WAYS))
@settings(max_examples=150, deadline=None, database=None)
def test_a_merge_fits_into_a_record(answers: dict[int, Measured], way: dict[str, Any]) -> None:
    merged = aggregation.merged(answers, **way)
    assert all(abs(value) < 2**18 for value in merged.coefficients)
    assert merged.clients == ((0,) if way["shared"] else tuple(sorted(answers)))
    record = aggregation.seeded(7, 0.1, merged, 3, "two-point")
    assert records.encode(records.decode(records.encode(record))) == records.encode(record)


def assert_close(merged: aggregation.Merged, expected: Sequence[Any]) -> None:
    half = Fraction(2) ** merged.exponent / 2
    assert all(abs(one - other) <= half for one, other in zip(exact(merged), expected, strict=True))


@given(ANSWERS)
@settings(max_examples=150, deadline=None, database=None)
def test_distinct_directions_keep_all_slopes_to_half_a_unit(answers: dict[int, Measured]) -> None:
    merged = aggregation.merged(answers, shared=False)
    assert_close(merged, [slope for client in sorted(answers) for slope in exact(answers[client])])


@given(ANSWERS, st.integers(1, 2000))
@settings(max_examples=150, deadline=None, database=None)
def test_weights_are_the_examples_up_to_a_cap(answers: dict[int, Measured], cap: int) -> None:
    clients = sorted(answers)
    weights = [min(answers[client].examples, cap) for client in clients]
    columns = list(zip(*(exact(answers[client]) for client in clients), strict=True))
    expected = [sum(w * v for w, v in zip(weights, column, strict=True)) / sum(weights) for column in columns]
    assert_close(aggregation.merged(answers, shared=True, largest_weight=cap), expected)
    own = [
        w * len(clients) * s / sum(weights) for w, c in zip(weights, clients, strict=True) for s in exact(answers[c])
    ]
    assert_close(aggregation.merged(answers, shared=False, largest_weight=cap), own)


@given(ANSWERS, st.floats(0.01, 0.49))
@settings(max_examples=200, deadline=None, database=None)
def test_shared_directions_give_the_mean_the_trimmed_mean_or_the_lower_median(
    answers: dict[int, Measured], trim: float
) -> None:
    columns = list(zip(*(exact(one) for one in answers.values()), strict=True))
    count = len(answers)
    assert_close(aggregation.merged(answers, shared=True), [sum(column) / Fraction(count) for column in columns])
    assert_close(
        aggregation.merged(answers, shared=True, rule="median"),
        [sorted(column)[(count - 1) // 2] for column in columns],
    )
    cut = min(math.ceil(trim * count), (count - 1) // 2)
    kept = [sorted(column)[cut : count - cut] for column in columns]
    assert_close(
        aggregation.merged(answers, shared=True, rule="trimmed", trim=trim), [sum(k) / Fraction(len(k)) for k in kept]
    )


@given(ANSWERS, st.sampled_from(WAYS), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, database=None)
def test_one_client_alone_is_left_as_it_is(answers: dict[int, Measured], way: dict[str, Any], client: int) -> None:
    one = next(iter(answers.values()))
    merged = aggregation.merged({client: one}, **way)
    assert exact(merged) == exact(one)
    if any(one.coefficients) and "largest_weight" not in way:
        assert (merged.coefficients, merged.exponent) == (one.coefficients, one.exponent)


@given(ANSWERS, st.sampled_from([1.0, 2.0, 10.0]))
@settings(max_examples=150, deadline=None, database=None)
def test_slopes_are_clipped_at_the_limit_times_the_median_of_sizes(answers: dict[int, Measured], limit: float) -> None:
    """Of two middle ones that nearer to 1, the usual size before there is any: here all are below."""
    sizes = sorted(math.sqrt(sum(value**2 for value in exact(one)) / 3) for one in answers.values())
    nonzero = [one for one in sizes if one]
    if not nonzero or len(answers) == 1:
        return
    bound = limit * statistics.median_high(nonzero)
    merged = aggregation.merged(answers, shared=False, limit=limit)
    finest = 2.0 ** min(one.exponent for one in answers.values() if any(one.coefficients))
    tolerance = 2.0**merged.exponent / 2 + finest + bound * 1e-9
    for slope, own in zip(exact(merged), [s for c in sorted(answers) for s in exact(answers[c])], strict=True):
        assert abs(float(slope) - max(-bound, min(bound, float(own)))) <= tolerance


def test_a_liar_among_three_moves_a_clipped_mean_by_ten_common_sizes_at_most() -> None:
    honest = {0: measured((100, -100), -10), 1: measured((110, 90), -10)}
    lying = honest | {2: measured((2**17, 2**17), 0)}
    merged = aggregation.merged(lying, shared=True, limit=10.0)
    common = min(aggregation.size(one) for one in honest.values())
    assert max(map(abs, map(float, exact(merged)))) <= 10 * max(map(aggregation.size, honest.values())) / 3 + common
    assert max(map(abs, map(float, exact(aggregation.merged(lying, shared=True))))) > 10_000


def test_slopes_a_thousand_limits_beyond_the_others_are_implausible() -> None:
    others = {0: measured((100, -100), 0), 1: measured((100, 100), 0)}
    assert aggregation.implausible(others, 2.0) == []
    at, beyond = measured((200_000, 0), 0), measured((200_001, 0), 0)
    assert aggregation.implausible(others | {7: at}, 2.0) == []
    assert aggregation.implausible(others | {7: beyond}, 2.0) == [7]
    assert aggregation.implausible(others | {7: beyond}, 0.0) == []
    zeros = measured((0, 0), records.LARGEST_EXPONENT)
    assert aggregation.implausible({0: zeros, 1: zeros}, 2.0) == []
    assert aggregation.implausible(others | {3: zeros, 4: zeros, 5: zeros, 7: beyond}, 2.0) == [7], "zeros have no size"


SIZES = st.floats(2.0**-30, 2.0**30)
EXTREMES = st.integers(records.SMALLEST_EXPONENT, records.LARGEST_EXPONENT)


@st.composite
def liars_among(draw: st.DrawFn) -> tuple[list[Measured], list[Measured], float]:
    """Honest answers, at most as many that hold anything at all, and the usual size."""
    honest = [draw(st.lists(COEFFICIENT.filter(bool), min_size=2, max_size=2)) for _ in range(draw(st.integers(1, 4)))]
    lies = draw(st.lists(st.tuples(st.lists(COEFFICIENT, min_size=2, max_size=2), EXTREMES), max_size=len(honest)))
    exponent = draw(st.integers(-30, 0))
    return [measured(some, exponent) for some in honest], [measured(*lie) for lie in lies], draw(SIZES)


@pytest.mark.slow
@given(liars_among(), st.sampled_from([1.0, 2.0, 10.0]), st.booleans())
@settings(max_examples=300, deadline=None, database=None)
def test_whatever_half_of_the_clients_send_the_merged_slopes_are_bounded_by_those_of_the_others(
    answers: tuple[list[Measured], list[Measured], float], limit: float, shared: bool
) -> None:
    """Fewer than half: by limit times the largest honest size. Half: by limit times the largest size that is as far
    from the usual one as an honest size is. And no honest client is left out for being unlike the liars alone."""
    honest, lying, usual = answers
    found = dict(enumerate(honest + lying))
    sizes = [aggregation.size(one) for one in honest]
    common = aggregation.common_size(found, usual)
    furthest = max(abs(math.log2(one) - math.log2(usual)) for one in sizes)
    is_few = len(lying) < len(honest)
    low, high = (min(sizes), max(sizes)) if is_few else (usual * 2.0**-furthest, usual * 2.0**furthest)
    assert low * (1 - 1e-9) <= common <= high * (1 + 1e-9)
    left_out = aggregation.implausible(found, limit, usual)
    if is_few and max(sizes) < 100 * limit * min(sizes):
        assert not set(left_out) & set(range(len(honest)))
    staying = {client: one for client, one in found.items() if client not in left_out}
    merged = aggregation.merged(staying or found, shared=shared, limit=limit, usual=usual)
    if len(staying) > 1 and not left_out:
        unit = 2.0**merged.exponent + 2.0 ** min(one.exponent for one in found.values() if any(one.coefficients))
        assert max(abs(float(slope)) for slope in exact(merged)) <= limit * high * (1 + 1e-9) + unit


@pytest.mark.parametrize("usual", [1.0, 0.2, 30.0])
@pytest.mark.parametrize("liar", [((1, -1), -450), ((3, 2), -200), ((1, 1), -60), ((2**17, 1), 20), ((1, 1), 100)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_liars_at_exactly_half_are_left_out_and_not_the_honest(
    count: int, liar: tuple[tuple[int, ...], int], usual: float
) -> None:
    honest = {client: measured((100 + client, -90), -7) for client in range(count)}
    found = honest | {client + 10: measured(*liar) for client in range(count)}
    assert aggregation.implausible(found, 10.0, usual) == [client + 10 for client in range(count)]
    assert aggregation.merged(found, shared=False, limit=10.0, usual=usual).clients == tuple(found)
    largest = max(map(abs, map(float, exact(aggregation.merged(found, shared=False, limit=10.0, usual=usual)))))
    assert largest <= 10.0 * max(map(aggregation.size, honest.values())) + 2.0**-7  # rounded up to one unit


def test_what_a_run_has_measured_so_far_tells_which_half_lies() -> None:
    """Where honest slopes are far from 1."""
    small = {client: measured((100, -90), -40) for client in range(2)}
    liars = {client + 10: measured((100, -90), -7) for client in range(2)}
    usual = aggregation.size(small[0])
    assert aggregation.implausible(small | liars, 10.0, 2 * usual) == [10, 11]
    assert aggregation.common_size(small | liars, usual / 3) == usual


def test_answers_of_zeros_take_nothing_from_the_others_whatever_their_exponent() -> None:
    zeros = measured((0, 0), records.LARGEST_EXPONENT)
    merged = aggregation.merged({0: zeros, 1: measured((-3, 5), -20)}, shared=False)
    assert (merged.coefficients, merged.exponent) == ((0, 0, -3, 5), -20)
    for shared, count in ((True, 2), (False, 4)):
        assert aggregation.merged({0: zeros, 1: zeros}, shared=shared).coefficients == (0,) * count


@pytest.mark.slow
@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=5), st.integers(1, 2**45), st.integers(-450, 20))
@settings(max_examples=300, deadline=None, database=None)
def test_rounding_stays_below_18_bits_and_within_half_a_unit(values: list[int], divisor: int, exponent: int) -> None:
    found, at = aggregation.rounded(values, divisor, exponent)
    assert max(map(abs, found)) < 2**18
    assert at >= records.SMALLEST_EXPONENT
    half = Fraction(2) ** at / 2
    for one, value in zip(found, values, strict=True):
        assert abs(one * Fraction(2) ** at - Fraction(value, divisor) * Fraction(2) ** exponent) <= half
    if any(values) and at > records.SMALLEST_EXPONENT and divisor > 1:
        assert max(map(abs, found)) >= 2**16, "as many bits as there are"


# --- records of rounds ---


def chosen_settings(**changes: Any) -> config.Settings:
    base = {"queries": 3, "learning-rate": 0.5, "quorum": 1, "schedule": "cosine"}
    return config.resolve(base | {key.replace("_", "-"): value for key, value in changes.items()})


@pytest.mark.parametrize("points", get_args(Points))
@pytest.mark.parametrize("normalize_slopes", [False, True])
def test_the_record_of_a_round_follows_the_settings_and_the_worker(points: Points, normalize_slopes: bool) -> None:
    chosen = chosen_settings(finite_difference=points, normalize_slopes=normalize_slopes, clip_slopes=0.0)
    replica = standing_at(4)
    answers = {4: measured((9, -8, 7), -12), 1: measured((1, 2**17, 3), -17)}
    record = step_records.record_of(chosen, replica, answers, 8)
    assert (record.round, record.queries, record.clients) == (5, 3, (1, 4))
    assert record.rate == schedules.learning_rate(chosen, 5, 8) < 0.5
    degrees = 2 * (3 if points == "two-point" else 2)
    expected = (
        degrees * replica.spread.after(record.coefficients, record.exponent).value if normalize_slopes else degrees
    )
    assert record.divisor == expected
    assert replica.spread != Spread()
    assert replica.spread == standing_at(4).spread, "a record is made before it is applied, and changes nothing"


def test_one_query_of_one_point_is_divided_by_one() -> None:
    merged = aggregation.merged({0: measured((5,), -20), 1: measured((5,), -20)}, shared=False)
    assert aggregation.seeded(1, 0.1, merged, 1, "one-sided").divisor == 2.0


def test_several_rounds_of_one_exchange_are_the_rounds_asked_one_by_one() -> None:
    """Each with its own rate, its own part of the integers and the spread that those before leave."""
    chosen = chosen_settings(normalize_slopes=True, clip_slopes=0.0, clip_norm=0.0)
    answers = {0: measured(range(1, 10), -12), 5: measured(range(-40, -31), -12)}
    made = step_records.records_of(chosen, standing_at(4), answers, 9, 3)
    assert [record.round for record in made] == [5, 6, 7]
    replica = standing_at(4)
    for step, record in enumerate(made):
        part = {c: replace(one, coefficients=one.coefficients[3 * step : 3 * step + 3]) for c, one in answers.items()}
        assert step_records.record_of(chosen, replica, part, 9) == record
        replica.apply(link(replica.head, record))
    assert len({record.rate for record in made}) == len({record.divisor for record in made}) == 3


@pytest.mark.parametrize("seeds", ["distinct", "shared"])
def test_local_steps_are_summed_and_each_is_a_mean_over_all_directions(seeds: str) -> None:
    chosen = chosen_settings(
        local_steps=2,
        direction_seeds=seeds,
        normalize_slopes=False,
        finite_difference="two-point",
        clip_slopes=0.0,
        clip_norm=0.0,
    )
    answers = {0: measured((1, 2, 3, 4, 5, 6), -10), 2: measured((3, 4, 5, 6, 7, 8), -10)}
    record = step_records.record_of(chosen, standing_at(0), answers, 9)
    assert (record.local_steps, record.queries) == (2, 3)
    if seeds == "shared":
        assert [float(s) for s in exact(record)] == [s / 2**10 for s in (2, 3, 4, 5, 6, 7)]  # type: ignore[arg-type]
        assert (record.clients, record.divisor) == ((0,), 3.0)
    else:
        assert record.coefficients == (1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 7, 8)
        assert (record.clients, record.divisor) == ((0, 2), 6.0)


def test_the_norm_of_an_estimate_is_clipped() -> None:
    answers = {0: measured((100, -200, 300), 0)}
    whole = step_records.record_of(chosen_settings(normalize_slopes=False), standing_at(0), answers, 9)
    parameters = sum(parameter.numel() for parameter in replica_of().parameters.values())
    norm = records.estimate_norm(whole, parameters)
    for limit in (norm / 7, norm * 2):
        record = step_records.record_of(
            chosen_settings(normalize_slopes=False, clip_norm=limit), standing_at(0), answers, 9
        )
        assert records.estimate_norm(record, parameters) == pytest.approx(min(norm, limit), rel=1e-12)
        assert replace(record, divisor=whole.divisor) == whole


def test_updates_are_merged_by_capped_examples_or_robustly() -> None:
    found = {2: (update_of(8.0), 10**12), 0: (update_of(2.0), 10), 1: (update_of(5.0), 30)}
    value = lambda **changes: float(  # noqa: E731
        step_records.merged_updates(chosen_settings(**changes), found)["weight"][0, 0]
    )
    assert value() == pytest.approx(5.0)
    assert value(weighting="examples", max_examples=40) == pytest.approx((2 * 10 + 5 * 30 + 8 * 40) / 80)
    assert value(aggregation="median", direction_seeds="shared") == 5.0
    wild = found | {2: (update_of(1e30), 1)}
    assert (
        float(
            step_records.merged_updates(chosen_settings(aggregation="trimmed", direction_seeds="shared"), wild)["bias"][
                0
            ]
        )
        == 5.0
    )
    ordered = dict(sorted(found.items()))
    one, other = (step_records.merged_updates(chosen_settings(weighting="examples"), way) for way in (found, ordered))
    assert tensors_digest(one) == tensors_digest(other)
    assert float(found[0][0]["weight"][0, 0]) == 2.0, "a merge changes no update"


# --- plan and catch up ---

UPDATE = update_of(0.125)
DIGEST = bytes.fromhex(tensors_digest(UPDATE))
HISTORY: tuple[Record, ...] = (
    Seeded(1, 0.125, (0, 1), 1, (5, -3), -6, 2),
    Dense(2, 0.25, DIGEST),
    Skipped(3),
    Seeded(4, 0.125, (1,), 2, (9, 8), -6, 2),
    Guided(Seeded(5, 0.5, (0,), 2, (-1, 2**17), -18, 2), DIGEST, 0.1, 0.5, 0.25, False),
    Seeded(6, 0.5, (0,), 2, (-1, 2**17), -18, 2),
)


def replica_of(seed: int = 1, optimizer: Optimizer | None = None) -> Replica:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    genesis = make_genesis(
        model, {"name": "test"}, list(SHAPES), seed=seed, kind="rank1", optimizer=optimizer or Optimizer("sgd", 0.5)
    )
    return Replica(model, genesis)


def history(replica: Replica, contents: Sequence[Record] = HISTORY) -> list[Entry]:
    chain, entries = replica.head, []
    for record in contents:
        entries.append(link(chain, record))
        chain = entries[-1].chain
    return entries


def standing_at(count: int, optimizer: Optimizer | None = None) -> Replica:
    """A replica that has applied the first `count` entries."""
    replica = replica_of(optimizer=optimizer)
    for entry in history(replica)[:count]:
        replica.apply(entry, UPDATE if isinstance(entry.record, Dense | Guided) else None)
    return replica


def state(replica: Replica) -> tuple[Any, ...]:
    moments = {key: value.tolist() for key, value in replica.state_dict().items()}
    return replica.digest(), replica.head, replica.round, replica.probe(), replica.spread, moments


LENGTHS = range(len(HISTORY) + 1)


@pytest.mark.parametrize("start", LENGTHS)
@pytest.mark.parametrize("stands", LENGTHS)
def test_a_worker_anywhere_on_the_way_catches_up_to_the_same_state(start: int, stands: int) -> None:
    entries, goal = history(replica_of()), standing_at(len(HISTORY))
    after = entries[start - 1].chain if start else genesis_chain(goal.genesis)
    replica = standing_at(stands)
    reached = catch_up(replica, after, journal.bodies(entries[start:]), {DIGEST: UPDATE})
    assert reached == (stands >= start)
    assert state(replica) == state(goal if reached else standing_at(stands))


@pytest.mark.parametrize("stands", LENGTHS)
def test_without_an_update_that_the_way_names_nothing_is_applied(stands: int) -> None:
    entries, replica = history(replica_of()), standing_at(stands)
    before = state(replica)
    reached = catch_up(replica, genesis_chain(replica.genesis), journal.bodies(entries), {b"o" * 32: UPDATE})
    assert reached == (stands >= 5), "the last update needed is that of round 5"
    assert state(replica) == (state(standing_at(6)) if reached else before)


@pytest.mark.parametrize("start", LENGTHS)
def test_a_plan_brings_every_client_it_was_made_for_to_the_round(start: int) -> None:
    entries, goal = history(replica_of()), standing_at(len(HISTORY))
    after = entries[start - 1].chain if start else genesis_chain(goal.genesis)
    plan = plan_for(goal, after, entries[start:], client=2, attempt=9)
    assert (plan.round, plan.attempt, plan.client, plan.probe, plan.task) == (7, 9, 2, goal.probe(), "slopes")
    assert plan.genesis == genesis_chain(goal.genesis)[:4]
    replica = standing_at(start)
    assert catch_up(replica, plan.after, plan.entries, {DIGEST: UPDATE})
    assert (replica.probe(), replica.head) == (plan.probe, goal.head)


def test_the_first_plan_starts_from_the_genesis() -> None:
    replica = replica_of()
    plan = plan_for(replica, replica.head, [], client=0)
    assert plan.after == genesis_chain(replica.genesis)
    assert (plan.round, plan.entries) == (1, b"")
    assert catch_up(replica, plan.after, plan.entries)


def broken_ways() -> dict[str, Callable[[list[Entry]], bytes]]:
    return {
        "the last cut": lambda entries: journal.bodies(entries)[:-1],
        "garbage before": lambda entries: b"\x01" + journal.bodies(entries),
        "garbage": lambda entries: bytes(range(256)) * 3,
        "a length of zero": lambda entries: b"\x00" + journal.bodies(entries),
        "a negative length": lambda entries: b"\x01" * 9,
        "an entry of the file": lambda entries: b"".join(entry.raw for entry in entries),
    }


@pytest.mark.parametrize("way", broken_ways())
@pytest.mark.parametrize("stands", [0, 1, 2])
def test_a_broken_way_is_refused_and_moves_nothing(way: str, stands: int) -> None:
    replica, entries = standing_at(stands), history(replica_of())
    before = state(replica)
    assert not catch_up(replica, genesis_chain(replica.genesis), broken_ways()[way](entries), {DIGEST: UPDATE})
    assert state(replica) == before


def other_ways() -> dict[str, Callable[[list[Entry]], list[Entry]]]:
    return {
        "a gap": lambda entries: [entries[0], *entries[2:]],
        "the first missing": lambda entries: entries[1:],
        "two swapped": lambda entries: [entries[1], entries[0], *entries[2:]],
        "another record": lambda entries: [link(b"", Skipped(1)), *entries[1:]],
    }


@pytest.mark.parametrize("way", other_ways())
def test_another_way_from_the_same_start_ends_at_another_head(way: str) -> None:
    """The head does not travel but follows: whoever applied other records says so by its probe or its chain."""
    entries = history(replica_of())
    raw = journal.bodies(other_ways()[way](entries))
    found = journal.linked(raw, genesis_chain(replica_of().genesis))
    assert found[-1].chain != entries[-1].chain
    replica = standing_at(2)
    before = state(replica)
    assert not catch_up(replica, genesis_chain(replica.genesis), raw, {DIGEST: UPDATE})
    assert state(replica) == before


@given(st.binary(max_size=60), st.binary(min_size=16, max_size=16))
@settings(max_examples=300, deadline=None, database=None)
def test_arbitrary_bytes_lead_nowhere_or_are_records(raw: bytes, chain: bytes) -> None:
    try:
        entries = journal.linked(raw, chain)
    except ValueError:
        return
    assert journal.bodies(entries) == raw


def test_bodies_are_linked_to_the_entries_they_came_from() -> None:
    entries = history(replica_of())
    for start, end in itertools.combinations(LENGTHS, 2):
        chain = entries[start - 1].chain if start else genesis_chain(replica_of().genesis)
        assert journal.linked(journal.bodies(entries[start:end]), chain) == entries[start:end]
    assert len(journal.bodies(entries[3:4])) < 45


def test_a_worker_ahead_of_the_plan_is_not_moved() -> None:
    replica, entries = standing_at(4), history(replica_of())
    before = state(replica)
    assert not catch_up(replica, genesis_chain(replica.genesis), journal.bodies(entries[:2]), {DIGEST: UPDATE})
    assert state(replica) == before


def test_a_position_is_counted_in_entries() -> None:
    replica = replica_of()
    entries = history(replica)
    heads = [replica.head, *(entry.chain for entry in entries)]
    assert [position(entries, replica.head, head) for head in heads] == list(LENGTHS)
    assert position(entries, replica.head, b"x" * 16) is None


# --- snapshots ---

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


# --- guides ---

NAMED = st.dictionaries(
    st.sampled_from(["a", "b.weight", "left:x", "head"]),
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
    min_size=1,
    max_size=3,
)


def tensors_of(shapes: gradient_codec.Shapes, seed: int = 0, scale: float = 1.0) -> Update:
    chance = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=chance) * scale for name, shape in shapes.items()}


@given(NAMED, st.integers(0, 99), st.integers(0, 3), st.sampled_from([1.0, 1e-30, 1e30, 0.0]))
@settings(max_examples=80, deadline=None, database=None)
def test_an_encoded_update_comes_back_the_same_everywhere(
    shapes: dict[str, tuple[int, ...]], seed: int, rank: int, scale: float
) -> None:
    update = tensors_of(shapes, seed, scale)
    assert tensors_digest(gradient_codec.decoded(gradient_codec.whole(update), shapes)) == tensors_digest(update)
    raw = gradient_codec.compressed(update, rank)
    found = gradient_codec.decoded(raw, shapes)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert tensors_digest(found) == tensors_digest(gradient_codec.decoded(raw, shapes))
    if rank == 0:
        for name, tensor in update.items():
            assert (found[name] - tensor).abs().max() <= tensor.abs().max() * 2**-14


def test_a_matrix_of_rank_r_survives_in_r_factors() -> None:
    left, right = tensors_of({"l": (40, 3), "r": (3, 30)}, 1).values()
    shapes = {"w": (40, 30)}
    raw = gradient_codec.compressed({"w": left @ right}, 3)
    found = gradient_codec.decoded(raw, shapes)["w"]
    assert gradient_codec.norm({"w": found - left @ right}) < 1e-3 * gradient_codec.norm({"w": left @ right})
    assert len(raw) < 2 * 3 * 70 + 400 < 4 * 40 * 30
    worse = gradient_codec.decoded(gradient_codec.compressed({"w": left @ right}, 2), shapes)["w"]
    assert gradient_codec.norm({"w": worse - left @ right}) > 0.05 * gradient_codec.norm({"w": left @ right})


def test_the_same_gradient_has_the_same_bytes() -> None:
    update = tensors_of({"b": (9, 8), "a": (7,)})
    assert gradient_codec.compressed(update, 2) == gradient_codec.compressed(dict(reversed(update.items())), 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_encoded(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        gradient_codec.compressed({"w": torch.tensor([[1.0, bad]])}, 1)


def broken_guides() -> dict[str, bytes]:
    parts = load(gradient_codec.compressed(tensors_of({"w": (6, 5), "b": (4,)}), 2))
    assert set(parts) == {"left:w", "right:w", "whole:b", "exponents"}
    short = lambda key: {other: tensor for other, tensor in parts.items() if other != key}  # noqa: E731
    odd = torch.zeros(3, dtype=torch.int16)
    changed: dict[str, dict[str, Tensor]] = {
        "a factor missing": short("right:w"),
        "the other factor missing": short("left:w"),
        "a tensor missing": short("whole:b"),
        "exponents missing": short("exponents"),
        "a tensor more": parts | {"float:c": torch.ones(2)},
        "a tensor twice": parts | {"float:b": torch.ones(4)},
        "a stray factor": parts | {"right:c": odd.view(1, 3)},
        "a stray name": parts | {"c": torch.ones(2)},
        "an exponent too many": parts | {"exponents": torch.zeros(4, dtype=torch.int16)},
        "exponents of another type": parts | {"exponents": torch.zeros(3, dtype=torch.int32)},
        "an exponent too large": parts | {"exponents": odd + 141},
        "an exponent too small": parts | {"exponents": odd - 141},
        "factors of floats": parts | {"left:w": parts["left:w"].float()},
        "factors of two ranks": parts | {"left:w": parts["left:w"][:, :1].contiguous()},
        "a factor too long": parts | {"right:w": torch.zeros(2, 6, dtype=torch.int16)},
        "a factor of one dimension": parts | {"left:w": torch.zeros(12, dtype=torch.int16)},
        "another shape": parts | {"whole:b": torch.zeros(2, 2, dtype=torch.int16)},
    }
    return {name: save(tensors) for name, tensors in changed.items()} | {"garbage": bytes(99), "nothing": b""}


@pytest.mark.parametrize("way", broken_guides())
def test_a_broken_guide_is_refused(way: str) -> None:
    with pytest.raises(ValueError, match=r"tensor|exponent|is not"):
        gradient_codec.decoded(broken_guides()[way], {"w": (6, 5), "b": (4,)})


@pytest.mark.slow
@given(st.integers(0, 400), st.integers(0, 255), st.booleans())
@settings(max_examples=300, deadline=None, database=None)
def test_a_guide_with_a_byte_changed_is_a_guide_or_a_value_error(at: int, value: int, cut: bool) -> None:
    raw = gradient_codec.compressed(tensors_of({"w": (6, 5), "b": (4,)}), 2)
    at %= len(raw)
    with_change = raw[:at] if cut else raw[:at] + bytes([value]) + raw[at + 1 :]
    try:
        found = gradient_codec.decoded(with_change, {"w": (6, 5), "b": (4,)})
    except ValueError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {"w": (6, 5), "b": (4,)}


@given(st.lists(st.binary(max_size=20), max_size=4), st.binary(max_size=30))
@settings(max_examples=100, deadline=None, database=None)
def test_updates_side_by_side_are_split_again(raws: list[bytes], other: bytes) -> None:
    assert list(gradient_codec.split(gradient_codec.joined(raws))) == raws
    with contextlib.suppress(ValueError):
        assert gradient_codec.joined(gradient_codec.split(other)) == other


# --- probing a subspace ---


def test_probing_a_linear_loss_is_unbiased() -> None:
    slopes = torch.linspace(-1.0, 2.0, 8)
    how = subspace.Probing(queries=4000, epsilon=0.01, seed=3, client=1)
    loss = lambda at: torch.dot(slopes, at) + 7.0  # noqa: E731
    found, mean = subspace.probed(loss, torch.zeros(8), how, number=5)
    assert found.tolist() == pytest.approx(slopes.tolist(), abs=6 * float(slopes.norm()) / math.sqrt(4000))
    assert float(mean) == pytest.approx(7.0, abs=1e-3)
    few = [replace(how, queries=2, client=client) for client in (1, 2)]
    one, other = (subspace.probed(loss, torch.zeros(8), way, number=5)[0] for way in few)
    assert not torch.equal(one, other), "each client has vectors of its own"
    assert torch.equal(one, subspace.probed(loss, torch.zeros(8), few[0], number=5)[0])
    assert not torch.equal(one, subspace.probed(loss, torch.zeros(8), few[0], number=6)[0])


# --- messages ---

CONTENTS: tuple[Any, ...] = (
    PLAN,
    replace(PLAN, rebuild=1, updates=b"u" * 200, guide=b"g", snapshot=b"s", task="guided", steps=1024, classes=2),
    GOOD,
    replace(GOOD, coefficients=(), loss=math.inf, problem="not_finite", head=b"h" * 16),
    replace(GOOD, coefficients=(-(2**63), 2**63 - 1, 0), client=-1),
    GIVEN,
    Greeting(b'{"a":1}', 3),
    Introduction(1, 4, 100, "fo", b"h" * 16, "{}", "", "/path 0.1.0"),
    Introduction(-1, 0, 0, "", b"", "", "no such dätä", "/päth"),
    Final(2, "ab" * 32, b"h" * 16),
    Evaluation(3, b"", 1.5, 10**6),
)
KINDS = tuple({type(content): content for content in CONTENTS}.values())


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: type(content).__name__)
def test_a_message_comes_back_as_it_was(content: Any) -> None:
    packed = pack(content)
    again = unpack(type(content), packed)
    assert again == content
    assert [type(getattr(again, field.name)) for field in fields(content)] == [
        type(getattr(content, field.name)) for field in fields(content)
    ]
    assert payload(packed) == len(wire.encoded(content))


@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: type(content).__name__)
def test_a_message_comes_back_from_flowers_wire(content: Any) -> None:
    packed = pack(content)
    parts = {object_id: part.deflate() for object_id, part in get_all_nested_objects(packed).items()}
    assert size(packed) == sum(len(part) for part in parts.values())
    received = inflate_object_from_contents(packed.object_id, parts)
    assert isinstance(received, RecordDict)
    assert unpack(type(content), received) == content


def test_every_kind_of_message_is_tried() -> None:
    assert {type(content) for content in CONTENTS} == set(wire.KINDS)


@pytest.mark.parametrize(("loss", "found"), [(1e300, math.inf), (-1e300, -math.inf), (0.1, 0.10000000149011612)])
def test_a_loss_travels_as_a_single(loss: float, found: float) -> None:
    assert unpack(Answer, pack(replace(GOOD, loss=loss))).loss == found


def test_a_nan_loss_travels() -> None:
    assert math.isnan(unpack(Answer, pack(replace(GOOD, loss=math.nan))).loss)


def test_a_hundred_slopes_cost_three_bytes_each() -> None:
    short, long = (size(pack(replace(GOOD, coefficients=(2**18 - 1,) * count))) for count in (20, 120))
    assert 300 <= long - short <= 304


@pytest.mark.parametrize("content", KINDS, ids=lambda content: type(content).__name__)
def test_every_cut_and_every_byte_more_is_malformed(content: Any) -> None:
    raw = wire.encoded(content)
    for wrong in [raw[:at] for at in range(len(raw))] + [raw + b"\x00"]:
        with pytest.raises(Malformed):
            wire.decoded(type(content), wrong)


def test_a_message_of_another_kind_is_malformed() -> None:
    for content, other in itertools.permutations(KINDS, 2):
        with pytest.raises(Malformed, match=f"no {type(content).__name__}"):
            unpack(type(content), pack(other))


@given(st.sampled_from(wire.KINDS), st.binary(max_size=60))
@settings(max_examples=400, deadline=None, database=None)
def test_arbitrary_bytes_are_malformed_or_a_message(kind: type[Any], raw: bytes) -> None:
    try:
        found = wire.decoded(kind, bytes([wire.KINDS.index(kind)]) + raw)
    except Malformed:
        return
    assert wire.decoded(kind, wire.encoded(found)) == found or "nan" in repr(found)


@given(st.sampled_from(KINDS), st.integers(0, 400), st.integers(0, 255))
@settings(max_examples=300, deadline=None, database=None)
def test_a_message_with_a_byte_changed_is_malformed_or_a_message(content: Any, at: int, value: int) -> None:
    raw = bytearray(wire.encoded(content))
    raw[at % len(raw)] = value
    with contextlib.suppress(Malformed):
        assert type(wire.decoded(type(content), bytes(raw))) is type(content)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9), st.binary(max_size=3))
@settings(max_examples=200, deadline=None, database=None)
def test_integers_come_back_from_their_bytes(values: list[int], before: bytes) -> None:
    raw = before + varint.packed(values)
    assert varint.unpacked(raw + b"rest", len(before), len(values)) == (tuple(values), len(raw))


def test_a_length_beyond_the_message_costs_no_memory() -> None:
    for count in (2**40, 2**63 - 1, -1):
        raw = wire.encoded(replace(GOOD, coefficients=()))
        empty = varint.packed((0, -31))  # the length of no coefficients, then the exponent
        at = raw.rindex(empty)
        with pytest.raises(Malformed, match="field coefficients"):
            wire.decoded(Answer, raw[:at] + varint.packed((count,)) + raw[at + 1 :])


def odd_contents() -> dict[str, RecordDict]:
    raw = wire.encoded(GOOD)
    return {
        "nothing": RecordDict(),
        "another key": RecordDict({"zofed2": ConfigRecord({KEY: raw})}),
        "a record more": RecordDict({KEY: ConfigRecord({KEY: raw}), "more": ConfigRecord()}),
        "another kind of record": RecordDict({KEY: MetricRecord({"loss": 1.0})}),
        "no field": RecordDict({KEY: ConfigRecord()}),
        "a field more": RecordDict({KEY: ConfigRecord({KEY: raw, "more": 1})}),
        "another field": RecordDict({KEY: ConfigRecord({"raw": raw})}),
        "a text": RecordDict({KEY: ConfigRecord({KEY: "raw"})}),
        "a bool": RecordDict({KEY: ConfigRecord({KEY: True})}),
        "a number": RecordDict({KEY: ConfigRecord({KEY: 7})}),
        "a list": RecordDict({KEY: ConfigRecord({KEY: [raw]})}),
        "no bytes": RecordDict({KEY: ConfigRecord({KEY: b""})}),
    }


@pytest.mark.parametrize("way", odd_contents())
def test_a_message_that_lies_otherwise_is_malformed(way: str) -> None:
    with pytest.raises(Malformed):
        unpack(Answer, odd_contents()[way])
    assert payload(odd_contents()[way]) >= 0


@pytest.mark.parametrize("counts", ["", "[]", "{", '{"a": "b"}', '{"a": true}', '{"a": -1}', "1", '"a"'])
def test_counts_that_are_no_table_are_none(counts: str) -> None:
    told = Introduction(0, 1, 5, "fo", b"", counts, "", "")
    assert told.held_counts() == {}
    assert replace(told, counts='{"web": 3}').held_counts() == {"web": 3}
