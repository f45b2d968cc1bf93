"""The app that `zofed new` writes, and which one a launcher gives to Flower."""

import contextlib
import os
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.cli.config_utils import load_and_validate
from flwr.cli.utils import validate_project_name
from flwr.common.config import fuse_dicts

import zofed
from zofed import config
from zofed.base.errors import UserError
from zofed.base.files import ROOT
from zofed.deployment import app_folder, warm_worker
from zofed.federated import client, server

Zofed = Callable[..., tuple[int, str, str]]


def project_of(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def test_an_app_of_ones_own_is_one_for_flower_and_for_zofed(
    zofed_command: Zofed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = zofed_command("new", "my-app", "--publisher", "me")
    folder = tmp_path / "my-app"
    assert status == 0 and f"next: flwr run {folder} --stream --run-config {folder / 'settings.toml'}" in out
    assert {path.name for path in folder.iterdir()} == {
        "pyproject.toml", "settings.toml", "server_app.py", "client_app.py", "README.md"
    }  # fmt: skip
    read, warnings = load_and_validate(folder / "pyproject.toml")
    assert not warnings and (read["tool"]["flwr"]["app"]["publisher"], read["project"]["name"]) == ("me", "my-app")
    assert config.resolve(read["tool"]["flwr"]["app"]["config"]) == config.Settings()
    own = tomllib.loads((folder / "settings.toml").read_text())
    both = fuse_dicts(read["tool"]["flwr"]["app"]["config"], own)  # as flwr run does, which refuses other keys
    assert config.resolve(both) == config.resolve(own)
    assert not config.without_effect(config.resolve(own), own, config.FEDERATED)
    status, _, errors = zofed_command("new", "my-app")
    assert status == 2 and "my-app is there already: name another folder, or move it aside" in errors


def test_its_shims_are_the_apps_of_the_zofed_that_is_installed(tmp_path: Path) -> None:
    app_folder.write(tmp_path / "app", "app", "me")
    assert runpy.run_path(str(tmp_path / "app" / "server_app.py"))["app"] is server.app
    assert runpy.run_path(str(tmp_path / "app" / "client_app.py"))["app"] is client.app


def test_a_server_of_another_version_ends_its_run_with_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_folder, "__version__", "0.0.9")
    app_folder.write(tmp_path / "app", "app", "me")
    app = runpy.run_path(str(tmp_path / "app" / "server_app.py"))["app"]
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    told = f"of zofed 0.0.9, the server's machine has zofed {zofed.__version__}: give all machines the same"
    with pytest.raises(UserError, match=told):
        app(None, context)


@pytest.mark.parametrize("name", ["a", "my-app", "x1", "A" * 32, "1a", "-a", "my_app", "a b", "a.b", "A" * 33, ""])
def test_names_are_those_that_flower_takes(tmp_path: Path, name: str) -> None:
    def flower_takes() -> bool:
        with contextlib.suppress(ValueError):
            validate_project_name(name, "name")
            return True
        return False

    def zofed_takes() -> bool:
        with contextlib.suppress(UserError):
            app_folder.check_name("name", name)
            return True
        return False

    assert flower_takes() == zofed_takes()


def test_what_cannot_be_a_name_is_told(zofed_command: Zofed, tmp_path: Path) -> None:
    status, _, errors = zofed_command("new", tmp_path / "my_app")
    assert status == 2 and "name = 'my_app': give a letter, then letters, digits and hyphens" in errors
    status, _, errors = zofed_command("new", tmp_path / "äpp")  # which Flower would take, and no package index
    assert status == 2 and "name = 'äpp'" in errors
    status, _, errors = zofed_command("new", tmp_path / "app", "--publisher", "a b")
    assert status == 2 and "--publisher = 'a b'" in errors and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    status, _, errors = zofed_command("new", tmp_path / "file" / "app")
    assert status == 2 and "Traceback" not in errors and "app" in errors


def test_a_launcher_gives_flower_the_checkout_and_an_installed_one_the_same_app_without_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert app_folder.ready(tmp_path) == ROOT and not list(tmp_path.iterdir())
    monkeypatch.setattr(app_folder, "IS_INSTALLED", True)
    folder = app_folder.ready(tmp_path)
    assert folder.is_relative_to(tmp_path)
    theirs, ours = project_of(folder), project_of(ROOT)
    assert f"{theirs['tool']['flwr']['app']['publisher']}/{theirs['project']['name']}" == warm_worker.APP
    for key in ("name", "version", "requires-python", "license"):
        assert theirs["project"][key] == ours["project"][key], key


def test_flower_installs_nothing_for_it(tmp_path: Path) -> None:
    """What Flower runs before each run, without network and with an empty cache."""
    app_folder.write(tmp_path / "app", "app", "me")
    command = [sys.executable, "-m", "uv", "sync", "--offline", "--cache-dir", str(tmp_path / "cache")]
    command += ["--python", sys.executable, "--no-install-project", "--no-install-package", "flwr", "--inexact"]
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(tmp_path / "env")}
    done = subprocess.run(command, cwd=tmp_path / "app", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "env").glob("lib/*/site-packages/*.dist-info"))
