"""How clients' answers become one, value by value: a class a rule, for integers and for float32 tensors."""

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from zofed.core.kinds import AggregationName


class Rule(ABC):
    """One rule. trim: the share of the answers that a trimmed mean leaves out at either end."""

    @abstractmethod
    def integers(self, column: Sequence[int], weights: Sequence[int], trim: float) -> int:
        """Of one coefficient's value from each client, `divisor` times the result, exactly."""

    @abstractmethod
    def divisor(self, weights: Sequence[int], trim: float) -> int:
        """What `integers` are multiples of."""

    @abstractmethod
    def tensors(self, found: Sequence[Tensor], weights: Sequence[int], trim: float) -> Tensor:
        """Of one float32 tensor from each client, entry by entry; the same bits for the same order of clients."""


class Mean(Rule):
    """The weighted mean."""

    def integers(self, column: Sequence[int], weights: Sequence[int], trim: float) -> int:
        """The weighted sum."""
        return sum(value * weight for value, weight in zip(column, weights, strict=True))

    def divisor(self, weights: Sequence[int], trim: float) -> int:
        """The sum of the weights."""
        return sum(weights)

    def tensors(self, found: Sequence[Tensor], weights: Sequence[int], trim: float) -> Tensor:
        """Summed in the order of the clients."""
        parts = (tensor * (weight / sum(weights)) for tensor, weight in zip(found, weights, strict=True))
        total = next(parts)
        for part in parts:
            total.add_(part)
        return total


class Trimmed(Rule):
    """The mean without a share at either end (Yin et al., "Byzantine-robust distributed learning", ICML 2018)."""

    def integers(self, column: Sequence[int], weights: Sequence[int], trim: float) -> int:
        """The sum of those left."""
        cut = left_out(len(column), trim)
        return sum(sorted(column)[cut : len(column) - cut])

    def divisor(self, weights: Sequence[int], trim: float) -> int:
        """How many are left."""
        return len(weights) - 2 * left_out(len(weights), trim)

    def tensors(self, found: Sequence[Tensor], weights: Sequence[int], trim: float) -> Tensor:
        """Sorted in each entry."""
        cut = left_out(len(found), trim)
        return torch.stack(list(found)).sort(0).values[cut : len(found) - cut].mean(0)


class Median(Rule):
    """The lower median (the same paper)."""

    def integers(self, column: Sequence[int], weights: Sequence[int], trim: float) -> int:
        """One of the values."""
        return statistics.median_low(column)

    def divisor(self, weights: Sequence[int], trim: float) -> int:
        """1."""
        return 1

    def tensors(self, found: Sequence[Tensor], weights: Sequence[int], trim: float) -> Tensor:
        """Of each entry one of the values."""
        return torch.stack(list(found)).median(0).values


RULES: dict[AggregationName, Rule] = {"mean": Mean(), "trimmed": Trimmed(), "median": Median()}


def left_out(count: int, trim: float) -> int:
    """How many of `count` values a trimmed mean leaves out at either end: a share, and never all."""
    return min(math.ceil(trim * count), (count - 1) // 2)
