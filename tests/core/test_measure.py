"""What a replica does with a loss that cannot run for many copies at once."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import KINDS, MODELS, SEEDS, batched_losses, bits_of, padded_documents, randomised, trained
from torch import Tensor, nn

from zofed.base.errors import UserError
from zofed.core import metrics, perturbed
from zofed.core.digests import named_parameters
from zofed.core.estimators import FiniteDifference
from zofed.core.genesis import make_genesis
from zofed.core.kinds import Kind
from zofed.core.optimizers import Optimizer
from zofed.core.replica import Replica

pytestmark = pytest.mark.usefixtures("one_thread")


def replica_of(model: nn.Module, kind: Kind = "rank1") -> Replica:
    genesis = make_genesis(model, {}, named_parameters(model), seed=1, kind=kind, optimizer=Optimizer("sgd"))
    return Replica(model, genesis)


def asked(
    model: nn.Module, loss: Callable[..., Any], examples: Any = None, times: int = 4, epsilon: float = 0.05
) -> list[str]:
    """Ask several times; asserts that moved weights give the same and that nothing moved. Returns what was warned."""
    replica, before = replica_of(model), bits_of(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimates = [replica.measure.slopes(loss, SEEDS, epsilon, 4, examples=examples) for _ in range(times)]
    moved = FiniteDifference("rank1", epsilon).slopes(loss, replica.parameters, SEEDS, examples, batched=False)
    assert any(moved.slopes)
    for estimate in estimates:
        assert estimate.slopes == pytest.approx(moved.slopes, rel=1e-4, abs=1e-5)
        assert estimate.loss == pytest.approx(moved.loss)
    assert bits_of(model) == before
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


LINEAR_X, LINEAR_TARGET = torch.linspace(-9, 9, 80).square().sin().reshape(20, 4), torch.arange(20) % 3


def a_linear() -> nn.Module:
    return randomised(nn.Linear(4, 3), 0.5)


BATCHABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "accuracy": lambda y: (y.argmax(-1) == LINEAR_TARGET).float().mean(),
    "count of hits": lambda y: (y.argmax(-1) == LINEAR_TARGET).sum(),
    "whether one row is right": lambda y: y[3].argmax() == 0,
    "margin": lambda y: (y[:, 1] - y.max(-1).values).clamp(min=-1).mean(),
    "ranks": lambda y: y.sort(-1).values[:, 0].mean(),
    "steps": lambda y: y.mul(5).round().mean(),
    "a tensor in a condition": lambda y: y.square().sum() if y[0, 0] > 0 else y.abs().sum(),
    "a mask": lambda y: y[y > 0].sum(),
    "writing into a new tensor": lambda y: torch.zeros(20, 3).add_(y).square().mean(),
}

SERIAL: dict[str, Callable[[Tensor], Any]] = {
    "a Python float": lambda y: float(F.cross_entropy(y, LINEAR_TARGET)),
    "math": lambda y: math.exp(F.cross_entropy(y, LINEAR_TARGET)),
    "a Python int": lambda y: int(y.mul(100).sum()),
    "a Python bool": lambda y: bool(y.sum() > 20 * y[3].sum()) + float(y[0, 0]),
    "item in a condition": lambda y: y.square().sum() * (2 if y[0, 0].item() > 0 else 3),
    "numpy": lambda y: torch.from_numpy(np.tanh(y.numpy())).sum(),
    "a numpy number": lambda y: np.square(np.asarray(y)).mean(),
    "a list": lambda y: sum(y.flatten().tolist()),
    "distinct values": lambda y: y.mul(10).round().unique().sum(),
    "a tensor of numbers": lambda y: torch.tensor([y.sum(), y.mean()]).mean(),
}


@pytest.mark.parametrize("objective", BATCHABLE)
def test_objectives_that_cannot_be_differentiated_run_batched(objective: str) -> None:
    model = a_linear()
    assert asked(model, lambda: BATCHABLE[objective](4 * model(LINEAR_X) ** 3), epsilon=1.0) == []


@pytest.mark.parametrize("objective", SERIAL)
def test_objectives_in_python_are_measured_one_by_one_which_is_said_once(objective: str) -> None:
    model = a_linear()
    (said,) = asked(model, lambda: SERIAL[objective](4 * model(LINEAR_X) ** 3))
    assert "cannot run for many perturbed copies at once (" in said


def test_a_number_that_is_no_tensor_cannot_come_from_many_copies() -> None:
    model = a_linear()
    with pytest.raises(perturbed.CannotBatch, match="it gives a float, not a tensor"):
        batched_losses(lambda: model(LINEAR_X).numel() * 1.0, trained(model, "full"), 0.1, 4)  # type: ignore[arg-type]


def test_an_interrupt_that_vmap_wraps_stays_an_interrupt() -> None:
    """Ctrl-C inside vmap's own bookkeeping comes out as a RuntimeError about its stack of levels."""
    model = a_linear()

    def cut_short() -> Tensor:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("!dynamicLayerStack.empty() INTERNAL ASSERT FAILED")

    with pytest.raises(KeyboardInterrupt):
        batched_losses(cut_short, trained(model, "full"), 0.1, 4)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.inner = kind(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.inner(x)[0][:, -1]), torch.tensor([1]))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_measured_one_by_one(kind: Callable[..., nn.Module]) -> None:
    model = randomised(Recurrent(kind), 0.5)
    (said,) = asked(model, lambda: model(LINEAR_X[None]))
    assert "Batching rule not implemented" in said


class Compiled(nn.Module):
    """Python sees nothing of what TorchScript does with the weights."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.inner = torch.jit.script(nn.Linear(4, 3))
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x))).square().mean()


def test_a_parameter_that_is_used_where_no_call_shows_it_is_measured_all_the_same() -> None:
    model = randomised(Compiled(), 0.5)
    (said,) = asked(model, lambda: model(LINEAR_X))
    assert "it uses inner.weight where no call of torch shows it" in said


@pytest.mark.parametrize("name", ["bert", "gpt2 classifier"])
def test_padded_examples_of_a_librarys_classifier_run_batched(name: str) -> None:
    """The library asks whether any document is padded, and the masks differ from query to query."""
    model, _ = MODELS[name]()
    assert asked(model, lambda batch: metrics.loss_of(model, batch), padded_documents(5, 47), times=2) == []


class WithIdle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).square().mean()


def test_a_worker_names_the_parameter_that_a_loss_never_used() -> None:
    model = randomised(WithIdle())
    with pytest.raises(UserError, match=r"never used .*idle\.weight, idle\.bias: set scope"):
        replica_of(model).measure.slopes(lambda: model(LINEAR_X), SEEDS, 0.1, 4)


@pytest.mark.parametrize("kind", ["rank1", "rademacher"])
def test_a_worker_names_it_where_directions_are_written_into_the_weights_too(kind: Kind) -> None:
    model = randomised(WithIdle())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=r"never used .*idle"):
            replica_of(model, kind).measure.slopes(lambda: torch.tensor(float(model(LINEAR_X))), SEEDS, 0.1, 4)


@pytest.mark.parametrize("fault", [RuntimeError, ValueError, ZeroDivisionError, UserError])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_loss_shows_as_itself(kind: Kind, fault: type[Exception]) -> None:
    """At whichever pass it comes, and with every bit of the weights in place."""
    for first in (1, 2, 5):
        model = a_linear()
        replica, before, calls = replica_of(model, kind), bits_of(model), 0

        def failing(model: nn.Module = model, first: int = first) -> Tensor:
            nonlocal calls
            calls += 1
            if calls >= first:
                raise fault("mine alone")
            return model(LINEAR_X).square().mean()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(fault, match="mine alone"):
                replica.measure.slopes(failing, SEEDS, 0.1, 2)
        assert bits_of(model) == before
