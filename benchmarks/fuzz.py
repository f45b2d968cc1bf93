"""Inputs by the thousand for every decoder and reader: each ends well or by a named error, soon, in little memory."""

import os
import random
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import fuzz_guided, fuzz_targets, mutations
from benchmarks.fuzz_targets import Target

SECONDS, BYTES = 1.0, 100e6  # of processor, and of memory beyond what was taken before, that one input may cost
KEPT = 3  # faults of a kind that are told


@dataclass
class Found:
    """What some inputs did. read: how many were taken for whole. faults: the smallest input of each."""

    inputs: int = 0
    read: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    most_bytes: float = 0.0
    faults: dict[str, bytes] = field(default_factory=dict)


def in_memory() -> str | None:
    """A folder for files that no disk need take, ten times as fast as one; None: the usual place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fault_of(target: Target, raw: bytes) -> tuple[str, bool]:
    """What is wrong with how a target takes an input, empty where nothing is; and whether it took it for whole."""
    before = _memory()
    began = time.process_time()
    try:
        target.read(raw)
        is_read, told = True, ""
    except target.refusals as error:
        is_read, told = False, "" if str(error) else f"{type(error).__name__} without a word"
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        ours = [one for one in traceback.extract_tb(error.__traceback__) if "/zofed/" in one.filename]
        at = (ours or [line])[-1]
        return f"{type(error).__name__} in {Path(at.filename).name} {at.name}", False
    if time.process_time() - began > SECONDS:
        return f"more than {SECONDS:g} s", is_read
    if _memory() - before > BYTES:
        return f"more than {BYTES / 1e6:g} MB", is_read
    return told, is_read


def _memory() -> int:
    """The most bytes that this process had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tried(target: Target, count: int, seed: int) -> Found:
    """A target with its corpus, then with `count` inputs drawn from a seed."""
    chance, found = random.Random(f"{target.name} {seed}"), Found()
    warm(target)
    inputs = [*target.corpus, b""]
    began = time.perf_counter()
    for number in range(count):
        raw = inputs[number] if number < len(inputs) else _drawn(target, chance)
        before, start = _memory(), time.process_time()
        fault, is_read = fault_of(target, raw)
        found.slowest = max(found.slowest, time.process_time() - start)
        found.most_bytes = max(found.most_bytes, _memory() - before)
        found.inputs, found.read = found.inputs + 1, found.read + is_read
        if fault and len(raw) < len(found.faults.get(fault, raw + b"x")):
            found.faults[fault] = raw
    found.seconds = time.perf_counter() - began
    for fault, raw in found.faults.items():
        found.faults[fault] = mutations.smallest(raw, lambda less, fault=fault: fault_of(target, less)[0] == fault, 500)
    return found


def warm(target: Target) -> None:
    """What a reader imports and keeps from its first input on is no input's own."""
    for raw in target.corpus:
        with suppress(*target.refusals):
            target.read(raw)


def _drawn(target: Target, chance: random.Random) -> bytes:
    if chance.random() < 0.03:
        return chance.randbytes(chance.randrange(200))
    return mutations.edited(chance.choice(target.corpus), mutations.drawn(chance), target.corpus, target.words)


def report(count: int, seed: int, only: Sequence[str], guided: int = 0) -> bool:
    """Print a line for each target and each fault with its smallest input; returns whether there was none.

    guided: seconds of atheris for each, in the place of inputs at random.
    """
    total, is_well = 0, True
    with tempfile.TemporaryDirectory(dir=in_memory()) as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = fuzz_targets.all_of(Path(scratch))
        names = [name for name in targets if not only or any(part in name for part in only)]
        if guided:
            return fuzz_guided.report(guided, names)
        print("| reader | inputs | taken | inputs a second | slowest, ms | memory, MB | faults |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in names:
            found = tried(targets[name], count, seed)
            total, is_well = total + found.inputs, is_well and not found.faults
            print(
                f"| {name} | {found.inputs:,} | {found.read:,} | {found.inputs / found.seconds:,.0f} | "
                f"{found.slowest * 1e3:.1f} | {found.most_bytes / 1e6:.0f} | {len(found.faults)} |",
                flush=True,
            )
            for fault, raw in found.faults.items():
                print(f"    {fault}: {raw[:300]!r}{'...' if len(raw) > 300 else ''}", flush=True)
    print(f"{total:,} inputs")
    return is_well
