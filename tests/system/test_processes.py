"""Whole processes: killed and resumed, replayed as if on other machines, and run through Flower with Ray."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zofed import config
from zofed.config import Settings
from zofed.training import central

pytestmark = pytest.mark.slow

ZOFED = [str(Path(sys.executable).parent / "zofed")]
QUICK = ["--block-size", "16", "--batch-size", "2", "--eval-examples", "8", "--device", "cpu"]


def run(*arguments: str, **environment: str) -> str:
    """Output of a zofed command that must end well."""
    done = subprocess.run(
        [*ZOFED, *arguments], capture_output=True, text=True, timeout=240, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summary_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("mode", ["zo", "fo"])
def test_a_run_killed_again_and_again_resumes_to_the_same_weights(corpus: Path, tmp_path: Path, mode: str) -> None:
    steps = {"zo": "150", "fo": "400"}[mode]
    common = ["--mode", mode, "--dataset", str(corpus), "--steps", steps, *QUICK]
    common += ["--save-interval", "20", "--optimizer", "adamw", "--learning-rate", "1e-3"]
    common += ["--queries", "4"] if mode == "zo" else []
    run("train", *common, "--out", str(tmp_path / "whole"))
    folder = tmp_path / "killed"
    command = ["train", *common, "--out", str(folder)]
    kills = 0
    for wait in (0.05, 0.6, 1.1):
        process = subprocess.Popen([*ZOFED, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for_steps(folder / "metrics.csv", process)
        time.sleep(wait)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        assert process.stdout
        process.stdout.close()
        command = ["train", "--resume", str(folder)]
    assert kills == 3, "the run ended before it could be killed: give it more steps"
    run(*command)
    assert summary_of(folder)["digest"] == summary_of(tmp_path / "whole")["digest"]
    with open(folder / "metrics.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(step) for step in range(int(steps) + 1)]


def wait_for_steps(metrics: Path, process: subprocess.Popen[str]) -> None:
    """Until the process has written another line of metrics."""
    before = metrics.stat().st_size if metrics.exists() else 0
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.stat().st_size <= before + 100:
        assert process.poll() is None and time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.02)


# What stands in for other machines: other vector units, another code path in the BLAS; and other thread counts.
MACHINES = [{"ATEN_CPU_CAPABILITY": units} for units in ("default", "avx2", "avx512")] + [{"MKL_CBWR": "COMPATIBLE"}]

REPLAY = """
import sys
from pathlib import Path
from zofed.training.finalize import replay_run
from zofed.runs.run_folder import RunFolder
for folder in sys.argv[1:]:
    for threads in (1, 2):
        replica, start = replay_run(RunFolder(Path(folder)), threads=threads)
        print(Path(folder).name, start, replica.round, replica.digest())
"""


RULES = {
    "sgd": {"optimizer": "sgd", "weight-decay": 0.01},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "learning-rate": 1e-3},
    "adamw": {"optimizer": "adamw", "weight-decay": 0.01, "learning-rate": 1e-3},
    "mudamw": {"optimizer": "mudamw", "weight-decay": 0.01, "learning-rate": 1e-3},
}
DIRECTIONS = ("rank1", "rank4", "rademacher", "gaussian")
# What backpropagation found is kept in files, and moves the weights portably like any record.
MODES = {
    "hybrid": {"mode": "instruct", "instruct-kind": "hybrid", "bp-interval": 2, **RULES["adamw"], "scope": "last-1"},
    "hybrid-rank1": {"mode": "instruct", "bp-interval": 3, **RULES["mudamw"], "query-batches": "per-query"},
    "cosine": {"mode": "instruct", "instruct-kind": "cosine", "instruct-weighting": "unbiased", **RULES["momentum"]},
    "calibrate": {"mode": "calibrate", "bp-interval": 3, "bp-optimizer": "mudamw", "bp-learning-rate": 1e-3},
    "first order": {"mode": "fo", **RULES["adamw"]},
    "core": {"mode": "subspace", "subspace-size": 64, "subspace-interval": 2, "optimizer": "adamw"},
    "core in bfloat16": {"mode": "subspace", "subspace-size": 64, "subspace-interval": 2, "dtype": "bfloat16"},
    "diagonal": {"mode": "subspace", "subspace-variant": "diagonal", "subspace-size": 9, "subspace-interval": 2},
}


def portable_runs(corpus: Path) -> dict[str, Settings]:
    """Fifty steps of every rule along every kind, each pair with one of the two types of weights, half of them with
    normalised steps and sizes of tensors, so that every two of these choices meet; and of every mode."""
    runs: dict[str, Settings] = {}
    for (row, (rule, values)), (column, kind) in itertools.product(enumerate(RULES.items()), enumerate(DIRECTIONS)):
        is_bfloat16, is_normalised = (row + column) % 2 == 1, (row // 2 + column // 2) % 2 == 1
        values = {"learning-rate": 0.01, **values, "directions": kind, "queries": 3, "steps": 50}
        values |= {"dtype": "bfloat16", "epsilon": 1e-2} if is_bfloat16 else {}
        values |= {"normalize-slopes": True, "direction-scale": "rms"} if is_normalised else {}
        values |= {"cautious": True} if rule == "mudamw" and column % 2 else {}
        values |= {"scope": "last-1"} if kind in ("rademacher", "gaussian") or is_bfloat16 else {}  # the slow ones
        runs[f"{rule}-{kind}"] = config.resolve(values)
    runs |= {name: config.resolve(values | {"keep-gradients": True, "queries": 3}) for name, values in MODES.items()}
    common = {"dataset": str(corpus), "block_size": 16, "batch_size": 2, "eval_examples": 8, "eval_interval": 50}
    common |= {"save_interval": 0, "device": "cpu", "steps": 50}
    return {name: settings.model_copy(update=common) for name, settings in runs.items()}


@pytest.mark.timeout(1200)  # 24 runs, replayed on four kinds of machine with one and two threads
def test_fifty_steps_replay_to_one_digest_on_every_kind_of_machine(corpus: Path, tmp_path: Path) -> None:
    runs = portable_runs(corpus)
    digests = {
        name: central.train(settings, tmp_path / name, lambda row: None)["digest"] for name, settings in runs.items()
    }
    expected = [f"{name} 0 50 {digest}" for name, digest in digests.items() for _ in (1, 2)]
    assert len(set(expected)) == len(runs), "the runs must differ from each other"
    quiet = {"OMP_WAIT_POLICY": "passive"}  # two threads that spin on shared cores take ten times as long
    for machine in MACHINES:
        command = [sys.executable, "-c", REPLAY, *(str(tmp_path / name) for name in runs)]
        told = subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | machine | quiet)
        assert told.stdout.splitlines() == expected, f"{machine}: {told.stdout}{told.stderr}"


def test_flwr_run_with_ray_equals_the_same_federation_in_one_process(tmp_path: Path) -> None:
    from zofed.deployment import flower_commands, flower_run

    settings = {"clients": 2, "rounds": 3, "queries": 3, "eval-interval": 3, "eval-examples": 8, "device": "cpu"}
    out = tmp_path / "ray run"
    status = flower_run.flower_run({**settings, "out": str(out)}, nodes=2, cpus_per_node=1)
    assert status == flower_commands.COMPLETED
    ray = summary_of(out)
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    run("simulate", *options, "--out", str(tmp_path / "local"))
    local = summary_of(tmp_path / "local")
    assert ray["digest"] == local["digest"] == ray["replay_digest"]
    assert ray["client_digests"] == {"0": ray["digest"], "1": ray["digest"]}
    assert ray["eval_loss_end"] == local["eval_loss_end"]
    # A reply says in 1 or 2 bytes how many milliseconds it took.
    assert abs(ray["bytes_up_per_client_round"] - local["bytes_up_per_client_round"]) <= 1
    expected = {"settings.toml", "metrics.csv", "rounds.csv", "clients.csv", "journal.zofed", "loss.png", "model"}
    assert expected | {"summary.json"} <= {path.name for path in out.iterdir()}


def test_a_failing_app_is_told_as_failed(tmp_path: Path) -> None:
    from zofed.deployment import flower_run

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "someone's").write_text("work")
    config_ = {"out": str(tmp_path / "full"), "rounds": 1, "device": "cpu"}
    assert flower_run.flower_run(config_, nodes=2, cpus_per_node=1) == "finished:failed"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["someone's"]
