"""Accuracy at equal budget: the online mode beside no acceleration, constants, and schedules made offline.

    python -m benchmarks.adaptive.training [--seeds 0 1 2] [--arms online ...] [--budget 600K] [--workers 2] [--quick]
    python -m benchmarks.adaptive.training --picture docs/pictures/online-accuracy.png

Every arm is one `gradscope train` of MoCo-v3 and the demo's ViT on the embedded Fashion-MNIST with the recipe's
defaults, a batch of 64 and the strategies of MODEL; its accuracy is that of the 20 nearest neighbours, as the trainer
logs it at each quarter of the budget. The offline arms need a whole earlier run, their pilot, and a profile of its
five checkpoints, raced by the criterion that the schedule is then made by. Both are told beside their accuracy and
are not part of their budget; the probes of the online arm are part of its. Runs, cubes and schedules lie in
`build/adaptive` and are continued there; `results/training-<seed>.json` keeps what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import t

from benchmarks.arms import (
    ROOT,
    Model,
    Offline,
    Setup,
    find_schedule,
    points_of,
    probe_facts,
    profile_pilot,
    run_all,
    stages_of,
    told,
    train_arm,
)
from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.errors import GradscopeError
from gradscope.files import write_text
from schedulers import parse_count

WORK = ROOT / "build" / "adaptive"
FOLDER = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.adaptive.training"
MODEL = Model(patch=4, patches=(4, 7, 14), dropouts=(0.0, 0.5))
BUDGET = 600e3
UNTOUCHED = 8  # the seeds from here on were run after the last change of the policy, whose settings the others led to
OVERHEAD = 0.03  # of the budget: what the probes of the online arm may cost
QUICK_ONLINE = "online:overhead=0.9"  # 3 % of a tiny budget does not pay for a probe
SHOWN = "none; shown for comparison"

CONSTANTS = {
    "patch4-dropout0.5": "patch=4,dropout=0.5",
    "patch7": "patch=7",
    "patch7-dropout0.5": "patch=7,dropout=0.5",
}
OFFLINE = {
    "paper": Offline("none", ("--criterion", "ca-mse", "--metric", "euclidean"), ("--progress", "fraction")),
    "descent": Offline("mixed"),
}
SCHEDULES = {"none": "none", "mixed": "mixed", **CONSTANTS}
ONLINE = {"online": "online"}
ARMS = ("none", "mixed", *CONSTANTS, *OFFLINE, *ONLINE)
"""In the order in which they run: a pilot before what needs it."""

TITLES = {
    "none": "no acceleration",
    "mixed": "every step drawn from the grid",
    "paper": "the paper's offline schedule (ca-mse, profile of the run without acceleration)",
    "descent": "offline schedule by descent (profile of the mixed run)",
    "online": "online, probes charged",
}


def run_arm(setup: Setup, arm: str, seed: int, online: str = "") -> dict[str, Any]:
    """Train one arm, or continue it, and tell what it reached and cost, as JSON values.

    `online`: another rule than the arm's.
    """
    offline = OFFLINE.get(arm)
    extra: dict[str, Any] = {}
    if offline is None:
        schedule = online or ONLINE[arm] if arm in ONLINE else SCHEDULES[arm]
    else:
        cube, plan = setup.path(arm, seed, ".nc"), setup.path(arm, seed, ".json")
        extra = profile_pilot(setup, setup.path(offline.pilot, seed), cube, seed, offline)
        find_schedule(setup, cube, plan, offline)
        schedule, extra = str(plan), extra | {"stages": stages_of(plan)}
    log = train_arm(setup, arm, seed, schedule)
    if arm in ONLINE:
        out = setup.path(arm, seed)
        extra = {**probe_facts(out, log), "stages": stages_of(out / "schedule.json")}
    return {"points": points_of(log), **extra, "date": str(datetime.date.today())}


def read_results(folder: Path = FOLDER) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("training-*.json"))
    return sorted((json.loads(path.read_text(encoding="utf-8")) for path in paths), key=lambda found: found["seed"])


def rows(folder: Path = FOLDER) -> list[Row]:
    """Rows for `summary.json` from the result files in `folder`."""
    return rows_of(read_results(folder))


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """Accuracy of every arm, what the online arm differs by from the best other one, what came on top of the runs.

    Seeds that ran some arms only count where the online arm is compared with the best other one, by themselves.
    """
    if not results:
        return []
    present = [arm for arm in ARMS if any(arm in found["arms"] for found in results)]
    complete = [found for found in results if set(present) <= set(found["arms"])]
    partial = [found for found in results if complete and found not in complete]
    results = complete or results
    means = {arm: statistics.fmean(_values(results, arm, _final)) for arm in present}
    best_constant = max((arm for arm in CONSTANTS if arm in means), key=means.__getitem__, default=None)
    others = [arm for arm in present if arm not in ONLINE]
    after = f"after {results[0]['budget']:,.0f} units"
    row = _row_maker(results)
    made = []
    for arm in present:
        title = TITLES.get(arm) or f"constant {CONSTANTS[arm]}" + (", the best constant" * (arm == best_constant))
        online = arm == "online" and bool(others)
        aim = "mean no worse than the best of the others'" if online else SHOWN
        holds = not online or means[arm] >= max(means[other] for other in others)
        made.append(row(f"kNN accuracy {after}: {title}", _values(results, arm, _final), "fraction", aim, holds))
    if complete and "online" in present and others:
        best = max(others, key=means.__getitem__)
        made.append(_paired(row, complete, best))
        further = [found for found in partial if {"online", best} <= set(found["arms"])]
        for which, some in (
            ("further seeds", [found for found in further if found["seed"] < UNTOUCHED]),
            ("seeds on which nothing was chosen", [found for found in further if found["seed"] >= UNTOUCHED]),
        ):
            if some:
                made.append(_paired(_row_maker(some), some, best, f"{which}: "))
        if len(further) > 1:
            made.append(_over_all([*complete, *further], best))
    for arm in (arm for arm in OFFLINE if arm in present):
        shares = _values(results, arm, lambda run, budget: run["profile_units"] / budget)
        made.append(row(f"cost of the profile for '{arm}' over the budget of one run", shares, "fraction", SHOWN, True))
        shares = _values(results, arm, lambda run, budget: (run["pilot_units"] + run["profile_units"]) / budget)
        made.append(
            row(f"cost of pilot and profile for '{arm}' over the budget of one run", shares, "fraction", SHOWN, True)
        )
    if "online" in present:
        row, every = _row_maker([*results, *partial]), [*results, *partial]
        shares = _values(every, "online", lambda run, budget: run["probe_units"] / budget)
        holds = max(shares) <= OVERHEAD
        claim = "online: units of the probes over the budget, all seeds"
        made.append(row(claim, shares, "fraction", f"at most {OVERHEAD} in every run", holds))
        shares = _values(every, "online", lambda run, budget: run["probe_seconds"] / run["points"][-1]["seconds"])
        claim = "online: seconds of the probes over those of training, all seeds"
        made.append(row(claim, shares, "fraction", SHOWN, True))
    return made


def _paired(row: Callable[..., Row], results: Sequence[dict[str, Any]], best: str, which: str = "") -> Row:
    """Online minus the arm `best`, seed by seed."""
    pairs = zip(_values(results, "online", _final), _values(results, best, _final), strict=True)
    differences = [online - other for online, other in pairs]
    no_worse = sum(difference >= 0 for difference in differences)
    claim = (
        f"{which}kNN accuracy, online minus the best other arm by its mean ('{best}'), paired by seed; no worse in "
        f"{no_worse} of {len(differences)}"
    )
    aim = "not below 0 in the mean"
    return row(claim, differences, "fraction", aim, statistics.fmean(differences) >= 0)


def _over_all(results: Sequence[dict[str, Any]], best: str) -> Row:
    """Online minus the arm `best`, the mean over all seeds with its 95 % interval (Student's t)."""
    pairs = zip(_values(results, "online", _final), _values(results, best, _final), strict=True)
    differences = [online - other for online, other in pairs]
    mean = statistics.fmean(differences)
    count = len(differences)
    wide = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    row = _row_maker(results)(
        f"kNN accuracy, online minus '{best}', mean over all seeds that have both, with its 95 % interval",
        [mean - wide, mean, mean + wide], "fraction", "not below 0 in the mean", mean >= 0,
    )  # fmt: skip
    return replace(row, runs=count)


def _final(run: dict[str, Any], budget: float) -> float:
    return float(run["points"][-1]["accuracy"])


def _values(
    results: Sequence[dict[str, Any]], arm: str, value: Callable[[dict[str, Any], float], float]
) -> list[float]:
    """`value` of a run and its budget, for every seed that has the arm."""
    return [value(found["arms"][arm], found["budget"]) for found in results if arm in found["arms"]]


def _row_maker(results: Sequence[dict[str, Any]]) -> Callable[[str, Sequence[float], str, str, bool], Row]:
    device = " and ".join(sorted({found["device"] for found in results}))
    date = max(run["date"] for found in results for run in found["arms"].values())

    def row(claim: str, values: Sequence[float], unit: str, aim: str, holds: bool) -> Row:
        value, low, high = (round(v, 4) for v in (statistics.fmean(values), min(values), max(values)))
        return Row(f"training: {claim}", value, unit, low, high, aim, holds, device, date, len(values), COMMAND)

    return row


def draw(path: Path, folder: Path = FOLDER) -> None:
    """Mean accuracy of every arm over the budget as a PNG file (needs a headless Chromium)."""
    from benchmarks.pictures import draw_figure, find_browser
    from gradscope.plots import plot_training

    results = read_results(folder)
    most = max((len(found["arms"]) for found in results), default=0)
    results = [found for found in results if len(found["arms"]) == most]
    curves = {}
    for arm in ARMS:
        runs = [found["arms"][arm]["points"] for found in results if arm in found["arms"]]
        if runs:
            curves[CONSTANTS.get(arm, arm)] = [
                {name: statistics.fmean(point[name] for point in points) for name in ("units", "accuracy")}
                for points in zip(*runs, strict=True)
            ]
    draw_figure(find_browser(), plot_training(curves), path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="with the pilots that they need")
    parser.add_argument("--budget", type=parse_count, default=BUDGET)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=1, help="arms that run side by side")
    parser.add_argument("--quick", action="store_true", help="one seed, a tiny budget; writes nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw what is measured, and stop")
    options = parser.parse_args()
    if options.picture:
        draw(options.picture)
        return 0
    if options.quick:
        options.seeds, options.budget = options.seeds[:1], 3e3
        few = ("--set", "checkpoints=(0,1)", "--set", "evaluations=(1,)")
        setup = Setup(MODEL, 3e3, options.device, WORK / "quick", MODEL.profile_samples(3e3, 2), few)
    else:
        samples = MODEL.profile_samples(options.budget, 5)
        setup = Setup(MODEL, options.budget, options.device, WORK, samples, quiet=options.workers > 1)
    results = {} if options.quick else {found["seed"]: found for found in read_results()}
    if any(found["budget"] != options.budget for found in results.values()):
        parser.error(f"{FOLDER} holds runs of another budget than {options.budget:,.0f}; move them away")
    for folder in (setup.folder, *(() if options.quick else (FOLDER,))):
        folder.mkdir(parents=True, exist_ok=True)
    failed = []
    online = QUICK_ONLINE if options.quick else ""
    pilots = {arm: offline.pilot for arm, offline in OFFLINE.items() if arm in options.arms}
    arms = [arm for arm in ARMS if arm in {*options.arms, *pilots.values()}]
    runs = run_all(lambda a, s: run_arm(setup, a, s, online), arms, pilots, options.seeds, options.workers)
    for arm, seed, done in runs:
        try:
            run = done.result()
        except (subprocess.CalledProcessError, GradscopeError) as error:
            failed.append(f"{arm}-{seed}: {told(error)}")
            continue
        found = results.setdefault(seed, {"seed": seed, "budget": options.budget, "grid": MODEL.grid, "arms": {}})
        found["device"] = device_text(options.device, 1)
        found["arms"][arm] = run
        found["arms"] = {name: found["arms"][name] for name in ARMS if name in found["arms"]}
        if not options.quick:
            write_text(FOLDER / f"training-{seed}.json", json.dumps(found, indent=1) + "\n")
        last = run["points"][-1]
        accuracies = ", ".join(f"{point['accuracy']:.4f}" for point in run["points"])
        print(f"{arm}-{seed}: {accuracies} ({last['samples']:,} samples, {last['seconds']:.0f} s)", flush=True)
    print(table([("adaptive", row) for row in rows_of([results[seed] for seed in sorted(results)])]))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
