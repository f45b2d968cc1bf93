"""A sweep: which runs there are, which of them tune, which arms are compared."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from zofed import config
from zofed.config import SETTINGS, Settings

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Walk:
    """A tuning that goes along a line of values: from the one at `start` and its neighbours to wherever the best leads.

    most: values that it tries at most.
    """

    start: int
    most: int


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: settings that differ from the base, and those among which its tuning chooses ([{}]: none).

    walk: tuned is a line of values, in order, of which so many are tried as it takes; None: all are.
    """

    name: str
    values: Values
    tuned: tuple[Values, ...]
    walk: Walk | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its folder's name, its arm, its settings (without out), and whether it only tells which to choose."""

    name: str
    arm: str
    settings: Settings
    tunes: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """A sweep at one scale."""

    about: str
    seeds: tuple[int, ...]
    base: Values
    arms: tuple[Arm, ...]
    merge: dict[str, list[str]]
    parts: Values  # as they stand in the file at this scale

    def first(self) -> list[Run]:
        """The runs that wait for no other's result, by seed: of an arm that tunes, its values with the first seed."""
        return [
            self.run(arm, values, seed)
            for seed in self.seeds
            for arm in self.arms
            for values in self.tried(arm, {})
            if len(arm.tuned) == 1 or seed == self.seeds[0]
        ]

    def later(self, losses: Mapping[str, float]) -> list[Run]:
        """The other seeds of every arm whose tuning is over, at the best of its values; or where its walk leads next.

        losses: end losses by name of the runs that are over; infinite where a run failed.
        """
        found = []
        for arm in self.arms:
            if (values := self.chosen(arm, losses)) is not None and len(arm.tuned) > 1:
                found += [self.run(arm, values, seed) for seed in self.seeds[1:]]
            elif arm.walk:
                found += [self.run(arm, values, self.seeds[0]) for values in self.tried(arm, losses)]
        return found

    def tried(self, arm: Arm, losses: Mapping[str, float]) -> tuple[Values, ...]:
        """The values that an arm's tuning tries, as far as the losses tell: all of them, or those of its walk.

        A walk goes on while the best of what it tried lies at an end; where nothing trains, to smaller values.
        """
        if arm.walk is None:
            return arm.tuned
        first, last = max(0, arm.walk.start - 1), min(len(arm.tuned) - 1, arm.walk.start + 1)
        while last - first + 1 < arm.walk.most:
            found = self._losses(arm, arm.tuned[first : last + 1], losses)
            if found and first > 0 and (found[0] < min(found[1:]) or min(found) == inf):
                first -= 1
            elif found and last < len(arm.tuned) - 1 and found[-1] < min(found[:-1]):
                last += 1
            else:
                break
        return arm.tuned[first : last + 1]

    def _losses(self, arm: Arm, tried: Sequence[Values], losses: Mapping[str, float]) -> list[float] | None:
        """End losses of an arm's runs that try these values; None while one of them is not over."""
        found = [losses.get(self.run(arm, values, self.seeds[0]).name) for values in tried]
        known = [loss for loss in found if loss is not None]
        return known if len(known) == len(found) else None

    def chosen(self, arm: Arm, losses: Mapping[str, float]) -> Values | None:
        """The values an arm's tuning chose; None while some of its runs are not over, or where all failed."""
        if len(arm.tuned) == 1:
            return arm.tuned[0]
        tried = self.tried(arm, losses)
        found = self._losses(arm, tried, losses)
        if found is None or min(found) == inf:
            return None
        return tried[found.index(min(found))]

    def run(self, arm: Arm, values: Values, seed: int) -> Run:
        """The run of an arm with one choice of its tuned values and one seed."""
        name = ",".join(part for part in (arm.name, *pairs(values), f"seed={seed}") if part)
        settings = config.resolve(self.base | arm.values | values | {"seed": seed})
        return Run(name, arm.name, settings, len(arm.tuned) > 1 and seed == self.seeds[0])

    def without_effect(self, keys: Iterable[str]) -> list[str]:
        """A sentence for each of the keys, settings of the base, that has no effect in any of the runs."""
        keys = [key for key in keys if key in SETTINGS]
        runs = [self.run(arm, values, self.seeds[0]).settings for arm in self.arms for values in arm.tuned]

        def idle(settings: Settings, key: str) -> list[str]:
            return config.without_effect(settings, [key], config.FEDERATED if settings.clients else config.CENTRAL)

        return [idle(runs[0], key)[0] for key in keys if all(idle(settings, key) for settings in runs)]

    def count(self, losses: Mapping[str, float]) -> int:
        """How many runs there are when all tuning is over, unless a walk leads further than the losses tell."""
        return sum(len(self.tried(arm, losses)) + (len(self.seeds) - 1) for arm in self.arms)

    @property
    def slurm(self) -> Values:
        """Options of sbatch for the runs' jobs on Slurm."""
        return self.parts.get("slurm", {})

    @property
    def size(self) -> str:
        """How many runs there are, in words; more where an arm's tuning may try further values than it begins with."""
        return f"{self.count({})} runs{' or more' if any(arm.walk for arm in self.arms) else ''}"


def pairs(values: Values) -> list[str]:
    """Settings as the parts of a run's name."""
    return [f"{key}={shown(value)}" for key, value in values.items()]


def shown(value: Any) -> str:
    """A setting's value in few characters that a folder's name may have."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else safe(Path(str(value)).name)


def safe(text: str) -> str:
    """The text with nothing that a folder's name had better not have."""
    return re.sub(r"[^\w.+ -]+", "_", text).strip().replace(" ", "-")
