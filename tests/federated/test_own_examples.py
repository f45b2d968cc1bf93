"""The examples of apps of one's own: they run, and cost few lines beyond what Flower's FedAvg takes."""

import difflib
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import Context, RecordDict

import zofed
from zofed.federated.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from zofed.flower import simulate
from zofed.runs.run_folder import RunFolder

ROOT = Path(zofed.__file__).parents[1]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.usefixtures("no_waiting")


def code(package: str, name: str) -> list[str]:
    """The lines of a file of an app that say something, its package's name left out."""
    text = next(EXAMPLES.glob(f"*/{package}/{name}")).read_text().replace(package, "digits")
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith(('"""', "#"))]


def test_an_app_takes_few_lines_beyond_fedavg() -> None:
    beyond, less = [], []
    for name in ("client_app.py", "server_app.py", "task.py"):
        differ = difflib.ndiff(code("fedavg_digits", name), code("zofed_digits", name))
        for line in differ:
            {"+ ": beyond, "- ": less}.get(line[:2], []).append(line)
    assert len(beyond) <= 10, "\n".join(beyond)
    assert len(less) > 2 * len(beyond)


@pytest.fixture
def digits() -> Iterator[None]:
    """The packages of both apps can be imported."""
    pytest.importorskip("sklearn")
    paths = [str(EXAMPLES / name) for name in ("flower_digits", "flower_digits_fedavg")]
    sys.path[:0] = paths
    yield
    for path in paths:
        sys.path.remove(path)


def configured(folder: str) -> dict[str, Any]:
    """An app's run configuration, flat as Flower gives it."""
    found = tomllib.loads((EXAMPLES / folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    own = found.pop("zofed", {})
    return found | {f"zofed.{key}": value for key, value in own.items()}


def test_digits_run_by_forward_passes(digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zofed_digits import client_app, server_app  # type: ignore[import-not-found]

    changes = {"zofed.rounds": 2, "zofed.out": str(tmp_path / "run"), "zofed.eval-interval": 2}
    simulate(server_app.app, client_app.app, 10, configured("flower_digits") | changes)
    summary = RunFolder(tmp_path / "run").summary()
    assert set(summary["client_digests"].values()) == {summary["digest"]} and len(summary["client_digests"]) == 10
    assert f"accuracy {summary['accuracy']}"[:14] in capsys.readouterr().out


def test_digits_run_by_fedavg(digits: None, capsys: pytest.CaptureFixture[str]) -> None:
    from fedavg_digits import client_app, server_app  # type: ignore[import-not-found]

    run_config = configured("flower_digits_fedavg") | {"num-server-rounds": 1}
    grid = LocalGrid(client_app.app, 10, run_config)
    server_app.app(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), run_config))
    assert 0 < float(capsys.readouterr().out.split()[-1]) <= 1


def test_the_clients_hold_two_or_three_digits_each(digits: None) -> None:
    from zofed_digits import task  # type: ignore[import-not-found]

    held = [torch.cat([labels for _, labels in task.load_data(place(index))]) for index in range(10)]
    assert sum(map(len, held)) == 1437
    assert max(len(own.unique()) for own in held) <= 4 and len(torch.cat(held).unique()) == 10


def place(index: int) -> Context:
    return Context(RUN_ID, SERVER_NODE, {"partition-id": index, "num-partitions": 10}, RecordDict(), {})


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHORT = {"zofed.rounds": 2, "zofed.batch-size": 4, "zofed.queries": 2}
FILES = {
    "flower_tabular": SHORT | {"zofed.client-held-out-fraction": 0.2},
    "flower_encoder": SHORT | {"zofed.mode": "subspace", "zofed.subspace-size": 16, "zofed.subspace-interval": 2},
}


@pytest.mark.parametrize(("name", "run_config"), FILES.items(), ids=FILES)
def test_an_app_in_one_file_runs(
    name: str, run_config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "flower_tabular":
        pytest.importorskip("sklearn")
    module = example(name)
    simulate(module.server_app, module.client_app, 2, run_config | {"zofed.out": str(tmp_path / "run")})
    summary = RunFolder(tmp_path / "run").summary()
    assert set(summary["client_digests"].values()) == {summary["digest"]} == {summary["replay_digest"]}
    assert summary["digest"][:16] in capsys.readouterr().out


@pytest.mark.slow
def test_flwr_run_of_the_digits_equals_the_same_apps_in_one_process(
    digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zofed_digits import client_app, server_app  # type: ignore[import-not-found]

    from zofed.deployment import app_folder, flower_commands, flower_run

    changes: dict[str, Any] = {"zofed.rounds": 2, "zofed.clients": 2, "zofed.eval-interval": 2}
    local = configured("flower_digits") | changes | {"zofed.out": str(tmp_path / "local")}
    simulate(server_app.app, client_app.app, 2, local)
    monkeypatch.setattr(app_folder, "ready", lambda home: EXAMPLES / "flower_digits")
    status = flower_run.flower_run(changes | {"zofed.out": str(tmp_path / "ray")}, nodes=2, cpus_per_node=1)
    assert status == flower_commands.COMPLETED
    ray, here = (RunFolder(tmp_path / name).summary() for name in ("ray", "local"))
    assert ray["digest"] == here["digest"] == ray["replay_digest"]
    assert ray["client_digests"] == {"0": ray["digest"], "1": ray["digest"]}
    assert ray["accuracy"] == here["accuracy"]
