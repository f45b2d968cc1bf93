"""Separate machines: the Flower commands behind `zofed superlink`, `supernode` and `run`, and what goes around them."""

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from zofed.base import proxies, shell
from zofed.base.errors import UserError
from zofed.base.files import ROOT, write_whole
from zofed.core import sanitize
from zofed.deployment import flower_run, keys, reachability
from zofed.deployment.reachability import Address
from zofed.deployment.supervisor import Child, supervise
from zofed.federated import places

CONTROL = "superlink"  # the name of a SuperLink's connection to itself, in its own Flower folder
WAIT_S = 5.0  # between tries to reach a SuperLink
ENROLMENT_S = 2.0  # between looks at the folder of public keys


def shown(command: list[str]) -> None:
    """Print a command as one would type it, so that everything can be done without zofed's launchers."""
    print("$ " + shell.command(Path(command[0]).name, *command[1:]), flush=True)


# ---- the SuperLink -------------------------------------------------------------------------------


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
        str(flower_run.tool("flower-superlink")), "--host", host, "--port", str(port), *security,
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
        keys.check_server(keys_folder)
        keys.enrolled(keys_folder)
    check_port_is_free(host, port)
    state.mkdir(parents=True, exist_ok=True)
    home = state / "flower"
    home.mkdir(exist_ok=True)
    entry = connection(keys_folder, host, port)
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": CONTROL, CONTROL: entry}}))
    save_connection(name, entry)
    command = superlink_command(keys_folder, host, port, state)
    environment = flower_run.quiet_environment() | {"FLWR_HOME": str(home)}
    if keys_folder is None:
        environment[places.WITHOUT_KEYS] = "1"  # for the ServerApps that run below it
    shown(command)
    enrolment = Enrolment(keys_folder, state, environment) if keys_folder is not None else None
    child = Child("superlink", command, environment)
    return supervise([child], enrolment.look if enrolment else lambda: None)


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


def save_connection(name: str, entry: Mapping[str, Any]) -> None:
    """Put the SuperLink into the user's Flower configuration as `name`, beside what is there.

    Raises UserError where that name leads elsewhere.
    """
    path = user_flower_home() / "config.toml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = connections(path).get(name)
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


def user_flower_home() -> Path:
    """Where Flower keeps its configuration."""
    return Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr").expanduser()


def connections(path: Path) -> dict[str, Any]:
    """SuperLinks by name in a config.toml of Flower's. Raises UserError for one that cannot be read."""
    if not path.exists():
        return {}
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; mend it by hand") from error
    return {name: entry for name, entry in found.get("superlink", {}).items() if isinstance(entry, dict)}


class Enrolment:
    """Has a SuperLink admit exactly the nodes whose public keys lie in a folder, while it runs.

    A key that comes is registered, one that goes unregistered. Which node a key became is kept beside the SuperLink's
    database, since Flower does not tell.
    """

    def __init__(self, keys_folder: Path, state: Path, environment: Mapping[str, str]) -> None:
        self._keys, self._file, self._environment = keys_folder, state / "enrolled.json", environment
        self._next, self._last, self._told = 0.0, None, ""
        self.nodes: dict[str, str] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def look(self) -> None:
        """Bring the SuperLink in line with the folder; does nothing but for every few seconds."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + ENROLMENT_S
        try:
            wanted = {key: name for name, key in keys.enrolled(self._keys).items()}
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
        write_whole(self._file, json.dumps(self.nodes, indent=2))

    def _flwr(self, action: str, what: str, *more: str) -> dict[str, Any]:
        command = [str(flower_run.tool("flwr")), "supernode", action, what, CONTROL, *more, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=dict(self._environment), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=30, check=False,
            )  # fmt: skip
            return json.loads(done.stdout[done.stdout.find("{") :])
        except (subprocess.TimeoutExpired, ValueError):
            return {}


# ---- a node --------------------------------------------------------------------------------------


def node_config(partition: int, partitions: int, dataset: str, mode: str) -> str:
    """Flower's --node-config of a client. Raises UserError for a place that is none, or data that cannot be read."""
    if problem := sanitize.misplaced(partition, partitions):
        raise UserError(problem)
    words = [f"partition-id={partition}", f"num-partitions={partitions}"]
    if dataset:
        path = Path(dataset).expanduser().absolute()
        if not os.access(path, os.R_OK):
            why = "cannot be read by this user" if path.exists() else "does not exist"
            raise UserError(f"--dataset {path} {why}: client {partition} needs it; give the file of this node's data")
        if '"' in str(path) or "\\" in str(path):
            raise UserError(f"--dataset {path}: Flower takes no path with quotes or backslashes; rename it")
        words.append(f'dataset="{path}"')
    return " ".join([*words, f'mode="{mode}"'])


def supernode_command(
    address: Address, root_certificates: Path | None, key: Path | None, config: str, port: int, secret: Path | None
) -> list[str]:
    """Flower's command for a SuperNode whose messages a process of its own answers, over a port of this machine."""
    security = ["--insecure"] if root_certificates is None else ["--root-certificates", str(root_certificates)]
    security += ["--auth-supernode-private-key", str(key)] if key else []
    guard = ["--superexec-auth-secret-file", str(secret)] if secret else []
    return [
        "flower-supernode", "--superlink", str(address), *security, "--node-config", config,
        "--isolation", "process", "--port", str(port), *guard,
    ]  # fmt: skip


def worker_command(port: int, device: str, secret: Path | None) -> list[str]:
    """The command of the process that answers a SuperNode's messages."""
    chosen = ["--device", device] if device else []
    guard = ["--secret-file", str(secret)] if secret else []
    return [str(flower_run.tool("zofed")), "worker", "--runtime-api", f"127.0.0.1:{port}", *chosen, *guard]


def run_supernode(
    address: Address, root_certificates: Path | None, key: Path | None, config: str, port: int, device: str
) -> int:
    """Keep a SuperNode and its worker alive until a signal ends them."""
    node = None
    if key is not None and root_certificates is not None:
        keys.check_node(key, root_certificates)
        from zofed.federated.flower_internals import Node

        node = Node(str(address), root_certificates, key)
    port = port or flower_run.free_port()
    check_port_is_free("127.0.0.1", port)

    def leave() -> str:
        try:
            if node is not None:
                node.leave()
        except httpx.HTTPError as error:
            return reachability.refusal(error, f"{key.stem}.pub" if key else "")
        return ""

    with tempfile.TemporaryDirectory(prefix="zofed-") as folder:  # only this user may look into it
        secret = Path(folder) / "secret"
        secret.write_bytes(secrets.token_bytes(32))
        wait_for(lambda: reachability.problem(address, root_certificates) or leave())
        command = supernode_command(address, root_certificates, key, config, port, secret)
        shown(command)
        shown(worker := worker_command(port, device, secret))
        module = [sys.executable, "-m", "zofed.federated.flower_internals"]  # the same command, which looks more often
        environment = flower_run.quiet_environment()
        # A worker that dies has lost its message: the SuperNode goes with it, which tells the SuperLink at once.
        return supervise(
            [
                Child("supernode", [*module, *command[1:]], environment, before_restart=lambda: tell(leave())),
                Child("worker", worker, environment, takes_along=["supernode"]),
            ]
        )


def tell(problem: str) -> None:
    if problem:
        print(problem, file=sys.stderr, flush=True)


def wait_for(problem: Callable[[], str]) -> None:
    """Return once there is no problem any more; say what is waited for, once."""
    said = ""
    while found := problem():
        if found != said:
            tell(said := found)
        time.sleep(WAIT_S)


# ---- a run ---------------------------------------------------------------------------------------


def run_on(name: str, run_config: Mapping[str, flower_run.Setting]) -> tuple[str, str]:
    """Submit a run to the SuperLink `name` of Flower's configuration, stream its log and wait for its end.

    Returns Flower's verdict, such as finished:completed, and the run's folder on the SuperLink's machine, if it told.
    """
    path = user_flower_home() / "config.toml"
    known = connections(path)
    if name not in known:
        raise UserError(
            f"{path} knows no SuperLink {name!r}, only {', '.join(sorted(known)) or 'none'}: start one here with "
            f"{shell.command('zofed', 'superlink', '--name', name)}, or add [superlink.{name}] with address and "
            "root-certificates"
        )
    address = str(known[name].get("address", ""))
    host = "127.0.0.1" if address == ":local:" else re.sub(r":\d*$", "", address).strip("[]")
    scheme = "http" if known[name].get("insecure") else "https"
    environment = flower_run.quiet_environment()
    environment |= proxies.towards(host, environment)
    folder: list[str] = []

    def note(line: str) -> None:
        if found := re.search(r"run folder: (.+)$", line.rstrip()):
            folder[:] = [found.group(1)]

    with flower_run.stop_on_signals(), flower_run.flower_home() as scratch:
        flower_run.empty_folder(scratch)
        settings = scratch / "run-config.toml"
        settings.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
        command = [str(flower_run.tool("flwr")), "run", str(ROOT), name, "--stream", "--run-config", str(settings)]
        shown(command)
        submitted: list[str] = []
        try:
            run_id, last_line = flower_run.stream(command, environment, scratch, note, submitted.append)
        except flower_run.Stopped:
            if submitted:
                follow, end = (shell.command("flwr", verb, submitted[0], name) for verb in ("log", "stop"))
                print(f"the run goes on: follow it with {follow}, end it with {end}", file=sys.stderr)
            raise
        if run_id is None:
            through = proxies.in_the_way(scheme, host, environment)
            remedy = through or "mend that and try again"
            raise UserError(f"the SuperLink {name!r} did not accept the run ({last_line}): {remedy}")
        return flower_run.true_outcome(run_id, name, environment, scratch), "".join(folder)
