"""What the runs of a case came to: accuracies, budgets at equal accuracy with intervals, and a figure.

    python -m benchmarks.acceleration.tables [--case mocov3] [--picture FILE.png]

The budget at which an arm has the accuracy that no acceleration has with all of its own is read from the arm's mean
accuracy over the seeds, isotonic over budgets (a longer run is taken to be no worse) and linear in the logarithm of the
budget. Its interval is that of resampled seeds (2,000 draws, 5 to 95 %): of few seeds it says little more than their
range. Where an arm is above already at its smallest budget, the ratio is a lower bound.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.acceleration.cases import CASES, Case
from benchmarks.acceleration.runs import cube_key, read_results, run_key
from benchmarks.summary import Row, table
from schedulers import format_count

COMMAND = "python -m benchmarks.acceleration.runs --case"
DRAWS = 2000
SHOWN = "none; shown for comparison"
Curves = Mapping[float, Sequence[float]]  # accuracy of every seed at a budget


def complete(case: Case, results: Sequence[Mapping[str, Any]], arm: str) -> list[Mapping[str, Any]]:
    """The seeds that have an arm at all budgets at which any seed has it."""
    keys = [run_key(arm, budget) for budget in case.budgets]
    wanted = {key for key in keys if any(key in found["runs"] for found in results)}
    return [found for found in results if wanted and wanted <= set(found["runs"])]


def curves_of(case: Case, results: Sequence[Mapping[str, Any]], arm: str) -> dict[float, list[float]]:
    """Final accuracies of an arm by budget, of the seeds that are complete, in their order."""
    seeds = complete(case, results, arm)
    return {
        budget: [float(found["runs"][key]["points"][-1]["accuracy"]) for found in seeds]
        for budget in case.budgets
        if any((key := run_key(arm, budget)) in found["runs"] for found in seeds)
    }


def crossing(points: Sequence[tuple[float, float]], accuracy: float) -> float:
    """Budget at which (budget, accuracy), made isotonic, reaches `accuracy`: infinite where it never does."""
    budgets, values = (np.array(column) for column in zip(*sorted(points), strict=True))
    rising = isotonic_regression(values).x
    if rising[-1] < accuracy:
        return math.inf
    first = int(np.argmax(rising >= accuracy))
    if first == 0:
        return float(budgets[0])
    share = (accuracy - rising[first - 1]) / (rising[first] - rising[first - 1])
    return float(budgets[first - 1] ** (1 - share) * budgets[first] ** share)


def savings(none: Curves, arm: Curves, budget: float) -> tuple[float, float, float]:
    """How many times less budget `arm` needs for the accuracy of `none` at `budget`: value, 5 %, 95 %.

    0 where it does not reach it. Seeds are paired: both have the same ones, in the same order.
    """
    count = len(none[budget])

    def ratio(seeds: Sequence[int]) -> float:
        means = [(b, statistics.fmean(values[i] for i in seeds)) for b, values in arm.items()]
        found = crossing(means, statistics.fmean(none[budget][i] for i in seeds))
        return budget / found if math.isfinite(found) else 0.0

    generator = np.random.default_rng(0)
    drawn = [ratio(generator.integers(0, count, count).tolist()) for _ in range(DRAWS)]
    low, high = np.percentile(drawn, [5, 95])
    return ratio(range(count)), float(low), float(high)


def rows_of(case: Case, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows for `summary.json` of one case: accuracies, budgets at equal accuracy, and what came on top of the runs."""
    curves = {arm: found for arm in case.arms if (found := curves_of(case, results, arm))}
    if "none" not in curves:
        return []
    device = " and ".join(sorted({run["device"] for found in results for run in found["runs"].values()}))
    date = max(run["date"] for found in results for run in found["runs"].values())
    made: list[Row] = []

    def row(claim: str, unit: str, values: tuple[float, float, float], aim: str, holds: bool, runs: int) -> None:
        value, low, high = (round(v, 4) for v in values)
        command = f"{COMMAND} {case.name}"
        made.append(Row(f"{case.name}: {claim}", value, unit, low, high, aim, holds, device, date, runs, command))

    for arm, curve in curves.items():
        for budget, values in curve.items():
            mean = statistics.fmean(values), min(values), max(values)
            what = f"kNN accuracy after {format_count(budget)} units, {case.arms[arm].title}"
            row(what, "fraction", mean, SHOWN, True, len(values))
    largest = max(curves["none"])
    for arm in (arm for arm in curves if arm != "none"):
        both = complete(case, complete(case, results, "none"), arm)
        if not both:
            continue
        ratio, low, high = savings(curves_of(case, both, "none"), curves_of(case, both, arm), largest)
        smallest = min(curves[arm])
        bound = ", at least: it is there with its smallest budget" if ratio >= largest / smallest else ""
        aimed = arm not in ("mixed", "hand-made", *case.constants)
        what = f"times less budget for the accuracy of no acceleration at {format_count(largest)}{bound}, "
        what += case.arms[arm].title
        row(
            what,
            "x",
            (ratio, low, high),
            f"at least {case.aim:g}" if aimed else SHOWN,
            not aimed or ratio >= case.aim,
            len(both),
        )
        costs = [cost for found in both if (cost := besides(case, found, arm)) is not None]
        if ratio and costs:
            paid = statistics.fmean(costs)
            with_cost = largest / (largest / ratio + paid)
            what = f"the same, {format_count(paid)} units of pilot and profile paid by one run, {case.arms[arm].title}"
            row(what, "x", (with_cost, with_cost, with_cost), SHOWN, True, len(costs))
    return made


def besides(case: Case, found: Mapping[str, Any], arm: str) -> float | None:
    """Units of pilot and profile behind an offline arm, and of those behind its pilot; None for other arms."""
    offline = case.arms[arm].offline
    facts = None if offline is None else found["runs"].get(cube_key(offline))
    if offline is None or facts is None:
        return None
    before = besides(case, found, offline.pilot)
    return float(facts["pilot_units"] + facts["profile_units"]) + (before or 0.0)


def draw(case: Case, results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean final accuracy of every arm over the budget as a PNG file (needs a headless Chromium)."""
    import plotly.graph_objects as go

    from benchmarks.pictures import draw_figure, find_browser

    figure = go.Figure()
    for arm in case.arms:
        curve = curves_of(case, results, arm)
        if curve:
            means = [statistics.fmean(values) for values in curve.values()]
            figure.add_scatter(
                x=list(curve), y=means, name=arm, mode="lines+markers",
                line={"width": 4 if arm == "none" else 2, "dash": "dot" if arm in case.constants else "solid"},
            )  # fmt: skip
    figure.update_layout(
        xaxis={"type": "log", "title": "budget (units)"}, yaxis={"title": "kNN accuracy", "tickformat": ".0%"},
        template="plotly_white", width=900, height=560,
    )  # fmt: skip
    draw_figure(find_browser(), figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="mocov3")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    case, results = CASES[options.case], read_results(options.case)
    if options.picture:
        draw(case, results, options.picture)
        return 0
    print(table([("acceleration", row) for row in rows_of(case, results)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
