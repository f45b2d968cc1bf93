"""A guide shapes directions as the design says, slopes along them give the right record, and nothing else moves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import fewest, sign_stream
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.core import directions, kinds, records
from zofed.core.digests import named_parameters, tensors_digest
from zofed.core.directions import tensor_id
from zofed.core.genesis import make_genesis
from zofed.core.journal import link
from zofed.core.optimizers import Optimizer
from zofed.core.records import Guided, Seeded
from zofed.core.replica import Replica, guided_estimate
from zofed.training import guided
from zofed.training.guides import Guidance, Shape, guidance, on_grid, threshold_of

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"scalar": (), "vector": (11,), "matrix": (7, 5), "cube": (3, 2, 4)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())
KINDS = ("hybrid", "hybrid-rank1", "cosine")
PLAIN = Shape("hybrid-rank1", "projected", False, 0.9, 0.5, 1.0, 0.5, 8)


def replica_of(kind: str = "rank1", value: float = 0.0, **changes: Any) -> Replica:
    """A module of tensors of zero to three dimensions, all entries `value`, moved by SGD."""
    model = nn.Module()
    for name, shape in SHAPES.items():
        model.register_parameter(name, nn.Parameter(torch.full(shape, value)))
    arguments = {"seed": 5, "kind": kind, "optimizer": Optimizer("sgd")} | changes
    return Replica(model, make_genesis(model, {"name": "test"}, named_parameters(model), **arguments))


def spread_out(flat: NDArray[np.float64]) -> dict[str, Tensor]:
    """A vector of `SIZE` entries as the tensors of the module."""
    parts = np.split(flat, np.cumsum([math.prod(shape) for shape in SHAPES.values()])[:-1])
    return {
        name: torch.tensor(part, dtype=torch.float32).reshape(shape)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def flat(tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
    return np.concatenate([tensors[name].detach().reshape(-1).to(torch.float64).numpy() for name in SHAPES])


def drawn(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=SIZE)


def linear(replica: Replica, gradient: NDArray[np.float64]) -> Callable[[], Tensor]:
    """A loss with this gradient everywhere."""
    own = spread_out(gradient)
    return lambda: torch.stack([(own[name] * parameter).sum() for name, parameter in replica.parameters.items()]).sum()


def noise_of(replica: Replica, seeds: list[int]) -> NDArray[np.float64]:
    unit = kinds.unit(replica.kind)
    return np.stack(
        [
            unit * flat({name: directions.direction(replica.kind, seed, name, shape) for name, shape in SHAPES.items()})
            for seed in seeds
        ]
    )


def estimate_of(replica: Replica, record: Guided, guide: dict[str, Tensor]) -> NDArray[np.float64]:
    """What the record moves weights that are zero by, with a rate of 1 and the sign turned."""
    assert record.rate == 1.0 and not any(parameter.any() for parameter in replica.parameters.values())
    replica.apply(link(replica.head, record), guide)
    found = -flat(replica.parameters)
    for parameter in replica.parameters.values():
        parameter.detach().zero_()
    return found


def asked(
    replica: Replica,
    shape: Shape,
    guide: dict[str, Tensor],
    gradient: NDArray[np.float64],
    queries: int,
    round_: int = 0,
) -> tuple[guided.Found, Guidance, list[int]]:
    round_ = round_ or replica.round + 1
    seeds = directions.direction_seeds(5, round_, 0, queries)
    return *guided.guided(replica, linear(replica, gradient), guide, shape, seeds, round_=round_, rate=1.0), seeds


# --- the guide ---


@given(
    st.lists(st.lists(st.integers(-40, 40), min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from([0.0625, 0.25, 0.5, 0.75, 0.8125, 0.984375]),
    st.sampled_from([1.0, 2.0**-60, 2.0**-140, 2.0**40]),
)
@settings(max_examples=150, deadline=None, database=None)
def test_the_threshold_keeps_the_fewest_coordinates(rows: list[list[int]], energy: float, unit: float) -> None:
    if not any(map(any, rows)):
        return
    guide = {str(index): torch.tensor(row, dtype=torch.float64).mul(unit).float() for index, row in enumerate(rows)}
    assert threshold_of(guide, energy) == fewest([value * unit for row in rows for value in row], energy)


def test_a_share_that_is_just_reached_takes_no_further_coordinate() -> None:
    """841^2 = 840^2 + 41^2, and the two large ones lie in one bin of the histogram."""
    assert threshold_of({"a": torch.tensor([41.0, 840.0, -841.0])}, 0.5) == 841.0


def test_the_threshold_of_a_large_guide_lies_where_sorting_puts_it() -> None:
    tensors = {name: torch.randn(300, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("ab")}
    for energy in (0.01, 0.81, 0.999):
        found = threshold_of(tensors, energy)
        values = torch.cat([*tensors.values()]).double().square().sort(descending=True).values
        count = int((torch.cat([*tensors.values()]).abs() >= found).sum())
        assert values[:count].sum() >= energy * values.sum() > values[: count - 1].sum()


def test_a_guide_lies_on_a_grid_of_15_bits() -> None:
    gradient = {"a": torch.randn(500, generator=torch.Generator().manual_seed(1)) * 1e-3, "b": torch.zeros(3)}
    guide = on_grid(gradient)
    peak = float(gradient["a"].abs().max())
    step = 2.0 ** (math.frexp(peak)[1] - 15)
    integers = guide["a"].double() / step
    assert torch.equal(integers, integers.round()) and 2**14 <= integers.abs().max() <= 2**15
    assert (guide["a"] - gradient["a"]).abs().max() <= step / 2
    assert torch.equal(guide["b"], gradient["b"])
    assert all(torch.equal(again, guide[name]) for name, again in on_grid(guide).items())


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_gradient_that_shapes_nothing_is_refused(value: float) -> None:
    with pytest.raises((ValueError, UserError), match=r"not finite|zero everywhere"):
        on_grid({"a": torch.tensor([0.0, value])})


@pytest.mark.first(2)
@pytest.mark.parametrize("kind", [*KINDS, "guide-only", "line"])
def test_what_is_logged_of_a_guide_is_so(kind: str) -> None:
    guide = on_grid(spread_out(drawn(1)))
    shape = replace(PLAIN, kind=kind, noise_scale=0.75, cosine_target=0.6)
    own, g = guidance(guide, shape), flat(guide)
    keeps = np.abs(g) >= (0.0 if kind == "cosine" else fewest(g.tolist(), 0.36))
    kept = g * keeps
    assert own.kept_count == keeps.sum() and own.size == SIZE
    facts = own.facts
    assert facts["share_kept"] == keeps.mean()
    assert facts["cosine_kept"] == pytest.approx(kept @ g / math.sqrt((kept @ kept) * (g @ g)), rel=1e-12)
    assert facts["cosine_kept"] >= 0.6
    replica = replica_of("rademacher")
    noise = noise_of(replica, list(range(400))) * (~keeps if kind == "hybrid" else 1)
    along = kept + own.noise * noise * (kind in KINDS)
    cosines = along @ g / np.sqrt((along**2).sum(1) * (g @ g))
    error = cosines.std() / 20
    assert abs(facts["cosine_direction"] - cosines.mean()) <= 4 * error + 0.02
    if kind == "cosine":
        assert facts["cosine_direction"] == pytest.approx(0.6, rel=1e-12)
    if kind in ("hybrid", "hybrid-rank1"):
        assert own.noise == pytest.approx(0.75 * math.sqrt((g @ g) / SIZE), rel=1e-12)


# --- weighing ---


@pytest.mark.parametrize("blend", [False, True])
@pytest.mark.parametrize("directions_", ["rank1", "rank4", "rademacher", "gaussian"])
@pytest.mark.parametrize("weighting", ["raw", "projected", "unbiased"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_what_all_directions_written_out_give(
    kind: str, weighting: str, directions_: str, blend: bool
) -> None:
    replica = replica_of(directions_)
    guide, gradient = on_grid(spread_out(drawn(2))), drawn(3)
    shape = replace(PLAIN, kind=kind, weighting=weighting, blend=blend, noise_scale=0.7, cosine_target=0.8)
    found, _, seeds = asked(replica, shape, guide, gradient, 3)
    g = flat(guide)
    expected = reference.guided(kind, weighting, g, noise_of(replica, seeds), gradient, 0.7, 0.8)
    expected = (expected + g) / 2 if blend else expected
    assert found.forward_passes == 6
    assert estimate_of(replica, found.record, guide) == pytest.approx(
        expected, rel=2e-4, abs=2e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("directions_", ["rank1", "rademacher"])
def test_one_projected_slope_is_the_answer_of_least_squares(kind: str, directions_: str) -> None:
    """Of all multiples of the direction the one nearest to the gradient."""
    replica = replica_of(directions_)
    guide, gradient = on_grid(spread_out(drawn(4))), drawn(5)
    found, own, seeds = asked(replica, replace(PLAIN, kind=kind), guide, gradient, 1)
    keeps = np.abs(flat(guide)) >= own.threshold
    noise = noise_of(replica, seeds)[0]
    v = flat(guide) * keeps + own.noise * (noise * ~keeps if kind == "hybrid" else noise)
    nearest = np.linalg.lstsq(v[:, None], gradient, rcond=None)[0][0] * v
    estimate = estimate_of(replica, found.record, guide)
    assert abs(np.corrcoef(estimate, v)[0, 1]) == pytest.approx(1.0, abs=1e-6)
    square = own.direction_square if kind != "hybrid" else v @ v
    assert own.direction_square == pytest.approx(square)
    assert estimate * own.direction_square / (v @ v) == pytest.approx(nearest, rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_unbiased_means_the_projection_on_the_guide_and_all_the_rest(kind: str, queries: int) -> None:
    replica = replica_of("rank1")
    guide, gradient = on_grid(spread_out(drawn(6))), drawn(7)
    shape = replace(PLAIN, kind=kind, weighting="unbiased", cosine_target=0.7)
    found = []
    for round_ in range(1, 81 if kind == "hybrid" else 151):
        step, own, _ = asked(replica, shape, guide, gradient, queries, round_)
        part = step.record.seeded
        noise = {
            name: directions.weighted_sum("rank1", part.seeds(5), part.coefficients, name, tensor.shape).mul_(
                math.ldexp(1 / part.divisor, part.exponent)
            )
            for name, tensor in guide.items()
        }
        found.append(flat({name: guided_estimate(step.record, g, noise[name]) for name, g in guide.items()}))
    estimates, g = np.stack(found), flat(guide)
    keeps = np.abs(g) >= own.threshold
    kept = g * keeps
    rest = gradient - (gradient @ g) / (g @ g) * g if kind == "cosine" else gradient * ~keeps
    on, off = (gradient @ kept) / (kept @ kept) * kept, rest
    error = estimates.std(0) / math.sqrt(len(estimates))
    assert (np.abs(estimates.mean(0) - on - off) < 4.5 * error + 1e-3).all()
    for part in (on, off):  # with the power of a sum over all coordinates
        shares = estimates @ part / (part @ part)
        assert abs(shares.mean() - 1.0) < 4 * shares.std() / math.sqrt(len(shares)) + 1e-3
        assert shares.std() / math.sqrt(len(shares)) < 0.3


def test_guide_only_moves_along_the_kept_part_alone() -> None:
    replica = replica_of()
    guide = on_grid(spread_out(drawn(8)))
    found, own, _ = asked(replica, replace(PLAIN, kind="guide-only"), guide, drawn(9), 3)
    assert (found.forward_passes, found.record.seeded.coefficients) == (0, ()) and math.isnan(found.loss)
    g = flat(guide)
    kept = g * (np.abs(g) >= own.threshold)
    assert (estimate_of(replica, found.record, guide) == kept).all() and 0 < own.kept_count < SIZE
    found, *_ = asked(replica, replace(PLAIN, kind="guide-only", blend=True), guide, drawn(9), 3)
    assert (estimate_of(replica, found.record, guide) == (kept + g) / 2).all()


@pytest.mark.parametrize("exponents", [{}, {"vector": -2, "matrix": 1}])
def test_line_is_the_slope_along_the_guide_and_a_plain_estimate(exponents: dict[str, int]) -> None:
    replica = replica_of(size_exponents=exponents)
    guide, gradient = on_grid(spread_out(drawn(10))), drawn(11)
    found, own, seeds = asked(replica, replace(PLAIN, kind="line"), guide, gradient, 3)
    g, noise = flat(guide), noise_of(replica, seeds)
    kept = g * (np.abs(g) >= own.threshold)
    expected = (gradient @ kept) / (kept @ kept) * kept + (noise @ gradient) @ noise / 3
    assert found.forward_passes == 2 * 3 + 2
    assert estimate_of(replica, found.record, guide) == pytest.approx(expected, rel=1e-3, abs=1e-4)


# --- the weights ---


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "line", "guide-only"])
def test_asking_leaves_every_bit_of_the_weights(kind: str, batched: bool) -> None:
    replica = replica_of("rank1" if batched else "gaussian", value=1 / 3)
    guide = on_grid(spread_out(drawn(12)))
    digest = replica.digest()
    asked(replica, replace(PLAIN, kind=kind, step=1e-3), guide, drawn(13), 3)
    assert replica.digest() == digest
    if kind == "guide-only":
        return
    calls = 0
    plain = linear(replica, drawn(13))

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise KeyError("in the middle")
        return plain()

    with pytest.raises(KeyError, match="in the middle"):
        guided.guided(replica, failing, guide, replace(PLAIN, kind=kind), [1, 2, 3], round_=1, rate=1.0)
    assert replica.digest() == digest

    def nan() -> Tensor:
        return plain() * math.nan

    with pytest.raises(ValueError, match=r"finite|nan"):
        guided.guided(replica, nan, guide, replace(PLAIN, kind=kind), [1, 2, 3], round_=1, rate=1.0)
    assert replica.digest() == digest and replica.round == 0


def test_each_query_sees_its_own_examples() -> None:
    replica = replica_of()
    guide = on_grid(spread_out(drawn(14)))
    gradients = [drawn(20 + query) for query in range(3)]
    batch = {name: torch.stack([spread_out(g)[name] for g in gradients]) for name in SHAPES}

    def loss(own: dict[str, Tensor]) -> Tensor:
        return torch.stack([(own[name] * parameter).sum() for name, parameter in replica.parameters.items()]).sum()

    seeds = directions.direction_seeds(5, 1, 0, 3)
    for kind in ("hybrid", "hybrid-rank1"):
        shape = replace(PLAIN, kind=kind, weighting="raw")
        found, own = guided.guided(replica, loss, guide, shape, seeds, round_=1, rate=1.0, examples=batch)
        keeps = np.abs(flat(guide)) >= own.threshold
        noise = noise_of(replica, seeds) * (~keeps if kind == "hybrid" else 1)
        along = flat(guide) * keeps + own.noise * noise
        slopes = [float(v @ g) for v, g in zip(along, gradients, strict=True)]
        part = found.record.seeded
        ratio = [coefficient * 2.0**part.exponent for coefficient in part.coefficients]
        assert ratio == pytest.approx(slopes, rel=1e-3, abs=1e-3)


# --- records ---

EXAMPLE = Guided(Seeded(3, 0.25, (0,), 2, (5, -(2**18) + 1), -12, 1.5), bytes(range(32)), 0.125, -0.75, 0.5, True)


def test_a_guided_record_moves_by_its_reference_twin_bit_for_bit() -> None:
    for masked in (False, True):
        replica = replica_of(value=0.3)
        guide = on_grid(spread_out(drawn(15)))
        part = Seeded(1, 0.3, (0,), 2, (99991, -123457), -17, 1.7)
        threshold = float(guide["matrix"].abs().flatten().sort().values[20])
        record = Guided(part, bytes.fromhex(tensors_digest(guide)), threshold, 0.7, 0.4, masked)
        replica.apply(link(replica.head, record), guide)
        one = np.float32
        for name, shape in SHAPES.items():
            size = math.prod(shape)
            g = guide[name].reshape(-1).numpy()
            keeps = np.abs(g) >= one(threshold)
            rows, columns = (shape[0], size // shape[0]) if len(shape) > 1 else (size, 1)
            total = [0] * size
            for seed, coefficient in zip(part.seeds(5), part.coefficients, strict=True):
                a = sign_stream(seed, tensor_id(name), 0, rows)
                b = sign_stream(seed, tensor_id(name), 1, columns) if len(shape) > 1 else [1]
                total = [t + coefficient * a[i // columns] * b[i % columns] for i, t in enumerate(total)]
            noise = np.array(total, dtype=one) * one(math.ldexp(1 / 1.7, -17))
            noise = noise * ~keeps if masked else noise
            estimate = (g * keeps) * one(0.7) + g * one(0.4) + noise
            expected = one(0.3) - estimate * one(0.3)
            assert np.array_equal(replica.parameters[name].detach().reshape(-1).numpy(), expected.astype(one)), name


def test_another_guide_than_the_records_own_is_refused() -> None:
    replica = replica_of()
    guide = on_grid(spread_out(drawn(16)))
    record = replace(EXAMPLE, seeded=replace(EXAMPLE.seeded, round=1), guide=bytes.fromhex(tensors_digest(guide)))
    before = replica.digest()
    with pytest.raises(UserError, match="not kept"):
        replica.apply(link(replica.head, record))
    guide["vector"][3] += 2.0**-10
    with pytest.raises(UserError, match="not the one round 1"):
        replica.apply(link(replica.head, record), guide)
    assert (replica.digest(), replica.round) == (before, 0)


@given(
    st.builds(
        Guided,
        st.builds(
            lambda coefficients, rate, exponent: Seeded(7, rate, (0,), len(coefficients), coefficients, exponent, 3.0),
            st.lists(st.integers(-(2**18) + 1, 2**18 - 1), max_size=5).map(tuple),
            st.floats(0, 10),
            st.integers(-450, 100),
        ),
        st.binary(min_size=32, max_size=32),
        st.floats(0, 1e30),
        st.floats(-1e30, 1e30),
        st.floats(-1e30, 1e30),
        st.booleans(),
    )
)
@settings(max_examples=100, deadline=None, database=None)
def test_a_guided_record_comes_back_as_it_was_and_no_shorter(record: Guided) -> None:
    body = records.encode(record)
    assert repr(records.decode(body)) == repr(record)
    for length in range(len(body)):
        with pytest.raises(ValueError):
            records.decode(body[:length])
    with pytest.raises(ValueError):
        records.decode(body + b"\0")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, database=None)
def test_any_bytes_are_a_guided_record_or_refused(tail: bytes) -> None:
    body = records.encode(EXAMPLE)[:9] + tail
    try:
        found = records.decode(body)
    except ValueError:
        return
    assert records.encode(found) == body


@pytest.mark.parametrize("field", ["threshold", "kept", "whole"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_guided_record_with_weights_that_are_no_numbers_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        records.decode(records.encode(replace(EXAMPLE, **{field: value})))
