"""The end of a run: score it, prove it by an independent replay, save and draw it, sum it up."""

import errno
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from zofed.base import arithmetic, environment
from zofed.base.errors import DiskError, DivergenceError, UserError
from zofed.base.files import sync_folder, whole_folder
from zofed.base.texts import said_by
from zofed.config import Settings
from zofed.core.journal import Journal, JournalError, read
from zofed.core.records import Guided, Seeded
from zofed.core.replica import NotKept, Replica, update_digest
from zofed.models import scopes, spec
from zofed.runs import memory
from zofed.runs.run_folder import RunFolder, timestamp, versions
from zofed.runs.tables import read_table
from zofed.training.divergence import has_diverged
from zofed.training.process import device, layer_devices, prepare_process
from zofed.training.rebuilding import replay, restore, with_random_slopes
from zofed.training.trainer import Totals, diverged

if TYPE_CHECKING:
    from zofed.training.problem import Problem

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
    problem: "Problem",
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
    settings = problem.settings
    scores, digest = totals.scores or problem.evaluate(replica.model), replica.digest()
    cost = totals.columns()
    replay_digest = _replay_digest(problem, journal, folder)
    known = problem.baselines(folder)
    rows = read_table(folder.path / "metrics.csv")
    summary: dict[str, Any] = {
        "status": "completed",
        "eval_loss_start": float(rows[0]["eval_loss"]),
        "eval_loss_end": scores.whole.loss,
        "stopped_by": totals.stopped_by,
        "evaluated": asdict(scores.coverage),
        **{key: value for key, value in scores.whole.columns().items() if key != "loss"},
        **({"metrics": dict(scores.whole.own)} if scores.whole.own else {}),
        **({"sources": {name: own.columns() for name, own in scores.sources.items()}} if scores.sources else {}),
        "baselines": known,
        "controls": _controls(problem, journal, folder) if settings.controls else {},
        "digest": digest,
        "replay_digest": replay_digest,
        "journal_head": journal.head.hex(),
        "bytes_up_per_client_round": 0.0,
        "bytes_down_per_client_round": 0.0,
        **cost,
        "peak_memory_bytes": memory.peak_bytes(),
        **({} if totals.memory is None else {"training_memory_bytes": totals.memory}),
        **problem.facts(replica),
        "parameters": {"total": scopes.true_count(replica.model), "trainable": _count(replica)},
        "versions": versions(),
        "arithmetic": arithmetic.described(),
        "session": {"ended": timestamp(), "threads": settings.threads, **environment.session()},
        **(extra or {}),
    }
    save_model(problem, replica, folder)
    draw("plot_loss", folder, known)
    if replay_digest not in (None, digest):
        raise UserError(
            f"the replay of {folder.journal} gives {replay_digest}, the run holds {digest}: report this as a bug"
        )
    error = _divergence(settings, summary, rows, replica.round)
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


def _divergence(
    settings: Settings, summary: Mapping[str, Any], rows: Sequence[Mapping[str, str]], round_: int
) -> DivergenceError | None:
    """What is wrong with a run that ends far above its start; None where nothing is. rows: of its metrics."""
    start, end = summary["eval_loss_start"], summary["eval_loss_end"]
    is_told = settings.objective == "loss"
    training = [float(row["loss"]) for row in rows if row["loss"]] if is_told else []
    if not has_diverged(start, end, training, summary["baselines"].get("uniform", -math.inf)):
        return None
    return diverged(round_, settings, what=f"on held-out data is {end:.4g} nats, far above its start, {start:.4g}")


def base_replica(folder: RunFolder, base: str = "") -> tuple[Replica, Settings]:
    """A fresh replica at the base weights of a run's journal, from the run's files alone.

    A base that the run held in fewer bits is whole here, and on the CPU, as one that lay on several GPUs is: a replay
    rounds nothing, and on one of them it may not fit.
    """
    folder.check_has_model()
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
    return replayed(base_replica(folder, base)[0], folder)


def replayed(replica: Replica, folder: RunFolder) -> tuple[Replica, int]:
    """`replay_run` of a replica at the base weights of the run in a folder."""
    entries = read(folder.journal).entries
    try:
        replica.replay(entries, folder.whole_update)
        return replica, 0
    except NotKept:
        restore(replica, entries, folder, latest=entries[-1].record.round)  # there is an entry, or nothing was lacking
    start = replica.round
    replica.replay([entry for entry in entries if entry.record.round > start], folder.whole_update)
    return replica, start


def _replay_digest(problem: "Problem", journal: Journal, folder: RunFolder) -> str | None:
    """Digest of the weights that an independent replay from the base gives; None where it lacks a gradient."""
    if not _has_updates(journal, folder):
        return None
    try:
        replica, start = replayed(problem.rebuilt(folder), folder)
    except NotKept:
        return None
    return None if start else replica.digest()


def _has_updates(journal: Journal, folder: RunFolder) -> bool:
    """Whether every record of the journal has the gradient or guide that it needs, if any, in a file."""
    digests = (update_digest(entry.record) for entry in journal.entries)
    return all(digest is None or folder.has_update(digest) for digest in digests)


def _controls(problem: "Problem", journal: Journal, folder: RunFolder) -> dict[str, float]:
    """Held-out losses of what did not learn: the base weights, and steps of the same size with random slopes.

    The latter where the journal replays from the start and some step has slopes. Loss that is no number is left out.
    """
    control = problem.replica()
    found = {"frozen": problem.evaluate(control.model).whole.loss}
    records = [entry.record for entry in journal.entries]
    if any(isinstance(record, Seeded | Guided) for record in records) and _has_updates(journal, folder):
        with suppress(NotKept):  # a damaged file
            replay(control, with_random_slopes(records, problem.settings.seed), folder.update)
            found["random_slopes"] = problem.evaluate(control.model).whole.loss
    for name in [name for name, loss in found.items() if not math.isfinite(loss)]:
        warnings.warn(f"the control {name} ends at a loss that is not finite: it is left out", stacklevel=2)
        del found[name]
    return found


def _count(replica: Replica) -> int:
    return sum(parameter.numel() for parameter in replica.parameters.values())


def save_model(problem: "Problem", replica: Replica, folder: RunFolder) -> None:
    """The trained model in a folder that is replaced as a whole, durable at the end.

    Raises DiskError where the disk does not take it; the model that was there stays. Raises UserError as
    `Problem.save`.
    """
    temporary = folder.path / ".model.new"
    try:
        with whole_folder(temporary, private_as=folder.model):
            problem.save(replica, temporary)
    except (SafetensorError, OSError) as error:
        raise DiskError(f"cannot write the model into {folder.path}: {error}; free some space") from error
    shutil.rmtree(folder.model, ignore_errors=True)
    temporary.rename(folder.model)
    sync_folder(folder.path)
