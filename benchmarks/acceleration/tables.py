"""What the runs of a case came to, as rows of `summary.json`.

python -m benchmarks.acceleration.tables [--case mocov3]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.acceleration.cases import CASES, Case
from benchmarks.acceleration.clock import read_seconds
from benchmarks.acceleration.numbers import (
    Results,
    complete,
    crossing,
    curves_of,
    differences,
    linear_of,
    saving_of,
)
from benchmarks.acceleration.runs import read_results, run_key
from benchmarks.summary import SHOWN, Row, table
from schedulers import format_count

COMMAND = "python -m benchmarks.acceleration.runs --cases"
LEVELS = 3  # of the largest budgets of no acceleration whose accuracy others are to reach
OPTIMIZED = ("descent", "online")  # what is held against the best of the others
EXACT = (None, None)  # of a number without an interval
Line = tuple[str, str, tuple[float, float | None, float | None], str, bool, int]
"""Claim, unit, (value, low, high), aim, whether it holds, number of runs."""


def rows_of(case: Case, results: Results, seconds: Mapping[str, float]) -> list[Row]:
    """Rows of one case; `seconds` per sample by strategy, where they are known."""
    curves = {arm: found for arm in case.arms if (found := curves_of(case, results, arm))}
    if "none" not in curves:
        return []
    runs = [run for found in results for run in found["runs"].values()]
    about = " and ".join(sorted({run["device"] for run in runs})), max(run["date"] for run in runs)
    lines = [*_accuracies(case, results, curves)]
    for level in sorted(curves["none"])[-LEVELS:]:
        for arm in (arm for arm in curves if arm not in ("none", "none-poly")):
            lines += _saved(case, results, arm, level, seconds)
    for arm in OPTIMIZED:
        lines += _ahead(case, results, curves, arm)
    for arm in curves:
        lines += _foretold(case, results, arm)
    return [
        Row(
            f"{case.name}: {claim}", round(value, 4), unit, *(None if v is None else round(v, 4) for v in interval),
            aim, holds, *about, count, f"{COMMAND} {case.name}",
        )
        for claim, unit, (value, *interval), aim, holds, count in lines
    ]  # fmt: skip


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, least and largest."""
    return statistics.fmean(values), min(values), max(values)


def _accuracies(case: Case, results: Results, curves: Mapping[str, Mapping[float, Sequence[float]]]) -> Iterator[Line]:
    for arm, curve in curves.items():
        for budget, values in curve.items():
            linear = linear_of(case, results, arm, budget)
            claim = f"kNN accuracy after {format_count(budget)} units, {case.arms[arm].title}"
            claim += f" (linear probe {linear:.1%})" if linear is not None else ""
            yield claim, "fraction", spread(values), SHOWN, True, len(values)


def _saved(case: Case, results: Results, arm: str, level: float, seconds: Mapping[str, float]) -> Iterator[Line]:
    """Budgets of an arm at equal accuracy: in units, with what was paid before, in time."""
    saving = saving_of(case, results, arm, level, seconds)
    if saving is None:
        return
    title, least = case.arms[arm].title, ", at least (it is there with its smallest budget)"
    about = f"times less budget for the accuracy of no acceleration at {format_count(level)}"

    def line(extra: str, value: float, low: float | None, high: float | None, *, bound: bool, aimed: bool) -> Line:
        undecided = bound and value < case.aim
        aim = f"at least {case.aim:g}" if aimed and not undecided else SHOWN
        claim = f"{about}{least if bound else ''}{extra}, {title}"
        values = value, low, None if bound else high
        return claim, "x", values, aim, aim == SHOWN or value >= case.aim, saving.seeds

    units, time = saving.units, saving.time
    aimed = case.arms[arm].offline is not None or arm == "online"
    yield line("", units.value, units.low, units.high, bound=units.bound, aimed=aimed)
    if saving.paid is not None and saving.with_paid is not None:
        extra = f", {format_count(saving.paid)} units of pilot and profile paid by one run"
        yield line(extra, saving.with_paid, *EXACT, bound=units.bound, aimed=False)
    if time is not None:
        yield line(
            ", in seconds of steps instead of units", time.value, time.low, time.high, bound=time.bound, aimed=False
        )


def _ahead(
    case: Case, results: Results, curves: Mapping[str, Mapping[float, Sequence[float]]], arm: str
) -> Iterator[Line]:
    """The accuracy of an optimized arm less that of the best constant at each budget, and of others that rival it."""
    for budget in curves.get(arm, ()):
        constants = [name for name in case.constants if differences(results, arm, name, budget)]
        best = max(constants, key=lambda name: -statistics.fmean(differences(results, arm, name, budget)), default="")
        rivals = [(best, "the best constant strategy there")] if best else []
        rivals += [("hand-made", "the schedule made by hand"), ("mixed", "the mixed run")]
        rivals += [("paper", "the paper's way")]
        for other, what in rivals:
            if ahead := differences(results, arm, other, budget):
                mean, low, high = spread(ahead)
                claim = f"kNN accuracy after {format_count(budget)} units of '{arm}' less that of {what}, '{other}'"
                yield claim, "fraction", (mean, low, high), "above 0 in the mean", mean > 0, len(ahead)


def _foretold(case: Case, results: Results, arm: str) -> Iterator[Line]:
    """How many times the budget no acceleration needs to get as far: what the optimizer said, and what happened."""
    both = complete(case, complete(case, results, "none"), arm)
    none = {b: statistics.fmean(values) for b, values in curves_of(case, both, "none").items()}
    for budget, values in curves_of(case, both, arm).items():
        runs = [found["runs"][run_key(arm, budget)] for found in both]
        if not all("predicted_speed_up" in run for run in runs):
            continue
        said, needed = statistics.fmean(run["predicted_speed_up"] for run in runs), 0.0
        needed = crossing(none, statistics.fmean(values))
        happened = min(needed, max(none)) / budget
        far = ", more than this (it never got there)" if math.isinf(needed) else ""
        far = ", at most this (it got there with its smallest)" if needed == min(none) else far
        claim = (
            f"budget with which no acceleration is as good as {case.arms[arm].title} after {format_count(budget)} "
            f"units, over those{far}; predicted {said:.2f}"
        )
        told = happened >= said / 2
        undecided = (math.isinf(needed) and not told) or (needed == min(none) and told)
        aim = SHOWN if undecided else "at least half of the predicted"
        yield claim, "x", (happened, *EXACT), aim, undecided or told, len(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="mocov3")
    case = CASES[parser.parse_args().case]
    rows = rows_of(case, read_results(case.name), read_seconds(case.name))
    print(table([("acceleration", row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
