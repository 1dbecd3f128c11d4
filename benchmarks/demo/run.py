"""The demo over several seeds: how much budget the optimized schedule needs for the unaccelerated run's accuracy.

    python -m benchmarks.demo.run [--seeds 0 1 2] [--budget 120K] [--work build/demo] [--quick]

For each seed the demo is run as `gradscope demo` runs it (pilot, profile, schedule, three runs at the same
budget). Schedules for smaller budgets are found in the same cube and run too, each a whole run with its own warm-up
and decay, and the budget from which on its kNN accuracy is that of the unaccelerated run is interpolated linearly
in the logarithm of the budget. Pilot and profile are charged as the number of runs at equal accuracy after
which they have paid for themselves. Results of a seed are written to `results/` as soon as it is finished; a
seed that is there is not run again, and an interrupted one continues from `--work`.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import device_text
from benchmarks.summary import Row, table, write_summary
from gradscope.config import open_setting
from gradscope.cube import open_cube, profile_of
from gradscope.demo import BUDGET, demo_config, run_demo
from gradscope.files import write_text
from gradscope.progress import Progress
from gradscope.trainer import train
from schedulers import load_schedule, optimize, parse_count

FOLDER = Path(__file__).parent
SHARES = (0.125, 0.25, 0.5)  # of the demo's budget
DATA = "fashion-mnist-10k"
COMMAND = "python -m benchmarks.demo.run"


def run_seed(seed: int, budget: float, work: Path, shares: tuple[float, ...], device: torch.device) -> dict[str, Any]:
    """The demo and the shorter runs of its schedule for one seed, as JSON values."""
    out = work / f"seed-{seed}"
    demo = run_demo(out, budget=budget, data=DATA, seed=seed, device=device)
    found = load_schedule(out / "schedule.json")
    profile = profile_of(open_cube(out / "cube.nc").dataset)
    shorter = []
    for share in shares:
        setting = open_setting(demo_config(share * budget, DATA, seed))
        schedule = optimize(profile, share * budget)
        with Progress(f"seed {seed}, {share:g}") as progress:
            result = train(setting, schedule, out / f"optimized-{share:g}", device=device, report=progress.update)
        facts = {"budget": share * budget, "knn_accuracy": result.accuracy, "samples": result.samples}
        shorter.append({**facts, "stages": json.loads(schedule.to_json())["stages"]})
    return {
        "seed": seed,
        "budget": budget,
        "rows": [asdict(row) for row in demo.rows],
        "profile_units": demo.profile_units,
        "stages": json.loads(found.to_json())["stages"],
        "predicted": found.predicted,
        "shorter": shorter,
    }


def crossing(points: list[tuple[float, float]], accuracy: float) -> float | None:
    """Smallest budget from which on `points` (budget, accuracy) stay at `accuracy` or above; log-linear in between.

    A shorter run that reached it by luck, with a longer one below, does not count. The first budget itself when
    no run is below, None when the last one is.
    """
    points = sorted(points)
    if points[-1][1] < accuracy:
        return None
    for (b0, a0), (b1, a1) in reversed(list(itertools.pairwise(points))):
        if a0 < accuracy:
            share = (accuracy - a0) / (a1 - a0)
            return math.exp(math.log(b0) + share * (math.log(b1) - math.log(b0)))
    return points[0][0]


def rows_of(results: list[dict[str, Any]], device: str, date: str) -> list[Row]:
    """Claims with their mean and range over the seeds."""

    def row(claim: str, values: list[float], unit: str, aim: str, holds: bool) -> Row:
        mean = statistics.fmean(values)
        return Row(
            claim,
            round(mean, 4),
            unit,
            round(min(values), 4),
            round(max(values), 4),
            aim,
            holds,
            device,
            date,
            len(values),
            COMMAND,
        )

    accuracies = {
        name: [next(r["knn_accuracy"] for r in s["rows"] if r["run"] == name) for s in results]
        for name in ("no acceleration", "mixed pilot", "optimized schedule")
    }
    plain = accuracies["no acceleration"]
    rows = [
        row(f"demo: kNN accuracy, {name}", values, "fraction", "none; shown for comparison", True)
        for name, values in accuracies.items()
        if values is plain
    ]
    rows += [
        row(
            f"demo: kNN accuracy, {name}",
            values,
            "fraction",
            "above no acceleration for every seed",
            all(a > b for a, b in zip(values, plain, strict=True)),
        )
        for name, values in accuracies.items()
        if values is not plain
    ]
    for i, share in enumerate(p["budget"] / results[0]["budget"] for p in results[0]["shorter"]):
        values = [s["shorter"][i]["knn_accuracy"] for s in results]
        holds = all(a >= b for a, b in zip(values, plain, strict=True))
        rows.append(
            row(
                f"demo: kNN accuracy, optimized schedule at {share:g} of the budget",
                values,
                "fraction",
                "as no acceleration at the full budget, every seed",
                holds,
            )
        )
    reached = [(found, s) for s in results if (found := budget_share(s)) is not None]
    count = Row(
        "demo: seeds in which the optimized schedule reaches the unaccelerated run's accuracy",
        len(reached), "seeds", None, None, f"all {len(results)}", len(reached) == len(results),
        device, date, len(results), COMMAND,
    )  # fmt: skip
    rows.append(count)
    if reached:
        ratios = [1 / found for found, _ in reached]
        unit = "x fewer units" + (" (at least)" if any(found <= SHARES[0] for found, _ in reached) else "")
        claim = "demo: budget of the unaccelerated run over the optimized schedule's at equal accuracy"
        rows.append(row(claim, ratios, unit, "above 1 for every seed", min(ratios) > 1))
        uses = [(1 + s["profile_units"] / s["budget"]) / (1 - found) for found, s in reached if found < 1]
        if uses:
            claim = "demo: runs after which the pilot and the profile have paid for themselves"
            rows.append(row(claim, uses, "runs", "none; shown for comparison", True))
    rows.append(
        row(
            "demo: cost of the profile over the budget of one run",
            [s["profile_units"] / s["budget"] for s in results],
            "fraction",
            "none; shown for comparison",
            True,
        )
    )
    return rows


def budget_share(result: dict[str, Any]) -> float | None:
    """Share of the budget at which the optimized schedule reaches the unaccelerated run's accuracy, for one seed."""
    final = {row["run"]: row["knn_accuracy"] for row in result["rows"]}
    points = [(p["budget"], p["knn_accuracy"]) for p in result["shorter"]] + [
        (result["budget"], final["optimized schedule"])
    ]
    reached = crossing(points, final["no acceleration"])
    return None if reached is None else reached / result["budget"]


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=parse_count, default=BUDGET)
    parser.add_argument("--work", type=Path, default=Path("build/demo"), help="checkpoints of the runs; may be deleted")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, a tiny budget, one shorter run; writes no summary"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.quick:
        print(json.dumps(run_seed(0, 6e3, options.work / "quick", (0.5,), device), indent=2))
        return
    (FOLDER / "results").mkdir(exist_ok=True)
    for seed in options.seeds:
        path = FOLDER / "results" / f"seed-{seed}.json"
        if not path.exists():
            found = run_seed(seed, options.budget, options.work, SHARES, device)
            found["device"] = device_text(options.device, torch.get_num_threads())
            found["date"] = datetime.date.today().isoformat()
            write_text(path, json.dumps(found, indent=2) + "\n")
    results = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "results").glob("seed-*.json"))
    ]
    if any(found["budget"] != options.budget for found in results):
        parser.error(f"{FOLDER / 'results'} holds runs of another budget than {options.budget:g}; move them away")
    rows = rows_of(results, results[0]["device"], results[0]["date"])
    write_summary(FOLDER / "summary.json", rows)
    print(table([("demo", row) for row in rows]))


if __name__ == "__main__":
    main()
