"""Kept hidden states change nothing that a run gives, in every mode and way; its second epoch runs the top alone."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import federate, ignore, records_of
from trainings import WAYS

from zofed import config
from zofed.base import arithmetic
from zofed.config import Settings
from zofed.core import trunk
from zofed.core.journal import link
from zofed.federated import client
from zofed.training import central
from zofed.training.process import prepare_process
from zofed.training.steps import step_function
from zofed.training.task import Task

Quick = Callable[..., Settings]
KEPT, NONE = {"hidden_states_gigabytes": 1.0}, {"hidden_states_gigabytes": 0.0}
PROMPT: dict[str, Any] = {"task": "prompt", "template": "{{ text }} It was", "block_size": 24}
RUNS: dict[str, dict[str, Any]] = {
    "zo": {},
    "subspace": WAYS["core"],
    "fo": WAYS["fo"],
    "prompt, subspace": WAYS["core"] | PROMPT | {"label_words": " bad, good"},
    "per-query": {"query_batches": "per-query", "finite_difference": "two-point"},
    "prompt, long words": PROMPT | {"label_words": " not good, good"},
    "classification": {"task": "classification"},
    "local steps": {"local_steps": 2},
    "one by one": {"directions": "rademacher"},
    "accuracy": {"objective": "accuracy", "epsilon": 0.1},
    "bfloat16": {"forward_dtype": "bfloat16"},
    "of the user": {"objective": "test_kept_states:own_objective"},
    **{name: WAYS[name] for name in ("calibrate", "hybrid", "hybrid-rank1", "cosine", "line", "diagonal")},
}


def own_objective(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Twenty short reviews of two classes."""
    texts = ("a fine film", "not worth the time", "a long and quiet story", "it may be seen")
    rows = [{"text": f"{texts[n % 4]}, number {n}", "label": int(n % 4 in (0, 2))} for n in range(20)]
    path = tmp_path / "films.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each batch that was to be filled, whether it was."""
    found: list[bool] = []
    plain = trunk.filled

    def watched(*args: Any, **kwargs: Any) -> Any:
        batch = plain(*args, **kwargs)
        found.append(trunk.KEY in batch)
        return batch

    monkeypatch.setattr(trunk, "filled", watched)
    return found


@pytest.mark.bits
@pytest.mark.first(6)
@pytest.mark.parametrize("way", RUNS)
@pytest.mark.parametrize("scope", ["last-1", r"ln_f|h\.2\.mlp"])
def test_a_run_gives_the_same_with_kept_states_and_without(
    quick: Quick, films: Path, filled: list[bool], tmp_path: Path, way: str, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    settings = quick(dataset=str(films), scope=scope, **({"batch_size": 3} | RUNS[way]))
    with_states = central.train(settings.model_copy(update=KEPT), tmp_path / "kept", ignore)
    # Of this mode's kernels a row's bits depend on its place in an odd batch: such batches are computed, which is told.
    assert (filled and all(filled)) or (arithmetic.mkl_mode() == "COMPATIBLE" and any(filled))
    del filled[:]
    without = central.train(settings.model_copy(update=NONE), tmp_path / "none", ignore)
    assert not any(filled)
    assert records_of(tmp_path / "kept") == records_of(tmp_path / "none")
    assert [with_states[key] for key in ("digest", "eval_loss_end")] == [
        without[key] for key in ("digest", "eval_loss_end")
    ]


@pytest.mark.parametrize("way", ["zo", "subspace"])
def test_clients_that_share_a_process_share_its_states(
    quick: Quick, films: Path, filled: list[bool], tmp_path: Path, way: str
) -> None:
    settings = quick(dataset=str(films), scope="last-1", rounds=4, **RUNS[way])
    kept = federate(settings.model_copy(update=KEPT), tmp_path / "kept", 2)
    assert filled and all(filled)
    none = federate(settings.model_copy(update=NONE), tmp_path / "none", 2)
    assert kept["digest"] == none["digest"] and records_of(tmp_path / "kept") == records_of(tmp_path / "none")
    client.forget()


def layers_run(settings: Settings) -> tuple[list[int], int]:
    """Passes of the lowest layer in each step of three epochs, and the examples of an epoch."""
    prepare_process(1)
    task = Task.load(settings)
    replica, examples = task.replica(), task.shard(0, 1)
    calls: list[int] = []
    lowest = next(name for name, _ in replica.model.named_modules() if name.endswith("h.0.ln_1"))
    replica.model.get_submodule(lowest).register_forward_hook(lambda *_: calls.append(1))
    ask = step_function(settings, replica, examples, 100)
    found = []
    for _ in range(3 * len(examples["labels"]) // settings.batch_size):
        step = ask(replica.round + 1)
        replica.apply(link(replica.head, step.record), step.update)
        found.append(len(calls))
        del calls[:]
    return found, len(examples["labels"])


@pytest.mark.parametrize("way", ["zo", "fo", "per-query"])
def test_once_all_examples_were_seen_no_frozen_layer_runs(
    quick: Quick, films: Path, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOFED_CACHE", str(tmp_path / "cache"))
    own = {"gradient_accumulation": 1} if way == "fo" else {}
    own |= {"queries": 2, "query_batch_size": 3} if way == "per-query" else {}
    settings = quick(dataset=str(films), task="classification", scope="last-1", **(RUNS[way] | {"batch_size": 6} | own))
    ran, examples = layers_run(settings.model_copy(update=KEPT))
    assert examples == 18
    # The first epoch lacks its first batch, which no step reads: the second meets those examples for the first time.
    assert all(ran[:2]) and len(ran) == 9 and not any(ran[5:])
    ran, _ = layers_run(settings.model_copy(update=KEPT))
    assert not any(ran[1:]), "what another process computed is found; the first batch of its kind is tried"
    ran, _ = layers_run(settings.model_copy(update=NONE))
    assert all(ran)


def test_a_resumed_run_gives_what_an_uncut_one_does(quick: Quick, films: Path, tmp_path: Path) -> None:
    settings = quick(dataset=str(films), scope="last-1", **(RUNS["fo"] | {"keep_gradients": True, "save_interval": 0}))
    whole = central.train(settings, tmp_path / "whole", ignore)

    def cut(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        central.train(settings, tmp_path / "cut", cut)
    assert central.resume(tmp_path / "cut", ignore)["digest"] == whole["digest"]


@pytest.mark.slow
@pytest.mark.skipif("ZOFED_REAL_MODELS" not in os.environ, reason="ZOFED_REAL_MODELS names no folder with smollm2")
def test_the_second_epoch_of_a_real_model_is_faster_and_gives_the_same(films: Path) -> None:
    seconds, digests = [], []
    for size in (0, 1):
        settings = config.resolve(
            {
                "model": str(Path(os.environ["ZOFED_REAL_MODELS"]) / "smollm2"),
                "dataset": str(films),
                "task": "prompt",
                "template": "{{ text }} It was",
                "label-words": " terrible, great",
                "mode": "subspace",
                "subspace-interval": 1,
                "scope": "last-4",
                "block-size": 40,
                "batch-size": 18,
                "device": "cpu",
                "hidden-states-gigabytes": size,
            }
        )
        prepare_process(1)
        task = Task.load(settings)
        replica, examples = task.replica(), task.shard(0, 1)
        ask = step_function(settings, replica, examples, 10)
        ask(1)
        began = time.process_time()
        digests.append(ask(1).record)
        seconds.append(time.process_time() - began)
    assert digests[0] == digests[1] and seconds[1] < 0.6 * seconds[0]
