"""Make, renew and show the keys and certificates of a federation on separate machines."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zofed.base import shell
from zofed.commands.console import AsJson, console, print_json
from zofed.commands.groups import CommandGroup

keys_app = typer.Typer(cls=CommandGroup, no_args_is_help=True, help=__doc__)

Keys = Annotated[Path, typer.Option("--keys", help="folder of the server's keys")]
# The limits are those of the CA, the defaults of `certificates`, which takes a while to load: --help need not wait.
Days = Annotated[int, typer.Option(min=1, max=3650, help="days the server certificate lasts")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(keys_app, name="keys")


@keys_app.command()
def init(
    hosts: Annotated[list[str], typer.Argument(help="DNS names and addresses by which nodes reach the server")],
    out: Annotated[Path, typer.Option(help="folder to make; nothing is ever overwritten")] = Path("keys"),
    node: Annotated[
        list[str] | None, typer.Option(help="make this node's key pair too; again for each further node")
    ] = None,
    days: Days = 365,
) -> None:
    """Make a CA, a server certificate, the enrolment list and, with --node, keys of nodes."""
    from zofed.deployment import certificates, key_files, keys

    keys.make(out, hosts, node or [], days)
    table = Table("made", "what", box=None, pad_edge=False)
    table.add_row(
        str(out / key_files.CA_KEY), "signs server certificates: leave it here or put it away, never on a node"
    )
    table.add_row(str(out / key_files.CA), "every node needs a copy")
    table.add_row(str(out / key_files.SERVER_KEY), "stays on the server")
    names = certificates.names_of(key_files.certificate(out / key_files.SERVER))
    table.add_row(str(out / key_files.SERVER), ", ".join(names))
    table.add_row(str(out / key_files.ENROLLED), "the enrolment list: NAME.pub of every node that may connect")
    console.print(table)
    for name in node or []:
        private = out / key_files.NODES / f"{name}.key"
        gone = shell.command("rm", private)
        console.print(
            f"node {name}: copy {private} and {out / key_files.CA} to it (mode 600), then here: {gone}", markup=False
        )
    console.print("other nodes: run zofed keys node NAME there; its private key then never travels")
    console.print(f"next: {shell.command('zofed', 'superlink', '--keys', out)}", markup=False)


@keys_app.command("node")
def make_node(
    name: Annotated[str, typer.Argument(help="name of the node: letters, digits, '-', '_', '.'")],
    out: Annotated[Path, typer.Option(help="folder for NAME.key and NAME.pub")] = Path(),
) -> None:
    """Make a node's key pair on its own machine, which the private key never leaves."""
    from zofed.deployment import key_files, keys

    public = keys.make_node(out, name)
    console.print(f"private key  {out / f'{name}.key'}: stays on this machine")
    console.print(f"public key   {out / f'{name}.pub'}, {key_files.fingerprint(public)}")
    console.print(f"next: copy {name}.pub to the server's keys/enrolled/, and the server's keys/ca.crt to this machine")


@keys_app.command()
def renew(
    hosts: Annotated[
        list[str] | None, typer.Argument(help="DNS names and addresses; none: those of the present certificate")
    ] = None,
    folder: Keys = Path("keys"),
    days: Days = 365,
) -> None:
    """Make the server a new key and certificate from the same CA; nodes need nothing new."""
    from zofed.deployment import certificates, key_files, keys

    keys.renew(folder, hosts or [], days)
    path = folder / key_files.SERVER
    found = key_files.certificate(path)
    console.print(f"{path}: {', '.join(certificates.names_of(found))}, until {found.not_valid_after_utc:%Y-%m-%d}")
    console.print("next: restart the SuperLink, and reload the proxy if there is one")


@keys_app.command()
def show(folder: Keys = Path("keys"), as_json: AsJson = False) -> None:
    """Show how long the certificates last, what they are for, and which nodes are enrolled."""
    from zofed.deployment import certificates, key_files

    rows = []
    for name in (key_files.CA, key_files.SERVER):
        found = key_files.certificate(folder / name)
        rows.append({
            "certificate": name,
            "from": f"{found.not_valid_before_utc:%Y-%m-%d}",
            "until": f"{found.not_valid_after_utc:%Y-%m-%d}",
            "days left": certificates.days_left(found),
            "for": ", ".join(certificates.names_of(found)) or found.subject.rfc4514_string(),
        })  # fmt: skip
    nodes = key_files.enrolled(folder)
    if as_json:
        enrolled = {name: key_files.fingerprint(public) for name, public in nodes.items()}
        print_json({"certificates": rows, "enrolled": enrolled})
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(("expired" if key == "days left" and row[key] < 0 else str(row[key])) for key in row))
    console.print(table)
    listing = Table("enrolled", "fingerprint of its key", box=None, pad_edge=False)
    for name, public in nodes.items():
        listing.add_row(name, key_files.fingerprint(public))
    console.print(listing if nodes else f"no node is enrolled: put their NAME.pub into {folder / key_files.ENROLLED}")
