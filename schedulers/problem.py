"""A question to the dynamic program: a profile, a criterion, constraints and a grid of slices, as plain arrays.

A candidate of a slice is a strategy together with its share of exploration: with probability 1 - e the strategy
itself, otherwise any of the explored ones, itself included, all alike. Slices that must run the reference are pure.

Shapes: N slices, C strategies (candidates are numbered as they are), T profiled points.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from schedulers.constraints import (
    Constraints,
    allowed_strategies,
    dwell_slices,
    final_slice,
    followers,
    on_grid,
)
from schedulers.criteria import Criterion, FloatArray, get_criterion
from schedulers.errors import UsageError
from schedulers.mixing import budget_shares, mixed, shared_mean
from schedulers.profile import Profile, interpolate
from schedulers.program import Advance, IntArray, Rules, additive, best_path
from schedulers.program_sum_within import best_sum_within
from schedulers.program_within import INTERVALS, best_path_within, path_seconds, with_fewer_switches
from schedulers.trajectory import Motion, Speeds, speeds

MOST_SLICES = 10_000
STAGE_POINTS = 16  # of a stage by trajectory, at which strategies are compared
MANY_LABELS = 4000  # beyond it the motion of labels is looked up in a table


@dataclass(frozen=True, eq=False)
class Problem:
    """One optimization without its budget: what depends on the budget takes it as an argument.

    `mode` is "fraction" or "trajectory". Raises UsageError for arguments out of range and for a profile that says
    nothing at some progress.
    """

    profile: Profile
    criterion: Criterion
    constraints: Constraints
    slices: int
    exploration: float
    mode: str
    explored: NDArray[np.bool_] = field(init=False, repr=False)  # (C,): what exploration draws from
    weights: FloatArray = field(init=False, repr=False)  # (C, C): of candidate a, the probability of strategy c
    speeds: Speeds | None = field(init=False, repr=False)  # of pure strategies
    mixed_speeds: Speeds | None = field(init=False, repr=False)  # of candidates with their exploration
    rules: Rules = field(init=False, repr=False)
    score: FloatArray = field(init=False, repr=False)  # (N, C) in fraction mode, of candidates; better is larger

    @classmethod
    def of(
        cls,
        profile: Profile,
        criterion: str | Criterion,
        constraints: Constraints,
        slices: int,
        exploration: float,
        mode: str,
    ) -> Problem:
        if slices < 1:
            raise UsageError(f"slices={slices} must be at least 1")
        if slices > MOST_SLICES:
            raise UsageError(f"slices={slices}: at most {MOST_SLICES:,}; a hundred are as good")
        if not 0 <= exploration <= 1:
            raise UsageError(f"exploration={exploration} is not a probability in [0, 1]")
        return cls(profile, get_criterion(criterion), on_grid(constraints, profile), slices, exploration, mode)

    def __post_init__(self) -> None:
        profile, put = self.profile, object.__setattr__
        allowed = allowed_strategies(profile, self.constraints)
        put(self, "speeds", speeds(profile, self.criterion) if self.mode == "trajectory" else None)
        found = profile.scores(self.criterion, profile.progress)[0] if self.speeds is None else self.speeds.speed
        measured = np.isfinite(found[np.isfinite(found).any(axis=1)]).all(axis=0)
        put(self, "explored", allowed & measured)
        if self.exploration and not self.explored.any():
            raise UsageError(
                f"exploration={self.exploration} has nothing to explore: no allowed strategy was measured at every "
                "point of the profile; measure the missing cells, or leave it out"
            )
        put(self, "weights", _weights(self.exploration, self.explored, len(allowed)))
        put(self, "mixed_speeds", self.speeds)
        usable = np.broadcast_to(allowed, (self.slices, len(allowed))).copy()
        if self.speeds is None:
            score = profile.scores(self.criterion, np.arange(self.slices) / self.slices)[0]
            self._check_measured(score)
            usable &= np.isfinite(score)
            put(self, "score", self._by_slice(score) * (-1.0 if self.criterion.lower_is_better else 1.0))
            usable &= np.isfinite(self.score)
        else:
            self._check_measured(np.where(np.isfinite(self.speeds.speed), 0.0, np.nan))
            put(self, "mixed_speeds", self._mixed(self.speeds))
            usable &= np.isfinite(self.speeds.speed).any(axis=0)
            put(self, "score", np.zeros((self.slices, len(allowed))))
        final = final_slice(self.constraints, self.slices)
        usable[final:, np.arange(len(allowed)) != profile.reference_index] = False
        follows = followers(profile.grid, profile.cost, self.constraints)
        dwell = dwell_slices(self.constraints, self.slices)
        put(self, "rules", Rules(usable, follows, self.constraints.max_switches, dwell))

    @property
    def final(self) -> int:
        """First slice that must run the reference, and runs it purely."""
        return final_slice(self.constraints, self.slices)

    def explores(self, k: int) -> bool:
        """Whether candidates of slice k explore."""
        return self.exploration > 0 and k < self.final

    def mixture(self, c: int, k: int) -> FloatArray:
        """Probability per step of every strategy, (C,), when slice k runs candidate c."""
        if self.explores(k):
            return np.asarray(self.weights[c])
        return np.asarray(np.eye(len(self.weights))[c])

    def seconds(self, budget: float) -> FloatArray | None:
        """Seconds of a slice under each candidate, (N, C), NaN where not measured; None without measured seconds."""
        profile = self.profile
        if profile.seconds is None:
            return None
        per_unit = profile.seconds / profile.cost
        cost, seconds = (np.where(np.isfinite(v), v, 0.0) for v in (profile.cost, profile.seconds))
        unknown = self.weights @ (~np.isfinite(per_unit)).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            mixed_per_unit = np.where(unknown > 0, np.nan, (self.weights @ seconds) / (self.weights @ cost))
        rows = np.array([self.explores(k) for k in range(self.slices)])[:, None]
        return np.asarray(np.where(rows, mixed_per_unit, per_unit) * (budget / self.slices))

    def advance(self, budget: float) -> Advance:
        """How a slice changes what a path is worth: its progress, or the sum of its scores."""
        if self.speeds is None or self.mixed_speeds is None:
            return additive(self.score)
        pure, mixture, final, unit = self.speeds, self.mixed_speeds, self.final, budget / self.slices
        tables: dict[tuple[bool, int], Motion] = {}
        reach = [0.0]

        def moved(explores: bool, count: int, values: FloatArray, strategies: IntArray) -> FloatArray:
            motion = mixture if explores else pure
            if values.size <= self._few:
                return motion.advance(values, count * unit, strategies)
            if not reach[0]:
                reach[0] = max(1.0, self._farthest(budget)) * 1.001
            if (explores, count) not in tables:
                tables[explores, count] = motion.tabulated(count * unit, reach[0])
            return tables[explores, count](values, strategies)

        def advance(first: int, count: int, values: FloatArray, strategies: IntArray) -> FloatArray:
            exploring = min(max(final - first, 0), count) if self.exploration else 0
            if exploring:
                values = moved(True, exploring, values, strategies)
            return moved(False, count - exploring, values, strategies) if count > exploring else values

        return advance

    @property
    def _few(self) -> int:
        """Labels up to which their motion is not looked up in a table: one is made for every strategy."""
        return max(MANY_LABELS, 8 * len(self.weights))

    def _farthest(self, budget: float) -> float:
        """The progress that no path exceeds: that of the best one without any constraint."""
        free, unit = Rules(np.ones_like(self.rules.usable)), budget / self.slices
        ends = [0.0]
        for motion in (self.speeds, self.mixed_speeds):
            assert motion is not None

            def run(first: int, count: int, values: FloatArray, c: IntArray, motion: Speeds = motion) -> FloatArray:
                return motion.advance(values, count * unit, c)

            p = np.zeros(1)
            for k, c in enumerate(best_path(free, run)):
                p = run(k, 1, p, np.array([c]))
            ends.append(float(p[0]))
        return max(ends)

    def positions(self, path: IntArray, budget: float) -> FloatArray:
        """Predicted progress at the start of every slice of a path and at its end, (N + 1,)."""
        if self.speeds is None:
            return np.arange(self.slices + 1) / self.slices
        advance, positions = self.advance(budget), np.zeros(self.slices + 1)
        for k, c in enumerate(path):
            positions[k + 1] = advance(k, 1, positions[k : k + 1], np.array([c]))[0]
        return positions

    @property
    def step_cost(self) -> FloatArray:
        """Units of a step of the dearest strategy that a candidate draws, (C,)."""
        cost = np.where(np.isfinite(self.profile.cost), self.profile.cost, 0.0)
        return np.asarray(self.profile.batch_size * np.where(self.weights > 0, cost, 0.0).max(axis=1))

    def rules_for(self, budget: float) -> Rules:
        """The rules, without candidates of which the budget does not pay for a step."""
        pure = self.profile.batch_size * np.where(np.isfinite(self.profile.cost), self.profile.cost, np.inf)
        rows = np.array([self.explores(k) for k in range(self.slices)])[:, None]
        return replace(self.rules, usable=self.rules.usable & (np.where(rows, self.step_cost, pure) <= budget))

    def solve(self, budget: float, *, intervals: int = INTERVALS) -> tuple[IntArray, bool]:
        """The best path (N,), and whether it is known to be exactly that. Raises InfeasibleError."""
        limit, seconds, rules = self.constraints.max_seconds, self.seconds(budget), self.rules_for(budget)
        if limit is None or seconds is None:
            tabulated = self.mode == "trajectory" and self.rules.strategies * self.rules.counted > self._few
            return best_path(rules, self.advance(budget)), not tabulated
        rules = replace(rules, usable=rules.usable & np.isfinite(seconds))
        seconds = np.where(rules.usable, seconds, 0.0)
        if self.mode == "trajectory":
            path, is_exact = best_path_within(rules, self.advance(budget), seconds, limit, intervals=intervals)
        else:
            path, bound = best_sum_within(rules, self.score, seconds, limit)
            reached = float(self.score[np.arange(self.slices), path].sum())
            is_exact = bound <= reached + 1e-9 * max(abs(bound), abs(reached))
        return with_fewer_switches(path, rules, seconds, limit, lambda p: self.value(p, budget)), is_exact

    def value(self, path: IntArray, budget: float) -> float:
        """What the path is worth: the progress it reaches, or the mean score (larger is better)."""
        if self.mode == "trajectory":
            return float(self.positions(path, budget)[-1])
        return float(self.score[np.arange(self.slices), path].mean())

    def with_worth(self, worth_TC: FloatArray) -> Problem:
        """The same problem on another draw of what strategies are worth at the profiled points (`worth_draws`)."""
        other = copy.copy(self)
        put = object.__setattr__
        if self.speeds is None:
            flip = -1.0 if self.criterion.lower_is_better else 1.0
            at = np.arange(self.slices) / self.slices
            score = self._by_slice(flip * interpolate(self.profile.progress, flip * worth_TC, at))
            put(other, "score", np.where(self.rules.usable, score, 0.0))
            return other
        there = np.isfinite(worth_TC).any(axis=1)
        motion = replace(self.speeds, progress=self.profile.progress[there], speed=worth_TC[there])
        put(other, "speeds", motion)
        put(other, "mixed_speeds", self._mixed(motion))
        return other

    def _mixed(self, motion: Speeds) -> Speeds:
        """Speeds of the candidates with their exploration, from those of pure strategies."""
        if not self.exploration:
            return motion
        return replace(motion, speed=mixed(budget_shares(self.weights, _known(self.profile.cost)), motion.speed))

    def path_seconds(self, path: IntArray, budget: float) -> float | None:
        """Predicted seconds of a path; None where they were not measured."""
        seconds = self.seconds(budget)
        total = math.nan if seconds is None else path_seconds(seconds, path)
        return total if math.isfinite(total) else None

    def compared_at(self, path: IntArray, positions: FloatArray, first: int, end: int, budget: float) -> FloatArray:
        """Progress at parts of a stage [first, end) of slices, where its strategy is compared with others."""
        motion = self.mixed_speeds if self.explores(first) else self.speeds
        if motion is None:
            return np.arange(first, end) / self.slices
        units = (np.arange(STAGE_POINTS) + 0.5) / STAGE_POINTS * (end - first) / self.slices * budget
        start, strategy = positions[first : first + 1], path[first : first + 1]
        return np.array([motion.advance(start, float(u), strategy)[0] for u in units])

    def scores_along(self, path: IntArray, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Score of what runs in every slice, and one standard error, (N,) each: by shares of the budget.

        The errors of a mixture's strategies are added as if fully correlated.
        """
        score, se = self.profile.scores(self.criterion, np.minimum(positions[:-1], 1.0))
        found = np.empty((2, self.slices))
        for k, c in enumerate(path):
            share = budget_shares(self.mixture(c, k), _known(self.profile.cost))
            found[:, k] = shared_mean(share, score[k]), shared_mean(share, se[k])
        return found[0], found[1]

    def _by_slice(self, score: FloatArray) -> FloatArray:
        """Scores (N, C) of pure strategies as those of candidates."""
        if not self.exploration:
            return score
        mixture = mixed(budget_shares(self.weights, _known(self.profile.cost)), score)
        rows = np.array([self.explores(k) for k in range(self.slices)])[:, None]
        return np.asarray(np.where(rows, mixture, score))

    def _check_measured(self, score: FloatArray) -> None:
        score = np.where(np.isfinite(self.profile.cost), score, np.nan)
        empty = np.flatnonzero(~np.isfinite(score).any(axis=1))
        if not empty.size:
            return
        at = empty[0] / len(score) if self.speeds is None else float(self.speeds.progress[empty[0]])
        lost = self.profile.progress[~np.isfinite(self.profile.scores(self.criterion, self.profile.progress)[0]).any(1)]
        passed = self.mode == "fraction" and 0 < lost.size < self.profile.progress.size
        where = f"the profiled progress {_listed(lost)}" if lost.size else f"progress {at:g}"
        raise UsageError(
            f"the profile gives no {self.criterion.name} score for any strategy at {where} (metric "
            f"{self.profile.metric}, costs {self.profile.cost_model}): cells or costs are missing there, or the "
            "reference gradient is zero or lost in noise; profile more cells or more samples there"
            f"{', or use progress by trajectory, which passes over such points' if passed else ''}"
        )


def _listed(points: FloatArray) -> str:
    more = f" and {points.size - 5} more" if points.size > 5 else ""
    return ", ".join(f"{point:g}" for point in points[:5]) + more


def _weights(exploration: float, explored: NDArray[np.bool_], strategies: int) -> FloatArray:
    own = np.eye(strategies)
    if not exploration:
        return own
    return np.asarray((1 - exploration) * own + exploration * explored / explored.sum())


def _known(cost: FloatArray) -> FloatArray:
    """Costs with those that are not known at 1: they are never weighted."""
    return np.where(np.isfinite(cost), cost, 1.0)
