"""The notebooks run from their first cell to the last, shortened, and are kept without what they showed."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zofed.base.files import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SHORT = {
    "STEPS = 60": "STEPS = 6", "STEPS = 12": "STEPS = 3", "ROUNDS = 20": "ROUNDS = 2", "reviews[:1000]": "reviews[:40]",
}  # fmt: skip


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"fine_tune", "federation", "journal"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs_and_explains_itself(path: Path) -> None:
    every = cells(path)
    assert every[0]["cell_type"] == "markdown" and every[0]["source"][0].startswith("# ")
    for cell in every:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            compile("".join(cell["source"]), str(path), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    code = "\n".join("".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    for whole, short in SHORT.items():
        code = code.replace(whole, short)
    assert not re.search(r"^(STEPS|ROUNDS) = \d\d", code, re.MULTILINE)
    (tmp_path / "cells.py").write_text("import matplotlib\nmatplotlib.use('agg')\n" + code, encoding="utf-8")
    told = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert told.returncode == 0, told.stderr[-2000:]
