"""A run over processes that torchrun started: the same records, whatever happens to the processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import ignore, records_of

from zofed import config
from zofed.base import torchrun
from zofed.base.errors import UserError
from zofed.commands import cli
from zofed.config import Settings
from zofed.runs.run_folder import RunFolder
from zofed.training import central, device_pool, ranks
from zofed.training.task import Task

Quick = Callable[..., Settings]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand for a process that torchrun started, with a store that the processes of a test share."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "_opened", lambda: store)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)

    def as_rank(rank: int, world: int) -> None:
        values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        for name, value in (values | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost"}).items():
            monkeypatch.setenv(name, str(value))

    return as_rank


def test_only_torchruns_variables_count(monkeypatch: pytest.MonkeyPatch, started: Callable[..., None]) -> None:
    monkeypatch.setenv("RANK", "3")  # of some other launcher
    assert torchrun.place() == torchrun.Place(0, 1, 0)
    started(2, 4)
    assert torchrun.place() == torchrun.Place(2, 4, 2)


def test_ranks_find_one_another(monkeypatch: pytest.MonkeyPatch, started: Callable[..., None]) -> None:
    started(0, 3)
    pipes: dict[int, Any] = {}
    own = threading.local()
    monkeypatch.setattr(ranks, "place", lambda: torchrun.Place(getattr(own, "rank", 0), 3, 0))

    def join(rank: int) -> None:
        own.rank = rank
        pipes[rank] = ranks.joined({"seed": rank})

    strays: list[socket.socket] = []

    def disturb() -> None:
        """Two who know nothing of the key: one talks and goes, one stays silent. Then the ranks."""
        with ranks._store() as store:
            store.wait([ranks._key()], timedelta(seconds=20))
            host, port, _ = json.loads(store.get(ranks._key()))
        for words in (b"GET / HTTP/1.1\r\n\r\n", b""):
            strays.append(socket.create_connection((host, port)))
            strays[-1].sendall(words)
        strays[0].close()
        for rank in (2, 1):
            join(rank)

    others = [threading.Thread(target=disturb)]
    for thread in others:
        thread.start()
    found = ranks.gathered(patience=20)
    strays[1].close()
    for thread in others:
        thread.join()
    assert [(other.rank, other.read) for other in found] == [(1, {"seed": 1}), (2, {"seed": 2})]
    for other in found:
        other.pipe.send_bytes(b"measure")
        assert pipes[other.rank].recv_bytes() == b"measure"
        other.pipe.close()
        pipes[other.rank].close()


def test_a_rank_that_does_not_come_is_named(started: Callable[..., None]) -> None:
    started(0, 2)
    with pytest.raises(UserError, match=r"rank 1 of 2 has not come within round-timeout = 0\.2 seconds"):
        ranks.gathered(patience=0.2)


def test_a_run_that_needs_no_help_lets_the_others_go(started: Callable[..., None]) -> None:
    started(0, 2)
    with ranks.released():
        pass
    started(1, 2)
    assert ranks.joined({}) is None


def test_ranks_that_read_something_else_are_named(quick: Quick) -> None:
    def read(**values: Any) -> dict[str, Any]:
        task = Task.load(quick(**values))
        return device_pool.read_by(task, task.replica())

    ours = read()
    device_pool.check_same(read(devices="cpu,cpu"), ours, "rank 1 of 2, on host,")
    with pytest.raises(UserError, match=r"rank 1 of 2, on host, has another batch-size than rank 0: give all ranks"):
        device_pool.check_same(read(batch_size=3), ours, "rank 1 of 2, on host,")
    with pytest.raises(UserError, match=r"has another .*model.* than rank 0"):
        device_pool.check_same(ours | {"model": "0"}, ours, "rank 1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "fo"}, "run mode = 'fo' without it"),
        ({"devices": "cpu,cpu"}, "devices = 'cpu,cpu' and torchrun both split the queries"),
    ],
)
def test_what_ranks_cannot_share_is_refused_on_all_of_them(
    quick: Quick, tmp_path: Path, started: Callable[..., None], values: dict[str, Any], message: str
) -> None:
    for rank in (0, 1):
        started(rank, 2)
        with pytest.raises(UserError, match=message):
            if rank:
                device_pool.serve_rank(quick(**values))
            else:
                central.train(quick(**values), tmp_path / "run", ignore)
        assert not (tmp_path / "run").exists()


def test_other_ranks_than_the_first_and_other_commands_are_refused(
    quick: Quick,
    tmp_path: Path,
    started: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started(1, 2)
    with pytest.raises(UserError, match="rank 0 alone runs"):
        central.train(quick(), tmp_path / "run", ignore)
    monkeypatch.setattr("sys.argv", ["zofed", "simulate", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "of zofed's it takes train alone" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_rank_says_where_it_could_not_reach_the_first(started: Callable[..., None]) -> None:
    started(1, 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with ranks._store() as store:
        store.set(ranks._key(), json.dumps(["127.0.0.1", port, "00"]))
    with pytest.raises(UserError, match=f"cannot be reached at 127.0.0.1:{port}"):
        ranks.joined({})


def test_the_longest_wait_may_be_set_where_ranks_are_waited_for_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = config.resolve({"mode": "zo", "round-timeout": "900"})
    assert config.without_effect(given, ["round-timeout"], config.CENTRAL) == [
        "round-timeout = 900.0 has no effect here: it acts with a federation (zofed simulate, zofed run, flwr run), or "
        "with devices other than '' and mode = zo, or with torchrun and mode = zo"
    ]
    devices = config.resolve({"mode": "zo", "round-timeout": "900", "devices": "cpu,cpu"})
    assert config.without_effect(devices, ["round-timeout"], config.CENTRAL) == []
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert config.without_effect(given, ["round-timeout"], config.CENTRAL) == []


WAY = {"queries": 7, "perturbations_per_pass": 2, "eval_examples": 4, "eval_interval": 1000}


def rank_of(pid: int) -> int:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return -1
    return next((int(one[5:]) for one in environment if one.startswith(b"RANK=")), -1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for ranks in /proc")
def test_a_rank_that_is_killed_is_told_and_the_run_goes_on(quick: Quick, corpus: Path, tmp_path: Path) -> None:
    """Real processes of torchrun: their records are those of one, up to the kill and after it."""
    settings = quick(dataset=str(corpus), steps=100_000, **WAY)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "-m", "zofed", "train"]
    for key in ("dataset", "block_size", "batch_size", "seed", "save_interval", "steps", "threads", *WAY):
        command += [f"--{key.replace('_', '-')}", str(getattr(settings, key))]
    with subprocess.Popen(
        [*command, "--out", str(run)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    ) as launcher:
        try:
            deadline = time.monotonic() + 120
            while not (run / "metrics.csv").exists() or len((run / "metrics.csv").read_text().splitlines()) < 4:
                assert launcher.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            last = next(pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if rank_of(pid) == 2)
            os.kill(last, signal.SIGKILL)
            told, _ = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    summary = RunFolder(run).summary()
    # torchrun ends the others, at times before they have printed what the summary holds by then.
    assert summary["status"] in ("failed", "interrupted"), told
    if summary["status"] == "failed":
        error = summary["error"]
        assert "rank 2 of 3" in error and "has gone" in error, told
        assert f"torchrun ... -m zofed train --resume {run}" in error
    done = len(records_of(run))
    text = (run / "settings.toml").read_text()
    (run / "settings.toml").write_text(text.replace("steps = 100000", f"steps = {done + 2}"))
    resumed = subprocess.run(
        [*command[: command.index("train") + 1], "--resume", str(run)], capture_output=True, text=True, cwd=tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    alone = central.train(settings.model_copy(update={"steps": done + 2}), tmp_path / "alone", ignore)
    assert RunFolder(run).summary()["digest"] == alone["digest"]
    assert records_of(run) == records_of(tmp_path / "alone")
