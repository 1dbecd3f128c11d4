"""The results of `benchmarks.acceleration` as a reader gets them in a minute: part of `benchmarks/RESULTS.md`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceleration import keys, ranking
from benchmarks.acceleration.cases import CASES, Case
from benchmarks.acceleration.clock import read_seconds
from benchmarks.acceleration.runs import FOLDER, read_results
from benchmarks.acceleration.tables import besides, complete, curves_of, linear_of, run_key, savings, timed
from schedulers import format_count

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
DEPTH = Path("../docs/pictures")


def overview(folder: Path = FOLDER) -> list[str]:
    """Lines of Markdown: every case as a table and a picture, the criteria, the paper's findings on keys."""
    lines: list[str] = []
    for case in CASES.values():
        results = read_results(case.name, folder)
        lines += _case_lines(case, results, read_seconds(case.name, folder)) if results else []
    for case in CASES.values():
        lines += _ranking_lines(case, ranking.read_results(case.name, folder))
    for row in keys.rows_of(keys.read_results(folder)):
        lines += [f"- {row.claim}: {row.value:+.1%} ({row.low:+.1%} to {row.high:+.1%} over {row.runs} seeds)."]
    return lines


def _case_lines(case: Case, results: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> list[str]:
    curves = {arm: found for arm in case.arms if (found := curves_of(case, results, arm))}
    if "none" not in curves:
        return []
    budgets, level = list(case.budgets), max(curves["none"])
    best = {b: max(statistics.fmean(c[b]) for c in curves.values() if b in c) for b in budgets}
    header = [
        "schedule", *map(format_count, budgets), "seeds", f"x less budget than {format_count(level)}", "in time",
        "pilot and profile paid",
    ]  # fmt: skip
    lines = [
        f"### {case.name}, base patch {case.model.patch}, grid {case.model.grid}, batch {case.model.batch_size}", "",
        "Accuracy in % after a budget in units, kNN / linear probe, mean over seeds (best kNN in bold). Then how many "
        f"times less budget than {format_count(level)} gives the kNN accuracy that no acceleration has with that (5 to "
        "95 % of resampled seeds), the same in seconds of steps, and the same with the units of pilot and profile paid "
        "by one run.", "",
        _line(header), _line(["---"] * len(header)),
    ]  # fmt: skip
    for arm, curve in curves.items():
        cells = [case.arms[arm].title]
        for budget in budgets:
            if budget not in curve:
                cells.append("")
                continue
            mean, linear = statistics.fmean(curve[budget]), linear_of(case, results, arm, budget)
            text = f"**{100 * mean:.1f}**" if mean == best[budget] else f"{100 * mean:.1f}"
            cells.append(text if linear is None else f"{text} / {100 * linear:.1f}")
        cells.append(str(len(complete(case, results, arm))))
        lines.append(_line([*cells, *_ratios(case, results, arm, level, seconds)]))
    picture = PICTURES / f"acceleration-{case.name}.png"
    if picture.is_file():
        lines += ["", f"![Accuracy over the budget, {case.name}]({DEPTH / picture.name})"]
    return [*lines, ""]


def _ratios(
    case: Case, results: Sequence[Mapping[str, Any]], arm: str, level: float, seconds: Mapping[str, float]
) -> list[str]:
    """How many times less budget: in units, in time, and with what was paid before; texts, empty where not known."""
    both = complete(case, complete(case, results, "none"), arm)
    if arm == "none" or not both:
        return ["", "", ""]
    none, curve = curves_of(case, both, "none"), curves_of(case, both, arm)
    value, low, high = savings(none, curve, level)
    if not value:
        return ["not reached", "", ""]
    at_least = "≥ " if value >= level / min(curve) else ""
    texts = [f"{at_least}{value:.1f} ({low:.1f} to {high:.1f})", "", ""]
    if seconds and all("shares" in found["runs"][run_key(arm, b)] for found in both for b in curve):
        whole = timed(case, both, "none", level, seconds)
        times = {timed(case, both, arm, b, seconds): values for b, values in curve.items()}
        texts[1] = f"{at_least}{savings({whole: none[level]}, times, whole)[0]:.1f}"
    costs = [cost for found in both if (cost := besides(case, found, arm)) is not None]
    if costs:
        texts[2] = f"{level / (level / value + statistics.fmean(costs)):.2f}"
    return texts


def _ranking_lines(case: Case, results: Sequence[Mapping[str, Any]]) -> list[str]:
    points = [p | {"seed": found["seed"]} for found in results for p in found["points"]]
    if not points:
        return []
    found = ranking.correlations(points)
    ways = list(dict.fromkeys((way, measure) for _, _, way, measure in found))
    header = ["pilot", "criterion", *(f"{measure}, {way}" for way, measure in ways)]
    lines = [
        f"### Do the criteria rank strategies as short training does? {case.name}", "",
        "Rank correlation (Spearman) over the strategies with the drop of the reference's loss and the gain in kNN "
        "accuracy after a share of the pilot's budget under each, at once or after recovery under the reference; mean "
        f"over {len({(p['seed'], p['fraction']) for p in points})} checkpoints a pilot.", "",
        _line(header), _line(["---"] * len(header)),
    ]  # fmt: skip
    for pilot, criterion in dict.fromkeys((pilot, criterion) for pilot, criterion, _, _ in found):
        values = (found.get((pilot, criterion, way, measure), []) for way, measure in ways)
        cells = [f"{statistics.fmean(v):+.2f}" if v else "" for v in values]
        lines.append(_line([pilot, criterion, *cells]))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
