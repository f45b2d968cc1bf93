"""Runs begun and read from Python, as in a notebook."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import zofed
from zofed.base.errors import UserError
from zofed.base.files import ROOT

Zofed = Callable[..., tuple[int, str, str]]
SMALL = {"queries": 2, "batch_size": 2, "block_size": 16, "eval_examples": 4, "eval_interval": 2, "device": "cpu"}


def test_a_run_from_python_is_the_run_of_the_command(
    zofed_command: Zofed, capfd: pytest.CaptureFixture[str], tmp_path: Path, corpus: Path
) -> None:
    run = zofed.train(**SMALL, steps=3, learning_rate=0.03, dataset=corpus, out=tmp_path / "a")
    assert "step 2/3  loss " in (shown := capfd.readouterr().out) and " steps/s  " in shown and " MiB" in shown
    words = [word for key, value in SMALL.items() for word in (f"--{key.replace('_', '-')}", value)]
    given = [*words, "--steps", 3, "--learning-rate", 0.03, "--dataset", corpus]
    assert zofed_command("train", *given, "--out", tmp_path / "b")[0] == 0
    other = zofed.Run(tmp_path / "b")
    assert run.summary["digest"] == other.summary["digest"] and run.settings.learning_rate == 0.03
    assert list(run.metrics["step"]) == [0, 1, 2, 3]
    assert list(run.metrics["loss"][1:]) == list(other.metrics["loss"][1:])
    picture = run.plot()
    assert picture.path == run.path / "quick.png" and picture._repr_png_().startswith(b"\x89PNG")
    capfd.readouterr()
    assert zofed.train(resume=run.path, quiet=True).summary == run.summary


@pytest.mark.parametrize(
    ("module", "quiet", "bar"), [("ipykernel", False, True), ("ipykernel", True, False), ("x", False, False)]
)
def test_a_notebook_sees_a_bar_and_a_line_at_each_evaluation(
    module: str, quiet: bool, bar: bool, tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, module, sys)
    zofed.train(**SMALL, steps=3, dataset=corpus, out=tmp_path / "run", quiet=quiet)
    told, drawn = capfd.readouterr()
    assert ("step 2/3  loss " in told) is not quiet
    assert ("/3 [" in drawn) is bar, drawn


def test_a_federation_from_python_goes_on_too(tmp_path: Path, corpus: Path) -> None:
    run = zofed.simulate(**SMALL, rounds=2, dataset=corpus, out=tmp_path / "run")
    assert run.summary["status"] == "completed" and len(run.summary["client_digests"]) == 2
    assert zofed.simulate(resume=run.path).summary["digest"] == run.summary["digest"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lr": 0.1}, "unknown setting 'lr': did you mean 'learning-rate'?"),
        ({"rounds": 3}, "rounds = 3 has no effect here: it acts with a federation"),
        ({"queries": 0}, "queries = 0: should be greater than or equal to 1"),
        ({"resume": "x", "steps": 3}, "--resume x goes on with the run's own settings: give no others"),
    ],
)
def test_settings_in_code_are_refused_as_typed_ones_are(given: dict[str, object], told: str) -> None:
    with pytest.raises(UserError) as raised:
        zofed.train(**given)  # type: ignore[arg-type]
    assert str(raised.value).startswith(told)


def test_the_names_of_the_package_are_listed_without_loading_torch() -> None:
    code = "import sys, zofed; print(*dir(zofed)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted(["__version__", *zofed._HOMES])
