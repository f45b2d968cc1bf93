"""The record of a round follows the settings, the answers and the replica."""

from dataclasses import replace
from typing import Any, get_args

import pytest
from exchanges import exact, measured, replica_of, standing_at, update_of

from zofed import config
from zofed.core import aggregation, records
from zofed.core.digests import tensors_digest
from zofed.core.estimators import Points
from zofed.core.journal import link
from zofed.core.records import Spread
from zofed.training import schedules, step_records


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
