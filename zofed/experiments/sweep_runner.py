"""Carries a sweep out: so many runs at a time, what is finished skipped, what was cut resumed, what failed told."""

import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from zofed.base.errors import UserError
from zofed.experiments.sweep import Run, Sweep
from zofed.experiments.sweep_engine import Engine, Job
from zofed.experiments.sweep_folder import SweepFolder
from zofed.preflight.forecast import steps_within

TICK = 0.5  # seconds between two looks at the running


@dataclass(frozen=True, slots=True)
class Running:
    """A run under way: steps done and to do, seconds since it began here."""

    name: str
    step: int
    steps: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that is over. loss: held-out at its end, nats, infinite if it diverged; error: empty unless it failed."""

    name: str
    loss: float
    seconds: float
    error: str


@dataclass(frozen=True, slots=True)
class Board:
    """The state of a sweep. most: runs there will be, unless a tuning fails. left: seconds to go, None: not known yet.

    skipped: runs that were over before. ended: those of this time, in order. diverged: names of runs, of both kinds,
    that diverged while tuning, which is no failure.
    """

    most: int
    skipped: int
    ended: tuple[Ended, ...]
    diverged: tuple[str, ...]
    running: tuple[Running, ...]
    left: float | None

    @property
    def over(self) -> int:
        return self.skipped + len(self.ended)

    @property
    def failed(self) -> list[Ended]:
        return [run for run in self.ended if run.error]

    @property
    def complete(self) -> int:
        """Runs with an end that counts: neither failed nor diverged."""
        return self.over - len(self.failed) - len(self.diverged)

    @property
    def complete_before(self) -> int:
        """Those of them that were complete when this go at the sweep began."""
        return self.skipped - len(set(self.diverged) - {run.name for run in self.ended})


@dataclass
class Runner:
    """One go at a sweep. tell: called with the board whenever something may have changed."""

    sweep: Sweep
    folder: SweepFolder
    engine: Engine
    tell: Callable[[Board], None]
    runs: dict[str, Run] = field(default_factory=dict, init=False)  # all that are known to be due, by name
    losses: dict[str, float] = field(default_factory=dict, init=False)
    ended: list[Ended] = field(default_factory=list, init=False)
    first_steps: list[float] = field(default_factory=list, init=False)  # seconds from a run's start to its first step

    def run(self) -> Board:
        """All runs, each to its end. Raises UserError before the first where a folder holds another run."""
        self._skipped = 0
        self._waiting: deque[Run] = deque()
        self._running: list[Job] = []
        self._is_refused = False  # by the engine, which takes no more as long as those that run go on
        self._places = 1
        self._enter(self.sweep.first())
        try:
            if self._waiting:
                self.engine.prepare(self.folder.path, list(self.runs.values()))
            while self._waiting or self._running:
                self._start_waiting()
                self.tell(self.board())
                self.engine.hear(TICK)
                for job in [job for job in self._running if job.ended]:
                    self._end(job)
        finally:
            self.engine.stop()
            self._running.clear()
            self._write()
        self.tell(self.board())
        return self.board()

    def board(self) -> Board:
        running = []
        for job in self._running:
            steps = job.steps or steps_within(job.run.settings)
            seconds = time.monotonic() - job.began
            running.append(Running(job.run.name, self.folder.steps_done(job.run), steps, seconds))
        failed = {run.name for run in self.ended if run.error}
        diverged = sorted(name for name, loss in self.losses.items() if loss == math.inf and name not in failed)
        return Board(
            most=self.sweep.count(self.losses),
            skipped=self._skipped,
            ended=tuple(self.ended),
            diverged=tuple(diverged),
            running=tuple(running),
            left=self._left(running),
        )

    def _enter(self, runs: list[Run]) -> None:
        """Note that these runs are due: skip the finished, queue the others."""
        new = [run for run in runs if run.name not in self.runs]
        for run in new:
            self.folder.check_same(run)
        for run in new:
            self.runs[run.name] = run
            loss = self.folder.loss(run)
            if loss is None:
                self._waiting.append(run)
            else:
                self.losses[run.name] = loss
                self._skipped += 1
        if new:
            self._enter(self.sweep.later(self.losses))
            self._write()

    def _start_waiting(self) -> None:
        """Start runs that wait, as many as there are places."""
        self._places = self.engine.places(list(self.runs.values()))
        free = sorted(set(range(self._places)) - {job.slot for job in self._running})
        free = free[: max(0, self._places - len(self._running))]  # a place may be gone whose number is not the last
        while self._waiting and free and not self._is_refused:
            run = self._waiting.popleft()
            try:
                job = self.engine.start(run, self.folder.run_path(run), self.folder.log(run), free.pop(0))
            except UserError as error:
                if not self._running:
                    raise
                warnings.warn(f"{error}; the others go on, and it is tried again when one ends", stacklevel=2)
                self._waiting.appendleft(run)
                self._is_refused = True
            else:
                self._running.append(job)

    def _end(self, job: Job) -> None:
        run = job.run
        self._running.remove(job)
        self._is_refused = False
        if job.lost and self.folder.loss(run) is None:
            self._waiting.appendleft(run)
            return
        if job.first_step is not None:
            self.first_steps.append(job.first_step)
        loss = self.folder.loss(run)
        error = "" if loss is not None else job.error or "it ended without a summary"
        loss = math.inf if loss is None else loss
        self.ended.append(Ended(run.name, loss, time.monotonic() - job.began, error))
        self.losses[run.name] = loss
        self._enter([later for later in self.sweep.later(self.losses) if not self._is_hopeless(later.arm)])
        self._write()

    def _is_hopeless(self, arm: str) -> bool:
        """Whether nothing of an arm came to an end but by an error: smaller values would meet the same."""
        failed = {ended.name for ended in self.ended if ended.error}
        return failed.issuperset(name for name in self.losses if self.runs[name].arm == arm)

    def _write(self) -> None:
        self.folder.write_failures({run.name: run.error for run in self.ended if run.error})
        self.folder.write_summary(self.runs, {job.run.name for job in self._running})

    def _left(self, running: list[Running]) -> float | None:
        """Seconds to the end, from the mean of the runs so far; a running one counts by its share of steps."""
        shares = [(run.seconds, min(1.0, run.step / run.steps)) for run in running]
        known = [run.seconds for run in self.ended if not run.error] or [
            seconds / share for seconds, share in shares if share > 0.02
        ]
        if not known:
            return None
        mean = statistics.fmean(known)
        whole = self.sweep.count(self.losses) - self._skipped - len(self.ended) - len(running)
        rest = sum(max(0.0, mean * (1 - share)) for _, share in shares)
        return (whole * mean + rest) / min(max(1, self._places), max(1, whole + len(running)))

    @property
    def untuned(self) -> list[str]:
        """Arms, by name, of which no value that was tried trains, once all is over: their other seeds do not run."""
        return [arm.name for arm in self.sweep.arms if self.sweep.chosen(arm, self.losses) is None]

    @property
    def overhead(self) -> float | None:
        """Median seconds from a run's start to the end of its first step; None where no run told."""
        return statistics.median(self.first_steps) if self.first_steps else None
