"""The results of `benchmarks.acceleration` as a reader gets them in a minute: part of `benchmarks/RESULTS.md`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceleration import keys, ranking
from benchmarks.acceleration.cases import CASES, Case
from benchmarks.acceleration.clock import read_seconds
from benchmarks.acceleration.numbers import Ratio, complete, curves_of, linear_of, saving_of
from benchmarks.acceleration.runs import FOLDER, read_results
from benchmarks.acceleration.tables import LEVELS
from schedulers import format_count

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
LINKED = Path("../docs/pictures")  # from the page


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
    levels = sorted(curves["none"])[-LEVELS:][::-1]
    most = max(len(complete(case, results, arm)) for arm in curves)
    full = [curve for arm, curve in curves.items() if len(complete(case, results, arm)) == most]
    best = {b: max((statistics.fmean(c[b]) for c in full if b in c), default=0.0) for b in case.budgets}
    header = [
        "schedule", *map(format_count, case.budgets), "seeds",
        *(f"x less budget than {format_count(level)}" for level in levels), "in time", "pilot and profile paid",
    ]  # fmt: skip
    lines = [
        f"### {case.name}, base patch {case.model.patch}, grid {case.model.grid}, batch {case.model.batch_size}", "",
        "Accuracy in % after a budget in units, kNN / linear probe, mean over seeds (bold: best kNN of those with all "
        "seeds). Then how many times less budget gives the kNN accuracy that no acceleration has with "
        f"{' or '.join(map(format_count, levels))} (5 to 95 % of resampled seeds), and the first of these in seconds "
        "of steps, and with the units of pilot and profile paid by one run.", "",
        _line(header), _line(["---"] * len(header)),
    ]  # fmt: skip
    for arm, curve in curves.items():
        cells, seeds = [case.arms[arm].title], len(complete(case, results, arm))
        for budget in case.budgets:
            if budget not in curve:
                cells.append("")
                continue
            mean, linear = statistics.fmean(curve[budget]), linear_of(case, results, arm, budget)
            text = f"**{100 * mean:.1f}**" if mean == best[budget] and seeds == most else f"{100 * mean:.1f}"
            cells.append(text if linear is None else f"{text} / {100 * linear:.1f}")
        savings = [None if arm == "none" else saving_of(case, results, arm, level, seconds) for level in levels]
        never = f"not by {format_count(max(curve))}"
        ratios = [_ratio(saving.units, never, interval=True) if saving else "" for saving in savings]
        first = savings[0]
        time = _ratio(first.time, never) if first and first.time else ""
        paid = "" if first is None or first.with_paid is None else f"{first.with_paid:.2f}"
        lines.append(_line([*cells, str(seeds), *ratios, time, paid]))
    picture = PICTURES / f"acceleration-{case.name}.png"
    if picture.is_file():
        lines += ["", f"![Accuracy over the budget, {case.name}]({LINKED / picture.name})"]
    return [*lines, ""]


def _ratio(ratio: Ratio, never: str, *, interval: bool = False) -> str:
    if not ratio.value:
        return never
    text = f"{'≥ ' if ratio.bound else ''}{ratio.value:.1f}"
    return f"{text} ({ratio.low:.1f} to {ratio.high:.1f})" if interval else text


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
        f"over {len({(p['seed'], p['pilot'], p['fraction']) for p in points})} checkpoints of the pilots.", "",
        _line(header), _line(["---"] * len(header)),
    ]  # fmt: skip
    for pilot, criterion in dict.fromkeys((pilot, criterion) for pilot, criterion, _, _ in found):
        values = (found.get((pilot, criterion, way, measure), []) for way, measure in ways)
        cells = [f"{statistics.fmean(v):+.2f}" if v else "" for v in values]
        lines.append(_line([pilot, criterion, *cells]))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
