"""The wheel, installed in a folder of its own and used from an empty one: nothing of the checkout is needed."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from zofed.base import environment
from zofed.base.files import ROOT

pytestmark = pytest.mark.slow

NEEDED = (
    "zofed", "tokenizer", "pretrained", "datasets_subset", "tasks", "experiments", "pyproject.toml", "setup.py",
    "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "server_app.py", "client_app.py", "uv.toml",
)  # fmt: skip
LIMIT = 3 * 2**20  # bytes of a wheel


def python(*words: object, cwd: Path, **variables: str) -> str:
    """Output of Python with these words, which must end well."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tree/, a clone in which somebody has worked, and dist/, the two distributions made of it."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "tree").mkdir()
    for name in (*NEEDED, *(path.name for path in ROOT.glob("requirements*.txt"))):
        source, target = ROOT / name, folder / "tree" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "rows*"))
        else:
            shutil.copy(source, target)
    downloaded = folder / "tree" / "datasets_subset" / "downloaded"
    downloaded.mkdir()
    (downloaded / "rows-0.jsonl").write_text("somebody's\n")
    stale = folder / "tree" / "build" / "lib" / "zofed" / "removed.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("removed = True\n")
    python("-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "tree")
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python with the installed wheel, and the dependencies of this environment, in an empty folder."""
    place, empty = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    (wheel,) = (built / "dist").glob("*.whl")
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", place, wheel, cwd=empty)

    def run(*words: object) -> str:
        return python(*words, cwd=empty, PYTHONPATH=str(place))

    assert Path(run("-c", "import zofed; print(zofed.__file__)").strip()).is_relative_to(place)
    return run


def test_the_source_distribution_makes_the_wheel_of_the_tree_which_holds_all_that_ships(built: Path) -> None:
    python("-m", "build", "--no-isolation", "--wheel", "--outdir", built / "again", cwd=built / "tree")
    (of_source,), (of_tree,) = (built / "dist").glob("*.whl"), (built / "again").glob("*.whl")
    found = contents(of_tree)
    assert contents(of_source) == found and of_tree.stat().st_size < LIMIT
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "zofed").rglob("*.py")} | {"zofed/py.typed"}
    expected |= {f"zofed/shipped/tokenizer/{path.name}" for path in (ROOT / "tokenizer").glob("*.json")}
    expected |= {"zofed/shipped/pretrained/sample.json"}
    expected |= {f"zofed/shipped/tasks/{path.name}" for path in (ROOT / "tasks").glob("*.toml")}
    for folder, suffix in (("experiments", "toml"), ("datasets_subset", "jsonl")):
        shipping = [path for path in (ROOT / folder).rglob(f"*.{suffix}") if not path.name.startswith("rows")]
        expected |= {f"zofed/shipped/{path.relative_to(ROOT).as_posix()}" for path in shipping}
    assert {name for name in found if ".dist-info/" not in name} == expected
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    metadata = next(text.decode() for name, text in found.items() if name.endswith("/METADATA"))
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert len(needed) == len([line for line in requirements if not line.startswith("#")]) > 20
    for extra in ("quantised", "tensorboard"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_distributions_pass_the_check_of_the_index(built: Path) -> None:
    python("-m", "twine", "check", "--strict", *(built / "dist").iterdir(), cwd=built)


def test_an_incomplete_checkout_is_told_what_it_lacks(built: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(built / "tree", tmp_path / "tree")
    shutil.rmtree(tree / "tasks")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode and "nothing here is tasks/*.toml, which ships with zofed" in done.stdout + done.stderr


def test_what_ships_is_found_and_a_run_begins(installed: Callable[..., str]) -> None:
    code = "from zofed.base import environment as e; print(e.code().split()[:2], repr(e.commit()))"
    assert installed("-c", code) == f"{environment.code().split()[:2]} ''\n"  # a wheel's nodes and a clone's agree
    every = """
import contextlib, io, sys
from zofed.commands.cli import main
for line in sys.argv[1:]:
    sys.argv = ["zofed", *line.split()]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as ended:
        assert not ended.code, (line, ended.code)
    print(line, len(out.getvalue().splitlines()))
"""
    told = installed(
        "-c", every, "recipes", "copy quick", "tasks", "tasks show sst2", "check --steps 5", "sweep quick --dry-run",
        "sweep quick.toml --dry-run", "new my-app",
        "train --steps 2 --queries 2 --batch-size 2 --eval-examples 8 --save-interval 0 --device cpu --out one",
    )  # fmt: skip
    assert all(int(line.split()[-1]) > 3 for line in told.splitlines() if not line.startswith(("copy", "new"))), told


def test_flower_runs_the_app_that_an_installed_zofed_writes(installed: Callable[..., str]) -> None:
    installed("-m", "zofed", "new", "own")
    code = """
from zofed.deployment import flower_run
from pathlib import Path
import tomllib
own = tomllib.loads(Path("own/settings.toml").read_text())
print(flower_run.flower_run({**own, "rounds": 1, "eval-examples": 8, "out": str(Path("run").absolute())}, 2, 1))
"""
    assert installed("-c", code).endswith("finished:completed\n")
    assert '"status": "completed"' in installed("-c", "print(open('run/summary.json').read())")
