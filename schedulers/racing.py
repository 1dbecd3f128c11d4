"""Racing: which measurements still leave a decision open (design section 3, adaptive allocation).

All strategies of a progress point are measured on the same sub-batches. From time to time those whose
difference to the best one is known well enough leave the race; the others go on. Comparing with the best
instead of with a fixed threshold, and stopping a comparison as soon as its confidence bound decides it, is
the idea of Hoeffding races (Maron, Moore 1994); differences are judged by their own, paired jackknife
standard errors, which common random numbers make far smaller than those of the scores.

Shapes: C strategies in `grid.strategies()` order, M sub-batches, T progress points.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from schedulers.criteria import Criterion, FloatArray, get_criterion
from schedulers.errors import UsageError
from schedulers.profile import Profile


@dataclass(frozen=True)
class RaceRule:
    """When a comparison counts as decided.

    `tolerance`: share of the best score by which a strategy must still be able to win to stay in the race;
    `confidence`: one-sided level of the bound on its advantage; `minimum` and `maximum` sub-batches per cell;
    `growth`: factor between the numbers of sub-batches at which the race is looked at.
    """

    minimum: int = 8
    maximum: int = 128
    tolerance: float = 0.05
    confidence: float = 0.95
    growth: float = 1.5

    def __post_init__(self) -> None:
        if not 3 <= self.minimum <= self.maximum:
            raise UsageError(
                f"minimum={self.minimum} and maximum={self.maximum} sub-batches: standard errors need at least 3, "
                "and the minimum may not exceed the maximum"
            )
        if not 0.5 <= self.confidence < 1:
            raise UsageError(f"confidence={self.confidence} is not a level in [0.5, 1)")
        if not 0 <= self.tolerance < float("inf"):
            raise UsageError(f"tolerance={self.tolerance} is not a share of the best score, 0 or more")
        if not self.growth > 1:
            raise UsageError(f"growth={self.growth} must be above 1")

    def looks(self) -> list[int]:
        """Numbers of sub-batches after which the race is looked at; the last one is `maximum`."""
        looks = [self.minimum]
        while looks[-1] < self.maximum:
            looks.append(min(self.maximum, max(looks[-1] + 1, round(looks[-1] * self.growth))))
        return looks


def contenders(
    score: FloatArray,
    deleted_score: FloatArray,
    *,
    lower_is_better: bool,
    tolerance: float = RaceRule.tolerance,
    confidence: float = RaceRule.confidence,
) -> NDArray[np.bool_]:
    """Which strategies may still be better than the best one by more than the tolerance: mask (C,).

    `score` (C,), NaN for strategies out of the race; `deleted_score` (M, C): the scores with sub-batch m left
    out. A strategy stays while (its score - the best) + t * se > tolerance * |best|, with se the jackknife
    standard error of the difference and t Student's quantile of M-1 degrees of freedom. The best one is in the
    mask; a mask with nothing else means that the race is decided.
    """
    worth = -score if lower_is_better else score
    stays = np.zeros(score.shape, dtype=bool)
    if not np.isfinite(worth).any():
        return stays
    best = int(np.nanargmax(worth))
    count = len(deleted_score)
    apart_MC = deleted_score - deleted_score[:, best : best + 1]
    se = np.sqrt((count - 1) / count * ((apart_MC - apart_MC.mean(0)) ** 2).sum(0))
    bound = worth - worth[best] + stdtrit(count - 1, confidence) * se
    stays[:] = np.isfinite(worth) & ~(bound <= tolerance * abs(worth[best]))
    stays[best] = True
    return stays


def boundary_cells(
    profile: Profile, criterion: str | Criterion, *, tolerance: float = RaceRule.tolerance
) -> list[tuple[int, int]]:
    """Cells (t, c) whose errors leave open where, between two progress points, the best strategy changes.

    With best strategies a at t and b at t+1, their scores' difference goes linearly from D0 > 0 to -D1 < 0 and
    crosses zero at x = D0 / (D0 + D1) of the gap. An error e of x costs (D0 + D1) e^2 / 2 of the mean score in the gap;
    where its expectation exceeds `tolerance` of the smaller of the two best scores, the two cells at the end
    that contributes more to the error of x are returned.
    """
    chosen = get_criterion(criterion)
    score, se = profile.scores(chosen, profile.progress)
    worth = -score if chosen.lower_is_better else score
    best = np.array([int(np.nanargmax(row)) if np.isfinite(row).any() else -1 for row in worth])
    cells: set[tuple[int, int]] = set()
    for t, u in itertools.pairwise(range(len(worth))):
        a, b = int(best[t]), int(best[u])
        if a == b or min(a, b) < 0:
            continue
        before, after = worth[t, a] - worth[t, b], worth[u, b] - worth[u, a]
        if not np.isfinite(before + after) or before + after <= 0:
            continue
        error_t = after**2 * (se[t, a] ** 2 + se[t, b] ** 2)
        error_u = before**2 * (se[u, a] ** 2 + se[u, b] ** 2)
        loss = (error_t + error_u) / (before + after) ** 3 / 2
        if loss > tolerance * min(abs(worth[t, a]), abs(worth[u, b])):
            end = t if error_t >= error_u else u
            cells |= {(end, a), (end, b)}
    return sorted(cells)
