"""The learning rate of every step."""

import math

from zofed.config import Settings


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """The rate of step 1 <= step <= total: rising linearly over the warm-up, then constant or on a half cosine.

    With the schedule `cosine` the last step's rate is `min-learning-rate` (Loshchilov and Hutter, "SGDR", ICLR 2017,
    without restarts).
    """
    return _scheduled(settings, settings.learning_rate, step, total)


def backprop_rate(settings: Settings, step: int, total: int) -> float:
    """The rate of a step that backprop gave: on the same course from its own height."""
    return _scheduled(settings, settings.bp_learning_rate or settings.learning_rate, step, total)


def _scheduled(settings: Settings, height: float, step: int, total: int) -> float:
    if step <= settings.warmup_steps:
        return height * step / settings.warmup_steps
    if settings.schedule == "constant":
        return height
    end = min(height, settings.min_learning_rate)
    way = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return end + (height - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, way)))
