"""Every arm of a case at every budget, for every seed: what is compared, measured.

    python -m benchmarks.acceleration.runs [--cases mocov3 ...] [--seeds 0 1 2] [--arms none descent ...] [--workers 2]
        [--most 240K] [--quick] [--device cpu]

`--most` leaves out larger budgets, which pilots have all the same. Runs lie in `build/acceleration/<case>/<budget>`,
cubes beside them, and are continued there; `results/<case>-<seed>.json` keeps what was measured, run by run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.acceleration.cases import CASES, Arm, Case, cases_for
from benchmarks.arms import (
    ROOT,
    Offline,
    Setup,
    find_schedule,
    linear_accuracy,
    points_of,
    probe_facts,
    profile_pilot,
    run_all,
    shares_of,
    stages_of,
    told,
    train_arm,
)
from benchmarks.machine import device_text, versions
from gradscope.errors import GradscopeError, UsageError
from gradscope.files import write_text
from schedulers import format_count, load_schedule, parse_count

WORK = ROOT / "build" / "acceleration"
FOLDER = Path(__file__).parent / "results"
ONCE = ("--set", "evaluations=(1,)")
PLAIN = (*ONCE, "--set", "checkpoints=(1,)")  # of runs that are no pilot


@dataclass(frozen=True)
class Plan:
    """A case on a device. Keys name what is done: `descent 30K` an arm's run, `cube of mixed, ca-mse` a profile."""

    case: Case
    device: str
    folder: Path
    quiet: bool

    @property
    def about(self) -> dict[str, Any]:
        """What all runs of the case have in common: results of anything else are not of it."""
        model = self.case.model
        return {"case": self.case.name, "grid": model.grid, "settings": " ".join(model.words), "lr": model.config().lr}

    @property
    def pilot_budget(self) -> float:
        return self.case.pilot_budget

    def setup(self, budget: float) -> Setup:
        pilot = budget == self.pilot_budget
        return Setup(
            self.case.model, budget, self.device, self.folder / format_count(budget),
            self.case.model.profile_samples(self.pilot_budget, 5), ONCE if pilot else PLAIN, self.quiet,
        )  # fmt: skip

    def keys(self, arms: Sequence[str], most: float) -> tuple[list[str], dict[str, str]]:
        """What is to be done for some arms, in an order in which it can be, and what waits for what."""
        keys: list[str] = []
        after: dict[str, str] = {}

        def pilot(name: str) -> str:
            key = run_key(name, self.pilot_budget)
            if key not in keys:
                add(name, self.pilot_budget)
            return key

        def add(name: str, budget: float) -> None:
            key, offline = run_key(name, budget), self.case.arms[name].offline
            if offline is not None:
                cube = cube_key(offline)
                if cube not in keys:
                    after[cube] = pilot(offline.pilot)
                    keys.append(cube)
                after[key] = cube
            if key not in keys:
                keys.append(key)

        for budget in reversed(self.case.budgets):
            for name, arm in self.case.arms.items():
                if name in arms and budget <= most and arm.least <= budget / self.case.budgets[-1] <= arm.most:
                    add(name, budget)
        return keys, after

    def run(self, key: str, seed: int) -> dict[str, Any]:
        """Do what a key names, or continue it: JSON values."""
        date = {"date": str(datetime.date.today())}
        if key.startswith("cube"):
            offline = next(o for a in self.case.arms.values() if (o := a.offline) is not None and cube_key(o) == key)
            setup = self.setup(self.pilot_budget)
            return profile_pilot(setup, setup.path(offline.pilot, seed), self.cube(offline, seed), seed, offline) | date
        name, _, text = key.partition(" ")
        arm, setup = self.case.arms[name], self.setup(parse_count(text))
        return self._train(name, arm, setup, seed) | date

    def cube(self, offline: Offline, seed: int) -> Path:
        return self.folder / f"{cube_key(offline).replace(', ', '-').replace(' ', '-')}-{seed}.nc"

    def _train(self, name: str, arm: Arm, setup: Setup, seed: int) -> dict[str, Any]:
        schedule, facts, out = arm.schedule, dict[str, Any](), setup.path(name, seed)
        if arm.offline is not None:
            plan = setup.path(name, seed, ".json")
            plan.parent.mkdir(parents=True, exist_ok=True)
            find_schedule(setup, self.cube(arm.offline, seed), plan, arm.offline)
            schedule, facts = str(plan), {"stages": stages_of(plan)}
            if (speed_up := load_schedule(plan).predicted.get("speed_up")) is not None:  # `fraction` has none
                facts["predicted_speed_up"] = speed_up
        log = train_arm(replace(setup, train=(*setup.train, *arm.options)), name, seed, schedule)
        if schedule == "online":
            facts = {**probe_facts(out, log), "stages": stages_of(out / "schedule.json")}
        facts |= {"linear": linear_accuracy(setup, out), "shares": shares_of(log, self.case.model)}
        return {"points": points_of(log), **facts}


def _summary(run: dict[str, Any]) -> str:
    if "points" not in run:
        return f"{run['profile_units']:,.0f} units"
    last = run["points"][-1]
    return f"{last['accuracy']:.4f} ({last['samples']:,} samples)"


def run_key(arm: str, budget: float) -> str:
    return f"{arm} {format_count(budget)}"


def cube_key(offline: Offline) -> str:
    criterion = "ca-mse" if "ca-mse" in offline.decision else "descent"
    return f"cube of {offline.pilot}, {criterion}"


def read_results(case: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """What was measured of a case, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"{case}-*.json")]
    return sorted((one for one in found if one["case"] == case), key=lambda one: int(one["seed"]))


def checked(about: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """`found`, results of a seed. Raises UsageError where they are of runs with other settings."""
    for name, value in about.items():
        if found[name] != value:
            raise UsageError(
                f"results of {about['case']}, seed {found['seed']}, are of runs with {name} {found[name]!r}, not "
                f"{value!r}; move them and build/acceleration/{about['case']} away"
            )
    return dict(found)


def kept(run: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """`run` with the date and the device of `before`, where that was the same run, done already."""
    done = "points" if "points" in run else "profile_units"
    same = before is not None and before.get(done) == run[done]
    return run | {name: before[name] for name in ("date", "device")} if same and before else run


def run_case(
    plan: Plan, arms: Sequence[str], seeds: Sequence[int], most: float, workers: int, *, keep: bool
) -> list[str]:
    """Do, or continue, some arms of a case and write what was measured where `keep`. What failed, a line each.

    Raises UsageError where there are results of other settings.
    """
    case = plan.case
    keys, after = plan.keys(arms or tuple(case.arms), most)
    results = {one["seed"]: checked(plan.about, one) for one in read_results(case.name)} if keep else {}
    failed = []
    for key, seed, done in run_all(plan.run, keys, after, seeds, workers):
        try:
            run = done.result()
        except (subprocess.CalledProcessError, GradscopeError) as error:
            failed.append(f"{case.name}, {key}, seed {seed}: {told(error)}")
            continue
        found = results.setdefault(seed, {**plan.about, "seed": seed, "versions": versions(), "runs": {}})
        found["runs"][key] = kept(run | {"device": device_text(plan.device, 1)}, found["runs"].get(key))
        if keep:
            FOLDER.mkdir(exist_ok=True)
            found["runs"] = {name: found["runs"][name] for name in sorted(found["runs"])}
            write_text(FOLDER / f"{case.name}-{seed}.json", json.dumps(found, indent=1) + "\n")
        print(f"{case.name}, {key}, seed {seed}: {_summary(run)}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default all for the device")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="with what they need; default all")
    parser.add_argument("--most", type=parse_count, default=float("inf"), help="largest budget")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--quick", action="store_true", help="one seed, tiny budgets; writes nothing")
    options = parser.parse_args()
    failed = []
    for name in options.cases or cases_for(options.device):
        case, folder, seeds = CASES[name], WORK / name, options.seeds
        if options.quick:
            case, folder, seeds = replace(case, budgets=(2e3, 4e3)), WORK / "quick" / name, seeds[:1]
        unknown = set(options.arms or ()) - set(case.arms)
        if unknown:
            parser.error(f"--arms {', '.join(sorted(unknown))}: choose from {', '.join(case.arms)}")
        plan = Plan(case, options.device, folder, quiet=options.workers > 1)
        try:
            failed += run_case(
                plan, options.arms or (), seeds, most=options.most, workers=options.workers, keep=not options.quick
            )
        except UsageError as error:
            parser.error(str(error))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
