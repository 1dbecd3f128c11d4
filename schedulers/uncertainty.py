"""How sure a schedule is: a parametric bootstrap over the profile (design §6).

A draw is a profile that the measurements allow: moments plus normal errors. Where the profile keeps the influence of
every sub-batch, theta* = theta + sum_r xi_r influence_r with xi_r normal and common to all cells, so that errors of
strategies and checkpoints that were measured on the same images go together, as they do (the jackknife's
covariances, between cells too). Otherwise every cell errs by itself with its own covariance, which overstates how
much differences are in doubt. A strategy that left a race stays behind the best one that did not, in every draw: the
race has decided that at its own confidence.

Shapes: B draws, T profiled points, C strategies, R replicates, n points of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from schedulers.criteria import MOMENTS, Criterion, FloatArray, Moments, get_criterion, readable
from schedulers.errors import UsageError
from schedulers.mixing import shared_mean
from schedulers.problem import Problem
from schedulers.profile import Profile, interpolate
from schedulers.program import IntArray
from schedulers.stage import Stage
from schedulers.trajectory import gains_of, pilot_gain, pilot_shares

DRAWS = 400
SURE = 0.9  # probability from which on a stage counts as decided
WORTH = 0.01  # expected relative shortfall below which more samples are not worth their cost
LIMITED_DRAWS = 10
MOST_TIMES = 8  # as many samples more are asked for at most
_NUMBERS = 8_000_000  # draws are fewer when strategies are many, to hold no more than this many scores


@dataclass(frozen=True)
class StageDoubt:
    """How sure a stage is of its strategy, by the draws.

    `probability` that no other allowed strategy has a better mean worth over the stage; `regret`, the mean
    shortfall in the draws where one has, relative to the mean of the best; `rival`, which is best most often
    of the others (None when none ever is), and `behind`, in what share of the draws it is better than the strategy;
    `advantage` of the strategy over it, in worth, and its standard error;
    `weight` (T,) of the profiled points in the stage's interpolation, `error` (T,) of the advantage at each.
    """

    probability: float
    regret: float
    rival: int | None
    behind: float
    advantage: float
    advantage_se: float
    best: float
    weight: FloatArray
    error: FloatArray


@dataclass(frozen=True)
class CellWish:
    """A cell (progress point `t`, strategy `c`) whose error leaves a stage open: it should get `times` the samples."""

    t: int
    c: int
    times: int


def moment_draws(profile: Profile, draws: int, seed: int) -> Moments:
    """Moments (B, T, C) that the measurements allow. Raises UsageError for a profile without standard errors."""
    if draws < 1 or seed < 0:
        raise UsageError(f"draws={draws} must be at least 1 and seed={seed} at least 0")
    generator = np.random.default_rng(seed)
    estimate = np.stack([getattr(profile.moments, name) for name in MOMENTS], axis=-1)
    if profile.influence is not None:
        points, strategies, moments, replicates = profile.influence.shape
        noise = generator.standard_normal((draws, replicates))
        errors = (noise @ profile.influence.reshape(-1, replicates).T).reshape(draws, points, strategies, moments)
    elif profile.covariance is not None:
        known = np.asarray(np.isfinite(profile.covariance).all(axis=(-2, -1)))
        if (np.isfinite(estimate).all(axis=-1) & ~known).any():
            raise UsageError("the profile has no standard errors of some measured cells; leave out draws")
        sigma = np.where(known[..., None, None], profile.covariance, 0.0)
        level, axes = np.linalg.eigh(sigma)
        root = axes * np.sqrt(np.maximum(level, 0.0))[..., None, :]
        noise = generator.standard_normal((draws, *estimate.shape))
        # ||G||^2 is one number for all strategies of a point, and so is its error
        errors = np.einsum("tcij,btcj->btci", root, noise)
        shared = MOMENTS.index("norm_sq_ref")
        errors[..., shared] = errors[:, :, profile.reference_index, None, shared]
    else:
        raise UsageError("the profile holds no standard errors, so nothing can be said of how sure a schedule is")
    values = estimate + errors
    spread = MOMENTS.index("variance")  # which cannot be negative, whatever its estimate's error
    values[..., spread] = np.maximum(values[..., spread], 0.01 * estimate[..., spread])
    return Moments(*(values[..., i] for i in range(len(MOMENTS))))


def worth_draws(profile: Profile, criterion: Criterion, mode: str, draws: int, seed: int) -> FloatArray:
    """What strategies are compared by at the profiled points, larger is better: (B, T, C) of as many draws.

    By trajectory the speed relative to the pilot's in the same draw (`trajectory.speeds`: the pilot moves at 1 by
    definition), NaN where that is not known; by fraction the score with its sign.
    """
    moments = readable(moment_draws(profile, draws, seed), profile.covariance)
    batch, ref = profile.batch_size, profile.reference_cost
    score = criterion.score(moments, profile.cost, beta=profile.beta, batch_size=batch, reference_cost=ref)
    score = np.where(np.isfinite(score), score, profile.scores(criterion, profile.progress)[0])  # a draw without |G|^2
    score = profile.without_losers_luck(criterion, score)
    if mode == "fraction":
        return -score if criterion.lower_is_better else score
    gain, known_T = gains_of(score, criterion), pilot_gain(profile, criterion)
    pilot_BT = shared_mean(pilot_shares(profile), gain)
    # a draw in which the pilot hardly moves says nothing of speeds: its estimate's tenth is the least
    pilot_BT = np.where(np.isfinite(known_T), np.maximum(pilot_BT, 0.1 * known_T), np.nan)
    return np.asarray(gain / pilot_BT[..., None])


def stage_doubts(
    profile: Profile,
    criterion: str | Criterion,
    mode: str,
    stages: Sequence[Stage],
    positions: Sequence[FloatArray],
    allowed: NDArray[np.bool_],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[StageDoubt | None]:
    """How sure each stage is of its main strategy among the `allowed` (C,) ones.

    `positions`: for each stage the progress (n,) at equally spaced parts of its budget, where its strategies are
    compared by their mean worth. None for a stage whose strategy was not measured there. Raises UsageError as
    `moment_draws`.
    """
    chosen = get_criterion(criterion)
    points = sum(len(p) for p in positions)
    draws = min(draws, max(50, _NUMBERS // max(1, points * len(profile.grid))))
    worth = worth_draws(profile, chosen, mode, draws, seed)
    strategies = profile.grid.strategies()
    there = np.asarray(np.isfinite(worth).any(axis=(0, 2)))  # points that say something
    compare = _Comparison(
        profile.progress[there],
        worth[:, there],
        allowed,
        -1.0 if mode == "fraction" and chosen.lower_is_better else 1.0,
    )
    found = [compare.doubt(strategies.index(s.strategy), at) for s, at in zip(stages, positions, strict=True)]
    return [
        None if d is None else replace(d, weight=_spread(d.weight, there), error=_spread(d.error, there)) for d in found
    ]


def cells_worth_samples(
    profile: Profile, stages: Sequence[Stage], doubts: Sequence[StageDoubt | None]
) -> list[CellWish]:
    """The cells whose errors leave a stage open whose expected shortfall is worth samples, by point and strategy.

    For a stage less than 90 % sure with an expected relative shortfall of at least 1 %, where it is not as good as
    certain that the rival is better (a constraint forces the strategy then), and whose shortfall times its share of the
    budget is at least a quarter of the largest: the cells of its
    strategy and of its rival at the points that contribute most to the error of their difference. `times` would
    bring that error to where the difference, or 5 % of the best, can be told at 95 %.
    """
    strategies, wishes = profile.grid.strategies(), dict[tuple[int, int], int]()
    lost = [
        (s.end - s.start) * (1 - d.probability) * d.regret if d else 0.0 for s, d in zip(stages, doubts, strict=True)
    ]
    for stage, doubt, loss in zip(stages, doubts, lost, strict=True):
        if doubt is None or doubt.rival is None or not 1 - SURE < doubt.behind < SURE:
            continue
        if doubt.probability >= SURE or (1 - doubt.probability) * doubt.regret < WORTH or loss < max(lost) / 4:
            continue
        tell = max(abs(doubt.advantage), 0.05 * abs(doubt.best)) / 1.64
        ratio = (doubt.advantage_se / tell) ** 2 if tell > 0 else MOST_TIMES
        times = int(2 ** np.ceil(np.log2(np.clip(ratio, 2, MOST_TIMES))))
        part = doubt.weight * doubt.error
        for t in np.flatnonzero(part >= 0.5 * part.max()):
            for c in (strategies.index(stage.strategy), doubt.rival):
                wishes[int(t), c] = max(times, wishes.get((int(t), c), 0))
    return [CellWish(t, c, times) for (t, c), times in sorted(wishes.items())]


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Draws of worth (B, T, C) over `progress` (T,), interpolated with the sign that scores have (`flip`)."""

    progress: FloatArray
    worth: FloatArray
    allowed: NDArray[np.bool_]
    flip: float

    def doubt(self, main: int, at: FloatArray) -> StageDoubt | None:
        draws, points, strategies = self.worth.shape
        columns = self.worth.transpose(1, 0, 2).reshape(points, -1)
        there = (self.flip * interpolate(self.progress, self.flip * columns, at)).reshape(len(at), draws, strategies)
        there = there[np.isfinite(there[:, :, main]).all(axis=1)]
        if not len(there):
            return None
        mean_BC = there.mean(axis=0)
        others = self.allowed & np.isfinite(mean_BC).all(axis=0)
        mean_BC = np.where(others | (np.arange(strategies) == main), mean_BC, -np.inf)
        own_B, top_B = mean_BC[:, main], mean_BC.max(axis=1)
        lost = top_B > own_B
        weight = interpolate(self.progress, np.eye(points) - 1.0, at).mean(axis=0) + 1.0  # linear: none is positive
        scale = abs(float(top_B.mean()))
        if not lost.any():
            return StageDoubt(1.0, 0.0, None, 0.0, 0.0, 0.0, scale, weight, np.zeros(points))
        rival = int(np.bincount(mean_BC.argmax(axis=1)[lost], minlength=strategies).argmax())
        apart = own_B - mean_BC[:, rival]
        return StageDoubt(
            probability=1.0 - float(lost.mean()),
            regret=float((top_B - own_B)[lost].mean()) / scale if scale > 0 else 0.0,
            rival=rival,
            behind=float((apart < 0).mean()),
            advantage=float(apart.mean()),
            advantage_se=float(apart.std()),
            best=scale,
            weight=weight,
            error=np.nan_to_num((self.worth[:, :, main] - self.worth[:, :, rival]).std(axis=0)),
        )


def _spread(values: FloatArray, there: NDArray[np.bool_]) -> FloatArray:
    """Values of the points that are `there` (T,), 0 at the others."""
    spread = np.zeros(there.size)
    spread[there] = values
    return spread


def with_doubts(profile: Profile, stages: Sequence[Stage], doubts: Sequence[StageDoubt | None]) -> tuple[Stage, ...]:
    """The stages with their probability, regret and rival; as they are where there is no doubt to tell of."""
    strategies = profile.grid.strategies()
    return tuple(
        stage
        if doubt is None
        else replace(
            stage,
            probability=doubt.probability,
            regret=doubt.regret,
            rival=None if doubt.rival is None else strategies[doubt.rival],
        )
        for stage, doubt in zip(stages, doubts, strict=True)
    )


def redrawn(
    problem: Problem, path: IntArray, budget: float, *, draws: int, seed: int = 0
) -> tuple[FloatArray, FloatArray]:
    """What a path is worth in each draw, (B,), and what the best path of that draw is, under the same constraints.

    Every draw is solved anew; where a limit of seconds binds, which takes longer, at most LIMITED_DRAWS are made.
    """
    limit, seconds = problem.constraints.max_seconds, problem.path_seconds(path, budget)
    if limit is not None and seconds is not None and seconds > 0.9 * limit:
        draws = min(draws, LIMITED_DRAWS)
    worth = worth_draws(problem.profile, problem.criterion, problem.mode, draws, seed)
    own, best = np.empty(draws), np.empty(draws)
    for b in range(draws):
        drawn = problem.with_worth(worth[b])
        own[b] = drawn.value(path, budget)
        best[b] = max(own[b], drawn.value(drawn.solve(budget, intervals=50)[0], budget))
    return own, best


def relative_shortfall(own: FloatArray, best: FloatArray) -> float:
    """Mean shortfall of `own` to `best` (B,) over the mean of the best; 0 where that is 0."""
    scale = abs(float(best.mean()))
    return float((best - own).mean()) / scale if scale > 0 else 0.0
