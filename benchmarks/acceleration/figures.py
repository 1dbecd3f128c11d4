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
from gradscope.plots._theme import PALETTE
from schedulers import Schedule, Stage, Strategy, format_count, parse_count


def draw_curves(case: Case, results: Results, path: Path) -> None:
    """Mean final accuracy over the budget of every arm that has more than one, as a PNG file."""
    import plotly.graph_objects as go

    figure = go.Figure()
    curves = {arm: curve for arm in case.arms if len(curve := curves_of(case, results, arm)) > 1}
    for i, (arm, curve) in enumerate(curves.items()):
        means = [statistics.fmean(values) for values in curve.values()]
        figure.add_scatter(
            x=[budget * 1.015 ** (i - len(curves) / 2) for budget in curve],  # so that bars stand side by side
            y=means, name=case.arms[arm].title, mode="lines+markers",
            line={"width": 4 if arm == "none" else 2, "dash": "dot" if arm in case.constants else "solid"},
            error_y={
                "type": "data", "symmetric": False, "thickness": 1, "width": 0,
                "array": [max(v) - m for v, m in zip(curve.values(), means, strict=True)],
                "arrayminus": [m - min(v) for v, m in zip(curve.values(), means, strict=True)],
            },
        )  # fmt: skip
    figure.update_layout(
        xaxis={
            "type": "log", "title": "budget (units)", "tickvals": case.budgets,
            "ticktext": [format_count(budget) for budget in case.budgets],
        },
        yaxis={"title": "kNN accuracy, mean and range of the seeds", "tickformat": ".0%"},
        template="plotly_white", width=900, height=620, colorway=PALETTE,
        margin={"t": 20, "r": 20}, legend={"orientation": "h", "y": -0.14},
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
