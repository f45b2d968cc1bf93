"""Adapters as settings: set in, trained in every mode, saved as peft reads them, read again, merged, refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from federations import federate, ignore, records_of
from networks import causal_models, randomised, save_bases
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trainings import WAYS
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.digests import named_parameters, weights_digest
from zofed.data import encoding
from zofed.models import adapter_files, adapters, scopes, spec
from zofed.models.quantised import Quantised
from zofed.models.spec import ModelSpec
from zofed.runs.run_folder import RunFolder
from zofed.training import asking, central
from zofed.training.finalize import replay_run

Quick = Callable[..., Settings]
pytestmark = pytest.mark.usefixtures("one_thread")
LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 2}
KINDS = causal_models(positions=64)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return encoding.load_tokenizer("shipped")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    return save_bases(tmp_path_factory.mktemp("bases"), KINDS, tokenizer)


def built(model: Path | str, tokenizer: PreTrainedTokenizerBase, **values: Any) -> Any:
    settings = config.resolve({key.replace("_", "-"): value for key, value in values.items()} | {"model": str(model)})
    return ModelSpec.of(settings).build(tokenizer)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 19).view(2, 8)).logits


@pytest.mark.first(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_yet_and_is_a_function_of_the_seed(
    bases: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    plain, adapted = built(bases / kind, tokenizer), built(bases / kind, tokenizer, **LORA)
    assert torch.equal(logits(plain), logits(adapted))
    own = {name: tensor for name, tensor in named_parameters(adapted).items() if name in adapters.names(adapted)}
    assert set(scopes.trainable_names(adapted, "full")) == set(own)
    assert all((tensor == 0).all() == ("lora_B" in name) for name, tensor in own.items())
    assert weights_digest(adapted) == weights_digest(built(bases / kind, tokenizer, **LORA))
    assert weights_digest(adapted) != weights_digest(built(bases / kind, tokenizer, seed=1, **LORA))
    half = built(bases / kind, tokenizer, dtype="bfloat16", **LORA)
    types = {tensor.dtype for name, tensor in named_parameters(half).items() if name in adapters.names(half)}
    assert types == {torch.float32} and logits(half).dtype == torch.bfloat16


def test_only_what_trains_gets_an_adapter(bases: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def held(**values: Any) -> set[str]:
        model = built(bases / "llama", tokenizer, **LORA, **values)
        return {name.partition(".lora_")[0] for name in adapters.names(model)}

    assert held() == {f"model.layers.{n}.self_attn.{part}_proj" for n in (0, 1) for part in "qv"}
    assert held(scope="last-1") == {f"model.layers.1.self_attn.{part}_proj" for part in "qv"}
    assert held(scope="last-1", lora_targets="down_proj") == {"model.layers.1.mlp.down_proj"}
    assert held(scope="lora_B", lora_targets="o_proj") == {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)}
    assert len(held(lora_targets="all-linear")) == 14


@pytest.mark.parametrize("scope", ["full", "last-1"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_runs_folder_is_what_peft_reads_and_goes_on_kept_or_merged(
    quick: Quick, bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str, scope: str
) -> None:
    base = str(bases / kind)
    settings = quick(model=base, scope=scope, learning_rate=0.3, optimizer="adamw", **LORA)
    found = central.train(settings, tmp_path / "run", ignore)
    assert found["replay_digest"] == found["digest"]
    assert found["base"]["weights"] == weights_digest(AutoModelForCausalLM.from_pretrained(base))
    with pytest.raises(UserError, match=r"has no config\.json: give the model of this run, .*run/model"):
        built(tmp_path / "run", tokenizer)
    folder = tmp_path / "run" / "model"
    assert not any("embed" in name or "wte" in name for name in load_file(folder / adapter_files.WEIGHTS))
    ours = asking.of_run(tmp_path / "run", compare=True).models
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    alike = {"rtol": 0.0, "atol": 1e-5 if kind == "gpt2" else 0.0}  # whose activation zofed exchanges for a faster one
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert torch.allclose(logits(ours[asking.TUNED]), logits(theirs), **alike)
    assert torch.allclose(logits(ours[asking.BASE]), logits(plain), **alike)
    assert (logits(theirs) - logits(ours[asking.BASE])).abs().max() > 1e-3
    merged, whole = built(folder, tokenizer), theirs.merge_and_unload()
    assert named_parameters(merged).keys() == named_parameters(whole).keys()
    for name, tensor in named_parameters(whole).items():
        assert torch.allclose(named_parameters(merged)[name], tensor, rtol=1e-5, atol=1e-5), name
    kept = central.train(quick(model=str(folder), scope=scope, **LORA), tmp_path / "kept", ignore)
    assert kept["eval_loss_start"] == found["eval_loss_end"] and kept["replay_digest"] == kept["digest"]
    assert (
        json.loads((tmp_path / "kept" / "model" / adapter_files.CONFIG).read_text())["base_model_name_or_path"] == base
    )
    on = central.train(quick(model=str(folder)), tmp_path / "merged", ignore)
    assert on["eval_loss_start"] == pytest.approx(found["eval_loss_end"], rel=1e-5)
    assert on["replay_digest"] == on["digest"] and (tmp_path / "merged" / "model" / "model.safetensors").is_file()


FORWARD: dict[str, dict[str, Any]] = {
    "zo": {},
    "zo in bfloat16": {"dtype": "bfloat16"},
    "zo over int8": {"quantisation": "int8"},
    "zo over nf4 in bfloat16": {"quantisation": "nf4", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("way", [*FORWARD, *(way for way in WAYS if way not in ("raw", "guide-only"))])
def test_every_mode_trains_an_adapter_and_a_federation_of_one_gives_the_same(
    quick: Quick, bases: Path, tmp_path: Path, way: str
) -> None:
    values = (FORWARD | WAYS)[way]
    if "quantisation" in values:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    settings = quick(model=str(bases / "llama"), **LORA, **values)
    alone = central.train(settings, tmp_path / "alone", ignore)
    assert alone["replay_digest"] in (alone["digest"], None)
    assert alone["parameters"]["trainable"] == 2 * (2 * 24 + 2 * 24 + 2 * 24 + 2 * 8)
    replica, _ = replay_run(RunFolder(tmp_path / "alone"))
    assert replica.digest() == alone["digest"]
    if "quantisation" in values:
        speaker = asking.of_run(tmp_path / "alone", compare=True)
        for model in speaker.models.values():
            assert any(isinstance(module, Quantised) for module in model.modules())
    base = weights_digest(spec.rebuild(replica.genesis["model"], 0, "float32", str(bases / "llama")))
    assert (base == replica.genesis["weights"]) == (settings.dtype == "float32")
    if settings.mode in ("fo", "instruct", "calibrate"):  # whose updates and guides are not the same on their way
        return
    together = federate(settings, tmp_path / "together", 1)
    assert together["digest"] == alone["digest"]
    assert records_of(tmp_path / "together") == records_of(tmp_path / "alone")


def test_clients_of_first_order_send_what_the_adapter_holds(quick: Quick, bases: Path, tmp_path: Path) -> None:
    runs = {}
    for name, values in {"whole": {}, "lora": LORA}.items():
        settings = quick(model=str(bases / "llama"), mode="fo", rounds=3, **values)
        runs[name] = federate(settings, tmp_path / name, 2)
        assert set(runs[name]["client_digests"].values()) == {runs[name]["digest"]}
    share = runs["lora"]["parameters"]["trainable"] / runs["whole"]["parameters"]["trainable"]
    assert runs["lora"]["bytes_up_per_client_round"] < 2 * share * runs["whole"]["bytes_up_per_client_round"] + 2000


def test_an_adapter_of_a_named_size_is_saved_with_its_base(quick: Quick, tmp_path: Path) -> None:
    found = central.train(quick(learning_rate=0.3, optimizer="adamw", **LORA), tmp_path / "run", ignore)
    folder = tmp_path / "run" / "model"
    assert not (folder / adapter_files.CONFIG).exists()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = asking.of_run(tmp_path / "run").models[asking.TUNED]
    assert torch.allclose(logits(model), logits(ours), atol=1e-5)
    assert found["digest"] == found["replay_digest"]


@pytest.mark.parametrize("pooling", ["auto", "mean"])
def test_a_classifiers_head_trains_beside_its_adapter_and_comes_back(
    quick: Quick, bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, pooling: str
) -> None:
    data = tmp_path / "films.jsonl"
    data.write_text("".join(json.dumps({"text": f"film {n} is fine", "label": n % 3}) + "\n" for n in range(30)))
    settings = quick(
        model=str(bases / "llama"), dataset=str(data), task="classification", pooling=pooling, mode="fo", **LORA
    )
    found = central.train(settings, tmp_path / "run", ignore)
    assert found["drawn"]
    folder = tmp_path / "run" / "model"
    again = central.train(settings.model_copy(update={"model": str(folder)}), tmp_path / "again", ignore)
    assert again["eval_loss_start"] == found["eval_loss_end"]
    inputs = torch.arange(3, 19).view(2, 8)
    base: Any = (AutoModelForSequenceClassification if pooling == "auto" else AutoModel).from_pretrained(
        bases / "llama", **({"num_labels": 3} if pooling == "auto" else {})
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    speaker = asking.of_run(tmp_path / "run").models[asking.TUNED]
    with torch.no_grad():
        if pooling == "auto":
            ours = speaker(input_ids=inputs).logits
            assert torch.equal(ours, theirs(input_ids=inputs).logits)
        else:
            ours = speaker.encoder(input_ids=inputs).last_hidden_state
            assert torch.equal(ours, theirs(input_ids=inputs).last_hidden_state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_targets": "q_prj"}, "unknown linear map 'q_prj': did you mean 'q_proj'"),
        ({"lora_targets": "q_proj, nothing-like-it"}, "unknown linear map 'nothing-like-it': known are q_proj"),
        ({"lora_targets": "q_proj, all-linear"}, "all-linear stands alone"),
        ({"lora_targets": "lm_head"}, "lm_head shares its weights with the embedding"),
        ({"lora_targets": "embed_tokens"}, "unknown linear map 'embed_tokens'"),
        ({"lora_rank": 0}, "lora-rank = 0"),
        ({"lora_rank": 9}, "lora-rank = 9, but model.layers.0.self_attn.v_proj is a matrix of 8"),
        ({"scope": "norms"}, "scope = 'norms' leaves nothing to train: .* of the adapter, which alone trains"),
        ({"scope": "last-3"}, "the model has 2 blocks"),
        ({"task": "classification", "freeze_encoder": True}, "freeze-encoder = true freezes"),
    ],
    ids=str,
)
def test_what_cannot_be_adapted_is_refused(
    quick: Quick, bases: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        central.train(quick(model=str(bases / "llama"), **{"adapter": "lora"} | values), tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def saved(bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that does something."""
    model = built(bases / "llama", tokenizer, **LORA)
    with torch.no_grad():
        for name, tensor in named_parameters(model).items():
            if name in adapters.names(model):
                tensor.fill_(0.1)
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    spec.save(model, tokenizer, folder, base=(str(bases / "llama"), ""))
    return folder


def rewritten(folder: Path, **changes: Any) -> None:
    file = folder / adapter_files.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / adapter_files.WEIGHTS
    save_file(change(load_file(file)), file, {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no weights": (lambda f: (f / adapter_files.WEIGHTS).unlink(), "has no adapter_model.safetensors: copy the folder"),
    "cut": (lambda f: (f / adapter_files.WEIGHTS).write_bytes(b"123"), "adapter_model.safetensors is damaged"),
    "no json": (lambda f: (f / adapter_files.CONFIG).write_text("{"), "adapter_config.json cannot be read"),
    "no base": (lambda f: rewritten(f, base_model_name_or_path=""), "does not say of which base it is"),
    "base gone": (lambda f: rewritten(f, base_model_name_or_path="/gone"), "is of the base '/gone': unknown model"),
    "an adapter as base": (lambda f: rewritten(f, base_model_name_or_path=str(f)), "holds an adapter of peft: merge"),
    "other kind": (lambda f: rewritten(f, peft_type="IA3"), "an adapter of the type IA3"),
    "dora": (lambda f: rewritten(f, use_dora=True), "has use_dora = True, which zofed does not train"),
    "rank of text": (lambda f: rewritten(f, r="eight"), "has r = 'eight': give the adapter_config.json"),
    "huge rank": (lambda f: rewritten(f, r=10**12), "has r = 1000000000000"),
    "no targets": (lambda f: rewritten(f, target_modules=7), "has target_modules = 7"),
    "other rank": (lambda f: rewritten(f, r=4), r"lora_A.weight of shape \(2, 24\), but \(4, 24\)"),
    "fewer targets": (lambda f: rewritten(f, target_modules=["q_proj"]), "v_proj.lora_A.weight, for which there is no"),
    "other targets": (lambda f: rewritten(f, target_modules=["w_q"]), "does not fit the model of the type 'llama'"),
    "lacking": (lambda f: with_tensors(f, lambda t: {k: v for k, v in t.items() if k != FIRST}), "lacks .*q_proj.lora"),
    "not finite": (lambda f: with_tensors(f, lambda t: t | {FIRST: t[FIRST] * torch.nan}), "that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kept", [True, False])
def test_a_folder_that_cannot_be_used_is_named_with_its_remedy(
    saved: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, damage: str, kept: bool
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert built(folder, tokenizer, **({"adapter": "lora"} if kept else {})) is not None
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(UserError, match=message):
        built(folder, tokenizer, **({"adapter": "lora"} if kept else {}))


def test_runs_of_other_seeds_find_the_hidden_states_below_their_adapters(
    quick: Quick, bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOFED_CACHE", str(tmp_path / "cache"))
    found = {}
    for name, values in {"first": {}, "again": {"seed": 1}, "rank 4": {"lora_rank": 4}}.items():
        settings = quick(model=str(bases / "llama"), scope="last-1", **LORA | values)
        found[name] = central.train(settings, tmp_path / name, ignore)["digest"]
        plain = settings.model_copy(update={"hidden_states_gigabytes": 0.0})
        assert central.train(plain, tmp_path / f"{name}, none", ignore)["digest"] == found[name]
        files = {path.name for path in (tmp_path / "cache" / "hidden states").iterdir()}
        assert len({name.split(".")[0] for name in files}) == (2 if name == "rank 4" else 1), files
    assert found["first"] != found["again"]


def test_an_adapter_of_another_base_is_refused(
    saved: Path, bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other: Any = randomised(KINDS["llama"](), 0.3)
    other.save_pretrained(tmp_path / "other")
    before = (saved / adapter_files.CONFIG).read_text()
    try:
        rewritten(saved, base_model_name_or_path=str(tmp_path / "other"))
        with pytest.raises(UserError, match=r"was trained on a base of SHA-256 .*, but .* has"):
            built(saved, tokenizer)
    finally:
        (saved / adapter_files.CONFIG).write_text(before)


def test_settings_that_speak_of_another_adapter_than_the_folder_are_refused(
    saved: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert built(saved, tokenizer, adapter="lora") is not None
    for values in ({"lora_rank": 4}, {"lora_alpha": 3.0}, {"lora_targets": "o_proj"}):
        with pytest.raises(UserError, match=f"{next(iter(values)).replace('_', '-')} is given, but adapter folder"):
            built(saved, tokenizer, adapter="lora", **values)


def test_a_foreign_adapter_of_peft_is_read(bases: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases / "gpt2")
    wrapped = peft.get_peft_model(
        model,
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["c_attn", "c_fc"], use_rslora=True, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "lora_B" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(tmp_path / "foreign")
    ours = built(tmp_path / "foreign", tokenizer, adapter="lora")
    assert torch.allclose(logits(ours), logits(wrapped.eval()), atol=1e-5)
