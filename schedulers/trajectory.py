"""Training as motion through a profile: how far a budget carries it under each strategy.

Progress p is where the profiled run (the pilot, budget T) stood. Under strategy c training moves at

    dp / d(units) = v_c(p) / T,    v_c(p) = gain_c(p) / gain_pilot(p)

where the gain of a strategy is its criterion read as gain per unit (`gains`), and the pilot's is that of the mixture
it ran, so that the pilot itself moves at speed 1. Between profiled points v is linear in the logarithm where both
ends are positive and linear otherwise; negative values move nothing (training does not go back). Outside
the profiled points v is constant, also beyond p = 1, where nothing was measured. The motion is found in closed form,
piece by piece: there is no step size.

Shapes: T profiled points, C strategies, J pieces of a strategy, n values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from schedulers.criteria import Criterion, FloatArray, get_criterion
from schedulers.errors import UsageError
from schedulers.mixing import budget_shares, shared_mean
from schedulers.profile import Profile

IntArray = NDArray[np.intp]
TABLE = 2048  # points of a tabulated motion


@dataclass(frozen=True, eq=False)
class Speeds:
    """Speed of every strategy relative to the pilot's, at some points of its progress.

    `progress` (T,) strictly increasing, at least 0; `speed` (T, C), negative where training would go back, NaN where
    not known (nothing moves there and towards the neighbouring points); `budget` T of the pilot in units.
    """

    progress: FloatArray
    speed: FloatArray
    budget: float
    _pieces: _Pieces = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.budget) and self.budget > 0):
            raise UsageError(f"budget={self.budget} of the profiled run must be a positive number of units")
        object.__setattr__(self, "_pieces", _pieces(self.progress, self.speed))

    def at(self, progress: FloatArray, strategies: IntArray) -> FloatArray:
        """Speeds (n,), at least 0, of `strategies` (n,) at `progress` (n,)."""
        return self._pieces.speed(progress, strategies, self._pieces.find(progress, strategies))

    def advance(self, progress: FloatArray, units: float, strategies: IntArray) -> FloatArray:
        """Progress (n,) after `units` more under `strategies` (n,), from `progress` (n,)."""
        p = np.array(progress, dtype=np.float64)
        left = np.full(p.shape, units / self.budget)
        todo = np.arange(p.size) if units > 0 else np.empty(0, dtype=np.intp)
        while todo.size:
            c, x = strategies[todo], p[todo]
            j = self._pieces.find(x, c)
            v = self._pieces.speed(x, c, j)
            needs = self._pieces.time_to_end(x, c, j, v)
            inside = left[todo] < needs
            p[todo] = np.where(
                inside, self._pieces.move(x, c, j, v, np.minimum(left[todo], needs)), self._pieces.end[c, j]
            )
            left[todo] -= np.where(inside, 0.0, needs)
            todo = todo[~inside & (v > 0) & (left[todo] > 0)]
        return p

    def units_to(self, target: float, strategy: int, start: float = 0.0) -> float:
        """Units that take training from `start` to `target` under one strategy alone; inf if it never gets there."""
        p, units = start, 0.0
        c = np.array([strategy])
        while p < target:
            x = np.array([p])
            j = self._pieces.find(x, c)
            v = self._pieces.speed(x, c, j)
            end = min(float(self._pieces.end[c, j][0]), target)
            units += float(self._pieces.time_to(x, c, j, v, np.array([end]))[0]) * self.budget
            if not np.isfinite(units):
                return float("inf")
            p = end
        return units

    def tabulated(self, units: float, reach: float) -> Motion:
        """The motion of `units` in a table over [0, reach], for many values at once: interpolated, order kept."""
        points = np.linspace(0.0, reach, TABLE)
        strategies = np.arange(self.speed.shape[1])
        grid = np.broadcast_to(points, (strategies.size, TABLE)).ravel()
        after = self.advance(grid, units, np.repeat(strategies, TABLE))
        return Motion(points[1], np.maximum.accumulate(after.reshape(strategies.size, TABLE), axis=1))


@dataclass(frozen=True, eq=False)
class Motion:
    """Progress after some units, tabulated at 0, step, 2 step, ...: `after` (C, TABLE)."""

    step: float
    after: FloatArray

    def __call__(self, progress: FloatArray, strategies: IntArray) -> FloatArray:
        place = np.clip(progress / self.step, 0, TABLE - 1.000001)
        left = place.astype(np.intp)
        at = strategies * TABLE + left
        flat = self.after.ravel()
        return np.asarray(flat[at] + (place - left) * (flat[at + 1] - flat[at]))


def speeds(profile: Profile, criterion: str | Criterion) -> Speeds:
    """The speeds of a profile's strategies by a criterion.

    Points where the pilot's own gain is not known to be positive (the gradient is lost in noise) say nothing of
    relative speeds and are passed over; where it is positive but below its standard error, the standard error stands
    in for it. Without a known pilot the reference counts as the pilot. Raises UsageError when the profile does not
    know the budget of the profiled run, or no point is left.
    """
    if profile.reference_budget is None:
        raise UsageError(
            "the profile does not know the budget of the profiled run, which progress by trajectory is counted in; "
            "use progress='fraction', or let the task's `training` give a budget"
        )
    chosen = get_criterion(criterion)
    gain_T = pilot_gain(profile, chosen)
    there = np.isfinite(gain_T)
    if not np.isfinite(profile.scores(chosen, profile.progress)[0]).any():
        raise UsageError(
            f"the profile gives no {chosen.name} score at any progress (metric {profile.metric}, costs "
            f"{profile.cost_model}): cells or costs are missing, or the reference gradient is zero or lost in noise; "
            "profile more cells or more samples"
        )
    if not there.any():
        raise UsageError(
            f"the {chosen.name} score of the profiled run itself is not above 0 at any progress (metric "
            f"{profile.metric}): the reference gradient is zero or lost in noise, so nothing can be said of relative "
            "speeds; "
            "profile more samples, or use progress='fraction'"
        )
    speed = gains(profile, chosen)[0][there] / gain_T[there, None]
    return Speeds(profile.progress[there], speed, float(profile.reference_budget))


def gains(profile: Profile, criterion: Criterion) -> tuple[FloatArray, FloatArray]:
    """Gain per unit of every strategy at the profiled points (`gains_of`) and its standard error: (T, C) each."""
    score, se = profile.scores(criterion, profile.progress)
    gain = gains_of(score, criterion)
    return gain, se * gain**2 if criterion.lower_is_better else se


def gains_of(score: FloatArray, criterion: Criterion) -> FloatArray:
    """Scores (..., C) as gain per unit: NaN where the score is.

    The score itself where higher is better. Where lower is better its inverse, as a strategy with half the error
    needs half the budget; a score that is not positive (an error lost in noise) counts as the smallest positive one
    of its point.
    """
    if not criterion.lower_is_better:
        return score
    least = np.where(score > 0, score, np.inf).min(axis=-1, keepdims=True)
    least = np.where(np.isfinite(least), least, np.nan)
    return np.asarray(1 / np.where(np.isnan(score), np.nan, np.where(score > 0, score, least)))


def pilot_shares(profile: Profile) -> FloatArray:
    """Shares of the budget (T, C) that the profiled run spent on the strategies at each profiled point.

    All on the reference for a run that is not known, or that ran nothing of the grid there.
    """
    share = np.zeros((profile.progress.size, len(profile.grid)))
    share[:, profile.reference_index] = 1.0
    if profile.pilot is None:
        return share
    weights, strategies = np.zeros(share.shape), profile.grid.strategies()
    for t, progress in enumerate(profile.progress):
        stage = next((s for s in profile.pilot if progress < s.end), profile.pilot[-1])
        for strategy, weight in stage.mixture:
            if strategy in strategies and np.isfinite(profile.cost[strategies.index(strategy)]):
                weights[t, strategies.index(strategy)] = weight
    known = weights.any(axis=1)
    share[known] = budget_shares(weights[known], np.where(np.isfinite(profile.cost), profile.cost, 0.0))
    return share


def pilot_gain(profile: Profile, criterion: Criterion) -> FloatArray:
    """Gain of what the profiled run ran at each profiled point, (T,): at least its standard error, NaN if not above 0.

    The run's mixture gains the mean of its strategies by their shares of the budget; their errors are added as if
    fully correlated, since they were measured on the same images.
    """
    gain_TC, se_TC = gains(profile, criterion)
    share = pilot_shares(profile)
    gain_T, se_T = shared_mean(share, gain_TC), (share * np.nan_to_num(se_TC)).sum(axis=1)
    return np.asarray(np.where(gain_T > 0, np.maximum(gain_T, se_T), np.nan))


@dataclass(frozen=True, eq=False)
class _Pieces:
    """Pieces of p on which a strategy's speed has one form: start, end, speed at start, rate; (C, J = 2T) each.

    One before the first of the `points` (T,), two between neighbours, on either side of where a speed crosses zero
    (the second one is empty where it does not), one after the last. Exponential pieces: v = v0 exp(rate (p - start));
    the others: v = v0 + rate (p - start).
    """

    points: FloatArray
    start: FloatArray
    end: FloatArray
    v0: FloatArray
    rate: FloatArray
    exponential: NDArray[np.bool_]

    def find(self, p: FloatArray, c: IntArray) -> IntArray:
        passed = np.searchsorted(self.points, p, side="right")
        first = np.maximum(2 * passed - 1, 0)
        second = np.minimum(first + 1, self.start.shape[1] - 1)
        between = (passed > 0) & (passed < len(self.points))
        return np.asarray(first + (between & (p >= self.start[c, second])))

    def speed(self, p: FloatArray, c: IntArray, j: IntArray) -> FloatArray:
        along = self.rate[c, j] * (p - self.start[c, j])
        return np.where(
            self.exponential[c, j], self.v0[c, j] * np.exp(np.minimum(along, 700)), np.maximum(self.v0[c, j] + along, 0)
        )

    def time_to_end(self, p: FloatArray, c: IntArray, j: IntArray, v: FloatArray) -> FloatArray:
        return self.time_to(p, c, j, v, self.end[c, j])

    def time_to(self, p: FloatArray, c: IntArray, j: IntArray, v: FloatArray, end: FloatArray) -> FloatArray:
        """Time from p, where the speed is v, to `end` in the same piece."""
        rate, gap = self.rate[c, j], end - p
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            flat = gap / v
            bent = -np.expm1(-rate * gap) / (v * rate)
            line = np.log(np.maximum(v + rate * gap, 0) / v) / rate
        time = np.where(rate == 0, flat, np.where(self.exponential[c, j], bent, line))
        return np.where(v > 0, np.maximum(time, 0), np.inf)

    def move(self, p: FloatArray, c: IntArray, j: IntArray, v: FloatArray, time: FloatArray) -> FloatArray:
        """Where p is after `time`, within its piece."""
        rate = self.rate[c, j]
        time = np.where(np.isfinite(time), time, 0.0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            bent = -np.log1p(np.maximum(-v * rate * time, -1)) / rate
            line = v * np.expm1(rate * time) / rate
        step = np.where(rate == 0, v * time, np.where(self.exponential[c, j], bent, line))
        return np.asarray(np.minimum(p + np.where(v > 0, np.maximum(step, 0), 0.0), self.end[c, j]))


def _pieces(progress: FloatArray, speed_TC: FloatArray) -> _Pieces:
    points, strategies = speed_TC.shape
    known = np.isfinite(speed_TC)
    ends = np.where(known, np.maximum(speed_TC, 0.0), 0.0)
    columns: list[tuple[FloatArray, FloatArray, FloatArray, FloatArray, NDArray[np.bool_]]] = []

    def add(
        start: FloatArray | float,
        end: FloatArray | float,
        v0: FloatArray,
        rate: FloatArray,
        bent: NDArray[np.bool_] | bool,
    ) -> None:
        whole = np.zeros(strategies)
        columns.append((whole + start, whole + end, whole + v0, whole + rate, np.zeros(strategies, bool) | bent))

    still = np.zeros(strategies)
    add(0.0, float(progress[0]), ends[0], still, True)
    for t in range(points - 1):
        a, b = speed_TC[t], speed_TC[t + 1]
        left, right = float(progress[t]), float(progress[t + 1])
        gap = right - left
        both = known[t] & known[t + 1]
        bent = both & (a > 0) & (b > 0)
        falls, rises = both & (a > 0) & (b <= 0), both & (a <= 0) & (b > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(falls | rises, (b - a) / gap, 0.0)
            zero = np.where(falls | rises, left + np.clip(a / (a - b), 0, 1) * gap, right)
            rate = np.where(bent, np.log(np.where(bent, b, 1.0) / np.where(bent, a, 1.0)) / gap, 0.0)
        add(left, zero, np.where(bent | falls, a, 0.0), np.where(falls, slope, rate), bent)
        add(zero, right, np.zeros(strategies), np.where(rises, slope, 0.0), False)
    add(float(progress[-1]), np.inf, ends[-1], still, True)
    start, end, v0, rate, exponential = (np.stack(values, axis=1) for values in zip(*columns, strict=True))
    return _Pieces(progress, start, end, v0, rate, exponential)
