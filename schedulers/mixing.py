"""What a mixture of strategies costs and is worth: every step draws one of them and uses the same batch.

With probabilities w_s a step costs sum_s w_s C_s units per sample on average, and of the budget strategy s spends the
share w_s C_s / sum w C. What is counted per unit of budget (a score, a gain) is therefore averaged with
these shares, what is counted per sample with the weights.

Shapes: C strategies, A mixtures, anything else in front.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
