"""Quantised bases: what is rounded and how, every mode over one, and runs that replay on the unquantised weights."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federate, ignore, records_of
from networks import gpt2_config, ids_of, llama_config, relative
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForSequenceClassification,
)

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core import estimators, metrics, perturbed
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.genesis import make_genesis
from zofed.core.journal import genesis_chain, link
from zofed.core.optimizers import Optimizer
from zofed.core.records import Seeded
from zofed.core.replica import Replica
from zofed.data import encoding
from zofed.models import precision, quantised, scopes, spec
from zofed.models.quantised import Kind, Quantised
from zofed.preflight import model_info
from zofed.runs.run_folder import RunFolder
from zofed.training import central
from zofed.training.finalize import replay_run
from zofed.training.replicas import replica_of

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'zofed[quantised]'")

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("int8", "nf4")
SEEDS = [3, 1, 4, 15, 9]
# Dettmers et al., "QLoRA", 2023, appendix E.
NF4 = (-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(gpt2_config())


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(llama_config())


def spread(model: nn.Module) -> nn.Module:
    """The model with weights large enough for every layer to matter, the same for every call."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.2).add(parameter.dim() == 1))
    return model.eval()


def rounded(model: nn.Module, kind: Kind, trainable: list[str], scope: str = "norms") -> list[str]:
    names = quantised.names(model, kind, trainable, scope)
    quantised.quantise(model, kind, names, CPU)
    return names


def made_whole(model: nn.Module) -> nn.Module:
    """Plain linear layers of the rounded values in the place of the quantised ones; in place."""
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, Quantised):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight = nn.Parameter(layer.matrix(), requires_grad=False)
            plain.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, plain)
    return model


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    ids = ids_of((3, 7), 53, lowest=3)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return lambda: metrics.loss_of(model, batch)


@pytest.mark.parametrize("shape", [(64, 64), (48, 130), (30, 66), (8, 33), (7, 33)])
def test_rounded_matrices_are_those_of_the_published_formats(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    matrix[3] = 0.0
    held = {}
    for kind in KINDS:
        block = nn.ModuleList([nn.Linear(shape[1], shape[0])])
        block[0].weight = nn.Parameter(matrix.clone())
        model = nn.ModuleDict({"blocks": block})
        rounded(model, kind, [])
        held[kind] = next(layer.matrix() for layer in model.modules() if isinstance(layer, Quantised))
    scales = matrix.half().abs().amax(1, keepdim=True).float()
    steps = (matrix / scales.clamp(min=1e-9) * 127).round() * scales / 127
    assert (held["int8"] - steps).abs().max() <= 1.01 * scales.max() / 127  # of halves, where float16 rounds first
    assert ((held["int8"] - steps).abs() > 1e-5).float().mean() < 0.05
    flat = torch.cat([matrix.flatten(), torch.zeros(-matrix.numel() % 64)]).view(-1, 64)
    largest = flat.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = (flat / largest.clamp(min=1e-30))[..., None].sub(levels).abs().argmin(-1)
    wanted = (levels[nearest] * largest).flatten()[: matrix.numel()].view(shape)
    assert torch.allclose(held["nf4"], wanted, rtol=1e-6, atol=1e-7)
    assert bool((held["nf4"][3] == 0).all() if shape[1] % 64 == 0 else True)


def test_what_is_rounded_are_the_linear_layers_in_blocks_and_nothing_that_trains() -> None:
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=53, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )
    t5 = T5ForSequenceClassification(T5Config(vocab_size=53, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    for model, inside, count in (
        (gpt2(), "transformer.h.", 8),
        (llama(), "model.layers.", 14),
        (bert, "bert.encoder.layer.", 12),
        (t5, ".block.", 2 * (4 + 1) + 2 * (8 + 1)),  # without `wo`, which the library keeps in float32
    ):
        names = quantised.names(model, "nf4", scopes.trainable_names(model, "norms"), "norms")
        assert len(names) == count and all(inside in name for name in names)
        everything, before = scopes.trainable_names(model, "full"), scopes.true_count(model)
        shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(model).items()}
        quantised.quantise(model, "nf4", names, CPU)
        assert [*named_parameters(model)] == everything and scopes.true_count(model) == before
        now = {name: tuple(parameter.shape) for name, parameter in named_parameters(model).items()}
        assert {name for name in now if now[name] != shapes[name]} == set(names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("what", ["norms", "biases", "lora"])
def test_batched_losses_and_gradients_over_a_quantised_base_are_those_of_its_rounded_values(
    build: Callable[[], PreTrainedModel], what: str, kind: Kind
) -> None:
    model = build()
    if what == "lora":
        peft: Any = pytest.importorskip("peft", reason="peft is not installed")
        targets = ["c_attn", "c_proj"] if build is gpt2 else ["q_proj", "down_proj"]
        wanted = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=build is gpt2)
        peft.inject_adapter_in_model(wanted, model)
    elif what == "biases" and build is llama:
        pytest.skip("a Llama has no biases")
    spread(model)
    pattern = "lora_" if what == "lora" else what
    names = scopes.trainable_names(model, pattern)
    chosen = rounded(model, kind, names, pattern)
    assert chosen and not any("lora_" in name for name in chosen)
    everything = named_parameters(model)
    trained: dict[str, Tensor] = {name: everything[name] for name in names}
    for name, parameter in everything.items():
        parameter.requires_grad_(name in trained)
    loss = loss_of(model)
    got = perturbed.losses(loss, trained, "rank1", SEEDS, (0.1, -0.1), 4)
    moved = estimators.materialised_losses(loss, trained, "rank1", SEEDS, (0.1, -0.1))
    assert relative(got, moved) < 2e-6
    assert relative(moved[:, :1], moved[:, 1:]) > 1e-4  # the perturbation is seen at all
    exact = estimators.exact_slopes(loss, trained, "rank1", SEEDS)
    slopes = estimators.FiniteDifference("rank1", 2**-8).slopes(loss, trained, SEEDS).slopes
    assert slopes == pytest.approx(exact, abs=0.02 * estimators.root_mean_square(exact))
    value = loss()
    gradients = torch.autograd.grad(value, [*trained.values()])
    plain = loss_of(made_whole(model))()
    assert torch.equal(value, plain)
    for found, other in zip(gradients, torch.autograd.grad(plain, [*trained.values()]), strict=True):
        assert torch.allclose(found, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_computes_in_bfloat16_and_in_autocast(kind: Kind) -> None:
    model = nn.Module.to(spread(llama()), torch.bfloat16)
    names = scopes.trainable_names(model, "norms")
    rounded(model, kind, names)
    assert next(layer for layer in model.modules() if isinstance(layer, Quantised)).matrix().dtype == torch.bfloat16
    whole = loss_of(model)()
    assert torch.isfinite(whole) and relative(whole, loss_of(made_whole(model))()) < 1e-2
    model = spread(llama())
    rounded(model, kind, names)
    ids = ids_of((3, 7), 53, lowest=3)
    exact, coarse = (metrics.loss_of(model, {"input_ids": ids, "labels": ids}, how) for how in ("weights", "bfloat16"))
    assert 0 < relative(coarse, exact) < 0.02


@pytest.mark.parametrize("mode", ["zo", "fo", "subspace", "instruct", "calibrate"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_replays_on_the_unquantised_base_without_bitsandbytes(
    quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, mode: str
) -> None:
    more = {"mode": mode, "scope": "norms", "steps": 3, "queries": 2, "save_interval": 0, "subspace_size": 4}
    settings = quick(**more, bp_interval=2, keep_gradients=True, quantisation=kind)
    summary = central.train(settings, tmp_path / "run", ignore)
    plain = central.train(settings.model_copy(update={"quantisation": "none"}), tmp_path / "plain", ignore)
    assert summary["base"] == plain["base"] and summary["parameters"] == plain["parameters"]
    assert records_of(tmp_path / "run") != records_of(tmp_path / "plain")  # it is the rounded base that is measured
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    replayed, start = replay_run(RunFolder(tmp_path / "run"))
    assert start == 0 and replayed.digest() == summary["digest"] == summary["replay_digest"]
    assert not any(isinstance(module, Quantised) for module in replayed.model.modules())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert weights_digest(saved) == weights_digest(replayed.model)
    assert replayed.genesis["weights"] != weights_digest(replayed.model)


@pytest.mark.first(1)
@pytest.mark.parametrize("kind", KINDS)
def test_central_federated_and_resumed_runs_over_a_quantised_base_are_one(
    quick: Callable[..., Settings], tmp_path: Path, kind: Kind
) -> None:
    settings = quick(scope="norms", quantisation=kind)

    def cut(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    whole = central.train(settings, tmp_path / "whole", ignore)
    federated = federate(settings, tmp_path / "federated", clients=1)
    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "cut", cut)
    resumed = central.resume(tmp_path / "cut", ignore)
    assert whole["digest"] == federated["digest"] == resumed["digest"] == whole["replay_digest"]
    assert federated["client_digests"] == {"0": whole["digest"]}
    assert records_of(tmp_path / "federated") == records_of(tmp_path / "cut") == records_of(tmp_path / "whole")
    assert whole["eval_loss_end"] == federated["eval_loss_end"] == resumed["eval_loss_end"]
    two = federate(settings, tmp_path / "two", clients=2)
    assert two["client_digests"] == {"0": two["digest"], "1": two["digest"]} and two["replay_digest"] == two["digest"]


def test_lora_over_a_quantised_base_replays_on_the_plain_one() -> None:
    peft: Any = pytest.importorskip("peft", reason="peft is not installed")

    def adapted() -> nn.Module:
        model = llama()
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), model)
        return spread(model)

    model = adapted()
    names = scopes.trainable_names(model, "lora_")
    chosen = quantised.names(model, "nf4", names, "lora_")
    genesis = make_genesis(model, {}, names, seed=11, kind="rank1", optimizer=Optimizer("sgd"), quantised=chosen)
    replica = Replica(model, genesis)
    quantised.quantise(model, "nf4", chosen, CPU)
    assert replica.digest() == Replica(adapted(), genesis).digest()
    estimate = replica.measure.slopes(loss_of(model), SEEDS[:2], 1e-2, 4)
    assert replica.digest() == Replica(adapted(), genesis).digest(), "measuring leaves every tensor as it was"
    entry = link(genesis_chain(genesis), Seeded(1, 0.05, (0,), 2, (3, -5), -2, 2))
    assert len(estimate.slopes) == 2
    replica.apply(entry)
    again = Replica(adapted(), genesis)
    again.apply(entry)
    assert replica.digest() == again.digest() != genesis["weights"]


def test_a_saved_run_goes_on_over_a_quantised_base_and_a_changed_source_is_told(
    quick: Callable[..., Settings], tmp_path: Path
) -> None:
    central.train(quick(), tmp_path / "first", ignore)
    base = tmp_path / "first" / "model"
    settings = quick(model=str(base), scope="norms", quantisation="nf4", steps=2, eval_interval=2, save_interval=1)
    central.train(settings, tmp_path / "second", ignore)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "second" / "model")
    before = named_parameters(AutoModelForCausalLM.from_pretrained(base))
    moved = {name for name, tensor in named_parameters(saved).items() if not torch.equal(tensor, before[name])}
    assert moved and all("ln_" in name for name in moved)

    def change(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            other = spec.create_model(quick(seed=4), encoding.load_tokenizer("shipped"))
            other.save_pretrained(base)  # type: ignore[operator]

    with pytest.raises(UserError, match=r"journal starts from|has changed since the run began"):
        central.train(settings, tmp_path / "third", change)


def test_what_cannot_be_quantised_is_told_with_the_remedy(
    quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for scope in ("full", "last-1", "reduced"):
        with pytest.raises(UserError, match=rf"scope = '{scope}' would train, such as transformer.*norms or biases"):
            central.train(quick(quantisation="nf4", scope=scope), tmp_path / scope, ignore)
    with pytest.raises(UserError, match="no linear layers in blocks"):
        quantised.names(nn.Sequential(nn.Linear(4, 4)), "nf4", [], "norms")
    for value, kind in ((float("nan"), "int8"), (float("inf"), "nf4"), (1e6, "int8")):
        broken = spread(gpt2())
        with torch.no_grad():
            named_parameters(broken)["transformer.h.1.mlp.c_fc.weight"][0, 0] = value
        with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight holds values that are not finite"):
            rounded(broken, kind, [])  # type: ignore[arg-type]
    mamba = MambaForCausalLM(MambaConfig(vocab_size=53, hidden_size=16, state_size=4, num_hidden_layers=2))
    trained = quick(scope="norms", quantisation="int8")
    with pytest.raises(UserError, match=r"MambaForCausalLM reads the weights of linear layers itself .*none"):
        replica_of(trained, precision.ready(mamba, "float32"))
    library = sys.modules["bitsandbytes"]

    def refuses(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel for this device")

    with monkeypatch.context() as patched:
        patched.setattr(library.functional, "quantize_4bit", refuses)
        with pytest.raises(
            UserError, match=r"cannot round .* on cpu \(.*no kernel.*\): set device to cpu or to a CUDA"
        ):
            rounded(llama(), "nf4", [])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"pip install 'zofed\[quantised\]'"):
        central.train(quick(quantisation="int8", scope="norms"), tmp_path / "missing", ignore)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["zo", "fo", "subspace"])
def test_predicted_memory_of_a_quantised_base_is_what_its_tensors_take(
    quick: Callable[..., Settings], kind: Kind, mode: str
) -> None:
    settings = quick(scope="norms", quantisation=kind, mode=mode, subspace_size=16)
    predicted = model_info.info(settings, (mode,))
    replica = central.Task.load(settings).replica()
    held = sum(tensor.numel() * tensor.element_size() for tensor in replica.model.parameters())
    assert predicted.memory[mode].weights == held
    assert predicted.parameters == scopes.true_count(replica.model) and predicted.read == 4 * predicted.parameters
    whole = model_info.info(settings.model_copy(update={"quantisation": "none"}), (mode,))
    assert held < whole.memory[mode].weights and whole.read == 0
