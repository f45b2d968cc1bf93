"""Where the rows of a run's metrics go besides its folder: TensorBoard, for whoever installed the extra."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zofed.base.errors import UserError
from zofed.config import Settings
from zofed.runs.tables import Row

SHOWN = {
    "loss": "loss/training (nats)",
    "eval_loss": "loss/held out (nats)",
    "lr": "step/rate",
    "grad_norm": "step/norm of the estimate",
    "cosine_direction": "step/cosine of a direction with the guide",
    "forward_equivalents": "cost/forward-equivalents (examples)",
    "seconds": "cost/seconds",
    "bytes": "cost/bytes",
}

Show = Callable[[Row], None]


def check(settings: Settings) -> None:
    """Raise UserError where the run asks for what is not installed."""
    if settings.tensorboard:
        _module()


@contextmanager
def opened(settings: Settings, folder: Path, show: Show) -> Iterator[Show]:
    """What to call with each row: `show`, and where the run asks for it the event files in folder/tensorboard.

    A resumed run writes over the rows that it takes anew.
    """
    if not settings.tensorboard:
        yield show
        return
    writer: Any = None

    def also(row: Row) -> None:
        nonlocal writer
        show(row)
        if writer is None:
            writer = _module().SummaryWriter(str(folder / "tensorboard"), purge_step=row["step"])
        for name, tag in SHOWN.items():
            if row.get(name) is not None:
                writer.add_scalar(tag, row[name], row["step"])
        if row.get("eval_loss") is not None:
            writer.flush()

    try:
        yield also
    finally:
        if writer is not None:
            writer.close()


def _module() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UserError(
            "tensorboard = true, but TensorBoard is not installed: pip install 'zofed[tensorboard]', or leave it out"
        ) from error
