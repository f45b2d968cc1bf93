"""Carries the runs of a sweep out as jobs of Slurm, by submitit: a job for each, which goes on where it was cut.

Slurm queues the jobs and places them. A job whose time is over puts itself into the queue again; one that outlives its
sweep is taken up by the next go at it, which finds it by the files that submitit keeps in `slurm/` of the folder.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.base.files import private_folder
from zofed.experiments import slurm_options, sweep_cost, sweep_process
from zofed.experiments.sweep import Run
from zofed.experiments.sweep_engine import Job

try:
    import submitit
    from submitit.core import utils as submitit_errors
except ImportError:
    raise UserError("--engine slurm needs submitit: pip install 'zofed[slurm]'") from None

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")
GOES = 100  # times that a job may run out of time and be queued again
LOSSES = 10  # times that a run may lose its node, or be preempted, before it counts as failed
LOOK = 2.0  # seconds between two looks at the jobs
WAITING = ("PENDING", "RUNNING", "REQUEUED", "RESIZING", "SUSPENDED", "COMPLETING", "CONFIGURING")
LOST = ("NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED")
REMEDIES = {  # states in which a job ends without a word, and what to do
    "OUT_OF_MEMORY": "ask for more, as --slurm mem=16G",
    "TIMEOUT": "it did not end within its time and did not queue itself again: ask for more, as --slurm time=4:00:00",
    "DEADLINE": "it could not end in time",
    "CANCELLED": "somebody cancelled it, or the sweep did",
    "FAILED": "see what it printed",
}


@dataclass
class Queued(Job):
    """A run whose job waits or runs."""

    job: submitit.SlurmJob[dict[str, Any]]


class CarryOut(submitit.helpers.Checkpointable):
    """What a job does: the run in its folder. At the end of its time submitit has it queued again, to go on there."""

    def __call__(self, written: str, log: str) -> dict[str, Any]:
        """Returns what `Job.take` takes. written: settings as JSON; log: the file to which the run prints."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # of scancel, and of a preemption
        told: dict[str, Any] = {}
        sweep_process.try_out(written, log, time.monotonic(), 0, told.update)
        if told.get("error") == sweep_process.INTERRUPTED:
            sys.exit(130)  # without a result: the job's state tells whether it was cancelled or preempted
        return told


@dataclass
class Slurm:
    """The engine of Slurm. parallel: jobs in the queue at most, None: all. share: GPUs for each run, 0 or 1.

    wanted: options of sbatch, as `slurm_options` has them.
    """

    parallel: int | None
    share: float
    wanted: Mapping[str, Any]
    _folder: Path = field(default=Path(), init=False)
    _running: list[Queued] = field(default_factory=list, init=False)
    _losses: Counter[str] = field(default_factory=Counter, init=False)

    def places(self, runs: Sequence[Run]) -> int:
        """As many as it was told, else all: how many run at a time is Slurm's to say."""
        return self.parallel or max(1, len(runs))

    def requests(self, runs: Sequence[Run]) -> list[str]:
        """The options of sbatch, once for all runs that are given the same."""
        found = Counter(slurm_options.shown(self._options(run)) for run in runs)
        return [f"sbatch for {count} runs: {options}" for options, count in found.items()]

    def prepare(self, folder: Path, runs: Sequence[Run]) -> None:
        """See that the commands of Slurm are here, and that it tells how jobs end."""
        self._folder = private_folder(folder / "slurm")
        if missing := [name for name in COMMANDS if shutil.which(name) is None]:
            raise UserError(
                f"--engine slurm: there is no {missing[0]} on this machine: start the sweep where you would type "
                "sbatch, or leave --engine out"
            )
        asked = subprocess.run(["sacct", "--noheader", "--allocations"], capture_output=True, text=True)
        if asked.returncode:
            raise UserError(
                f"--engine slurm: sacct, which tells how jobs end, says {_brief(asked.stderr)!r}: ask those who run "
                "this cluster for accounting, or take --engine ray"
            )

    def start(self, run: Run, out: Path, log: Path, slot: int) -> Job:
        """Put a run's job into the queue; or take up the one of an earlier go, which still waits or runs."""
        folder = self._folder / run.name
        job = _earlier(folder) or self._submitted(run, folder, out, log)
        self._running.append(Queued(run, slot, job=job))
        return self._running[-1]

    def hear(self, seconds: float) -> None:
        """Look at the jobs after so many seconds, at least `LOOK`."""
        time.sleep(max(seconds, LOOK))
        for queued in self._running:
            self._hear(queued)
        self._running = [queued for queued in self._running if not queued.ended]

    def stop(self) -> None:
        """Cancel all jobs: each has its run end as by Ctrl-C."""
        for queued in self._running:
            queued.job.cancel(check=False)
        deadline = time.monotonic() + sweep_process.PATIENCE
        while self._running and time.monotonic() < deadline:
            self.hear(LOOK)
        self._running.clear()

    def _submitted(self, run: Run, folder: Path, out: Path, log: Path) -> submitit.SlurmJob[dict[str, Any]]:
        options = self._options(run)
        executor = submitit.SlurmExecutor(private_folder(folder), max_num_timeout=GOES)
        executor.update_parameters(
            job_name=run.name,
            time=options.pop("time"),
            cpus_per_task=options.pop("cpus-per-task"),
            setup=self.wanted.get("setup"),
            wckey=None,
            additional_parameters=options,
        )
        written = run.settings.model_copy(update={"out": str(out)}).model_dump_json(by_alias=True)
        try:
            job = executor.submit(CarryOut(), written, str(log))
        except (submitit_errors.FailedJobError, submitit_errors.FailedSubmissionError) as error:
            raise UserError(
                f"sbatch takes no job for {run.name} ({_brief(str(error))}): mend --slurm or the file's [slurm], or "
                "take a smaller --parallel"
            ) from error
        assert isinstance(job, submitit.SlurmJob)
        return job

    def _options(self, run: Run) -> dict[str, Any]:
        try:
            memory = sweep_cost.memory(run)
        except UserError:
            memory = 0  # the run itself will say why it cannot be
        return slurm_options.options(run.settings, self.share, memory, self.wanted)

    def _hear(self, queued: Queued) -> None:
        job, name = queued.job, queued.run.name
        job.done()  # which has the file system and sacct looked at anew
        state = _state(job)
        if job.paths.result_pickle.exists() or state == "COMPLETED":
            queued.ended = True
            try:
                queued.take(job.result())
            except (submitit_errors.FailedJobError, submitit_errors.UncompletedJobError) as error:
                queued.error = f"its job {job.job_id} failed ({_brief(str(error))}): see {job.paths.stderr}"
        elif state in LOST:
            self._losses[name] += 1
            queued.ended = True
            queued.lost = self._losses[name] <= LOSSES
            job.cancel(check=False)  # Slurm may have put it into the queue again
            if queued.lost:
                warnings.warn(f"{name} lost its job {job.job_id} ({state}): it goes on from its folder", stacklevel=2)
            queued.error = f"its job was lost {LOSSES + 1} times, the last time as {state}"
        elif state in REMEDIES:
            queued.ended = True
            queued.error = f"its job {job.job_id} ended as {state}: {REMEDIES[state]} ({job.paths.stderr})"


def queue(parallel: int | None, share: float, wanted: Mapping[str, Any]) -> Slurm:
    """The engine. wanted: options that the sweep's file was checked for. Raises UserError for a share of a GPU."""
    if share not in (0, 1):
        raise UserError(
            f"--gpus-per-run {share:g}: Slurm gives whole GPUs: 0 or 1, or what the cluster has of shares, as "
            "--slurm gres=shard:1"
        )
    logging.getLogger("submitit").setLevel(logging.ERROR)  # its words on this terminal would break the board
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "WARNING")  # those of the jobs
    return Slurm(parallel, share, wanted)


def _earlier(folder: Path) -> submitit.SlurmJob[dict[str, Any]] | None:
    """The last job that was queued from this folder, where it still waits or runs."""
    pickles = sorted(folder.glob("*_submitted.pkl"), key=lambda path: path.stat().st_mtime)
    if not pickles:
        return None
    job = submitit.SlurmJob[dict[str, Any]](folder, pickles[-1].name.removesuffix("_submitted.pkl"))
    return job if not job.done(force_check=True) and _state(job) in WAITING else None


def _state(job: submitit.SlurmJob[dict[str, Any]]) -> str:
    """What sacct last said of the job, without by whom it was cancelled."""
    return (job.state.split() or ["UNKNOWN"])[0]


def _brief(text: str) -> str:
    """The last line of what a command or a library says."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return lines[-1][:300] if lines else "nothing"
