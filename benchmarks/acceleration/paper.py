"""The paper's findings, each as a number from our own runs and whether it agrees (arXiv 2410.22364).

Costs are compared with what it prints; the rest is read from the results of `benchmarks.acceleration.runs`: which
strategy `ca-mse` (its equation 10) puts first at each checkpoint of the unaccelerated run, and final accuracies.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceleration.cases import Case
from benchmarks.acceleration.numbers import curves_of, differences
from benchmarks.acceleration.runs import cube_key
from benchmarks.acceleration.tables import COMMAND
from benchmarks.summary import Row
from schedulers import Strategy, format_count, paper_cost, paper_table2b_cost

PRINTED = Path(__file__).parents[2] / "tests" / "schedulers" / "paper_costs.json"
MEASURED = "ca-mse, euclidean"
EARLY, LATE = 0.25, 0.75  # of the unaccelerated run


def cost_rows(date: str) -> list[Row]:
    """How many of the paper's printed costs are ours, of Fig. 3 and Table 2b; a digit cut off in the text is free."""
    told = json.loads(PRINTED.read_text(encoding="utf-8"))
    right, total = 0, 0
    for patch, row in told["fig3"]["printed"].items():
        for dropout, printed in zip(told["fig3"]["dropout"], row, strict=True):
            if printed is not None:
                ours = f"{paper_cost('mocov3', 240, 16, Strategy(patch=int(patch), dropout=dropout)):.2f}"
                right, total = right + ours.startswith(printed.rstrip("?")), total + 1
    for patch, printed in zip(told["table2b"]["patch"], told["table2b"]["printed"], strict=True):
        right, total = right + (f"{paper_table2b_cost(240, patch):.2f}" == printed), total + 1
    claim = f"the paper's printed costs (Fig. 3 and Table 2b, {total} values) that ours equal to the last digit"
    return [
        Row(claim, right, "values", None, None, total, right == total, "any", date, 1,
            "python -m benchmarks.acceleration.run --rows")
    ]  # fmt: skip


def rows_of(case: Case, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows for `summary.json`: does what the paper found hold in the runs of a case."""
    curves = {arm: found for arm in case.arms if (found := curves_of(case, results, arm))}
    made: list[Row] = []

    def row(
        finding: str, values: Sequence[float], unit: str, aim: str, holds: Callable[[float], bool], said: str = ""
    ) -> None:
        if values:
            used = [run for found in results for run in found["runs"].values()]
            mean = statistics.fmean(values)
            made.append(
                Row(
                    f"{case.name}, the paper's finding that {finding}{said}", round(mean, 4), unit,
                    round(min(values), 4), round(max(values), 4), aim, holds(mean), used[0]["device"],
                    max(run["date"] for run in used), len(values), f"{COMMAND} {case.name}",
                )
            )  # fmt: skip

    found = [firsts for result in results if (firsts := _firsts(case, result))]
    grid = case.model.config().grid(case.model.image_size)
    largest = max(strategy.number("patch") for strategy in grid.strategies())

    def moderate(strategy: str) -> bool:
        parsed = Strategy.parse(strategy)
        return parsed != grid.reference and parsed.number("patch") < largest

    chance = statistics.fmean(moderate(str(strategy)) for strategy in grid.strategies())
    firsts = "; ".join(", ".join(f"{at:.2f} {strategy}" for at, strategy in one) for one in found)
    row(
        "early in training moderate compression is best: share of the checkpoints up to a quarter at which ca-mse puts "
        "first neither the reference nor the largest patch, seed by seed",
        [statistics.fmean(moderate(s) for at, s in one if at <= EARLY) for one in found], "1",
        f"above what chance gives, {chance:.2f}", lambda mean: mean > chance,
        f" (first at each progress: {firsts})",
    )  # fmt: skip
    shifts = []
    for one in found:
        early, late = (
            statistics.fmean(case.model.cost(Strategy.parse(s)) for at, s in one if keep(at))
            for keep in (lambda at: at <= EARLY, lambda at: at >= LATE)
        )
        shifts.append(math.log2(late / early))
    row(
        "the best strategy shifts towards the reference: binary logarithm of the units per sample of the first by "
        "ca-mse in the last quarter over those in the first", shifts, "doublings", "above 0 in the mean",
        lambda mean: mean > 0,
    )  # fmt: skip
    constants = [name for name in case.constants if name in curves]
    both = sorted(set(curves.get("none", ())) & {budget for name in constants for budget in curves[name]})
    for budget in sorted({both[0], both[-1]}) if both else ():
        there = [name for name in constants if budget in curves[name]]
        first = max(there, key=lambda name: statistics.fmean(curves[name][budget]))
        small = budget == both[0]
        row(
            f"constant strategies win at small budgets and lose at large ones: kNN accuracy of the best constant, "
            f"'{first}', less that of no acceleration after {format_count(budget)} units",
            differences(results, first, "none", budget), "fraction",
            f"{'above' if small else 'below'} 0 in the mean",
            (lambda mean: mean > 0) if small else (lambda mean: mean < 0),
        )  # fmt: skip
    for poly in ("none-poly", f"{case.favourite}-poly"):
        cosine = poly.removesuffix("-poly")
        for budget in sorted(set(curves.get(poly, ())) & set(curves.get(cosine, ()))):
            row(
                f"polynomial decay is better than cosine at short budgets: kNN accuracy of '{poly}' less that of "
                f"'{cosine}' after {format_count(budget)} units", differences(results, poly, cosine, budget),
                "fraction", "above 0 in the mean", lambda mean: mean > 0,
            )  # fmt: skip
    return made


def _firsts(case: Case, result: Mapping[str, Any]) -> list[tuple[float, str]]:
    """What `ca-mse` puts first at each progress of a seed's unaccelerated run."""
    offline = case.arms["paper"].offline
    assert offline is not None
    best = result["runs"].get(cube_key(offline), {}).get("best", {})
    return [(round(progress, 2), strategy) for progress, strategy in best.get(MEASURED, ())]
