"""The pure parts of the launcher, and its clean-up on ordinary processes; the real `flwr run` is a slow test."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import zofed
from tests.clusters import NODE, ray_cluster
from zofed import config
from zofed.base.errors import UserError
from zofed.deployment import flower_commands, flower_run, processes
from zofed.runs.run_folder import RunFolder

ROOT = Path(zofed.__file__).parent.parent


def test_an_earlier_result_is_moved_aside_and_never_deleted(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    assert flower_run.move_aside(out) is None
    for number in (1, 2, 3):
        out.mkdir()
        (out / "made-by").write_text(str(number))
        assert flower_run.move_aside(out) == tmp_path / f"quickstart-{number}"
        assert not out.exists()
    assert [(tmp_path / f"quickstart-{n}" / "made-by").read_text() for n in (1, 2, 3)] == ["1", "2", "3"]


def test_the_quickstart_leaves_a_folder_of_other_files_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert flower_run.quickstart(tmp_path, "zo", {}) == 1
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert "holds other files than an earlier quickstart: choose another --out" in capsys.readouterr().err


def test_moving_aside_sees_a_dangling_link(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "nowhere")
    assert flower_run.move_aside(out) == tmp_path / "out-1"
    assert (tmp_path / "out-1").is_symlink()


def test_an_output_folder_that_cannot_be_moved_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"cannot move .*Permission denied.*another output folder"):
        flower_run.move_aside(tmp_path)


def test_the_connection_is_the_default_and_stays_on_this_machine() -> None:
    config = tomllib.loads(flower_run.connection_toml(4711))
    assert config["superlink"]["default"] == flower_run.CONNECTION
    assert config["superlink"][flower_run.CONNECTION] == {"address": "127.0.0.1:4711", "insecure": True}


def test_flower_reads_the_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.cli.flower_config import read_superlink_connection

    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(flower_run.connection_toml(4711))
    connection = read_superlink_connection(None)
    assert (connection.name, connection.address, connection.insecure) == (flower_run.CONNECTION, "127.0.0.1:4711", True)


@pytest.mark.parametrize(
    ("nodes", "per_node", "cpus", "ray"), [(4, 1, 2, 2), (4, 1, 64, 4), (4, 2, 64, 8), (4, 2, 1, 2)]
)
def test_ray_gets_the_cpus_that_the_nodes_can_use(nodes: int, per_node: int, cpus: int, ray: int) -> None:
    text = flower_run.federation_config(nodes, per_node, cpus)
    assert text.split() == [
        f"num-supernodes={nodes}",
        f"client-resources-num-cpus={per_node}",
        f"init-args-num-cpus={ray}",
    ]


def test_a_ray_cluster_that_is_there_keeps_its_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert flower_run.federation_config(4, 1, 2) == "num-supernodes=4 client-resources-num-cpus=1"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_clients_of_a_simulation_lie_on_all_nodes_of_a_ray_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray._private.state import actors

    from zofed.federated import simulation

    short = {"rounds": 2, "clients": 2, "queries": 2, "batch-size": 2, "block-size": 16, "eval-examples": 8}
    with ray_cluster(monkeypatch) as cluster:
        cluster.add_node(**NODE)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        status = flower_run.flower_run({**short, "device": "cpu", "out": str(tmp_path / "two")}, 2, 1)
        ray.init(address=cluster.address, log_to_driver=False)
        places = [own["Address"]["NodeID"] for own in actors().values() if own["ActorClassName"] == "ClientAppActor"]
        ray.shutdown()
    assert status == flower_commands.COMPLETED
    assert len(places) == len(set(places)) == 2, "one client on either node"
    simulation.simulate(config.resolve({**short, "device": "cpu", "out": str(tmp_path / "one")}), 0)
    two, one = (RunFolder(tmp_path / name).summary()["digest"] for name in ("two", "one"))
    assert two == one


def test_run_config_survives_flowers_own_parser(tmp_path: Path) -> None:
    import tomli_w
    from flwr.common.config import parse_config_args

    settings = {"out": '/a folder/it\'s "mine"', "rounds": 3, "learning-rate": 1e-3, "echo": True}
    path = tmp_path / "run-config.toml"
    path.write_text(tomli_w.dumps(settings))
    assert parse_config_args([str(path)]) == settings


def test_run_id_is_read_from_flowers_line() -> None:
    assert flower_commands.run_id_in("Successfully started run 12979184797574720982\n") == "12979184797574720982"
    assert flower_commands.run_id_in("Starting logstream for run_id `12979184797574720982`") is None


@pytest.mark.parametrize("status", ["finished:completed", "finished:failed", "finished:stopped", "running"])
def test_status_is_read_from_flowers_list(status: str) -> None:
    runs = [{"run-id": "11", "status": "finished:failed"}, {"run-id": "12", "status": status}]
    text = "a warning first\n" + json.dumps({"success": True, "runs": runs}, indent=2)
    assert flower_commands.parse_status(text, "12") == status


@pytest.mark.parametrize("text", ["", "no JSON", "{", "{}", '{"runs": []}', '{"success": false, "error-message": "x"}'])
def test_no_status_is_none(text: str) -> None:
    assert flower_commands.parse_status(text, "12") is None


def test_only_a_summary_that_says_completed_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        flower_run.check_summary(tmp_path)
    for text in ("not json", "[]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            flower_run.check_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "interrupted"}')
    with pytest.raises(UserError, match="status 'interrupted'"):
        flower_run.check_summary(tmp_path)
    (tmp_path / "summary.json").write_text('{"status": "completed"}')
    flower_run.check_summary(tmp_path)


def outcome(monkeypatch: pytest.MonkeyPatch, answer: Callable[[Path], str], out: Path) -> int:
    """The quickstart's exit status when Flower does what `answer` does with the output folder."""
    monkeypatch.setattr(flower_run, "flower_run", lambda run_config, **size: answer(Path(run_config["out"])))
    return flower_run.quickstart(out, "one", {})


def test_quickstart_trusts_neither_the_verdict_nor_the_summary_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(out: Path, status: str) -> None:
        out.mkdir(parents=True)
        (out / "summary.json").write_text(json.dumps({"status": status}))

    def well(out: Path) -> str:
        write(out, "completed")
        return flower_commands.COMPLETED

    def failed_late(out: Path) -> str:
        write(out, "completed")
        return "finished:failed"

    def stopped(out: Path) -> str:
        raise processes.Stopped(signal.SIGTERM)

    out = tmp_path / "out"
    assert outcome(monkeypatch, well, out) == 0
    assert (
        outcome(monkeypatch, lambda out: flower_commands.COMPLETED, out) == 1
    )  # the summary of the earlier run does not count
    assert outcome(monkeypatch, failed_late, out) == 1
    assert outcome(monkeypatch, stopped, out) == 143
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # one line for each that did not end well
    assert "finished:failed" in lines[1]


def test_what_flower_says_in_a_box_is_told_whole() -> None:
    box = [
        "Using SuperLink: lab\n",
        "╭─ Error ───────────────────────────────╮\n",
        "│ Connection to the SuperLink is        │\n",
        "│ unavailable. Check your network       │\n",
        "│ connection.                           │\n",
        "╰───────────────────────────────────────╯\n",
    ]
    said = functools.reduce(flower_commands.said_last, box, "no output")
    told = "Connection to the SuperLink is unavailable. Check your network connection."
    assert said.removeprefix(flower_commands.BOX).strip() == told
    assert flower_commands.said_last(said, "one more line\n") == "one more line"
    assert flower_commands.said_last("before", "\n") == "before"


def test_a_signal_ends_the_block_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(processes.Stopped) as caught, processes.stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_failure_keeps_the_logs_alone() -> None:
    with pytest.raises(UserError, match="it failed; logs: ") as caught, flower_commands.flower_home() as home:
        (home / "superlink.log").write_text("why")
        (home / "apps").mkdir()
        raise UserError("it failed")
    kept = Path(str(caught.value).rpartition("logs: ")[2])
    assert [path.name for path in kept.iterdir()] == ["superlink.log"]
    assert not home.exists()
    shutil.rmtree(kept)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), processes.Stopped(signal.SIGINT), ValueError()])
def test_other_ends_keep_nothing(error: BaseException) -> None:
    with pytest.raises(type(error)), flower_commands.flower_home() as home:
        (home / "superlink.log").write_text("why")
        raise error
    assert not home.exists()
    assert not home.with_name(f"{home.name}-logs").exists()


def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert flower_run.tail(log) == "there is no log"
    log.write_text("\n")
    assert flower_run.tail(log) == "the log is empty"
    log.write_text("one\ntwo\n\n three \n")
    assert flower_run.tail(log, lines=2) == "two | three"


def test_success_keeps_nothing() -> None:
    with flower_commands.flower_home() as home:
        (home / "superlink.log").write_text("well")
    assert not home.exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the working folder of an orphan")
def test_stopping_reaches_orphans_in_other_sessions_and_those_that_ignore_sigterm(tmp_path: Path) -> None:
    """A stand-in SuperLink whose grandchild has a session of its own, ignores SIGTERM and has lost its parent."""
    (tmp_path / "cwd").mkdir()
    pid_file = tmp_path / "pid"
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = f"""
import subprocess, sys
orphan = subprocess.Popen([sys.executable, "-c", {stubborn!r}], start_new_session=True)
open({str(pid_file)!r}, "w").write(str(orphan.pid))
"""
    root = f"import subprocess, sys, time; subprocess.run([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", root], cwd=tmp_path / "cwd", start_new_session=True)
    orphan = 0
    try:
        limit = time.monotonic() + 10
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < limit:
            time.sleep(0.05)
        orphan = int(pid_file.read_text())
        time.sleep(0.3)  # time to put the handler in place
        assert {process.pid, orphan} <= processes.descendants(process.pid, tmp_path)
        assert os.getpid() not in processes.descendants(process.pid, tmp_path)
        processes.stop_all(process.pid, tmp_path, reap=process.poll)
        assert not processes.alive(orphan)
        assert process.returncode is not None
    finally:
        process.kill()
        if orphan and processes.alive(orphan):
            os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize("word", [b"done", b""])
def test_the_guard_acts_only_when_the_launcher_ended_without_a_word(tmp_path: Path, word: bytes) -> None:
    home = tmp_path / "home"
    (home / "cwd").mkdir(parents=True)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=home / "cwd")
    command = [sys.executable, "-m", "zofed.deployment.processes", str(sleeper.pid), str(home)]
    try:
        subprocess.run(command, input=word, cwd=ROOT, timeout=30, check=True)
        assert processes.alive(sleeper.pid) == (word == b"done")
        assert home.exists() == (word == b"done")
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_version_stands_the_same_in_all_its_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == zofed.__version__
    (bundle,) = project["tool"]["uv"]["dependency-metadata"]
    assert (bundle["name"], bundle["version"]) == ("zofed", zofed.__version__)
    assert bundle["requires-dist"] == []


def test_flowers_own_sync_finds_nothing_to_install_in_a_bundle(tmp_path: Path) -> None:
    """What Flower runs before each run, on the bundle's pyproject.toml, without network and with an empty cache."""
    bundle = tmp_path / "zofed"
    (bundle / "zofed").mkdir(parents=True)
    (bundle / "zofed" / "__init__.py").touch()
    (bundle / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    command = [sys.executable, "-m", "uv", "sync", "--offline", "--cache-dir", str(tmp_path / "cache")]
    command += ["--python", sys.executable, "--no-install-project", "--no-install-package", "flwr", "--inexact"]
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(tmp_path / "env")}
    done = subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Resolved 1 package" in done.stderr
    assert not list((tmp_path / "env").glob("lib/*/site-packages/*.dist-info"))
