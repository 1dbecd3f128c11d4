"""How fair a measurement is after training under one strategy only, and after mixing again for a moment.

    python -m benchmarks.adaptive.fairness [--seeds 0 1 2] [--device cpu] [--quick]

From checkpoints of mixed runs (those of `benchmarks.adaptive.training`, which are made where they are missing) training
goes on mixed, under the reference alone, or under one accelerated strategy alone; from checkpoints of a run that had
that strategy from the start it is mixed for a moment. On the way every strategy is measured, with SUB_BATCHES
sub-batches, enough to tell by how much its gradient is aligned with the reference's, <E g, G> / |G|^2, and its score by
`descent`, both in the optimizer's metric. `results/fairness.json` keeps them. Checkpoints and cubes lie in
`build/adaptive/fairness`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adaptive.training import BUDGET, MODEL, WORK, run_arm
from benchmarks.arms import Setup
from benchmarks.branch import branch
from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope import ProfileOptions, open_cube, profile
from gradscope.checkpoints import list_steps, load_checkpoint
from gradscope.cube import profile_of
from gradscope.files import write_text
from gradscope.tasks import PretrainTask
from gradscope.trainer import load_run
from schedulers import Strategy
from schedulers.mixing import draw_from, mixture_by_budget

FILE = Path(__file__).parent / "results" / "fairness.json"
COMMAND = "python -m benchmarks.adaptive.fairness"
ALONE = Strategy(patch=7, dropout=0)
CHECKPOINTS = (1, 2)  # of the mixed run's: a quarter and half of its budget
STRETCHES = (3e3, 12e3)  # units trained on: 0.5 and 2 % of the budget
AGAIN = (1.5e3, 3e3, 6e3)  # units mixed after ALONE: 0.25, 0.5 and 1 % of the budget
SUB_BATCHES = 40


def measure(folder: Path, device: str, sub_batches: int) -> dict[str, Any]:
    """Alignment and score of every strategy at the one checkpoint in `folder`, and the reference's |G|^2."""
    cube = folder / "cube.nc"
    task = PretrainTask.from_folder(folder)
    options = ProfileOptions(samples=64 * sub_batches, allocation="fixed", seed=5)
    profile(task, folder, cube, options=options)
    found = profile_of(open_cube(cube).dataset, metric="optimizer")
    moments, names = found.moments, [str(s) for s in found.grid.strategies()]
    reference = names.index(str(found.grid.reference))
    length = float(moments.norm_sq_ref[0, reference])
    score = np.sign(moments.inner[0]) * moments.inner[0] ** 2
    score /= (moments.norm_sq[0] + found.cost / found.beta * moments.variance[0]) * length
    return {
        "alignment": dict(zip(names, (moments.inner[0] / length).round(4).tolist(), strict=True)),
        "descent": dict(zip(names, score.round(5).tolist(), strict=True)),
        "norm_sq_ref": length,
    }


def run_seed(seed: int, setup: Setup, sub_batches: int) -> list[dict[str, Any]]:
    """All measurements of a seed, as JSON values: `trained` tells how, `units` for how long."""
    for arm in ("mixed", "patch7"):
        run_arm(setup, arm, seed)
    setting, _, _ = load_run(list_steps(setup.path("mixed", seed))[0])
    strategies, reference = PretrainTask(setting).grid.strategies(), PretrainTask(setting).grid.reference
    mixed = mixture_by_budget([(s, 1 / len(strategies), setting.cost(s)) for s in strategies])
    ways: dict[str, Callable[[int], Strategy]] = {
        "mixed": lambda step: draw_from(mixed, seed=1, step=step),
        "reference alone": lambda step: reference,
        f"{ALONE} alone": lambda step: ALONE,
    }
    found = []
    for number in CHECKPOINTS:
        for arm, trained, way, stretches in (
            ("mixed", "mixed", "mixed", (0.0, *STRETCHES)),
            ("mixed", "mixed, then reference alone", "reference alone", STRETCHES),
            ("mixed", f"mixed, then {ALONE} alone", f"{ALONE} alone", STRETCHES),
            ("patch7", f"{ALONE} from the start", "mixed", (0.0,)),
            ("patch7", f"{ALONE} from the start, then mixed", "mixed", AGAIN),
        ):
            start = list_steps(setup.path(arm, seed))[number]
            fraction = load_checkpoint(start)["units"] / setup.budget
            base = setup.folder / "fairness" / f"{arm}-{seed}-{number}"
            folders = [base / f"{way} {units:g}".replace(" ", "-").replace(",", "-") for units in stretches]
            for units, path in zip(stretches, branch(start, ways[way], stretches, folders, setup.device), strict=True):
                here = {"seed": seed, "fraction": round(fraction, 3), "trained": trained, "units": units}
                found.append(here | measure(path.parent, setup.device, sub_batches))
                print(f"{here}: {found[-1]['alignment']}", flush=True)
    return found


def rows(file: Path = FILE) -> list[Row]:
    """Rows for `summary.json` from the result file, where it is there."""
    if not file.is_file():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    found = content["points"]
    made = []
    for way, units in sorted({(p["trained"], p["units"]) for p in found}, key=_order):
        here = [p for p in found if (p["trained"], p["units"]) == (way, units)]
        share = f"{way}, {units / content['budget']:.2%} of the budget" if units else f"{way}, as it is"
        for what, values in (
            ("alignment <E g, G> / |G|^2", [p["alignment"][str(ALONE)] for p in here]),
            ("descent over the reference's", [_relative(p) for p in here]),
        ):
            low, middle, high = min(values), statistics.median(values), max(values)
            claim = f"fairness: {what} of {ALONE} after {share} (median)"
            numbers = (round(v, 3) for v in (middle, low, high))
            value, low, high = numbers
            made.append(
                Row(claim, value, "ratio", low, high, "none; shown for comparison", True, content["device"],
                    content["date"], len(values), COMMAND)
            )  # fmt: skip
    return made


def _relative(point: dict[str, Any]) -> float:
    reference = next(iter(point["descent"].values()))
    return float(point["descent"][str(ALONE)] / reference)


def _order(key: tuple[str, float]) -> tuple[bool, int, str, float]:
    trained, units = key
    return trained.startswith(str(ALONE)), len(trained), trained, units


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one seed of few samples; writes no results")
    options = parser.parse_args()
    setup = Setup(MODEL, BUDGET, options.device, WORK, quiet=True)
    if options.quick:
        setup = Setup(MODEL, 6e3, options.device, WORK.parent / "adaptive-quick", quiet=True)
    seeds = options.seeds[:1] if options.quick else options.seeds
    points = [p for seed in seeds for p in run_seed(seed, setup, 4 if options.quick else SUB_BATCHES)]
    if not options.quick:
        content = {
            "budget": BUDGET, "sub_batches": SUB_BATCHES, "device": device_text(options.device, 1),
            "date": str(datetime.date.today()), "points": points,
        }  # fmt: skip
        write_text(FILE, json.dumps(content, indent=1) + "\n")
        print(table([("adaptive", row) for row in rows()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
