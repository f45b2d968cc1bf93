"""The batched perturbed losses must equal those of really moved weights, for any architecture, and move nothing."""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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

from zofed import metrics, perturbed
from zofed.directions import Kind, direction
from zofed.errors import UserError
from zofed.estimators import Parameters, materialised_losses, two_point
from zofed.models import trainable_names
from zofed.worker import named_parameters


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are far too small for two threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


KINDS: tuple[Kind, ...] = ("rank1", "rademacher")
EPSILON = 3e-4
SEEDS = [3, 1, 4, 15, 9]
Loss = Callable[[], Tensor]


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


def gpt2_config(**more: int) -> GPT2Config:
    return GPT2Config(
        **{"vocab_size": 61, "n_layer": 2, "n_head": 3, "n_embd": 15, "n_positions": 16}
        | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        | more
    )


def gpt2() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config()), (3, 7))


def gpt2_one_token_batch() -> tuple[nn.Module, Loss]:
    return language_model(GPT2LMHeadModel(gpt2_config(vocab_size=13, n_embd=3, n_layer=1)), (1, 2))


def gpt2_classifier() -> tuple[nn.Module, Loss]:
    return classifier(GPT2ForSequenceClassification(gpt2_config(num_labels=3)), [5, 9, 1, 7], 3)


def llama() -> tuple[nn.Module, Loss]:
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    return language_model(LlamaForCausalLM(config), (2, 9))


def bert() -> tuple[nn.Module, Loss]:
    config = BertConfig(
        vocab_size=47,
        hidden_size=18,
        intermediate_size=25,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=16,
        num_labels=2,
        pad_token_id=0,
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
    batched = torch.tensor(perturbed.losses(loss, parameters, SEEDS, epsilon, copies))
    one_by_one = torch.tensor(materialised_losses(loss, parameters, "rank1", SEEDS, epsilon))
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
    batched = perturbed.losses(loss, parameters, SEEDS, 0.05, 6)
    one_by_one = materialised_losses(loss, parameters, "rank1", SEEDS, 0.05)
    assert torch.tensor(batched).numpy() == pytest.approx(torch.tensor(one_by_one).numpy(), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_copies_per_pass_changes_the_speed_and_not_the_losses(name: str) -> None:
    model, loss = MODELS[name]()
    parameters = trained(model, "full")
    first, *others = [
        torch.tensor(perturbed.losses(loss, parameters, SEEDS, EPSILON, copies)) for copies in (2, 4, 6, 16)
    ]
    for other in others:
        assert float((first - other).abs().max()) < 1e-5


def test_more_directions_than_are_kept_at_once_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = plain()
    parameters = trained(model, "full")
    seeds = list(range(11))
    whole = torch.tensor(perturbed.losses(loss, parameters, seeds, 0.01, 4))
    monkeypatch.setattr(perturbed, "QUERIES_AT_ONCE", 4)
    assert torch.tensor(perturbed.losses(loss, parameters, seeds, 0.01, 4)).numpy() == pytest.approx(whole.numpy())


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
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    two_point(loss, trained(model, "full"), kind, SEEDS, EPSILON, 4)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "plain"])
def test_slopes_are_the_directional_derivatives(name: str, kind: Kind) -> None:
    model, loss = MODELS[name]()
    parameters = trained(model, "full")
    gradients = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
    exact = [
        sum(
            float((gradient.double() * direction(kind, seed, key, gradient.shape)).sum())
            for key, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        )
        for seed in SEEDS
    ]
    estimate = two_point(loss, parameters, kind, SEEDS, EPSILON, 4)
    scale = math.sqrt(sum(value**2 for value in exact) / len(exact))
    assert estimate.slopes == pytest.approx(exact, abs=2e-3 * scale)
    assert estimate.forward_passes == 2 * len(SEEDS)
    with torch.no_grad():
        assert estimate.loss == pytest.approx(float(loss()), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_slope_is_positive_where_the_loss_rises_along_the_direction(kind: Kind) -> None:
    weight = nn.Parameter(torch.zeros(2, 3))
    uphill = direction(kind, 8, "w", (2, 3)).float()
    estimate = two_point(lambda: (weight * uphill).sum() + 5, {"w": weight}, kind, [8, 9], 0.25, 4)
    other = float((uphill * direction(kind, 9, "w", (2, 3))).sum())
    assert estimate.slopes == pytest.approx((6.0, other))
    assert estimate.loss == pytest.approx(5.0)


def test_a_parameter_the_loss_never_uses_is_named() -> None:
    model, loss = plain()
    parameters = trained(model, "full") | {"idle": nn.Parameter(torch.zeros(3))}
    with pytest.raises(UserError, match=r"never used .*idle.*set scope"):
        perturbed.losses(loss, parameters, SEEDS, EPSILON, 4)


def test_looking_at_a_parameters_shape_is_no_use_of_it() -> None:
    model, loss = plain()
    idle = nn.Parameter(torch.zeros(3, 3))

    def looking() -> Tensor:
        return loss() + 0 * idle.shape[0] if idle.device.type == "cpu" and idle.dtype == torch.float32 else loss()

    with pytest.raises(UserError, match=r"never used .*idle.*set scope"):
        perturbed.losses(looking, trained(model, "full") | {"idle": idle}, SEEDS, EPSILON, 4)


X = torch.linspace(-1, 2, 12).reshape(3, 4)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(tensor.reshape(1, 1, -1, 4) for tensor in (query, key, value)))


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
    used = {key: everything[key] for key, gradient in zip(everything, gradients, strict=True) if gradient is not None}
    assert used
    batched = perturbed.losses(loss, used, SEEDS, 0.125, 4)
    one_by_one = materialised_losses(loss, used, "rank1", SEEDS, 0.125)
    assert torch.tensor(batched).numpy() == pytest.approx(torch.tensor(one_by_one).numpy(), rel=1e-5, abs=1e-6)
