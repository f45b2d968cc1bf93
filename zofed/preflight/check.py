"""Everything a run needs, looked at in seconds before anything long begins; nothing is written to the disk."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from zofed import config
from zofed.base.errors import UserError
from zofed.base.texts import duration
from zofed.config import Settings
from zofed.core.replica import Replica
from zofed.data import encoding, tokenizers
from zofed.data.documents import Reading
from zofed.data.encoding import Document, Examples
from zofed.federated import protocol
from zofed.models import initial, limits, sources, spec
from zofed.preflight.forecast import bytes_of_a_round, free_bytes, pace
from zofed.preflight.model_info import ModelInfo, info
from zofed.runs import run_folder
from zofed.training.modes import MODES
from zofed.training.paths import with_absolute_paths
from zofed.training.process import device, layer_devices, prepare_process
from zofed.training.task import Task
from zofed.training.tasks import read

SAMPLED = 500_000  # characters that are tokenised to count blocks; the rest is taken to be like them

Verdict = Literal["ok", "fix", "note"]


@dataclass(frozen=True, slots=True)
class Line:
    """One finding. verdict: `fix` for what would stop the run, `note` for what is good to know."""

    verdict: Verdict
    what: str
    told: str


def check(settings: Settings, modes: Sequence[str]) -> Iterator[Line]:
    """Findings, one after the other as they are made; every fault is told, not only the first.

    modes: those in which a step is taken. What builds on something that is missing is left out.
    """
    prepare_process(settings.threads)
    faults: list[Line] = []
    versions = ", ".join(f"{name} {version}" for name, version in run_folder.versions().items())
    yield Line("ok", "versions", versions)
    with _collect(faults, "device"):
        faults.append(_device(settings))
    if faults[0].verdict == "fix":
        settings = settings.model_copy(
            update={"device": "cpu", "placement": "none"}
        )  # for all that can be looked at without it
    if settings.out:
        with _collect(faults, "out"):
            faults.append(_out(settings))
    with _collect(faults, "model"):
        settings = with_absolute_paths(settings)
    tokenizer = None
    if not any(line.what == "model" for line in faults):
        try:
            tokenizer = encoding.load_tokenizer(spec.tokenizer_name(settings))
            faults.append(_tokenizer(tokenizer, spec.tokenizer_name(settings)))
        except UserError as error:
            # A name that is no model is no tokenizer's fault.
            is_size = settings.model in sources.SIZES or settings.tokenizer
            faults.append(Line("fix", "tokenizer" if is_size else "model", str(error)))
    found: Reading | None = None
    with _collect(faults, "data"):
        found = read(settings, settings.dataset)
    yield from faults
    task, examples, blocks = None, None, 0
    if tokenizer is not None and found is not None:
        faults = []
        with _collect(faults, "data"):
            task = Task.of(settings, tokenizer, found)
            examples, blocks, line = _data(task)
            faults.append(line)
        yield from faults
    if tokenizer is not None:
        yield from _model(settings, modes, tokenizer, task, examples, blocks)


@contextmanager
def _collect(lines: list[Line], what: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        lines.append(Line("fix", what, str(error)))


def _device(settings: Settings) -> Line:
    (chosen, *others), here = layer_devices(settings), os.cpu_count() or 1
    if others:
        names = ", ".join(torch.cuda.get_device_name(one) for one in (chosen, *others))
        return Line("note", "device", f"layers over {names}: placement = auto has not yet run on several GPUs")
    alone = ", which holds all layers: placement = auto finds no second GPU" if settings.placement == "auto" else ""
    if chosen.type == "cuda":
        return Line("ok", "device", f"{torch.cuda.get_device_name(chosen)}{alone}")
    if settings.threads > here:
        return Line("note", "device", f"threads = {settings.threads}, but this machine has {here} CPUs")
    return Line("ok", "device", f"cpu, {settings.threads} of {here} threads{alone}")


def _out(settings: Settings) -> Line:
    out = config.absolute(settings.out, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out = {str(out)!r} is not empty: choose another folder with --out")
    above = next(folder for folder in (out, *out.parents) if folder.exists())
    if not os.access(above, os.W_OK):
        raise UserError(f"out = {str(out)!r} cannot be written: choose another --out")
    return Line("ok", "out", str(out))


def _tokenizer(tokenizer: Any, name: str) -> Line:
    ids = tokenizer(tokenizers.PROBE, add_special_tokens=False)["input_ids"]
    if not ids or max(ids) >= len(tokenizer):
        raise UserError(f"tokenizer {name!r} gives {ids} for {tokenizers.PROBE!r}: give one that is whole")
    told = f"{name}, {len(tokenizer)} entries, {tokenizers.PROBE!r} is {ids}"
    if tokenizer.decode(ids) != tokenizers.PROBE:
        return Line("note", "tokenizer", f"{told}, which reads back as {tokenizer.decode(ids)!r}")
    return Line("ok", "tokenizer", told)


def _data(task: Task) -> tuple[Examples, int, Line]:
    """Examples to take a step on, about how many the run has, and whether that is enough.

    Raises UserError for less than one.
    """
    size, clients = task.settings.block_size, max(1, task.settings.clients)
    examples, blocks = _count(task, task.train)
    try:
        _, held = _count(task, task.held_out)
    except limits.Unreadable:
        raise
    except UserError as error:
        raise UserError(
            f"held-out part: {error}, or set held-out-fraction above {task.settings.held_out_fraction:g}"
        ) from error
    smallest = min((task.client_documents(client, clients) for client in range(clients)), key=_size)
    _count(task, smallest)  # the client that holds least needs one example, too
    what = task.type.named(size, task.labels)
    told = f"{len(task.train)} documents, about {blocks:,} {what}; held out {len(task.held_out)}, about {held:,}"
    if blocks < task.settings.batch_size:
        return (
            examples,
            blocks,
            Line("note", "data", f"{told}; a batch of {task.settings.batch_size} holds some of them twice"),
        )
    return examples, blocks, Line("ok", "data", told)


def _count(task: Task, part: list[Document]) -> tuple[Examples, int]:
    """Examples of the first documents, and about how many all of them give."""
    some, characters, total = 0, 0, _size(part)
    while some < len(part) and characters < SAMPLED:
        characters += part[some].size
        some += 1
    examples = task.examples(part[:some], cache=False)
    count = len(examples["labels"])
    return examples, len(part) if task.type.has_one_example_a_document else round(count * total / max(1, characters))


def _size(part: list[Document]) -> int:
    return sum(document.size for document in part)


def _model(
    settings: Settings,
    modes: Sequence[str],
    tokenizer: Any,
    task: Task | None,
    examples: Examples | None,
    blocks: int,
) -> Iterator[Line]:
    """Findings on the model, its memory, a step of each mode, the time and the federation."""
    try:
        of = info(settings, tuple(modes), task.labels if task else 2)
    except UserError as error:
        yield Line("fix", "model", str(error))
        return
    if device(settings).type != "cpu":
        of = replace(of, read=0)  # which RAM holds, and what is free is asked of the device
    at = f" at {of.revision}" if of.revision else ""
    yield Line("ok", "model", f"{of.name}{at}, {of.architecture}, {of.parameters:,} parameters")
    free, fits = free_bytes(settings), []
    if of.unpredictable:
        yield Line("note", "memory", f"cannot be predicted for this model: {of.unpredictable}")
        fits = list(modes)
    for mode in of.memory:
        line = _memory(of, mode, free)
        fits += [mode] if line.verdict != "fix" else []
        yield line
    if task is None or examples is None or not fits:
        if (
            settings.model not in sources.SIZES and settings.task == "language-model"
        ):  # its weights can be read at least
            lines: list[Line] = []
            with _collect(lines, "weights"):
                spec.create_model(settings, tokenizer)
            yield from lines
        return
    # No hidden states are kept: nothing is written, and the time is that of a run which computes them in each pass.
    task = replace(task, settings=task.settings.model_copy(update={"hidden_states_gigabytes": 0.0}))
    try:
        replica = task.replica()
    except UserError as error:
        yield Line("fix", "model", str(error))
        return
    if drawn := initial.drawn(replica.model):
        yield Line("note", "head", initial.described(drawn))
    for mode in fits:
        lines = []
        with _collect(lines, f"step {mode}"):
            found = pace(task, replica, examples, mode, blocks)
            told = f"loss {found.loss:.4f}, about {duration(found.step)} a step"
            lines.append(Line("ok", f"step {mode}", told))
            told = f"{found.steps} steps and their evaluations about {duration(found.total)}"
            lines.append(Line("ok", f"time {mode}", told))
        yield from lines
    if line := _federation(settings, replica):
        yield line


def bytes_needed(of: ModelInfo, mode: str) -> int:
    """The most that a run in a mode holds at once: in a step, in an evaluation, in the replay that proves it."""
    memory = of.memory[mode]
    end = 0 if MODES[mode].has_gradients else 2 * (memory.weights + memory.state)
    if of.read:  # then the replay is of the unquantised base
        end = memory.weights + memory.state + of.read
    return max(memory.peak, memory.peak - memory.step + memory.evaluation, end)


def _memory(of: ModelInfo, mode: str, free: int | None) -> Line:
    memory, peak = of.memory[mode], bytes_needed(of, mode)
    told = f"{mode}: predicted {_mib(memory.peak)} a step, {_mib(peak)} in all"
    if free is None:
        return Line("note", "memory", f"{told}; how much is free this system does not tell")
    if peak > free:
        mend = (
            "take a smaller batch-size, block-size or model, or mode zo"
            if mode != "zo"
            else ("take a smaller perturbations-per-pass, batch-size, block-size or model")
        )
        return Line("fix", "memory", f"{told}, but {_mib(free)} are free: {mend}")
    if 2 * peak > free:
        keep = "freed memory is kept for speed and may double it: MALLOC_MMAP_THRESHOLD_=1048576 gives it back"
        return Line("note", "memory", f"{told} of {_mib(free)} free; {keep}")
    return Line("ok", "memory", f"{told} of {_mib(free)} free")


def _federation(settings: Settings, replica: Replica) -> Line | None:
    """Bytes a client sends and gets each round, and the nodes that must be there."""
    clients = settings.clients
    nodes = f"{clients} nodes" if clients else "at least 1 node, all that are there"
    if clients:
        try:
            protocol.check_settings(settings)
        except UserError as error:
            return Line("fix", "federation", str(error))
    if settings.quorum > clients > 0:
        return Line("fix", "federation", f"quorum = {settings.quorum}: set it to clients = {clients} or less")
    if settings.mode != "zo":
        told = f"needs {nodes}; what a round of mode = {settings.mode} sends is not predicted"
        return Line("note", "federation", told) if clients else None
    up, down = bytes_of_a_round(settings, replica)
    told = f"{up:,} bytes up and {down:,} down for each client and round (with {max(1, clients)} clients)"
    return Line("note", "federation", f"{told}; needs {nodes}")


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
