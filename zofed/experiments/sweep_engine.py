"""What carries the runs of a sweep out, behind one interface: processes of this machine, a Ray cluster, or Slurm."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from zofed.config import Settings
from zofed.experiments.sweep import Run

Name = Literal["fork", "ray", "slurm"]


@dataclass
class Job:
    """A run under way. began: monotonic seconds. first_step: seconds from there to the end of its first step.

    slot: which of the parallel runs it is. ended: it has said its last word, an `error` where it failed. lost: it ended
    with the machine it ran on, and is to go on from its folder on another.
    """

    run: Run
    slot: int
    began: float = field(default_factory=time.monotonic, kw_only=True)
    first_step: float | None = field(default=None, kw_only=True)
    steps: int | None = field(default=None, kw_only=True)  # of the run, once it knows
    error: str | None = field(default=None, kw_only=True)
    ended: bool = field(default=False, kw_only=True)
    lost: bool = field(default=False, kw_only=True)

    def take(self, told: Mapping[str, Any]) -> None:
        """Take in what the run says: some of first_step, steps and error."""
        self.first_step = told.get("first_step", self.first_step)
        self.steps = told.get("steps", self.steps)
        self.error = told.get("error", self.error)


class Engine(Protocol):
    """Starts runs, hears what they say, stops them."""

    def places(self, runs: Sequence[Run]) -> int:
        """How many of such runs it carries out at a time, now. Raises UserError where that is none and stays so."""
        ...

    def requests(self, runs: Sequence[Run]) -> list[str]:
        """What it will ask the machines for such runs, in lines for a person; nothing is asked yet."""
        ...

    def prepare(self, folder: Path, runs: Sequence[Run]) -> None:
        """Make ready for such runs, of the sweep in the folder. Raises UserError where they cannot be carried out."""
        ...

    def start(self, run: Run, out: Path, log: Path, slot: int) -> Job:
        """Begin a run in folder `out`, or go on with it; what it prints is added to the file `log`."""
        ...

    def hear(self, seconds: float) -> None:
        """Wait so long at most until a run has something to say, and have its job take it in."""
        ...

    def stop(self) -> None:
        """Have all runs under way end as by Ctrl-C, or at once where that takes too long."""
        ...


def asks(settings: Settings, share: float) -> tuple[int, float]:
    """CPUs and GPUs that a run on a cluster is given: its threads, and the devices it names, else the share of one."""
    named = [name for name in settings.devices.split(",") if "cuda" in name]
    return settings.threads, float(len(named) or share)


@contextmanager
def opened(name: Name, parallel: int | None, share: float, slurm: Mapping[str, Any]) -> Iterator[Engine]:
    """An engine by name. parallel: runs at a time, None: as many as the engine finds right; share: of a GPU, for each.

    slurm: options of sbatch, as `Sweep.slurm` has them. Raises UserError for a share that is none or that no GPU can
    give, and where there is no Ray cluster.
    """
    if name == "ray":
        from zofed.experiments import sweep_ray

        with sweep_ray.connected(parallel, share) as engine:
            yield engine
    elif name == "slurm":
        from zofed.experiments import sweep_slurm

        yield sweep_slurm.queue(parallel, share, slurm)
    else:
        from zofed.experiments import sweep_process

        yield sweep_process.Forks(sweep_process.at_a_time(parallel, share))
