"""What a mixture of strategies costs and is worth: every step draws one of them and uses the same batch.

With probabilities w_s a step costs sum_s w_s C_s units per sample on average, and of the budget strategy s spends the
share w_s C_s / sum w C. What is counted per unit of budget (a score, a gain) is therefore averaged with
these shares, what is counted per sample with the weights.

Shapes: C strategies, A mixtures, anything else in front.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schedulers.strategy import Strategy

FloatArray = NDArray[np.float64]


def budget_shares(weights: FloatArray, cost: FloatArray) -> FloatArray:
    """Shares (..., C) of the budget, from probabilities (..., C) per step and units per sample (C,)."""
    spent = np.where(weights > 0, weights * cost, 0.0)
    return np.asarray(spent / spent.sum(axis=-1, keepdims=True))


def shared_mean(share: FloatArray, values: FloatArray) -> FloatArray:
    """Mean over the last axis, weighted by `share`; entries without a value are left out, NaN where all are."""
    here = (share > 0) & np.isfinite(values)
    total = np.where(here, share, 0.0).sum(axis=-1)
    mean = np.where(here, share * np.where(here, values, 0.0), 0.0).sum(axis=-1)
    return np.where(total > 0, mean / np.where(total > 0, total, 1.0), np.nan)


def mixed(share: FloatArray, values: FloatArray) -> FloatArray:
    """`values` (N, C) of the strategies as values (N, A) of mixtures with budget shares (A, C).

    NaN where any strategy that a mixture draws has none: a mixture is known when all of it is.
    """
    known = np.isfinite(values)
    total = np.where(known, values, 0.0) @ share.T
    missing = (~known).astype(np.float64) @ (share > 0).astype(np.float64).T
    return np.where(missing > 0, np.nan, total)


def draw_from(mixture: Sequence[tuple[Strategy, float]], *, seed: int, step: int) -> Strategy:
    """One strategy of a mixture, by a hash of seed and step alone: the same on every rank and after every resume."""
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    level = int.from_bytes(digest, "big") / 2**64
    passed = 0.0
    for strategy, weight in mixture:
        passed += weight
        if level < passed:
            return strategy
    return next(strategy for strategy, weight in reversed(mixture) if weight > 0)


def mixture_by_budget(shares: Sequence[tuple[Strategy, float, float]]) -> tuple[tuple[Strategy, float], ...]:
    """Probabilities per step from (strategy, share of the budget, units per sample): w proportional to share / C."""
    drawn = [(strategy, share / cost) for strategy, share, cost in shares if share > 0]
    total = math.fsum(weight for _, weight in drawn)
    return tuple((strategy, weight / total) for strategy, weight in drawn)
