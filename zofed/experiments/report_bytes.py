"""What a report shows of the bytes of federations: all that Flower sends, and what FlowerTune's board would count."""

import math
from collections.abc import Sequence

from zofed.experiments import comparisons
from zofed.experiments.arms import Arm
from zofed.experiments.html_page import Rows
from zofed.runs.run_result import Result

MEGABYTE = 2**20
HEAD = [
    "arm", "n", "MB in rounds", "MB beside them", "MB by FlowerTune's rule", "of its 200,000 MB",
    "bytes of a client and round, up", "down",
]  # fmt: skip
TOLD = (
    "MB of 2^20 bytes, of all clients, both ways: messages of the rounds as Flower serialises them; greetings, checks "
    "and evaluations; and by the rule of FlowerTune's board, which counts the arrays in training messages alone: in "
    "their place all bytes of zofed's own count"
)


def table(arms: Sequence[Arm]) -> tuple[list[str], Rows] | None:
    """Bytes of each federated arm, the fewest by FlowerTune's rule first; None where there is none."""
    found: list[tuple[float, list[str]]] = []
    for arm in arms:
        done = [one for one in arm.results if one.is_complete and math.isfinite(_number(one, "flowertune_megabytes"))]
        if not done:
            continue
        counted = _mean(done, "flowertune_megabytes")
        cells = [
            comparisons.said(sum(one.total("bytes") for one in done) / len(done) / MEGABYTE),
            comparisons.said(_mean(done, "bytes_beside_rounds") / MEGABYTE),
            comparisons.said(counted),
            f"{100 * _mean(done, 'flowertune_budget_share'):.2g} %",
            comparisons.said(_mean(done, "bytes_up_per_client_round")),
            comparisons.said(_mean(done, "bytes_down_per_client_round")),
        ]
        found.append((counted, [arm.name, str(len(done)), *cells]))
    return (HEAD, [row for _, row in sorted(found, key=lambda one: one[0])]) if found else None


def _mean(results: Sequence[Result], key: str) -> float:
    return sum(_number(one, key) for one in results) / len(results)


def _number(result: Result, key: str) -> float:
    """A number of the summary; NaN where an earlier version or a hand left none."""
    value = result.summary.get(key)
    return float(value) if isinstance(value, int | float) else math.nan
