"""What tests share: a tiny corpus on disk, quick settings, a cache of their own."""

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zofed import config
from zofed.commands import cli
from zofed.config import Settings
from zofed.data import documents
from zofed.federated import server
from zofed.training import finalize

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, where tests of Ctrl-C would fail
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `first(n)` the first n cases are fast; the others are slow tests."""
    cases: Counter[str] = Counter()
    for item in items:
        if mark := item.get_closest_marker("first"):
            function = item.nodeid.partition("[")[0]
            cases[function] += 1
            if cases[function] > mark.args[0]:
                item.add_marker("slow")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("ZOFED_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def whole_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that refuses its settings shortens every later traceback of its process, which here goes on."""
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take a third of the time of a run this small: only tests marked `pictures` have them drawn."""
    if request.node.get_closest_marker("pictures") is None:
        for module in (finalize, server):
            monkeypatch.setattr(module, "draw", lambda *_: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models far too small for two threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON-lines file of 40 short documents from the shipped data."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    chosen = documents.load_documents("sample-dclm")[:40]
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in chosen), encoding="utf-8")
    return path


@pytest.fixture
def quick(corpus: Path) -> Callable[..., Settings]:
    """Settings of a run that takes a second; keyword arguments (snake_case) override them."""

    def make(**overrides: Any) -> Settings:
        values = {
            "dataset": str(corpus),
            "block-size": 16,
            "batch-size": 2,
            "queries": 3,
            "steps": 6,
            "rounds": 6,
            "learning-rate": 0.01,
            "eval-interval": 3,
            "eval-examples": 8,
            "save-interval": 4,
            "device": "cpu",
        }
        return config.resolve(values | {key.replace("_", "-"): value for key, value in overrides.items()})

    return make


@pytest.fixture
def zofed_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """The command itself, in this process: status, standard output and standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["zofed", *map(str, arguments)])
        capfd.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
        out, errors = capfd.readouterr()
        return status, out, errors

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
