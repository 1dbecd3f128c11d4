"""The learning rate at which runs without acceleration are best: what all arms of a case train with.

    python -m benchmarks.acceleration.rates [--cases mocov3 simclr dino] [--seeds 0 1 2] [--budget 120K] [--quick]

The search is the baseline's advantage: nothing is tuned for any other arm. Runs lie in `build/acceleration/rates` and
are continued there; `results/rates-<case>.json` keeps their accuracies.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.acceleration.cases import CASES, Case, cases_for
from benchmarks.acceleration.runs import FOLDER, PLAIN, WORK
from benchmarks.arms import Setup, points_of, train_arm
from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.files import write_text
from schedulers import format_count, parse_count

COMMAND = "python -m benchmarks.acceleration.rates"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TIED = 0.005  # of accuracy: what a seed moves it by


def rate_of(case: Case) -> float:
    """The learning rate of the case's runs, at a batch of 256."""
    return case.model.config().lr


def run_case(case: Case, budget: float, seeds: Sequence[int], device: str, folder: Path) -> dict[str, Any]:
    """kNN accuracy of runs without acceleration, by learning rate, seed by seed; JSON values."""
    found: dict[str, list[float]] = {}
    for rate in (factor * rate_of(case) for factor in FACTORS):
        model = replace(case.model, options=(*case.model.options, "--lr", f"{rate:g}"))
        setup = Setup(model, budget, device, folder / f"{case.name}-{format_count(budget)}-{rate:g}", 0, PLAIN, True)
        ends = [points_of(train_arm(setup, "none", seed, "none"))[-1]["accuracy"] for seed in seeds]
        found[f"{rate:g}"] = ends
        print(f"{case.name}, lr {rate:g}: {ends}", flush=True)
    return {
        "case": case.name, "budget": budget, "seeds": list(seeds), "accuracy": found,
        "device": device_text(device, 1), "date": str(datetime.date.today()),
    }  # fmt: skip


def read_results(case: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """The search of a case, if it was made."""
    path = folder / f"rates-{case}.json"
    return [json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def rows_of(case: Case, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row for `summary.json`: the accuracy at the rate of the case's runs, and at the others in words."""
    made = []
    for found in results:
        means = {float(rate): statistics.fmean(ends) for rate, ends in found["accuracy"].items()}
        chosen = min(means, key=lambda rate: abs(rate - rate_of(case)))
        ends = found["accuracy"][f"{chosen:g}"]
        others = ", ".join(f"{rate:g}: {mean:.1%}" for rate, mean in sorted(means.items()) if rate != chosen)
        best = max(means, key=lambda rate: means[rate])
        inside = min(means) < best < max(means)
        made.append(
            Row(
                f"{case.name}: kNN accuracy of no acceleration after {format_count(found['budget'])} units at the "
                f"learning rate of all arms, {chosen:g} (others: {others})",
                round(means[chosen], 4), "fraction", min(ends), max(ends),
                f"no other by more than {TIED} better, and the best not the largest or smallest tried",
                inside and means[chosen] >= means[best] - TIED, found["device"], found["date"], len(ends), COMMAND,
            )
        )  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default all for the device")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=parse_count, default=120e3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="2K units; writes nothing")
    options = parser.parse_args()
    folder = WORK / "rates"
    if options.quick:
        folder, options.budget = WORK / "quick" / "rates", 2e3
    for name in options.cases or cases_for(options.device):
        found = run_case(CASES[name], options.budget, options.seeds, options.device, folder)
        if not options.quick:
            write_text(FOLDER / f"rates-{name}.json", json.dumps(found, indent=1) + "\n")
        print(table([("acceleration", row) for row in rows_of(CASES[name], [found])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
