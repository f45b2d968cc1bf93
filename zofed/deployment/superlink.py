"""Keeps a SuperLink alive, and has it admit exactly the nodes whose public keys lie in a folder."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from zofed.base.errors import UserError
from zofed.base.files import private_folder, write_private
from zofed.base.parsing import from_json
from zofed.deployment import connections, flower_commands, key_checks, key_files
from zofed.deployment.supervisor import Child, supervise
from zofed.federated import places

CONTROL = "superlink"  # the name of a SuperLink's connection to itself, in its own Flower folder
ENROLMENT_S = 2.0  # between looks at the folder of public keys


def superlink_command(keys_folder: Path | None, host: str, port: int, state: Path) -> list[str]:
    """Flower's command for a SuperLink; without a folder of keys it speaks plain HTTP and admits every node."""
    if keys_folder is None:
        security = ["--insecure"]
    else:
        security = [
            "--ssl-ca-certfile", str(keys_folder / "ca.crt"), "--ssl-certfile", str(keys_folder / "server.crt"),
            "--ssl-keyfile", str(keys_folder / "server.key"), "--enable-supernode-auth",
        ]  # fmt: skip
    return [
        str(flower_commands.tool("flower-superlink")), "--host", host, "--port", str(port), *security,
        "--database", str(state / "state.db"), "--disable-runtime-dependency-installation",
    ]  # fmt: skip


def connection(keys_folder: Path | None, host: str, port: int) -> dict[str, Any]:
    """The entry of Flower's config.toml that reaches the SuperLink from its own machine."""
    here = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)
    if keys_folder is None:
        return {"address": f"{here}:{port}", "insecure": True}
    return {"address": f"{here}:{port}", "root-certificates": str(keys_folder / "ca.crt")}


def run_superlink(keys_folder: Path | None, host: str, port: int, state: Path, name: str) -> int:
    """Keep a SuperLink alive until a signal ends it, and admit the nodes whose keys lie in `enrolled`."""
    if keys_folder is not None:
        key_checks.check_server(keys_folder)
        key_files.enrolled(keys_folder)
    flower_commands.check_port_is_free(host, port)
    private_folder(state)
    home = private_folder(state / "flower")
    entry = connection(keys_folder, host, port)
    write_private(home / "config.toml", tomli_w.dumps({"superlink": {"default": CONTROL, CONTROL: entry}}))
    connections.save(name, entry)
    command = superlink_command(keys_folder, host, port, state)
    environment = flower_commands.quiet_environment() | {"FLWR_HOME": str(home)}
    if keys_folder is None:
        environment[places.WITHOUT_KEYS] = "1"  # for the ServerApps that run below it
    flower_commands.show(command)
    enrolment = Enrolment(keys_folder, state, environment) if keys_folder is not None else None
    adjusted = flower_commands.adjusted(command)
    child = Child("superlink", adjusted, environment, umask=0o077)  # its database, and what Flower keeps beside it
    return supervise([child], enrolment.look if enrolment else lambda: None)


class Enrolment:
    """Has a SuperLink admit exactly the nodes whose public keys lie in a folder, while it runs.

    A key that comes is registered, one that goes unregistered. Which node a key became is kept beside the SuperLink's
    database, since Flower does not tell.
    """

    def __init__(self, keys_folder: Path, state: Path, environment: Mapping[str, str]) -> None:
        self._keys, self._file, self._environment = keys_folder, state / "enrolled.json", environment
        self._next, self._last, self._told = 0.0, None, ""
        self.nodes: dict[str, str] = self._written()

    def _written(self) -> dict[str, str]:
        """Nodes by key, as they stood; none where the file is not there or spoilt: `_bring_in_line` tells of each."""
        try:
            found = from_json(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        is_whole = isinstance(found, dict) and all(isinstance(node, str) for node in found.values())
        return found if is_whole else {}

    def look(self) -> None:
        """Bring the SuperLink in line with the folder; does nothing but for every few seconds."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + ENROLMENT_S
        try:
            wanted = {key: name for name, key in key_files.enrolled(self._keys).items()}
            if wanted != self._last and self._bring_in_line(wanted):
                self._last = wanted
        except (UserError, OSError) as error:
            if str(error) != self._told:
                self._told = str(error)
                print(f"enrolment: {error}", file=sys.stderr, flush=True)

    def _bring_in_line(self, wanted: Mapping[str, str]) -> bool:
        """Whether all was done; the SuperLink may not answer yet."""
        for key, name in wanted.items():
            if key in self.nodes:
                continue
            answer = self._flwr("register", str(self._keys / "enrolled" / f"{name}.pub"), "--name", name)
            problem = str(answer.get("error-message", ""))
            if "already in use" in problem:  # by hand, or by a SuperLink whose enrolled.json is lost
                self.nodes[key] = ""
                print(f"enrolment: {name} was registered before, not by us: unregister it with flwr", flush=True)
            elif not answer.get("success"):
                return False
            else:
                self.nodes[key] = str(answer["node-id"])
                print(f"enrolment: {name} may connect (node {self.nodes[key]})", flush=True)
            self._save()
        for key in set(self.nodes) - set(wanted):
            if self.nodes[key] and not self._flwr("unregister", self.nodes[key]).get("success"):
                return False
            print(f"enrolment: node {self.nodes.pop(key)} may no longer connect", flush=True)
            self._save()
        return True

    def _save(self) -> None:
        write_private(self._file, json.dumps(self.nodes, indent=2))

    def _flwr(self, action: str, what: str, *more: str) -> dict[str, Any]:
        command = [str(flower_commands.tool("flwr")), "supernode", action, what, CONTROL, *more, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=dict(self._environment), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=30, check=False,
            )  # fmt: skip
            return from_json(done.stdout[done.stdout.find("{") :])
        except (subprocess.TimeoutExpired, ValueError):
            return {}
