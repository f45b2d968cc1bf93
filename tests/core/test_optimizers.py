"""Every rule must follow its paper, go on from its saved state as if nothing had happened, and make progress."""

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from zofed.core import directions, optimizers
from zofed.core.optimizers import Corrections, Optimizer, stochastic_round

RATE = 0.05
DECAY = 0.1
ALL_NAMES = frozenset({"w", "other", "h.0/odd/name.weight"})
RULES: dict[str, tuple[Any, ...]] = {
    "sgd": ("sgd", 0.0, 0.0),
    "momentum": ("sgd", 0.9, 0.0),
    "decay": ("sgd", 0.0, DECAY),
    "momentum and decay": ("sgd", 0.9, DECAY),
    "adamw": ("adamw", 0.0, 0.0),
    "adamw with decay": ("adamw", 0.0, DECAY),
    "mudamw": ("mudamw", 0.0, 0.0),
    "cautious mudamw with decay": ("mudamw", 0.0, DECAY, True),
    "orthogonal mudamw": ("mudamw", 0.0, 0.0, False, ALL_NAMES),
    "orthogonal cautious mudamw with decay": ("mudamw", 0.0, DECAY, True, ALL_NAMES),
}
OF_THE_PAPERS = ("sgd", "momentum", "decay", "momentum and decay", "adamw", "adamw with decay")


def made(rule: str) -> Optimizer:
    return Optimizer(*RULES[rule])


def drawn(count: int, shape: tuple[int, ...] = (7, 5), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (1e-3, 1.0, 30.0)  # gradients of unlike size, so that no step hides behind another
    return [torch.randn(shape, generator=generator) * sizes[index % 3] for index in range(count)]


def step(
    optimizer: Optimizer,
    corrections: Corrections,
    weight: Tensor,
    gradient: Tensor,
    name: str = "w",
    size: float = 1.0,
) -> Tensor:
    """The weight after the whole of it has moved, as a new tensor; the gradient is left as it was."""
    moved = weight.clone()
    optimizer.step(name, moved, gradient.clone(), optimizer.moments(name, weight), RATE, corrections, size)
    return moved


def path(
    optimizer: Optimizer, weight: Tensor, gradients: Sequence[Tensor], name: str = "w", size: float = 1.0
) -> list[Tensor]:
    """Weights after each step."""
    weights = []
    for gradient in gradients:
        weight = step(optimizer, optimizer.begin_step(), weight, gradient, name, size)
        weights.append(weight)
    return weights


@pytest.mark.parametrize("rule", OF_THE_PAPERS)
def test_twenty_random_steps_follow_the_paper(rule: str) -> None:
    start, *gradients = drawn(21)
    name, momentum, decay = RULES[rule]
    arrays = [gradient.numpy() for gradient in gradients]
    if name == "sgd":
        expected = reference.sgd(start.numpy(), arrays, RATE, momentum, decay)
    else:
        expected = reference.adamw(start.numpy(), arrays, RATE, decay)
    found = path(made(rule), start, gradients)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == torch.float32
        if name == "sgd":
            assert np.array_equal(ours.numpy(), theirs), f"step {index}"
        else:
            assert np.abs(ours.numpy() - theirs).max() < 1e-6, f"step {index}"


@pytest.mark.parametrize("count", [1, 7, 100_000])
@pytest.mark.parametrize("name", ["adamw", "mudamw"])
def test_adams_step_is_made_of_correctly_rounded_operations(name: Any, count: int) -> None:
    """Bit for bit numpy's, whose square root is the processor's own. That of torch is MKL's, and off in many a bit."""
    start, *gradients = drawn(6, (count,))
    one, weight = np.float32, start.numpy()
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate((gradient.numpy() * one(1e-3) for gradient in gradients), start=1):
        powers = [prod([beta] * t) for beta in (0.9, 0.999)]
        mean = mean * one(0.9) + gradient * one(1 - 0.9)
        square = square * one(0.999) + gradient * gradient * one(1 - 0.999)
        below = np.sqrt(square * one(1 / (1 - powers[1]))) + one(1e-8 if name == "adamw" else 1e-6)
        weight = weight * one(1 - RATE * DECAY) - mean * one(1 / (1 - powers[0])) / below * one(RATE)
    found = path(Optimizer(name, 0.0, DECAY), start, [gradient * 1e-3 for gradient in gradients])[-1]
    assert np.array_equal(found.numpy(), weight)


def test_a_root_is_correctly_rounded_at_every_size() -> None:
    """Among them the squares nearest to where two float32 meet, above and below, and subnormal numbers."""
    middles = (2 * np.arange(2**23, 2**23 + 40_000, dtype=np.int64) + 1).astype(np.float64) ** 2
    near = np.concatenate([np.nextafter(middles.astype(np.float32), np.float32(limit)) for limit in (0, np.inf)])
    even = np.linspace(1, 4, 50_000, dtype=np.float32)
    values = np.concatenate([near, even, even * np.float32(1e-39), np.array([0.0, 1e-45, 3.4e38], dtype=np.float32)])
    found = optimizers._root(torch.from_numpy(values)).numpy()
    assert np.array_equal(found, np.sqrt(values))
    for value in (*near[::1999], *values[-50::7]):
        exact, (root,) = Fraction(float(value)), np.sqrt(value[None])
        low, high = (Fraction(float(np.nextafter(root, np.float32(limit)))) for limit in (-1, np.inf))
        here = Fraction(float(root))
        assert ((low + here) / 2) ** 2 <= exact <= ((here + high) / 2) ** 2 or value == 0


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("is_cautious", [False, True])
@pytest.mark.parametrize("is_orthogonal", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (6, 40)], ids=str)
def test_twenty_steps_of_mudamw_follow_its_twin(
    shape: tuple[int, ...], is_orthogonal: bool, is_cautious: bool, decay: float
) -> None:
    """To 1e-6 for weights of order 1, which float32 holds to 1e-7; measured: 1.6e-7 at most."""
    start, *gradients = drawn(21, shape)
    optimizer = Optimizer("mudamw", 0.0, decay, is_cautious, frozenset({"w"} if is_orthogonal else ()))
    arrays = [gradient.numpy() for gradient in gradients]
    expected = reference.mudamw(start.numpy(), arrays, RATE, decay, is_orthogonal, is_cautious)
    found = path(optimizer, start, gradients)
    errors = [np.abs(ours.numpy() - theirs).max() for ours, theirs in zip(found, expected, strict=True)]
    assert max(errors) < 1e-6


def test_only_named_matrices_are_orthogonalised_and_only_when_asked_cautiously() -> None:
    start, *gradients = drawn(4)
    orthogonal = Optimizer("mudamw", orthogonal=frozenset({"w"}))
    plain = path(Optimizer("mudamw"), start, gradients)[-1]
    assert torch.equal(path(orthogonal, start, gradients, "other")[-1], plain)
    assert not torch.equal(path(orthogonal, start, gradients, "w")[-1], plain)
    assert [orthogonal.needs_whole(name) for name in ("w", "other")] == [True, False]
    assert Optimizer("mudamw", cautious=True).needs_whole("other")
    assert not any(Optimizer(name, 0.9).needs_whole("w") for name in ("sgd", "adamw", "mudamw"))


def test_a_cautious_step_goes_down_the_gradient_or_nowhere() -> None:
    start, first, second = drawn(3)
    plain, cautious = Optimizer("mudamw"), Optimizer("mudamw", cautious=True)
    moves = []
    for optimizer in (plain, cautious):
        one, two = path(optimizer, start, [first, second])
        moves.append(one - two)
    disagrees = moves[0] * second < 0
    assert 0 < int(disagrees.sum()) < disagrees.numel()
    assert not moves[1][disagrees].any()
    kept = ~disagrees
    scale = start.numel() / (int(kept.sum()) + 1)
    assert torch.allclose(moves[1][kept], moves[0][kept] * scale, atol=1e-5)


def test_a_cautious_step_against_every_gradient_moves_nothing() -> None:
    optimizer = Optimizer("mudamw", cautious=True, orthogonal=frozenset({"w"}))
    start, gradient = torch.ones(3, 4), torch.ones(3, 4)
    (moved,) = path(optimizer, start, [gradient])
    assert torch.equal(path(optimizer, moved, [-1e-3 * gradient])[-1], moved)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "momentum and decay", "adamw", "adamw with decay", "mudamw"])
@pytest.mark.parametrize("at_once", [1, 3, 4])
def test_a_tensor_moves_to_the_same_bits_in_blocks_of_rows_and_whole(rule: str, at_once: int) -> None:
    start, *gradients = drawn(21)
    whole, pieces = made(rule), made(rule)
    expected = path(whole, start, gradients, size=0.5)[-1]
    weight = start.clone()
    for gradient in gradients:
        corrections, moments = pieces.begin_step(), pieces.moments("w", weight)
        for first in range(0, len(weight), at_once):
            some = slice(first, first + at_once)
            state = {name: moment[some] for name, moment in moments.items()}
            pieces.step("w", weight[some], gradient[some].clone(), state, RATE, corrections, 0.5)
    assert torch.equal(weight, expected)
    first, second = whole.state_dict(), pieces.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("rule", RULES)
def test_a_size_multiplies_the_step_and_not_the_decay(rule: str) -> None:
    start, *gradients = drawn(9)
    zero, decay = torch.zeros_like(start), RULES[rule][2]
    for size in (8.0, 2.0**-7):
        steps = path(made(rule), zero, gradients[:1])[0] * size  # from zero there is nothing to decay
        assert torch.equal(path(made(rule), zero, gradients[:1], size=size)[0], steps)
        (still,) = path(made(rule), start, [zero], size=size)
        assert torch.equal(still, start * (1.0 - RATE * decay) if decay else start)
    sized, plain = made(rule), made(rule)  # the moments know no size
    path(sized, start, gradients, size=4.0)
    path(plain, start, gradients)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in sized.state_dict().items())


def test_the_corrections_count_the_steps_begun_and_not_the_tensors() -> None:
    optimizer = Optimizer("adamw")
    for count in range(1, 6):
        first, second = optimizer.begin_step()
        assert (first, second) == pytest.approx((1 - 0.9**count, 1 - 0.999**count), rel=1e-12)
    assert optimizer.powers == pytest.approx([0.9**5, 0.999**5], rel=1e-12)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw", "adamw with decay"])  # torch's SGD couples its decay
def test_the_library_of_torch_moves_the_weights_alike(rule: str) -> None:
    start, *gradients = drawn(21)
    name, momentum, decay = RULES[rule]
    weight = torch.nn.Parameter(start.clone())
    torch_rule = (
        torch.optim.SGD([weight], RATE, momentum)
        if name == "sgd"
        else torch.optim.AdamW([weight], RATE, weight_decay=decay)
    )
    for gradient in gradients:
        weight.grad = gradient.clone()
        torch_rule.step()
    assert float((path(made(rule), start, gradients)[-1] - weight.detach()).abs().max()) < 1e-5


def test_the_first_adamw_step_has_the_size_of_the_rate() -> None:
    optimizer = Optimizer("adamw")
    moved = step(optimizer, optimizer.begin_step(), torch.zeros(3), torch.tensor([1e-3, -50.0, 7.0]))
    assert moved.tolist() == pytest.approx([-RATE, RATE, -RATE], rel=1e-4)


def test_weight_decay_alone_shrinks_the_weights() -> None:
    for rule in ("decay", "adamw with decay", "cautious mudamw with decay"):
        (moved,) = path(made(rule), torch.tensor([2.0, -4.0]), [torch.zeros(2)])
        assert moved.tolist() == pytest.approx([2.0 * (1 - RATE * 0.1), -4.0 * (1 - RATE * 0.1)])


@pytest.mark.parametrize("rule", RULES)
def test_a_step_moves_the_weight_in_place_and_keeps_hold_of_no_gradient(rule: str) -> None:
    start, first, second = drawn(3)
    optimizer, weight = made(rule), start.clone()
    for gradient in (first.clone(), second.clone()):
        moments = optimizer.moments("w", weight)
        optimizer.step("w", weight, gradient, moments, RATE, optimizer.begin_step())
        gradient.fill_(torch.nan)
    assert torch.equal(weight, path(made(rule), start, [first, second])[-1])


@pytest.mark.parametrize("rule", RULES)
def test_tensors_do_not_share_their_state(rule: str) -> None:
    start, *gradients = drawn(5)
    alone = path(made(rule), start, gradients)[-1]
    optimizer, weight, other = made(rule), start, torch.zeros(3, 2)
    for gradient in gradients:
        corrections = optimizer.begin_step()
        other = step(optimizer, corrections, other, torch.ones(3, 2), "other")
        weight = step(optimizer, corrections, weight, gradient)
    assert torch.equal(weight, alone)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_from_its_saved_state_bit_for_bit(rule: str) -> None:
    start, *gradients = drawn(21)
    name = "h.0/odd/name.weight"  # a slash in the name must not confuse the flat state
    whole = path(made(rule), start, gradients, name)
    first = made(rule)
    middle = path(first, start, gradients[:9], name)[-1]
    saved = {key: value.clone() for key, value in first.state_dict().items()}
    second = made(rule)
    second.load_state_dict(saved)
    assert torch.equal(path(second, middle, gradients[9:], name)[-1], whole[-1])
    assert set(second.state_dict()) == set(saved)
    for key, value in first.state_dict().items():
        assert torch.equal(value, saved[key]), "going on from a copy must leave the original's state alone"


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_of_a_quadratic_goes_down(rule: str) -> None:
    curvature = torch.tensor([[0.1, 1.0, 3.0], [2.0, 0.5, 1.0]])
    optimizer, weight = made(rule), torch.tensor([[3.0, -2.0, 1.0], [-1.0, 2.0, 0.5]])
    losses = []
    for _ in range(300):
        losses.append(float((curvature * weight**2).sum()))
        weight = step(optimizer, optimizer.begin_step(), weight, 2 * curvature * weight)
    assert losses[-1] < 0.02 * losses[0]


# --- stochastic rounding ---


def bits(count: int) -> Tensor:
    return directions.random_bits(1, "w", (count,))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.5, 2.0**-126, -(2.0**100), float("inf"), -float("inf")])
def test_what_bfloat16_holds_is_never_changed(value: float) -> None:
    rounded = stochastic_round(torch.full((5000,), value), bits(5000))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.view(torch.int16), torch.full((5000,), value, dtype=torch.bfloat16).view(torch.int16))


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, -0.0123, 1e-20, -65000.7])
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(value: float) -> None:
    count = 40_000
    exact = torch.full((count,), value)
    rounded = stochastic_round(exact, bits(count)).double()
    below, above = sorted({float(neighbour) for neighbour in rounded.unique()})
    step = above - below
    assert below < float(exact[0]) < above
    assert torch.tensor([below, above]).to(torch.bfloat16).view(torch.int16).diff().abs().item() == 1
    assert abs(float(rounded.mean()) - float(exact[0])) < 4.5 * 0.5 * step / count**0.5


def test_the_bits_decide_the_rounding_at_the_remainder() -> None:
    quarter = 1 + 2**-9  # a quarter of the way from 1 to the next bfloat16
    chosen = torch.tensor([0, 2**16 * 3 // 4 - 1, 2**16 * 3 // 4, 2**16 - 1], dtype=torch.int32)
    for sign in (1.0, -1.0):
        rounded = stochastic_round(torch.full((4,), sign * quarter), chosen)
        assert (rounded.double() * sign).tolist() == [1.0, 1.0, 1 + 2**-7, 1 + 2**-7]
