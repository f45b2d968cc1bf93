"""Sweeps on Slurm: what sbatch is asked for, how jobs end, and a sweep that dies while its jobs go on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.clusters import SWEEP, ZOFED, Here, runs
from tests.experiments import stand_in_slurm
from zofed import experiments
from zofed.base.errors import UserError
from zofed.base.files import ROOT
from zofed.experiments import slurm_options, sweep_engine, sweep_file, sweep_slurm
from zofed.experiments.sweep import Run
from zofed.experiments.sweep_engine import Job
from zofed.experiments.sweep_folder import SweepFolder
from zofed.experiments.sweep_process import INTERRUPTED
from zofed.experiments.sweep_runner import Runner
from zofed.experiments.sweep_slurm import Queued, Slurm
from zofed.training import central

Command = Callable[..., tuple[int, str, str]]
SAME = ("digest", "journal_head", "eval_loss_end")

SMALL = f"""{SWEEP}
steps = 200
eval-interval = 100
save-interval = 100
[slurm]
partition = "cpu"
time = "0:30:00"
"""


@pytest.mark.parametrize(
    ("time", "minutes"),
    [(90, 90), ("90", 90), ("90:30", 91), ("4:00:00", 240), ("0:0:1", 1), ("2-12", 3600), ("1-0:30", 1470),
     ("1-01:00:00", 1500)],
)  # fmt: skip
def test_times_are_read_as_slurm_writes_them(time: Any, minutes: int) -> None:
    assert slurm_options.minutes(time) == minutes


@pytest.mark.parametrize(
    ("typed", "what"),
    [
        ("time=4h", "time = '4h': give minutes, or HOURS:MINUTES:SECONDS"),
        ("time=0", "time = '0' is none"),
        ("Partition=gpu", "'Partition' is no option of sbatch"),
        ("partition=", "partition = '': give a text or a whole number"),
        ("output=x", "output is not for a sweep to say"),
        ("setup=module load", "lines of shell stand in the file"),
    ],
)
def test_what_is_no_option_of_sbatch_is_told(typed: str, what: str) -> None:
    with pytest.raises(UserError, match=f"--slurm {typed}: {what}"):
        slurm_options.typed([typed])


def test_a_run_asks_for_what_it_needs_unless_the_sweep_says_otherwise() -> None:
    wanted = slurm_options.typed(["partition=gpu", "exclusive", "--time=2:00:00"])
    settings, gib = runs(threads=3)[0].settings, 2**30
    found = slurm_options.options(settings, 1, 2 * gib, wanted)
    assert slurm_options.shown(found) == (
        "--cpus-per-task=3 --exclusive --gpus-per-node=1 --mem=7G --partition=gpu --requeue --time=120"
    )
    assert slurm_options.options(settings, 0, 2 * gib, {}) == {
        "cpus-per-task": 3, "mem": "4G", "requeue": True, "time": 60,
    }  # fmt: skip
    assert slurm_options.options(settings, 0, 2 * gib, {"gres": "shard:1"})["mem"] == "7G", "CUDA's libraries count"
    own = {"mem-per-cpu": "2G", "gres": "gpu:a100:1", "cpus-per-task": 8, "setup": ["module load cuda"]}
    found = slurm_options.options(settings, 1, 0, own)
    assert slurm_options.shown(found) == ("--cpus-per-task=8 --gres=gpu:a100:1 --mem-per-cpu=2G --requeue --time=60")
    two = runs(devices="cuda:0,cuda:1", mode="zo")[0].settings
    assert slurm_options.options(two, 0, 0, {})["gpus-per-node"] == 2


def test_a_dry_run_shows_what_sbatch_will_be_asked_for(tmp_path: Path, zofed_command: Command) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(SMALL.replace("200", "3"))
    command = ("sweep", file, "--engine", "slurm", "--slurm", "account=lab", "--slurm", "partition=gpu", "--dry-run")
    status, told, _ = zofed_command(*command)
    assert status == 0
    assert "sbatch for 2 runs: --account=lab --cpus-per-task=1 --mem=2G --partition=gpu --requeue --time=30\n" in told
    assert zofed_command("sweep", file, "--slurm", "account=lab")[2] == (
        "zofed: --slurm account=lab: it is for --engine slurm, and this is --engine fork\n"
    )


def test_what_cannot_be_is_told_before_the_first_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--gpus-per-run 0.5: Slurm gives whole GPUs"):
        sweep_slurm.queue(None, 0.5, {})
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        sweep_slurm.queue(None, 0, {}).prepare(tmp_path, runs())


def test_without_submitit_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    monkeypatch.delitem(sys.modules, "zofed.experiments.sweep_slurm")
    monkeypatch.delattr(experiments, "sweep_slurm")
    what = r"--engine slurm needs submitit: pip install 'zofed\[slurm\]'"
    with pytest.raises(UserError, match=what), sweep_engine.opened("slurm", None, 0, {}):
        pass
    assert "requirements-slurm.txt" in (ROOT / "pyproject.toml").read_text()


def test_a_job_that_sbatch_refuses_is_told(tmp_path: Path, slurm: Path) -> None:
    engine = sweep_slurm.queue(None, 0, {"partition": "nowhere"})
    engine.prepare(tmp_path, runs())
    with pytest.raises(UserError, match=r"takes no job .*\(sbatch: error: .* Invalid partition .*\): mend --slurm"):
        engine.start(runs()[0], tmp_path / "run", tmp_path / "log", 0)


class OneAtATime(Here):
    """An engine that is asked for two runs at a time and takes one."""

    def places(self, runs: Sequence[Run]) -> int:
        return 2

    def start(self, run: Run, out: Path, log: Path, slot: int) -> Job:
        if self._jobs:
            raise UserError("sbatch takes no job for it (too many)")
        return super().start(run, out, log, slot)


def test_a_run_that_the_queue_does_not_take_waits_for_one_that_ends(tmp_path: Path, one_thread: None) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(SMALL.replace("steps = 200", "steps = 2"))
    found = SweepFolder(tmp_path / "out")
    told = "too many.; the others go on, and it is tried again when one ends"
    with found.opened(), pytest.warns(UserWarning, match=told):
        board = Runner(sweep_file.read(file), found, OneAtATime(), lambda board: None).run()
    assert board.complete == 2 and not board.failed


@pytest.mark.parametrize(
    ("state", "lost", "error"),
    [
        ("OUT_OF_MEMORY", False, r"job 7 ended as OUT_OF_MEMORY: ask for more, as --slurm mem=16G \(.*7_0_log.err\)"),
        ("TIMEOUT", False, "ended as TIMEOUT: it did not end within its time"),
        ("CANCELLED by 1000", False, "ended as CANCELLED"),
        ("NODE_FAIL", True, ""),
        ("PREEMPTED", True, ""),
    ],
)  # fmt: skip
def test_a_job_that_ends_without_a_word_has_its_state_told(tmp_path: Path, state: str, lost: bool, error: str) -> None:
    cancelled = []
    paths = SimpleNamespace(result_pickle=tmp_path / "7_0_result.pkl", stderr=tmp_path / "7_0_log.err")
    job: Any = SimpleNamespace(
        job_id="7", state=state, paths=paths, done=lambda: True, cancel=lambda check: cancelled.append("7")
    )
    engine, queued = Slurm(None, 0, {}), Queued(runs()[0], 0, job=job)
    if not lost:
        engine._hear(queued)
        assert queued.ended and not queued.lost and re.search(error, str(queued.error)), queued.error
        return
    with pytest.warns(UserWarning, match=rf"lost its job 7 \({state}\): it goes on from its folder"):
        engine._hear(queued)
    assert queued.ended and queued.lost and cancelled == ["7"]
    engine._losses[queued.run.name] = sweep_slurm.LOSSES
    engine._hear(queued)
    assert not queued.lost and f"its job was lost {sweep_slurm.LOSSES + 1} times" in str(queued.error)


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "SUSPENDED", "UNKNOWN"])
def test_a_job_that_waits_goes_on(tmp_path: Path, state: str) -> None:
    paths = SimpleNamespace(result_pickle=tmp_path / "none.pkl")
    job: Any = SimpleNamespace(job_id="7", state=state, paths=paths, done=lambda: False)
    queued = Queued(runs()[0], 0, job=job)
    Slurm(None, 0, {})._hear(queued)
    assert not queued.ended


def test_a_run_that_is_told_to_end_leaves_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the job's state tells whether it was cancelled or preempted, after which it is queued again."""

    def interrupted(written: str, log: str, began: float, slot: int, tell: Callable[..., None]) -> None:
        tell({"error": INTERRUPTED})

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sweep_slurm.sweep_process, "try_out", interrupted)
    try:
        with pytest.raises(SystemExit):
            sweep_slurm.CarryOut()("", "")
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands on PATH, and the folder in which their jobs lie."""
    place = tmp_path / "jobs"
    place.mkdir()
    commands = stand_in_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_SLURM", str(place))
    return place


def steps(out: Path, run: str) -> int:
    try:
        return len((out / "runs" / run / "metrics.csv").read_text().splitlines())
    except OSError:
        return 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_whose_time_is_over_queues_itself_again_and_goes_on(
    tmp_path: Path, slurm: Path, zofed_command: Command
) -> None:
    file, out = tmp_path / "sweep.toml", tmp_path / "slurm"
    file.write_text(SMALL.replace("[0, 1]", "[0]").replace("200", "100"))
    command = [*ZOFED, "sweep", str(file), "--out", str(out), "--engine", "slurm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 300
        while steps(out, "seed=0") < 10:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        os.kill(int((slurm / "1.step").read_text()), signal.SIGUSR2)
        told, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "1 runs complete, " in told, told
    assert (slurm / "1.requeued").exists() and not (slurm / "2.sh").exists()
    (run,) = sweep_file.read(file).first()
    here = central.train(run.settings, tmp_path / "here", lambda row: None)
    there = json.loads((out / "runs" / run.name / "summary.json").read_text())
    assert {key: here[key] for key in SAME} == {key: there[key] for key in SAME}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_jobs_outlive_their_sweep_and_a_lost_one_goes_on(tmp_path: Path, slurm: Path, zofed_command: Command) -> None:
    file, out = tmp_path / "sweep.toml", tmp_path / "slurm"
    file.write_text(SMALL)
    command = [*ZOFED, "sweep", str(file), "--out", str(out), "--engine", "slurm"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while min(steps(out, "seed=0"), steps(out, "seed=1")) < 10:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    jobs = {shlex.split(path.read_text().split("--job-name=")[1])[0]: path.stem for path in slurm.glob("*.sh")}
    lost = jobs["seed=1"]
    (slurm / f"{lost}.state").write_text("NODE_FAIL")
    os.kill(int((slurm / f"{lost}.step").read_text()), signal.SIGKILL)
    was = steps(out, "seed=1")
    assert was < 200, "the run was to be lost on its way"
    status, told, errors = zofed_command("sweep", out / "sweep.toml", "--out", out, "--engine", "slurm")
    assert status == 0 and "2 runs complete, " in told and " 0 failed" in told, told + errors
    assert len(list(slurm.glob("*.sh"))) == 3, "one job was taken up, one was lost"
    asked = {line.removeprefix("#SBATCH ") for line in (slurm / "1.sh").read_text().splitlines()}
    assert {"--partition=cpu", "--time=30", "--cpus-per-task=1", "--mem=2G"} <= asked
    for run in sweep_file.read(file).first():
        here = central.train(run.settings, tmp_path / "here" / run.name, lambda row: None)
        there = json.loads((out / "runs" / run.name / "summary.json").read_text())
        assert {key: here[key] == there[key] for key in SAME} == dict.fromkeys(SAME, True), run.name


def test_engines_are_known_by_name() -> None:
    with sweep_engine.opened("slurm", 3, 0, {"partition": "cpu"}) as engine:
        assert engine.places(runs()) == 3 and "--partition=cpu" in engine.requests(runs())[0]
