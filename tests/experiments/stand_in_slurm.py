"""Slurm's commands as a sweep uses them, on this machine, by the name they are called by.

In STAND_IN_SLURM lie ID.sh, the script of a job; ID.state; ID.step, the process that its srun became.
"""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

PLACE = Path(os.environ.get("STAND_IN_SLURM", "."))


def install(folder: Path) -> Path:
    """Make the commands in a folder, for the head of PATH; returns it."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    if "--partition=nowhere" in text:
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        sys.exit(1)
    job = str(len(list(PLACE.glob("*.sh"))) + 1)
    (PLACE / f"{job}.sh").write_text(text)
    (PLACE / f"{job}.state").write_text("RUNNING")
    null = subprocess.DEVNULL  # not sbatch's own output, whose end submitit waits for
    words = [sys.executable, "-S", __file__, "carry_out", job]
    subprocess.Popen(words, start_new_session=True, stdin=null, stdout=null, stderr=null)
    print(f"Submitted batch job {job}")


def carry_out(job: str) -> None:
    own = os.environ | {"SLURM_JOB_ID": job}
    again = PLACE / f"{job}.again"
    ended = subprocess.run(["bash", PLACE / f"{job}.sh"], env=own).returncode
    while again.exists():
        again.rename(PLACE / f"{job}.requeued")
        ended = subprocess.run(["bash", PLACE / f"{job}.sh"], env=own).returncode
    if (PLACE / f"{job}.state").read_text() == "RUNNING":
        (PLACE / f"{job}.state").write_text("FAILED" if ended else "COMPLETED")


def srun(*words: str) -> None:
    job, own = os.environ["SLURM_JOB_ID"], list(words)
    while own[0].startswith("--"):
        option = own.pop(0)
        if option in ("--output", "--error"):
            path = own.pop(0).replace("%j", job).replace("%t", "0")
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 + (option == "--error"))
    (PLACE / f"{job}.step").write_text(str(os.getpid()))
    os.execvp(own[0], own)


def sacct(*words: str) -> None:
    jobs = [word for before, word in itertools.pairwise(words) if before == "-j"]
    print("JobID|State|NodeList")
    for job in jobs:
        if (PLACE / f"{job}.state").exists():
            print(f"{job}|{(PLACE / f'{job}.state').read_text()}|here")


def scancel(job: str) -> None:
    if (PLACE / f"{job}.state").read_text() == "RUNNING":
        (PLACE / f"{job}.state").write_text("CANCELLED by 1000")
        os.kill(int((PLACE / f"{job}.step").read_text()), signal.SIGTERM)


def scontrol(what: str, job: str) -> None:
    if what != "requeue" or "#SBATCH --requeue" not in (PLACE / f"{job}.sh").read_text():
        sys.exit(f"scontrol: {what} of a job that is not to be: Requested operation is presently disabled")
    (PLACE / f"{job}.again").touch()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
