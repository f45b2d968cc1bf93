"""What an answer is refused for, and what a plan brings to a client."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from exchanges import DIGEST, GIVEN, GOOD, HISTORY, LENGTHS, PLAN, UPDATE, history, replica_of, standing_at, update_of
from safetensors.torch import save
from torch import Tensor

from zofed.core import gradient_codec
from zofed.core.digests import tensors_digest
from zofed.core.journal import genesis_chain
from zofed.core.replica import catch_up
from zofed.federated.protocol import Reason, check, check_update, plan_for

EPSILON = 3e-4


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
