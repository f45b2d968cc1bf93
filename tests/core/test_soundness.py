"""A loss that is no function of the weights alone is refused at its first measurement, or measured another way."""

import itertools
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from federations import federate
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import zofed
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import directions, soundness
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.estimators import FiniteDifference
from zofed.core.refusals import pattern_of
from zofed.federated import exchanges
from zofed.models import spec
from zofed.training import central

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.linspace(-2, 2, 60).mul(7).sin().reshape(12, 5)
Y = torch.arange(12) % 3
Losses = Callable[[nn.Module], Callable[..., Any]]


def net(*middle: nn.Module, before: int = 5) -> nn.Module:
    """A small net in train mode, as torch makes it, with some layers in its middle."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(before, 8), nn.Tanh(), *middle, nn.Linear(8, 3))


def plain(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(X), Y)


def slopes(model: nn.Module, loss: Callable[..., Any], examples: Any = None, **more: Any) -> tuple[float, ...]:
    zo = zofed.ZerothOrder(model, seed=5, **{"queries": 6, "finite_difference": "two-point"} | more)
    zo.measure(loss, 0.05, examples)
    assert zo.estimate is not None
    return zo.estimate.slopes


def moved_slopes(model: nn.Module, loss: Callable[..., Any], examples: Any = None) -> tuple[float, ...]:
    """The same slopes with every direction written into the weights."""
    zo = zofed.ZerothOrder(model, seed=5)
    seeds = directions.direction_seeds(5, 1, 0, 6)
    return (
        FiniteDifference("rank1", zo.epsilon).slopes(loss, zo.replica.parameters, seeds, examples, batched=False).slopes
    )


def bits(model: nn.Module) -> list[bytes]:
    return [tensor.detach().contiguous().numpy().tobytes() for tensor in (*model.parameters(), *model.buffers())]


# --- randomness ---


class Noisy(nn.Module):
    """Adds what a function draws, in whatever mode it is."""

    def __init__(self, draw: Callable[[Tensor], Tensor | float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(x)


class Seldom(nn.Module):
    """A block that is skipped once in a million passes (stochastic depth, LayerDrop): two passes seldom differ."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand([]) < 1e-6 else x.sin()


def own_generator(model: nn.Module) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return lambda: F.cross_entropy(model(X), Y) * torch.rand([], generator=generator)


def own_batches(model: nn.Module) -> Callable[[], Tensor]:
    generator = np.random.default_rng(1)

    def loss() -> Tensor:
        some = torch.from_numpy(generator.integers(0, 12, 4))
        return F.cross_entropy(model(X[some]), Y[some])

    return loss


def next_batches(model: nn.Module) -> Callable[[], Tensor]:
    batches = itertools.cycle([(X[:6], Y[:6]), (X[6:], Y[6:])])

    def loss() -> Tensor:
        x, y = next(batches)
        return F.cross_entropy(model(x), y)

    return loss


EVAL = r"call model\.eval\(\)"
BEFORE = "before asking"
RANDOM: dict[str, tuple[nn.Module, Losses, str, str]] = {
    "dropout": (net(nn.Dropout(0.1)), plain, r"2 \(Dropout\)", EVAL),
    "feature dropout": (net(nn.AlphaDropout(0.2)), plain, r"2 \(AlphaDropout\)", EVAL),
    "a random slope": (net(nn.RReLU()), plain, r"2 \(RReLU\)", EVAL),
    "a block seldom skipped": (net(Seldom()), plain, r"2 \(Seldom\)", EVAL),
    "functional dropout": (net(Noisy(lambda x: F.dropout(x, 0.1))).eval(), plain, r"2 \(Noisy\)", "training=self"),
    "noise of torch": (net(), lambda m: lambda: plain(m)() + 1e-6 * torch.rand([]), "calls rand", BEFORE),
    "noise of numpy": (net(Noisy(lambda _: np.random.rand() * 1e-3)), plain, "NumPy's generator", BEFORE),
    "noise of Python": (net(Noisy(lambda _: random.random() * 1e-3)), plain, "module random", BEFORE),
    "an own generator": (net(), own_generator, "calls rand", BEFORE),
    "an own batch each time": (net(), own_batches, "another batch", BEFORE),
    "the next batch": (net(), next_batches, "another batch", BEFORE),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_loss_that_draws_anew_at_each_pass_is_refused_and_whoever_draws_named(name: str) -> None:
    model, loss, who, remedy = RANDOM[name]
    before = bits(model)
    with pytest.raises(UserError, match=f"(?s){who}.*{remedy}"):
        slopes(model, loss(model))
    assert bits(model) == before


@pytest.mark.parametrize("kind", ["rank1", "rademacher"])
def test_dropout_is_refused_for_examples_of_each_query_and_for_any_kind_until_eval_is_called(kind: str) -> None:
    model = net(nn.Dropout(0.1))
    examples = {"x": X.expand(6, -1, -1), "y": Y.expand(6, -1)}
    zo = zofed.ZerothOrder(model, seed=5, queries=6, directions=kind)

    def loss(batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"])

    with pytest.raises(UserError, match=r"2 \(Dropout\)"):
        zo.measure(loss, 0.05, examples)
    zo.apply(zo.measure(plain(model.eval()), 0.05))
    with pytest.raises(UserError, match=r"2 \(Dropout\)"):
        zo.measure(plain(model.train()), 0.05)
    model.eval()
    zo.apply(zo.measure(loss, 0.05, examples))


def test_what_could_draw_and_does_not_is_not_named() -> None:
    """Attention may drop out, a part in eval mode does not: only the dropout beside it is to blame."""
    model = net(nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), nn.Flatten())
    model.append(nn.Dropout(0.1))
    with pytest.raises(UserError, match=r"noise: 6 \(Dropout\); call model\.eval"):
        slopes(model, plain(model))


def test_the_remedies_for_dropout_give_the_slopes_of_the_net_without_it() -> None:
    calm, still = net(nn.Dropout(0.1)).eval(), net(nn.Dropout(0.0))
    assert slopes(calm, plain(calm)) == slopes(still, plain(still))
    assert slopes(calm, plain(calm)) == pytest.approx(moved_slopes(calm, plain(calm)), rel=0.02, abs=1e-3)


def test_numbers_that_are_drawn_alike_at_each_pass_are_no_noise() -> None:
    """One mask for all passes of a step: a loss that seeds its generator itself."""
    model = net(nn.Dropout(0.3))

    def loss() -> Tensor:
        torch.manual_seed(7)
        return F.cross_entropy(model(X), Y)

    def own() -> Tensor:
        return plain(model.eval())() * torch.rand([], generator=torch.Generator().manual_seed(2))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # measured one by one: no random numbers for many copies
        assert slopes(model, loss) == pytest.approx(moved_slopes(model, loss), rel=1e-4)
        assert slopes(model, own) == pytest.approx(moved_slopes(model, own), rel=1e-4)


def test_the_mean_over_a_data_loader_is_no_noise_though_a_loader_draws_seeds() -> None:
    model, loader = net(), DataLoader(TensorDataset(X, Y), batch_size=5)

    def loss() -> Tensor:
        return torch.stack([F.cross_entropy(model(x), y) for x, y in loader]).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert slopes(model, loss) == pytest.approx(moved_slopes(model, loss), rel=1e-4)


def test_a_loss_may_differ_by_rounding_from_pass_to_pass() -> None:
    """As sums by atomics do."""
    model, factors = net(), itertools.cycle([1.0, 1 + 2**-22])
    assert any(slopes(model, lambda: plain(model)() * next(factors)))


def test_a_loss_that_draws_only_at_shifted_weights_is_refused() -> None:
    model = net()
    at = model[0].weight.detach().clone()

    def loss() -> Tensor:
        value = plain(model)()
        return value if torch.equal(model[0].weight, at) else value + 1e-3 * torch.rand([])

    with pytest.raises(UserError, match=r"draws random numbers .*shifted weights.* rand"):
        slopes(model, loss)


def test_a_loss_of_many_numbers_is_refused() -> None:
    model = net()
    with pytest.raises(UserError, match=r"shape \(12,\), but must be one number: take its mean"):
        slopes(model, lambda: F.cross_entropy(model(X), Y, reduction="none"))


@pytest.mark.parametrize("mode", ["zo", "instruct", "subspace"])
def test_a_run_refuses_a_model_that_draws(
    mode: str, quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = spec.ready
    monkeypatch.setattr(spec, "ready", lambda model, dtype: ready(model, dtype).train())
    with pytest.raises(UserError, match=r"Dropout\).*eval"):
        central.train(quick(mode=mode, subspace_size=4), tmp_path / "run", lambda row: None)


def test_a_client_refuses_a_model_that_draws_and_says_so(
    quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ready = spec.ready
    monkeypatch.setattr(spec, "ready", lambda model, dtype: ready(model, dtype).train())
    monkeypatch.setattr(exchanges, "ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"round 1: clients .* gave no usable reply"):
        federate(quick(), tmp_path / "run", 2)
    assert (
        "draws random numbers at each pass" in "".join(capfd.readouterr()) + (tmp_path / "run/clients.csv").read_text()
    )


def test_a_loss_that_no_shift_moves_is_told(recwarn: pytest.WarningsRecorder) -> None:
    model = net()
    assert not any(slopes(model, lambda: (model(X).argmax(-1) == Y).float().mean()))
    assert "the same at all shifted weights, so that nothing moves: raise epsilon = 0.0003" in str(
        recwarn.pop().message
    )


# --- state ---


class Stateful(nn.Module):
    """Does something to itself at each pass."""

    def __init__(self, change: Callable[[Any], Any], persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(8), persistent=persistent)
        self.scale = nn.Parameter(torch.full((8,), 1.5))
        self.fixed = nn.Parameter(torch.ones(8))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return x * self.scale * self.fixed + 0 * self.state


def kept_embedding(x: Tensor, weight: Tensor) -> Tensor:
    return F.embedding((x > 0).long(), weight, max_norm=0.5).mean(1)


class Limited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return kept_embedding(x, self.table)


IN_EVAL, OUT = r"model\.eval\(\)", "out of the forward pass"
STATE: dict[str, tuple[nn.Module, str, str]] = {
    "batch norm": (net(nn.BatchNorm1d(8)), r"'2\.running_mean' of BatchNorm1d and 2 more", IN_EVAL),
    "instance norm": (net(nn.InstanceNorm1d(12, track_running_stats=True)), "InstanceNorm1d", IN_EVAL),
    "spectral norm": (net(parametrizations.spectral_norm(nn.Linear(8, 8))), "_SpectralNorm", IN_EVAL),
    "a counter": (net(Stateful(lambda m: m.state.add_(1))).eval(), r"'2\.state' of Stateful", OUT),
    "a passing counter": (net(Stateful(lambda m: m.state.add_(1), False)).eval(), r"'2\.state' of Stateful", OUT),
    "a new buffer": (net(Stateful(lambda m: setattr(m, "state", m.state + 1))).eval(), r"'2\.state'", OUT),
    "what data fills once": (net(Stateful(lambda m: m.state.fill_(1.0))).eval(), r"'2\.state'", "run the loss once"),
    "a weight that is held": (net(Stateful(lambda m: m.scale.data.clamp_(0, 2))), r"clamp_\) into .*2\.scale", OUT),
    "a weight put elsewhere": (
        net(Stateful(lambda m: m.scale.data.set_(torch.ones(8)))),
        r"set_\) into .*2\.scale",
        OUT,
    ),
    "a frozen weight": (net(Stateful(lambda m: m.fixed.data.add_(0.1))), r"add_\) into .*'2\.fixed'", OUT),
    "a weight behind torch": (net(Stateful(lambda m: m.fixed.detach().numpy().__iadd__(1))), r"'2\.fixed'", "lost"),
    "limited embeddings": (
        nn.Sequential(nn.Embedding(3, 4, max_norm=1.0)),
        r"'0\.weight' of Embedding",
        "max_norm = No",
    ),
    "a limit in a call": (net(Limited()), r"embedding_renorm_\) into .*'2\.table'", OUT),
}


@pytest.mark.parametrize("name", STATE)
def test_a_loss_that_changes_the_model_is_refused_and_what_it_changed_is_named(name: str) -> None:
    model, what, remedy = STATE[name]
    before = bits(model)
    trainable = [key for key in named_parameters(model) if "fixed" not in key]
    loss = (lambda: model(Y).square().mean()) if "limited" in name else plain(model)
    with pytest.raises(UserError, match=f"(?s){what}.*{remedy}"):
        slopes(model, loss, trainable=trainable)
    assert (bits(model) == before) is (name != "a weight behind torch")


def test_a_cache_that_the_first_pass_fills_is_no_state() -> None:
    model = net(Stateful(lambda m: m.state.fill_(1.0), persistent=False))
    assert any(slopes(model, plain(model)))


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_parametrization_that_comes_and_goes_within_a_pass_writes_nothing() -> None:
    """As peft's adapters of experts do it."""
    model = net()

    def loss() -> Tensor:
        parametrize.register_parametrization(model[0], "weight", Doubling())
        try:
            return plain(model)()
        finally:
            parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)

    assert slopes(model, loss) == pytest.approx(moved_slopes(model, loss), abs=1e-3)
    assert slopes(model, loss) != pytest.approx(slopes(model, plain(model)), abs=1e-2)


def test_a_norm_in_eval_mode_trains_and_replays_to_the_same_loss(tmp_path: Path) -> None:
    def made() -> nn.Module:
        model = net(nn.BatchNorm1d(8))
        with torch.no_grad():
            model(3 * X + 1)  # statistics of the data, before training
        return model.eval()

    model, again = made(), made()
    zo = zofed.ZerothOrder(model, seed=1, queries=6, journal=tmp_path / "j")
    for _ in range(3):
        zo.apply(zo.measure(plain(model), 0.05))
    assert zofed.replay(again, tmp_path / "j") == zo.digest()
    assert bits(again) == bits(model)
    assert torch.equal(plain(again)(), plain(model)())


def test_the_digest_reads_the_buffers_that_are_saved_and_no_others() -> None:
    model = net(nn.BatchNorm1d(8))
    digest = weights_digest(model)
    model[2].running_var[3] += 2**-20
    assert weights_digest(model) != digest
    with pytest.raises(UserError, match="base weights"):
        zofed.core.replica.Replica(net(nn.BatchNorm1d(8)), zofed.ZerothOrder(model, seed=1).replica.genesis)
    passing = net()
    digest = weights_digest(passing)
    passing.register_buffer("cache", torch.ones(3), persistent=False)
    assert weights_digest(passing) == digest


# --- batched passes ---


class Half(torch.autograd.Function):
    """A product whose rule for many copies forgets a factor."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, int]:
        weight = weight if in_dims[1] is not None else weight.expand(info.batch_size, -1, -1)
        middle = weight.mean(0, keepdim=True)
        return x @ (middle + (weight - middle) / 2).mT, 0


class WithFunction(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Half.apply(x, self.weight * 1.0) + self.bias  # type: ignore[operator]


class Tied(nn.Linear):
    """Reads its weight a second time where no call shows it."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.again = [self.weight.detach()]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh() @ self.again[0]


class Scripted(nn.Linear):
    """Reads its weight twice, once where Python does not see it."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.inner = [torch.jit.script(nn.Linear(8, 8))]
        self.inner[0].weight = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.inner[0](x)


MISBATCHED: dict[str, Callable[[], nn.Module]] = {
    "a wrong rule of a function": lambda: WithFunction(8, 8),
    "a weight read twice": Tied,
    "a weight shared with a script": Scripted,
}


@pytest.mark.parametrize("name", MISBATCHED)
def test_a_loss_that_comes_out_otherwise_for_many_copies_is_measured_one_by_one(name: str) -> None:
    model = net(MISBATCHED[name]()).eval()
    with pytest.warns(UserWarning, match="its loss for a perturbed copy is .*written into the weights") as said:
        found = slopes(model, plain(model))
    assert len(said) == 1
    assert found == pytest.approx(moved_slopes(model, plain(model)), rel=1e-6)


class Checkpointed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[return-value]


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight.tanh()


def hooked() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, inputs, output: output * 2 + module.weight.sum())
    return layer


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(8, 8), "weight", Doubled())


SOUND: dict[str, Callable[[], nn.Module]] = {
    "checkpointing": lambda: Checkpointed(8, 8),
    "a parametrization": parametrized,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
    "a hook": hooked,
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_comes_out_alike_stays_batched(name: str, dtype: torch.dtype) -> None:
    model = net(SOUND[name]()).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the loss cannot run for many")
        found = slopes(model, lambda: F.cross_entropy(model(X.to(dtype)).float(), Y))
    if dtype == torch.float32:
        assert found == pytest.approx(moved_slopes(model, plain(model)), rel=0.01, abs=2e-3)


def test_a_compiled_module_runs_batched_as_it_was_written() -> None:
    model = net().eval()
    fast = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slopes(model, lambda: F.cross_entropy(fast(X), Y)) == slopes(model, plain(model))


def test_large_tensors_are_shifted_in_some_columns_and_come_back_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundness, "SHIFTED", 16)
    model = net(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(4, 8)).eval()
    model[3].to(memory_format=torch.channels_last)
    before = bits(model)
    factors = soundness._direction(named_parameters(model))
    assert [int((factors[key][1] != 0).sum()) for key in ("0.weight", "3.weight")] == [2, 4]
    with soundness._shifted(dict(named_parameters(model)), factors, 1.0):
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), fresh_like(model, before), strict=True))
    assert bits(model) == before
    assert any(slopes(model, plain(model)))


def fresh_like(model: nn.Module, before: list[bytes]) -> list[Tensor]:
    return [
        torch.frombuffer(bytearray(raw), dtype=torch.float32).view(parameter.shape)
        for parameter, raw in zip(model.parameters(), before, strict=True)
    ]


def test_the_check_runs_once_and_changes_no_number() -> None:
    model, calls = net(), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return plain(model)()

    zo = zofed.ZerothOrder(model, seed=5, queries=6, perturbations_per_pass=6)
    counts = []
    for _ in range(3):
        start = calls
        zo.measure(loss, 0.05)
        counts.append(calls - start)
    assert counts[1:] == [2, 2]  # one batched pass of six copies, one at the weights themselves
    assert counts[0] - counts[1] <= 6
    assert zo.estimate is not None and zo.estimate.forward_passes == 7  # of the step: the check is not among them


# --- parameters that a loss leaves out, and such that share memory ---


class WithIdle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.idle = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.idle[0].bias[0]


@pytest.mark.parametrize("scope", ["full", r"^(body\.3|idle)"])
def test_the_scope_that_a_refusal_of_unused_parameters_names_trains_the_rest(scope: str) -> None:
    model = WithIdle()
    trainable = [name for name in named_parameters(model) if scope == "full" or re.search(scope, name)]
    with pytest.raises(UserError, match=r"never used .*idle\.0\.weight, idle\.1\.weight, idle\.1\.bias: set") as told:
        slopes(model, plain(model), trainable=trainable)
    (pattern,) = re.findall(r"'(.*)'$", str(told.value))
    zo = zofed.ZerothOrder(model, seed=1, trainable=pattern)
    assert list(zo.replica.parameters) == [n for n in trainable if not re.search(r"idle\.(0\.weight|1)", n)]
    zo.apply(zo.measure(plain(model), 0.05))


def test_a_pattern_is_found_in_just_the_names_asked_for() -> None:
    every = ["a.x.weight", "a.x.bias", "a.xy.weight", "b", "b2", "c.0.weight", "c.1.weight"]
    for count in range(1, len(every)):
        for chosen in itertools.combinations(every, count):
            assert tuple(name for name in every if re.search(pattern_of(chosen, every), name)) == chosen


def test_parameters_in_the_same_memory_are_refused_and_tied_ones_are_not() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(
        UserError, match=r"'0\.weight' and '1\.weight' lie in the same memory.* assigning the parameter"
    ):
        zofed.ZerothOrder(model, seed=1)
    model[1].weight = model[0].weight
    assert any(slopes(model, lambda: model(X).square().mean()))
