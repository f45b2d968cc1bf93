"""The batched perturbed losses must equal those of really moved weights, for any architecture, and move nothing."""

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import (
    EPSILON,
    KINDS,
    LARGE_VOCABULARY,
    MODELS,
    SEEDS,
    SMOOTH,
    Loss,
    Pooled,
    batched_losses,
    bits_of,
    gpt2,
    gpt2_config,
    ids_of,
    language_model,
    logits_loss,
    moved_losses,
    padded_documents,
    plain,
    randomised,
    relative,
    smooth,
    trained,
    two_point,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel

from zofed.base.errors import UserError
from zofed.core import estimators, perturbed
from zofed.core.estimators import Parameters
from zofed.core.kinds import Kind

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_equal_losses(loss: Loss, parameters: Parameters, copies: int, epsilon: float = EPSILON) -> None:
    batched = batched_losses(loss, parameters, epsilon, copies)
    one_by_one = moved_losses(loss, parameters, epsilon)
    assert batched.shape == (len(SEEDS), 2)
    assert float((batched - one_by_one).abs().max()) < 1e-5
    assert float((one_by_one[:, 0] - one_by_one[:, 1]).abs().max()) > 5e-5  # the perturbation is seen at all


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *((name, "full") for name in MODELS),
        ("gpt2", "last-1"),
        ("gpt2", "reduced"),
        ("gpt2", "norms"),
        ("gpt2", "biases"),
        ("gpt2 classifier", "head"),
        ("gpt2 classifier", "last-1"),
        ("llama", "norms"),
        ("llama", "reduced"),
        ("llama", "last-1"),
        ("llama", "embed_tokens"),
        ("bert", "biases"),
        ("bert", "attention"),
        ("plain", "conv"),
        ("plain", "twice.bias|scale"),
    ],
)
def test_batched_losses_equal_those_of_moved_weights(name: str, scope: str) -> None:
    model, loss = MODELS[name]()
    # Small scopes move the loss little: a longer step shows each perturbation above float32's rounding.
    assert_equal_losses(loss, trained(model, scope), copies=4, epsilon=EPSILON if scope == "full" else 0.01)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "plain"])
def test_a_large_step_gives_the_losses_of_moved_weights_too(name: str) -> None:
    """Second-order terms (a parameter used twice, a perturbed norm before a perturbed map) count here."""
    model, loss = MODELS[name]()
    parameters = trained(model, "full")
    batched = batched_losses(loss, parameters, 0.05, 6)
    assert batched.numpy() == pytest.approx(moved_losses(loss, parameters, 0.05).numpy(), rel=1e-4)


@pytest.mark.first(2)
@pytest.mark.parametrize("name", MODELS)
def test_copies_per_pass_changes_the_speed_and_not_the_losses(name: str) -> None:
    model, loss = MODELS[name]()
    parameters = trained(model, "full")
    first, *others = [batched_losses(loss, parameters, EPSILON, copies) for copies in (1, 2, 3, 4, 6, 16)]
    for other in others:
        assert float((first - other).abs().max()) < 1e-5


def test_more_directions_than_are_kept_at_once_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = plain()
    parameters = trained(model, "full")
    seeds = list(range(11))
    whole = batched_losses(loss, parameters, 0.01, 4, seeds)
    monkeypatch.setattr(perturbed, "QUERIES_AT_ONCE", 4)
    for copies in (1, 3, 4, 9):
        assert batched_losses(loss, parameters, 0.01, copies, seeds).numpy() == pytest.approx(whole.numpy())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "plain"])
def test_asking_leaves_every_bit_of_the_weights(name: str, kind: Kind) -> None:
    model, loss = MODELS[name]()
    before = bits_of(model)
    two_point(loss, trained(model, "full"), kind, SEEDS, 0.1, 4)
    assert bits_of(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_raises_leaves_every_bit_of_the_weights(kind: Kind) -> None:
    model, loss = plain()
    before, calls = bits_of(model), 0

    def failing() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ArithmeticError("third pass")
        return loss()

    with pytest.raises(ArithmeticError, match="third pass"):
        two_point(failing, trained(model, "full"), kind, SEEDS, 0.1, 2)
    assert bits_of(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_asking_touches_no_global_random_state(kind: Kind) -> None:
    model, loss = plain()

    def state() -> Any:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = state()
    two_point(loss, trained(model, "full"), kind, SEEDS, EPSILON, 4)
    assert state() == before


def test_a_parameter_the_loss_never_uses_is_named() -> None:
    model, loss = plain()
    parameters = trained(model, "full") | {"idle": nn.Parameter(torch.zeros(3))}
    with pytest.raises(UserError, match=r"never used .*idle.*set scope"):
        batched_losses(loss, parameters, EPSILON, 4)


def test_looking_at_a_parameters_shape_is_no_use_of_it() -> None:
    model, loss = plain()
    idle = nn.Parameter(torch.zeros(3, 3))

    def looking() -> Tensor:
        return loss() + 0 * idle.shape[0] if idle.device.type == "cpu" and idle.dtype == torch.float32 else loss()

    with pytest.raises(UserError, match=r"never used .*idle.*set scope"):
        batched_losses(looking, trained(model, "full") | {"idle": idle}, EPSILON, 4)


X = torch.linspace(-1, 2, 12).reshape(3, 4)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (tensor.reshape(1, 1, -1, 4) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value)


# Each way to call must give what moved weights give: a is 4 x 4, b 3 x 4, q 1 x 1 x 3 x 4, v a vector, s a scalar.
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "keyword weight of linear": lambda a, b, q, v, s: F.linear(X, weight=a, bias=v),
    "all keywords of linear": lambda a, b, q, v, s: F.linear(input=X, weight=a, bias=v),
    "input of linear is a parameter": lambda a, b, q, v, s: F.linear(b, a) + b.mean(),
    "keyword weight of embedding": lambda a, b, q, v, s: F.embedding(torch.tensor([0, 2]), weight=b),
    "factors of addmm": lambda a, b, q, v, s: torch.addmm(v, X, a, beta=0.5, alpha=2.0),
    "input of addmm is a parameter": lambda a, b, q, v, s: torch.addmm(v, b, a) + b.mean(),
    "method addmm": lambda a, b, q, v, s: v.addmm(X, a),
    "one row through linear": lambda a, b, q, v, s: F.linear(X[0], a, v),
    "four dimensions through linear": lambda a, b, q, v, s: F.linear(X.reshape(3, 1, 1, 4), a, v),
    "query of attention is a parameter": lambda a, b, q, v, s: (
        F.scaled_dot_product_attention(q, X[None, None] @ a, q) + q.mean()
    ),
    "attention among computed values": lambda a, b, q, v, s: sdpa(X @ a, X @ a.T, X + v),
    "causal attention with a scale": lambda a, b, q, v, s: F.scaled_dot_product_attention(
        (X @ a)[None, None], X[None, None], X[None, None], is_causal=True, scale=0.3
    ),
    "scalar parameter": lambda a, b, q, v, s: X * s,
    "einsum": lambda a, b, q, v, s: torch.einsum("ij,jk,k->ik", X, a, v),
    "indexing": lambda a, b, q, v, s: a[1:3, 0] * v[2],
    "stack": lambda a, b, q, v, s: torch.stack([a, 2 * a]),
    "layer norm": lambda a, b, q, v, s: F.layer_norm(X, (4,), weight=v, bias=v),
    "transposed view": lambda a, b, q, v, s: F.linear(X, a.T),
    "attribute T": lambda a, b, q, v, s: X @ a.mT,
    "type conversion": lambda a, b, q, v, s: F.linear(X, a.to(torch.float32), v.float()),
    "bias twice": lambda a, b, q, v, s: F.linear(F.linear(X, a, v), a, v),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_way_to_call_sees_the_perturbed_parameter(call: str) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (4, 4), "b": (3, 4), "q": (1, 1, 3, 4), "v": (4,), "s": ()}
    everything = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}

    def loss() -> Tensor:
        output = CALLS[call](*everything.values())
        return (output * torch.linspace(0.5, 1.5, output.numel()).reshape(output.shape)).square().mean()

    gradients = torch.autograd.grad(loss(), list(everything.values()), allow_unused=True)
    used: Parameters = {
        key: everything[key] for key, gradient in zip(everything, gradients, strict=True) if gradient is not None
    }
    assert used
    for kind in ("rank1", "rank3"):
        batched = batched_losses(loss, used, 0.125, 4, kind=kind)
        assert batched.numpy() == pytest.approx(moved_losses(loss, used, 0.125, kind).numpy(), rel=1e-5, abs=1e-6)


# --- in float64, where rounding hides nothing ---


def kinds_of_parameters(model: nn.Module) -> dict[str, Parameters]:
    """The parameters by the type of their module and their own name, and all of them as `all`."""
    found: dict[str, Parameters] = {"all": {}}
    for name, parameter in trained(model, "full").items():
        module, _, own = name.rpartition(".")
        kind = f"{type(model.get_submodule(module)).__name__}.{own}"
        found.setdefault(kind, {})[name] = parameter
        found["all"][name] = parameter
    return found


@pytest.mark.first(4)
@pytest.mark.parametrize("kind", ["rank1", "rank4"])
@pytest.mark.parametrize("name", SMOOTH)
def test_in_float64_a_perturbed_copy_has_the_loss_of_moved_weights(name: str, kind: Kind) -> None:
    model, loss = smooth(name)
    groups = kinds_of_parameters(model)
    assert len(groups) > 3
    for group, parameters in groups.items():
        got = perturbed.losses(loss, parameters, kind, [3, 1, 4], (0.1, -0.1), 4)
        wanted = estimators.materialised_losses(loss, parameters, kind, [3, 1, 4], (0.1, -0.1))
        assert got.dtype == wanted.dtype == torch.float64
        assert relative(got, wanted) <= 1e-10, group
        assert relative(wanted[:, :1], wanted[:, 1:]) > 1e-9, group  # the perturbation is seen at all


@pytest.mark.first(4)
@pytest.mark.parametrize("kind", ["rank1", "rank4"])
@pytest.mark.parametrize("name", SMOOTH)
def test_in_float32_the_two_ways_differ_by_rounding_alone(name: str, kind: Kind) -> None:
    model, loss = smooth(name, torch.float32)
    for group, parameters in kinds_of_parameters(model).items():
        got = perturbed.losses(loss, parameters, kind, [3, 1, 4], (0.1, -0.1), 4)
        wanted = estimators.materialised_losses(loss, parameters, kind, [3, 1, 4], (0.1, -0.1))
        assert relative(got, wanted) < 2e-6, group


@pytest.mark.parametrize("kind", ["rank1", "rank4"])
@pytest.mark.parametrize("name", SMOOTH)
def test_bfloat16_weights_run_both_ways(name: str, kind: Kind) -> None:
    """Moved weights are rounded to bfloat16, a product added to the output is not: they agree to its eight bits."""
    model, loss = smooth(name, torch.bfloat16)
    before, parameters = bits_of_bfloat16(model), trained(model, "full")
    got = perturbed.losses(loss, parameters, kind, [3, 1, 4], (0.1, -0.1), 4)
    wanted = estimators.materialised_losses(loss, parameters, kind, [3, 1, 4], (0.1, -0.1))
    assert got.dtype == wanted.dtype == torch.float32
    assert relative(got, wanted) < 0.05
    assert bits_of_bfloat16(model) == before


def bits_of_bfloat16(model: nn.Module) -> list[bytes]:
    return [parameter.detach().view(torch.int16).numpy().tobytes() for parameter in model.parameters()]


# --- examples of every query's own ---


def assert_each_sees_its_own(model: nn.Module, examples: dict[str, Tensor], loss: Callable[[Any], Tensor]) -> None:
    """All queries at once, moved weights, and one query after the other on its own batch: the same losses."""
    parameters, steps = trained(model, "full"), (0.125, -0.125)
    count = len(examples["labels"])
    seeds = list(range(count))
    moved = estimators.materialised_losses(loss, parameters, "rank1", seeds, steps, examples=examples)
    for query in seeds:
        own = {name: tensor[query] for name, tensor in examples.items()}
        alone = perturbed.losses(lambda own=own: loss(own), parameters, "rank1", [query], steps, 2)
        assert relative(alone[0], moved[query]) < 1e-12
    for copies in (1, 3, 4, 2 * count):
        batched = perturbed.losses(loss, parameters, "rank1", seeds, steps, copies, examples=examples)
        assert relative(batched, moved) < 1e-12
    others = {name: tensor.roll(1, 0) for name, tensor in examples.items()}
    rolled = estimators.materialised_losses(loss, parameters, "rank1", seeds, steps, examples=others)
    assert relative(rolled, moved) > 1e-4  # which batch a query sees does matter


@pytest.mark.parametrize("vocabulary", [61, LARGE_VOCABULARY])
def test_each_query_sees_its_own_batch_of_a_language_model(vocabulary: int) -> None:
    model = GPT2LMHeadModel(gpt2_config(vocab_size=vocabulary, n_layer=1))
    language_model(model, (1, 2))
    model.double()
    model.config.pad_token_id = None  # with one, the library looks for padding, which depends on the data
    ids = ids_of((5, 2, 7), vocabulary)
    assert_each_sees_its_own(model, {"input_ids": ids, "labels": ids}, lambda batch: logits_loss(model, batch))


def test_each_query_sees_its_own_mask() -> None:
    model = randomised(Pooled(), 0.5).double()
    assert_each_sees_its_own(
        model,
        padded_documents(5, 23),
        lambda batch: F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"]),
    )


def test_examples_may_hold_more_than_tensors() -> None:
    model = randomised(Pooled(), 0.5).double()
    examples = padded_documents(3, 23) | {"factor": 2.0, "note": "none", "nothing": None}

    def loss(batch: Any) -> Tensor:
        assert (batch["note"], batch["nothing"]) == ("none", None)
        output = model(batch["input_ids"], batch["attention_mask"])
        return batch["factor"] * F.cross_entropy(output, batch["labels"])

    parameters = trained(model, "full")
    got = perturbed.losses(loss, parameters, "rank1", [1, 2, 3], (0.125,), 2, examples=examples)
    wanted = estimators.materialised_losses(loss, parameters, "rank1", [1, 2, 3], (0.125,), examples=examples)
    assert relative(got, wanted) < 1e-12


# --- stacks of matrices, as experts have ---


ROWS = torch.linspace(-3, 5, 20 * 8).square().cos().reshape(20, 8)


class Stacked(nn.Module):
    """Rows sorted to one of three matrices (4 x 8 each) by a router, as mixtures of experts do it."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.router, self.turned = nn.Linear(8, 3), turned
        self.stack = nn.Parameter(torch.empty(3, 4, 8) if turned else torch.empty(3, 8, 4))
        randomised(self, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen, order = self.router(x).argmax(-1).sort(stable=True)
        ends = torch.histc(chosen.float(), bins=3, min=0, max=2).cumsum(0, dtype=torch.int32)
        stack = self.stack.transpose(-2, -1) if self.turned else self.stack
        return F.grouped_mm(x[order], stack, offs=ends)

    def loss(self) -> Tensor:
        return self(ROWS).square().mean() + 0.1 * self.router(ROWS).square().mean()


@pytest.mark.parametrize("kind", ["rank1", "rank2", "rank4"])  # of three matrices: the last has more terms
@pytest.mark.parametrize("scope", ["stack", "router", "stack|router"])
@pytest.mark.parametrize("turned", [True, False])
def test_a_grouped_product_sees_a_perturbed_stack(turned: bool, scope: str, kind: Kind) -> None:
    model = Stacked(turned)
    parameters = trained(model, scope)
    for step in (0.01, 0.3):  # with the larger one rows change their matrix
        got = batched_losses(model.loss, parameters, step, 4, kind=kind)
        wanted = moved_losses(model.loss, parameters, step, kind)
        assert relative(got, wanted) < 2e-6
        assert relative(wanted[:, :1], wanted[:, 1:]) > 1e-4


def test_a_view_of_a_stack_is_perturbed_in_whatever_call_it_ends() -> None:
    model = Stacked(True)

    def loss() -> Tensor:
        view = model.stack.transpose(1, 2)
        assert view.shape == (3, 8, 4)
        return (ROWS @ view).square().mean() + view.mT.abs().mean() + torch.cat([view, view]).sum()

    parameters = trained(model, "stack")
    got, wanted = batched_losses(loss, parameters, 0.1, 4), moved_losses(loss, parameters, 0.1)
    assert relative(got, wanted) < 2e-6
    assert estimators.exact_slopes(model.loss, parameters, "rank1", SEEDS) == pytest.approx(
        two_point(model.loss, parameters, "rank1", SEEDS, 1e-3, 4).slopes, rel=0.02, abs=0.02
    )


# --- cost ---


class Entries(TorchDispatchMode):
    """How many entries each call of one operation made; of any that gives one tensor, where none is named."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name, self.found = name, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == self.name or (not self.name and isinstance(result, Tensor)):
            self.found.append(result.numel())
        return result


def test_what_lies_below_the_first_perturbed_parameter_runs_once() -> None:
    model, loss = gpt2()
    parameters = trained(model, "last-1")
    assert {name.split(".")[2] for name in parameters if ".h." in name} == {"1"}
    with Entries("aten::tanh") as activations:  # one of each block's GELU, rows * 4 * 15 entries a copy
        batched_losses(loss, parameters, 0.1, 8, [1, 2, 3, 4])
    once = 3 * 7 * 60
    assert sorted(activations.found) == [once, 8 * once]
    with Entries("aten::tanh") as activations:
        batched_losses(loss, trained(model, "full"), 0.1, 8, [1, 2, 3, 4])
    assert sorted(activations.found) == [8 * once, 8 * once]


def test_copies_of_a_stack_share_its_matrices_and_one_product() -> None:
    model = Stacked(True)
    model.stack = nn.Parameter(torch.ones(3, 48, 8))
    with Entries() as made:
        batched_losses(model.loss, trained(model, "full"), 0.1, 8, [1, 2, 3, 4])
    assert max(made.found) == 8 * 20 * 48  # the products of all rows; all copies' matrices would be 8 * 3 * 48 * 8
    with Entries("aten::_grouped_mm") as products:
        batched_losses(model.loss, trained(model, "full"), 0.1, 8, [1, 2, 3, 4])
    assert products.found == [8 * 20 * 48]


def test_operations_that_torchs_vmap_complains_of_have_a_rule() -> None:
    model = Stacked(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched_losses(lambda: model.loss() + scattered(model).mean(), trained(model, "full"), 0.1, 8)


def scattered(model: Stacked) -> Tensor:
    logits = model.router(ROWS)
    return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1) * logits
