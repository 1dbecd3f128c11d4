"""How schedules depend on the budget, on cubes of real runs: three budgets a factor 8 apart.

    python -m benchmarks.optimizer.shift [--runs mixed none] [--quick] [--device cpu]

Two runs of the bundled trainer (MoCo-v3, the demo's ViT, Fashion-MNIST, base patch 2, 16 strategies, batch 64): a mixed
one of 2M units and one without acceleration of 500K. Nine checkpoints of each are profiled, and schedules found by
trajectory for a 64th, an 8th and all of the run's budget, with the mean cost per sample and the share of the budget
that goes to base patches. Runs and cubes lie in `build/optimizer` and are continued there; `results/shift.json` keeps
the schedules and the scores they rest on, `results/<run>-<budget>-batch-<batch>.json` those by `descent` as files.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from schedulers import Profile, Schedule, optimize, save_schedule

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "optimizer"
FILE = Path(__file__).parent / "results" / "shift.json"
COMMAND = "python -m benchmarks.optimizer.shift"
GRID = "patch=2,4,7,14;dropout=0,0.25,0.5,0.75"
CHECKPOINTS = (0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1)
PARTS = (64, 8, 1)
BATCHES = (64, 512, 4096)  # the runs' own, and up to the paper's scale
RUNS = {"mixed": "2M", "none": "500K"}
CRITERIA = (("descent", "optimizer"), ("ca-mse", "euclidean"))


def gradscope(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "gradscope", *arguments], cwd=WORK, check=True)


def make_cube(schedule: str, budget: str, device: str) -> Path:
    """Train and profile what is missing; the cube's path."""
    WORK.mkdir(parents=True, exist_ok=True)
    run, cube = f"{schedule}-{budget}", f"{schedule}-{budget}.nc"
    points = ",".join(map(str, CHECKPOINTS))
    gradscope(
        "train", "--budget", budget, "--schedule", schedule, "--grid", GRID, "--seed", "0", "--out", run,
        "--set", f"checkpoints=({points})", "--device", device,
    )  # fmt: skip
    gradscope("profile", run, "-o", cube, "--device", device)
    return WORK / cube


def facts(plan: Schedule, base: dict[str, Any]) -> dict[str, Any]:
    """A schedule's mean cost per sample, its share of base patches and of the reference, and its stages."""

    def share(axes: dict[str, Any]) -> float:
        return sum(
            stage.end - stage.start
            for stage in plan.stages
            if all(stage.strategy[name] == value for name, value in axes.items())
        )

    return {
        "budget": plan.budget,
        "mean_cost": plan.cost,
        "base_patch_share": share({"patch": base["patch"]}),
        "reference_share": share(base),
        "progress": plan.predicted["progress"],
        "speed_up": plan.predicted["speed_up"],
        "regret": plan.predicted.get("regret"),
        "stages": [
            [round(s.start, 4), round(s.end, 4), str(s.strategy), s.probability, s.progress and s.progress[1]]
            for s in plan.stages
        ],
    }


def of_cube(path: Path) -> tuple[dict[str, Any], list[Schedule]]:
    """What is kept of a cube, and the schedules by `descent` of all batches."""
    from gradscope.cube import open_cube, profile_of

    cube = open_cube(path).dataset
    found: dict[str, Any] = {"units": float(cube.attrs["units"]), "schedules": {}, "scores": {}}
    first: list[Schedule] = []
    large: list[Schedule] = []
    for (criterion, metric), batch in itertools.product(CRITERIA, BATCHES):
        profile: Profile = profile_of(cube, metric=metric).for_batch(batch)
        assert profile.reference_budget is not None
        budgets = [profile.reference_budget / part for part in PARTS]
        plans = [optimize(profile, b, criterion=criterion, progress="trajectory", draws=200) for b in budgets]
        first = first or plans
        if criterion == "descent" and batch != BATCHES[0]:
            large += plans
        base = dict(profile.grid.reference)
        found["schedules"][f"{criterion}, batch {batch}"] = [facts(plan, base) for plan in plans]
        score, se = profile.scores(criterion, profile.progress)
        found["scores"][f"{criterion}, batch {batch}"] = {
            "progress": profile.progress.tolist(),
            "strategies": [str(s) for s in profile.grid.strategies()],
            "score": np.round(score, 5).tolist(),
            "se": np.round(se, 5).tolist(),
        }
    return found, [*first, *large]


def rows(results: dict[str, Any]) -> list[Row]:
    """Rows for `summary.json`: mean cost per sample at the three budgets, and what they spend on base patches."""
    made = []
    for (criterion, _), batch, (run, cube) in itertools.product(CRITERIA, BATCHES, results["runs"].items()):
        found = cube["schedules"][f"{criterion}, batch {batch}"]
        costs = [plan["mean_cost"] for plan in found]
        grows = costs == sorted(costs) and costs[-1] > costs[0]
        for part, plan in zip(PARTS, found, strict=True):
            what = "all" if part == 1 else f"1/{part}"
            made.append(
                Row(
                    claim=f"{run} run: units per sample of the schedule for {what} of it ({criterion}, batch {batch})",
                    value=plan["mean_cost"],
                    unit="units",
                    low=None,
                    high=None,
                    aim="grows with the budget",
                    holds=grows,
                    device=results["device"],
                    date=results["date"],
                    runs=1,
                    command=COMMAND,
                )
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="20K units, for a look; writes nothing")
    options = parser.parse_args()
    results: dict[str, Any] = {
        "device": device_text(options.device, 1),
        "date": datetime.date.today().isoformat(),
        "runs": {},
    }
    for run in options.runs:
        found, plans = of_cube(make_cube(run, "20K" if options.quick else RUNS[run], options.device))
        results["runs"][f"{run}, {RUNS[run]}"] = found
        for plan in plans:
            if not options.quick:
                save_schedule(plan, FILE.with_name(f"{run}-{plan.budget:.0f}-batch-{plan.batch_size}.json"))
    if not options.quick:
        FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table([("optimizer", row) for row in rows(results)]))


if __name__ == "__main__":
    main()
