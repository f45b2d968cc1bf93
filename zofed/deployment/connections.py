"""SuperLinks by their names in the user's Flower configuration: saved there, and given a run to carry out."""

import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from zofed.base import proxies, shell
from zofed.base.errors import UserError
from zofed.base.files import write_whole
from zofed.base.parsing import from_toml
from zofed.deployment import app_folder, flower_commands, processes
from zofed.deployment.flower_commands import Setting

LISTENS_S = 10.0  # for the answer to a connection


def user_flower_home() -> Path:
    """Where Flower keeps its configuration."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr").expanduser()


def read(path: Path) -> dict[str, Any]:
    """SuperLinks by name in a config.toml of Flower's. Raises UserError for one that cannot be read."""
    if not path.exists():
        return {}
    try:
        found = from_toml(path.read_text(encoding="utf-8-sig"))
        links = found.get("superlink", {}).items()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; mend it by hand") from error
    return {name: entry for name, entry in links if isinstance(entry, dict)}


def save(name: str, entry: Mapping[str, Any]) -> None:
    """Put the SuperLink into the user's Flower configuration as `name`, beside what is there.

    Raises UserError where that name leads elsewhere.
    """
    path = user_flower_home() / "config.toml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = read(path).get(name)
    if found == entry:
        return
    block = tomli_w.dumps({"superlink": {name: dict(entry)}})
    if found is not None:
        raise UserError(
            f"--name {name}: {path} has that connection already, to {found.get('address')}; choose another --name, or "
            f"replace it there by: {' '.join(block.split())}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{text.rstrip()}\n\n{block}".lstrip())
    print(f"saved as {name!r} in {path}: submit runs with {shell.command('zofed', 'run', name)}", flush=True)


def check_listens(name: str, entry: Mapping[str, Any]) -> None:
    """Raise UserError, with the command that starts a SuperLink, where nothing takes connections at its address."""
    address = str(entry.get("address", ""))
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit():  # Flower's own SuperLink on this machine, or an address that Flower will refuse
        return
    try:
        socket.create_connection((host, int(port)), timeout=LISTENS_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        is_here = host in ("127.0.0.1", "localhost", "::1")
        words = ["zofed", "superlink", "--name", name, "--port", port]
        words += ["--insecure"] if entry.get("insecure") else []
        if not entry.get("insecure") and is_here and (root := entry.get("root-certificates")):
            words += ["--keys", str(Path(root).parent)]
        where = "start it with" if is_here else "is it up, and its port open? On that machine it starts with"
        raise UserError(
            f"nothing answers at {address}, where {user_flower_home() / 'config.toml'} has {name} ({why}): {where} "
            f"{shell.command(*words)}"
        ) from error


def run_on(name: str, run_config: Mapping[str, Setting]) -> tuple[str, str]:
    """Submit a run to the SuperLink `name` of Flower's configuration, stream its log and wait for its end.

    Returns Flower's verdict, such as finished:completed, and the run's folder on the SuperLink's machine, if it told.
    Raises UserError where the configuration has no such name, nothing answers there, or the run is not accepted.
    """
    path = user_flower_home() / "config.toml"
    known = read(path)
    if name not in known:
        raise UserError(
            f"{path} knows no SuperLink {name!r}, only {', '.join(sorted(known)) or 'none'}: start one here with "
            f"{shell.command('zofed', 'superlink', '--name', name)}, or add [superlink.{name}] with address and "
            "root-certificates"
        )
    address = str(known[name].get("address", ""))
    host = "127.0.0.1" if address == ":local:" else re.sub(r":\d*$", "", address).strip("[]")
    scheme = "http" if known[name].get("insecure") else "https"
    environment = flower_commands.quiet_environment()
    environment |= proxies.towards(host, environment)
    through = proxies.in_the_way(scheme, host, environment)
    if not through:
        check_listens(name, known[name])
    folder: list[str] = []

    def note(line: str) -> None:
        if found := re.search(r"run folder: (.+)$", line.rstrip()):
            folder[:] = [found.group(1)]

    with processes.stop_on_signals(), flower_commands.flower_home() as scratch:
        flower_commands.empty_folder(scratch)
        settings = scratch / "run-config.toml"
        settings.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
        command = [
            str(flower_commands.tool("flwr")), "run", str(app_folder.ready(scratch)), name, "--stream",
            "--run-config", str(settings),
        ]  # fmt: skip
        flower_commands.show(command)
        submitted: list[str] = []
        try:
            run_id, last_line = flower_commands.stream(command, environment, scratch, note, submitted.append)
        except processes.Stopped:
            if submitted:
                follow, end = (shell.command("flwr", verb, submitted[0], name) for verb in ("log", "stop"))
                told = f"the run goes on: follow it with {follow}, end it with {end}"
            else:
                listed = shell.command("flwr", "list", name)
                told = f"the SuperLink had not confirmed the run: if {listed} does not show it, start it again"
            print(f"zofed: interrupted; {told}", file=sys.stderr)
            raise
        if run_id is None:
            remedy = through or "mend that and try again"
            raise UserError(f"the SuperLink {name!r} did not accept the run ({last_line}): {remedy}")
        return flower_commands.true_outcome(run_id, name, environment, scratch), "".join(folder)
