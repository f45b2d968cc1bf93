"""When a run that reached its end has diverged though its losses are still numbers."""

import statistics
from collections.abc import Sequence

# Mean loss in nats above the start's beyond which no honest run ends: what the model gives to the right answers has
# fallen by a factor, e^-104, that is below the smallest number of single precision.
BEYOND_ALL = 104.0
LAST = 5  # steps whose training loss counts as the end's: their median, which one hard batch does not move


def is_far_above(end: float, start: float, uniform: float) -> bool:
    """Whether a loss has left its start far behind: more than doubled, and worse than knowing nothing.

    A nat more, so that a start near 0 is not left by a small rise. uniform: the loss of uniform guesses; a model below
    it still knows something. All in nats.
    """
    return end > max(2 * start + 1, uniform)


def has_diverged(start: float, end: float, training: Sequence[float], uniform: float) -> bool:
    """Whether a run diverged, by its held-out loss at the start and the end and its training losses step by step.

    The held-out loss alone cannot tell. A classifier that overfits is wrong with ever more confidence, a language model
    forgets what it no longer reads: both may end far above their start, and are results. But they know their training
    data, and what diverged has lost those as well. So both losses must be far above their start; or the held-out loss
    alone beyond all that an honest run can reach, for runs whose training losses are not told, or tell only of the
    steps before the one that went astray.

    start, end, uniform: finite, nats. training: the cross-entropy of each step's batch before the step, in order;
    empty where clients withhold it or the objective is another. A pure function of what the run's files hold, so that
    a resumed run comes to the same verdict.
    """
    if end > start + BEYOND_ALL:
        return True
    if len(training) < 2 or not is_far_above(end, start, uniform):
        return False
    return is_far_above(statistics.median(training[1:][-LAST:]), training[0], uniform)
