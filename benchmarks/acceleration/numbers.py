"""Accuracies and budgets at equal accuracy from the results of a case: what tables, page and figures share.

The budget at which an arm has the accuracy that no acceleration has at some budget is read from the arm's mean accuracy
over the seeds, isotonic over budgets (a longer run is taken to be no worse) and linear in the logarithm of the budget.
No acceleration is read in the same way, so that it needs no less budget than itself: where it was as good with less
already, that is what others are compared with. Intervals are those of resampled seeds (2,000 draws, 5 to 95 %): of few
seeds they say little more than their range. Where an arm is there with its smallest budget, the ratio is a lower bound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.acceleration.cases import Case
from benchmarks.acceleration.clock import seconds_of
from benchmarks.acceleration.runs import cube_key, run_key

DRAWS = 2000
Results = Sequence[Mapping[str, Any]]
Curves = Mapping[float, Sequence[float]]  # accuracy of every seed at a budget


@dataclass(frozen=True)
class Ratio:
    """How many times less: 0 where never reached. `bound`: at least so many, and then `high` means nothing.

    `reference`: with how much no acceleration is there, over which the ratio is taken.
    """

    value: float
    low: float
    high: float
    bound: bool
    reference: float


@dataclass(frozen=True)
class Saving:
    """What an arm saves at equal accuracy, over `seeds` seeds.

    `time`: in seconds of steps instead of units, None where they are not known. `paid`: units of pilot and profile,
    and `with_paid` the ratio if one run pays for them; None for arms without.
    """

    units: Ratio
    time: Ratio | None
    paid: float | None
    with_paid: float | None
    seeds: int


def complete(case: Case, results: Results, arm: str) -> list[Mapping[str, Any]]:
    """The seeds that have an arm at all budgets at which any seed has it."""
    keys = [run_key(arm, budget) for budget in case.budgets]
    wanted = {key for key in keys if any(key in found["runs"] for found in results)}
    return [found for found in results if wanted and wanted <= set(found["runs"])]


def accuracy_of(found: Mapping[str, Any], arm: str, budget: float) -> float:
    """Final kNN accuracy of a seed's run."""
    return float(found["runs"][run_key(arm, budget)]["points"][-1]["accuracy"])


def curves_of(case: Case, results: Results, arm: str) -> dict[float, list[float]]:
    """Final accuracies of an arm by budget, of the seeds that are complete, in their order."""
    seeds = complete(case, results, arm)
    there = [b for b in case.budgets if any(run_key(arm, b) in found["runs"] for found in seeds)]
    return {budget: [accuracy_of(found, arm, budget) for found in seeds] for budget in there}


def linear_of(case: Case, results: Results, arm: str, budget: float) -> float | None:
    """Mean accuracy of the linear probe over the complete seeds; None where one lacks it."""
    runs = [found["runs"][run_key(arm, budget)] for found in complete(case, results, arm)]
    return statistics.fmean(run["linear"] for run in runs) if runs and all("linear" in run for run in runs) else None


def differences(results: Results, arm: str, other: str, budget: float) -> list[float]:
    """Final accuracy of one arm less another's at a budget, of the seeds that have both."""
    keys = {run_key(arm, budget), run_key(other, budget)}
    both = [found for found in results if keys <= set(found["runs"])]
    return [accuracy_of(found, arm, budget) - accuracy_of(found, other, budget) for found in both]


def isotonic(points: Mapping[float, float]) -> dict[float, float]:
    """Accuracies by budget, ascending, as those of a curve that never falls (least squares)."""
    budgets = sorted(points)
    rising = isotonic_regression(np.array([points[budget] for budget in budgets])).x
    return dict(zip(budgets, rising.tolist(), strict=True))


def crossing(points: Mapping[float, float], accuracy: float) -> float:
    """Budget at which accuracies by budget, made isotonic, reach `accuracy`: infinite where they never do."""
    before: tuple[float, float] | None = None
    for budget, value in isotonic(points).items():
        if value >= accuracy:
            if before is None:
                return budget
            share = (accuracy - before[1]) / (value - before[1])
            return float(before[0] ** (1 - share) * budget**share)
        before = budget, value
    return math.inf


def ratio_of(none: Curves, arm: Curves, level: float) -> Ratio:
    """How many times less budget `arm` needs for the accuracy of `none` at `level`.

    Seeds are paired: both have the same ones, in the same order.
    """
    count = len(none[level])

    def needed(seeds: Sequence[int]) -> tuple[float, float]:
        ours, theirs = ({b: statistics.fmean(v[i] for i in seeds) for b, v in c.items()} for c in (arm, none))
        accuracy = isotonic(theirs)[level]
        return crossing(ours, accuracy), crossing(theirs, accuracy)

    def ratio(seeds: Sequence[int]) -> float:
        own, reference = needed(seeds)
        return reference / own if math.isfinite(own) else 0.0

    generator = np.random.default_rng(0)
    drawn = [ratio(generator.integers(0, count, count).tolist()) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, [5, 95])
    value, (own, reference) = ratio(range(count)), needed(range(count))
    return Ratio(value, min(float(low), value), max(float(high), value), own == min(arm), reference)


def saving_of(case: Case, results: Results, arm: str, level: float, seconds: Mapping[str, float]) -> Saving | None:
    """What an arm saves for the accuracy of no acceleration at the budget `level`.

    None without common seeds, and for an arm that was run with one budget, from which no curve can be read.
    """
    both = complete(case, complete(case, results, "none"), arm)
    none, curve = curves_of(case, both, "none"), curves_of(case, both, arm)
    if not both or level not in none or len(curve) < 2:
        return None
    units, time = ratio_of(none, curve, level), None
    theirs, ours = _timed(case, both, "none", none, seconds), _timed(case, both, arm, curve, seconds)
    if theirs and ours:
        time = ratio_of(theirs, ours, list(theirs)[list(none).index(level)])
    costs = [cost for found in both if (cost := besides(case, found, arm)) is not None]
    paid = statistics.fmean(costs) if costs else None
    with_paid = None
    if paid is not None and units.value:
        with_paid = units.reference / (units.reference / units.value + paid)
    return Saving(units, time, paid, with_paid, len(both))


def _timed(
    case: Case, results: Results, arm: str, curve: Curves, seconds: Mapping[str, float]
) -> dict[float, Sequence[float]] | None:
    """A curve over the seconds that the runs take, mean over seeds; None where a run or a strategy has none."""
    timed = {}
    for budget, values in curve.items():
        runs = [found["runs"][run_key(arm, budget)] for found in results]
        if not all("shares" in run and set(run["shares"]) <= set(seconds) for run in runs):
            return None
        timed[statistics.fmean(seconds_of(run, seconds) for run in runs)] = values
    return timed


def besides(case: Case, found: Mapping[str, Any], arm: str) -> float | None:
    """Units of pilot and profile behind an offline arm, and of those behind its pilot; None for other arms."""
    offline = case.arms[arm].offline
    facts = None if offline is None else found["runs"].get(cube_key(offline))
    if offline is None or facts is None:
        return None
    before = besides(case, found, offline.pilot)
    return float(facts["pilot_units"] + facts["profile_units"]) + (before or 0.0)
