"""The end of a run: score it, prove it by an independent replay, save and draw it, sum it up."""

import errno
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from zofed.base import arithmetic, environment
from zofed.base.errors import DiskError, DivergenceError, UserError
from zofed.base.files import sync_folder, whole_folder
from zofed.base.texts import said_by
from zofed.config import Settings
from zofed.core.digests import named_parameters, weights_digest
from zofed.core.journal import Journal, JournalError, read
from zofed.core.records import Guided, Seeded
from zofed.core.replica import NotKept, Replica, update_digest
from zofed.models import adapters, initial, scopes, spec
from zofed.models.precision import Model
from zofed.models.spec import ModelSpec
from zofed.runs.run_folder import RunFolder, peak_memory_bytes, timestamp, versions
from zofed.runs.tables import read_table
from zofed.training import baselines, pins
from zofed.training.divergence import has_diverged
from zofed.training.process import device, layer_devices, prepare_process
from zofed.training.rebuilding import replay, restore, with_random_slopes
from zofed.training.task import Task
from zofed.training.trainer import Totals, diverged

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def status_kept(folder: RunFolder) -> Iterator[None]:
    """While a run works its summary says `running`; whatever ends it early is written there before it goes on.

    A disk that takes no more becomes a UserError with the command that continues the run.
    """
    try:
        folder.write_summary({"status": "running"})
        yield
    except KeyboardInterrupt:
        with suppress(OSError):
            folder.write_summary({"status": "interrupted"})
        raise
    except BrokenPipeError:  # who read the output has gone, which is no fault of the disk
        with suppress(OSError):
            folder.write_summary({"status": "interrupted"})
        raise
    except (DiskError, OSError) as error:
        told = str(error)
        if isinstance(error, OSError):
            remedy = "free some space" if error.errno in FULL else "mend that"
            told = f"cannot write or read {error.filename or folder.path}: {error.strerror or error}; {remedy}"
        told = f"{told}, then continue with: {folder.go_on()}"
        _say_failed(folder, told)
        raise UserError(told) from error
    except Exception as error:
        _say_failed(folder, str(error), "diverged" if isinstance(error, DivergenceError) else "failed")
        raise


def _say_failed(folder: RunFolder, error: str, status: str = "failed") -> None:
    with suppress(OSError):  # the disk may be what failed
        # Of a run that diverged at its end the summary holds all that it found.
        folder.write_summary(folder.summary() | {"status": status, "error": error})


def finish(
    task: Task,
    replica: Replica,
    journal: Journal,
    folder: RunFolder,
    totals: Totals,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write model, picture and summary into the folder of a run that reached its end; returns the summary.

    extra: what only the way of running knows (bytes by client and round, the clients' digests). Raises UserError when
    the replay from the files gives other weights than the run holds, and, once all is written, DivergenceError for a
    run that ends far above its start.
    """
    scores, digest = totals.scores or task.evaluate(replica.model), replica.digest()
    cost = totals.columns()
    replayed = _replay_digest(task, journal, folder)
    known = baselines.of(task, folder)
    rows = read_table(folder.path / "metrics.csv")
    summary: dict[str, Any] = {
        "status": "completed",
        "eval_loss_start": float(rows[0]["eval_loss"]),
        "eval_loss_end": scores.whole.loss,
        "stopped_by": totals.stopped_by,
        "evaluated": asdict(scores.coverage),
        **{key: value for key, value in scores.whole.columns().items() if key != "loss"},
        **({"sources": {name: own.columns() for name, own in scores.sources.items()}} if scores.sources else {}),
        "baselines": known,
        "controls": _controls(task, journal, folder) if task.settings.controls else {},
        "digest": digest,
        "replay_digest": replayed,
        "journal_head": journal.head.hex(),
        "bytes_up_per_client_round": 0.0,
        "bytes_down_per_client_round": 0.0,
        **cost,
        "peak_memory_bytes": peak_memory_bytes(),
        **_started_from(task, replica),
        "versions": versions(),
        "arithmetic": arithmetic.described(),
        "session": {"ended": timestamp(), "threads": task.settings.threads, **environment.session()},
        **(extra or {}),
    }
    save_model(task, replica, folder)
    draw("plot_loss", folder, known)
    if replayed not in (None, digest):
        raise UserError(
            f"the replay of {folder.journal} gives {replayed}, the run holds {digest}: report this as a bug"
        )
    error = _divergence(task, summary, rows, replica.round)
    folder.write_summary(summary | ({"status": "diverged", "error": str(error)} if error else {}))
    if error:
        raise error
    return summary


def draw(name: str, *arguments: Any) -> None:
    """Draw one of the pictures of `pictures`. None ends a run: what kept one from being drawn is told."""
    try:
        from zofed.runs import pictures  # pictures need pandas and matplotlib, which clients never load

        getattr(pictures, name)(*arguments)
    except Exception as error:
        print(
            f"a picture ({name}) could not be drawn: {said_by(error)}; the run goes on without it",
            file=sys.stderr,
            flush=True,
        )


def _started_from(task: Task, replica: Replica) -> dict[str, Any]:
    """What a run was made of: its model and its data."""
    settings, adapted = task.settings, adapters.of(replica.model)
    weights = adapted.base if adapted else replica.genesis["weights"]  # without the adapter, which is drawn
    return {
        "base": {"model": settings.model, "revision": settings.revision, "weights": weights},
        "drawn": list(initial.drawn(replica.model)),
        "parameters": {"total": scopes.true_count(replica.model), "trainable": _count(replica)},
        "data": pins.digests(task),
        "data_read": [reading.facts() for reading in task.readings],
        **({"classes": list(task.class_names)} if task.labels else {}),
    }


def _divergence(
    task: Task, summary: Mapping[str, Any], rows: Sequence[Mapping[str, str]], round_: int
) -> DivergenceError | None:
    """What is wrong with a run that ends far above its start; None where nothing is. rows: of its metrics."""
    start, end = summary["eval_loss_start"], summary["eval_loss_end"]
    is_told = task.settings.objective == "loss"
    training = [float(row["loss"]) for row in rows if row["loss"]] if is_told else []
    if not has_diverged(start, end, training, summary["baselines"]["uniform"]):
        return None
    return diverged(round_, task.settings, what=f"on held-out data is {end:.4g} nats, far above its start, {start:.4g}")


def base_replica(folder: RunFolder, base: str = "") -> tuple[Replica, Settings]:
    """A fresh replica at the base weights of a run's journal, from the run's files alone.

    A base that the run held in fewer bits is whole here, and on the CPU, as one that lay on several GPUs is: a replay
    rounds nothing, and on one of them it may not fit.
    """
    settings = folder.settings()
    genesis = read(folder.journal).genesis
    place = (base, "") if base else (settings.model, settings.revision)
    try:
        model = spec.rebuild(genesis["model"], genesis["seed"], settings.dtype, *place)
        is_large = genesis.get("quantised") or len(layer_devices(settings)) > 1
        where = torch.device("cpu") if is_large else device(settings)
        return Replica(nn.Module.to(model, where), genesis), settings
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise JournalError(
            f"journal {folder.journal} begins with a genesis that gives no model ({type(error).__name__}: {error}): "
            "restore it from a copy"
        ) from error


def replay_run(folder: RunFolder, base: str = "", threads: int = 1) -> tuple[Replica, int]:
    """Rebuild a run's weights from its files: base and journal, or the newest checkpoint where records are dense.

    Returns the replica and the round of the checkpoint it had to start from (0: none was needed). A damaged gradient
    counts as not kept. Raises NotKept where first-order steps lie behind the last checkpoint.
    """
    prepare_process(threads)
    replica, _ = base_replica(folder, base)
    entries = read(folder.journal).entries
    try:
        replay(replica, [entry.record for entry in entries], folder.whole_update)
        return replica, 0
    except NotKept:
        restore(replica, entries, folder, latest=entries[-1].record.round)  # there is an entry, or nothing was lacking
    start = replica.round
    replay(replica, [entry.record for entry in entries if entry.record.round > start], folder.whole_update)
    return replica, start


def _replay_digest(task: Task, journal: Journal, folder: RunFolder) -> str | None:
    """Digest of the weights that an independent replay from the base gives; None where it lacks a gradient."""
    if not _has_updates(journal, folder):
        return None
    try:
        replica, start = replay_run(folder, threads=task.settings.threads)
    except NotKept:
        return None
    return None if start else replica.digest()


def _has_updates(journal: Journal, folder: RunFolder) -> bool:
    """Whether every record of the journal has the gradient or guide that it needs, if any, in a file."""
    digests = (update_digest(entry.record) for entry in journal.entries)
    return all(digest is None or folder.has_update(digest) for digest in digests)


def _controls(task: Task, journal: Journal, folder: RunFolder) -> dict[str, float]:
    """Held-out losses of what did not learn: the base weights, and steps of the same size with random slopes.

    The latter where the journal replays from the start and some step has slopes. Loss that is no number is left out.
    """
    control = task.replica()
    found = {"frozen": task.evaluate(control.model).whole.loss}
    records = [entry.record for entry in journal.entries]
    if any(isinstance(record, Seeded | Guided) for record in records) and _has_updates(journal, folder):
        with suppress(NotKept):  # a damaged file
            replay(control, with_random_slopes(records, task.settings.seed), folder.update)
            found["random_slopes"] = task.evaluate(control.model).whole.loss
    for name in [name for name, loss in found.items() if not math.isfinite(loss)]:
        warnings.warn(f"the control {name} ends at a loss that is not finite: it is left out", stacklevel=2)
        del found[name]
    return found


def _count(replica: Replica) -> int:
    return sum(parameter.numel() for parameter in replica.parameters.values())


@torch.no_grad()
def whole_model(task: Task, replica: Replica) -> Model:
    """The replica's model; with a quantised base the unquantised one, read once more, with the weights that trained.

    Of an adapter, which is saved alone, no base need be read. Raises UserError where what is read is no longer the base
    of the run.
    """
    if not replica.genesis.get("quantised") or spec.saves_adapter(replica.model, ModelSpec.of(task.settings).base):
        return replica.model  # type: ignore[return-value]
    model = spec.create_model(task.settings, task.tokenizer, task.outputs)
    if weights_digest(model) != replica.genesis["weights"]:
        raise UserError(
            f"model = {task.settings.model!r} has changed since the run began, and what trained belongs to the weights "
            "that it had: bring it back, then go on with zofed train --resume"
        )
    parameters = named_parameters(model)
    for name, trained in replica.parameters.items():
        parameters[name].copy_(trained)
    return model


def save_model(task: Task, replica: Replica, folder: RunFolder) -> None:
    """A Hugging Face folder (safetensors and tokenizer) that AutoModel loads, replaced as a whole, durable at the end.

    Raises DiskError where the disk does not take it; the model that was there stays. Raises UserError as `whole_model`.
    """
    model = whole_model(task, replica)
    temporary = folder.path / ".model.new"
    try:
        with whole_folder(temporary):
            spec.save(model, task.tokenizer, temporary, task.class_names, ModelSpec.of(task.settings).base)
    except (SafetensorError, OSError) as error:
        raise DiskError(f"cannot write the model into {folder.path}: {error}; free some space") from error
    shutil.rmtree(folder.model, ignore_errors=True)
    temporary.rename(folder.model)
    sync_folder(folder.path)
