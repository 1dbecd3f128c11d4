"""From a profile, a budget and constraints to the best schedule; from a target to the smallest budget (design §6)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np

from schedulers.constraints import UNCONSTRAINED, Constraints, allowed_strategies
from schedulers.criteria import Criterion, get_criterion
from schedulers.errors import Change, InfeasibleError, UsageError
from schedulers.mixing import mixed
from schedulers.problem import Problem
from schedulers.profile import Profile
from schedulers.program import FloatArray, IntArray
from schedulers.program_within import least_seconds_path, path_seconds
from schedulers.relaxation import infeasible
from schedulers.schedule import PROGRESS_MODES, Schedule
from schedulers.stage import Stage
from schedulers.trajectory import pilot_gain, speeds
from schedulers.uncertainty import (
    StageDoubt,
    cells_worth_samples,
    redrawn,
    relative_shortfall,
    stage_doubts,
    with_doubts,
)

SLICES = 100
TARGET_PRECISION = 1e-4  # relative, of the smallest budget that reaches a target
REGRET_DRAWS = 100  # of the bootstrap, each of which is optimized anew
FARTHEST = 1e6  # times the profiled run's budget: a target that is not reached by then is not reached


def default_mode(profile: Profile, criterion: str | Criterion = "descent") -> str:
    """`trajectory` where the profile knows the profiled run's budget and tells relative speeds, else `fraction`."""
    chosen = get_criterion(criterion)
    if profile.reference_budget is None:
        return "fraction"
    return "trajectory" if np.isfinite(pilot_gain(profile, chosen)).any() else "fraction"


def optimize(
    profile: Profile,
    budget: float,
    *,
    criterion: str | Criterion = "descent",
    constraints: Constraints = UNCONSTRAINED,
    slices: int = SLICES,
    exploration: float = 0.0,
    progress: str | None = None,
    draws: int = 0,
    seed: int = 0,
) -> Schedule:
    """The best schedule for `budget` units, in `slices` equal parts of it.

    `progress="fraction"` (the paper's): slice k stands at progress k / slices whatever runs, and the mean criterion is
    best. `progress="trajectory"`: training moves through the profile at the speed that the strategies earn
    (`trajectory.Speeds`), and the progress reached at the end is largest; the schedule then depends on the budget.
    Default: `default_mode`. Both are exact (`program.best_path`): progress is carried as it is, not in bins.
    With `max_seconds` the fraction mode is exact too (`program_sum_within`); the trajectory keeps the limit exactly and
    finds the best schedule up to what `program_within` forgets. Where a slice has more than 4,000 labels, and more
    than 8 for each strategy, their motion is looked up in a table. `predicted["exact"]` says whether it is exact.

    Neighbouring slices of one strategy become a stage, with the mean score of its slices and the mean of their
    standard errors, since slices between the same checkpoints err together. With `exploration` e > 0 a stage runs its
    strategy with probability 1 − e and otherwise any of the allowed ones that was measured at every profiled point,
    itself included, with equal probability (`predicted["not_explored"]` lists the others); the slices of
    `final_reference` stay pure. Costs, seconds, scores and speeds are those of the mixture, by shares of the budget;
    the other constraints bind the main strategy. A strategy cannot run in a slice where its score (by fraction) or cost
    is NaN, nor where the budget does not pay for a step of it; by trajectory it makes no progress between profiled
    points at which it is not known. Among equal schedules one that switches less is taken (under `max_seconds` one
    that does not go back and forth).

    With `draws` > 0 (`uncertainty.DRAWS` are plenty) a parametric bootstrap over the profile tells of every stage how
    probable it is that its strategy is the best of the allowed ones there, how much is lost where it is not and to
    which rival; and in `predicted`: `progress_se`, one standard error of the progress; `regret`, what of the objective
    is lost on average to the schedule that perfect measurements would give; `more_samples`, the cells worth more
    samples and how many times more.

    Raises InfeasibleError when the budget does not pay for one step (with the smallest budget that does) or
    when no schedule keeps the constraints (with the smallest changes that help), UsageError for arguments out of range
    and for a profile that says nothing at some progress.
    """
    _check_budget(budget)
    problem = Problem.of(profile, criterion, constraints, slices, exploration, _mode(profile, criterion, progress))
    return _schedule(problem, budget, draws, seed)


def smallest_budget(
    profile: Profile,
    target: float,
    *,
    criterion: str | Criterion = "descent",
    constraints: Constraints = UNCONSTRAINED,
    slices: int = SLICES,
    exploration: float = 0.0,
    draws: int = 0,
    seed: int = 0,
) -> Schedule:
    """The schedule of the smallest budget that reaches progress `target` (1 is the end of the profiled run).

    The inverse of `optimize` by trajectory. More budget never predicts less progress, since all constraints but
    `max_seconds` are fractions of the budget; so the budget is found by bisection, to a relative 1e-4 from
    above: the schedule reaches the target. With `max_seconds` a larger budget may take too long, so what reaches the
    target is not an interval: the search goes up in steps of 1 % from the smallest budget without that limit, up
    to the largest that fits, and then bisects the step; a window narrower than a step can be missed.

    Raises InfeasibleError when no budget reaches the target, and what `optimize` raises.
    """
    if not (math.isfinite(target) and target > 0):
        raise UsageError(f"target={target} must be a progress above 0; 1 is the end of the profiled run")
    problem = Problem.of(profile, criterion, constraints, slices, exploration, "trajectory")
    free = replace(problem, constraints=constraints.without(("max_seconds",)))
    pilot_budget = float(profile.reference_budget or math.nan)
    low = _one_step(problem)
    while _reached(free, low) == -math.inf:
        error = infeasible(free, low)
        if error.smallest is None:
            raise error
        low = error.smallest
    if _reached(problem, low) >= target:
        return _schedule(problem, low, draws, seed)
    high = max(pilot_budget, 2 * low)
    while _reached(free, high) < target:
        low, high = high, 2 * high
        if high > FARTHEST * pilot_budget:
            stop = _reached(free, high)
            raise InfeasibleError(
                f"no budget reaches progress {target:g}: the allowed strategies stop making progress at {stop:.3g} "
                f"({problem.criterion.name}, {profile.metric} metric); allow more strategies, or aim lower"
            )
    while high > low * (1 + TARGET_PRECISION):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if _reached(free, middle) >= target else (middle, high)
    budget = high if constraints.max_seconds is None else _within_time(problem, target, high)
    return _schedule(problem, budget, draws, seed)


def reference_progress(
    profile: Profile, budget: float, *, criterion: str | Criterion = "descent", start: float = 0.0
) -> float:
    """Progress that the reference alone is predicted to reach with `budget` units, from `start`."""
    _check_budget(budget)
    motion = speeds(profile, criterion)
    return float(motion.advance(np.array([start]), budget, np.array([profile.reference_index]))[0])


def predict(
    profile: Profile, schedule: Schedule, budget: float, *, criterion: str | Criterion = "descent"
) -> list[float]:
    """Predicted progress at the start of every stage and at the end, for any schedule on the profile's grid.

    Mixtures move at the mean speed of what they draw, by shares of the budget, and not at all where the speed of one of
    its strategies is not known. Raises UsageError for a strategy
    off the grid, and what `speeds` raises.
    """
    _check_budget(budget)
    motion, positions = speeds(profile, criterion), [0.0]
    for stage in schedule.stages:
        share = np.zeros(len(profile.grid))
        for strategy, weight in stage.mixture:
            c = int(np.ravel_multi_index(profile.grid.position(strategy), profile.grid.shape))
            share[c] += weight * profile.cost[c] if weight else 0.0
        mixture = replace(motion, speed=mixed((share / share.sum())[None], motion.speed))
        units = (stage.end - stage.start) * budget
        positions.append(float(mixture.advance(np.array(positions[-1:]), units, np.array([0]))[0]))
    return positions


def _check_budget(budget: float) -> None:
    if not (math.isfinite(budget) and budget > 0):
        raise UsageError(f"budget={budget} must be a positive number of units")


def _mode(profile: Profile, criterion: str | Criterion, progress: str | None) -> str:
    if progress is None:
        return default_mode(profile, criterion)
    if progress not in PROGRESS_MODES:
        raise UsageError(f"progress={progress!r} is not one of {', '.join(PROGRESS_MODES)}")
    return progress


def _one_step(problem: Problem) -> float:
    """A budget below which there is no schedule: one step of the cheapest candidate that may run anywhere."""
    usable = problem.rules.usable.any(axis=0)
    return float(problem.step_cost[usable].min()) if usable.any() else 1.0


def _reached(problem: Problem, budget: float) -> float:
    """The progress that the best schedule reaches; -inf when there is none."""
    try:
        return problem.value(problem.solve(budget)[0], budget)
    except InfeasibleError:
        return -math.inf


def _within_time(problem: Problem, target: float, budget: float) -> float:
    """A smallest budget from `budget` on that reaches the target within the limit of seconds, tried in steps of 1 %."""
    limit = float(problem.constraints.max_seconds or math.inf)
    seconds = problem.seconds(1.0)
    assert seconds is not None
    rules = replace(problem.rules, usable=problem.rules.usable & np.isfinite(seconds))
    fastest = least_seconds_path(rules, np.where(rules.usable, seconds, 0.0))
    most = limit / path_seconds(np.where(rules.usable, seconds, 0.0), fastest)
    low = budget
    while _reached(problem, budget) < target:
        if budget >= most:
            enough = _free_seconds(problem, target)
            raise InfeasibleError(
                f"no schedule reaches progress {target:g} within max_seconds={limit:,.6g}; aim lower or relax {enough}",
                changes=[enough],
            )
        low, budget = budget, min(1.01 * budget, most)
    while budget > low * (1 + TARGET_PRECISION):
        middle = math.sqrt(low * budget)
        low, budget = (low, middle) if _reached(problem, middle) >= target else (middle, budget)
    return budget


def _free_seconds(problem: Problem, target: float) -> Change:
    """The seconds that the schedule of the smallest budget takes, without their limit: enough, if not the least."""
    constraints = problem.constraints.without(("max_seconds",))
    free = smallest_budget(
        problem.profile,
        target,
        criterion=problem.criterion,
        constraints=constraints,
        slices=problem.slices,
        exploration=problem.exploration,
    )
    return Change("max_seconds", math.ceil(1.001 * free.predicted["seconds"]))


def _schedule(problem: Problem, budget: float, draws: int, seed: int) -> Schedule:
    profile = problem.profile
    try:
        path, is_exact = problem.solve(budget)
    except InfeasibleError:
        raise infeasible(problem, budget) from None
    positions = problem.positions(path, budget)
    stages, predicted = _stages(problem, path, positions), _predicted(problem, path, positions, budget, is_exact)
    if draws:
        doubts = _doubts(problem, path, positions, stages, budget, draws, seed)
        wishes = cells_worth_samples(profile, stages, doubts)
        strategies = profile.grid.strategies()
        predicted["more_samples"] = [
            {
                "checkpoint": w.t,
                "progress": float(profile.progress[w.t]),
                "strategy": dict(strategies[w.c]),
                "times": w.times,
            }
            for w in wishes
        ]
        stages = with_doubts(profile, stages, doubts)
        own, best = redrawn(problem, path, budget, draws=min(draws, REGRET_DRAWS), seed=seed)
        predicted["regret"] = relative_shortfall(own, best)
        if problem.mode == "trajectory":
            predicted["progress_se"] = float(own.std())
    return Schedule(
        stages=stages,
        budget=float(budget),
        batch_size=profile.batch_size,
        cost_model=profile.cost_model,
        criterion=problem.criterion.name,
        metric=profile.metric,
        progress_mode=problem.mode,
        constraints={
            **problem.constraints.to_json(),
            "slices": problem.slices,
            "exploration": problem.exploration,
        },
        predicted=predicted,
        cube_digest=profile.digest,
    )


def _stages(problem: Problem, path: IntArray, positions: FloatArray) -> tuple[Stage, ...]:
    profile, slices = problem.profile, problem.slices
    strategies = profile.grid.strategies()
    score, score_se = problem.scores_along(path, positions)
    cuts = [k for k in range(1, slices) if path[k] != path[k - 1] or problem.explores(k) != problem.explores(k - 1)]
    stages = []
    for first, end in itertools.pairwise([0, *cuts, slices]):
        weights = problem.mixture(int(path[first]), first)
        kept = np.flatnonzero(weights)
        mean, mean_se = float(score[first:end].mean()), float(score_se[first:end].mean())
        stages.append(
            Stage(
                start=first / slices,
                end=end / slices,
                mixture=tuple((strategies[c], float(weights[c])) for c in kept),
                cost=float(weights[kept] @ profile.cost[kept]),
                score=mean if math.isfinite(mean) else None,
                score_se=mean_se if math.isfinite(mean_se) else None,
                progress=(float(positions[first]), float(positions[end])) if problem.mode == "trajectory" else None,
            )
        )
    return tuple(stages)


def _doubts(
    problem: Problem,
    path: IntArray,
    positions: FloatArray,
    stages: tuple[Stage, ...],
    budget: float,
    draws: int,
    seed: int,
) -> list[StageDoubt | None]:
    at = []
    for stage in stages:
        first, end = (round(edge * problem.slices) for edge in (stage.start, stage.end))
        at.append(problem.compared_at(path, positions, first, end, budget))
    allowed = allowed_strategies(problem.profile, problem.constraints)
    return stage_doubts(problem.profile, problem.criterion, problem.mode, stages, at, allowed, draws=draws, seed=seed)


def _predicted(
    problem: Problem, path: IntArray, positions: FloatArray, budget: float, is_exact: bool
) -> dict[str, Any]:
    """What is expected of the schedule, beside the reference alone with the same budget."""
    profile, reference = problem.profile, problem.profile.reference_index
    seconds = problem.path_seconds(path, budget)
    values: dict[str, Any] = {"exact": is_exact} | ({} if seconds is None else {"seconds": seconds})
    left_out = allowed_strategies(profile, problem.constraints) & ~problem.explored
    if problem.exploration and left_out.any():
        values["not_explored"] = [dict(profile.grid.strategies()[c]) for c in np.flatnonzero(left_out)]
    if problem.speeds is None:
        alone = profile.scores(problem.criterion, np.arange(problem.slices) / problem.slices)[0][:, reference]
        sign = -1.0 if problem.criterion.lower_is_better else 1.0
        values["score"] = sign * problem.value(path, budget)
        values["score_reference"] = float(alone.mean()) if np.isfinite(alone).all() else None
        return values
    end = float(positions[-1])
    known = bool(np.isfinite(problem.speeds.speed[:, reference]).all())
    alone_units = problem.speeds.units_to(end, reference) if known else math.inf
    reached = problem.speeds.advance(np.zeros(1), budget, np.array([reference]))[0]
    moving = np.flatnonzero(np.diff(positions) > 1e-9 * max(end, 1e-300))
    stuck = moving.size == 0 or moving[-1] < problem.slices - 1
    return values | {
        "progress": end,
        "progress_reference": float(reached) if known else None,
        "reference_budget": alone_units if math.isfinite(alone_units) else None,
        "speed_up": alone_units / budget if math.isfinite(alone_units) and end > 0 else None,
        "profiled_budget": profile.reference_budget,
        "beyond_profile": end > 1.001,
        "stuck": bool(stuck),
    }
