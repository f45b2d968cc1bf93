"""The image and the compose file in deploy/: their commands, keys, paths and versions. Docker is not asked."""

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from zofed.base.files import ROOT
from zofed.commands import cli
from zofed.deployment import key_checks

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
TEXT = (DEPLOY / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "zofed"}
NODES = [name for name in OURS if name != "superlink"]
KEYS = "/etc/zofed/keys"

Command = Callable[..., tuple[int, str, str]]


def parsed(words: list[str]) -> dict[str, Any]:
    """What zofed's command line makes of the words; raises click.ClickException."""
    app: Any = typer.main.get_command(cli.app)
    name, command, rest = app.resolve_command(click.Context(app), words)
    return command.make_context(name, rest).params


def mounts(service: str) -> dict[str, str]:
    """Sources by their places in the container."""
    return {place: source for source, place in (volume.split(":")[:2] for volume in SERVICES[service]["volumes"])}


def in_comment(program: str) -> list[str]:
    """Commands of a program that the head of the compose file tells to type."""
    return re.findall(rf"^#   ({program} .*?)(?:  +#.*)?$", TEXT, re.MULTILINE)


def test_the_services_are_commands_of_zofed() -> None:
    assert 'ENTRYPOINT ["zofed"]' in DOCKERFILE and NODES == ["gpu0", "gpu1"]
    given = {name: parsed(shlex.split(service["command"])) for name, service in OURS.items()}
    assert [given[name]["partition_id"] for name in NODES] == list(range(len(NODES)))
    assert {given[name]["num_partitions"] for name in NODES} == {len(NODES)}
    run = next(command for command in in_comment("docker compose") if " zofed run " in command)
    asked = parsed(shlex.split(run.partition(" zofed ")[2]))
    assert asked["clients"] == str(len(NODES)) and asked["name"] == given["superlink"]["name"]
    assert asked["out"].startswith("/var/lib/zofed/"), "a folder that outlives the container"


def test_nodes_reach_the_proxy_and_the_proxy_the_superlink() -> None:
    nginx, superlink = (DEPLOY / "nginx.conf").read_text(), parsed(shlex.split(OURS["superlink"]["command"]))
    assert f"server {superlink['host']}:{superlink['port']};" in nginx and superlink["host"] == "127.0.0.1"
    assert SERVICES["proxy"]["network_mode"] == "service:superlink", "the loopback is theirs together"
    (network, own), = OURS["superlink"]["networks"].items()  # fmt: skip
    for node in NODES:
        host, port = parsed(shlex.split(OURS[node]["command"]))["superlink"].split(":")
        assert OURS[node]["networks"] == [network] and host in own["aliases"] and f"listen {port} ssl" in nginx
    assert "./nginx.conf:/etc/nginx/conf.d/default.conf:ro" in SERVICES["proxy"]["volumes"]
    assert re.findall(rf" ({KEYS})/", nginx) and mounts("proxy")[KEYS] == mounts("superlink")[KEYS] == "./keys"


def test_the_keys_are_those_that_the_head_of_the_file_makes(tmp_path: Path, zofed_command: Command) -> None:
    (command,) = in_comment("zofed")
    words = shlex.split(command)[1:]
    assert words[words.index("--out") + 1] == "deploy/keys"
    keys = tmp_path / "keys"
    assert zofed_command(*(keys if word == "deploy/keys" else word for word in words))[0] == 0
    key_checks.check_server(keys)
    host = parsed(shlex.split(OURS["gpu0"]["command"]))["superlink"].split(":")[0]
    assert host in words, "the certificate has the name by which nodes reach the proxy"
    for node in NODES:
        found, given = mounts(node), parsed(shlex.split(OURS[node]["command"]))
        for place in (given["ca"], given["key"]):
            assert (tmp_path / found[str(place)]).is_file(), place
        assert (keys / "enrolled" / f"{node}.pub").is_file()


def test_what_is_written_lies_in_volumes() -> None:
    kept = re.search(r"^VOLUME (.*)$", DOCKERFILE, re.MULTILINE)
    assert kept is not None
    for service in OURS:
        named = {place for place, source in mounts(service).items() if source in COMPOSE["volumes"]}
        assert named == set(yaml.safe_load(kept[1])), service
        assert f"WORKDIR {min(named, key=lambda place: 'cache' in place)}" in DOCKERFILE


def test_the_image_has_a_python_and_a_torch_that_zofed_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = re.search(r"^FROM python:(3\.\d+)-", DOCKERFILE, re.MULTILINE)
    assert version and f"Programming Language :: Python :: {version[1]}" in project["classifiers"]
    wanted = re.search(r"^torch\S*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert wanted and f'"{wanted[0]}"' in DOCKERFILE
    build = OURS["gpu0"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT / "dist", "where make wheel puts what is copied"
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


@pytest.mark.parametrize("service", OURS)
def test_a_container_has_no_rights_it_does_not_need(service: str) -> None:
    assert OURS[service]["cap_drop"] == ["ALL"] and "no-new-privileges:true" in OURS[service]["security_opt"]
    assert "ports" not in OURS[service] and "USER zofed" in DOCKERFILE
