"""Separate machines, as far as it goes without Flower's processes: commands, addresses, refusals, supervision."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.config import parse_config_args
from flwr.supercore.task_identity import TaskIdentity

from zofed.base import environment
from zofed.base.errors import UserError
from zofed.base.files import ROOT
from zofed.deployment import (
    connections,
    flower_commands,
    keys,
    reachability,
    superlink,
    supernode,
    supervisor,
    warm_worker,
)
from zofed.deployment.reachability import Address
from zofed.deployment.supervisor import Child, supervise
from zofed.federated import messages
from zofed.federated.flower_internals import Assignment
from zofed.federated.wire import Introduction

# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("localhost:8000", "localhost", 8000), ("10.0.0.1:65535", "10.0.0.1", 65535), ("[::1]:1", "::1", 1)],
)
def test_an_address_is_a_host_and_a_port(text: str, host: str, port: int) -> None:
    assert Address.of(text) == Address(host, port)
    assert str(Address.of(text)) == text


@pytest.mark.parametrize("text", ["", "localhost", ":80", "host:", "host:0", "host:65536", "host:x", "https://host:80"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="give HOST:PORT"):
        Address.of(text)


def test_flower_reads_the_node_configuration(tmp_path: Path) -> None:
    data = tmp_path / "my data's.jsonl"
    data.write_text("{}")
    found = parse_config_args([supernode.node_config(2, 5, str(data), "zo")])
    assert found == {"partition-id": 2, "num-partitions": 5, "dataset": str(data), "mode": "zo"}
    assert parse_config_args([supernode.node_config(0, 1, "", "fo")]) == {
        "partition-id": 0,
        "num-partitions": 1,
        "mode": "fo",
    }


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_place_that_is_none_is_refused(index: int, count: int) -> None:
    with pytest.raises(UserError, match="0 to N - 1"):
        supernode.node_config(index, count, "", "fo")


def test_data_that_a_node_cannot_read_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--dataset .*nowhere does not exist: client 1"):
        supernode.node_config(1, 2, str(tmp_path / "nowhere"), "fo")
    secret = tmp_path / "secret"
    secret.write_text("")
    secret.chmod(0)
    if not os.access(secret, os.R_OK):  # root reads everything
        with pytest.raises(UserError, match="cannot be read by this user"):
            supernode.node_config(1, 2, str(secret), "fo")


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="in use; choose another port"):
            flower_commands.check_port_is_free("127.0.0.1", other.getsockname()[1])
    with pytest.raises(UserError, match=r"192\.0\.2\.1"):
        flower_commands.check_port_is_free("192.0.2.1", 8000)


def test_flower_parses_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    keys.make(tmp_path / "keys", ["host"], ["a"])
    command = superlink.superlink_command(tmp_path / "keys", "127.0.0.1", 8123, tmp_path)
    found = _parse_args_run_superlink().parse_args(command[1:])
    assert (found.insecure, found.enable_supernode_auth, found.port) == (False, True, 8123)
    assert _parse_args_run_superlink().parse_args(superlink.superlink_command(None, "::", 1, tmp_path)[1:]).insecure
    node = supernode.supernode_command(
        Address("h", 1), tmp_path / "ca", tmp_path / "key", "partition-id=0", 9, tmp_path / "secret"
    )
    found = _parse_args_run_supernode().parse_args(node[1:])
    assert (found.superlink, found.isolation, found.insecure, found.port) == ("h:1", "process", False, 9)
    found = _parse_args_run_supernode().parse_args(
        supernode.supernode_command(Address("h", 1), None, None, "", 9, None)[1:]
    )
    assert found.insecure and found.auth_supernode_private_key is None


def test_a_connection_is_saved_beside_others_and_never_over_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    path = tmp_path / "config.toml"
    path.write_text('# mine\n[superlink]\ndefault = "other"\n[superlink.other]\naddress = "x:1"\n')
    entry = superlink.connection(tmp_path / "keys", "0.0.0.0", 8443)
    connections.save("lab", entry)
    connections.save("lab", entry)  # the same again
    text = path.read_text()
    assert text.startswith("# mine\n") and tomllib.loads(text)["superlink"] == {
        "default": "other",
        "other": {"address": "x:1"},
        "lab": {"address": "127.0.0.1:8443", "root-certificates": str(tmp_path / "keys" / "ca.crt")},
    }
    with pytest.raises(UserError, match=r"has that connection already, to x:1; choose another --name"):
        connections.save("other", entry)
    assert path.read_text() == text
    path.write_text("[superlink")
    with pytest.raises(UserError, match="mend it by hand"):
        connections.save("lab", entry)


def test_a_run_needs_a_superlink_that_flower_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"knows no SuperLink 'lab', only none: start one here"):
        connections.run_on("lab", {})


def test_a_run_without_a_superlink_names_the_address_and_the_command_that_starts_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.setattr(flower_commands, "stream", lambda *_: pytest.fail("was submitted"))
    port = flower_commands.free_port()
    entry = f'address = "127.0.0.1:{port}"'
    (tmp_path / "config.toml").write_text(
        f'[superlink.trial]\n{entry}\ninsecure = true\n[superlink.lab]\n{entry}\nroot-certificates = "/k/ca.crt"\n'
        '[superlink.far]\naddress = "no-such-host.invalid:8000"\n'
    )
    for name, options in (("trial", "--insecure"), ("lab", "--keys /k")):
        told = (
            rf"^nothing answers at 127.0.0.1:{port}, where .*config.toml has {name} \(Connection refused\): start it "
        )
        with pytest.raises(UserError, match=rf"{told}with zofed superlink --name {name} --port {port} {options}$"):
            connections.run_on(name, {})
    with pytest.raises(UserError, match=r"^nothing answers at no-such-host.invalid:8000, .*On that machine it starts "):
        connections.run_on("far", {})


# ---- enrolment -----------------------------------------------------------------------------------


class Registry(superlink.Enrolment):
    """Enrolment at a SuperLink that is a list."""

    def __init__(self, folder: Path, state: Path) -> None:
        super().__init__(folder, state, {})
        self.registered: dict[str, str] = {}
        self.is_up, self.last = True, 100

    def _flwr(self, action: str, what: str, *more: str) -> dict[str, Any]:
        if not self.is_up:
            return {}
        if action == "unregister":
            return {"success": self.registered.pop(what, None) is not None}
        text = Path(what).read_text()
        if text in self.registered.values():
            return {"success": False, "error-message": "[code: 23] Public key already in use."}
        self.last += 1
        self.registered[str(self.last)] = text
        return {"success": True, "node-id": self.last}

    def now(self) -> None:
        self._next = 0.0
        self.look()


def test_the_folder_of_public_keys_is_the_enrolment_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    keys.make(folder, ["host"], ["a", "b"])
    registry = Registry(folder, tmp_path)
    registry.is_up = False
    registry.now()
    assert not registry.registered  # and it tries again
    registry.is_up = True
    registry.now()
    assert len(registry.registered) == 2
    (folder / "enrolled" / "a.pub").rename(tmp_path / "a.pub")
    registry.now()
    assert list(registry.registered.values()) == [(folder / "enrolled" / "b.pub").read_text()]
    (tmp_path / "a.pub").rename(folder / "enrolled" / "again.pub")
    registry.now()
    assert len(registry.registered) == 2
    again = Registry(folder, tmp_path)  # the SuperLink is started again on its database
    again.registered = registry.registered
    again.now()
    assert again.nodes == registry.nodes and "registered before" not in capsys.readouterr().out
    (tmp_path / "enrolled.json").unlink()
    lost = Registry(folder, tmp_path)
    lost.registered = registry.registered
    lost.now()
    assert "registered before, not by us" in capsys.readouterr().out


def test_a_spoilt_key_stops_nothing_and_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    keys.make(folder, ["host"], ["a"])
    (folder / "enrolled" / "bad.pub").write_text("no key")
    registry = Registry(folder, tmp_path)
    registry.now()
    registry.now()
    assert capsys.readouterr().err.count("bad.pub") == 1
    (folder / "enrolled" / "bad.pub").unlink()
    registry.now()
    assert len(registry.registered) == 1


# ---- reaching a SuperLink ------------------------------------------------------------------------


@contextlib.contextmanager
def https(folder: Path | None, seconds_off: float = 0.0, host: str = "127.0.0.1") -> Iterator[int]:
    """A server that answers one request with its time, over TLS with the certificate of a folder of keys."""
    context = None
    if folder:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with socket.create_server((host, 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError, ssl.SSLError):
                plain, _ = listener.accept()
                with context.wrap_socket(plain, server_side=True) if context else plain as stream:
                    stream.recv(1000)
                    date = formatdate(time.time() + seconds_off, usegmt=True)
                    stream.sendall(f"HTTP/1.1 404 no\r\ndate: {date}\r\ncontent-length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.close()
        thread.join(5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "keys"
    keys.make(folder, ["example.org"], ["a"])
    return folder


@pytest.mark.parametrize("off", [0.0, 4.0, -250.0])
def test_a_superlink_that_answers_is_reached(made: Path, off: float) -> None:
    with https(made, -off) as port:
        assert reachability.problem(Address("localhost", port), made / "ca.crt") == ""


@pytest.mark.parametrize(("off", "said"), [(60.0, "ahead of"), (-400.0, "behind")])
def test_a_clock_that_is_off_is_named(made: Path, off: float, said: str) -> None:
    with https(made, -off) as port, pytest.raises(UserError, match=rf"\d+ s {said} the SuperLink's.*NTP"):
        reachability.problem(Address("localhost", port), made / "ca.crt")


def test_another_ca_another_name_and_no_tls_are_told_apart(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    keys.make(other, ["host"])
    with https(made) as port, pytest.raises(UserError, match=r"was not signed by .*other/ca.crt: bring its ca.crt"):
        reachability.problem(Address("localhost", port), other / "ca.crt")
    with https(made, host="127.0.0.2") as port, pytest.raises(UserError, match=r"is not for 127.0.0.2: renew it"):
        reachability.problem(Address("127.0.0.2", port), made / "ca.crt")
    with https(None) as port, pytest.raises(UserError, match="does not speak TLS"):
        reachability.problem(Address("localhost", port), made / "ca.crt")
    with https(made) as port:
        assert "give --ca and --key instead of --insecure" in reachability.problem(Address("localhost", port), None)


def test_what_may_pass_is_waited_for() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert "is the SuperLink running and the port open?" in reachability.problem(Address("127.0.0.1", port), None)
    assert "spelled right" in reachability.problem(Address("no.such.host.invalid", 1), None)


def test_a_refusal_names_the_key_and_the_remedy() -> None:
    request = httpx.Request("POST", "https://h/v1/fleet/activate-node")
    refused = httpx.HTTPStatusError("no", request=request, response=httpx.Response(401, request=request))
    assert "copy gpu0.pub into the folder keys/enrolled" in reachability.refusal(refused, "gpu0.pub")
    broken = httpx.HTTPStatusError("no", request=request, response=httpx.Response(500, text="oh", request=request))
    assert "status 500: oh" in reachability.refusal(broken, "gpu0.pub")
    assert "does not answer" in reachability.refusal(httpx.ConnectError("gone"), "gpu0.pub")


# ---- supervision ---------------------------------------------------------------------------------


def script(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [sys.executable, str(path)]


def supervised(children: list[Child], until: Callable[[], bool], number: int = signal.SIGTERM) -> int:
    """Supervise until a condition holds, then send a signal."""
    sent: list[bool] = []

    def every() -> None:
        if until() and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)

    return supervise(children, every)


def starts(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


SAYS_AND_STAYS = "import os, time\nopen({!r}, 'a').write(str(os.getpid()) + '\\n')\ntime.sleep(60)\n"


def test_a_child_that_dies_is_started_anew_and_ended_with_us(tmp_path: Path) -> None:
    told = tmp_path / "told"
    child = Child("one", script(tmp_path / "one.py", SAYS_AND_STAYS.format(str(told))), dict(os.environ))
    given_up: list[int] = []
    child.before_restart = lambda: given_up.append(starts(told))
    killed: list[int] = []

    def until() -> bool:
        if starts(told) == 1 and not killed:
            killed.append(int(told.read_text().split()[0]))
            os.kill(killed[0], signal.SIGKILL)
        return starts(told) == 2

    assert supervised([child], until) == 128 + signal.SIGTERM
    assert given_up == [1]
    for pid in map(int, told.read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_what_a_death_takes_along_is_started_anew_too(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    node = Child("node", script(tmp_path / "n.py", SAYS_AND_STAYS.format(str(first))), dict(os.environ))
    worker = Child("worker", script(tmp_path / "w.py", SAYS_AND_STAYS.format(str(second))), dict(os.environ))
    worker.takes_along = ["node"]
    killed: list[bool] = []

    def until() -> bool:
        if starts(first) == starts(second) == 1 and not killed:
            killed.append(True)
            os.kill(int(second.read_text()), signal.SIGKILL)
        return starts(first) == starts(second) == 2

    assert supervised([node, worker], until, signal.SIGINT) == 128 + signal.SIGINT


def test_a_mistake_is_not_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = tmp_path / "told"
    text = f"import sys\nopen({str(told)!r}, 'a').write('x\\n')\nprint('no such device')\nsys.exit(2)"
    assert supervise([Child("one", script(tmp_path / "one.py", text), dict(os.environ))]) == supervisor.MISTAKE
    assert starts(told) == 1


def test_deaths_in_a_row_are_waited_for_longer_and_longer() -> None:
    child = Child("one", [], {})
    delays = []
    for _ in range(9):
        child.started = time.monotonic()
        supervisor._bury(child, 1)
        delays.append(round(child.due - time.monotonic(), 1))
    assert delays[:3] == [0.5, 1.0, 2.0] and max(delays) == delays[-1] == supervisor.LONGEST_DELAY_S
    child.started = time.monotonic() - supervisor.WELL_AFTER_S - 1
    supervisor._bury(child, -9)
    assert round(child.due - time.monotonic(), 1) == 0.5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child of its parent's death")
def test_a_supervisor_killed_outright_takes_its_children_along(tmp_path: Path) -> None:
    told = tmp_path / "told"
    child = script(tmp_path / "child.py", SAYS_AND_STAYS.format(str(told)))
    code = "import os\nfrom zofed.deployment.supervisor import Child, supervise\n"
    code += f"supervise([Child('c', {child!r}, os.environ)])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL) as parent:
        limit = time.monotonic() + 30
        while not starts(told) and time.monotonic() < limit:
            time.sleep(0.05)
        parent.kill()
    pid, limit = int(told.read_text()), time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child outlived its supervisor")


# ---- the worker ----------------------------------------------------------------------------------


def assignment(app: str = warm_worker.APP, kind: str = "query.status", **node: Any) -> Assignment:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(RecordDict(), dst_node_id=2, message_type=kind, ttl=60)
    message.metadata.__dict__["_message_id"] = "1"
    context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={})
    return Assignment(message, context, app)


def test_a_worker_runs_no_other_apps_code() -> None:
    reply = warm_worker.reply_to(assignment("somebody/evil"), "")
    assert reply.has_error() and "this worker answers 'zofed/zofed' alone" in reply.error.reason


def test_a_message_that_fails_is_answered_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    reply = warm_worker.reply_to(assignment(kind="train.zo"), "cpu")  # no content: malformed
    assert reply.has_error() and reply.error.code == warm_worker.CLIENT_FAILED
    assert "Malformed" in reply.error.reason and "Traceback" not in capsys.readouterr().err


def test_a_greeting_of_another_zofed_is_answered_with_who_this_is() -> None:
    told = messages.unpack(Introduction, warm_worker.reply_to(assignment(), "").content)
    assert "give all machines the same" in told.problem and told.code == environment.code()


def test_a_worker_is_of_the_bundle_that_the_project_makes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"{project['tool']['flwr']['app']['publisher']}/{project['project']['name']}" == warm_worker.APP


class Runtime:
    """A SuperNode with some tasks, which is away now and then."""

    def __init__(self, tasks: list[Any]) -> None:
        self.tasks = tasks

    def acquire(self) -> Any:
        found = self.tasks.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


class Task:
    def __init__(self, taken: Any) -> None:
        self.taken, self.answers = taken, list[Message]()

    def __enter__(self) -> "Task":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def take(self) -> Assignment:
        if isinstance(self.taken, Exception):
            raise self.taken
        return self.taken

    def answer(self, reply: Message) -> None:
        self.answers.append(reply)


def test_a_worker_outlives_lost_tasks_and_an_absent_supernode(capsys: pytest.CaptureFixture[str]) -> None:
    lost, failed, last = Task(httpx.ReadTimeout("gone")), Task(assignment("x/y")), Task(assignment("x/z"))
    away = httpx.ConnectError("refused")
    tasks = [None, lost, away, away, failed, away, last]
    warm_worker.serve(Runtime(tasks), is_over=lambda: not tasks)  # type: ignore[arg-type]
    assert len(failed.answers) == len(last.answers) == 1 and not lost.answers
    told = capsys.readouterr().err
    assert told.count("waiting for it") == 2 and "a task was lost: gone" in told


def test_the_device_is_the_nodes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def record(message: Message, context: Context) -> Message:
        seen.append(dict(context.node_config))
        return Message(RecordDict(), reply_to=message)

    monkeypatch.setattr(warm_worker.client, "app", record)
    warm_worker.reply_to(assignment(), "cuda:1")
    warm_worker.reply_to(assignment(), "")
    assert seen == [{"device": "cuda:1"}, {}]


def test_results_are_fetched_or_it_is_said_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zofed.commands import deployment

    monkeypatch.chdir(tmp_path)
    deployment.bring("/srv/runs/a", "")
    assert "scp -r -q USER@HOST:/srv/runs/a runs/a" in capsys.readouterr().out
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "scp").write_text('#!/bin/sh\ncp -r "${3#*:}" "$4"\n')
    (fake / "scp").chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake}:{os.environ['PATH']}")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_text(json.dumps(1))
    deployment.bring(str(tmp_path / "far"), "me@host")
    assert (tmp_path / "runs" / "far" / "x").exists()
    with pytest.raises(UserError, match="exists already: move it aside"):
        deployment.bring(str(tmp_path / "far"), "me@host")
    with pytest.raises(UserError, match="could not copy"):
        deployment.bring(str(tmp_path / "nowhere"), "me@host")
