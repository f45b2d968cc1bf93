"""A finished or cut run as a folder for others: the merged model, or what training changed as a LoRA; with its card."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from zofed import config
from zofed.base.errors import DiskError, UserError
from zofed.base.files import sync_folder, whole_folder
from zofed.config import Settings
from zofed.core import journal, kinds
from zofed.core.digests import weights_digest
from zofed.core.journal import Genesis
from zofed.core.records import Record, Seeded, Skipped
from zofed.core.replica import NotKept, Replica
from zofed.data import encoding
from zofed.models import lora_files, low_rank, sources, spec
from zofed.models.classifier import PooledClassifier
from zofed.models.low_rank import Delta
from zofed.models.spec import ModelSpec
from zofed.runs import model_card
from zofed.runs.model_card import Exported
from zofed.runs.run_folder import RunFolder
from zofed.training import export_texts
from zofed.training.finalize import base_replica, replay_run
from zofed.training.paths import absolute_path
from zofed.training.process import prepare_process
from zofed.training.tasks import TASKS, tokenizer_of


@dataclass(frozen=True)
class End:
    """A run's weights at its last record. steps: how many records moved them. bound: the rank that the change of a
    matrix has at most, rounding aside; None where nothing is known of it. has_ended: whether the run has."""

    model: Any
    digest: str
    round: int
    steps: int
    bound: int | None
    has_ended: bool


def end_of(folder: RunFolder, base: str = "", threads: int = 1) -> End:
    """The weights that a run ended with, of `model/` in its folder, or of a replay where there is none or it has not
    ended.

    base: where the saved model that the run began with lies now. Raises UserError for a run that has moved nothing yet,
    one whose journal cannot be replayed as far as it goes, or gives other weights than it ended with.
    """
    prepare_process(threads)
    contents = journal.read(folder.journal)
    records = [entry.record for entry in contents.entries]
    steps = sum(not isinstance(record, Skipped) for record in records)
    if not steps:
        raise UserError(f"{folder.path} holds no step yet, so that there is nothing to export: {folder.go_on()}")
    expected = folder.summary().get("digest")

    def end(model: nn.Module, digest: str) -> End:
        bound = rank_bound(contents.genesis, records)
        return End(model, digest, records[-1].round, steps, bound, has_ended=expected is not None)

    if expected and folder.has_model():
        model = _saved_model(folder, contents.genesis)
        if weights_digest(model) == expected:
            return end(model, expected)
    try:
        replica, _ = replay_run(folder, base, threads)
    except NotKept as error:
        why = f"{folder.model} does not hold its weights and its journal cannot be replayed"
        raise UserError(
            f"{why} ({error}): bring {folder.model} back, or let the run end, with {folder.go_on()}"
        ) from error
    if expected not in (None, replica.digest()):
        raise UserError(
            f"{folder.model} does not hold the weights that {folder.path} ended with, and its journal gives others: "
            "restore one of them from a copy"
        )
    return end(replica.model, replica.digest())


def _saved_model(folder: RunFolder, genesis: Genesis) -> nn.Module:
    described = {**genesis["model"], "name": sources.SAVED}
    return spec.rebuild(described, genesis["seed"], folder.settings().dtype, str(folder.model))


def rank_bound(genesis: Genesis, records: Sequence[Record]) -> int | None:
    """The rank that a matrix's change has at most in exact arithmetic; None where nothing is known but its size.

    Directions of rank R add as much each, a core of K coefficients the root of K, where the optimizer is SGD, whose
    momentum is a sum of the same directions. Weight decay, which shrinks all of a matrix, and gradients know no bound.
    """
    optimizer, kind = genesis["optimizer"], genesis["directions"]
    if optimizer["name"] != "sgd" or optimizer["weight-decay"] or not kinds.terms(kind):
        return None
    moving = [record for record in records if not isinstance(record, Skipped)]
    seeded = [record for record in moving if isinstance(record, Seeded)]
    if len(seeded) < len(moving):
        return None
    counts = (len(record.coefficients) for record in seeded)
    return sum(isqrt(count) if kind == "core" else kinds.terms(kind) * count for count in counts)


def merged(folder: RunFolder, out: Path, base: str = "", threads: int = 1) -> End:
    """Write a run's model as a Hugging Face folder, with tokenizer and card. Raises UserError as `end_of` does."""
    settings = folder.settings()
    if settings.adapter in ("prefix", "prompt"):
        raise UserError(
            f"{folder.path} trained virtual tokens (adapter = {settings.adapter!r}), which cannot be added to the "
            "weights of a model: --adapter writes them"
        )
    end = end_of(folder, base, threads)
    classes = end.model.classifier.out_features if isinstance(end.model, PooledClassifier) else 0
    about = Exported(
        "merged", base_of(settings, base)[0], end.digest, end.round, end.has_ended, export_texts.kind_of(settings)[0],
        export_texts.load_merged(settings, classes),
    )  # fmt: skip
    _write(folder, out, end, about, base)
    return end


def adapter(folder: RunFolder, out: Path, base: str = "", threads: int = 1) -> End:
    """Write the adapter that a run trained, with tokenizer and card. Raises UserError as `end_of` does, and for a run
    that trained none or whose base nobody else can load.
    """
    settings = folder.settings()
    if settings.adapter == "none":
        raise UserError(f"{folder.path} trained no adapter: --delta-rank R writes what it changed as one")
    name, revision = base_of(settings, base)
    if name in sources.SIZES:
        raise UserError(f"the base of this adapter, {name!r}, is drawn from a seed and lies nowhere: use --merged")
    end = end_of(folder, base, threads)
    about = Exported(
        settings.adapter, name, end.digest, end.round, end.has_ended, export_texts.kind_of(settings)[0],
        export_texts.load_adapter(settings, name, revision, len(_class_names(folder))),
    )  # fmt: skip
    _write(folder, out, end, about, base, (name, revision))
    return end


def _class_names(folder: RunFolder) -> tuple[str, ...]:
    """Of a model whose own head tells classes apart."""
    has_head = TASKS[folder.settings().task].has_head
    return tuple(map(str, folder.inputs().get("classes", ()))) if has_head else ()


def _write(
    folder: RunFolder, out: Path, end: End, about: Exported, base: str, below: tuple[str, str] = ("", "")
) -> None:
    """The folder of a run's model, or, where `below` names its base, of its adapter alone."""
    tokenizer = _tokenizer(folder, folder.settings(), base)
    with written(out) as temporary:
        spec.save(end.model, tokenizer, temporary, _class_names(folder), below)
        model_card.write(folder, about, temporary)


def lora(folder: RunFolder, out: Path, rank: int, base: str = "", threads: int = 1) -> tuple[Delta, list[str]]:
    """Write what a run changed as a LoRA of at most this rank, with tokenizer and card; returns it, with what to say.

    Raises UserError as `end_of` does, and for a run of whose change a LoRA can hold nothing, or a rank above what its
    matrices can have.
    """
    settings = folder.settings()
    if settings.adapter != "none":
        raise UserError(
            f"{folder.path} trained an adapter already, adapter = {settings.adapter!r}: --adapter writes it"
            + (", --merged the model that it is added to" if settings.adapter == "lora" else "")
        )
    end = end_of(folder, base, threads)
    replica, _ = base_replica(folder, base)
    _check(replica, settings, rank)
    try:
        written_rank = rank if end.bound is None else min(rank, end.bound)
        delta = low_rank.delta(replica.model.cpu(), end.model.cpu(), replica.parameters, written_rank, end.steps)
    except ValueError as error:
        raise UserError(f"{folder.path} changed no linear layer: there is nothing for a LoRA; use --merged") from error
    (name, revision), told = base_of(settings, base), export_texts.sentences(delta, rank, end.bound)
    if not end.has_ended:
        told.append(f"the run has not ended: this is what it changed up to round {end.round}")
    classes = int(getattr(end.model.config, "num_labels", 0)) if TASKS[settings.task].has_head else 0
    about = Exported(
        "lora", name, end.digest, end.round, end.has_ended, export_texts.kind_of(settings)[0],
        export_texts.load_adapter(settings, name, revision, classes), told, export_texts.rows(delta),
    )  # fmt: skip
    tokenizer = _tokenizer(folder, settings, base)
    with written(out) as temporary:
        lora_files.save(delta, end.model, name, revision, temporary)
        tokenizer.save_pretrained(temporary)
        model_card.write(folder, about, temporary)
    return delta, told


def _check(replica: Replica, settings: Settings, rank: int) -> None:
    """Raise UserError where a LoRA of this rank cannot hold what the run changed."""
    model = replica.model
    if isinstance(model, PooledClassifier):
        raise UserError(
            "--delta-rank: this classifier pools its encoder in zofed's own way, and peft knows no module of its head: "
            "use --merged"
        )
    chosen = low_rank.without_heads(model, replica.parameters)
    matrices = low_rank.matrices(model, chosen)
    if not matrices:
        raise UserError(
            f"--delta-rank: scope = {settings.scope!r} trains no linear layer but perhaps a head, and a LoRA holds "
            "neither biases nor norms nor embeddings: use --merged"
        )
    if rank > (limit := low_rank.largest_rank(model, matrices)):
        raise UserError(
            f"--delta-rank {rank} is above {limit}, the largest rank that its matrices have: give {limit} or less"
        )


def base_of(settings: Settings, base: str) -> tuple[str, str]:
    """Where the model lies that a run began with, and its revision; of an adapter it went on with, that one's base."""
    return (absolute_path("model", base), "") if base else ModelSpec.of(settings).base


def _tokenizer(folder: RunFolder, settings: Settings, base: str) -> Any:
    if folder.has_model():
        return TASKS[settings.task].tokenizer(settings, encoding.load_tokenizer(str(folder.model)))
    name, revision = base_of(settings, base)
    return tokenizer_of(settings.model_copy(update={"model": name, "revision": revision}))


def check_out(out: Path) -> Path:
    """The folder to write as an absolute path. Raises UserError where something is there."""
    out = config.absolute(out, "out")
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"--out {out} is there and not an empty folder: choose another")
    return out


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """A folder to fill, which is `out` at the end, whole and durable; where anything fails nothing is left.

    Raises DiskError where the disk does not take it.
    """
    temporary = out.with_name(f".{out.name}.new")
    try:
        with whole_folder(temporary):
            yield temporary
        temporary.rename(out)
        sync_folder(out.parent)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(f"cannot write {out}: {error}; free some space or choose another --out") from error
