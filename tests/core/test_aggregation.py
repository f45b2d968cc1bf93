"""What a merge of answers adds up to, and how little those who lie can move it."""

import math
import random
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from exchanges import exact, measured
from hypothesis import given, settings
from hypothesis import strategies as st

from zofed.core import aggregation, records
from zofed.core.aggregation import Measured

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
