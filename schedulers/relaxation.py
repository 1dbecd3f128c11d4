"""Why no schedule keeps the constraints, and the smallest changes after which one does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from schedulers.constraints import Constraints
from schedulers.errors import InfeasibleError
from schedulers.problem import Problem
from schedulers.program import additive, best_path
from schedulers.program_within import HAIR, least_seconds_path, path_seconds

V = TypeVar("V")


def infeasible(problem: Problem, budget: float) -> InfeasibleError:
    """The error that tells which constraints to relax: each by the smallest change that is enough alone.

    Where no single one is enough, the smallest sets of constraints whose removal leaves a feasible schedule.
    """
    active = problem.constraints.active()
    changes = [text for name in active if (text := _smallest_change(problem, budget, name))]
    if changes:
        relax = " or ".join(changes)
    else:
        relax = " and ".join(active)  # without any constraint every measured slice has a strategy
        for size in range(2, len(active)):
            found = [
                " and ".join(names)
                for names in itertools.combinations(active, size)
                if _feasible(problem, budget, problem.constraints.without(names))
            ]
            if found:
                relax = " or ".join(found)
                break
    return InfeasibleError(f"no schedule keeps all the constraints ({', '.join(active)}); relax {relax}")


def _feasible(problem: Problem, budget: float, constraints: Constraints) -> bool:
    seconds = _least_seconds(problem, budget, constraints)
    if seconds is None:
        return False
    return constraints.max_seconds is None or seconds <= constraints.max_seconds * (1 + HAIR)


def _least_seconds(problem: Problem, budget: float, constraints: Constraints) -> float | None:
    """Seconds of the fastest schedule, its limit aside (0 where none is set); None when there is no schedule."""
    some = replace(problem, constraints=constraints)
    try:
        seconds = some.seconds(budget) if constraints.max_seconds is not None else None
        if seconds is None:
            best_path(some.rules, additive(np.zeros(some.rules.usable.shape)))
            return 0.0
        rules = replace(some.rules, usable=some.rules.usable & np.isfinite(seconds))
        seconds = np.where(rules.usable, seconds, 0.0)
        return path_seconds(seconds, least_seconds_path(rules, seconds))
    except InfeasibleError:
        return None


def _smallest_change(problem: Problem, budget: float, name: str) -> str | None:
    """The smallest change of one constraint that is enough, as a text that begins with its name; None if none is."""
    given = problem.constraints
    if not _feasible(problem, budget, given.without((name,))):
        return None
    slices = problem.slices

    def feasible(value: object) -> bool:
        changed: dict[str, Any] = {name: value}
        return _feasible(problem, budget, replace(given, **changed))

    if name == "max_switches":
        return f"max_switches to {_first(feasible, range(given.max_switches or 0, slices))}"
    if name in ("min_dwell", "final_reference"):
        now = round(getattr(given, name) * slices)
        wanted = _first(feasible, [k / slices for k in range(now, -1, -1)])
        return f"{name} to {math.floor(wanted * 10_000 + 1e-6) / 10_000:g}"
    if name == "max_seconds":
        least = _least_seconds(problem, budget, given)
        if least is None:
            return None
        fits = _digits(budget * (given.max_seconds or 0.0) / least, math.floor)
        return f"max_seconds to {_digits(least, math.ceil)} (or lower the budget to {fits})"
    if name == "max_memory":
        memory = np.array([]) if problem.profile.memory is None else problem.profile.memory
        more = [m for m in np.unique(memory[np.isfinite(memory)]) if m > (given.max_memory or 0.0)]
        if more and feasible(float(more[-1])):
            return f"max_memory to {math.ceil(_first(feasible, [float(m) for m in more]))}"
    if name == "allowed" and given.allowed is not None:
        profile = problem.profile
        order = np.argsort(np.where(np.isfinite(profile.cost), profile.cost, np.inf), kind="stable")
        names = [profile.grid.strategies()[c] for c in order]
        for strategy in (s for s in names if s not in given.allowed):
            if _feasible(problem, budget, replace(given, allowed=(*given.allowed, strategy))):
                return f"allowed by {strategy}"
    return name


def _digits(value: float, towards: Callable[[float], int]) -> str:
    """A positive number in six significant digits, rounded up or down."""
    step = 10.0 ** (math.floor(math.log10(value)) - 5)
    return f"{towards(value / step * (1 + (1e-12 if towards is math.floor else -1e-12))) * step:.15g}"


def _first(feasible: Callable[[object], bool], values: Sequence[V]) -> V:
    """The first value that is feasible, when all after it are too, and the last one is."""
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(values[middle]) else (middle + 1, high)
    return values[high]
