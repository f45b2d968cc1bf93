"""The Flower app that a run is submitted as: a checkout of zofed, or a folder of shims over the installed zofed."""

import re
from pathlib import Path

from zofed import __version__, config
from zofed.base.errors import UserError
from zofed.base.files import IS_INSTALLED, ROOT, whole_folder

PUBLISHER, NAME = "zofed", "zofed"  # in the checkout's pyproject.toml, too; a test compares
NAME_LIMIT = 32  # characters that Flower takes
SETTINGS = """\
# What this app trains. zofed settings prints every setting with what it means; --run-config and options override these.
model = "sample"  # small, pretrained, ships with zofed; or the folder of a saved model, or OWNER/NAME of the hub
dataset = "sample-sst2"  # labelled reviews that ship; or a file, whose path is absolute
held-out-fraction = 0.25
task = "prompt"
template = "{{ text }} . it was"
label-words = " bad, good"
mode = "zo"  # forward passes alone
queries = 4
direction-scale = "rms"
optimizer = "adamw"
learning-rate = 0.02
schedule = "cosine"
batch-size = 16
rounds = 40
eval-interval = 10
"""

_SERVER = '''\
"""What Flower loads as the server: that of the zofed installed here, where it is of the version this app is for."""

from zofed.federated import server

app = server.app_for("{version}")  # Flower looks for an assignment to this name
'''
_CLIENT = '''\
"""What Flower loads as the client: that of the zofed installed here, which the server asks for its version."""

from zofed.federated import client

app = client.app  # Flower looks for an assignment to this name
'''
_PROJECT = """\
[project]
name = "{name}"
version = "{version}"
description = "A federation of zofed: language models tuned by forward passes, replayable bit for bit."
license = "Apache-2.0"
requires-python = ">=3.11,<3.14"
# Empty: before each run Flower installs what stands here. Every machine has zofed {version} already.
dependencies = []

[tool.flwr.app]
publisher = "{publisher}"
fab-include = ["/*.py", "/README.md"]  # what is sent to the machines, besides this file

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

# Every setting with its default; settings.toml holds what this app sets otherwise.
[tool.flwr.app.config]
{settings}"""
_README = """\
# {name}

A Flower app over zofed {version}, written by `zofed new`.

| file | what |
| --- | --- |
| `settings.toml` | what is trained: change this one |
| `pyproject.toml` | the app for Flower, with every setting and its default |
| `server_app.py`, `client_app.py` | what Flower loads: zofed's server and client; code of your own goes here |

In this folder:

```bash
zofed check settings.toml                                   # will it fit, how long
zofed simulate settings.toml --clients 4 --out run          # one process, quick to start
flwr run . --stream --run-config settings.toml              # through Flower: results in ~/zofed-runs
flwr run . --stream --run-config settings.toml --federation-config 'num-supernodes=4'
```

**On separate machines** each one has zofed {version} and what it needs installed: the app brings none of it. A server
with another version ends the run with a sentence that names both, and it takes in no node that has another one.

- `zofed run NAME settings.toml` submits the settings to a SuperLink and to nodes started by `zofed supernode`. These
  run the zofed that is installed there, never code that a run brings: this folder's own code stays out of it.
- `flwr run . NAME --stream --run-config settings.toml` submits this folder, whose code Flower's own `flower-supernode`
  runs.
"""


def ready(home: Path) -> Path:
    """The folder to give `flwr run`: the checkout that zofed runs from, else one that is written into `home`."""
    if not IS_INSTALLED and (ROOT / "pyproject.toml").is_file():
        return ROOT
    write(home / "app", NAME, PUBLISHER, __version__)
    return home / "app"


def write(folder: Path, name: str, publisher: str, version: str = "0.1.0") -> None:
    """Write the app into a new folder. Raises UserError where Flower takes no such name, or the folder is there."""
    check_name("name", name)
    check_name("--publisher", publisher)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder} is there already: name another folder, or move it aside")
    named = {"name": name, "publisher": publisher}
    files = {
        "pyproject.toml": _PROJECT.format(**named, version=version, settings=config.documented_toml()),
        "server_app.py": _SERVER.format(version=__version__),
        "client_app.py": _CLIENT,
        "settings.toml": SETTINGS,
        "README.md": _README.format(name=name, version=__version__),
    }
    with whole_folder(folder):
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")


def check_name(what: str, name: str) -> None:
    """Raises UserError for a name of an app or a publisher that Flower would refuse."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name) or len(name) > NAME_LIMIT:
        raise UserError(
            f"{what} = {name!r}: give a letter, then letters, digits and hyphens, {NAME_LIMIT} characters at most, as "
            "my-app"
        )
