"""Who may import what, and what the app bundle holds."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import zofed
from zofed import config

PACKAGE = Path(zofed.__file__).parent
ROOT = PACKAGE.parent

COMMANDS = {f"{name}_commands" for name in ("model", "data", "keys", "deployment", "experiment")}
# Third-party packages that only the named modules may import; the core knows torch and numpy alone.
KNOWN_TO = {
    "flwr": {"messages", "members", "exchanges", "traffic", "server", "client", "grid", "warm"}
    | {"flower_internals", "flower_messages"},
    "ray": set(),
    "transformers": {"mixing", "models", "saved", "limits", "tokenizers", "data", "task", "generate", "model_info"},
    "tokenizers": {"generate"},
    "datasets": {"rows", "download", "partitions"},
    "flwr_datasets": {"partitions"},
    "huggingface_hub": {"download", "hub"},
    "pandas": {"rows", "plots"},
    "matplotlib": {"plots", "plot_style", "plot_run"},
    "seaborn": {"plots", "plot_style"},
    "typer": {"cli", "options"} | COMMANDS,
    "rich": {"cli", "options"} | COMMANDS,
    "pydantic": {"config"},
    "cryptography": {"keys", "flower_internals"},
}
# The core: torch, numpy, and of zofed itself those that stand before it here.
CORE = (
    "errors", "arithmetic", "files", "compact", "directions", "logits", "copies", "orthogonal", "perturbed",
    "estimators", "optimizers", "checksums", "records", "journal", "merging", "soundness", "worker", "budget",
    "subspace", "diagnostics",
)  # fmt: skip
CORE_KNOWS = {"torch", "numpy"} | set(sys.stdlib_module_names)
# What Flower documents for apps; everything else of it may change with any version.
FLOWER_PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp"}
FLOWER_PRIVATE_KNOWN_TO = {"flower_internals", "flower_messages"}


def imported(module: str) -> set[str]:
    """Top-level packages a module of zofed imports anywhere, those of zofed by their full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"zofed.{alias.name}" for alias in node.names} if node.module == "zofed" else {node.module}
    return names


MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_it_may_know(module: str) -> None:
    tops = {name.split(".")[0] for name in imported(module)}
    for package, allowed in KNOWN_TO.items():
        assert package not in tops or module in allowed, f"{module} must not import {package}"
    if module not in FLOWER_PRIVATE_KNOWN_TO:
        private = {name for name in imported(module) if name.split(".")[0] == "flwr"} - FLOWER_PUBLIC
        assert not private, f"{module} must not import {private}"


@pytest.mark.parametrize(("place", "module"), list(enumerate(CORE)), ids=CORE)
def test_the_core_knows_torch_and_the_core_before_it_alone(place: int, module: str) -> None:
    for name in imported(module):
        top, _, below = name.partition(".")
        known = below in CORE[:place] if top == "zofed" else top in CORE_KNOWS
        assert known, f"{module} must not import {name}"


@pytest.mark.slow
def test_the_core_and_the_federation_run_without_flower() -> None:
    code = "import sys, zofed.trainer, zofed.federation, zofed.central; print('flwr' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_nothing_unpickles_or_runs_code_of_a_model() -> None:
    for path in [*PACKAGE.glob("*.py"), ROOT / "server_app.py", ROOT / "client_app.py"]:
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
    tracked = ("zofed", "tokenizer", "datasets_subset")
    for name in tracked:
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "server_app.py", "client_app.py", ".gitignore"):
        shutil.copy(ROOT / name, app / name)
    before = bundle(app)
    expected = {"pyproject.toml", "README.md", "LICENSE", "server_app.py", "client_app.py"}
    expected |= {f"zofed/{path.name}" for path in PACKAGE.glob("*.py")}
    expected |= {f"tokenizer/{path.name}" for path in (ROOT / "tokenizer").glob("*.json")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "datasets_subset").glob("**/*.jsonl")}
    assert {name for name in before if not name.startswith(".info")} == expected
    assert sum(map(len, before.values())) < 10 * 2**20
    for folder in ("data", "downloads", "runs/one", "checkpoints"):
        (app / folder).mkdir(parents=True)
        (app / folder / "more.jsonl").write_bytes(b'{"text": "more"}\n' * 800_000)
        (app / folder / "notes.md").write_text("notes")
    assert bundle(app) == before
