"""Commands for separate machines: `zofed superlink`, `supernode`, `worker` and `run`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from zofed import config
from zofed.base import proxies, shell
from zofed.base.errors import UserError
from zofed.commands.console import console, tell_end
from zofed.commands.options import FederatedCommand, resumed, with_settings
from zofed.runs.run_folder import DEPLOYED, RunFolder

Keys = Annotated[Path, typer.Option(help="folder that zofed keys init made")]
Insecure = Annotated[bool, typer.Option("--insecure", help="no TLS, no keys: for trials on one machine")]
WARNING = (
    "warning: --insecure: whoever reaches the port reads and changes everything and can join or run code; use it on "
    "one machine only"
)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("superlink")(superlink)
    app.command("supernode")(supernode)
    app.command("policy")(show_policy)
    app.command("worker")(worker)
    app.command("run", cls=FederatedCommand)(with_settings(run))


def superlink(
    keys: Keys = Path("keys"),
    host: Annotated[str, typer.Option(help="address to listen on; 127.0.0.1: behind a proxy")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    state: Annotated[Path, typer.Option(help="folder of its database")] = Path("superlink"),
    name: Annotated[str, typer.Option(help="name of the connection saved in Flower's config.toml")] = "zofed",
    insecure: Insecure = False,
) -> None:
    """Run the server that nodes and runs meet at, with TLS and node keys, until Ctrl-C."""
    from zofed.deployment import superlink

    if insecure:
        print(WARNING, file=sys.stderr)
    elif host not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"warning: --host {host}: whoever reaches port {port} can submit runs to all nodes; keep it inside a VPN "
            "or behind the proxy of docs/deployment.md",
            file=sys.stderr,
        )
    os.environ.update(proxies.towards(host, os.environ, is_here=True))
    folder = None if insecure else config.absolute(keys, "keys")
    status = superlink.run_superlink(folder, host, port, config.absolute(state, "state"), name)
    raise typer.Exit(status)


def supernode(
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the SuperLink")],
    partition_id: Annotated[int, typer.Option(help="which of the clients this is, from 0")],
    num_partitions: Annotated[int, typer.Option(help="how many clients there are")],
    ca: Annotated[Path | None, typer.Option(help="the server's ca.crt")] = None,
    key: Annotated[Path | None, typer.Option(help="this node's private key")] = None,
    dataset: Annotated[str, typer.Option(help="this node's own data; empty: its share of the run's")] = "",
    mode: Annotated[str, typer.Option(help="fo: can backpropagate; zo: forward passes only")] = "fo",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; empty: as the run says")] = "",
    policy: Annotated[
        str, typer.Option(help="file of what runs may have this node do (zofed policy); empty: the default")
    ] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="of its own API on this machine; 0: a free one")] = 0,
    insecure: Insecure = False,
) -> None:
    """Run one client, until Ctrl-C: a SuperNode and the process that computes; both are started anew if they die."""
    from zofed.deployment import supernode
    from zofed.deployment.reachability import Address

    if mode not in ("fo", "zo"):
        raise UserError(f"--mode {mode}: use fo or zo")
    if insecure:
        print(WARNING, file=sys.stderr)
        ca = key = None
    elif ca is None or key is None:
        raise UserError("give --ca and --key, as zofed keys made them (or --insecure for a trial on one machine)")
    check_device(device)
    node_config = supernode.node_config(partition_id, num_partitions, dataset, mode, policy)
    root_certificates = config.absolute(ca, "ca") if ca else None
    own_key = config.absolute(key, "key") if key else None
    address = Address.of(superlink)
    os.environ.update(proxies.towards(address.host, os.environ))
    try:
        status = supernode.run_supernode(address, root_certificates, own_key, node_config, port, device)
    except KeyboardInterrupt:
        status = 130
    raise typer.Exit(status)


def show_policy(
    file: Annotated[Path | None, typer.Argument(help="TOML file; what it does not say is as in the default")] = None,
) -> None:
    """What runs may have a node do, by a policy's file or by default: a file to start from, for supernode --policy."""
    from zofed.federated import policy

    found = policy.read(config.absolute(file, "policy")) if file else policy.DEFAULT
    print(policy.to_toml(found), end="")


def worker(
    runtime_api: Annotated[str, typer.Option(help="HOST:PORT of the SuperNode's own API")] = "127.0.0.1:9094",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; empty: as the run says")] = "",
    secret_file: Annotated[Path | None, typer.Option(help="what flower-supernode has as superexec secret")] = None,
) -> None:
    """Answer a SuperNode's messages in one process that keeps the model; for flower-supernode --isolation process."""
    check_device(device)
    from zofed.deployment import warm_worker
    from zofed.deployment.reachability import Address
    from zofed.federated.flower_internals import Runtime

    try:
        secret = secret_file.read_bytes() if secret_file else None
    except OSError as error:
        raise UserError(f"--secret-file {secret_file}: {error.strerror}") from error
    address = Address.of(runtime_api)
    os.environ.update(proxies.towards(address.host, os.environ))
    console.print(f"worker of {address} is ready")
    warm_worker.serve(Runtime(str(address), secret), device)


def check_device(device: str) -> None:
    """Raises UserError for a device that this machine does not have."""
    from zofed.training import process

    if device:
        process.device(config.resolve({"device": device}))


def run(
    name: Annotated[str, typer.Argument(help="the SuperLink, by its name in Flower's config.toml")],
    file: Annotated[Path | None, typer.Argument(help="TOML file of settings; options override it")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="continue the run in this folder, which lies on this machine")
    ] = None,
    fetch: Annotated[
        str, typer.Option(help="USER@HOST of the SuperLink's machine: copy the run's folder from there at the end")
    ] = "",
    *,
    options: dict[str, str],
) -> None:
    """Run a federation on the nodes of a SuperLink; exits with 0 only if it completed.

    The run's folder lies on the SuperLink's machine: --out names it, else it is made in ~/zofed-runs there.
    """
    from zofed.deployment import connections, flower_commands, processes
    from zofed.training.paths import NAMES, absolute_path

    if folder := resumed(resume, file, options, DEPLOYED):
        settings = folder.settings().model_copy(update={"out": str(folder.path)})
    else:
        settings = config.asked_for(file, options, config.FEDERATED)
        if settings.out:
            settings = settings.model_copy(update={"out": str(config.absolute(settings.out, "out"))})
        settings = settings.model_copy(update={key: absolute_path(key, getattr(settings, key)) for key in NAMES})
    try:
        status, out = connections.run_on(name, settings.model_dump(by_alias=True))
    except processes.Stopped as stop:
        raise typer.Exit(128 + stop.number) from None
    if status != flower_commands.COMPLETED:
        again = ""
        if out and (Path(out) / "journal.zofed").exists():
            again = f"; go on with {shell.command('zofed', 'run', name, '--resume', Path(out))}"
        raise UserError(f"the run ended as {status!r}: the cause stands above{again}")
    if (Path(out) / "summary.json").exists():
        folder = RunFolder.open(Path(out))
        tell_end(folder, folder.summary(), "zofed", "run", name)
    else:
        bring(out, fetch)


def bring(out: str, host: str) -> None:
    """Copy a run's folder from the SuperLink's machine into ./runs with scp, or say how."""
    import shutil
    import subprocess

    target = Path("runs") / Path(out).name
    command = ["scp", "-r", "-q", f"{host or 'USER@HOST'}:{out}", str(target)]
    shown = shell.command(*command)
    if not host:
        console.print(f"the results lie on the SuperLink's machine: {shown}", markup=False)
        return
    if target.exists():
        raise UserError(f"{target} exists already: move it aside, then fetch with {shown}")
    if not shutil.which("scp"):
        raise UserError(f"scp is not installed: copy {out} from {host} by other means")
    target.parent.mkdir(exist_ok=True)
    print(f"$ {shown}", flush=True)
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"could not copy {out} from {host}: do it with {shown}")
    console.print(f"results in {target}", markup=False)
