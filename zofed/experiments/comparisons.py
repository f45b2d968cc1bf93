"""From end losses over seeds to what may be said: means, spreads, intervals, and sentences with their uncertainty."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zofed.experiments.arms import Arm

# 97.5 % points of Student's t by degrees of freedom; from 30 on the last serves, a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


CONTROLS = {"frozen": "weights that never moved", "random_slopes": "steps of equal size with random slopes"}
COSTS = {"forward_equivalents": "forward-equivalents", "seconds": "seconds", "bytes": "bytes"}
ENOUGH = 3  # seeds
SHOWN = 3  # arms beside the best that a sentence names
ALIKE = 0.05  # by which costs may differ and still count as equal


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its 95 % t interval. deviation: standard deviation of the n values; of one: NaN, and no interval."""

    mean: float
    deviation: float
    low: float
    high: float
    n: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.n > 1 and not self.low <= 0 <= self.high


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and 95 % t interval of one value or more."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, math.nan, -math.inf, math.inf, len(values))
    deviation = statistics.stdev(values)
    half = t(len(values) - 1) * deviation / math.sqrt(len(values))
    return Estimate(mean, deviation, mean - half, mean + half, len(values))


def t(freedom: float) -> float:
    """97.5 % point of Student's t; of a fraction of a degree of freedom, that of the whole below."""
    return _T[min(len(_T), max(1, int(freedom))) - 1]


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[Estimate, bool]:
    """How much higher b's values (by seed) are than a's; and whether seed by seed, which both arms then share.

    Seeds in common, two or more: the mean of the differences. Else the difference of the means, after Welch.
    """
    common = sorted(set(a) & set(b))
    if len(common) > 1 or (len(a) == len(b) == len(common) == 1):
        return estimate([b[seed] - a[seed] for seed in common]), True
    mean = statistics.fmean(b.values()) - statistics.fmean(a.values())
    n = min(len(a), len(b))
    if n < 2:
        return Estimate(mean, math.nan, -math.inf, math.inf, n), False
    parts = [statistics.variance(own.values()) / len(own) for own in (a, b)]
    error = math.sqrt(sum(parts))
    freedom = (
        sum(parts) ** 2 / sum(part**2 / (len(own) - 1) for part, own in zip(parts, (a, b), strict=True)) if error else n
    )
    half = t(freedom) * error
    return Estimate(mean, error * math.sqrt(n), mean - half, mean + half, n), False


def sentences(arms: Sequence[Arm]) -> list[str]:
    """What the runs say: which arm won, by how much over each other, how surely, and what tells against it."""
    known = sorted((arm for arm in arms if arm.ends), key=lambda arm: arm.mean)
    if not known:
        return ["No run is complete: there is nothing to say yet."]
    best, told = known[0], []
    if not known[1:]:
        told.append(f"One arm alone: {best.name} ends at {_level(best)}.")
    else:
        told.append(f"Lowest held-out loss: {best.name}, {_level(best)}.")
    for other in known[1:]:
        told.append(_against(best, other))
    if len(known) > 2:
        told.append(
            f"Each interval is for its own pair; none is corrected for the {len(known) - 1} comparisons made here."
        )
    if few := [arm for arm in known if len(arm.ends) < ENOUGH]:
        told.append(f"Fewer than {ENOUGH} seeds, too few to tell noise from an effect: {_some(few, known)}.")
    told += [sentence for column in COSTS if (sentence := _at_equal_cost(known, column))]
    told += _accuracies(known)
    told += [sentence for arm in known if (sentence := _learnt(arm))]
    if edges := [arm for arm in known if _is_at_the_edge(arm)]:
        told.append(
            f"Tuned to the first or last of the values tried, so that a better one may lie beyond: "
            f"{_some(edges, known)}."
        )
    return told


def _some(arms: Sequence[Arm], known: Sequence[Arm]) -> str:
    """The arms by name; all of them in one word."""
    return "all arms" if len(arms) == len(known) > 1 else "; ".join(arm.name for arm in arms)


def said(cost: float) -> str:
    """A cost in digits."""
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"


def _level(arm: Arm) -> str:
    found = estimate(list(arm.ends.values()))
    if found.n == 1:
        return f"{found.mean:.4f} nats (n = 1, no spread known)"
    return f"{found.mean:.4f} nats (standard deviation {found.deviation:.4f}, n = {found.n} seeds)"


def _against(best: Arm, other: Arm) -> str:
    found, paired = difference(best.ends, other.ends)
    if found.n == 1:
        return f"{other.name} ends {found.mean:.4f} nats above {best.name}; of n = 1 no interval can be given."
    how = "paired by seed" if paired else "seeds not paired"
    interval = f"95 % t interval {found.low:+.4f} to {found.high:+.4f}, {how}, n = {found.n}"
    if found.is_clear:
        return f"{other.name} ends {found.mean:.4f} nats above {best.name} ({interval})."
    return f"{other.name} and {best.name} cannot be told apart: {found.mean:+.4f} nats ({interval})."


def least(arms: Sequence[Arm], column: str) -> float:
    """The most that every arm has spent of a cost, so that all can be compared there; NaN where some spent nothing."""
    totals = [result.total(column) for arm in arms for result in arm.results if result.is_complete]
    return min(totals) if totals and all(total > 0 for total in totals) else math.nan


def at_cost(arm: Arm, column: str, cost: float) -> Estimate | None:
    """Held-out loss of an arm when it had spent so much: between two evaluations on the line that joins them."""
    found = []
    for result in arm.results:
        rows, losses = result.held_out
        if result.is_complete and len(rows) and column in result.columns:
            found.append(float(np.interp(cost, result.columns[column][rows], losses)))
    return estimate(found) if found else None


def _at_equal_cost(arms: Sequence[Arm], column: str) -> str:
    """Which arm is ahead where all have spent what the cheapest spends; empty where they cost the same, or nothing."""
    cost = least(arms, column)
    totals = [estimate([r.total(column) for r in arm.results if r.is_complete]).mean for arm in arms]
    if len(arms) < 2 or not math.isfinite(cost) or max(totals) <= (1 + ALIKE) * min(totals):
        return ""
    found = {arm.name: there.mean for arm in arms if (there := at_cost(arm, column, cost))}
    best, *others = sorted(found, key=found.__getitem__)
    named = ", ".join(f"{name} {found[name]:.4f}" for name in others[:SHOWN])
    rest = f" and {len(others) - SHOWN} more above" if others[SHOWN:] else ""
    return (
        f"At equal cost, {said(cost)} {COSTS[column]}, which all arms have spent: {best} is lowest with "
        f"{found[best]:.4f} nats; {named}{rest}."
    )


def _accuracies(arms: Sequence[Arm]) -> list[str]:
    """Which arm answers best by its metric, and by how much, in per cent and points of it; nothing where none does.

    Nor where the arms have several metrics, of tasks that cannot be compared.
    """
    if len(metrics := {result.metric for arm in arms for result in arm.results}) > 1:
        return []
    metric = next(iter(metrics), "")
    scores = {
        arm.name: {
            int(result.settings["seed"]): 100 * result.score for result in arm.results if math.isfinite(result.score)
        }
        for arm in arms
    }
    found = {name: estimate(list(own.values())) for name, own in scores.items() if own}
    if not found:
        return []
    best, *others = sorted(found, key=lambda name: -found[name].mean)
    spread = f", standard deviation {found[best].deviation:.1f}" if found[best].n > 1 else ""
    told = [f"Highest {metric}: {best}, {found[best].mean:.1f} % (n = {found[best].n}{spread})."]
    for name in others[:SHOWN]:
        less, paired = difference(scores[name], scores[best])
        how = f"95 % t interval {less.low:+.1f} to {less.high:+.1f}" if less.n > 1 else "no interval"
        how += f"{', paired by seed' * paired}, n = {less.n}"
        where = f"{less.mean:.1f} points below {best}" if less.is_clear else f"not told apart from {best}"
        told.append(
            f"{metric.capitalize()} of {name}: {found[name].mean:.1f} %, {where}; difference {less.mean:+.1f} ({how})."
        )
    if others[SHOWN:]:
        told.append(f"{len(others) - SHOWN} more arms have a lower {metric}; the table has them.")
    return told


def _learnt(arm: Arm) -> str:
    """What the controls say of an arm; empty where it has none."""
    controls = [(r.end, r.summary.get("controls", {})) for r in arm.results if r.is_complete]
    controls = [(end, own) for end, own in controls if own]
    if not controls:
        return ""
    parts = []
    for key, name in (
        ("frozen", "weights that never moved"),
        ("random_slopes", "steps of equal size with random slopes"),
    ):
        gains = [own[key] - end for end, own in controls if key in own]
        if gains:
            found = estimate(gains)
            sure = f", 95 % t interval {found.low:+.4f} to {found.high:+.4f}" if found.n > 1 else ""
            verdict = "below" if found.mean > 0 else "above"
            parts.append(f"{abs(found.mean):.4f} nats {verdict} {name} (n = {found.n}{sure})")
    return f"Controls: {arm.name} ends {' and '.join(parts)}."


def _is_at_the_edge(arm: Arm) -> bool:
    """Whether a number that was tuned is the smallest or the largest of those tried."""
    tried = [result.settings for result in arm.chosen_from]
    for key in tried[0] if tried else ():
        values: set[Any] = {settings.get(key) for settings in tried}
        chosen, is_number = arm.results[0].settings.get(key), all(type(value) in (int, float) for value in values)
        if len(values) > 1 and is_number and chosen in (min(values), max(values)):
            return True
    return False
