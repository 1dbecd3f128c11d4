"""What the runs of a case came to: accuracies, budgets at equal accuracy with intervals, and a figure.

    python -m benchmarks.acceleration.tables [--case mocov3] [--picture FILE.png] [--schedules FILE.png] [--budget 60K]

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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.acceleration.cases import CASES, Case
from benchmarks.acceleration.clock import read_seconds, seconds_of
from benchmarks.acceleration.runs import cube_key, read_results, run_key
from benchmarks.summary import Row, table
from schedulers import Schedule, Stage, Strategy, format_count, parse_count

COMMAND = "python -m benchmarks.acceleration.runs --case"
DRAWS = 2000
LEVELS = 2  # of the largest budgets of no acceleration whose accuracy others are to reach
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


def rows_of(case: Case, results: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> list[Row]:
    """Rows for `summary.json` of one case; `seconds` per sample by strategy, where they are known."""
    curves = {arm: found for arm in case.arms if (found := curves_of(case, results, arm))}
    if "none" not in curves:
        return []
    device = " and ".join(sorted({run["device"] for found in results for run in found["runs"].values()}))
    date = max(run["date"] for found in results for run in found["runs"].values())

    def row(claim: str, unit: str, values: tuple[float, float, float], aim: str, holds: bool, runs: int) -> Row:
        value, low, high = (round(v, 4) for v in values)
        return Row(
            f"{case.name}: {claim}", value, unit, low, high, aim, holds, device, date, runs, f"{COMMAND} {case.name}"
        )

    made = []
    for arm, curve in curves.items():
        for budget, values in curve.items():
            linear = linear_of(case, results, arm, budget)
            what = f"kNN accuracy after {format_count(budget)} units, {case.arms[arm].title}"
            what += f" (linear probe {linear:.1%})" if linear is not None else ""
            made.append(row(what, "fraction", _spread(values), SHOWN, True, len(values)))
    for level in sorted(curves["none"])[-LEVELS:]:
        for arm in (arm for arm in curves if arm not in ("none", "none-poly")):
            for claim, values, aimed, runs in _saved(case, results, arm, level, seconds):
                aim = f"at least {case.aim:g}" if aimed else SHOWN
                made.append(row(claim, "x", values, aim, not aimed or values[0] >= case.aim, runs))
    for arm in ("descent", "online"):
        for other, what in rivals(case, curves, arm):
            for budget in sorted(set(curves[arm]) & set(curves[other])):
                ahead = differences(case, results, arm, other, budget)
                claim = f"kNN accuracy after {format_count(budget)} units of '{arm}' less that of {what}, '{other}'"
                values = _spread(ahead)
                made.append(row(claim, "fraction", values, "above 0", values[0] > 0, len(ahead)))
    for arm in curves:
        made += [
            row(claim, "x", values, "the predicted one", holds, runs)
            for claim, values, holds, runs in _foretold(case, results, arm)
        ]
    return made


Line = tuple[str, tuple[float, float, float], bool, int]  # claim, (value, low, high), a mark, number of runs


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.fmean(values), min(values), max(values)


def _saved(
    case: Case, results: Sequence[Mapping[str, Any]], arm: str, level: float, seconds: Mapping[str, float]
) -> Iterator[Line]:
    """Budgets of an arm at equal accuracy: in units (marked if that is aimed at), with all that was paid, in time."""
    both = complete(case, complete(case, results, "none"), arm)
    if not both:
        return
    none, curve = curves_of(case, both, "none"), curves_of(case, both, arm)
    title, ratio, low, high = case.arms[arm].title, *savings(none, curve, level)
    bound = ", at least: it is there with its smallest budget" if ratio >= level / min(curve) else ""
    about = f"times less budget for the accuracy of no acceleration at {format_count(level)}"
    aimed = case.arms[arm].offline is not None or arm == "online"
    yield f"{about}{bound}, {title}", (ratio, low, high), aimed, len(both)
    costs = [cost for found in both if (cost := besides(case, found, arm)) is not None]
    if ratio and costs:
        paid = statistics.fmean(costs)
        value = level / (level / ratio + paid)
        yield (
            f"{about}, {format_count(paid)} units of pilot and profile paid by one run, {title}",
            (value, value, value), False, len(costs),
        )  # fmt: skip
    if seconds and all("shares" in found["runs"][run_key(arm, b)] for found in both for b in curve):
        spent = [timed(case, both, "none", level, seconds), {b: timed(case, both, arm, b, seconds) for b in curve}]
        ratio, low, high = savings(
            {spent[0]: none[level]}, {spent[1][b]: values for b, values in curve.items()}, spent[0]
        )
        yield f"{about}, in seconds of steps instead of units, {title}", (ratio, low, high), False, len(both)


def timed(
    case: Case, results: Sequence[Mapping[str, Any]], arm: str, budget: float, seconds: Mapping[str, float]
) -> float:
    """Seconds that the steps of an arm's runs at a budget take, mean over seeds."""
    return statistics.fmean(seconds_of(found["runs"][run_key(arm, budget)], seconds) for found in results)


def linear_of(case: Case, results: Sequence[Mapping[str, Any]], arm: str, budget: float) -> float | None:
    """Mean accuracy of the linear probe over the complete seeds; None where one lacks it."""
    runs = [found["runs"][run_key(arm, budget)] for found in complete(case, results, arm)]
    return statistics.fmean(run["linear"] for run in runs) if runs and all("linear" in run for run in runs) else None


def rivals(case: Case, curves: Mapping[str, Curves], arm: str) -> list[tuple[str, str]]:
    """What an arm should be better than: the constant that is best in the mean over its budgets, and the paper's."""
    if arm not in curves:
        return []

    def quality(name: str) -> float:
        return statistics.fmean(statistics.fmean(curves[name][b]) for b in curves[arm])

    constants = [name for name in case.constants if set(curves[arm]) <= set(curves.get(name, ()))]
    found = [(max(constants, key=quality), "the best constant strategy")] if constants else []
    return found + ([("paper", "the paper's criterion")] if "paper" in curves else [])


def differences(case: Case, results: Sequence[Mapping[str, Any]], arm: str, other: str, budget: float) -> list[float]:
    """Final accuracy of one arm less another's at a budget, of the seeds that have both."""
    keys = run_key(arm, budget), run_key(other, budget)
    runs = [[found["runs"][key]["points"][-1]["accuracy"] for key in keys] for found in results
            if all(key in found["runs"] for key in keys)]  # fmt: skip
    return [ours - theirs for ours, theirs in runs]


def _foretold(case: Case, results: Sequence[Mapping[str, Any]], arm: str) -> Iterator[Line]:
    """How many times the budget no acceleration needs to get as far: what the optimizer said, and what happened."""
    both = complete(case, complete(case, results, "none"), arm)
    for budget in case.budgets:
        runs = [found["runs"].get(run_key(arm, budget), {}) for found in both]
        if not runs or not all("predicted_speed_up" in run for run in runs):
            continue
        said = statistics.fmean(run["predicted_speed_up"] for run in runs)
        none = {b: statistics.fmean(values) for b, values in curves_of(case, both, "none").items()}
        needed = crossing(list(none.items()), statistics.fmean(run["points"][-1]["accuracy"] for run in runs))
        beyond = "" if math.isfinite(needed) else ", more than this: it never got there"
        happened = min(needed, max(none)) / budget
        title = case.arms[arm].title
        yield (
            f"budget of no acceleration with the accuracy of {title} after {format_count(budget)} units, over that"
            f"{beyond}; predicted {said:.2f}",
            (happened, happened, happened), bool(beyond) or happened >= said / 2, len(runs),
        )  # fmt: skip


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


def draw_schedules(case: Case, results: Sequence[Mapping[str, Any]], budget: float, path: Path) -> None:
    """The schedules of all arms that were given one by a profile or by probes, of the first seed, as a PNG file."""
    from benchmarks.pictures import draw_figure, find_browser
    from gradscope.plots import plot_schedules

    drawn = {}
    for arm in case.arms:
        run = results[0]["runs"].get(run_key(arm, budget), {})
        if "stages" in run:
            stages = []
            for start, end, mixture in run["stages"]:
                shares = {Strategy.parse(text): share for text, share in mixture.items()}
                total = sum(shares.values())
                parts = tuple((strategy, share / total) for strategy, share in shares.items())
                cost = sum(share * case.model.cost(strategy) for strategy, share in parts)
                stages.append(Stage(start, end, parts, cost))
            drawn[case.arms[arm].title] = Schedule(tuple(stages), budget=budget, batch_size=case.model.batch_size)
    draw_figure(find_browser(), plot_schedules(drawn), path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=CASES, default="mocov3")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("--schedules", type=Path, metavar="FILE.png")
    parser.add_argument("--budget", type=parse_count, help="whose schedules are drawn; default the smallest one")
    options = parser.parse_args()
    case, results = CASES[options.case], read_results(options.case)
    if options.picture:
        draw(case, results, options.picture)
    if options.schedules:
        draw_schedules(case, results, options.budget or case.budgets[0], options.schedules)
    if options.picture or options.schedules:
        return 0
    print(table([("acceleration", row) for row in rows_of(case, results, read_seconds(case.name))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
