"""Short runs in every mode: whole, cut, or step by step."""

from pathlib import Path
from typing import Any

import pytest
from federations import SUBSPACE

from zofed.config import WITH_BACKPROP, Settings
from zofed.core import journal
from zofed.core.replica import Replica
from zofed.runs.run_folder import RunFolder
from zofed.training import central
from zofed.training.process import prepare_process
from zofed.training.steps import Steps
from zofed.training.task import Task

SHORT = {"steps": 5, "save_interval": 2, "eval_examples": 4, "bp_interval": 2, "eval_interval": 5}

WAYS: dict[str, dict[str, Any]] = {
    "fo": {"mode": "fo", "optimizer": "mudamw", "clip_norm": 0.5, "gradient_accumulation": 2},
    "calibrate": {"mode": "calibrate", "bp_optimizer": "adamw", "bp_learning_rate": 1e-3, "momentum": 0.5},
    "hybrid": {"mode": "instruct", "instruct_kind": "hybrid", "directions": "rademacher", "optimizer": "mudamw"},
    "hybrid-rank1": {"mode": "instruct", "direction_scale": "rms", "schedule": "cosine", "warmup_steps": 2},
    "raw": {"mode": "instruct", "instruct_weighting": "raw", "instruct_blend": False, "bp_optimizer": "adamw"},
    "cosine": {"mode": "instruct", "instruct_kind": "cosine", "instruct_weighting": "unbiased", "clip_norm": 0.1},
    "guide-only": {"mode": "instruct", "instruct_kind": "guide-only", "bp_data_fraction": 0.5},
    "line": {"mode": "instruct", "instruct_kind": "line", "query_batches": "per-query", "bp_batch_size": 3},
    "core": SUBSPACE | {"weight_decay": 0.1},
    "core to rate zero": SUBSPACE | {"schedule": "cosine"},
    "diagonal": SUBSPACE | {"subspace_variant": "diagonal", "directions": "rank2", "direction_scale": "rms"},
}


def train_cut(settings: Settings, out: Path, at: int) -> None:
    def cut(row: dict[str, Any]) -> None:
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        central.train(settings, out, cut)


def contents(out: Path) -> list[Any]:
    return [entry.record for entry in journal.read(RunFolder(out).journal).entries]


def steps_of(settings: Settings) -> tuple[Steps, Task, Replica]:
    prepare_process(1)
    task = Task.load(settings)
    replica = task.replica()
    examples = task.shard(0, 1)
    own = task.backprop_examples if settings.mode in WITH_BACKPROP else examples
    return Steps(settings, replica, examples, settings.steps, own, None), task, replica
