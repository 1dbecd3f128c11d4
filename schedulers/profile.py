"""A profile: the NumPy view of a measured cube, and its interpolation over progress.

Shape legend: T profiled progress points, C strategies in `grid.strategies()` order, N asked-for points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from schedulers.criteria import (
    MOMENTS,
    Criterion,
    FloatArray,
    Moments,
    criterion_gradient,
    criterion_se,
    get_criterion,
    readable,
)
from schedulers.errors import ScheduleError, UsageError
from schedulers.schedule import Schedule, Stage
from schedulers.strategy import Grid

HAIR = 1e-9  # how much worse than the best contender a strategy that left a race counts, as a share of that score


@dataclass(frozen=True, eq=False)
class Profile:
    """Moments of every strategy's gradient at some points of training, in one metric.

    `progress` (T,) strictly increasing in [0, 1]; `cost` (C,) units per sample under `cost_model`, NaN
    where not known; `moments` (T, C), NaN where not measured; `covariance` (T, C, 5, 5) of the
    estimates in the order of MOMENTS, or None; `batch_size` is the K of the profiled run and `beta`
    the budget of one update in units. `digest` identifies the cube; `reference_budget` is the budget of
    the run that was profiled, in units of `cost_model`, None when unknown. `contenders`: per criterion's name (T, C),
    the strategies that a race by that criterion and these costs had not ruled out; others have fewer samples, whose
    luck must not make them win later, and score worse than the best contender, by HAIR of its score at least.

    `influence` (T, C, 5, R), or None: how much each of R groups of sub-batches moves the estimates, such that
    sum_r influence_r influence_r^T is `covariance` (in expectation only, where several sub-batches share a group), and
    sum_r of the product of two rows, also of other strategies and points, the covariance BETWEEN their estimates, which
    are measured on the same images; 0 where not measured. Where all strategies share the reference's norm_sq_ref, they
    share its row here, whose products with a strategy's others are not the strategy's own `covariance`.
    `seconds` and `memory` (C,), or None: seconds of a training step and bytes of activations kept for its backward
    pass, per sample, NaN where not measured. `pilot`: the stages of the schedule that the profiled run was trained
    under, None when unknown. Raises UsageError, naming the field, when shapes or values do not fit.
    """

    grid: Grid
    progress: FloatArray
    cost: FloatArray
    moments: Moments
    covariance: FloatArray | None
    batch_size: int
    beta: float
    metric: str
    cost_model: str
    digest: str
    reference_budget: float | None = None
    contenders: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    influence: FloatArray | None = None
    seconds: FloatArray | None = None
    memory: FloatArray | None = None
    pilot: tuple[Stage, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("progress", "cost", "covariance", "influence", "seconds", "memory"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=np.float64))
        points, strategies = self.progress.size, len(self.grid)
        if self.progress.shape != (points,) or not points:
            raise UsageError(f"progress has shape {self.progress.shape}; a profile needs one dimension, not empty")
        if not (np.all((self.progress >= 0) & (self.progress <= 1)) and np.all(np.diff(self.progress) > 0)):
            raise UsageError(f"progress must increase within [0, 1], not {self.progress.tolist()}")
        if self.cost.shape != (strategies,):
            raise UsageError(f"cost has shape {self.cost.shape}; the grid has {strategies} strategies")
        if not np.all(np.isnan(self.cost) | ((self.cost > 0) & np.isfinite(self.cost))):
            raise UsageError(f"cost must be positive, or NaN where it is not known, not {self.cost.tolist()}")
        if self.moments.shape != (points, strategies):
            raise UsageError(f"moments have shape {self.moments.shape}, not {(points, strategies)} (progress, grid)")
        if self.covariance is not None and self.covariance.shape != (points, strategies, len(MOMENTS), len(MOMENTS)):
            raise UsageError(f"covariance has shape {self.covariance.shape}, not {(points, strategies, 5, 5)}")
        self._check_influence()
        for name in ("seconds", "memory"):
            self._check_measured(name)
        if self.batch_size < 1 or not self.beta > 0:
            raise UsageError(f"batch_size={self.batch_size} and beta={self.beta} must be positive")
        self._check_pilot()

    def _check_pilot(self) -> None:
        budget = self.reference_budget
        if budget is not None and (
            isinstance(budget, bool) or not (isinstance(budget, Real) and math.isfinite(budget) and budget > 0)
        ):
            raise UsageError(
                f"reference_budget={budget!r} must be a positive number of units, or None where it is not known"
            )
        if self.pilot is None:
            return
        object.__setattr__(self, "pilot", tuple(self.pilot))
        try:
            Schedule(stages=self.pilot)
        except ScheduleError as error:
            raise UsageError(f"pilot: {error}") from None
        if set(self.pilot[0].strategy) != set(self.grid.axes):
            raise UsageError(
                f"pilot: {self.pilot[0].strategy} has other axes than the grid ({', '.join(self.grid.axes)})"
            )

    def _check_influence(self) -> None:
        if self.influence is None:
            return
        expected = (self.progress.size, len(self.grid), len(MOMENTS))
        if self.influence.ndim != 4 or self.influence.shape[:3] != expected or not self.influence.shape[3]:
            raise UsageError(
                f"influence has shape {self.influence.shape}, not ({', '.join(map(str, expected))}, R) "
                "(progress, grid, moment, replicate)"
            )
        if not np.all(np.isfinite(self.influence)):
            raise UsageError("influence must be finite, 0 where not measured")

    def _check_measured(self, name: str) -> None:
        value: FloatArray | None = getattr(self, name)
        if value is None:
            return
        if value.shape != self.cost.shape:
            raise UsageError(f"{name} has shape {value.shape}; the grid has {len(self.grid)} strategies")
        if not np.all(np.isnan(value) | ((value > 0) & np.isfinite(value))):
            raise UsageError(f"{name} must be positive, or NaN where it was not measured, not {value.tolist()}")

    @property
    def reference_index(self) -> int:
        """Position of the reference among the C strategies."""
        return int(np.ravel_multi_index(self.grid.position(self.grid.reference), self.grid.shape))

    @property
    def reference_cost(self) -> float:
        """Units per sample of the reference; NaN when its cost is not known."""
        return float(self.cost[self.reference_index])

    def for_batch(self, batch_size: int) -> Profile:
        """The same measurements for training with another batch than the K of the sub-batches they were made with.

        Per-sample variances weigh K / `batch_size` as much then, and bias the more: beta grows with the batch. What
        races had ruled out was ruled out at K, so all strategies compete. A loss whose terms depend on the batch (the
        negatives of InfoNCE) is taken as it was at K. Raises UsageError for a batch below 1.
        """
        if batch_size == self.batch_size:
            return self
        beta = self.beta * batch_size / self.batch_size
        return replace(self, batch_size=batch_size, beta=beta, contenders={})

    def scores(self, criterion: str | Criterion, progress_points: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Score and its standard error, both (N, C), at `progress_points` (N,).

        Both are found at the profiled points, from moments made `readable`, and then interpolated by
        `interpolate`. The scores are interpolated and not the moments: a gradient's moments fall by orders
        of magnitude in early training, and moments that are each interpolated on their own (one in the
        logarithm, another, having changed its sign, linearly) need not belong to any gradient, whereas a
        score between two scores is always in range. Neighbouring points count as fully correlated. The
        standard error is NaN without a covariance.
        """
        chosen = get_criterion(criterion)
        moments = readable(self.moments, self.covariance)
        batch, ref = self.batch_size, self.reference_cost
        score = chosen.score(moments, self.cost, beta=self.beta, batch_size=batch, reference_cost=ref)
        score = self.without_losers_luck(chosen, score)
        score = interpolate(self.progress, score, progress_points)
        if self.covariance is None:
            return score, np.full(score.shape, np.nan)
        se = criterion_se(
            chosen, moments, self.covariance, self.cost, beta=self.beta, batch_size=batch, reference_cost=ref
        )
        return score, interpolate(self.progress, se, progress_points)

    def score_influence(self, criterion: str | Criterion) -> FloatArray | None:
        """Influence (T, C, R) of the sub-batches on the scores at the profiled points, by the delta method.

        The root of the sum over R of the squared difference of two strategies' is one standard error of the difference
        of their scores: of paired measurements, in which what common images err by together cancels. None without
        `influence` or a covariance; NaN where a score is.
        """
        if self.influence is None or self.covariance is None:
            return None
        gradient = criterion_gradient(
            criterion, readable(self.moments, self.covariance), self.covariance, self.cost, beta=self.beta,
            batch_size=self.batch_size, reference_cost=self.reference_cost,
        )  # fmt: skip
        return np.asarray(np.einsum("tci,tcir->tcr", gradient, self.influence))

    def without_losers_luck(self, criterion: Criterion, score: FloatArray) -> FloatArray:
        """Scores (..., T, C) in which every strategy that left a race is worse than the best one that did not.

        Worse, not equal: on a tie the first strategy of the grid would win, and it may be one that left.
        """
        stays = self.contenders.get(criterion.name)
        if stays is None:
            return score
        sign = -1.0 if criterion.lower_is_better else 1.0
        worth = sign * score
        best = np.where(stays & np.isfinite(worth), worth, -np.inf).max(axis=-1, keepdims=True)
        kept = stays | ~np.isfinite(best)
        below = np.minimum(best - HAIR * np.abs(best), np.nextafter(best, -np.inf))
        return np.asarray(sign * np.where(kept, worth, np.minimum(worth, below)))


def interpolate(progress: FloatArray, values: FloatArray, progress_points: ArrayLike) -> FloatArray:
    """`values` (T, C) over `progress` (T,) at `progress_points` (N,), giving (N, C).

    Between two points that are both positive, linear in the logarithm; otherwise linear. Constant
    before the first and after the last point. On a profiled point its value alone counts; between
    two, the result is NaN where either is.
    """
    points = np.clip(np.asarray(progress_points, dtype=np.float64), progress[0], progress[-1])
    right = np.clip(np.searchsorted(progress, points), 0, len(progress) - 1)
    left = np.where(progress[right] == points, right, np.maximum(right - 1, 0))
    gap = np.where(right > left, progress[right] - progress[left], 1.0)
    weight = np.where(right > left, (points - progress[left]) / gap, 0.0)[:, None]
    a, b = values[left], values[right]
    positive = (a > 0) & (b > 0)
    log_a, log_b = np.log(np.where(positive, a, 1.0)), np.log(np.where(positive, b, 1.0))
    between = np.where(positive, np.exp((1 - weight) * log_a + weight * log_b), (1 - weight) * a + weight * b)
    return np.where((left == right)[:, None], a, between)
