"""What Slurm is asked for a run's job: options of sbatch, those the run needs and those a sweep's [slurm] says.

[slurm]
partition = "gpu"                # any option of sbatch by its long name, as it stands after the two dashes
time = "4:00:00"                 # of one go: a run that is not over then is queued again, and goes on
setup = ["module load cuda"]     # lines of shell before the run
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.experiments.sweep_engine import asks

TIME = 60  # minutes of a job, where nothing else is asked for
GIB = 2**30
LIBRARIES = {False: 1, True: 4}  # GiB of a process that has loaded torch, without and with CUDA
SLACK = 1.5  # of memory, over the forecast
OWN = ("job-name", "output", "error", "open-mode", "array", "signal", "requeue", "no-requeue", "ntasks", "nodes")
MEMORY = ("mem", "mem-per-cpu", "mem-per-gpu")
GPUS = ("gpus", "gpus-per-node", "gpus-per-task", "gres")
FORM = "as partition = 'gpu'"


def check(wanted: Mapping[str, Any]) -> None:
    """Raise UserError for what is no option of sbatch with its value, or one that zofed sets itself."""
    for key, value in wanted.items():
        if key == "setup":
            if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
                raise UserError(f"[slurm]: setup = {value!r}: give a list of lines of shell, as ['module load cuda']")
        elif not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", key):
            raise UserError(f"[slurm]: {key!r} is no option of sbatch: write its long name without dashes, {FORM}")
        elif key in OWN:
            raise UserError(
                f"[slurm]: {key} is not for a sweep to say: zofed decides it, as a run is one job of one task"
            )
        elif value is not True and (isinstance(value, bool) or not isinstance(value, int | str) or value == ""):
            raise UserError(f"[slurm]: {key} = {value!r}: give a text or a whole number, {FORM}, or true for a flag")
    if "time" in wanted:
        minutes(wanted["time"])


def typed(pairs: Sequence[str]) -> dict[str, Any]:
    """Options typed as KEY=VALUE, or as KEY for a flag. Raises UserError for what is no such pair."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, mark, value = pair.lstrip("-").partition("=")
        if key == "setup":
            raise UserError(f"--slurm {pair}: lines of shell stand in the file: [slurm] setup = ['module load cuda']")
        found[key] = value if mark else True
        try:
            check({key: found[key]})
        except UserError as error:
            raise UserError(f"--slurm {pair}: {str(error).removeprefix('[slurm]: ')}") from None
    return found


def minutes(time: Any) -> int:
    """Whole minutes of a time as Slurm writes them: 90, 90:00, 1:30:00, 2-12, 2-12:00, 2-12:00:00; rounded up."""
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if form is None or isinstance(time, bool):
        raise UserError(f"[slurm]: time = {time!r}: give minutes, or HOURS:MINUTES:SECONDS, as 4:00:00")
    parts = [int(part) for part in form.groups()[1:] if part is not None]
    if form[1] is not None:
        hours, mins, seconds = [*parts, 0, 0][:3]
    else:
        hours, mins, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    found = math.ceil(int(form[1] or 0) * 1440 + hours * 60 + mins + seconds / 60)
    if not found:
        raise UserError(f"[slurm]: time = {time!r} is none: give minutes, or HOURS:MINUTES:SECONDS, as 4:00:00")
    return found


def options(settings: Settings, share: float, memory: int, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Options of sbatch for a run with these settings, by their long names.

    share: GPUs for a run that names no devices, 0 or 1. memory: bytes that the run takes of its own. wanted: what the
    sweep says, which goes before what the run would ask for.
    """
    cpus, gpus = asks(settings, share)
    has_gpu = gpus > 0 or any(key in wanted for key in GPUS)
    gigabytes = math.ceil(LIBRARIES[has_gpu] + SLACK * memory / GIB)
    found: dict[str, Any] = {"cpus-per-task": cpus, "requeue": True}  # without, Slurm's default may forbid to go on
    if gpus and not any(key in wanted for key in GPUS):
        found["gpus-per-node"] = int(gpus)
    if not any(key in wanted for key in MEMORY):
        found["mem"] = f"{gigabytes}G"
    found |= {key: value for key, value in wanted.items() if key != "setup"}
    return found | {"time": minutes(wanted.get("time", TIME))}


def shown(found: Mapping[str, Any]) -> str:
    """The options as one types them."""
    return shlex.join(f"--{key}" if value is True else f"--{key}={value}" for key, value in sorted(found.items()))
