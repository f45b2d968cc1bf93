"""The batched perturbed losses must equal those of really moved weights, for any architecture, and move nothing."""

import math
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from zofed.base.errors import UserError
from zofed.core import directions, estimators, kinds, metrics, perturbed
from zofed.core.deferred_logits import DEFER_FROM
from zofed.core.digests import named_parameters
from zofed.core.directions import direction
from zofed.core.estimators import Estimate, FiniteDifference, Parameters, Points
from zofed.core.genesis import make_genesis
from zofed.core.kinds import Kind
from zofed.core.optimizers import Optimizer
from zofed.core.replica import Replica
from zofed.models.scopes import trainable_names

pytestmark = pytest.mark.usefixtures("one_thread")


KINDS: tuple[Kind, ...] = ("rank1", "rank4", "rademacher", "gaussian")
EPSILON = 3e-4
SEEDS = [3, 1, 4, 15, 9]
Loss = Callable[[], Tensor]


def batched_losses(
    loss: Loss, parameters: Parameters, epsilon: float, copies: int, seeds: Sequence[int] = SEEDS, kind: Kind = "rank1"
) -> Tensor:
    """Losses at both ends of each direction, many copies in one pass."""
    return perturbed.losses(loss, parameters, kind, seeds, (epsilon, -epsilon), copies)


def moved_losses(loss: Loss, parameters: Parameters, epsilon: float, kind: Kind = "rank1") -> Tensor:
    """The same with weights that are really moved, one after the other."""
    return estimators.materialised_losses(loss, parameters, kind, SEEDS, (epsilon, -epsilon))


def two_point(
    loss: Loss, parameters: Parameters, kind: Kind, seeds: Sequence[int], epsilon: float, copies: int
) -> Estimate:
    return FiniteDifference(kind, epsilon, perturbations_per_pass=copies).slopes(loss, parameters, seeds)


class Plain(nn.Module):
    """What no library interception expects: a convolution, a parameter used twice, products, sums, a scalar, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv1d(6, 5, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.randn(5))
        self.start = nn.Parameter(torch.randn(1, 1, 5))
        self.twice = nn.Linear(5, 5)
        self.mix = nn.Parameter(torch.randn(5, 5))
        self.head = nn.Linear(5, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2) * self.scale
        x = torch.cat([self.start.expand(len(ids), -1, -1), x], dim=1)
        x = torch.tanh(self.twice(x)) + F.linear(self.twice(x), self.twice.weight.T) + 1e-1 * x @ self.mix
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids.flatten())


def randomised(model: nn.Module, size: float = 0.2) -> nn.Module:
    """Weights of ordinary size everywhere, so that no perturbation hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * drawn if parameter.dim() == 1 else size * drawn)
    return model.eval()


def ids_of(shape: tuple[int, ...], vocabulary: int, lowest: int = 0) -> Tensor:
    return torch.randint(lowest, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def language_model(model: PreTrainedModel, shape: tuple[int, int]) -> tuple[nn.Module, Loss]:
    model.config.use_cache = False
    ids = ids_of(shape, model.config.vocab_size)
    return randomised(model), lambda: metrics.loss_of(model, {"input_ids": ids, "labels": ids})


def classifier(model: PreTrainedModel, lengths: Sequence[int], classes: int) -> tuple[nn.Module, Loss]:
    """A batch of documents of different lengths, padded on the right."""
    model.config.use_cache = False
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = ids_of((len(lengths), max(lengths)), model.config.vocab_size, lowest=1) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % classes}
    return randomised(model), lambda: metrics.loss_of(model, batch)


def gpt2_config(**more: Any) -> GPT2Config:
    sizes: dict[str, Any] = {"vocab_size": 61, "n_layer": 2, "n_head": 3, "n_embd": 15, "n_positions": 16}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | more
    return GPT2Config(**sizes)


def llama_config(**more: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaConfig(**sizes | {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2} | more)


def gpt2() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config()), (3, 7))


def gpt2_one_token_batch() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config(vocab_size=13, n_embd=3, n_layer=1)), (1, 2))


def gpt2_classifier() -> tuple[nn.Module, Loss]:
    return classifier(GPT2ForSequenceClassification(gpt2_config(num_labels=3)), [5, 9, 1, 7], 3)


def llama() -> tuple[nn.Module, Loss]:
    config = llama_config()
    return language_model(LlamaForCausalLM(config), (2, 9))


def bert() -> tuple[nn.Module, Loss]:
    classes: dict[str, Any] = {"num_labels": 2}
    config = BertConfig(
        vocab_size=47,
        hidden_size=18,
        intermediate_size=25,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        pad_token_id=0,
        **classes,
    )
    return classifier(BertForSequenceClassification(config), [6, 3, 8], 2)


def plain() -> tuple[nn.Module, Loss]:
    model, ids = randomised(Plain(), 0.5), ids_of((3, 5), 11, lowest=1)  # autograd would skip the padding row
    return model, lambda: model(ids)


MODELS = {
    "gpt2": gpt2,
    "gpt2 one token": gpt2_one_token_batch,
    "gpt2 classifier": gpt2_classifier,
    "llama": llama,
    "bert": bert,
    "plain": plain,
}


def trained(model: nn.Module, scope: str) -> Parameters:
    parameters = named_parameters(model)
    return {name: parameters[name] for name in trainable_names(model, scope)}


def bits_of(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


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


LARGE_VOCABULARY = DEFER_FROM + 3


def logits_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross-entropy of a library's model without its conversion to float32."""
    labels, inputs = batch["labels"], {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def batch_of(name: str, vocabulary: int) -> dict[str, Tensor]:
    if name in ("bert", "gpt2 classifier"):
        mask = (torch.arange(8) < torch.tensor([6, 3, 8])[:, None]).long()
        ids = ids_of((3, 8), vocabulary, lowest=1) * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 0])}
    ids = ids_of((2, 7), vocabulary)
    return {"input_ids": ids, "labels": ids}


def gpt2_large_vocabulary() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config(vocab_size=LARGE_VOCABULARY, n_layer=1)), (2, 7))


SMOOTH = {name: MODELS[name] for name in ("gpt2", "llama", "bert", "gpt2 classifier", "plain")} | {
    "gpt2 large vocabulary": gpt2_large_vocabulary
}


def smooth(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Loss]:
    """A model in float64, and its loss in float64."""
    model, loss = SMOOTH[name]()
    model.to(dtype)
    if name == "plain":
        return model, loss
    assert isinstance(model, PreTrainedModel)
    batch = batch_of(name, model.config.vocab_size)
    return model, lambda: logits_loss(model, batch)


def kinds_of_parameters(model: nn.Module) -> dict[str, Parameters]:
    """The parameters by the type of their module and their own name, and all of them as `all`."""
    found: dict[str, Parameters] = {"all": {}}
    for name, parameter in trained(model, "full").items():
        module, _, own = name.rpartition(".")
        kind = f"{type(model.get_submodule(module)).__name__}.{own}"
        found.setdefault(kind, {})[name] = parameter
        found["all"][name] = parameter
    return found


def relative(got: Tensor, wanted: Tensor) -> float:
    return float(((got - wanted).abs() / wanted.abs()).max())


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


class Pooled(nn.Module):
    """A classifier of padded documents that looks at the mask by arithmetic alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(23, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        heads = (x.unsqueeze(1), self.inner(x).unsqueeze(1), x.unsqueeze(1))
        x = F.scaled_dot_product_attention(*heads, attn_mask=attention_mask[:, None, None, :].bool()).squeeze(1)
        weights = attention_mask.unsqueeze(-1).to(x)
        return self.head((x * weights).sum(1) / weights.sum(1))


def padded_documents(queries: int, vocabulary: int) -> dict[str, Tensor]:
    """Three documents for each query, of different lengths; the masks differ from query to query."""
    lengths = torch.arange(queries * 3).reshape(queries, 3) % 6 + 2
    mask = (torch.arange(7) < lengths[..., None]).long()
    ids = ids_of((queries, 3, 7), vocabulary, lowest=1) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": (lengths + ids[..., 0]) % 2}


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


# --- what a replica does with a loss that cannot run for many copies at once ---


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


# --- attention ---

ATTENTION_X = torch.linspace(-1, 1, 2 * 3 * 6 * 4, dtype=torch.float64).mul(9).sin().reshape(2, 3, 6, 4)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "four dimensions": lambda w: attend(ATTENTION_X, w),
    "a mask for all": lambda w: attend(ATTENTION_X, w, attn_mask=CAUSAL[None, None]),
    "a mask for each example": lambda w: attend(ATTENTION_X, w, attn_mask=torch.stack([CAUSAL, CAUSAL.T])[:, None]),
    "a mask for each head": lambda w: attend(ATTENTION_X, w, attn_mask=torch.stack([CAUSAL, CAUSAL.T, CAUSAL])[None]),
    "a mask to be added": lambda w: attend(ATTENTION_X, w, attn_mask=ATTENTION_X[:, :1] @ ATTENTION_X[:, 1:2].mT),
    "a perturbed mask": lambda w: attend(ATTENTION_X, w, attn_mask=ATTENTION_X @ w @ ATTENTION_X.mT),
    "causal": lambda w: attend(ATTENTION_X, w, is_causal=True),
    "shared heads": lambda w: F.scaled_dot_product_attention(
        ATTENTION_X.flatten(0, 1)[None] @ w, ATTENTION_X[:1] @ w, ATTENTION_X[:1] @ w, enable_gqa=True
    ),
    "unperturbed keys": lambda w: F.scaled_dot_product_attention(ATTENTION_X @ w, ATTENTION_X, ATTENTION_X),
    "unperturbed queries": lambda w: F.scaled_dot_product_attention(ATTENTION_X, ATTENTION_X, ATTENTION_X @ w),
    "three dimensions": lambda w: attend(ATTENTION_X[0], w, is_causal=True),
}
ATTENTIONS_OF_FEWER_DIMENSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "two dimensions": lambda w: attend(ATTENTION_X[0, 0], w),
    "two dimensions, causal": lambda w: attend(ATTENTION_X[0, 0], w, is_causal=True),
    "a mask of two dimensions": lambda w: attend(ATTENTION_X, w, attn_mask=CAUSAL),
    "a mask of three dimensions": lambda w: attend(ATTENTION_X, w, attn_mask=CAUSAL[None]),
    "three dimensions, a mask of two": lambda w: attend(ATTENTION_X[0], w, attn_mask=CAUSAL),
}


def attend(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(x @ weight, x @ weight.T, x @ weight, **options)


def assert_attends(call: Callable[[Tensor], Tensor]) -> None:
    weight = nn.Parameter(torch.linspace(-1, 1, 16, dtype=torch.float64).mul(5).cos().reshape(4, 4))

    def loss() -> Tensor:
        output = call(weight)
        return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).square().sum()

    for copies in (1, 2, 4, 6):
        got = perturbed.losses(loss, {"w": weight}, "rank1", [1, 2, 3], (0.125, -0.125), copies)
        wanted = estimators.materialised_losses(loss, {"w": weight}, "rank1", [1, 2, 3], (0.125, -0.125))
        assert relative(got, wanted) < 1e-12


@pytest.mark.parametrize("name", ATTENTIONS)
def test_copies_attend_to_themselves_alone(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where it runs the copies one by one
        assert_attends(ATTENTIONS[name])


@pytest.mark.parametrize("name", ATTENTIONS_OF_FEWER_DIMENSIONS)
def test_copies_attend_to_themselves_alone_in_fewer_dimensions(name: str) -> None:
    assert_attends(ATTENTIONS_OF_FEWER_DIMENSIONS[name])


# --- cost ---


class Entries(TorchDispatchMode):
    """How many entries each call of one operation made."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.found = name, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() == self.name:
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
