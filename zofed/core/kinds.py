"""Kinds of directions by name: the terms of their sum, the value of their integers; names of optimizers and rules.

Without torch, so that settings can be read before it is loaded.
"""

from math import isqrt, sqrt
from typing import Literal

Kind = str  # rank1, rank2, ... (sums of so many outer products), rademacher, gaussian; core: all pairs of factors
KIND_PATTERN = r"rank[1-9][0-9]?|rademacher|gaussian"
NAMED_SCOPES = ("full", "reduced", "norms", "biases", "head")  # scopes by name; others are last-K or patterns
OptimizerName = Literal["sgd", "adamw", "mudamw"]  # the keys of `optimizers.RULES`
AggregationName = Literal["mean", "trimmed", "median"]  # the keys of `aggregation_rules.RULES`


def terms(kind: Kind) -> int:
    """Outer products that make up a direction of a matrix: R for rankR, 1 for core, 0 for the dense kinds."""
    return 1 if kind == "core" else int(kind.removeprefix("rank")) if kind.startswith("rank") else 0


def seeds_needed(kind: Kind, coefficients: int) -> int:
    """How many seeds so many coefficients belong to: of a core each stands for a pair of two seeds' factors."""
    return isqrt(coefficients) if kind == "core" else coefficients


def unit(kind: Kind) -> float:
    """What one integer of `direction` is worth, so that every entry has mean 0 and variance 1.

    1 for entries +-1; 1/sqrt(R) for a sum of R of them; 2^-16 for gaussian, whose variance is 1 - 1e-4 (65,536 levels).
    """
    if kind == "gaussian":
        return 2.0**-16
    return 1.0 / sqrt(terms(kind) or 1)
