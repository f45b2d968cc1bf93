"""Keeps a node alive: a SuperNode, and the process that answers its messages."""

import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from zofed.base.errors import UserError
from zofed.core import sanitize
from zofed.deployment import flower_commands, key_checks, reachability
from zofed.deployment.reachability import Address
from zofed.deployment.supervisor import Child, supervise
from zofed.federated import ledger, policy

WAIT_S = 5.0  # between tries to reach a SuperLink


def node_config(partition: int, partitions: int, dataset: str, mode: str, own_policy: str = "") -> str:
    """Flower's --node-config of a client.

    own_policy: path of its policy's file. Raises UserError for a place that is none, and files that cannot be read.
    """
    if problem := sanitize.misplaced(partition, partitions):
        raise UserError(problem)
    words = [f"partition-id={partition}", f"num-partitions={partitions}"]
    if dataset:
        path = Path(dataset).expanduser().absolute()
        if not os.access(path, os.R_OK):
            why = "cannot be read by this user" if path.exists() else "does not exist"
            raise UserError(f"--dataset {path} {why}: client {partition} needs it; give the file of this node's data")
        words.append(_named("dataset", path))
    if own_policy:
        path = Path(own_policy).expanduser().absolute()
        ledger.check(policy.read(path).ledger)
        words.append(_named(policy.KEY, path))
    return " ".join([*words, f'mode="{mode}"'])


def _named(key: str, path: Path) -> str:
    if '"' in str(path) or "\\" in str(path):
        raise UserError(f"--{key} {path}: Flower takes no path with quotes or backslashes; rename it")
    return f'{key}="{path}"'


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
    return [str(flower_commands.tool("zofed")), "worker", "--runtime-api", f"127.0.0.1:{port}", *chosen, *guard]


def run_supernode(
    address: Address, root_certificates: Path | None, key: Path | None, config: str, port: int, device: str
) -> int:
    """Keep a SuperNode and its worker alive until a signal ends them."""
    node = None
    if key is not None and root_certificates is not None:
        key_checks.check_node(key, root_certificates)
        from zofed.federated.flower_internals import Node

        node = Node(str(address), root_certificates, key)
    port = port or flower_commands.free_port()
    flower_commands.check_port_is_free("127.0.0.1", port)

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
        flower_commands.show(command)
        flower_commands.show(worker := worker_command(port, device, secret))
        adjusted, environment = flower_commands.adjusted(command), flower_commands.quiet_environment()
        # A worker that dies has lost its message: the SuperNode goes with it, which tells the SuperLink at once.
        return supervise(
            [
                Child("supernode", adjusted, environment, before_restart=lambda: tell(leave())),
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
