"""How schedules depend on the budget, on cubes of real runs: three budgets a factor 8 apart.

    python -m benchmarks.optimizer.shift [--runs mixed-2M ...] [--quick] [--device cpu]

Four runs of the bundled trainer (MoCo-v3, the demo's ViT, Fashion-MNIST, base patch 2, 16 strategies): mixed and
without acceleration, each with a batch of 64 and of 256. Nine checkpoints of each are profiled, those of the large
batch with up to 8,192 samples a cell, and schedules found by trajectory for a 64th, an 8th and all of the run's budget,
with the mean cost per sample and the share of the budget that goes to base patches. Runs and cubes lie in
`build/optimizer` and are continued there; `results/shift.json` keeps the schedules and the scores they rest on,
`results/<run>-<budget>.json` the schedules for the run's own batch as files (by `descent`; with `-ca-mse`, by the
paper's criterion).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
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
BATCHES = (64, 256, 4096)  # those of the runs, and the paper's scale
CRITERIA = (("descent", "optimizer"), ("ca-mse", "euclidean"))


@dataclass(frozen=True)
class Run:
    """A run of the bundled trainer and how it was profiled; its name is that of its folder."""

    schedule: str
    budget: str
    batch: int
    samples: int | None = None  # most per cell, None the profile's default

    @property
    def name(self) -> str:
        return f"{self.schedule}-{self.budget}" + (f"-{self.batch}" if self.batch != 64 else "")


RUNS = {
    run.name: run
    for run in (
        Run("mixed", "2M", 64), Run("none", "500K", 64), Run("mixed", "1M", 256, 8192), Run("none", "1M", 256, 8192),
    )
}  # fmt: skip


def gradscope(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "gradscope", *arguments], cwd=WORK, check=True)


def make_cube(run: Run, device: str) -> Path:
    """Train and profile what is missing; the cube's path."""
    WORK.mkdir(parents=True, exist_ok=True)
    if (WORK / f"{run.name}.nc").exists() and (WORK / run.name / "log.jsonl").exists():
        return WORK / f"{run.name}.nc"
    cube, points = f"{run.name}.nc", ",".join(map(str, CHECKPOINTS))
    gradscope(
        "train", "--budget", run.budget, "--schedule", run.schedule, "--grid", GRID, "--seed", "0", "--out", run.name,
        "--batch-size", str(run.batch), "--set", f"checkpoints=({points})", "--device", device,
    )  # fmt: skip
    samples = [] if run.samples is None else ["--samples", str(run.samples)]
    gradscope("profile", run.name, "-o", cube, "--device", device, *samples)
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


def of_cube(path: Path, own_batch: int) -> tuple[dict[str, Any], dict[str, list[Schedule]]]:
    """What is kept of a cube, and the schedules for the run's own batch by criterion."""
    from gradscope.cube import open_cube, profile_of

    cube = open_cube(path).dataset
    found: dict[str, Any] = {
        "units": float(cube.attrs["units"]), "own_batch": own_batch, "schedules": {}, "scores": {},
    }  # fmt: skip
    own: dict[str, list[Schedule]] = {}
    for (criterion, metric), batch in itertools.product(CRITERIA, BATCHES):
        profile: Profile = profile_of(cube, metric=metric).for_batch(batch)
        assert profile.reference_budget is not None
        budgets = [profile.reference_budget / part for part in PARTS]
        plans = [optimize(profile, b, criterion=criterion, progress="trajectory", draws=200) for b in budgets]
        if batch == own_batch:
            own[criterion] = plans
        base = dict(profile.grid.reference)
        found["schedules"][f"{criterion}, batch {batch}"] = [facts(plan, base) for plan in plans]
        score, se = profile.scores(criterion, profile.progress)
        found["scores"][f"{criterion}, batch {batch}"] = {
            "progress": profile.progress.tolist(),
            "strategies": [str(s) for s in profile.grid.strategies()],
            "score": np.round(score, 5).tolist(),
            "se": np.round(se, 5).tolist(),
        }
    return found, own


def rows(results: dict[str, Any]) -> list[Row]:
    """Rows for `summary.json`: mean cost per sample at the three budgets, and what they spend on base patches."""
    made = []
    for (criterion, _), batch, (run, cube) in itertools.product(CRITERIA, BATCHES, results["runs"].items()):
        found = cube["schedules"][f"{criterion}, batch {batch}"]
        own = " (the run's own)" if batch == cube["own_batch"] else ""
        costs = [plan["mean_cost"] for plan in found]
        grows = costs == sorted(costs) and costs[-1] > costs[0]
        for part, plan in zip(PARTS, found, strict=True):
            what = "all" if part == 1 else f"1/{part}"
            made.append(
                Row(
                    claim=f"run {run}: units per sample of the schedule for {what} of it, "
                    f"{plan['reference_share']:.0%} of them on the reference ({criterion}, batch {batch}{own})",
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
    for name in options.runs:
        run = RUNS[name]
        found, own = of_cube(make_cube(replace(run, budget="20K") if options.quick else run, options.device), run.batch)
        results["runs"][name] = found
        for criterion, plans in own.items():
            end = "" if criterion == CRITERIA[0][0] else f"-{criterion}"
            for plan in plans if not options.quick else ():
                save_schedule(plan, FILE.with_name(f"{name}-{plan.budget:.0f}{end}.json"))
    if not options.quick:
        FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table([("optimizer", row) for row in rows(results)]))


if __name__ == "__main__":
    main()
