"""Every rule must follow its paper, go on from its saved state as if nothing had happened, and make progress."""

from collections.abc import Sequence

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from zofed import directions
from zofed.optimizers import Name, Optimizer, stochastic_round

RATE = 0.05
RULES: dict[str, tuple[Name, float, float]] = {
    "sgd": ("sgd", 0.0, 0.0),
    "momentum": ("sgd", 0.9, 0.0),
    "decay": ("sgd", 0.0, 0.1),
    "momentum and decay": ("sgd", 0.9, 0.1),
    "adamw": ("adamw", 0.0, 0.0),
    "adamw with decay": ("adamw", 0.0, 0.1),
}


def made(rule: str) -> Optimizer:
    name, momentum, decay = RULES[rule]
    return Optimizer(name, momentum, decay)


def drawn(count: int, shape: tuple[int, ...] = (7, 5), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (1e-3, 1.0, 30.0)  # gradients of unlike size, so that no step hides behind another
    return [torch.randn(shape, generator=generator) * sizes[index % 3] for index in range(count)]


def path(optimizer: Optimizer, weight: Tensor, gradients: Sequence[Tensor], name: str = "w") -> list[Tensor]:
    """Weights after each step."""
    weights = []
    for gradient in gradients:
        optimizer.begin_step()
        weight = optimizer.move(name, weight, gradient, RATE)
        weights.append(weight)
    return weights


@pytest.mark.parametrize("rule", RULES)
def test_twenty_random_steps_follow_the_paper(rule: str) -> None:
    start, *gradients = drawn(21)
    name, momentum, decay = RULES[rule]
    arrays = [gradient.numpy() for gradient in gradients]
    if name == "sgd":
        expected = reference.sgd(start.numpy(), arrays, RATE, momentum, decay)
    else:
        expected = reference.adamw(start.numpy(), arrays, RATE, decay)
    found = path(made(rule), start, gradients)
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.dtype == torch.float32
        if name == "sgd":
            assert np.array_equal(ours.numpy(), theirs), f"step {step}"
        else:
            assert np.abs(ours.numpy() - theirs).max() < 1e-6, f"step {step}"


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
    optimizer.begin_step()
    moved = optimizer.move("w", torch.zeros(3), torch.tensor([1e-3, -50.0, 7.0]), RATE)
    assert moved.tolist() == pytest.approx([-RATE, RATE, -RATE], rel=1e-4)


def test_weight_decay_alone_shrinks_the_weights() -> None:
    for rule in ("decay", "adamw with decay"):
        (moved,) = path(made(rule), torch.tensor([2.0, -4.0]), [torch.zeros(2)])
        assert moved.tolist() == pytest.approx([2.0 * (1 - RATE * 0.1), -4.0 * (1 - RATE * 0.1)])


@pytest.mark.parametrize("rule", RULES)
def test_a_step_overwrites_neither_weight_nor_gradient(rule: str) -> None:
    start, *gradients = drawn(4)
    copies = [tensor.clone() for tensor in (start, *gradients)]
    path(made(rule), start, gradients)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((start, *gradients), copies, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_tensors_do_not_share_their_state(rule: str) -> None:
    start, *gradients = drawn(5)
    alone = path(made(rule), start, gradients)[-1]
    optimizer, weight, other = made(rule), start, torch.zeros(3)
    for gradient in gradients:
        optimizer.begin_step()
        other = optimizer.move("other", other, torch.ones(3), RATE)
        weight = optimizer.move("w", weight, gradient, RATE)
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


@pytest.mark.parametrize("rule", RULES)
def test_the_loss_of_a_quadratic_goes_down(rule: str) -> None:
    curvature = torch.tensor([0.1, 1.0, 3.0])
    optimizer, weight = made(rule), torch.tensor([3.0, -2.0, 1.0])
    losses = []
    for _ in range(300):
        losses.append(float((curvature * weight**2).sum()))
        optimizer.begin_step()
        weight = optimizer.move("w", weight, 2 * curvature * weight, RATE)
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
