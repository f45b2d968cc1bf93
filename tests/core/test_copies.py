"""What torch.vmap refuses of many perturbed copies runs batched all the same, and right, wherever copies agree."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zofed.core import estimators, perturbed

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS, STEPS = [3, 1, 4, 15], (0.1, -0.1)
X = torch.linspace(-9, 9, 80, dtype=torch.float64).square().sin().reshape(20, 4)
# Four queries with two rows each; only those of the last two have gaps.
MASKS = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]]])
VALUES = torch.linspace(-2, 3, 4 * 2 * 3 * 4, dtype=torch.float64).cos().reshape(4, 2, 3, 4)


class OldStyle(torch.autograd.Function):
    """As many libraries write theirs: it keeps what its backward pass needs in the context that forward is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.size = len(x)
        return torch.tanh(x) * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] * weight * (1 - x.tanh() ** 2), (grads[0] * x.tanh()).sum(0)


class WithoutRule(torch.autograd.Function):
    """In the new style, with no word on vmap."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.sin(x) * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


class WithRule(torch.autograd.Function):
    """Its own rule for vmap knows nothing of a parameter that is perturbed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cos(x) * weight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return -grads[0] * weight * x.sin(), (grads[0] * x.cos()).sum(0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(4, 3), nn.Parameter(torch.randn(3))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.weight


def written_by_rows(y: Tensor) -> Tensor:
    out = torch.zeros(20, 3, dtype=y.dtype)
    out[::2] = y[1::2]
    out[1] += y[0]
    return out.square().mean()


def by_experts(y: Tensor) -> Tensor:
    """Rows sorted to the expert that wants them most, each expert given as many as it has."""
    chosen = y.argmax(-1)
    counts = torch.bincount(chosen, minlength=3).tolist()
    parts = y[chosen.argsort(stable=True)].split(counts)
    return sum((part.square().sum() * (1 + number) for number, part in enumerate(parts)), y.sum())


LOSSES: dict[str, Callable[[Model], Tensor]] = {
    "a custom function of the old style": lambda m: OldStyle.apply(m.linear(X), m.weight).square().mean(),
    "a custom function without a rule": lambda m: WithoutRule.apply(m.linear(X), m.weight).square().mean(),
    "a custom function with a rule": lambda m: WithRule.apply(m.linear(X), m.weight).square().mean(),
    "a new tensor written into": lambda m: torch.zeros(20, 3, dtype=X.dtype).add_(m(X)).square().mean(),
    "a new tensor written into by rows": lambda m: written_by_rows(m(X)),
    "a value scattered into a new tensor": lambda m: (
        torch.zeros_like(m(X)).scatter_(1, m(X).argmax(-1, keepdim=True), 2.0) * m(X)
    ).sum(),
    "a histogram": lambda m: (torch.histc(m(X)[:, 0], bins=4, min=-2, max=2) * m(X).mean()).square().sum(),
    "a branch": lambda m: m(X).square().sum() if m(X)[0, 0] > m(X)[1, 1] else m(X).abs().sum(),
    "a mask of entries": lambda m: m(X)[m(X) > 0].sum(),
    "where entries are": lambda m: m(X).flatten()[(m(X).flatten() > 0).nonzero()].sum(),
    "rows by experts": lambda m: by_experts(m(X)),
    "a length that is a tensor": lambda m: m(X).narrow(0, torch.tensor(2), 5).square().mean(),
    "a gradient asked for in passing": lambda m: m(X + torch.zeros_like(X).requires_grad_()).square().mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_what_vmap_refuses_runs_batched_and_equals_moved_weights(name: str) -> None:
    model = Model()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    batched = perturbed.losses(lambda: LOSSES[name](model), parameters, "rank1", SEEDS, STEPS, 8)
    moved = estimators.materialised_losses(lambda: LOSSES[name](model), parameters, "rank1", SEEDS, STEPS)
    assert len(set(moved.flatten().tolist())) == 8
    assert float((batched - moved).abs().max()) < 1e-12


def test_copies_that_take_different_branches_run_in_one_pass_for_each_branch() -> None:
    model, sizes = Model(), list[int]()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        y = model(batch["values"]).sum(-1)
        if batch["mask"].all():
            sizes.append(1)
            return y.mean()
        sizes.append(2)
        return (y * batch["mask"]).sum() / batch["mask"].sum()

    parameters: dict[str, Tensor] = dict(model.named_parameters())
    examples = {"values": VALUES, "mask": MASKS}
    batched = perturbed.losses(loss, parameters, "rank1", SEEDS, STEPS, 8, examples=examples)
    assert sorted(sizes) == [1, 2]  # eight copies, two passes
    moved = estimators.materialised_losses(loss, parameters, "rank1", SEEDS, STEPS, examples=examples)
    assert float((batched - moved).abs().max()) < 1e-12


def test_torchs_own_apply_is_back_after_a_pass_and_after_one_that_failed() -> None:
    model, own = Model(), torch.autograd.Function.__dict__["apply"]
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    perturbed.losses(lambda: model(X).mean(), parameters, "rank1", SEEDS, STEPS, 8)
    assert torch.autograd.Function.__dict__["apply"] is own
    with pytest.raises(perturbed.CannotBatch):
        perturbed.losses(lambda: torch.tensor(float(model(X).mean())), parameters, "rank1", SEEDS, STEPS, 8)
    assert torch.autograd.Function.__dict__["apply"] is own


def test_a_custom_function_is_still_differentiated_in_the_slope_of_a_direction() -> None:
    model = Model()
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss() -> Tensor:
        return F.softplus(OldStyle.apply(model.linear(X), model.weight)).mean()  # type: ignore[arg-type]

    exact = estimators.exact_slopes(loss, parameters, "rank1", SEEDS)
    measured = estimators.FiniteDifference("rank1", 1e-5).slopes(loss, parameters, SEEDS, batched=False)
    assert exact == pytest.approx(measured.slopes, rel=1e-6)
