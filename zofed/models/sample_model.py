"""The small pretrained model that ships with zofed: one JSON file, since a Flower bundle carries no other weights."""

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from zofed.base import shell
from zofed.base.errors import UserError
from zofed.base.files import shipped, write_whole
from zofed.data.encoding import default_cache
from zofed.data.tokenizers import SHIPPED_TOKENIZER

NAME = "sample"
SHIPPED = shipped("pretrained") / "sample.json"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def pack(folder: Path, file: Path = SHIPPED) -> None:
    """Write the model in a Hugging Face folder as text: its config, and each tensor rounded to bfloat16 as base64.

    Raises OSError where `file` cannot be written.
    """
    tensors = {
        name: {"shape": list(tensor.shape), "bfloat16": _text(tensor)}
        for name, tensor in sorted(load_file(folder / WEIGHTS).items())
    }
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(tensor)}" for name, tensor in tensors.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, f'{{"config": {json.dumps(config, sort_keys=True)},\n"tensors": {{\n{lines}\n}}}}\n')


def folder() -> Path:
    """The shipped model as a Hugging Face folder with its tokenizer, made in the cache where it is not yet there.

    Raises UserError where the file is missing or damaged, and OSError where the cache cannot be written.
    """
    try:
        text = SHIPPED.read_bytes()
    except FileNotFoundError as error:
        raise UserError(
            f"model = {NAME!r}: {str(SHIPPED)!r} is not there: bring it back from the project, or make it with "
            + shell.command("zofed", "make-model", SHIPPED.parent.parent)
        ) from error
    place = default_cache() / "models" / f"{NAME}-{hashlib.sha256(text).hexdigest()[:16]}"
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{NAME}-") as fresh:
            _unpack(text, Path(fresh))
            with suppress(OSError):  # another process was faster
                os.rename(fresh, place)
    return place


def _unpack(text: bytes, place: Path) -> None:
    try:
        packed = json.loads(text)
        tensors = {name: _tensor(tensor) for name, tensor in packed["tensors"].items()}
        config = json.dumps(packed["config"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"model = {NAME!r}: {str(SHIPPED)!r} is damaged: bring it back from the project") from error
    save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    (place / CONFIG).write_text(config, encoding="utf-8")
    for file in SHIPPED_TOKENIZER.glob("*.json"):
        shutil.copyfile(file, place / file.name)


def _text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()).decode()


def _tensor(packed: Mapping[str, Any]) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(base64.b64decode(packed["bfloat16"], validate=True)), dtype=torch.bfloat16)
    return raw.reshape(packed["shape"]).float()
