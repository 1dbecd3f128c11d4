"""Does a schedule carry over: measured on a small model and little data, used for a larger model on more.

    python -m benchmarks.acceleration.transfer [--seeds 0 1 2] [--budget 60K] [--device cpu] [--quick]

The small one is the case `mocov3` (its mixed pilot at the largest budget, and the profile of that); LARGER is twice as
wide and sees Fashion-MNIST's 60,000 images (found as `--data fashion-mnist` finds them). Compared at one budget: no
acceleration, constant patch 7, the larger model's own mixed run, the schedule from a profile of that, and the schedule
from the small one's. Runs lie in `build/acceleration/transfer` and are continued there; `results/transfer-<seed>.json`
keeps what was measured.
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

from benchmarks.acceleration.cases import CASES
from benchmarks.acceleration.runs import FOLDER, ONCE, WORK, Plan, cube_key, run_key
from benchmarks.arms import (
    Offline,
    Setup,
    find_schedule,
    points_of,
    profile_pilot,
    stages_of,
    train_arm,
)
from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.files import write_text
from schedulers import format_count, parse_count

COMMAND = "python -m benchmarks.acceleration.transfer"
SMALL = CASES["mocov3"]
LARGER = replace(SMALL.model, data="fashion-mnist", settings=(("width", 96), ("heads", 2)))
OFFLINE = Offline("mixed")
ARMS = {"none": "none", "patch7": "patch=7", "mixed": "mixed", "own": "", "transferred": ""}


def run_seed(small: Plan, setup: Setup, seed: int) -> dict[str, Any]:
    """What every arm came to; JSON values."""
    small.run(run_key("mixed", small.pilot_budget), seed)
    measured = small.run(cube_key(OFFLINE), seed)
    runs: dict[str, Any] = {}
    for arm, schedule in ARMS.items():
        facts: dict[str, Any] = {}
        if not schedule:
            cube, plan, facts = small.cube(OFFLINE, seed), setup.path(arm, seed, ".json"), measured
            if arm == "own":
                cube = setup.path("cube", seed, ".nc")
                facts = profile_pilot(setup, setup.path("mixed", seed), cube, seed, OFFLINE)
            find_schedule(setup, cube, plan, OFFLINE)
            schedule, facts = str(plan), facts | {"stages": stages_of(plan)}
        log = train_arm(setup, arm, seed, schedule)
        runs[arm] = {"points": points_of(log), **facts}
        print(f"{arm}, seed {seed}: {runs[arm]['points'][-1]['accuracy']:.4f}", flush=True)
    return runs


def read_results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """What was measured, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("transfer-*.json")]
    return sorted(found, key=lambda one: one["seed"])


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows for `summary.json`: the transferred schedule's accuracy less that of every other arm."""
    paid = {}
    for arm in ("own", "transferred") if results else ():
        runs = [found["runs"][arm] for found in results]
        paid[arm] = format_count(statistics.fmean(run["pilot_units"] + run["profile_units"] for run in runs))
    made = []
    for other in ("own", "none", "patch7", "mixed") if results else ():
        ends = [
            [found["runs"][arm]["points"][-1]["accuracy"] for found in results] for arm in ("transferred", other)
        ]  # fmt: skip
        ahead = [ours - theirs for ours, theirs in zip(*ends, strict=True)]
        mean = statistics.fmean(ahead)
        made.append(
            Row(
                "transfer of a schedule from the case mocov3 to a model twice as wide on 60,000 images (pilot and "
                f"profile: {paid['transferred']} units of the small one, {paid['own']} of the wide): kNN accuracy "
                f"after {format_count(results[0]['budget'])} units ({statistics.fmean(ends[0]):.1%}) less that of "
                f"'{other}' ({statistics.fmean(ends[1]):.1%})",
                round(mean, 4), "fraction", round(min(ahead), 4), round(max(ahead), 4),
                "at least -0.005" if other == "own" else "above 0", mean >= (-0.005 if other == "own" else 0),
                results[0]["device"], results[-1]["date"], len(ahead), COMMAND,
            )
        )  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget", type=parse_count, default=60e3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="one seed, tiny budgets; writes nothing")
    options = parser.parse_args()
    small, folder, larger = Plan(SMALL, options.device, WORK / SMALL.name, quiet=True), WORK / "transfer", LARGER
    if options.quick:
        small = replace(small, case=replace(SMALL, budgets=(4e3,)), folder=WORK / "quick" / SMALL.name)
        folder, larger = WORK / "quick" / "transfer", replace(LARGER, data=SMALL.model.data)
        options.seeds, options.budget = options.seeds[:1], 4e3
    samples = larger.profile_samples(options.budget, 5)
    setup = Setup(larger, options.budget, options.device, folder / format_count(options.budget), samples, ONCE, True)
    done = []
    for seed in options.seeds:
        found = {
            "seed": seed, "budget": options.budget, "runs": run_seed(small, setup, seed),
            "device": device_text(options.device, 1), "date": str(datetime.date.today()),
        }  # fmt: skip
        done.append(found)
        if not options.quick:
            write_text(FOLDER / f"transfer-{seed}.json", json.dumps(found, indent=1) + "\n")
    print(table([("acceleration", row) for row in rows_of(done)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
