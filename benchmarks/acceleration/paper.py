"""The paper's findings, each as a number from our own runs and whether it agrees (arXiv 2410.22364).

Costs are compared with what it prints; the rest is read from the results of `benchmarks.acceleration.runs`: which
strategy `ca-mse` (its equation 10) puts first at each checkpoint of the unaccelerated run, and final accuracies.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceleration.cases import Case
from benchmarks.acceleration.runs import cube_key
from benchmarks.acceleration.tables import COMMAND, curves_of, differences
from benchmarks.summary import Row
from schedulers import Strategy, format_count, paper_cost, paper_table2b_cost

PRINTED = Path(__file__).parents[2] / "tests" / "schedulers" / "paper_costs.json"
MEASURED = "ca-mse, euclidean"
EARLY, LATE = 0.25, 0.75  # of the unaccelerated run


def cost_rows() -> list[Row]:
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
        Row(claim, right, "values", None, None, total, right == total, "any", str(datetime.date.today()), 1,
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

    best = _best(case, results)
    costs = {at: [_cost(case, s) for s in strategies] for at, strategies in best.items()}
    grid = case.model.config().grid(case.model.image_size)
    cheapest, dearest = min(map(case.model.cost, grid.strategies())), case.model.cost(grid.reference)
    moderate = [cheapest < cost < dearest for at, found in costs.items() if at <= EARLY for cost in found]
    chosen = "; ".join(f"{at:.2f}: {', '.join(found)}" for at, found in best.items())
    row(
        "early in training moderate compression is best: share of checkpoints up to a quarter at which ca-mse puts "
        "neither the reference nor the strongest compression first", [float(m) for m in moderate], "1", "above 0.5",
        lambda mean: mean > 0.5, f" (first at each progress, seed by seed: {chosen})",
    )  # fmt: skip
    early = [statistics.fmean(found) for found in zip(*(c for at, c in costs.items() if at <= EARLY), strict=True)]
    late = [statistics.fmean(found) for found in zip(*(c for at, c in costs.items() if at >= LATE), strict=True)]
    row(
        "the best strategy shifts towards the reference: units per sample of the first by ca-mse in the last quarter, "
        "over those in the first", [b / a for a, b in zip(early, late, strict=True)], "x", "above 1",
        lambda mean: mean > 1,
    )  # fmt: skip
    constants = [name for name in case.constants if name in curves]
    for budget in (case.budgets[0], case.budgets[-1]) if constants and "none" in curves else ():
        there = [name for name in constants if budget in curves[name]]
        if there:
            first = max(there, key=lambda name: statistics.fmean(curves[name][budget]))
            ahead = differences(case, results, first, "none", budget)
            row(
                f"constant strategies win at small budgets and lose at large ones: kNN accuracy of the best constant, "
                f"'{first}', less that of no acceleration after {format_count(budget)} units", ahead, "fraction",
                "above 0" if budget == case.budgets[0] else "below 0",
                (lambda mean: mean > 0) if budget == case.budgets[0] else (lambda mean: mean < 0),
            )  # fmt: skip
    for poly in ("none-poly", f"{case.favourite}-poly"):
        cosine = poly.removesuffix("-poly")
        for budget in sorted(set(curves.get(poly, ())) & set(curves.get(cosine, ()))):
            row(
                f"polynomial decay is better than cosine at short budgets: kNN accuracy of '{poly}' less that of "
                f"'{cosine}' after {format_count(budget)} units", differences(case, results, poly, cosine, budget),
                "fraction", "above 0", lambda mean: mean > 0,
            )  # fmt: skip
    return made


def _best(case: Case, results: Sequence[Mapping[str, Any]]) -> dict[float, list[str]]:
    """What `ca-mse` puts first by progress of the unaccelerated run, seed by seed."""
    offline = case.arms["paper"].offline
    assert offline is not None
    found: dict[float, list[str]] = {}
    for result in results:
        for progress, strategy in result["runs"].get(cube_key(offline), {}).get("best", {}).get(MEASURED, ()):
            found.setdefault(round(progress, 2), []).append(strategy)
    return dict(sorted(found.items()))


def _cost(case: Case, strategy: str) -> float:
    return case.model.cost(Strategy.parse(strategy))
