"""Proxies of the environment: never between zofed and this machine, and named where one is in the way."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from zofed.base import proxies
from zofed.base.errors import UserError
from zofed.deployment import connections, flower_commands, keys, reachability
from zofed.deployment.reachability import Address
from zofed.federated.flower_internals import Runtime

VARIABLES = [f"{name}_proxy" for name in ("http", "https", "all", "grpc", "no", "no_grpc")]
HERE = "localhost,127.0.0.1,::1"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment without any proxy; whatever a test or zofed sets in it is gone afterwards."""
    for name in [*VARIABLES, *map(str.upper, VARIABLES)]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """URL of a proxy that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://someone:secret@127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[str]:
    """URL of a proxy where nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://someone:secret@127.0.0.1:{bound.getsockname()[1]}"


@contextlib.contextmanager
def server(status: int) -> Iterator[int]:
    """Port of a server that answers everything with a status and no body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        do_POST = do_CONNECT = do_GET  # noqa: N815, the library's names

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield httpd.server_port
        finally:
            httpd.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"no_proxy": "a.example"}, {}),
        ({"http_proxy": ""}, {}),
        ({"http_proxy": "http://p:1"}, {"no_proxy": HERE, "NO_PROXY": HERE}),
        ({"HTTPS_PROXY": "http://p:1"}, {"no_proxy": HERE, "NO_PROXY": HERE}),
        ({"ALL_PROXY": "p", "no_proxy": "a, .b"}, {"no_proxy": f"a,.b,{HERE}", "NO_PROXY": f"a,.b,{HERE}"}),
        ({"all_proxy": "p", "NO_PROXY": "::1"}, dict.fromkeys(("no_proxy", "NO_PROXY"), "::1,localhost,127.0.0.1")),
        ({"http_proxy": "p", "no_proxy": "[::1],fe80::/10,10.0.0.0/8,h:80"}, None),
        (
            {"grpc_proxy": "p", "no_grpc_proxy": "a"},
            dict.fromkeys(("no_proxy", "NO_PROXY"), HERE)
            | dict.fromkeys(("no_grpc_proxy", "NO_GRPC_PROXY"), f"a,{HERE}"),
        ),
    ],
)
def test_this_machine_is_exempt_beside_what_was(given: dict[str, str], expected: dict[str, str] | None) -> None:
    found = proxies.exempt(given)
    if expected is None:
        assert found["no_proxy"] == "::1,10.0.0.0/8,h:80,localhost,127.0.0.1"
    else:
        assert found == expected
    assert proxies.exempt(given | found) == found


def test_httpx_takes_every_list_that_is_made(monkeypatch: pytest.MonkeyPatch, refusing: str) -> None:
    for no_proxy in ("[::1]", "::1/128,fe80::/10", "*.corp,host:80", " a , b,", "*"):
        for name, value in proxies.exempt({"http_proxy": refusing, "no_proxy": no_proxy}, "2001:db8::7").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("http_proxy", refusing)
        httpx.Client().close()


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("socks5://me:secret@h:1", "socks5://***@h:1"),
        ("ftp://h:1", "ftp://h:1"),
        ("http://h:x", "http://h:x"),
        ("http://h:1\n", "http://h:1"),
        ("me:sec@ret@[::1", "***@[::1"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_and_out_of_force_here(name: str, value: str, shown: str) -> None:
    environment = {name: value}
    with pytest.raises(UserError, match="cannot be used") as caught:
        proxies.towards("fed.example.org", environment)
    told = str(caught.value)
    assert told.startswith(f"{name} = '{shown}") and "secret" not in told and told.endswith(f"unset {name}")
    assert proxies.towards("localhost", environment)["no_proxy"] == "*"
    assert proxies.towards("10.0.0.1", environment, is_here=True)["NO_PROXY"] == "*"
    assert proxies.unusable(environment | {"no_proxy": "*"}) == ""


@pytest.mark.parametrize(
    ("scheme", "environment", "named"),
    [
        ("https", {"https_proxy": "http://u:p@q:1"}, "https_proxy = 'http://***@q:1'"),
        ("https", {"HTTPS_PROXY": "q:1"}, "HTTPS_PROXY = 'q:1'"),
        ("https", {"all_proxy": "q:1"}, "all_proxy = 'q:1'"),
        ("https", {"http_proxy": "q:1"}, ""),
        ("https", {"https_proxy": "", "HTTPS_PROXY": "q:1"}, ""),
        ("https", {"https_proxy": "q:1", "no_proxy": "x,example.org"}, ""),
        ("https", {"https_proxy": "q:1", "NO_PROXY": "*"}, ""),
        ("http", {"http_proxy": "q:1", "no_proxy": "a b"}, "export 'no_proxy=a b,fed.example.org'"),
    ],
)
def test_the_proxy_in_the_way_is_named_without_its_password(
    scheme: str, environment: dict[str, str], named: str
) -> None:
    told = proxies.in_the_way(scheme, "fed.example.org", environment)
    assert named in told and bool(named) == bool(told)


def test_every_command_and_what_it_starts_leave_proxies_aside(
    zofed_command, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", refusing)
    assert flower_commands.quiet_environment()["no_proxy"] == HERE
    assert "no_proxy" not in os.environ
    assert zofed_command("version")[0] == 0
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == HERE


@pytest.mark.parametrize("name", VARIABLES[:3])
def test_a_worker_and_flowers_commands_reach_this_machine_past_a_proxy(
    monkeypatch: pytest.MonkeyPatch, refusing: str, name: str
) -> None:
    with server(200) as port, silent() as unanswering:
        for value in (refusing, unanswering, "socks5://127.0.0.1:1"):
            monkeypatch.setenv(name, value)
            with monkeypatch.context() as patched:
                for key, exempted in proxies.towards("127.0.0.1", os.environ).items():
                    patched.setenv(key, exempted)
                assert Runtime(f"127.0.0.1:{port}").acquire() is None
                assert reachability.problem(Address("127.0.0.1", port), None) == ""


@pytest.mark.slow
def test_a_superlink_behind_a_proxy_that_fails_is_told_with_the_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusing: str
) -> None:
    keys.make(tmp_path / "keys", ["fed.example.org"])
    monkeypatch.setattr(reachability, "TIMEOUT_S", 0.2)
    far = Address("fed.example.org", 443)
    with silent() as unanswering, server(403) as port:
        for value in (refusing, unanswering, f"http://someone:secret@127.0.0.1:{port}"):
            for name, root in (("http_proxy", None), ("https_proxy", tmp_path / "keys" / "ca.crt")):
                with monkeypatch.context() as patched:
                    patched.setenv(name, value)
                    told = reachability.problem(far, root)
                assert f"through the proxy of {name} = 'http://***@127.0.0.1:" in told and "secret" not in told
                assert "export no_proxy=fed.example.org" in told


def test_a_run_that_a_superlink_did_not_get_names_the_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refusing: str
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", refusing)
    monkeypatch.setattr(flower_commands, "stream", lambda *_: (None, "no connection"))
    monkeypatch.setattr(flower_commands, "keep_logs", lambda home: home)  # nothing stays behind
    lines = ['[superlink.far]\naddress = "fed.example.org:443"', '[superlink.near]\naddress = ":local:"']
    (tmp_path / "config.toml").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"no connection.*through the proxy of https_proxy = 'http://\*\*\*@127"):
        connections.run_on("far", {})
    with pytest.raises(UserError, match=r"no connection.*mend that and try again"):
        connections.run_on("near", {})
    monkeypatch.setenv("https_proxy", "socks5://h:1")
    with pytest.raises(UserError, match="https_proxy = 'socks5://h:1' cannot be used"):
        connections.run_on("far", {})


@pytest.mark.parametrize("value", ["http://someone:secret@127.0.0.1:1", "socks5://127.0.0.1:1"])
@pytest.mark.parametrize(
    "command", [["data", "download", "wikitext-103"], ["models", "download", "gpt2/gpt2"]], ids=" ".join
)
def test_a_download_that_no_proxy_lets_through_names_it(
    zofed_command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], value: str
) -> None:
    monkeypatch.setenv("ZOFED_DATA", str(tmp_path))
    monkeypatch.setenv("https_proxy", value)
    status, _, errors = zofed_command(*command)
    assert status == 2 and "https_proxy = " in errors and "secret" not in errors and len(errors.splitlines()) == 1


@pytest.mark.slow  # Flower with Ray, and two more runs: 40 to 80 s
def test_the_quickstart_needs_no_proxy_and_is_stopped_by_none(tmp_path: Path, refusing: str) -> None:
    zofed = Path(sys.executable).parent / "zofed"
    with silent() as unanswering:
        environment = {"http_proxy": unanswering, "HTTPS_PROXY": refusing, "all_proxy": "socks5h://127.0.0.1:1"}
        done = subprocess.run(
            [zofed, "quickstart", "--rounds", "1", "--out", tmp_path / "out"],
            env=os.environ | environment | {"grpc_proxy": refusing},
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replay of the journals: equal" in done.stdout
    table = done.stdout[done.stdout.index("on held-out reviews") :]
    assert all(way in table for way in ("untouched", "forward passes", "in a subspace", "whole updates"))
    assert (tmp_path / "out" / "scores.png").stat().st_size > 10_000
