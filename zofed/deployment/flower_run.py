"""Runs zofed's Flower app through `flwr run` on a SuperLink of its own, tells the true outcome, leaves no process."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import tomli_w

from zofed.base.errors import UserError
from zofed.base.parsing import from_json
from zofed.deployment import app_folder, flower_commands, processes
from zofed.deployment.flower_commands import COMPLETED, Setting
from zofed.runs.run_folder import RunFolder

CONNECTION = "zofed"  # the name of our connection in Flower's config.toml
START_LIMIT_S = 60.0  # a SuperLink answers after 2 to 4 seconds; a loaded machine gets more


# ---- what a user calls ---------------------------------------------------------------------------


def quickstart(out: Path, name: str, settings: Mapping[str, Setting]) -> int:
    """Run a job with 4 simulated clients in the folder `name` of `out`; 0 only if it completed and wrote its summary.

    An earlier one at `out` is moved aside; a folder of anything else is left as it is, and refused.
    """
    out = Path(os.path.abspath(out.expanduser()))
    run = out / name
    try:
        if out.is_dir() and not run.exists() and any(out.iterdir()):
            raise UserError(f"{out} holds other files than an earlier quickstart: choose another --out")
        earlier = move_aside(out)
        if earlier is not None:
            print(f"the earlier result now lies in {earlier}", flush=True)
        status = flower_run({**settings, "out": str(run)}, nodes=4, cpus_per_node=1)
        if status != COMPLETED:
            raise UserError(f"the run ended as {status!r}, not {COMPLETED!r}: the cause and the logs stand above")
        check_summary(run)
    except UserError as error:
        print(f"zofed quickstart failed: {error}", file=sys.stderr)
        return 1
    except processes.Stopped as stop:
        told = RunFolder(run).after_interruption()
        print(f"zofed quickstart was stopped, and with it everything it had started; {told}", file=sys.stderr)
        return 128 + stop.number
    return 0


def flower_run(run_config: dict[str, Setting], nodes: int, cpus_per_node: int) -> str:
    """Run zofed's Flower app to its end and return Flower's own verdict, such as `finished:completed`.

    Flower's log is streamed to stdout. `flwr run` exits with 0 even when the app failed, so the SuperLink is asked.
    """
    with processes.stop_on_signals(), flower_commands.flower_home() as home, superlink(home) as environment:
        settings = home / "run-config.toml"
        settings.write_text(tomli_w.dumps(run_config), encoding="utf-8")
        command = [
            str(flower_commands.tool("flwr")), "run", str(app_folder.ready(home)), CONNECTION, "--stream",
            "--run-config", str(settings),
            "--federation-config", federation_config(nodes, cpus_per_node, usable_cpus()),
        ]  # fmt: skip
        run_id, last_line = flower_commands.stream(command, environment, home)
        if run_id is None:
            raise UserError(f"Flower did not accept the run ({last_line}): mend that and start again")
        status = flower_commands.true_outcome(run_id, CONNECTION, environment, home)
        if status != COMPLETED:
            print(f"logs: {flower_commands.keep_logs(home)}", flush=True)
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
    """Size of the simulation; Ray gets no more CPUs than the nodes can use, since it starts one worker for each.

    A cluster at RAY_ADDRESS has CPUs of its own.
    """
    size = f"num-supernodes={nodes} client-resources-num-cpus={cpus_per_node}"
    if os.environ.get("RAY_ADDRESS"):
        return size
    return f"{size} init-args-num-cpus={max(cpus_per_node, min(cpus, nodes * cpus_per_node))}"


def check_summary(out: Path) -> None:
    """Refuse a result whose own summary does not say that it completed."""
    summary = out / "summary.json"
    try:
        status = from_json(summary.read_text(encoding="utf-8")).get("status")
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


# ---- the SuperLink -------------------------------------------------------------------------------


@contextmanager
def superlink(home: Path) -> Iterator[dict[str, str]]:
    """Start a SuperLink on a free loopback port, yield the environment for Flower's commands, stop everything."""
    port = flower_commands.free_port()
    (home / "config.toml").write_text(connection_toml(port), encoding="utf-8")
    environment = flower_commands.flower_environment(home)
    log = home / "superlink.log"
    command = [
        str(flower_commands.tool("flower-superlink")), "--insecure", "--simulation",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    with log.open("wb") as log_file:
        # The working folder is empty: Ray puts it before the app on the path of its actors.
        process = subprocess.Popen(
            command,
            cwd=flower_commands.empty_folder(home),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal reaches us alone, and we stop the rest in order
        )
    with processes.guard(process.pid, home):
        try:
            wait_until_it_answers(process, port, log)
            yield environment
        finally:
            processes.stop_all(process.pid, home, reap=process.poll)


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
