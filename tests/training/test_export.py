"""What `zofed export` writes, transformers and peft read, and it is what the run holds; what cannot be is refused."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from masked import save_masked
from networks import GPT2, LLAMA
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from zofed.commands import cli
from zofed.core import journal
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.records import Dense, Seeded, Skipped
from zofed.data import encoding
from zofed.models import lora_files, spec
from zofed.runs.run_folder import RunFolder
from zofed.training import export, finalize

Zofed = Callable[..., tuple[int, str, str]]

peft: Any = pytest.importorskip("peft", reason="peft is not installed")

SHORT = ["--steps", "3", "--batch-size", "2", "--block-size", "16", "--eval-examples", "8", "--device", "cpu"]
SUBSPACE = ["--mode", "subspace", "--subspace-size", "4", "--subspace-interval", "2", "--optimizer", "adamw"]
SUBSPACE += ["--learning-rate", "0.01"]
FIRST_ORDER = ["--mode", "fo", "--optimizer", "adamw", "--learning-rate", "0.003"]
ZEROTH = ["--queries", "2", "--learning-rate", "0.01"]
CLASSIFIED = ["--task", "classification", "--dataset", "sample-sst2"]
PROMPTED = ["--task", "prompt", "--dataset", "sample-sst2", "--template", "{{ text }} [MASK]", "--baselines", "false"]
PROMPTED += ["--label-words", "1,2"]
MATRICES = ["--scope", r"(proj|lm_head|c_attn|c_fc|score)\.weight"]

# The model, and what else the command line says.
RUNS: dict[str, tuple[str, list[str]]] = {
    "subspace": ("llama", [*SUBSPACE, *MATRICES]),
    "fo": ("llama", [*FIRST_ORDER, *MATRICES]),
    "zo": ("gpt2", [*ZEROTH, *MATRICES]),
    "full": ("gpt2", SUBSPACE),
    "bfloat16": ("llama", [*FIRST_ORDER, *MATRICES, "--dtype", "bfloat16"]),
    "masked": ("bert", [*SUBSPACE, "--scope", r"layer\..*(query|dense)\.weight", *PROMPTED]),
    "norms": ("llama", [*FIRST_ORDER, "--scope", "norms"]),
    "fresh": ("tiny", ZEROTH),
    "adapter": ("llama", [*FIRST_ORDER, "--adapter", "lora", "--lora-targets", "q_proj, up_proj", "--lora-rank", "3"]),
    "adapter of a size": ("tiny", [*ZEROTH, "--adapter", "lora"]),
    "adapted classifier": ("llama", [*FIRST_ORDER, *CLASSIFIED, "--adapter", "lora", "--lora-rank", "2"]),
    "classifier": ("llama", [*FIRST_ORDER, *MATRICES, *CLASSIFIED]),
    "pooled": ("llama", [*FIRST_ORDER, *CLASSIFIED, "--pooling", "mean"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of three models of random weights with the shipped tokenizer."""
    root = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, model in {"llama": LlamaForCausalLM(LLAMA), "gpt2": GPT2LMHeadModel(GPT2)}.items():
            model.save_pretrained(root / name)
            encoding.load_tokenizer("shipped").save_pretrained(root / name)
        save_masked("bert", root / "bert")
    return root


@pytest.fixture(scope="module")
def run_of(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of three steps, made when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")

    def made(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            model, options = RUNS[name]
            place = model if model == "tiny" else models / model
            words = ["zofed", "train", "--model", str(place), *SHORT, *options, "--out", str(folder)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(finalize, "draw", lambda *_: None)
                patch.setattr(sys, "argv", words)
                cli.app(standalone_mode=False)
        return folder

    return made


@pytest.fixture
def exported(zofed_command: Zofed, tmp_path: Path) -> Callable[..., tuple[Path, str]]:
    """Export a run; the new folder, and what the command said."""

    def made(run: Path, *options: object) -> tuple[Path, str]:
        out = tmp_path / "exported"
        status, told, errors = zofed_command("export", run, "--out", out, *options)
        assert (status, errors) == (0, ""), errors
        return out, told

    return made


def base_of(run: Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    settings = RunFolder.open(run).settings()
    model = kind.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype), **options)
    return model.eval()


def end_of(run: Path, kind: Any = AutoModelForCausalLM) -> Any:
    dtype = getattr(torch, RunFolder.open(run).settings().dtype)
    return kind.from_pretrained(run / "model", dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(1, 25).view(2, 12)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()


def assert_near(got: nn.Module, wanted: nn.Module, atol: float) -> None:
    ours, theirs = named_parameters(got), named_parameters(wanted)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].float(), theirs[name].float(), rtol=0, atol=atol, msg=name)


# --- a LoRA ---


@pytest.mark.parametrize(
    ("name", "rank", "most"), [("subspace", 16, 6), ("fo", 16, 16), ("zo", 16, 6), ("bfloat16", 16, 16)]
)
def test_peft_adds_to_the_base_what_the_run_changed(
    run_of: Any, exported: Any, name: str, rank: int, most: int
) -> None:
    run = run_of(name)
    out, told = exported(run, "--delta-rank", rank)
    base, end = base_of(run), end_of(run)
    wanted, before = logits(end), logits(base)
    if name != "bfloat16":
        model = peft.PeftModel.from_pretrained(base, out).eval()
        assert model.peft_config["default"].r == most
        torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
        assert (wanted - before).abs().max() > 1e-3
        assert_near(model.merge_and_unload(), end, 2e-7)
    else:
        merged = peft.PeftModel.from_pretrained(base, out).merge_and_unload()
        assert_near(merged, end, 2e-3)
    assert "it is exact" in told and f"rank {most} holds 100.00 %" in told
    assert ("was asked for" in told) == (most < rank)
    tensors = load_file(out / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    assert not [key for key in tensors if re.search("embed|wte|wpe", key)]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_files_are_those_that_peft_itself_writes(run_of: Any, exported: Any, tmp_path: Path) -> None:
    run = run_of("zo")
    out, _ = exported(run, "--delta-rank", 3)
    peft.PeftModel.from_pretrained(base_of(run), out).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    written, rewritten = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (out, tmp_path / "theirs")
    )
    assert {key: written[key] for key in written if key != "target_modules"} == {
        key: rewritten[key] for key in written if key != "target_modules"
    }
    assert sorted(written["target_modules"]) == sorted(rewritten["target_modules"])
    assert written["fan_in_fan_out"] and written["lora_alpha"] == written["r"] == 3


def test_a_lower_rank_holds_the_share_that_it_says(run_of: Any, exported: Any) -> None:
    run = run_of("fo")
    out, told = exported(run, "--delta-rank", 2)
    before, after = named_parameters(base_of(run)), named_parameters(end_of(run))
    missed = moved = 0.0
    for name, tensor in after.items():
        change = tensor.double() - before[name].double()
        if not bool(change.any()):
            continue
        values = torch.linalg.svdvals(change).square()
        missed, moved = missed + float(values[2:].sum()), moved + float(values.sum())
    assert f"rank 2 holds {100 * (1 - missed / moved):.2f} % of the squared norm" in told
    assert "it is not exact" in told and "99.9 % takes rank 1" in told  # 10 to 16
    model = peft.PeftModel.from_pretrained(base_of(run), out).merge_and_unload()
    left = sum(
        float((tensor.double() - after[name].double()).square().sum())
        for name, tensor in named_parameters(model).items()
    )
    assert left == pytest.approx(missed, rel=1e-3)


def test_what_a_lora_does_not_hold_is_told_and_in_the_card(run_of: Any, exported: Any) -> None:
    run = run_of("full")
    out, told = exported(run, "--delta-rank", 16)
    for what in ("embeddings (2 tensors, 8,704 numbers)", "norms (10 tensors, 160 numbers)", "biases (8 tensors, "):
        assert f"not held: {what}" in told and what in (out / "README.md").read_text()
    assert "so of all that changed it holds" in told
    before, after = named_parameters(base_of(run)), named_parameters(end_of(run))
    merged = named_parameters(peft.PeftModel.from_pretrained(base_of(run), out).merge_and_unload())
    for name, tensor in merged.items():
        is_held = tensor.dim() == 2 and "c_" in name
        torch.testing.assert_close(tensor, (after if is_held else before)[name], rtol=0, atol=2e-7)


def test_a_classifiers_head_lies_whole_in_the_file(run_of: Any, exported: Any) -> None:
    """Nobody else draws a head from the run's seed."""
    run = run_of("classifier")
    out, told = exported(run, "--delta-rank", 16)
    assert "held whole, apart from the LoRA: score" in told
    written = json.loads((out / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])
    end = end_of(run, AutoModelForSequenceClassification)
    base = base_of(run, AutoModelForSequenceClassification, num_labels=2, pad_token_id=end.config.pad_token_id)
    wanted = logits(end)
    assert (logits(base) - wanted).abs().max() > 1e-3
    model = peft.PeftModel.from_pretrained(base, out).eval()
    torch.testing.assert_close(logits(model), wanted, rtol=1e-5, atol=1e-5)
    assert_near(model.merge_and_unload(), end, 2e-7)


def test_an_adapter_of_a_masked_model_names_its_class(run_of: Any, exported: Any) -> None:
    """peft has no type of task for it."""
    run = run_of("masked")
    out, _ = exported(run, "--delta-rank", 8)
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["task_type"] is None and written["auto_mapping"]["base_model_class"] == "BertForMaskedLM"
    base, end = base_of(run, AutoModelForMaskedLM), end_of(run, AutoModelForMaskedLM)
    model = peft.PeftModel.from_pretrained(base, out).eval()
    torch.testing.assert_close(logits(model), logits(end), rtol=1e-5, atol=1e-5)
    assert_near(peft.AutoPeftModel.from_pretrained(out).merge_and_unload(), end, 2e-7)


def seeded(*counts: int) -> list[Any]:
    return [Seeded(round_, 0.1, (0,), count, (1,) * count, 0, 1.0) for round_, count in enumerate(counts, 1)]


@pytest.mark.parametrize(
    ("kind", "rule", "records", "bound"),
    [
        ("core", {}, seeded(16, 16, 9), 11),
        ("rank1", {}, seeded(5, 5), 10),
        ("rank3", {"momentum": 0.9}, [*seeded(5), Skipped(2)], 15),
        ("rank1", {"weight-decay": 0.1}, seeded(5), None),
        ("rank1", {"name": "adamw"}, seeded(5), None),
        ("gaussian", {}, seeded(5), None),
        ("rank1", {}, [*seeded(5), Dense(2, 0.1)], None),
    ],
)
def test_the_rank_that_a_journal_allows(kind: str, rule: dict[str, Any], records: list[Any], bound: int | None) -> None:
    genesis: Any = {"directions": kind, "optimizer": {"name": "sgd", "momentum": 0.0, "weight-decay": 0.0} | rule}
    assert export.rank_bound(genesis, records) == bound


def test_modules_are_named_in_short_where_that_names_no_others() -> None:
    model = LlamaForCausalLM(LLAMA)
    parameters = set(named_parameters(model))

    def named(pattern: str) -> list[str]:
        chosen = {name for name in parameters if re.search(pattern, name)}
        return lora_files.targets(model, export.low_rank.matrices(model, chosen))

    assert named("q_proj|v_proj") == ["q_proj", "v_proj"]
    assert named("layers.1.*q_proj") == ["model.layers.1.self_attn.q_proj"]


# --- the whole model ---


@pytest.mark.parametrize("name", ["subspace", "fresh", "bfloat16"])
def test_a_merged_folder_holds_the_runs_weights(run_of: Any, exported: Any, name: str) -> None:
    run = run_of(name)
    out, told = exported(run, "--merged")
    assert RunFolder.open(run).summary()["digest"] in told
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, run / "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in (run / "model").iterdir()} | {"README.md"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert weights_digest(model) == RunFolder.open(run).summary()["digest"]
    assert len(AutoTokenizer.from_pretrained(out)) == 512


@pytest.mark.parametrize("way", [["--merged"], ["--delta-rank", "4"]])
def test_without_a_model_folder_the_journal_gives_the_weights(
    run_of: Any, exported: Any, tmp_path: Path, way: list[str]
) -> None:
    run = run_of("subspace")
    wanted, _ = exported(run, *way)
    wanted = wanted.rename(tmp_path / "wanted")
    copied = Path(shutil.copytree(run, tmp_path / "copy" / run.name))
    shutil.rmtree(copied / "model")
    out, _ = exported(copied, *way)
    for path in wanted.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_that_was_cut_gives_what_it_has_come_to(run_of: Any, exported: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("zo"), tmp_path / "run"))
    shutil.rmtree(run / "model")
    RunFolder(run).write_summary({"status": "interrupted"})
    contents = journal.read(run / "journal.zofed")
    (run / "journal.zofed").write_bytes(
        (run / "journal.zofed").read_bytes()[: contents.end - len(contents.entries[-1].raw)]
    )
    out, told = exported(run, "--merged")
    assert "weights after round 2," in told and f"zofed train --resume {run}" in told
    replica, _ = finalize.replay_run(RunFolder(run))
    assert weights_digest(AutoModelForCausalLM.from_pretrained(out)) == replica.digest()
    assert "has not ended: these are its weights after round 2" in (out / "README.md").read_text()
    assert "## Scores" not in (out / "README.md").read_text()
    shutil.rmtree(out)
    assert "up to round 2" in exported(run, "--delta-rank", 4)[1]


def test_gradients_need_not_be_kept_where_the_model_is(run_of: Any, exported: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("fo"), tmp_path / "run"))
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    exported(run, "--merged")


def test_a_pooled_classifier_is_written_with_its_head(run_of: Any, exported: Any) -> None:
    run = run_of("pooled")
    out, _ = exported(run, "--merged")
    ours, theirs = (load_file(folder / "classifier.safetensors") for folder in (out, run / "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- the card ---


@pytest.mark.parametrize(
    ("name", "way"),
    [("subspace", "--delta-rank"), ("subspace", "--merged"), ("fresh", "--delta-rank"), ("classifier", "--delta-rank"),
     ("classifier", "--merged"), ("pooled", "--merged")],
)  # fmt: skip
def test_the_python_of_the_card_loads_the_model(
    run_of: Any, exported: Any, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    run = run_of(name)
    out, _ = exported(run, way, *([16] if way == "--delta-rank" else []))
    card = (out / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert block
    names: dict[str, Any] = {}
    monkeypatch.chdir(out)
    exec(block[1].replace("'BASE'", repr(RunFolder.open(run).settings().model)), names)
    model = names["model"].merge_and_unload() if way == "--delta-rank" else names["model"]
    if name != "fresh":  # whose embeddings, norms and biases trained too
        kind: Any = {"classifier": AutoModelForSequenceClassification}.get(name, AutoModelForCausalLM)
        if name != "pooled":
            assert_near(model, end_of(run, kind), 2e-7)


def test_the_card_tells_what_the_run_was(run_of: Any, exported: Any) -> None:
    run = run_of("subspace")
    out, _ = exported(run, "--delta-rank", 4)
    card, summary = ModelCard.load(out / "README.md"), RunFolder.open(run).summary()
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("peft", "text-generation", None)
    assert card.data.tags == ["zofed", "lora"] and card.data.base_model is None  # a folder of this machine
    head = journal.read(run / "journal.zofed").head.hex()
    for told in (summary["digest"], head, *summary["data"].values(), summary["base"]["weights"], "sample-dclm"):
        assert told in card.text
    for told in (f"{summary['eval_loss_end']:.4f}", "baseline unigram", "zofed journal replay", "subspace-size = 4"):
        assert told in card.text
    assert summary["versions"]["torch"] in card.text and "license:" in card.text
    assert str(run.parent) not in card.text and str(Path(summary["base"]["model"]).parent) not in card.text


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("subspace", [], "is said by one of --merged, --adapter and --delta-rank R: give one"),
        ("subspace", ["--merged", "--delta-rank", "3"], "is said by one of --merged, --adapter and --delta-rank R"),
        ("subspace", ["--delta-rank", "0"], "--delta-rank 0: a LoRA has a rank of 1 or more"),
        ("subspace", ["--delta-rank", "17"], "--delta-rank 17 is above 16, the largest rank"),
        ("subspace", ["--delta-rank", "many"], "'many' is not a valid integer"),
        ("subspace", ["--merged", "--public"], "--public says how --push uploads: give --push OWNER/NAME"),
        ("subspace", ["--delta-rank", "3", "--base", "nowhere"], "unknown model 'nowhere'"),
        ("norms", ["--delta-rank", "3"], "scope = 'norms' trains no linear layer"),
        ("pooled", ["--delta-rank", "3"], "pools its encoder in zofed's own way"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    run_of: Any, zofed_command: Zofed, tmp_path: Path, name: str, options: list[str], told: str
) -> None:
    run = run_of(name)
    status, _, errors = zofed_command("export", run, "--out", tmp_path / "new", *options)
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert told in errors
    assert list(tmp_path.iterdir()) == []


def test_no_run_and_no_new_folder_are_refused(run_of: Any, zofed_command: Zofed, tmp_path: Path) -> None:
    status, _, errors = zofed_command("export", tmp_path / "none", "--out", tmp_path / "new", "--merged")
    assert status == 2 and "is not the folder of a run" in errors
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    for place in ("full", "full/mine"):
        status, _, errors = zofed_command("export", run_of("zo"), "--out", tmp_path / place, "--merged")
        assert status == 2 and "is there and not an empty folder: choose another" in errors
    assert (tmp_path / "full/mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert zofed_command("export", run_of("zo"), "--out", tmp_path / "empty", "--merged")[0] == 0


def emptied(run: Path) -> None:
    """A run that was killed before its first step."""
    with journal.Journal.create(run / "new", journal.read(run / "journal.zofed").genesis):
        pass
    (run / "new").rename(run / "journal.zofed")
    RunFolder(run).write_summary({"status": "running"})


def without_gradients(run: Path) -> None:
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


def exchanged(run: Path) -> None:
    """Its model is another's, and so is its journal."""
    RunFolder(run).write_summary(RunFolder(run).summary() | {"digest": "0" * 64})


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("zo", emptied, "holds no step yet, so that there is nothing to export"),
        ("fo", without_gradients, "or let the run end, with zofed train --resume"),
        ("zo", exchanged, "does not hold the weights that .* ended with, and its journal gives others"),
    ],
)
def test_a_run_without_its_weights_is_refused(
    run_of: Any, zofed_command: Zofed, tmp_path: Path, name: str, spoil: Callable[[Path], None], told: str
) -> None:
    run = Path(shutil.copytree(run_of(name), tmp_path / "run"))
    spoil(run)
    status, _, errors = zofed_command("export", run, "--out", tmp_path / "new", "--merged")
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert re.search(told, errors)
    assert not (tmp_path / "new").exists()


def test_a_model_that_was_exchanged_gives_way_to_the_journal(run_of: Any, exported: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("subspace"), tmp_path / "run"))
    shutil.rmtree(run / "model")
    shutil.copytree(run_of("fo") / "model", run / "model")
    out, told = exported(run, "--merged")
    assert RunFolder(run).summary()["digest"] in told
    assert_near(AutoModelForCausalLM.from_pretrained(out), end_of(run_of("subspace")), 0)


def broken(*_: Any, **__: Any) -> Any:
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(("way", "owner", "name"), [("--merged", spec, "save"), ("--delta-rank=2", lora_files, "save")])
def test_a_full_disk_leaves_nothing(
    run_of: Any, zofed_command: Zofed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, owner: Any, name: str
) -> None:
    run = run_of("subspace")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        status, _, errors = zofed_command("export", run, "--out", tmp_path / "new", way)
    assert (status, len(errors.splitlines())) == (2, 1) and "free some space or choose another --out" in errors
    assert list(tmp_path.iterdir()) == []
    assert zofed_command("export", run, "--out", tmp_path / "new", way)[0] == 0


def test_a_base_that_moved_is_named(run_of: Any, zofed_command: Zofed, models: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_of("zo"), tmp_path / "run"))
    settings = (run / "settings.toml").read_text()
    (run / "settings.toml").write_text(settings.replace(str(models), "/nowhere"))
    options = ["export", run, "--out", tmp_path / "new", "--delta-rank", "3"]
    status, _, errors = zofed_command(*options)
    assert status == 2 and "/nowhere/gpt2" in errors
    assert zofed_command(*options, "--base", models / "gpt2")[0] == 0
    written = json.loads((tmp_path / "new/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(models / "gpt2")


# --- a real model ---


@pytest.mark.slow
@pytest.mark.skipif("ZOFED_REAL_MODELS" not in os.environ, reason="ZOFED_REAL_MODELS names no folder with smollm2")
def test_a_real_models_change_in_a_subspace_is_held_exactly(zofed_command: Zofed, tmp_path: Path) -> None:
    model, run, out = Path(os.environ["ZOFED_REAL_MODELS"]) / "smollm2", tmp_path / "run", tmp_path / "out"
    words = ["train", "--model", model, *SHORT, *SUBSPACE, "--scope", r"layers\.29\..*proj", "--out", run]
    assert zofed_command(*words)[0] == 0
    status, told, errors = zofed_command("export", run, "--out", out, "--delta-rank", 8)
    assert (status, errors) == (0, "") and "rank 6 holds 100.00 %" in told and "it is exact" in told
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    wanted = logits(AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval())
    assert (logits(base) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base, out).eval()), wanted, rtol=0, atol=1e-3)


# --- an adapter ---


@pytest.mark.parametrize("name", ["adapter", "adapted classifier"])
@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_goes_out_as_it_is_or_added_to_its_base(
    run_of: Callable[[str], Path], zofed_command: Zofed, tmp_path: Path, name: str, has_model: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of(name), run)
    kind = AutoModelForCausalLM if name == "adapter" else AutoModelForSequenceClassification
    options = {} if name == "adapter" else {"num_labels": 2}
    if not has_model:
        shutil.rmtree(run / "model")
    for way in ("--adapter", "--merged"):
        status, _, errors = zofed_command("export", run, "--out", tmp_path / way, way)
        assert (status, errors) == (0, "")
    base = base_of(run, kind, **options)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(tmp_path / "--adapter").pad_token_id
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "--adapter").eval()
    whole = kind.from_pretrained(tmp_path / "--merged").eval()
    torch.testing.assert_close(logits(adapted), logits(whole), rtol=1e-5, atol=1e-5)
    assert ModelCard.load(tmp_path / "--adapter" / "README.md").data.library_name == "peft"
    digest = json.loads((run / "summary.json").read_text())["digest"]
    assert digest in (tmp_path / "--adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "way", "message"),
    [
        (
            "adapter",
            ["--delta-rank", "2"],
            "an adapter already, adapter = 'lora': --adapter writes it, --merged",
        ),
        ("adapter of a size", ["--adapter"], "is drawn from a seed and lies nowhere: use --merged"),
        ("norms", ["--adapter"], "trained no adapter: --delta-rank R"),
        ("norms", ["--adapter", "--merged"], "give one"),
    ],
)
def test_an_adapter_that_cannot_go_out_is_told(
    run_of: Callable[[str], Path], zofed_command: Zofed, tmp_path: Path, name: str, way: list[str], message: str
) -> None:
    status, _, errors = zofed_command("export", run_of(name), "--out", tmp_path / "out", *way)
    assert status == 2 and message in errors and not (tmp_path / "out").exists()
