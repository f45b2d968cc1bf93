"""First order in a seeded subspace: coefficients as plain twins give them, weights at rest, records that move alike."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import BERT, GPT2, LLAMA
from reference import core_sum, sign_stream
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from zofed.core import directions, perturbed, subspace
from zofed.core.digests import named_parameters
from zofed.core.directions import tensor_id
from zofed.core.estimators import exact_slopes
from zofed.core.genesis import make_genesis
from zofed.core.journal import link
from zofed.core.optimizers import Optimizer
from zofed.core.perturbed import along
from zofed.core.records import Seeded, to_integers
from zofed.core.replica import Replica

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = [3, 2**40 + 1, 77]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2),
    "llama": lambda: LlamaForCausalLM(LLAMA),
    "bert": lambda: BertForSequenceClassification(BERT),
}


class Odd(nn.Module):
    """A scalar, vectors, matrices, a Conv1D whose weight lies the other way round, an embedding, a cube."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.embed = nn.Embedding(9, 6)
        self.mix = Conv1D(5, 6)
        self.head = nn.Linear(5, 4)
        self.scale = nn.Parameter(torch.tensor(0.0))
        self.cube = nn.Parameter(torch.zeros(2, 3, 2))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embed(tokens)))
        return (self.head(hidden) * self.scale).square().mean() + (self.cube * self.cube[0, 0, 0]).sum()


TOKENS = torch.tensor([[1, 5, 8], [0, 3, 3]])


def replica_of(kind: str, **changes: Any) -> Replica:
    model = Odd()
    arguments = {"seed": 5, "kind": kind, "optimizer": Optimizer("sgd")} | changes
    return Replica(model, make_genesis(model, {"name": "test"}, named_parameters(model), **arguments))


def direction_of(kind: str, seeds: list[int], index: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The direction of one coefficient, from the documented streams: float64."""
    tensor = tensor_id(name)
    i, j = divmod(index, len(seeds)) if kind == "core" else (index, index)
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)
    left = np.array(sign_stream(seeds[i], tensor, 0, rows))
    if len(shape) > 1:
        return torch.tensor(np.outer(left, sign_stream(seeds[j], tensor, 1, columns)).reshape(shape)).double()
    right = np.array(sign_stream(seeds[j], tensor, 1, rows)) if kind == "core" else 1
    return torch.tensor(left * right).double().reshape(shape)


def written(parameters: dict[str, Tensor], kind: str, seeds: list[int], coefficients: Tensor) -> dict[str, Tensor]:
    return {
        name: parameter.detach()
        + sum(
            float(coefficient) * direction_of(kind, seeds, index, name, tuple(parameter.shape)).to(parameter)
            for index, coefficient in enumerate(coefficients)
        )
        for name, parameter in parameters.items()
    }


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    if isinstance(model, Odd):
        return lambda: model(TOKENS)
    tokens = torch.randint(0, 512, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1]) if isinstance(model, BertForSequenceClassification) else tokens
    return lambda: model(input_ids=tokens, labels=labels).loss


@pytest.mark.parametrize("kind", ["core", "rank1"])
@pytest.mark.parametrize("name", [*MODELS, "odd"])
def test_a_pass_along_a_core_equals_weights_written_out(name: str, kind: str) -> None:
    """Loss and gradient by the coefficients, in float64."""
    torch.manual_seed(0)
    model = (MODELS.get(name, Odd)()).double().eval()
    parameters = dict(named_parameters(model))
    count = len(SEEDS) ** 2 if kind == "core" else len(SEEDS)
    values = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 0.02
    coefficients = values.clone().requires_grad_()
    loss = loss_of(model)
    found = along(loss, parameters, kind, SEEDS, coefficients)
    (gradient,) = torch.autograd.grad(found, coefficients)
    with torch.no_grad():
        for own, moved in written(parameters, kind, SEEDS, values).items():
            parameters[own].copy_(moved)
    expected = loss()
    whole = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    by_hand = [
        math.fsum(
            float((g * direction_of(kind, SEEDS, index, own, tuple(g.shape))).sum())
            for own, g in zip(parameters, whole, strict=True)
            if g is not None
        )
        for index in range(count)
    ]
    assert gradient.tolist() == pytest.approx(by_hand, rel=1e-9, abs=1e-10)


def test_a_core_record_moves_by_its_exact_sum() -> None:
    """Bit for bit what sums in Python integers give, a scalar, vectors, matrices and a cube."""
    replica = replica_of("core", optimizer=Optimizer("sgd", weight_decay=0.125))
    before = {name: parameter.detach().clone() for name, parameter in replica.parameters.items()}
    core = [[99991, -7, 12], [-(2**18) + 1, 0, 5], [1, 2**18 - 1, -33333]]
    record = Seeded(1, 0.25, (0,), 9, tuple(value for row in core for value in row), -19, 0.25)
    replica.apply(link(replica.head, record))
    seeds = directions.direction_seeds(5, 1, 0, 9)[:3]
    one = np.float32
    for name, old in before.items():
        total = np.array(core_sum(core, seeds, tensor_id(name), old.shape), dtype=one).reshape(old.shape)
        estimate = total * one(math.ldexp(4.0, -19))
        expected = old.numpy() * one(1 - 0.25 * 0.125) - estimate * one(0.25)
        assert np.array_equal(replica.parameters[name].detach().numpy(), expected), name


def test_a_core_is_no_transposed_core() -> None:
    one, other = ([0, 5, 0, 0], [0, 0, 5, 0])
    moved = []
    for coefficients in (one, other):
        replica = replica_of("core")
        replica.apply(link(replica.head, Seeded(1, 0.5, (0,), 4, tuple(coefficients), -6, 1.0)))
        moved.append(replica.digest())
    assert moved[0] != moved[1]


def adam(gradients: Callable[[Tensor], Tensor], count: int, size: int, rate: float) -> Tensor:
    """Coefficients after `count` steps of Adam (Kingma and Ba, ICLR 2015) from zero, float64."""
    a, mean, square = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for step in range(1, count + 1):
        gradient = gradients(a)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        a = a - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return a


@pytest.mark.parametrize("sizes", [{}, {"mix.weight": 0.5, "scale": 4.0}])
@pytest.mark.parametrize("kind", ["core", "rank1"])
def test_coefficients_are_those_of_adam_on_weights_written_out(kind: str, sizes: dict[str, float]) -> None:
    model = Odd()
    parameters = dict(named_parameters(model))
    size = 9 if kind == "core" else 3
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    found = subspace.trained([loss_of(model)] * 4, parameters, kind, SEEDS, size, Optimizer("adamw"), 0.01, sizes)
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    wide = Odd().double()
    losses = []

    def gradient(a: Tensor) -> Tensor:
        variable = a.clone().requires_grad_()
        moved = {
            name: parameter.detach()
            + sizes.get(name, 1.0)
            * sum(
                variable[index] * direction_of(kind, SEEDS, index, name, tuple(parameter.shape))
                for index in range(size)
            )
            for name, parameter in wide.named_parameters()
        }
        loss = functional_call(wide, moved, (TOKENS,))
        losses.append(float(loss))
        return torch.autograd.grad(loss, variable)[0]

    expected = adam(gradient, 4, size, 0.01 / math.sqrt(size))
    assert list(found.coefficients) == pytest.approx(expected.tolist(), rel=1e-3, abs=2e-6)
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_no_gradient_of_a_weight_is_wanted_while_coefficients_train() -> None:
    model = Odd()
    parameters = dict(named_parameters(model))
    parameters["scale"].requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    seen: list[bool] = []

    def loss() -> Tensor:
        seen.extend(parameter.requires_grad for parameter in model.parameters())
        return model(TOKENS)

    subspace.trained([loss], parameters, "core", SEEDS, 9, Optimizer("adamw"), 0.01)
    assert seen and not any(seen)
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == wanted
    assert all(parameter.grad is None for parameter in parameters.values())

    def failing() -> Tensor:
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        subspace.trained([loss, failing], parameters, "core", SEEDS, 9, Optimizer("adamw"), 0.01)
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == wanted
    with pytest.raises(ValueError, match="inner step 2 is nan"):
        subspace.trained(
            [loss, lambda: model(TOKENS) * math.nan], parameters, "core", SEEDS, 9, Optimizer("adamw"), 0.01
        )
    assert {name: parameter.requires_grad for name, parameter in parameters.items()} == wanted


def test_each_step_of_a_subspace_takes_a_loss_of_its_own() -> None:
    model = Odd()
    met: list[int] = []

    def loss_at(index: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            met.append(index)
            return model(TOKENS) * (index + 1)

        return loss

    found = subspace.trained(
        [loss_at(index) for index in range(3)], dict(named_parameters(model)), "core", SEEDS, 9, Optimizer("sgd"), 1e-9
    )
    assert met == [0, 1, 2]
    assert found.loss == pytest.approx(2 * float(model(TOKENS).detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["core", "rank1"])
def test_a_record_moves_the_weights_by_the_coefficients_themselves(kind: str) -> None:
    """Up to what 18 bits leave out, whatever the rate that is written beside them."""
    replica = replica_of(kind)
    values = [0.0125, -0.031, 0.0007, 0.02] if kind == "core" else [0.0125, -0.031]
    coefficients, exponent = to_integers([-value for value in values])
    step = 0.003 * 16
    record = Seeded(1, step, (0,), len(values), coefficients, exponent, step)
    seeds = directions.direction_seeds(5, 1, 0, len(values))[:2]
    expected = written(dict(replica.parameters), kind, seeds, torch.tensor(values, dtype=torch.float64))
    replica.apply(link(replica.head, record))
    for name, parameter in replica.parameters.items():
        error = (parameter.detach().double() - expected[name].double()).abs().max()
        assert error < len(values) * 0.031 * 2**-17 + 1e-7, name


def test_a_pass_along_a_core_leaves_the_weights_out_of_the_graph() -> None:
    model = Odd()
    parameters = dict(named_parameters(model))
    with subspace.frozen(parameters):
        value = perturbed.along(loss_of(model), parameters, "core", SEEDS, torch.zeros(9, requires_grad=True))
        value.backward()
    assert all(parameter.grad is None for parameter in parameters.values())


def test_rates_are_those_of_the_weights() -> None:
    """With SGD one pass is a zeroth-order step along exact slopes; with AdamW the weights move by the rate."""
    model = Odd()
    parameters = dict(named_parameters(model))
    slopes = exact_slopes(loss_of(model), parameters, "rank1", SEEDS[:3])
    found = subspace.trained([loss_of(model)], parameters, "rank1", SEEDS[:3], 3, Optimizer("sgd"), 0.3)
    assert found.coefficients == pytest.approx([-0.3 / 3 * slope for slope in slopes], rel=1e-5)
    found = subspace.trained([loss_of(model)], parameters, "rank1", SEEDS[:3], 3, Optimizer("adamw"), 0.3)
    assert math.fsum(value * value for value in found.coefficients) ** 0.5 == pytest.approx(0.3, rel=1e-4)


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
