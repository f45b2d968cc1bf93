"""A sweep: which runs there are, which of them tune, which arms are compared."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zofed import config
from zofed.config import SETTINGS, Settings

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: settings that differ from the base, and those among which its tuning chooses ([{}]: none)."""

    name: str
    values: Values
    tuned: tuple[Values, ...]


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
            for values in arm.tuned
            if len(arm.tuned) == 1 or seed == self.seeds[0]
        ]

    def later(self, losses: Mapping[str, float]) -> list[Run]:
        """The other seeds of every arm whose tuning is over, at the best of its values.

        losses: end losses by name of the runs that are over; infinite where a run failed.
        """
        found = []
        for arm in self.arms:
            if (values := self.chosen(arm, losses)) is not None and len(arm.tuned) > 1:
                found += [self.run(arm, values, seed) for seed in self.seeds[1:]]
        return found

    def chosen(self, arm: Arm, losses: Mapping[str, float]) -> Values | None:
        """The values an arm's tuning chose; None while some of its runs are not over, or where all failed."""
        if len(arm.tuned) == 1:
            return arm.tuned[0]
        found = [losses.get(self.run(arm, values, self.seeds[0]).name) for values in arm.tuned]
        if any(loss is None for loss in found):
            return None
        best = min(range(len(found)), key=lambda at: found[at])  # type: ignore[arg-type, return-value]
        return arm.tuned[best] if found[best] != float("inf") else None

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

    @property
    def most(self) -> int:
        """How many runs there are when all tuning is over."""
        return sum(len(arm.tuned) + (len(self.seeds) - 1) for arm in self.arms)


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
