"""deploy/nginx.conf, run by nginx: nodes get through, nothing else does."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import tomli_w
import uvicorn
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, RegisterNodeFleetRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from zofed.base.files import ROOT
from zofed.deployment import flower_commands, flower_run, keys, processes

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="no nginx on PATH: deploy/nginx.conf is not tested here"),
]

FLEET = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
REFUSED = {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
PULL = "/v1/fleet/pull-messages"


@dataclass
class Recorder:
    """A server in the SuperLink's place, with its HTTP parser: keeps every request that reaches it."""

    port: int
    seen: list[tuple[str, str, bytes, dict[str, str]]] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] != "http":
            return
        parts, more = [], True
        while more:
            message = await receive()
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        self.seen.append(
            (scope["method"], scope["raw_path"].decode(), b"".join(parts), headers | {"peer": scope["client"][0]})
        )
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"7")]})
        await send({"type": "http.response.body", "body": b"reached"})


@contextmanager
def recorder(folder: Path) -> Iterator[Recorder]:
    """A recorder with the server's certificate of a folder of keys."""
    found = Recorder(flower_commands.free_port())
    certificate, key = str(folder / "server.crt"), str(folder / "server.key")
    server = uvicorn.Server(
        uvicorn.Config(found, port=found.port, log_level="error", ssl_certfile=certificate, ssl_keyfile=key, ws="none")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(found.port)
        yield found
    finally:
        server.should_exit = True
        thread.join()


def wait_for(port: int, seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port} after {seconds:g} s")


def edited(text: str, port: int, superlink: int, folder: Path) -> str:
    """The shipped file after a person's edits in the marked places, and with another public port."""
    assert re.findall(r"EDIT (\d)", text) == ["1", "2", "3"]
    places = {
        "server 127.0.0.1:8000;": f"server 127.0.0.1:{superlink};",
        "listen 8443 ssl": f"listen 127.0.0.1:{port} ssl",
        "/etc/zofed/keys/": f"{folder}/",
        "    listen [::]:8443 ssl default_server;  # take this line out on a machine without IPv6\n": "",
    }
    for shipped, own in places.items():
        assert shipped in text
        text = text.replace(shipped, own)
    return text


@contextmanager
def proxy(home: Path, folder: Path, superlink: int) -> Iterator[int]:
    """nginx with the shipped file before a server on port `superlink`; the port it listens on."""
    assert NGINX is not None
    home.mkdir()
    port = flower_commands.free_port()
    (home / "zofed.conf").write_text(edited((ROOT / "deploy" / "nginx.conf").read_text(), port, superlink, folder))
    temporary = "".join(
        f"{kind}_temp_path {home / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(
        ("user root;\n" if os.geteuid() == 0 else "")  # the folders of tests are its owner's alone
        + f"daemon off;\npid {home / 'pid'};\nevents {{}}\nhttp {{\naccess_log {home / 'access.log'};\n{temporary}"
        f"include {home / 'zofed.conf'};\n}}\n"
    )
    command = [NGINX, "-p", str(home), "-e", str(home / "error.log"), "-c", str(home / "nginx.conf")]
    told = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert told.returncode == 0 and "warn" not in told.stderr, told.stderr
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a server on this machine with two nodes."""
    out = tmp_path_factory.mktemp("server") / "keys"
    keys.make(out, ["fed.example.org"], ["gpu0", "gpu1"])
    return out


@pytest.fixture(scope="module")
def before_recorder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Recorder]]:
    with recorder(folder) as behind, proxy(tmp_path_factory.mktemp("nginx") / "home", folder, behind.port) as port:
        yield port, behind


@pytest.fixture
def through(before_recorder: tuple[int, Recorder]) -> tuple[int, Recorder]:
    """The proxy's port, and what reaches the server behind it from here on."""
    before_recorder[1].seen.clear()
    return before_recorder


def raw(port: int, ca: Path, sent: bytes, seconds: float = 5.0) -> bytes:
    """Send bytes over one TLS connection; everything that comes back until it closes or stays silent."""
    context = ssl.create_default_context(cafile=str(ca))
    got = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=seconds) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(sent)
        connection.settimeout(1.0)
        try:
            while part := connection.recv(65536):
                got += part
        except (TimeoutError, OSError):
            pass
    return got


def statuses(answer: bytes) -> list[int]:
    """Of every response in an answer."""
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


def post(path: str, body: bytes = b"x", version: str = "HTTP/1.1", method: str = "POST", headers: str = "") -> bytes:
    head = f"{method} {path} {version}\r\nHost: localhost\r\nContent-Type: application/x-protobuf\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("latin-1") + body


# ---- what nodes need -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(FLEET - REFUSED))
def test_what_a_node_asks_arrives_as_it_was_sent(through: tuple[int, Recorder], folder: Path, path: str) -> None:
    port, behind = through
    body = os.urandom(300_000)
    names = (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
    sent = dict.fromkeys(names, "a" * 300) | {"x-forwarded-for": "198.51.100.1"}
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    answer = httpx.post(f"https://127.0.0.1:{port}{path}", content=body, headers=sent, verify=context)
    assert (answer.status_code, answer.content) == (200, b"reached")
    [(method, seen, arrived, headers)] = behind.seen
    assert (method, seen) == ("POST", path) and arrived == body
    assert {name: headers[name] for name in names} == dict.fromkeys(names, "a" * 300)
    assert headers["x-forwarded-for"] == headers["peer"] == "127.0.0.1"  # nobody tells the log another address


def test_the_paths_are_those_of_flower() -> None:
    """A new path of a later flwr fails here, not on the nodes."""
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    found = re.search(r"location ~ \^/v1/fleet/\(([a-z|-]+)\)\$", text)
    assert found and {f"/v1/fleet/{name}" for name in found[1].split("|")} == FLEET - REFUSED


def test_an_update_of_33_million_parameters_passes_and_no_more(through: tuple[int, Recorder], folder: Path) -> None:
    port, behind = through
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    body = bytes(4 * 33_000_000)
    answer = httpx.post(f"https://127.0.0.1:{port}{PULL}", content=body, verify=context, timeout=60)
    assert answer.status_code == 200 and len(behind.seen[0][2]) == len(body)
    behind.seen.clear()
    head = post(PULL).replace(b"Content-Length: 1", b"Content-Length: 134217729")
    assert statuses(raw(port, folder / "ca.crt", head)) == [413] and not behind.seen


# ---- what nobody else gets -----------------------------------------------------------------------

CONTROL = "/v1/control/list-runs"
PATHS = [
    *sorted(path for _, path in PROTOBUF_REQUEST_TYPES if path not in FLEET - REFUSED),
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/other",
    "/V1/control/list-runs",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/./../control/list-runs",
    "/v1/fleet//../control/list-runs",
    "//v1/control/list-runs",
    "/v1//control/list-runs",
    "/./v1/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/.%2e/control/list-runs",
    "/v1/fleet/%2e%2e%2fcontrol%2flist-runs",
    "/v1/fleet/%252e%252e/control/list-runs",
    "/v1/fleet/..%5ccontrol/list-runs",
    "/v1/fleet/..\\control\\list-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/fleet/pull-messages/../../control/list-runs",
    "/v1/fleet/pull-messages/..%2f..%2fcontrol/list-runs",
    "/v1/%63ontrol/list-runs",
    "/v1%2fcontrol%2flist-runs",
    # What nginx cleans to an allowed path, and another parser may read otherwise.
    "/v1/control/../fleet/pull-messages",
    "/v1/control/list-runs/../../fleet/pull-messages",
    "/v1/control/%2e%2e/fleet/pull-messages",
    "/v1/fleet//pull-messages",
    "//v1/fleet/pull-messages",
    "/v1/fleet/%70ull-messages",
    "/v1/fleet/./pull-messages",
    "/v1/control/list-runs#/../../../v1/fleet/pull-messages",
    "/v1/control/list-runs?/../../fleet/pull-messages",
    "/v1/control/list-runs%3f/../../fleet/pull-messages",
    "/v1/control/list-runs%23/../../fleet/pull-messages",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages;x",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages%00",
    "/v1/fleet/pull-messages%20",
    "/v1/fleet/pull-messages%0d%0aX:%201",
    "/v1/FLEET/pull-messages",
    "/v1/fleet/pull-messagesx",
]


@pytest.mark.parametrize("path", PATHS)
def test_other_paths_do_not_get_through(through: tuple[int, Recorder], folder: Path, path: str) -> None:
    port, behind = through
    for version in ("HTTP/1.1", "HTTP/1.0"):
        answer = raw(port, folder / "ca.crt", post(path, version=version))
        assert statuses(answer) in ([400], [404]), answer[:300]
    assert not behind.seen


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "X"]
)
def test_other_methods_do_not_get_through(through: tuple[int, Recorder], folder: Path, method: str) -> None:
    port, behind = through
    for path in (PULL, CONTROL):
        answer = raw(port, folder / "ca.crt", post(path, method=method))
        assert set(statuses(answer)) <= {400, 403, 404, 405} and statuses(answer), answer[:300]
    assert not behind.seen


@pytest.mark.parametrize(
    "target",
    [
        "https://localhost/v1/control/list-runs",
        "http://127.0.0.1:8000/v1/control/list-runs",
        "https://localhost/v1/fleet/../control/list-runs",
        "https://x/v1/control/list-runs#/v1/fleet/pull-messages",
        "https://localhost?/v1/fleet/pull-messages",
        "*",
        "localhost:8000",
        "v1/control/list-runs",
        "/v1/control/list runs",
    ],
)
def test_other_forms_of_a_target_do_not_get_through(through: tuple[int, Recorder], folder: Path, target: str) -> None:
    port, behind = through
    answer = raw(port, folder / "ca.crt", post(target))
    assert statuses(answer) in ([400], [404]), answer[:300]
    assert not behind.seen


@pytest.mark.parametrize(
    "sent",
    [
        f"GET {CONTROL}\r\n\r\n",  # HTTP/0.9
        f"POST {CONTROL} HTTP/2.0\r\nHost: localhost\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        f"POST {CONTROL} HTTP/1.1\r\nHost: localhost\r\nX-Original-URL: {PULL}\r\nContent-Length: 0\r\n\r\n",
        f"GET {CONTROL} HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        f"POST {PULL}\tHTTP/1.1\r\nHost: localhost\r\n\r\n",
        f"POST {PULL} HTTP/1.1 \r\n Host: localhost\r\n\r\n",
    ],
)
def test_other_requests_do_not_get_through(through: tuple[int, Recorder], folder: Path, sent: str) -> None:
    port, behind = through
    raw(port, folder / "ca.crt", sent.encode())
    assert not behind.seen


INNER = f"POST {CONTROL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
HEAD = f"POST {PULL} HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        # Two lengths that disagree, in every order and disguise: whichever counts, the inner request is never a request
        # to the server behind, only one to nginx, which refuses it.
        f"{HEAD}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}Transfer-Encoding: chunked\r\nContent-Length: {len(INNER) + 5}\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}Content-Length: 0\r\nContent-Length: {len(INNER)}\r\n\r\n{INNER}",
        f"{HEAD}Content-Length: 0, {len(INNER)}\r\n\r\n{INNER}",
        f"{HEAD}Content-Length: +0\r\n\r\n{INNER}",
        f"{HEAD}Content-Length : {len(INNER)}\r\n\r\n{INNER}",
        f"{HEAD}Transfer-Encoding : chunked\r\nContent-Length: {len(INNER) + 5}\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}Transfer-Encoding: xchunked\r\nContent-Length: {len(INNER) + 5}\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}X: a\nTransfer-Encoding: chunked\r\nContent-Length: {len(INNER) + 5}\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}X: a\r\n\tTransfer-Encoding: chunked\r\nContent-Length: {len(INNER) + 5}\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}Transfer_Encoding: chunked\r\nContent-Length: {len(INNER) + 5}\r\n\r\n0\r\n\r\n{INNER}",
        f"{HEAD}Transfer-Encoding: chunked\r\n\r\n1;a={'x' * 20}\r\nZ\r\n0\r\nX: y\r\n\r\n{INNER}",
        f"{HEAD}Transfer-Encoding: chunked\r\n\r\n0000000000000000F\r\n{INNER}",
        f"{HEAD}Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n{INNER}",
        f"{HEAD}Connection: Content-Length\r\nContent-Length: {len(INNER)}\r\n\r\n{INNER}",
        f"{HEAD}Content-Length: 0\r\n\r\n{INNER}",  # an honest second request
        f"{HEAD}X: a\rPOST {CONTROL} HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    ],
)  # fmt: skip
def test_no_second_request_hides_in_an_allowed_one(through: tuple[int, Recorder], folder: Path, sent: str) -> None:
    port, behind = through
    raw(port, folder / "ca.crt", sent.encode())
    after = raw(port, folder / "ca.crt", post(PULL, b"honest"))  # whoever comes next on the kept connection
    assert statuses(after) == [200] and after.endswith(b"reached")
    assert {(method, path) for method, path, _, _ in behind.seen} == {("POST", PULL)}
    assert behind.seen[-1][2] == b"honest"


# ---- TLS -----------------------------------------------------------------------------------------


def test_neither_plain_http_nor_old_tls_nor_http2_is_spoken(through: tuple[int, Recorder], folder: Path) -> None:
    port, behind = through
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        plain.sendall(post(PULL))
        assert statuses(plain.recv(1000)) == [400]
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    context.set_alpn_protocols(["h2", "http/1.1"])
    for version, spoken in ((ssl.TLSVersion.TLSv1_2, "TLSv1.2"), (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
        context.minimum_version = context.maximum_version = version
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
            with context.wrap_socket(plain, server_hostname="fed.example.org") as connection:
                assert (connection.version(), connection.selected_alpn_protocol()) == (spoken, "http/1.1")
            assert not behind.seen
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, pytest.raises(ssl.SSLError, match="ALERT"):
        context.wrap_socket(plain, server_hostname="fed.example.org")


def test_a_server_behind_it_that_has_another_certificate_is_not_believed(folder: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "other", ["fed.example.org"])
    with recorder(tmp_path / "other") as behind, proxy(tmp_path / "home", folder, behind.port) as port:
        assert statuses(raw(port, folder / "ca.crt", post(PULL))) == [502]
        assert not behind.seen
    assert "upstream SSL certificate verify error" in (tmp_path / "home" / "error.log").read_text()


def test_a_flood_is_answered_with_503_upon_which_nodes_try_again(folder: Path, tmp_path: Path) -> None:
    with recorder(folder) as behind, proxy(tmp_path / "home", folder, behind.port) as port:
        many = b"".join(post(PULL).replace(b"Connection: close\r\n", b"") for _ in range(1500))
        found = statuses(raw(port, folder / "ca.crt", many + post(PULL), seconds=30))
    assert 400 <= found.count(200) < 1200 and found.count(503) > 100
    assert found.count(200) == len(behind.seen)


# ---- the real thing ------------------------------------------------------------------------------


@contextmanager
def flower(command: list[str], home: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process of Flower with a home of its own, ended with all it started; and its log."""
    (home / "cwd").mkdir(parents=True)
    log = home / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(flower_commands.tool(command[0])), *command[1:]],
            cwd=home / "cwd",
            env=flower_commands.flower_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        processes.stop_all(process.pid, home, reap=process.poll)


def supernode(port: int, ca: Path, key: Path | None) -> list[str]:
    command = ["flower-supernode", "--superlink", f"localhost:{port}", "--root-certificates", str(ca),
               "--port", str(flower_commands.free_port()), "--max-retries", "1"]  # fmt: skip
    return command + (["--auth-supernode-private-key", str(key)] if key else [])


@dataclass
class Operator:
    """Whoever sits at the server: Flower's command line with one connection to the SuperLink and one to the proxy."""

    home: Path

    def __call__(self, *arguments: str) -> tuple[int, str]:
        told = subprocess.run(
            [str(flower_commands.tool("flwr")), *arguments], cwd=self.home,
            env=flower_commands.flower_environment(self.home), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        return told.returncode, told.stdout + told.stderr

    def nodes(self) -> list[str]:
        """The status of each node, as `flwr supernode list` tells it."""
        _, told = self("supernode", "list", "direct", "--format", "json")
        return [node["status"] for node in json.loads(told[told.index("{") :])["nodes"]]

    def runs(self) -> list[str]:
        """The id of each run."""
        _, told = self("list", "direct", "--format", "json")
        return [run["run-id"] for run in json.loads(told[told.index("{") :])["runs"]]


@dataclass
class Site:
    """A SuperLink with TLS and node authentication, node gpu0 registered, nginx before it."""

    folder: Path
    superlink: int
    port: int
    operator: Operator

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"


@pytest.fixture(scope="module")
def site(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    home, port = tmp_path_factory.mktemp("superlink"), flower_commands.free_port()
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth",
               "--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt"),
               "--ssl-keyfile", str(folder / "server.key")]  # fmt: skip
    with flower(command, home / "server"), proxy(home / "nginx", folder, port) as front:
        wait_for(port, 60)
        ways = {
            name: {"address": f"localhost:{to}", "root-certificates": str(folder / "ca.crt")}
            for name, to in (("direct", port), ("proxy", front))
        }
        (home / "config.toml").write_text(tomli_w.dumps({"superlink": ways}))
        operator = Operator(home)
        status, told = operator(
            "supernode", "register", str(folder / "enrolled" / "gpu0.pub"), "direct", "--name", "gpu0"
        )
        assert status == 0, told
        yield Site(folder, port, front, operator)


APP = {
    "pyproject.toml": """
[project]
name = "weights"
version = "1.0.0"
[tool.flwr.app]
publisher = "tests"
fab-include = ["/*.py"]
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
size = 0
""",
    "client_app.py": """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    return Message(content=message.content, reply_to=message)
""",
    "server_app.py": """
import os
import time
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
import numpy as np

app = ServerApp()

@app.main()
def main(grid, context):
    size = context.run_config["size"]
    sent = RecordDict({"bytes": ConfigRecord({"x": os.urandom(size)}),
                       "array": ArrayRecord({"x": Array(np.arange(size // 8))})})
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    message = Message(content=sent, dst_node_id=nodes[0], message_type="train")
    began = time.monotonic()
    [reply] = grid.send_and_receive([message], timeout=120)
    assert not reply.has_error(), reply.error
    assert reply.content["bytes"]["x"] == sent["bytes"]["x"]
    assert (reply.content["array"]["x"].numpy() == np.arange(size // 8)).all()
    print(f"weights came back after {time.monotonic() - began:.1f} s", flush=True)
""",
}


def test_a_node_works_through_the_proxy_and_its_weights_pass(site: Site, tmp_path: Path) -> None:
    for name, content in APP.items():
        (tmp_path / "weights").mkdir(exist_ok=True)
        (tmp_path / "weights" / name).write_text(content)
    with flower(supernode(site.port, site.ca, site.folder / "nodes" / "gpu0.key"), tmp_path / "gpu0") as (_, log):
        limit = time.monotonic() + 60
        while site.operator.nodes() != ["online"]:
            assert time.monotonic() < limit, flower_run.tail(log)
        # 20 MB in one piece, as zofed sends, and 20 MB as an array, which Flower cuts.
        size = 20_000_000
        _, told = site.operator("run", str(tmp_path / "weights"), "direct", "--stream", "--run-config", f"size={size}")
        assert "weights came back" in told, told
    assert site.operator.nodes() == ["offline"]
    asked = (site.operator.home / "nginx" / "access.log").read_text()
    assert all(f"POST /v1/fleet/{name} HTTP/1.1\" 200" in asked for name in (
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "push-object",
        "pull-object", "confirm-message-received", "get-run", "get-fab",
    )), asked  # fmt: skip
    assert not re.search(r"\" (?!200)\d{3} ", asked), asked


def test_nobody_commands_through_the_proxy(site: Site, tmp_path: Path) -> None:
    for name, content in APP.items():
        (tmp_path / name).write_text(content)
    before = site.operator.runs()
    public = str(site.folder / "enrolled" / "gpu1.pub")
    for command in (["list"], ["supernode", "list"], ["supernode", "register", public], ["run", str(tmp_path)]):
        status, told = site.operator(*command, "proxy")
        assert status != 0 and "404" in told, told
    assert site.operator.runs() == before and len(site.operator.nodes()) == 1


def fleet_call(url: str, path: str, ca: Path, key: Path | None, node_id: int = 0) -> httpx.Response:
    """A request to a fleet path, signed as a SuperNode signs where there is a key."""
    request = PROTOBUF_REQUEST_TYPES["POST", path]()
    headers = {"content-type": PROTOBUF_MEDIA_TYPE}
    if key is not None:
        private = serialization.load_ssh_private_key(key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        public, stamp = public_key_to_bytes(private.public_key()), now().isoformat()
        if isinstance(request, RegisterNodeFleetRequest | ActivateNodeRequest):
            request.public_key = public
        elif hasattr(request, "node"):
            request.node.node_id = node_id
        else:
            request.node_id = node_id
        headers |= {
            FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode(),
            FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(private, stamp.encode())).decode(),
            TIMESTAMP_HEADER: stamp,
        }
    context = ssl.create_default_context(cafile=str(ca))
    return httpx.post(url + path, content=request.SerializeToString(), headers=headers, verify=context)


def test_what_a_node_without_an_enrolled_key_can_call(site: Site) -> None:
    """Nothing: nobody is let in without a key, and nobody registers a key of his own."""
    direct = f"https://localhost:{site.superlink}"
    unknown = site.folder / "nodes" / "gpu1.key"
    told = {"/v1/fleet/register-node": (412, 2001), "/v1/fleet/activate-node": (412, 2004)}
    for path in sorted(FLEET):
        assert fleet_call(direct, path, site.ca, None).status_code == 401
        found = fleet_call(direct, path, site.ca, unknown, node_id=1)
        assert (found.status_code, found.json().get("code")) == told.get(path, (401, None))
    assert len(site.operator.nodes()) == 1


@pytest.mark.parametrize(
    ("key", "told"), [("gpu1", "[code: 2004] Failed to activate SuperNode"), (None, "404 Not Found")]
)
def test_a_node_that_is_not_enrolled_ends_with_an_error(site: Site, tmp_path: Path, key: str | None, told: str) -> None:
    path = site.folder / "nodes" / f"{key}.key" if key else None
    with flower(supernode(site.port, site.ca, path), tmp_path / "node") as (process, log):
        process.wait(60)
        assert process.returncode not in (None, 0)
        assert told in log.read_text()
    assert len(site.operator.nodes()) == 1
