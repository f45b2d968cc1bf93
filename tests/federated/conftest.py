"""Runs of a federation that wait for nobody; a module asks for each of these by its name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from federations import Meddling, Quick

from zofed.config import Settings
from zofed.federated import client, membership
from zofed.runs import pictures


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Nodes that come are met at once, and nobody draws a picture."""
    monkeypatch.setattr(membership, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(membership, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(membership, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(pictures, "plot_loss", lambda *_, **__: None)


@pytest.fixture
def quick(quick: Quick) -> Quick:
    """Still smaller."""
    return lambda **changes: quick(**{"queries": 2, "eval_interval": 6, "eval_examples": 2} | changes)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Meddling, Settings]]]:
    """A grid of some clients and the settings of a run over it, in a folder of its own."""

    def make(settings: Settings, nodes: int = 2, name: str = "run", **changes: Any) -> tuple[Meddling, Settings]:
        client.forget()
        settings = settings.model_copy(update={"out": str(tmp_path / name), "clients": nodes} | changes)
        return Meddling(settings, nodes), settings

    yield make
    client.forget()
