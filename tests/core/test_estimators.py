"""A slope is the directional derivative, and the estimate the gradient in the mean; how far off, its order tells."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import (
    EPSILON,
    KINDS,
    MODELS,
    SEEDS,
    SMOOTH,
    Loss,
    Pooled,
    ids_of,
    padded_documents,
    randomised,
    relative,
    smooth,
    trained,
    two_point,
)
from torch import Tensor, nn

from zofed.core import directions, estimators, kinds, metrics, perturbed
from zofed.core.directions import direction
from zofed.core.estimators import FiniteDifference, Parameters, Points
from zofed.core.kinds import Kind
from zofed.core.measure import Measure

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.bits
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "plain"])
def test_slopes_are_the_directional_derivatives(name: str, kind: Kind) -> None:
    model, loss = MODELS[name]()
    model.double()  # in float32 the last bit of the losses alone is a thousandth of these slopes
    parameters = trained(model, "full")
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    exact = [
        sum(
            float((gradient.double() * direction(kind, seed, key, gradient.shape)).sum()) * kinds.unit(kind)
            for key, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        )
        for seed in SEEDS
    ]
    estimate = two_point(loss, parameters, kind, SEEDS, EPSILON, 4)
    scale = math.sqrt(sum(value**2 for value in exact) / len(exact))
    assert estimate.slopes == pytest.approx(exact, abs=(1e-3 + 4 * estimate.rounding) * scale)
    assert estimate.rounding < 1e-3  # transformers sums the loss of a language model in float32
    assert estimate.forward_passes == 2 * len(SEEDS)
    with torch.no_grad():
        assert estimate.loss == pytest.approx(float(loss()), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slope_is_positive_where_the_loss_rises_along_the_direction(kind: Kind) -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    uphill, other = (direction(kind, seed, "w", (2, 3)) * kinds.unit(kind) for seed in (8, 9))
    estimate = two_point(lambda: (weight * uphill).sum() + 5, {"w": weight}, kind, [8, 9], 0.25, 4)
    assert estimate.slopes == pytest.approx((float(uphill.square().sum()), float((uphill * other).sum())), rel=1e-5)
    assert estimate.loss == pytest.approx(5.0)


# --- derivatives ---


def exact(loss: Loss, parameters: Parameters, kind: Kind, seeds: Sequence[int], sizes: Any = None) -> list[float]:
    """Directional derivatives from the gradient itself."""
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    return [
        math.fsum(
            float((gradient * direction(kind, seed, name, gradient.shape)).sum())
            * kinds.unit(kind)
            * (sizes or {}).get(name, 1.0)
            for name, gradient in zip(parameters, gradients, strict=True)
        )
        for seed in seeds
    ]


@pytest.mark.parametrize("kind", ["rank1", "rank4"])
@pytest.mark.parametrize("name", SMOOTH)
def test_exact_slopes_are_the_directional_derivatives(name: str, kind: Kind) -> None:
    model, loss = smooth(name)
    parameters = trained(model, "full")
    got = estimators.exact_slopes(loss, parameters, kind, SEEDS)
    wanted = exact(loss, parameters, kind, SEEDS)
    assert got == pytest.approx(wanted, rel=1e-9, abs=1e-9 * estimators.root_mean_square(wanted))


@pytest.mark.parametrize("name", SMOOTH)
def test_the_loss_along_directions_is_that_of_weights_moved_along_all_of_them(name: str) -> None:
    """Value and derivative, away from zero, where every product of two perturbations counts."""
    model, loss = smooth(name)
    parameters, kind = trained(model, "full"), "rank4"
    coefficients = torch.tensor([0.11, -0.07, 0.0, 0.05, -0.13], dtype=torch.float64, requires_grad=True)
    value = perturbed.along(loss, parameters, kind, SEEDS, coefficients)
    (slopes,) = torch.autograd.grad(value, coefficients)
    with torch.no_grad():
        assert float(perturbed.along(loss, parameters, kind, SEEDS, coefficients)) == pytest.approx(float(value))
    with estimators.weights_restored(parameters):
        with torch.no_grad():
            for key, parameter in parameters.items():
                for seed, coefficient in zip(SEEDS, coefficients.tolist(), strict=True):
                    z = direction(kind, seed, key, parameter.shape).to(parameter)
                    parameter += coefficient * kinds.unit(kind) * z
        assert value.item() == pytest.approx(loss().item(), rel=1e-12)
        wanted = exact(loss, parameters, kind, SEEDS)
        assert slopes.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-9 * estimators.root_mean_square(wanted))


@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_two_point_slopes_are_off_by_a_term_of_second_order(name: str) -> None:
    """Halving epsilon quarters the error."""
    model, loss = smooth(name)
    parameters = trained(model, "full")
    wanted = estimators.exact_slopes(loss, parameters, "rank1", SEEDS)
    errors = []
    for epsilon in (2**-10, 2**-11):
        slopes = two_point(loss, parameters, "rank1", SEEDS, epsilon, 4).slopes
        errors.append(estimators.root_mean_square([a - b for a, b in zip(slopes, wanted, strict=True)]))
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.02)
    assert errors[1] < 0.05 * estimators.root_mean_square(wanted)


# --- facts of the estimator, on a quadratic: four numbers in a matrix, one in a vector ---

HESSIAN = torch.tensor(
    [[3.0, 1, 0, 2, 1], [1, 2, 1, 0, 0], [0, 1, 4, 1, 0], [2, 0, 1, 5, 1], [1, 0, 0, 1, 2]], dtype=torch.float64
)
GRADIENT = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0], dtype=torch.float64)


def quadratic() -> tuple[Parameters, Loss]:
    """A loss with gradient GRADIENT at the weights, which are zero."""
    matrix, vector = (nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in ((2, 2), (1,)))

    def loss() -> Tensor:
        weights = torch.cat([matrix.flatten(), vector])
        return weights @ GRADIENT + weights @ HESSIAN @ weights / 2 + 7

    return {"matrix": matrix, "vector": vector}, loss


def flat_direction(kind: Kind, seed: int) -> Tensor:
    drawn = [direction(kind, seed, name, shape).flatten() for name, shape in (("matrix", (2, 2)), ("vector", (1,)))]
    return torch.cat(drawn).double() * kinds.unit(kind)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_one_sided_slope_is_off_by_half_a_step_of_curvature_and_centring_takes_its_mean(
    kind: Kind, batched: bool
) -> None:
    parameters, loss = quadratic()
    how = FiniteDifference(kind, 0.25, "one-sided", 3)
    z = [flat_direction(kind, seed) for seed in range(8)]
    raw = [float(GRADIENT @ one + 0.25 / 2 * (one @ HESSIAN @ one)) for one in z]
    alone = [how.slopes(loss, parameters, [seed], batched=batched).slopes[0] for seed in range(8)]
    assert alone == pytest.approx(raw, rel=1e-12)  # with one direction there is no mean to take
    together = how.slopes(loss, parameters, range(8), batched=batched)
    assert together.slopes == pytest.approx([slope - statistics.fmean(raw) for slope in raw], rel=1e-11)
    assert math.fsum(together.slopes) == pytest.approx(0.0, abs=1e-12)
    assert together.loss == 7.0
    two_sided = FiniteDifference(kind, 0.25, "two-point", 3).slopes(loss, parameters, range(8), batched=batched)
    assert two_sided.slopes == pytest.approx([float(GRADIENT @ one) for one in z], rel=1e-12)
    assert two_sided.loss == pytest.approx(7 + 0.25**2 / 2 * statistics.fmean(float(o @ HESSIAN @ o) for o in z))


@pytest.mark.slow
@pytest.mark.parametrize("points", ["two-point", "one-sided"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_the_gradient_in_the_mean(kind: Kind, points: Points) -> None:
    """Mean of many estimates of two queries each, within 4.5 standard errors; centring would halve it unheeded."""
    parameters, loss = quadratic()
    how = FiniteDifference(kind, 0.5, points)
    groups = [[directions.derive_seed("test-unbiased", group, query) for query in range(2)] for group in range(350)]
    found = []
    for seeds in groups:
        slopes = how.slopes(loss, parameters, seeds).slopes
        total = sum(slope * flat_direction(kind, seed) for slope, seed in zip(slopes, seeds, strict=True))
        found.append(total / estimators.degrees_of_freedom(points, 2))
    estimates = torch.stack(found)
    estimates = torch.cat([estimates, estimates @ GRADIENT.unsqueeze(1)], dim=1)  # each entry, and the length
    errors = estimates.std(0) / math.sqrt(len(estimates))
    wanted = torch.cat([GRADIENT, (GRADIENT @ GRADIENT).unsqueeze(0)])
    assert float(((estimates.mean(0) - wanted) / errors).abs().max()) < 4.5
    assert float(errors[-1] / wanted[-1]) < 0.5 / 4.5  # half the gradient, or twice, would be seen


def test_degrees_of_freedom_and_passes() -> None:
    assert [estimators.degrees_of_freedom("two-point", n) for n in (1, 2, 9)] == [1, 2, 9]
    assert [estimators.degrees_of_freedom("one-sided", n) for n in (1, 2, 9)] == [1, 1, 8]
    assert [estimators.forward_passes("two-point", n) for n in (1, 2, 9)] == [2, 4, 18]
    assert [estimators.forward_passes("one-sided", n) for n in (1, 2, 9)] == [2, 3, 10]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("points", ["two-point", "one-sided"])
def test_the_passes_told_are_those_that_ran(points: Points, batched: bool) -> None:
    parameters, loss = quadratic()
    calls = 0

    def counted() -> Tensor:
        nonlocal calls
        calls += 1
        return loss()

    estimate = FiniteDifference("rank1", 0.1, points, 1).slopes(counted, parameters, [1, 2, 3], batched=batched)
    assert estimate.forward_passes == calls == estimators.forward_passes(points, 3)


@pytest.mark.parametrize("batched", [True, False])
def test_roughness_is_the_spread_of_losses_about_a_smooth_curve(batched: bool) -> None:
    weight = nn.Parameter(torch.ones(20, 20, dtype=torch.float64))

    def smooth_loss() -> Tensor:
        return (weight.sum(1) ** 2).sum()

    def stepped() -> Tensor:
        return (smooth_loss() / grid).round() * grid

    how, grid = FiniteDifference("rank1", 0.01), 2.0**-7
    found = [how.measured_roughness(stepped, {"w": weight}, seed, None, batched=batched) for seed in range(12)]
    assert statistics.mean(found) == pytest.approx(grid / math.sqrt(12), rel=0.25)
    assert how.measured_roughness(smooth_loss, {"w": weight}, 1, None, batched=batched) < 1e-3 * grid


def test_slopes_of_passes_in_16_bits_count_what_these_round_away() -> None:
    model, loss = MODELS["llama"]()
    parameters, ids = trained(model, "norms"), ids_of((2, 9), 53)

    def coarse() -> Tensor:
        return metrics.loss_of(model, {"input_ids": ids, "labels": ids}, "bfloat16")

    exact = estimators.exact_slopes(loss, parameters, "rank1", SEEDS)
    size = estimators.root_mean_square(exact)
    measure = Measure(model, parameters, "rank1")
    for epsilon in (0.01, 0.1):
        sharp = measure.slopes(loss, SEEDS, epsilon, 4)
        found = Measure(model, parameters, "rank1").slopes(coarse, SEEDS, epsilon, 4)
        missed = estimators.root_mean_square([a - b for a, b in zip(found.slopes, sharp.slopes, strict=True)]) / size
        assert missed / 8 < found.rounding < 8 * missed
        assert found.rounding > 20 * sharp.rounding


@pytest.mark.parametrize("points", ["two-point", "one-sided"])
def test_rounding_tells_how_much_of_a_slope_may_be_noise(points: Points) -> None:
    """Its share is eps * loss / (step * slope), whatever the step."""
    parameters, loss = quadratic()
    for epsilon in (2.0**-2, 2.0**-20, 2.0**-40):
        estimate = FiniteDifference("rank1", epsilon, points).slopes(loss, parameters, range(6))
        step = epsilon * (2 if points == "two-point" else 1)
        share = 2.0**-52 * 7 / step / estimators.root_mean_square(estimate.slopes)
        assert estimate.rounding == pytest.approx(share, rel=0.15)
    flat = FiniteDifference("rank1", 0.1, points).slopes(lambda: loss() * 0 + 3, parameters, range(6))
    assert flat.rounding == math.inf
    assert flat.slopes == (0.0,) * 6


# --- sizes ---


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_multiply_the_directions(kind: Kind) -> None:
    model, loss = smooth("plain")
    parameters = trained(model, "full")
    sizes = {name: 2.0**-index for index, name in enumerate(parameters) if index % 3}
    wanted = exact(loss, parameters, kind, SEEDS, sizes)
    for batched in (True, False):
        slopes = FiniteDifference(kind, 2**-12, sizes=sizes).slopes(loss, parameters, SEEDS, batched=batched).slopes
        assert slopes == pytest.approx(wanted, abs=1e-5 * estimators.root_mean_square(wanted))
    if kinds.terms(kind):
        assert estimators.exact_slopes(loss, parameters, kind, SEEDS, sizes) == pytest.approx(wanted, rel=1e-9)
        got = perturbed.losses(loss, parameters, kind, SEEDS, (0.125,), 4, sizes)
        assert relative(got, estimators.materialised_losses(loss, parameters, kind, SEEDS, (0.125,), sizes)) < 1e-12


def test_sizes_are_powers_of_two_near_the_root_mean_square() -> None:
    tensors = {"a": torch.full((3, 4), 0.26), "b": torch.zeros(5), "c": torch.tensor(-1.0), "d": torch.ones(2) * 40}
    assert estimators.size_exponents(tensors) == {"a": -2, "b": -7, "c": 0, "d": 5}


def test_one_sided_slopes_of_examples_start_from_each_querys_own_loss() -> None:
    model = randomised(Pooled(), 0.5).double()
    examples, parameters = padded_documents(4, 23), trained(model, "full")

    def loss(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    how = FiniteDifference("rank1", 2**-20, "one-sided", 3)
    raw = []
    for query in range(4):
        own = {name: tensor[query] for name, tensor in examples.items()}
        raw += exact(lambda own=own: loss(own), parameters, "rank1", [query])
    for batched in (True, False):
        estimate = how.slopes(loss, parameters, range(4), examples, batched=batched)
        assert estimate.slopes == pytest.approx([slope - statistics.fmean(raw) for slope in raw], rel=1e-3, abs=1e-4)
        assert estimate.forward_passes == 8
