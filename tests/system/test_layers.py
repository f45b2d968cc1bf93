"""Who may import what, and what the app bundle holds."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import zofed
from zofed import config

PACKAGE = Path(zofed.__file__).parent
ROOT = PACKAGE.parent

CORE_KNOWS = {"torch", "numpy", "safetensors", "zofed"} | set(sys.stdlib_module_names)
# What Flower documents for apps; everything else of it may change with any version.
FLOWER_PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
FLOWER_PRIVATE_KNOWN_TO = {"federated/flower_internals.py", "federated/flower_messages.py"}
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def imported(module: str) -> set[str]:
    """Modules that a module of zofed imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_core_knows_torch_alone() -> None:
    """Who may import whom within zofed, the contracts in pyproject.toml say, which `make lint` holds."""
    core = [module for module in MODULES if module.startswith("core/")]
    assert len(core) > 15
    for module in core:
        assert {name.split(".")[0] for name in imported(module)} <= CORE_KNOWS, module


def test_what_flower_keeps_private_is_used_in_two_modules_alone() -> None:
    for module in MODULES:
        private = {name for name in imported(module) if name.split(".")[0] == "flwr"} - FLOWER_PUBLIC
        assert not private or module in FLOWER_PRIVATE_KNOWN_TO, f"{module} must not import {private}"


def test_what_zofed_imports_is_required_by_name() -> None:
    """What comes along with another package only, that one may leave out in its next release."""
    files = {path.name: path.read_text() for path in ROOT.glob("requirements*.txt")}
    for name in ("requirements-dev.txt", "requirements-docs.txt"):  # the others are what zofed needs, and its extras
        del files[name]
    lines = [line for text in files.values() for line in text.splitlines() if not line.startswith("#")]
    required = {re.split(r"[^a-z0-9-]", line)[0] for line in lines}
    found = {name.split(".")[0] for module in MODULES for name in imported(module)}
    homes = packages_distributions()
    foreign = found - set(sys.stdlib_module_names) - {"zofed"}
    assert len(foreign) > 15 and foreign <= homes.keys()
    names = {name: {home.lower().replace("_", "-") for home in homes[name]} for name in foreign}
    assert {name: homes for name, homes in names.items() if not homes & required} == {}


def test_a_stranger_sees_the_architecture_from_ls() -> None:
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 17, sorted(entries)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in PACKAGE.glob("*/__init__.py"):
        sentence = ast.get_docstring(ast.parse(path.read_text()))
        modules = sorted(module.stem for module in path.parent.glob("*.py") if module != path)
        assert f"| `zofed/{path.parent.name}/` | {sentence} | {', '.join(modules)} |" in page


@pytest.mark.slow
def test_the_core_and_the_federation_run_without_flower() -> None:
    code = "import sys, zofed.federated.protocol, zofed.training.central; print('flwr' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_help_waits_for_no_large_library() -> None:
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); import zofed.__main__ as m"
    )
    told = subprocess.run(
        [sys.executable, "-c", f"{code}; m.main()", "--help"], capture_output=True, text=True, check=True
    )
    assert "simulate" in told.stdout
    assert not {"torch", "transformers", "datasets", "flwr", "pandas", "matplotlib"} & set(told.stderr.split())


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports_what_there_is(path: Path) -> None:
    importlib.import_module(f"benchmarks.{path.stem}")


def test_nothing_unpickles_or_runs_code_of_a_model() -> None:
    for path in [*PACKAGE.rglob("*.py"), ROOT / "server_app.py", ROOT / "client_app.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("torch", "load"), ("pickle", "load"), ("pickle", "loads")}


def test_flower_has_the_settings_of_the_schema() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text.split("[tool.flwr.app.config]\n")[1].split("# --- end of run settings")[0]
    assert block == config.documented_toml(), "paste the output of `zofed settings` between the two marks"


def bundle(folder: Path) -> dict[str, bytes]:
    """What `flwr build` packs of an app folder, by name."""
    for old in folder.glob("*.fab"):
        old.unlink()
    flwr = Path(sys.executable).parent / "flwr"
    subprocess.run([str(flwr), "build"], cwd=folder, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.fab"))) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.mark.slow
def test_the_app_bundle_holds_the_app_alone_whatever_else_lies_in_the_folder(tmp_path: Path) -> None:
    app = tmp_path / "zofed"
    tracked = ("zofed", "tokenizer", "pretrained", "datasets_subset", "tasks")
    for name in tracked:
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "server_app.py", "client_app.py", ".gitignore"):
        shutil.copy(ROOT / name, app / name)
    before = bundle(app)
    expected = {"pyproject.toml", "README.md", "LICENSE", "server_app.py", "client_app.py"}
    expected |= {f"zofed/{module}" for module in MODULES}
    expected |= {f"tokenizer/{path.name}" for path in (ROOT / "tokenizer").glob("*.json")}
    expected |= {f"pretrained/{path.name}" for path in (ROOT / "pretrained").glob("*.json")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "datasets_subset").glob("**/*.jsonl")}
    expected |= {f"tasks/{path.name}" for path in (ROOT / "tasks").glob("*.toml")}
    assert {name for name in before if not name.startswith(".info")} == expected
    assert sum(map(len, before.values())) < 10 * 2**20
    for folder in ("data", "downloads", "runs/one", "checkpoints"):
        (app / folder).mkdir(parents=True)
        (app / folder / "more.jsonl").write_bytes(b'{"text": "more"}\n' * 800_000)
        (app / folder / "notes.md").write_text("notes")
    assert bundle(app) == before
