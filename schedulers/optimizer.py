"""From a profile, a budget and constraints to the best schedule (design §6, progress = "fraction")."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schedulers.counts import exact, format_count
from schedulers.criteria import Criterion, FloatArray, get_criterion
from schedulers.errors import InfeasibleError, UsageError
from schedulers.profile import Profile
from schedulers.program import solve
from schedulers.schedule import Schedule, Stage
from schedulers.strategy import Grid, Strategy


@dataclass(frozen=True)
class Constraints:
    """What a schedule must keep; the defaults constrain nothing.

    allowed: the strategies to choose from (None: all). monotone: names of axes along which strategies
    only move towards the reference's position, and "cost" for a cost per sample that never falls.
    max_switches: changes of strategy. min_dwell: shortest stage, the last one included, as a fraction
    of the budget. final_reference: last fraction of the budget that must run the reference.
    Raises UsageError for values out of range.
    """

    allowed: tuple[Strategy, ...] | None = None
    monotone: tuple[str, ...] = ()
    max_switches: int | None = None
    min_dwell: float = 0.0
    final_reference: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.monotone, str):
            raise UsageError(f"monotone={self.monotone!r} must be a tuple of names, as in ({self.monotone!r},)")
        if self.allowed is not None:
            object.__setattr__(self, "allowed", tuple(self.allowed))
            if not self.allowed:
                raise UsageError("allowed is empty; name at least one strategy, or leave it out to allow all")
        object.__setattr__(self, "monotone", tuple(self.monotone))
        if self.max_switches is not None and self.max_switches < 0:
            raise UsageError(f"max_switches={self.max_switches} must be at least 0")
        for name in ("min_dwell", "final_reference"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UsageError(f"{name}={value} is not a fraction of the budget in [0, 1]")

    def active(self) -> tuple[str, ...]:
        """What is constrained, each by the text in which an error message asks to relax it."""
        names = [f"monotone={name}" for name in self.monotone]
        given = {
            "allowed": self.allowed is not None,
            "max_switches": self.max_switches is not None,
            "min_dwell": self.min_dwell > 0,
            "final_reference": self.final_reference > 0,
        }
        return (*names, *(name for name, here in given.items() if here))

    def without(self, names: tuple[str, ...]) -> Constraints:
        """These constraints less those named as `active` names them."""
        free: dict[str, Any] = {"allowed": None, "max_switches": None, "min_dwell": 0.0, "final_reference": 0.0}
        monotone = tuple(name for name in self.monotone if f"monotone={name}" not in names)
        return replace(self, monotone=monotone, **{name: free[name] for name in names if name in free})


UNCONSTRAINED = Constraints()


def optimize(
    profile: Profile,
    budget: float,
    *,
    criterion: str | Criterion = "descent",
    constraints: Constraints = UNCONSTRAINED,
    slices: int = 100,
    exploration: float = 0.0,
) -> Schedule:
    """The schedule whose mean criterion over `slices` equal parts of the budget is best.

    Slice k is at progress k / slices. The optimum is exact (`program.solve`); among equal ones it is
    the one that starts with the first strategy in grid order, then stays rather than switches, then
    takes the first in grid order. A strategy cannot run in a slice where its score or cost is NaN.

    Neighbouring slices of one strategy become a stage, with the mean score of its slices and the
    mean of their standard errors, since slices between the same checkpoints err together. With
    `exploration` e > 0 a stage runs its strategy with probability 1 − e and otherwise any of the
    allowed ones that was measured, itself included, with equal probability; the slices of
    `final_reference` stay pure. The constraints bind the main strategy; the score is the main one's.

    `budget` is in units. Raises InfeasibleError when it does not pay for one step (with the smallest
    budget that does) or when no schedule keeps the constraints (with those to relax), UsageError for
    arguments out of range and for a profile that says nothing at some progress.
    """
    chosen = get_criterion(criterion)
    if not (math.isfinite(budget) and budget > 0):
        raise UsageError(f"budget={budget} must be a positive number of units")
    if slices < 1:
        raise UsageError(f"slices={slices} must be at least 1")
    if not 0 <= exploration <= 1:
        raise UsageError(f"exploration={exploration} is not a probability in [0, 1]")
    constraints = _on_grid(constraints, profile.grid)
    score, score_se = profile.scores(chosen, np.arange(slices) / slices)
    score = np.where(np.isfinite(profile.cost), score, np.nan)
    _check_measured(profile, chosen, score)
    _check_budget(profile, budget, constraints, score)
    try:
        path = _best_path(profile, chosen, constraints, score)
    except InfeasibleError:
        raise InfeasibleError(_what_to_relax(profile, chosen, constraints, score)) from None
    allowed = np.flatnonzero(_allowed(profile.grid, constraints) & np.isfinite(score).any(axis=0))
    return Schedule(
        stages=_stages(profile, path, score, score_se, allowed, exploration, _final_slice(constraints, slices)),
        budget=float(budget),
        batch_size=profile.batch_size,
        cost_model=profile.cost_model,
        criterion=chosen.name,
        metric=profile.metric,
        constraints=_as_json(constraints, slices, exploration),
        cube_digest=profile.digest,
    )


def undecided_share(profile: Profile, schedule: Schedule, criterion: str | Criterion, *, slices: int = 100) -> float:
    """Share of the budget in which another strategy is within two standard errors of the schedule's main one.

    The standard error of a difference is taken as that of independent scores, which overstates it: paired
    measurements err together. 0 without standard errors.
    """
    scores, errors = profile.scores(criterion, np.arange(slices) / slices)
    grid = profile.grid
    chosen = [
        int(np.ravel_multi_index(grid.position(schedule.at(k / slices).strategy), grid.shape)) for k in range(slices)
    ]
    rows = np.arange(slices)
    apart = np.abs(scores - scores[rows, chosen][:, None])
    near = apart <= 2 * np.hypot(errors, errors[rows, chosen][:, None])
    near[rows, chosen] = False
    return float(near.any(axis=1).mean())


def _best_path(profile: Profile, criterion: Criterion, constraints: Constraints, score: FloatArray) -> NDArray[np.intp]:
    slices = len(score)
    loss = score if criterion.lower_is_better else -score
    final = _final_slice(constraints, slices)
    return solve(
        np.where(_allowed(profile.grid, constraints), loss, np.nan),
        follows=_follows(profile, constraints),
        max_switches=constraints.max_switches,
        min_dwell=max(1, math.ceil(exact(constraints.min_dwell) * slices)),
        final=(final, profile.reference_index) if final < slices else None,
    )


def _follows(profile: Profile, constraints: Constraints) -> NDArray[np.bool_]:
    """Whether strategy b may come after a, (C, C), by the monotone constraints alone."""
    grid = profile.grid
    may = np.ones((len(grid), len(grid)), dtype=bool)
    if "cost" in constraints.monotone:
        may &= profile.cost[None, :] >= profile.cost[:, None]
    positions = np.array([grid.position(strategy) for strategy in grid.strategies()])
    distance = np.abs(positions - np.array(grid.position(grid.reference)))
    for name in constraints.monotone:
        if name != "cost":
            d = distance[:, list(grid.axes).index(name)]
            may &= d[None, :] <= d[:, None]
    return may


def _allowed(grid: Grid, constraints: Constraints) -> NDArray[np.bool_]:
    if constraints.allowed is None:
        return np.ones(len(grid), dtype=bool)
    return np.array([strategy in constraints.allowed for strategy in grid.strategies()])


def _final_slice(constraints: Constraints, slices: int) -> int:
    """First slice that must run the reference; `slices` when none must."""
    return math.ceil(slices * (1 - exact(constraints.final_reference)))


def _on_grid(constraints: Constraints, grid: Grid) -> Constraints:
    for name in constraints.monotone:
        if name != "cost" and name not in grid.axes:
            raise UsageError(f"monotone={name!r} is neither cost nor one of the axes {', '.join(grid.axes)}")
    if constraints.allowed is None:
        return constraints
    return replace(constraints, allowed=tuple(grid.check(strategy) for strategy in constraints.allowed))


def _check_measured(profile: Profile, criterion: Criterion, score: FloatArray) -> None:
    empty = np.flatnonzero(~np.isfinite(score).any(axis=1))
    if empty.size:
        where = f"{empty[0] / len(score):g}" + (f" and {empty.size - 1} more" if empty.size > 1 else "")
        raise UsageError(
            f"the profile gives no {criterion.name} score for any strategy at progress {where} "
            f"(metric {profile.metric}, costs {profile.cost_model}): cells or costs are missing there, or the "
            "reference gradient is lost in noise; profile more cells or more samples"
        )


def _check_budget(profile: Profile, budget: float, constraints: Constraints, score: FloatArray) -> None:
    usable = _allowed(profile.grid, constraints) & np.isfinite(score).any(axis=0)
    names = profile.grid.strategies()
    index = profile.reference_index
    if constraints.final_reference == 0:
        if not usable.any():
            return
        index = int(np.argmin(np.where(usable, profile.cost, np.inf)))
    smallest = profile.batch_size * float(profile.cost[index])
    if budget < smallest:
        raise InfeasibleError(
            f"budget {format_count(budget)} ({budget:,.6g} units) does not pay for one step of {names[index]}: "
            f"the smallest feasible budget is {smallest:,.6g} units "
            f"(batch size {profile.batch_size} x {profile.cost[index]:.4g} units per sample)",
            smallest=smallest,
        )


def _what_to_relax(profile: Profile, criterion: Criterion, constraints: Constraints, score: FloatArray) -> str:
    """The message of infeasible constraints: the smallest sets whose removal leaves a feasible schedule."""
    active = constraints.active()
    relax = " and ".join(active)  # without any constraint every measured slice has a strategy
    for size in range(1, len(active)):
        found = []
        for names in itertools.combinations(active, size):
            try:
                _best_path(profile, criterion, constraints.without(names), score)
            except InfeasibleError:
                continue
            found.append(" and ".join(names))
        if found:
            relax = " or ".join(found)
            break
    return f"no schedule keeps all the constraints ({', '.join(active)}); relax {relax}"


def _stages(
    profile: Profile,
    path: NDArray[np.intp],
    score: FloatArray,
    score_se: FloatArray,
    allowed: NDArray[np.intp],
    exploration: float,
    final: int,
) -> tuple[Stage, ...]:
    slices = len(path)
    strategies = profile.grid.strategies()
    explores = (exploration > 0) & (np.arange(slices) < final)
    cuts = [k for k in range(1, slices) if path[k] != path[k - 1] or explores[k] != explores[k - 1]]
    stages = []
    for first, end in itertools.pairwise([0, *cuts, slices]):
        best = int(path[first])
        weights = np.zeros(len(strategies))
        weights[best] = 1.0
        if explores[first]:
            weights *= 1 - exploration
            weights[allowed] += exploration / allowed.size
        kept = np.flatnonzero(weights)
        mean_se = float(score_se[first:end, best].mean())
        stages.append(
            Stage(
                start=first / slices,
                end=end / slices,
                mixture=tuple((strategies[c], float(weights[c])) for c in kept),
                cost=float(weights[kept] @ profile.cost[kept]),
                score=float(score[first:end, best].mean()),
                score_se=mean_se if math.isfinite(mean_se) else None,
            )
        )
    return tuple(stages)


def _as_json(constraints: Constraints, slices: int, exploration: float) -> dict[str, Any]:
    return {
        "allowed": None if constraints.allowed is None else [str(strategy) for strategy in constraints.allowed],
        "monotone": list(constraints.monotone),
        "max_switches": constraints.max_switches,
        "min_dwell": constraints.min_dwell,
        "final_reference": constraints.final_reference,
        "slices": slices,
        "exploration": exploration,
    }
