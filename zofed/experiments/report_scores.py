"""What a report shows of scores and answers: each arm's beside those of no learning, and the newest samples."""

import itertools
import math
from collections.abc import Mapping, Sequence

from zofed.base.texts import one_line
from zofed.core.metrics import SCORES, scores_among
from zofed.experiments import comparisons
from zofed.experiments.arms import Arm
from zofed.experiments.html_page import Rows
from zofed.runs import samples as kept
from zofed.runs.run_result import Result

TOLD = (
    "scores lie between 0 and 1, at the end of the runs; below each arm those of no learning, on the same examples: "
    "the untrained model (zero shot, base), it with a fitted threshold and with solved examples before each prompt "
    "(few shot), and the most frequent label (majority)"
)
RUNS, LONGEST = 6, 600  # whose samples are shown, characters of each text


def table(arms: Sequence[Arm]) -> tuple[list[str], Rows] | None:
    """Scores of each arm, the best first, and its baselines, by measure; None where no run has a score."""
    known = [
        (arm.name, [result.summary for result in arm.results if result.is_complete])
        for arm in sorted(arms, key=lambda arm: arm.mean)
    ]
    measures = [score for score in SCORES if any(score in summary for _, own in known for summary in own)]
    rows: Rows = []
    for arm, summaries in known:
        if not summaries:
            continue
        rows.append([arm, str(len(summaries)), *_cells(summaries, measures)])
        baselines = [scores_among(_numbers(summary.get("baselines"))) for summary in summaries]
        for name in dict.fromkeys(itertools.chain(*baselines)):
            rows.append(
                [f"— {name.replace('_', ' ')}", "", *_cells([own.get(name, {}) for own in baselines], measures)]
            )
    return (["arm", "n", *(score.replace("_", " ") for score in measures)], rows) if measures else None


def _cells(found: Sequence[Mapping[str, float]], measures: Sequence[str]) -> list[str]:
    cells = []
    for measure in measures:
        known = [value for one in found if math.isfinite(value := float(one.get(measure, math.nan)))]
        estimate = comparisons.estimate(known) if known else None
        spread = f" ± {estimate.deviation:.4f}" if estimate and estimate.n > 1 else ""
        cells.append(f"{estimate.mean:.4f}{spread}" if estimate else "")
    return cells


def _numbers(found: object) -> dict[str, float]:
    """The numbers among a summary's baselines, which a hand may have spoilt."""
    if not isinstance(found, Mapping):
        return {}
    return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)}


def samples(found: Sequence[Result]) -> list[tuple[str, tuple[list[str], Rows]]]:
    """Of the first runs that answered prompts, what they answered last: (in words, head and rows)."""
    shown = []
    for result in found:
        newest = kept.newest(result.path)
        if newest and len(shown) < RUNS:
            rows = [[one_line(sample[key], LONGEST) for key in kept.TEXTS] for sample in newest]
            shown.append(
                (f"{result.name}: answers at step {newest[0]['step']}", (["prompt", "answer", "wanted"], rows))
            )
    return shown
