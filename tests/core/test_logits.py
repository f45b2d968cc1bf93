"""An output layer that is never held gives the loss of one that is, whatever a library does with its logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import MODELS, gpt2_config, ids_of, language_model, llama_config, randomised, relative, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from zofed.base.errors import UserError
from zofed.core import deferred_logits, estimators, metrics, perturbation_mode, perturbed
from zofed.core.deferred_logits import DEFER_FROM, ENTRIES, ROWS, Logits

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 8
VOCABULARIES = (DEFER_FROM - 1, DEFER_FROM, DEFER_FROM + 1, 3 * ENTRIES - 1, 3 * ENTRIES, 3 * ENTRIES + 17)
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-7}  # one step of bfloat16's own grid


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(vocabulary: int, *leading: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the weights of an output layer, targets."""
    target = ids_of(leading, vocabulary)
    return drawn(*leading, WIDTH, dtype=dtype), drawn(vocabulary, WIDTH, dtype=dtype, seed=6), target


@torch.no_grad()
def in_pieces(loss: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with perturbation_mode.in_pieces():
        return loss(*arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_loss_is_that_of_torch(vocabulary: int, dtype: torch.dtype, with_bias: bool, reduction: str) -> None:
    hidden, weight, target = layer(vocabulary, 7, dtype=dtype)
    target[:3] = torch.tensor([0, vocabulary - 1, min(ENTRIES, vocabulary - 1)])  # at the edges of pieces
    bias = drawn(vocabulary, dtype=dtype, seed=8) if with_bias else None

    def loss() -> Tensor:
        output = F.linear(hidden, weight, bias)
        assert isinstance(output, Logits) == (is_lazy and vocabulary >= DEFER_FROM)
        return F.cross_entropy(output, target, reduction=reduction)

    is_lazy = True
    got = in_pieces(loss)
    is_lazy = False
    wanted = loss()
    assert got.dtype == wanted.dtype == dtype
    assert relative(got, wanted) <= TOLERANCES[dtype]


def test_logits_in_bfloat16_made_float_lose_no_more_than_torch_does() -> None:
    hidden, weight, target = layer(DEFER_FROM, 7, dtype=torch.bfloat16)
    got = in_pieces(lambda: F.cross_entropy(F.linear(hidden, weight).float(), target))
    assert got.dtype == torch.float32
    assert relative(got, F.cross_entropy(F.linear(hidden, weight).float(), target)) <= 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 3, 0])
def test_ignored_rows_count_nowhere(ignored: int, reduction: str) -> None:
    hidden, weight, target = layer(DEFER_FROM, 9)
    target[[1, 4, 8]] = ignored

    def loss() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target, ignore_index=ignored, reduction=reduction)

    assert relative(in_pieces(loss), loss()) <= 1e-12


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("vocabulary", [9, DEFER_FROM], ids=["held", "in pieces"])
def test_a_target_beyond_the_output_layer_is_refused_whichever_way_the_loss_is_made(
    vocabulary: int, wrong: int
) -> None:
    """The one above the last and the one below the first; where torch itself has an IndexError."""
    hidden, weight, target = layer(vocabulary, 5)
    target[2], target[3] = (vocabulary, -1)[wrong], -100
    told = (
        f"^the targets reach the id {(vocabulary, -1)[wrong]}, .* has {vocabulary} entries, 0 to {vocabulary - 1}: take"
    )

    def loss(target: Tensor = target) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), target)

    with pytest.raises(IndexError):
        loss()
    with pytest.raises(UserError, match=told):
        in_pieces(loss)
    with pytest.raises(UserError, match=told), perturbation_mode.Watch():
        loss()
    for copies in ({"examples": torch.stack([layer(vocabulary, 5)[2], target])}, {}):  # of each query's own, of all
        with pytest.raises(UserError, match=told) as found:
            perturbed.losses(loss, {"w": weight}, "rank1", [1, 2], (0.1,), 2, **copies)
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match=told):
        perturbed.along(loss, {"w": weight}, "rank1", [1], torch.zeros(1, requires_grad=True))


def test_targets_that_are_probabilities_and_logits_of_one_row_are_let_through() -> None:
    scores = drawn(4, 3)
    for arguments in ((scores, scores.softmax(-1)), (scores[0], torch.tensor(2)), (drawn(2, 3, 5), ids_of((2, 5), 3))):
        assert torch.equal(in_pieces(F.cross_entropy, *arguments), F.cross_entropy(*arguments))
    with pytest.raises(UserError, match=r"the id 3, .* has 3 entries"):
        in_pieces(F.cross_entropy, scores[0], torch.tensor(3))


def test_with_every_row_ignored_the_mean_is_that_of_nothing() -> None:
    hidden, weight, _ = layer(DEFER_FROM, 4)
    target = torch.full((4,), -100)
    assert math.isnan(in_pieces(lambda: F.cross_entropy(F.linear(hidden, weight), target)))  # as torch has it
    assert in_pieces(lambda: F.cross_entropy(F.linear(hidden, weight), target, reduction="sum")) == 0


def test_no_row_at_all() -> None:
    hidden, weight, target = layer(DEFER_FROM, 1)
    assert math.isnan(in_pieces(lambda: F.cross_entropy(F.linear(hidden[:0], weight), target[:0])))


def test_more_rows_than_one_piece_holds() -> None:
    hidden, weight, target = layer(DEFER_FROM + 3, ROWS + 5)
    target[ROWS - 2 : ROWS + 2] = -100
    got = in_pieces(lambda: F.cross_entropy(F.linear(hidden, weight), target))
    assert relative(got, F.cross_entropy(F.linear(hidden, weight), target)) <= 1e-12


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("at", [0, ENTRIES, DEFER_FROM])
def test_logits_of_any_size_neither_overflow_nor_vanish(size: float, at: int) -> None:
    hidden, weight, target = layer(DEFER_FROM + 1, 3, dtype=torch.float32)
    target[0] = at
    bias = torch.zeros(DEFER_FROM + 1)
    bias[at] = size
    got = in_pieces(lambda: F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum"))
    assert relative(got, F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="sum")) <= 1e-6


def test_an_entry_that_is_ruled_out_and_a_piece_of_nothing_else() -> None:
    hidden, weight, target = layer(3 * ENTRIES, 3)
    bias = torch.zeros(3 * ENTRIES, dtype=torch.float64)
    bias[: ENTRIES + 5] = -torch.inf
    target += ENTRIES + 5 - target.min()
    got = in_pieces(lambda: F.cross_entropy(F.linear(hidden, weight, bias), target))
    assert relative(got, F.cross_entropy(F.linear(hidden, weight, bias), target)) <= 1e-12


BATCHED = {
    "hidden": (0, None, None, None),
    "left": (None, 0, None, None),
    "right": (None, None, 1, None),
    "target": (None, None, None, 0),
    "left and right": (None, 0, 0, None),
    "all": (1, 0, 2, 1),
}


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("rows", [6, ROWS // 2 - 10])
@pytest.mark.parametrize("batched", BATCHED)
def test_copies_have_losses_of_their_own(batched: str, rows: int, rank: int) -> None:
    """Whatever the copies differ in; also where pieces hold several copies, and a rest of fewer."""
    copies, dims = 5, BATCHED[batched]
    vocabulary = DEFER_FROM + 1 if rows < 10 else 33
    weight = drawn(vocabulary, WIDTH, seed=1)
    shapes = ((rows, WIDTH), (rows, rank), (rank, vocabulary))
    parts = [drawn(copies, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    target = ids_of((copies, rows), vocabulary)
    target[:, 2] = -100
    everything = [
        part[0] if dim is None else part.movedim(0, dim) for part, dim in zip([*parts, target], dims, strict=True)
    ]

    def one(hidden: Tensor, left: Tensor, right: Tensor, target: Tensor) -> Tensor:
        return Logits(hidden, weight, left, right, hidden.dtype).cross_entropy(target, -100, "mean")

    with torch.no_grad():
        got = torch.vmap(one, in_dims=dims)(*everything)
    wanted = []
    for copy in range(copies):
        hidden, left, right, own = (
            part if dim is None else part.select(dim, copy) for part, dim in zip(everything, dims, strict=True)
        )
        wanted.append(F.cross_entropy(hidden @ weight.T + left @ right, own))
    assert relative(got, torch.stack(wanted)) <= 1e-12


def test_the_sizes_of_the_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = layer(DEFER_FROM, 11)
    wanted = F.cross_entropy(F.linear(hidden, weight), target)
    for rows, entries in ((1, 4095), (4, 501), (11, 5000), (64, 4096)):
        monkeypatch.setattr(deferred_logits, "ROWS", rows)
        monkeypatch.setattr(deferred_logits, "ENTRIES", entries)
        assert relative(in_pieces(lambda: F.cross_entropy(F.linear(hidden, weight), target)), wanted) <= 1e-12


V = DEFER_FROM + 4
Reshaping = Callable[[Any], Any]

LAZY: dict[str, Reshaping] = {
    "view": lambda x: x.view(-1, V),
    "view by rows": lambda x: x.view(10, V),
    "reshape": lambda x: x.reshape(-1, V),
    "reshape to a tuple": lambda x: x.reshape((5, 2, V)),
    "reshape to its own shape": lambda x: x.reshape(x.shape),
    "reshape by size": lambda x: x.view(-1, x.size(-1)),
    "flatten": lambda x: x.flatten(0, 1),
    "flatten by keyword": lambda x: x.flatten(end_dim=1),
    "all but the last position": lambda x: x[..., :-1, :],
    "all but the last position, short": lambda x: x[:, :-1],
    "all but the last, contiguous, flat": lambda x: x[..., :-1, :].contiguous().view(-1, V),
    "one example": lambda x: x[1],
    "the last position": lambda x: x[:, -1],
    "the last position, in full": lambda x: x[:, -1, :],
    "every second": lambda x: x[:, ::2],
    "everything": lambda x: x[...],
    "float": lambda x: x.float(),
    "contiguous": lambda x: x.contiguous(),
    "to its device": lambda x: x.to(x.device),
    "to its type": lambda x: x.to(x.dtype),
}

WHOLE: dict[str, Reshaping] = {
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(x, dim=-1),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "softmax, a method": lambda x: x.softmax(-1),
    "log_softmax and nll_loss": lambda x: F.nll_loss(F.log_softmax(x, -1).flatten(0, 1), TARGET),
    "divided by a number": lambda x: x / 30,
    "capped": lambda x: 30 * torch.tanh(x / 30),
    "twice": lambda x: 2 * x,
    "with a bias": lambda x: x + torch.arange(V),
    "a bias with it": lambda x: torch.arange(V) + x,
    "less": lambda x: 1 - x,
    "negative": lambda x: -x,
    "matrix product": lambda x: x @ MIXED,
    "matrix product from the left": lambda x: drawn(3, 5) @ x,
    "through another layer": lambda x: F.linear(x, drawn(3, V)),
    "max": lambda x: x.max(),
    "torch.max": lambda x: torch.max(x, dim=-1).values,
    "compared": lambda x: (x > 0.5).sum(),
    "compared with a tensor": lambda x: (x == x.max()).sum(),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "topk": lambda x: x.topk(3).values,
    "gathered": lambda x: x.gather(-1, TARGET.view(2, 5, 1)),
    "stacked": lambda x: torch.stack([x, x]),
    "concatenated": lambda x: torch.cat((x, x), 0),
    "by a mask": lambda x: x[torch.tensor([False, True])],
    "by a mask of positions": lambda x: x[torch.arange(10).view(2, 5) % 3 == 0],
    "by positions": lambda x: x[torch.arange(2), torch.tensor([4, 1])],
    "some entries": lambda x: x[..., :7],
    "some entries of all": lambda x: x[:, :, 3:7],
    "one entry": lambda x: x[..., 5],
    "one number": lambda x: x[1, 2, 3],
    "a new dimension": lambda x: x[None],
    "unsqueeze": lambda x: x.unsqueeze(0),
    "transposed": lambda x: x.transpose(1, 2),
    "attribute mT": lambda x: x.mT,
    "view as one row": lambda x: x.view(-1),
    "split entries": lambda x: x.view(2, 5, 2, -1),
    "flatten all": lambda x: x.flatten(),
    "flatten the last": lambda x: x.flatten(1),
    "to another type": lambda x: x.to(torch.float16),
    "double": lambda x: x.double(),
    "one by one": lambda x: sum(row.sum() for row in x.mean(-1)),
    "kl_div": lambda x: F.kl_div(F.log_softmax(x, -1), torch.full((2, 5, V), 1 / V), reduction="sum"),
    "label smoothing": lambda x: F.cross_entropy(x.view(-1, V), TARGET, label_smoothing=0.1),
    "class weights": lambda x: F.cross_entropy(x.view(-1, V), TARGET, weight=WEIGHTS),
    "class weights by module": lambda x: nn.CrossEntropyLoss(WEIGHTS)(x.view(-1, V), TARGET),
    "loss of each row": lambda x: F.cross_entropy(x.view(-1, V), TARGET, reduction="none"),
    "loss over the second dimension": lambda x: F.cross_entropy(x.transpose(1, 2), TARGET.view(2, 5)),
    "loss of one row": lambda x: F.cross_entropy(x[0, 0], TARGET[0]),
    "loss of probabilities": lambda x: F.cross_entropy(x.view(-1, V), F.softmax(drawn(10, V), -1)),
    "shape": lambda x: torch.tensor([*x.shape, *x.size(), x.size(-1), x.dim(), x.ndim, len(x), x.numel()]),
}
TARGET = ids_of((10,), V)
MIXED, OTHER = drawn(V, 2), F.softmax(drawn(2, 5, V), -1)
WEIGHTS = torch.linspace(0.5, 1.5, V, dtype=torch.float64)


def compared(call: Reshaping) -> type:
    """What the call gives for logits that are not there yet; asserts that its value is right."""
    hidden, weight, _ = layer(V, 2, 5)
    bias = drawn(V, seed=8)
    kinds = []

    def run() -> Tensor:
        output = F.linear(hidden, weight, bias)
        assert isinstance(output, Logits)
        value = call(output)
        kinds.append(type(value))
        return value.tensor() if isinstance(value, Logits) else value

    got, wanted = in_pieces(run), call(F.linear(hidden, weight, bias))
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=1e-12 if wanted.dtype == torch.float64 else 2e-3, atol=1e-12)
    return kinds[0]


@pytest.mark.parametrize("name", LAZY)
def test_views_of_the_logits_are_not_computed_yet_and_are_right(name: str) -> None:
    assert compared(LAZY[name]) is Logits


LAZY_TOO: dict[str, Reshaping] = {
    "flatten, counted from the end": lambda x: x.flatten(0, -2),
    "to its device by name": lambda x: x.to("cpu"),
    "to float32": lambda x: x.to(torch.float32),
}


@pytest.mark.parametrize("name", LAZY_TOO)
def test_other_ways_to_say_the_same_compute_nothing_either(name: str) -> None:
    assert compared(LAZY_TOO[name]) is Logits


@pytest.mark.parametrize("name", WHOLE)
def test_anything_else_gets_the_whole_product(name: str) -> None:
    assert compared(WHOLE[name]) is Tensor


@pytest.mark.parametrize("name", LAZY)
def test_the_loss_after_every_view_is_that_of_torch(name: str) -> None:
    hidden, weight, _ = layer(V, 2, 5)

    def loss() -> Tensor:
        rows = LAZY[name](F.linear(hidden, weight))
        return F.cross_entropy(rows.reshape(-1, V), ids_of((rows.shape[:-1].numel(),), V), reduction="sum")

    assert relative(in_pieces(loss), loss()) <= (1e-6 if name == "float" else 1e-12)


UNLIKE_A_TENSOR: dict[str, Reshaping] = {
    "squared": lambda x: x**2,
    "a power of it": lambda x: 2**x,
    "equal to a number": lambda x: (x.flatten(0, 1) == 0).sum(),
    "unlike a number": lambda x: (x != 0).sum(),
    "at least": lambda x: (x >= 0).sum(),
    "at most": lambda x: (x <= 0).sum(),
    "absolute": lambda x: abs(x),
    "whole parts": lambda x: x // 2,
    "remainders": lambda x: x % 2,
}


@pytest.mark.parametrize("name", UNLIKE_A_TENSOR)
def test_every_operator_gets_the_whole_product(name: str) -> None:
    assert compared(UNLIKE_A_TENSOR[name]) is Tensor


def _divided(x: Any) -> Tensor:
    x.div_(30)
    return F.cross_entropy(x.view(-1, V), TARGET)


def _ruled_out(x: Any) -> Tensor:
    x[..., 7:] = -1e4
    return F.cross_entropy(x.view(-1, V), TARGET % 7)


@pytest.mark.parametrize("change", [_divided, _ruled_out])
def test_a_change_in_place_is_seen_by_the_loss(change: Reshaping) -> None:
    assert compared(change) is Tensor


def test_an_ellipsis_that_stands_for_no_dimension() -> None:
    assert compared(lambda x: x[:, :, 3:7, ...]) is Tensor


# --- perturbed ---


class Head(nn.Module):
    """A trunk, and an output layer of the kind under test."""

    def __init__(self, tied: bool, bias: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, WIDTH)
        self.trunk = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, V, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.trunk(self.embedding(ids))))


def agreed(loss: Callable[[], Tensor], model: nn.Module, scope: str, kind: str = "rank1") -> None:
    """The batched losses of a model in float64 are those of moved weights."""
    model.double()
    parameters = trained(model, scope)
    steps = (0.125, -0.125)  # float32 holds them too
    got = perturbed.losses(loss, parameters, kind, [1, 2, 3], steps, 4)
    assert relative(got, estimators.materialised_losses(loss, parameters, kind, [1, 2, 3], steps)) <= 1e-12


@pytest.mark.parametrize("kind", ["rank1", "rank4"])
@pytest.mark.parametrize("scope", ["full", "head.", "head.weight", "head.bias", "trunk", "embedding"])
@pytest.mark.parametrize("tied", [True, False])
def test_losses_of_perturbed_copies(tied: bool, scope: str, kind: str) -> None:
    if tied and scope.startswith("head"):
        scope = {"head.": "head.bias|embedding", "head.weight": "embedding.weight"}.get(scope, scope)
    model = randomised(Head(tied, bias=True), 0.5)
    ids = ids_of((2, 5), V)
    agreed(lambda: F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), model, scope, kind)


OBJECTIVES: dict[str, Reshaping] = {
    "log-sum-exp": lambda x: x.logsumexp(-1).mean(),
    "label smoothing": lambda x: F.cross_entropy(x.view(-1, V), TARGET, label_smoothing=0.1),
    "capped": lambda x: F.cross_entropy(30 * torch.tanh(x / 30).view(-1, V), TARGET),
    "entropy": lambda x: torch.special.entr(F.softmax(x, -1)).sum(),
    "some entries": lambda x: x[..., :7].square().sum(),
    "kl_div": lambda x: F.kl_div(F.log_softmax(x, -1), OTHER, reduction="sum"),
    "the gap to the best": lambda x: (x.max(-1).values - x[..., 3]).mean(),
    "matrix product": lambda x: (x @ MIXED).square().mean(),
}


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *((name, "trunk") for name in OBJECTIVES),
        *((name, "full") for name in OBJECTIVES),
    ],
)
def test_any_objective_of_the_logits_sees_the_perturbation_once(name: str, scope: str) -> None:
    model = randomised(Head(tied=False, bias=False), 0.5)
    ids = ids_of((2, 5), V)
    agreed(lambda: OBJECTIVES[name](model(ids)), model, scope)


def test_an_output_layer_whose_weights_are_computed() -> None:
    model = randomised(Head(tied=True, bias=False), 0.5)
    ids = ids_of((10,), V)

    def loss() -> Tensor:
        hidden = torch.tanh(model.get_submodule("trunk")(model.get_submodule("embedding")(ids)))
        return F.cross_entropy(F.linear(hidden, 0.5 * model.get_parameter("embedding.weight")), ids)

    agreed(loss, model, "full")


HIDDEN = drawn(4, WIDTH)


def test_a_layer_upon_an_output_layer() -> None:
    model = randomised(nn.Sequential(nn.Linear(WIDTH, V), nn.Linear(V, 3)), 0.5)
    agreed(lambda: F.cross_entropy(model(HIDDEN), torch.tensor([0, 2, 1, 0])), model, "weight")


# --- memory ---


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation made; views of what exists already do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, made.numel())
        return result


def large_gpt2() -> nn.Module:
    return language_model(GPT2LMHeadModel(gpt2_config(vocab_size=V, n_layer=1, n_positions=64)), (1, 2))[0]


def large_llama() -> nn.Module:
    config = llama_config(vocab_size=V, num_hidden_layers=1, max_position_embeddings=64)
    return language_model(LlamaForCausalLM(config), (1, 2))[0]


LARGE = {"gpt2": large_gpt2, "llama": large_llama}


@pytest.mark.parametrize("scope", ["full", "last-1"])
@pytest.mark.parametrize("name", LARGE)
def test_no_pass_of_perturbed_copies_holds_the_logits(name: str, scope: str) -> None:
    model, ids = LARGE[name](), ids_of((3, 50), V, lowest=1)
    parameters = trained(model, scope)
    with Largest() as largest:
        perturbed.losses(
            lambda: metrics.loss_of(model, {"input_ids": ids, "labels": ids}),
            parameters,
            "rank1",
            [1, 2],
            (0.1, -0.1),
            4,
        )
    assert largest.entries <= 4 * ids.numel() * ENTRIES  # of the 4 * 150 * 4,100 of all copies' logits
    assert largest.entries < ROWS * ENTRIES


@pytest.mark.parametrize("name", LARGE)
def test_no_evaluation_holds_the_logits(name: str) -> None:
    model, ids = LARGE[name](), ids_of((4, 50), V, lowest=1)
    with torch.no_grad(), Largest() as held:
        wanted = float(metrics.loss_of(model, {"input_ids": ids, "labels": ids}))
    assert held.entries >= ids.numel() * V  # what the others must stay below is seen at all
    with Largest() as largest:
        score = metrics.evaluate(model, {"input_ids": ids, "labels": ids}, 4)
    assert largest.entries <= ids.numel() * ENTRIES
    assert score.loss == pytest.approx(wanted, rel=1e-6)
    assert score.accuracy is None


@pytest.mark.parametrize(("copies", "rows"), [(1, ROWS + 100), (3, 700), (2, ROWS + 100)])
def test_a_piece_stays_small_whatever_the_batch(copies: int, rows: int) -> None:
    weight, target = drawn(DEFER_FROM, WIDTH, dtype=torch.float32), ids_of((rows,), DEFER_FROM)

    def one(hidden: Tensor) -> Tensor:
        return Logits(hidden, weight, hidden[:, :0], weight[:, :0].T, hidden.dtype).cross_entropy(target, -100, "mean")

    with torch.no_grad(), Largest() as largest:
        torch.vmap(one)(drawn(copies, rows, WIDTH, dtype=torch.float32))
    assert largest.entries <= ROWS * ENTRIES


def test_the_unperturbed_loss_of_one_sided_slopes_holds_no_logits_either() -> None:
    model, ids = large_llama(), ids_of((3, 50), V, lowest=1)
    how = estimators.FiniteDifference("rank1", 0.1, "one-sided", 1)
    with Largest() as largest:
        how.slopes(lambda: metrics.loss_of(model, {"input_ids": ids, "labels": ids}), trained(model, "full"), [1, 2])
    assert largest.entries <= ids.numel() * ENTRIES


def test_a_layer_that_merely_widens_is_no_output_layer() -> None:
    x = drawn(2, 1024, dtype=torch.float32)
    for rows, is_deferred in ((4 * 1024, False), (5 * 1024, True), (5 * 1024 - 1, False)):
        weight = torch.zeros(rows, 1024)
        assert isinstance(in_pieces(F.linear, x, weight), Logits) == is_deferred


def test_where_gradients_are_wanted_nothing_is_deferred() -> None:
    model = randomised(Head(tied=True, bias=True), 0.5)
    ids = ids_of((10,), V)
    with perturbation_mode.in_pieces():
        output = model(ids)
        assert type(output) is Tensor
        loss = F.cross_entropy(output, ids)
    got = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(F.cross_entropy(model(ids), ids), list(model.parameters()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["gpt2 classifier", "bert"])
def test_small_output_layers_are_left_alone(name: str) -> None:
    model, loss = MODELS[name]()
    model.double()
    with torch.no_grad():
        assert float(in_pieces(loss)) == float(loss())
