"""Runs a Flower app through `flwr run` on a SuperLink of its own, tells the true outcome, leaves no process behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import tomli_w

from zofed.base import proxies
from zofed.base.errors import UserError
from zofed.base.files import ROOT

CONNECTION = "zofed"  # the name of our connection in Flower's config.toml
START_LIMIT_S = 60.0  # a SuperLink answers after 2 to 4 seconds; a loaded machine gets more
STOP_LIMIT_S = 3.0  # for the polite end, before SIGKILL: Flower's simulation often does not take it
OUTCOME_LIMIT_S = 60.0  # the status may lag behind the end of the log stream
COMPLETED = "finished:completed"

Setting = str | int | float | bool


class Stopped(BaseException):
    """A signal asked the whole launch to end; not an Exception, so that nothing swallows it on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


# ---- what a user calls ---------------------------------------------------------------------------


def quickstart(rounds: int | None, out: Path, settings: Mapping[str, Setting] | None = None) -> int:
    """Run the main job with 4 simulated clients; 0 only if it completed and wrote its summary into `out`."""
    out = Path(os.path.abspath(out.expanduser()))
    run_config: dict[str, Setting] = {**(settings or {}), "out": str(out)}
    if rounds is not None:
        run_config["rounds"] = rounds
    try:
        earlier = move_aside(out)
        if earlier is not None:
            print(f"the earlier result now lies in {earlier}", flush=True)
        status = flower_run(ROOT, run_config, nodes=4, cpus_per_node=1)
        if status != COMPLETED:
            raise UserError(f"the run ended as {status!r}, not {COMPLETED!r}: the cause and the logs stand above")
        check_summary(out)
    except UserError as error:
        print(f"zofed quickstart failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print("zofed quickstart was stopped, and with it everything it had started", file=sys.stderr)
        return 128 + stop.number
    return 0


def flower_run(project: Path, run_config: dict[str, Setting], nodes: int, cpus_per_node: int) -> str:
    """Run the Flower app in `project` to its end and return Flower's own verdict, such as `finished:completed`.

    Flower's log is streamed to stdout. `flwr run` exits with 0 even when the app failed, so the SuperLink is asked.
    """
    if not (project / "pyproject.toml").is_file():
        raise UserError(f"no Flower app in {project}: clone the project and install it there with `make install`")
    with stop_on_signals(), flower_home() as home, superlink(home) as environment:
        settings = home / "run-config.toml"
        settings.write_text(tomli_w.dumps(run_config), encoding="utf-8")
        command = [
            str(tool("flwr")), "run", str(project), CONNECTION, "--stream",
            "--run-config", str(settings),
            "--federation-config", federation_config(nodes, cpus_per_node, usable_cpus()),
        ]  # fmt: skip
        run_id, last_line = stream(command, environment, home)
        if run_id is None:
            raise UserError(f"Flower did not accept the run ({last_line}): mend that and start again")
        status = true_outcome(run_id, CONNECTION, environment, home)
        if status != COMPLETED:
            print(f"logs: {keep_logs(home)}", flush=True)
        return status


# ---- pure parts ----------------------------------------------------------------------------------


def move_aside(out: Path) -> Path | None:
    """Rename an existing `out` to the first free `out-1`, `out-2`, ...; return that place, None without `out`."""
    if not os.path.lexists(out):
        return None
    number = 1
    while os.path.lexists(aside := out.with_name(f"{out.name}-{number}")):
        number += 1
    try:
        out.rename(aside)
    except OSError as error:
        raise UserError(
            f"cannot move {out} aside to {aside} ({error.strerror}): choose another output folder"
        ) from error
    return aside


def connection_toml(port: int) -> str:
    """Flower's config.toml with our SuperLink as the default connection."""
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    return tomli_w.dumps({"superlink": {"default": CONNECTION, CONNECTION: connection}})


def federation_config(nodes: int, cpus_per_node: int, cpus: int) -> str:
    """Size of the simulation; Ray gets no more CPUs than the nodes can use, since it starts one worker for each."""
    ray_cpus = max(cpus_per_node, min(cpus, nodes * cpus_per_node))
    return f"num-supernodes={nodes} client-resources-num-cpus={cpus_per_node} init-args-num-cpus={ray_cpus}"


def run_id_in(line: str) -> str | None:
    """The id that `flwr run` prints once the SuperLink accepted the run."""
    found = re.search(r"Successfully started run (\d+)", line)
    return found.group(1) if found else None


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


def check_summary(out: Path) -> None:
    """Refuse a result whose own summary does not say that it completed."""
    summary = out / "summary.json"
    try:
        status = json.loads(summary.read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"Flower says completed, but {summary} cannot be read ({error}): run it again") from error
    if status != "completed":
        raise UserError(f"Flower says completed, but {summary} says status {status!r}: run it again")


def tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log, on one line."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "there is no log"
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(found[-lines:]) or "the log is empty"


def usable_cpus() -> int:
    """CPUs this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def tool(name: str) -> Path:
    """A command of this environment: beside the interpreter, whatever PATH says."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise UserError(f"{path} is missing: install the project into this environment with `make install`")
    return path


# ---- the SuperLink and its processes -------------------------------------------------------------


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
    kept.mkdir()
    for log in home.glob("*.log"):
        log.rename(kept / log.name)
    return kept


@contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """Start a SuperLink on a free loopback port, yield the environment for Flower's commands, stop everything."""
    port = free_port()
    (home / "config.toml").write_text(connection_toml(port), encoding="utf-8")
    environment = flower_environment(home)
    log = home / "superlink.log"
    command = [str(tool("flower-superlink")), "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as log_file:
        # The working folder is empty: Ray puts it before the app on the path of its actors.
        process = subprocess.Popen(
            command,
            cwd=empty_folder(home),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we stop the rest in order
        )
    with guard(process.pid, home):
        try:
            wait_until_it_answers(process, port, log)
            yield environment
        finally:
            stop_all(process.pid, home, reap=process.poll)


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


def wait_until_it_answers(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return once the SuperLink listens; a dead or silent one becomes an error with the end of its log."""
    limit = time.monotonic() + START_LIMIT_S
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise UserError(f"the SuperLink ended at once with status {process.returncode}: {tail(log)}")
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise UserError(f"the SuperLink did not answer within {START_LIMIT_S:.0f} s: {tail(log)}")


def stream(
    command: list[str],
    environment: dict[str, str],
    home: Path,
    on_line: Callable[[str], object] = lambda line: None,
    on_start: Callable[[str], object] = lambda run_id: None,
) -> tuple[str | None, str]:
    """Run `flwr run --stream`, pass its output through; return the run's id, if it got one, and the last line.

    on_line gets each line, on_start the id as soon as there is one.
    """
    run_id, last_line = None, "no output"
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
                last_line = line.strip(" │╰╯─\n") or last_line
        process.wait()
    finally:
        process.kill()
        process.wait()
    return run_id, last_line


def true_outcome(run_id: str, connection: str, environment: dict[str, str], home: Path) -> str:
    """Ask the SuperLink of that name how the run ended, again until it has ended."""
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


# ---- stopping ------------------------------------------------------------------------------------


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Stopped`, so that every `finally` on the way out does its work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        for again in watched:  # a second Ctrl-C must not cut the clean-up short: that takes seconds and is bounded
            signal.signal(again, signal.SIG_IGN)
        raise Stopped(number)

    watched = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup means it
        watched.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def guard(superlink_pid: int, home: Path) -> Iterator[None]:
    """Keep a small second process that cleans up if this one is killed outright (SIGKILL) and cannot.

    Flower's own watch over the parent process does not do it: a simulation that waits never sees the signal.
    """
    command = [sys.executable, "-m", "zofed.deployment.flower_run", str(superlink_pid), str(home)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        cwd=home,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.communicate(b"done")


def stand_guard(superlink_pid: int, home: Path) -> None:
    """What the guard does: wait until the launcher says `done`, or ends without a word and leaves the work to us."""
    if sys.stdin.read() != "done":
        stop_all(superlink_pid, home)
        shutil.rmtree(home, ignore_errors=True)


def stop_all(superlink_pid: int, home: Path, reap: Callable[[], object] = lambda: None) -> None:
    """End the SuperLink and every process that came from it: first politely, then with SIGKILL."""
    ours = descendants(superlink_pid, home)
    # It ends its superexec; the simulation would then end Ray, but mostly does not notice.
    send(superlink_pid, signal.SIGTERM)
    limit = time.monotonic() + STOP_LIMIT_S
    while ours and time.monotonic() < limit:
        time.sleep(0.1)
        reap()
        ours = {pid for pid in ours | descendants(superlink_pid, home) if alive(pid)}
    for pid in ours:
        send(pid, signal.SIGKILL)
    limit = time.monotonic() + STOP_LIMIT_S
    while any(alive(pid) for pid in ours) and time.monotonic() < limit:
        time.sleep(0.02)  # the kernel takes them down one by one, and they hold files in the folder we remove next
        reap()
    reap()


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(root: int, home: Path) -> set[int]:
    """The process, all that came from it, the groups these lead, and whoever works in our private folder."""
    table = process_table()
    # Orphans hang on process 1, but stay in their group and in their working folder (which only Linux shows).
    found = {root} | {pid for pid, _, _ in table if works_in(pid, home / "cwd")}
    groups = {group for pid, _, group in table if pid in found and pid != root} - {os.getpgrp()}
    grown = True
    while grown:
        more = {pid for pid, parent, group in table if parent in found or group in found | groups} - found
        found |= more
        grown = bool(more)
    return found


def process_table() -> list[tuple[int, int, int]]:
    """Process, parent and group of every process; read from /proc where there is one, since small images lack `ps`."""
    table = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The second field is the name in parentheses and may hold anything; the state comes before the parent.
            _state, parent, group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            table.append((int(stat.parent.name), int(parent), int(group)))
    if table:
        return table
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,pgid="], capture_output=True, text=True, check=False).stdout
    for line in listing.splitlines():
        pid, parent, group = line.split()
        table.append((int(pid), int(parent), int(group)))
    return table


def works_in(pid: int, folder: Path) -> bool:
    """Whether Linux says that the process has this working folder."""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/cwd") == str(folder)
    return False


def alive(pid: int) -> bool:
    """Whether the process still runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


if __name__ == "__main__":
    stand_guard(int(sys.argv[1]), Path(sys.argv[2]))
