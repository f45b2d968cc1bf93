"""How the shipped model was made: backpropagation on made-up opinions, in minutes on one core."""

import tempfile
from pathlib import Path
from typing import Any

from zofed import config
from zofed.data.sample_data import write_rows
from zofed.data.sample_opinions import opinions
from zofed.models import sample_model
from zofed.training import central
from zofed.training.central import Show

RECIPE: dict[str, Any] = {
    "mode": "fo",
    "optimizer": "adamw",
    "learning-rate": 0.005,
    "schedule": "cosine",
    "batch-size": 32,
    "block-size": 64,
    "steps": 1500,
    "eval-interval": 500,
    "save-interval": 0,
    "threads": 1,
    "device": "cpu",
}


def make_sample_model(file: Path, show: Show) -> None:
    """Pretrain the model that `model = sample` names and write it to `file`.

    The text is the same everywhere, the last bits of the weights are this machine's. show: called with each row of the
    metrics. Raises OSError where `file` cannot be written.
    """
    with tempfile.TemporaryDirectory() as place:
        text, run = Path(place) / "opinions.jsonl", Path(place) / "run"
        write_rows(text, opinions())
        central.train(config.resolve(RECIPE | {"dataset": str(text), "out": str(run)}), run, show)
        sample_model.pack(run / "model", file)
