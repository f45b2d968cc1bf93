"""What dashboards are told: by a stand-in, and by each library where it is installed (they are extras)."""

import json
import sqlite3
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zofed import config
from zofed.base.errors import UserError
from zofed.base.files import ROOT
from zofed.config import Settings
from zofed.runs import sinks
from zofed.runs.tables import read_table
from zofed.training import central


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Calls of every writer: the folder with the first step, then (tag, value, step)."""
    calls: list[tuple[Any, ...]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            calls.append((tag, value, step))

        def flush(self) -> None:
            calls.append(("flush",))

        def close(self) -> None:
            calls.append(("close",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return calls


def test_each_row_of_the_metrics_is_told_once_and_a_resumed_run_goes_on(
    quick: Callable[..., Settings], tmp_path: Path, told: list[tuple[Any, ...]]
) -> None:
    shown: list[int] = []
    settings, out = quick(steps=3, report_to="tensorboard"), tmp_path / "run"
    central.train(settings, out, lambda row: shown.append(row["step"]))
    assert shown == [0, 1, 2, 3] and told[0] == (str(out / "tensorboard"), 0) and told[-1] == ("close",)
    losses = [call[1:] for call in told if call[0] == "loss/training (nats)"]
    rows = read_table(out / "metrics.csv")
    assert losses == [(float(row["loss"]), int(row["step"])) for row in rows if row["loss"]]
    assert told.count(("flush",)) == sum(bool(row["eval_loss"]) for row in rows)
    told.clear()
    text = (out / "settings.toml").read_text()
    (out / "settings.toml").write_text(text.replace("steps = 3", "steps = 5"))
    central.resume(out, lambda row: None)
    assert told[0] == (str(out / "tensorboard"), 4)
    assert [call[2] for call in told if call[0] == "loss/training (nats)"] == [4, 5]


def test_without_the_extra_a_run_says_so_before_it_writes_anything(
    quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'zofed\[tensorboard\]'"):
        central.train(quick(report_to="tensorboard"), tmp_path / "run", lambda row: None)
    assert not (tmp_path / "run").exists()
    sinks.check(quick())


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_each_dashboard_is_asked_for_by_its_extra(
    quick: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"report-to = '{name}', .*pip install 'zofed\[{name}\]'"):
        sinks.check(quick(report_to=name))
    assert (ROOT / f"requirements-{name}.txt").is_file() and f"requirements-{name}.txt" in (
        ROOT / "pyproject.toml"
    ).read_text()


def test_a_dashboard_that_fails_on_the_way_ends_no_run(
    quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[tuple[Any, ...]]
) -> None:
    class Away:
        module = "json"

        def __init__(self, *_: Any) -> None:
            pass

        def write(self, step: int, figures: Any) -> None:
            raise OSError("the server is gone\nand more")

        def close(self, completed: bool) -> None:
            raise AssertionError("it was left out")

    monkeypatch.setitem(sinks.SINKS, "mlflow", Away)
    shown: list[int] = []
    with pytest.warns(UserWarning, match=r"report-to = 'mlflow' took no more figures \(the server is gone\): the run"):
        central.train(
            quick(steps=2, report_to="mlflow, tensorboard"), tmp_path / "run", lambda row: shown.append(row["step"])
        )
    assert shown == [0, 1, 2] and [call[2] for call in told if call[0] == "step/rate"] == [1, 2]


def test_what_is_no_dashboard_and_what_cannot_begin_is_said(
    quick: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(sinks.SINKS) == set(config.SINKS)
    with pytest.raises(UserError, match="report-to: unknown dashboard 'wandbb': did you mean 'wandb'"):
        config.resolve({"report-to": "tensorboard, wandbb"})

    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"report-to = 'wandb' cannot begin \(no API key\).*WANDB_MODE=offline"):
        central.train(quick(report_to="wandb"), tmp_path / "run", lambda row: None)
    central.train(quick(), tmp_path / "run", lambda row: None)  # the folder is free again


def test_the_former_setting_of_a_run_is_understood(tmp_path: Path) -> None:
    for said, meant in (("true", "tensorboard"), ("false", "")):
        (tmp_path / "settings.toml").write_text(f"tensorboard = {said}\n")
        assert config.read_own_toml(tmp_path / "settings.toml") == {"report-to": meant}


def written(tmp_path: Path, name: str) -> str:
    """What a run in two parts is called by a dashboard that was told six steps; skips where it is not installed."""
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'zofed[{name}]'")
    settings = config.resolve({"report-to": name})
    for steps in ((0, 1, 2), (3, 4)):
        with sinks.opened(settings, tmp_path, lambda row: None) as show:
            for step in steps:
                show({"step": step, "loss": 3.0 - step, "eval_loss": 2.0 if step == 4 else None})
    return json.loads((tmp_path / "sinks.json").read_text())["name"]


def test_weights_and_biases_keeps_an_offline_run_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    name = written(tmp_path, "wandb")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    for file, wanted in zip(files, (b"loss/training (nats)", b"loss/held out (nats)"), strict=True):
        end = time.monotonic() + 60  # its own process still writes when it has been told the end
        while wanted not in file.read_bytes() and time.monotonic() < end:
            time.sleep(0.1)
        assert wanted in file.read_bytes()


def test_trackio_keeps_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    name = written(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "zofed.db") as base:
        rows = base.execute("select step, metrics from metrics where run_name = ? order by step", (name,)).fetchall()
    assert [(step, json.loads(text)["loss/training (nats)"]) for step, text in rows] == [(s, 3.0 - s) for s in range(5)]


def test_mlflow_keeps_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which is quicker to make than a data base
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    name = written(tmp_path, "mlflow")
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("zofed").experiment_id])
    assert run.info.run_name == name and run.info.status == "FINISHED" and run.data.params["queries"] == "32"
    history = client.get_metric_history(run.info.run_id, "loss/training")
    assert [(each.step, each.value) for each in history] == [(step, 3.0 - step) for step in range(5)]
