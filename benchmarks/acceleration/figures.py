"""The figures of a case: accuracy over the budget, and the schedules that were run.

    python -m benchmarks.acceleration.figures [--case mocov3] [--curves FILE.png] [--schedules FILE.png] [--budget 60K]

They need a headless Chromium.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.acceleration.cases import CASES, Case
from benchmarks.acceleration.numbers import Results, curves_of
from benchmarks.acceleration.runs import read_results, run_key
from benchmarks.pictures import draw_figure, find_browser
from schedulers import Schedule, Stage, Strategy, parse_count


def draw_curves(case: Case, results: Results, path: Path) -> None:
    """Mean final accuracy of every arm over the budget, as a PNG file."""
    import plotly.graph_objects as go

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


def draw_schedules(case: Case, results: Results, budget: float, path: Path) -> None:
    """The schedules of all arms that were given one by a profile or by probes, of the first seed, as a PNG file."""
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
    parser.add_argument("--curves", type=Path, metavar="FILE.png")
    parser.add_argument("--schedules", type=Path, metavar="FILE.png")
    parser.add_argument("--budget", type=parse_count, help="whose schedules are drawn; default the smallest one")
    options = parser.parse_args()
    case, results = CASES[options.case], read_results(options.case)
    if not results:
        parser.error(f"there are no results of {case.name} yet; `python -m benchmarks.acceleration.runs` makes them")
    if options.curves:
        draw_curves(case, results, options.curves)
    if options.schedules:
        draw_schedules(case, results, options.budget or case.budgets[0], options.schedules)
    return 0


if __name__ == "__main__":
    sys.exit(main())
