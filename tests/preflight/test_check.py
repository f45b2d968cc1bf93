"""Predicted memory against watched steps; `zofed models`; `zofed check` finds every fault and leaves nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zofed
from zofed import config
from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.core.journal import link
from zofed.core.pass_memory import peak_bytes
from zofed.data import encoding
from zofed.models import spec
from zofed.preflight import check, footprint, model_info
from zofed.runs import memory as process_memory
from zofed.training import measurements, modes
from zofed.training.replicas import replica_of
from zofed.training.steps import step_function

Zofed = Callable[..., tuple[int, str, str]]


# --- memory -----------------------------------------------------------------------------------------------------------


def watched(settings: Settings) -> int:
    """Bytes of weights and optimizer, and the most that a real second step's tensors take besides."""
    tokenizer = encoding.load_tokenizer("shipped")
    model = spec.create_model(settings, tokenizer)
    ids = torch.randint(0, 512, (settings.batch_size, settings.block_size), generator=torch.Generator().manual_seed(1))
    replica = replica_of(settings, model)
    ask = step_function(settings, replica, {"input_ids": ids, "labels": ids}, 10)

    def step() -> None:
        asked = ask(replica.round + 1)
        replica.apply(link(replica.head, asked.record), asked.update)

    step()
    state = replica.optimizer.state_dict().values()
    kept = [*model.parameters(), *(tensor for tensor in state if tensor.dtype != torch.float64)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept) + peak_bytes(step)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zo", "fo"])
@pytest.mark.parametrize(
    "other",
    [
        {},
        {"optimizer": "adamw", "scope": "reduced"},
        {"optimizer": "mudamw"},
        {"momentum": 0.9, "finite-difference": "two-point", "perturbations-per-pass": 3},
        {"queries": 40, "perturbations-per-pass": 16, "directions": "rank2"},
        {"directions": "rademacher", "queries": 2},
        {"dtype": "bfloat16", "forward-dtype": "bfloat16"},
        {"quantisation": "nf4", "scope": "norms"},
        {"quantisation": "int8", "scope": "norms", "dtype": "bfloat16"},
    ],
    ids=lambda other: "-".join(map(str, other.values())) or "plain",
)
def test_predicted_memory_is_that_of_a_real_step(mode: str, other: dict[str, Any]) -> None:
    if "quantisation" in other:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'zofed[quantised]'")
    settings = config.resolve({"mode": mode, "batch-size": 8, "block-size": 128, "device": "cpu"} | other)
    predicted = model_info.info(settings, (mode,)).memory[mode].peak
    assert predicted == pytest.approx(watched(settings), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("local_optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predicted_memory_of_a_clients_own_steps_is_that_of_real_ones(dtype: str, local_optimizer: str) -> None:
    given = {
        "mode": "fo",
        "clients": 2,
        "local-steps": 3,
        "local-optimizer": local_optimizer,
        "local-learning-rate": 0.01,
    }
    settings = config.resolve(given | {"dtype": dtype, "batch-size": 8, "block-size": 128, "device": "cpu"})
    model = spec.create_model(settings, encoding.load_tokenizer("shipped"))
    ids = torch.randint(0, 512, (24, settings.block_size), generator=torch.Generator().manual_seed(1))
    replica = replica_of(settings, model)

    def steps() -> None:
        measurements.update(settings, replica, {"input_ids": ids, "labels": ids}, 0)

    steps()
    watched = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()) + peak_bytes(steps)
    predicted = model_info.info(settings, ("fo",)).memory["fo"]
    assert predicted.weights + predicted.step == pytest.approx(watched, rel=0.1)


@pytest.mark.slow
def test_other_modes_are_made_of_the_same_parts() -> None:
    found = zofed.get_model_info("tiny", optimizer="adamw", batch_size=2).memory
    weights = 4 * 141_056
    assert {mode: memory.state for mode, memory in found.items()} == dict.fromkeys(found, 2 * weights) | {
        "calibrate": 4 * weights,
        "instruct": 4 * weights,
        "subspace": 0,
    }
    assert found["calibrate"].step == max(found["zo"].step, found["fo"].step)
    assert found["instruct"].step == max(found["fo"].step, found["zo"].step + 2 * weights)
    assert found["subspace"].step > 0
    with pytest.raises(UserError, match="unknown mode 'both': known are zo, fo"):
        zofed.get_model_info("tiny", modes=("both",))


def test_each_mode_is_predicted_with_the_optimizer_that_it_chooses() -> None:
    found = zofed.get_model_info("tiny", batch_size=1, block_size=4, modes=("zo", "fo")).memory
    assert (found["zo"].state, found["fo"].state) == (0, 2 * 4 * 141_056), "sgd and adamw"


@pytest.mark.slow
def test_the_subspace_writes_no_gradient_of_the_weights() -> None:
    found = zofed.get_model_info("200M", batch_size=1, block_size=4, modes=("fo", "subspace")).memory
    assert found["fo"].step >= found["fo"].weights > 5 * found["subspace"].step


@pytest.mark.slow
def test_the_largest_size_is_predicted_without_its_memory() -> None:
    before = process_memory.peak_bytes()
    found = zofed.get_model_info("1B", modes=("fo",))
    memory = found.memory["fo"]
    assert found.parameters == 774_030_080 and memory.weights == 4 * 774_030_080
    assert memory.peak > 2 * memory.weights
    assert process_memory.peak_bytes() - before < 2**29


def test_parameters_are_counted_by_scope() -> None:
    found = zofed.get_model_info("tiny", modes=())
    block = 4 * 64 * 64 + 4 * 64 + 2 * 4 * 64 * 64 + 4 * 64 + 64 + 2 * 2 * 64
    assert found.by_scope["last-1"] == block + 2 * 64
    assert found.by_scope["full"] == found.parameters == 512 * 64 + 128 * 64 + 2 * block + 2 * 64
    assert "head" not in found.by_scope  # tied to the embedding
    assert (found.tokenizer, found.entries, found.vocabulary, found.positions) == ("shipped", 512, 512, 128)


def test_a_model_by_name_is_that_of_a_run() -> None:
    same, other = (zofed.create_model("tiny", seed=seed).state_dict() for seed in (3, 4))
    run = spec.create_model(config.resolve({"seed": 3}), encoding.load_tokenizer("shipped")).state_dict()
    assert all(torch.equal(same[name], run[name]) for name in run)
    assert not torch.equal(other["transformer.wte.weight"], run["transformer.wte.weight"])
    classifier = zofed.create_model("tiny", labels=3, dtype="bfloat16")
    assert classifier(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.shape == (1, 3)
    assert classifier.dtype == torch.bfloat16
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        zofed.create_model("tinny")
    with pytest.raises(UserError, match="did you mean 'batch-size'"):
        zofed.get_model_info("tiny", batch_sise=3)


@pytest.mark.slow
def test_the_listing_names_every_size_and_counts_all_settings(zofed_command: Zofed) -> None:
    status, out, _ = zofed_command("models", "--model", "tiny", "--batch-size", "8", "--optimizer", "adamw")
    assert status == 0
    assert "GPT2LMHeadModel, vocabulary 512, tokenizer shipped" in out
    assert "8x64 tokens, adamw" in out and "141,056" in out
    expected = zofed.get_model_info("tiny", batch_size=8, optimizer="adamw").memory
    row = next(line for line in out.splitlines()[::-1] if line.startswith("tiny")).split()[1:]
    assert row == [f"{size / 2**20:,.0f}" for size in (4 * 141_056, *(expected[m].peak for m in footprint.MODES))]
    status, _, errors = zofed_command("models", "--model", "20m")
    assert status == 2 and "did you mean '20M'" in errors
    status, _, errors = zofed_command("models", "--seed", "1", "download", "a/b")
    assert status == 2 and "--seed" in errors


# --- check ------------------------------------------------------------------------------------------------------------


def verdicts(settings: Settings, *modes: str) -> dict[str, check.Line]:
    return {line.what: line for line in check.check(settings, modes or (settings.mode,))}


@pytest.mark.slow
def test_a_sound_run_is_green_and_nothing_is_written(
    zofed_command: Zofed, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    given = ["--dataset", corpus, "--batch-size", "2", "--queries", "3", "--out", tmp_path / "new"]
    status, out, errors = zofed_command("check", "--all-modes", *given)
    assert (status, errors) == (0, "")
    assert list(tmp_path.iterdir()) == []
    told = {line[5:21].strip() for line in out.splitlines()[:-1]}
    assert told >= {"versions", "device", "out", "tokenizer", "data", "model", "memory", "federation"}
    assert told >= {f"{what} {mode}" for what in ("step", "time") for mode in modes.MODES}
    assert "fix" not in {line[:3] for line in out.splitlines()}


def test_all_faults_are_found_at_once(zofed_command: Zofed, tmp_path: Path) -> None:
    (tmp_path / "held").write_text("")
    given = ["--device", "cuda:9", "--out", tmp_path, "--model", "tinny", "--dataset", "nowhere"]
    status, out, errors = zofed_command("check", *given)
    assert status == 2
    assert errors.splitlines() == [
        "zofed: 4 to fix before this run, each told above with its remedy: device, out, model, data"
    ]
    for remedy in ("set device to cpu", "choose another folder", "did you mean 'tiny'", "use one of sample-dclm"):
        assert remedy in out


def test_a_pickle_is_found_beside_missing_data(quick: Callable[..., Settings], tmp_path: Path) -> None:
    zofed.create_model("tiny").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    found = verdicts(quick(model=str(tmp_path / "model"), tokenizer="shipped", dataset="nowhere"))
    faults = {line.what: line.told for line in found.values() if line.verdict == "fix"}
    assert "only the pickle 'pytorch_model.bin'" in faults.pop("weights")
    assert list(faults) == ["data"]


@pytest.mark.first(2)
@pytest.mark.parametrize(
    ("values", "what", "told"),
    [
        ({"tokenizer": "gpt2"}, "data", "50257 entries but model tiny only"),
        ({"block_size": 129}, "model", "set block-size to 128 or less"),
        ({"scope": "head"}, "model", "leaves nothing to train"),
        ({"tokenizer": "gpt3"}, "tokenizer", "use 'shipped'"),
        ({"held_out_fraction": 0.01, "block_size": 64, "dataset": "short"}, "data", "held-out part"),
        ({"task": "classification"}, "data", "set task to language-model"),
        ({"clients": 41}, "data", "use fewer clients"),
        ({"clients": 2, "quorum": 3}, "federation", "set it to clients = 2 or less"),
        ({"clients": 2, "aggregation": "median"}, "federation", "set direction-seeds to shared"),
    ],
)
def test_a_fault_is_told_with_its_remedy(
    quick: Callable[..., Settings], tmp_path: Path, values: dict[str, Any], what: str, told: str
) -> None:
    if values.get("tokenizer") == "gpt2":  # a model's own vocabulary is smaller
        zofed.create_model("tiny").save_pretrained(tmp_path / "model")
        values, told = values | {"model": str(tmp_path / "model")}, "50257 entries but model"
    if values.get("dataset") == "short":
        (tmp_path / "short.jsonl").write_text('{"text": "a few words"}\n' * 40)
        values = values | {"dataset": str(tmp_path / "short.jsonl")}
    found = verdicts(quick(**values))
    assert found[what].verdict == "fix", found
    assert told in found[what].told
    assert [line.what for line in found.values() if line.verdict == "fix"] == [what]


@pytest.mark.slow
def test_memory_that_is_not_there_is_told_and_no_step_is_taken(
    quick: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = zofed.get_model_info("tiny", modes=("zo",), batch_size=2, block_size=16, queries=3).memory["zo"].peak
    for free, verdict, steps in ((peak // 2, "fix", False), (3 * peak // 2, "note", True), (9 * peak, "ok", True)):
        monkeypatch.setattr(check, "free_bytes", lambda settings, free=free: free)
        found = verdicts(quick())
        assert found["memory"].verdict == verdict
        assert ("step zo" in found) is steps


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, {"participation": 0.5, "local_steps": 2, "quantization_bits": 6}])
def test_predicted_bytes_of_a_round_are_those_of_a_federation(
    quick: Callable[..., Settings], tmp_path: Path, way: dict[str, Any]
) -> None:
    from zofed.federated import client, server
    from zofed.federated.local_grid import LocalGrid

    settings = quick(clients=2, rounds=8, queries=16, out=str(tmp_path / "run"), **way)
    told = verdicts(quick(clients=2, rounds=8, queries=16, **way))["federation"].told
    up, down = [int(word.replace(",", "")) for word in told.split() if word.replace(",", "").isdigit()][:2]
    summary = server.run(LocalGrid(client.app, 2, settings.model_dump(by_alias=True)), settings, "")
    assert "needs 2 nodes" in told
    assert summary["bytes_up_per_client_round"] == pytest.approx(up, rel=0.05)
    assert summary["bytes_down_per_client_round"] == pytest.approx(down, rel=0.15)  # the first brings no record
