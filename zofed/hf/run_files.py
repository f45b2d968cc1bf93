"""What lies beside a Trainer's checkpoints: the journal, and the weights that it starts from.

    OUTPUT_DIR/run.zofed                every step
    OUTPUT_DIR/base-DIGEST.safetensors  what trains, before the first of them; by the digest of the weights
    OUTPUT_DIR/run-1.zofed, ...         journals set aside, whole: of earlier runs, and from before a resume
    OUTPUT_DIR/checkpoint-N/zofed.json  which place in the journal the checkpoint is

A checkpoint's weights are a convenience: resuming replays the journal.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zofed.base.errors import UserError
from zofed.base.files import sync_folder, write_private, write_whole
from zofed.base.parsing import from_json
from zofed.core.digests import named_parameters
from zofed.core.journal import Genesis, Journal, genesis_chain, read
from zofed.hf.settings import ZerothOrderConfig
from zofed.runs import checkpoints
from zofed.training.zeroth_order import ZerothOrder, replay

logger = logging.getLogger(__name__)

JOURNAL = "run.zofed"
PLACE = "zofed.json"  # in a checkpoint's folder


@dataclass(frozen=True)
class Place:
    """Where in a journal a checkpoint stands. head: chain after its last record. digest: of all weights, both hex."""

    step: int
    head: str
    digest: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, zo: ZerothOrder, config: ZerothOrderConfig) -> "Place":
        """Where a run stands now."""
        return cls(zo.replica.round, zo.replica.head.hex(), zo.digest(), dataclasses.asdict(config))

    @classmethod
    def read(cls, checkpoint: Path) -> "Place":
        """That of a checkpoint's folder. Raises UserError where it has none."""
        try:
            return cls(**from_json((checkpoint / PLACE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{checkpoint / PLACE} is not there or spoilt, so this is no checkpoint of a zeroth-order run: load "
                "its weights with from_pretrained and begin a run of its own"
            ) from error

    def write(self, checkpoint: Path) -> None:
        """Into the checkpoint's folder."""
        write_whole(checkpoint / PLACE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def begin(folder: Path) -> Path:
    """Where a new run's journal goes; one of an earlier run is set aside, whole. Raises UserError if it is in use."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOURNAL
    if path.exists():
        with Journal.open(path) as earlier:
            if earlier.entries:
                aside = _unused(folder)
                path.rename(aside)
                logger.warning(
                    "%s held %d steps of an earlier run: it is now %s", path, len(earlier.entries), aside.name
                )
            else:
                path.unlink()
            sync_folder(folder)
    return path


def cut_back(folder: Path, place: Place) -> Path:
    """The journal that ends where a checkpoint stands; if it went on from there, what it was stays beside it, whole.

    Raises UserError where no journal of the folder holds that place, or another process writes it.
    """
    path = folder / JOURNAL
    others = [each for each in sorted(folder.glob("run-*.zofed"), reverse=True) if _ends(each, place.head)]
    if not (path.exists() and _ends(path, place.head)):
        if not others:
            raise UserError(
                f"no journal in {folder} holds step {place.step} of this checkpoint: bring back {JOURNAL} of its run, "
                "or load the checkpoint's weights with from_pretrained and begin a run of its own"
            )
        begin(folder)
        write_private(path, others[0].read_bytes())
    with Journal.open(path) as journal:
        kept = [entry.chain.hex() for entry in journal.entries].index(place.head) + 1 if place.step else 0
        later = journal.entries[kept:]
        if not later:
            return path
        aside = _unused(folder)
        raw = path.read_bytes()
        write_private(aside, raw)
        write_private(path, raw[: -sum(len(entry.raw) for entry in later)])
        sync_folder(folder)
    logger.warning(
        "%s goes on from step %d; with its %d later steps it is kept as %s", path, place.step, len(later), aside.name
    )
    return path


def _ends(path: Path, head: str) -> bool:
    """Whether a journal passes through this place."""
    contents = read(path)
    return head in {genesis_chain(contents.genesis).hex(), *(entry.chain.hex() for entry in contents.entries)}


def _unused(folder: Path) -> Path:
    numbers = (int(each.stem[4:]) for each in folder.glob("run-*.zofed") if each.stem[4:].isdigit())
    return folder / f"run-{max(numbers, default=0) + 1}.zofed"


def base_file(folder: Path, genesis: Genesis) -> Path:
    """The file of the trainable tensors that a journal starts from."""
    return folder / f"base-{genesis['weights'][:16]}.safetensors"


def keep_base(folder: Path, zo: ZerothOrder) -> None:
    """Write what trains, as it is before the first step: an adapter or a head may have been drawn at random."""
    path = base_file(folder, zo.replica.genesis)
    if not path.exists():
        checkpoints.write(folder, path.stem, zo.replica.parameters, {})


@torch.no_grad()
def load_base(model: nn.Module, folder: Path, genesis: Genesis) -> None:
    """Put what a run trained back to where its journal starts. Raises UserError where that cannot be had."""
    path = base_file(folder, genesis)
    found = checkpoints.read(path)
    if found is None:
        raise UserError(
            f"{path}, the tensors that the run's journal starts from, is not there or damaged: restore it from a copy"
        )
    parameters = named_parameters(model)
    for name, tensor in found[0].items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != tensor.shape:
            shape = "none" if parameter is None else f"one of shape {tuple(parameter.shape)}"
            raise UserError(
                f"the run trained {name!r} of shape {tuple(tensor.shape)}, and the model at hand has {shape}: give the "
                "model (and the adapter) that the run began with"
            )
        parameter.copy_(tensor)


def rebuild(model: nn.Module, folder: str | Path) -> str:
    """Move a model through all steps of a Trainer's run, from its output folder; returns the SHA-256 of the weights.

    model: the one the run began with; what trained may have any values. Raises UserError where the rest of its weights
    are not those of the run, or a file is missing or damaged.
    """
    path = Path(folder) / JOURNAL
    load_base(model, Path(folder), read(path).genesis)
    return replay(model, path)
