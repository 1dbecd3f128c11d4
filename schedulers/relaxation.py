"""Why no schedule keeps the constraints, and the smallest changes after which one does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from schedulers.constraints import Constraints
from schedulers.counts import format_count
from schedulers.errors import Change, InfeasibleError
from schedulers.problem import Problem
from schedulers.program import additive, best_path
from schedulers.program_within import ROUNDING, least_seconds_path, path_seconds

V = TypeVar("V")


def infeasible(problem: Problem, budget: float) -> InfeasibleError:
    """The error that tells what to relax: each constraint by the smallest change that is enough alone.

    Where no single one is enough, the smallest sets of constraints whose removal leaves a feasible schedule; where a
    larger budget is, that.
    """
    active = problem.constraints.active()
    profile, steps = problem.profile, np.unique(problem.step_cost[problem.rules.usable.any(axis=0)])
    for enough in steps[steps > budget]:
        if _feasible(problem, float(enough), problem.constraints.without(("max_seconds",))):
            names = profile.grid.strategies()
            dearest = names[int(np.flatnonzero(problem.rules.usable.any(axis=0) & (problem.step_cost == enough))[0])]
            return InfeasibleError(
                f"budget {format_count(budget)} ({budget:,.6g} units) does not pay for one step of {dearest}, which a "
                f"schedule needs: the smallest feasible budget is {enough:,.6g} units (batch size "
                f"{profile.batch_size} x {enough / profile.batch_size:.4g} units per sample)",
                smallest=float(enough),
            )
    budget = max(
        budget, float(problem.step_cost.max())
    )  # what cannot be kept with any budget is not the budget's fault
    changes = [change for name in active if (change := _smallest_change(problem, budget, name))]
    relax = " or ".join(map(str, changes)) or " and ".join(active)  # without any constraint there is a schedule
    for size in range(2, len(active)) if not changes else ():
        found = [
            " and ".join(names)
            for names in itertools.combinations(active, size)
            if _feasible(problem, budget, problem.constraints.without(names))
        ]
        if found:
            relax = " or ".join(found)
            break
    return InfeasibleError(
        f"no schedule keeps all the constraints ({', '.join(active)}); relax {relax}", changes=changes
    )


def _feasible(problem: Problem, budget: float, constraints: Constraints) -> bool:
    seconds = _least_seconds(problem, budget, constraints)
    if seconds is None:
        return False
    return constraints.max_seconds is None or seconds <= constraints.max_seconds * (1 + ROUNDING)


def _least_seconds(problem: Problem, budget: float, constraints: Constraints) -> float | None:
    """Seconds of the fastest schedule, its limit aside (0 where none is set); None when there is no schedule."""
    some = replace(problem, constraints=constraints)
    rules = some.rules_for(budget)
    try:
        seconds = some.seconds(budget) if constraints.max_seconds is not None else None
        if seconds is None:
            best_path(rules, additive(np.zeros(rules.usable.shape)))
            return 0.0
        rules = replace(rules, usable=rules.usable & np.isfinite(seconds))
        seconds = np.where(rules.usable, seconds, 0.0)
        return path_seconds(seconds, least_seconds_path(rules, seconds))
    except InfeasibleError:
        return None


def _smallest_change(problem: Problem, budget: float, name: str) -> Change | None:
    """The smallest change of one constraint that is enough; None if none is. Values are rounded to the safe side."""
    given = problem.constraints
    if not _feasible(problem, budget, given.without((name,))):
        return None
    slices = problem.slices

    def feasible(value: object) -> bool:
        changed: dict[str, Any] = {name: value}
        return _feasible(problem, budget, replace(given, **changed))

    if name == "max_switches":
        return Change(name, _first(feasible, range(given.max_switches or 0, slices)))
    if name in ("min_dwell", "final_reference"):
        now = math.ceil(getattr(given, name) * slices)
        wanted = _first(feasible, [k / slices for k in range(now, -1, -1)])
        return Change(name, math.floor(wanted * 10_000 + 1e-6) / 10_000)
    if name == "max_seconds":
        least = _least_seconds(problem, budget, given)
        if least is None:
            return None
        fits = budget * (given.max_seconds or 0.0) / least
        return Change(name, _digits(least, math.ceil), _digits(fits, math.floor))
    if name == "max_memory":
        memory = np.array([]) if problem.profile.memory is None else problem.profile.memory
        more = [m for m in np.unique(memory[np.isfinite(memory)]) if m > (given.max_memory or 0.0)]
        if more and feasible(float(more[-1])):
            return Change(name, math.ceil(_first(feasible, [float(m) for m in more])))
    if name == "allowed" and given.allowed is not None:
        profile = problem.profile
        order = np.argsort(np.where(np.isfinite(profile.cost), profile.cost, np.inf), kind="stable")
        names = [profile.grid.strategies()[c] for c in order]
        for strategy in (s for s in names if s not in given.allowed):
            if _feasible(problem, budget, replace(given, allowed=(*given.allowed, strategy))):
                return Change(name, str(strategy))
    return Change(name)


def _digits(value: float, towards: Callable[[float], int]) -> float:
    """A positive number in six significant digits, rounded up or down."""
    step = 10.0 ** (math.floor(math.log10(value)) - 5)
    return float(f"{towards(value / step * (1 + (1e-12 if towards is math.floor else -1e-12))) * step:.15g}")


def _first(feasible: Callable[[object], bool], values: Sequence[V]) -> V:
    """The first value that is feasible, when all after it are too, and the last one is."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(values[middle]) else (middle + 1, high)
    return values[high]
