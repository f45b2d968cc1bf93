"""Flower's own commands: where they are, their environment and folder, the log and the true outcome of `flwr run`."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from zofed.base import proxies, shell
from zofed.base.errors import UserError

OUTCOME_LIMIT_S = 60.0  # the status may lag behind the end of the log stream
COMPLETED = "finished:completed"
BOX = "│"

Setting = str | int | float | bool


# ---- what they need ------------------------------------------------------------------------------


def tool(name: str) -> Path:
    """A command of this environment: beside the interpreter, whatever PATH says. Raises UserError where it is not."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{path} is missing: install zofed into this environment, by pip or by make install in a clone")
    return path


def adjusted(command: Sequence[str]) -> list[str]:
    """A `flower-supernode` or `flower-superlink` with the same arguments, as `federated/flower_internals` runs it."""
    return [sys.executable, "-m", "zofed.federated.flower_internals", Path(command[0]).name, *command[1:]]


def quiet_environment() -> dict[str, str]:
    """This process's environment with Flower's tools first on PATH and all that Flower would download switched off."""
    return {
        **os.environ,
        **proxies.exempt(os.environ),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # Flower's default is a second
        "PYTHONUNBUFFERED": "1",
    }


def flower_environment(home: Path) -> dict[str, str]:
    """The quiet environment of a simulation whose files all lie in `home`."""
    own = {"FLWR_HOME": str(home), "RAY_TMPDIR": str(home), "RAY_USAGE_STATS_ENABLED": "0"}
    return proxies.towards("127.0.0.1", quiet_environment()) | own


@contextmanager
def flower_home() -> Iterator[Path]:
    """A Flower folder of this launch alone, removed at the end; an error tells where the logs went."""
    # Ray puts Unix sockets some 75 characters below this folder, and a socket's path ends at 107 (macOS: 103).
    short = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 12 else "/tmp"
    home = Path(tempfile.mkdtemp(prefix="zofed-", dir=short if os.access(short, os.W_OK) else None))
    try:
        yield home
    except UserError as error:
        raise UserError(f"{error}; logs: {keep_logs(home)}") from error
    finally:
        shutil.rmtree(home, ignore_errors=True)


def keep_logs(home: Path) -> Path:
    """Move the logs out of the folder, which is about to be removed, into one beside it."""
    kept = home.with_name(f"{home.name}-logs")
    kept.mkdir(mode=0o700)
    for log in home.glob("*.log"):
        log.rename(kept / log.name)
    return kept


def empty_folder(home: Path) -> Path:
    """A folder with nothing in it, to be a working folder."""
    folder = home / "cwd"
    folder.mkdir()
    return folder


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port_is_free(host: str, port: int) -> None:
    """Raises UserError where another process listens, or where the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}; choose another port, or end what listens there"
        ) from error


def show(command: list[str]) -> None:
    """Print a command as one would type it, so that everything can be done without zofed's launchers."""
    print("$ " + shell.command(Path(command[0]).name, *command[1:]), flush=True)


# ---- flwr run and flwr list ----------------------------------------------------------------------


def stream(
    command: list[str],
    environment: dict[str, str],
    home: Path,
    on_line: Callable[[str], object] = lambda line: None,
    on_start: Callable[[str], object] = lambda run_id: None,
) -> tuple[str | None, str]:
    """Run `flwr run --stream`, pass its output through; return the run's id, if it got one, and what it said last.

    That is its last line, or the text of the box that Flower draws around an error. on_line gets each line, on_start
    the id as soon as there is one.
    """
    run_id, last = None, "no output"
    process = subprocess.Popen(
        command,
        cwd=home / "cwd",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        with (home / "run.log").open("w", encoding="utf-8") as log:
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
                on_line(line)
                if run_id is None and (run_id := run_id_in(line)):
                    on_start(run_id)
                last = said_last(last, line)
        process.wait()
    finally:
        process.kill()
        process.wait()
    return run_id, last.removeprefix(BOX).strip()


def said_last(before: str, line: str) -> str:
    """What was said last, after a further line: that line, or the lines of a box together, which begin with BOX."""
    text = line.strip()
    if text.startswith("╭"):
        return BOX
    if before.startswith(BOX) and text.startswith("│"):
        return f"{before} {text.strip(' │')}".rstrip()
    return text.strip(" ╰╯─") or before


def run_id_in(line: str) -> str | None:
    """The id that `flwr run` prints once the SuperLink accepted the run."""
    found = re.search(r"Successfully started run (\d+)", line)
    return found.group(1) if found else None


def true_outcome(run_id: str, connection: str, environment: dict[str, str], home: Path) -> str:
    """Ask the SuperLink of that name how the run ended, again until it has ended.

    Raises UserError where the SuperLink no longer knows the run, or it goes on for OUTCOME_LIMIT_S.
    """
    command = [str(tool("flwr")), "list", connection, "--run-id", run_id, "--format", "json"]
    limit, status = time.monotonic() + OUTCOME_LIMIT_S, "unknown"
    while (left := limit - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            answer = subprocess.run(
                command,
                cwd=home / "cwd",
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=left,
                check=False,
            )
            found = parse_status(answer.stdout, run_id)
            if found is None:
                raise UserError(f"the SuperLink no longer answers for run {run_id}: was it killed for lack of memory?")
            if found.startswith("finished"):
                return found
            status = found
        time.sleep(0.2)
    raise UserError(f"run {run_id} was still {status!r} {OUTCOME_LIMIT_S:.0f} s after its log had ended: run it again")


def parse_status(text: str, run_id: str) -> str | None:
    """The status of a run in what `flwr list --format json` printed; None if it says nothing about that run."""
    start = text.find("{")
    try:
        answer = json.loads(text[start:]) if start >= 0 else {}
    except json.JSONDecodeError:
        return None
    for run in answer.get("runs") or []:
        if str(run.get("run-id")) == run_id:
            return str(run.get("status"))
    return None
