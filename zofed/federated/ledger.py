"""What a node has given away so far, slopes by example and in all, and since when each run goes on."""

import fcntl
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zofed.base.errors import UserError
from zofed.base.files import write_private
from zofed.core import sanitize
from zofed.federated.policy import Policy, refusal

Reads = Iterable[tuple[NDArray[np.int64], int]]  # positions of examples, and how many slopes each of them is read for
RUNS_KEPT = 256


@dataclass
class Ledger:
    """examples: how many slopes each example of some data was read for, by what names the data; in_all: slopes asked.

    Other settings cut the same documents into other examples. A document may be any of them, so that what was read of
    one is at most the sum, over the data, of the most that was read of any example. path: of the file that keeps them,
    which is read anew each time.
    """

    examples: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    in_all: int = 0
    path: Path | None = None

    @classmethod
    def read(cls, path: Path) -> "Ledger":
        """That in a file, empty where there is none yet. Raises UserError for a file that is no ledger."""
        if not path.exists():
            return cls(path=path)
        try:
            found = sanitize.json_object(path.read_bytes()) or {}
            examples = {key: np.array(counts, np.int64) for key, counts in found["examples"].items()}
            return cls(examples, int(found["in-all"]), path)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"ledger {path} cannot be read: bring it back, or move it away to begin the counts of slopes anew"
            ) from error

    def spend(self, data: str, held: int, reads: Reads, slopes: int, policy: Policy) -> None:
        """Count what a message asks, before it is answered. Raises Refused, and counts nothing, beyond the policy.

        data: names what was read. held: examples of it. slopes: asked in all. Several processes may share a file.
        """
        with self._fresh():
            self._spend(data, held, reads, slopes, policy)

    @contextmanager
    def _fresh(self) -> Iterator[None]:
        """With what others wrote since, whom it keeps out meanwhile. Raises UserError where the file cannot be kept."""
        if self.path is None:
            yield
            return
        try:
            with open(self.path.with_name(f"{self.path.name}.lock"), "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                there = Ledger.read(self.path)
                self.examples, self.in_all = there.examples, there.in_all
                yield
        except OSError as error:
            raise UserError(
                f"ledger {self.path.absolute()} cannot be written ({error.strerror}): have the policy name a file that "
                "this node's user may write"
            ) from error

    def _spend(self, data: str, held: int, reads: Reads, slopes: int, policy: Policy) -> None:
        before = self.examples.get(data, np.zeros(0, np.int64))
        counts = np.pad(before, (0, max(0, held - len(before))))
        for positions, each in reads:
            np.add.at(counts, positions, each)
        if policy.slopes_in_all and self.in_all + slopes > policy.slopes_in_all:
            what = f"{slopes:,} more slopes would be {self.in_all + slopes:,}"
            raise refusal(what, "slopes-in-all", policy, "end the run here")
        rest = sum(int(own.max()) for key, own in self.examples.items() if key != data)
        most = rest + int(counts.max())
        if policy.slopes_per_example and most > policy.slopes_per_example:
            what = f"one example would have been read for {most:,} slopes"
            raise refusal(what, "slopes-per-example", policy, "lower queries or rounds")
        self.examples[data], self.in_all = counts, self.in_all + slopes
        if self.path is not None:
            examples = {key: own.tolist() for key, own in self.examples.items()}
            write_private(self.path, json.dumps({"in-all": self.in_all, "examples": examples}))


@lru_cache(maxsize=1024)
def of(path: str, client: int) -> Ledger:
    """The ledger of a node in this process. path: of its file; empty: none is kept. client: of whose data."""
    return Ledger(path=Path(path) if path else None)


def check(path: str) -> None:
    """Raise UserError for a ledger's file that cannot be read or written, before any message comes."""
    if path:
        with Ledger(path=Path(path))._fresh():
            pass


class Runs:
    """Since when each run goes on at this node; seconds are those of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, dict[int, float]()

    def check(self, run: int, policy: Policy) -> None:
        """Raise Refused for a message of a run that has lasted too long."""
        began = self._began.setdefault(run, self._clock())
        while len(self._began) > RUNS_KEPT:
            del self._began[next(iter(self._began))]
        if (minutes := (self._clock() - began) / 60) > policy.minutes_per_run:
            raise refusal(
                f"the run has lasted {minutes:,.1f} minutes", "minutes-per-run", policy, "submit a shorter one"
            )
