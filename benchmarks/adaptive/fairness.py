"""How fair a measurement is after training under one strategy only, and after mixing again for a moment.

    python -m benchmarks.adaptive.fairness [--seeds 0 1 2] [--device cpu] [--quick]

From checkpoints of mixed runs (those of `benchmarks.adaptive.training`, which are made where they are missing) training
goes on in three ways: mixed, under the reference alone, and under one accelerated strategy alone; of the latter, it is
then mixed again. On the way every strategy is measured, with SUB_BATCHES sub-batches, enough to tell by how much its
gradient is aligned with the reference's, <E g, G> / |G|^2, and its score by `descent`, both in the optimizer's metric.
`results/fairness.json` keeps them. Checkpoints and cubes lie in `build/adaptive/fairness`.
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

from benchmarks.adaptive.training import BUDGET, WORK, Setup, run_arm
from benchmarks.branch import branch
from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope import ProfileOptions, open_cube, profile
from gradscope.checkpoints import list_steps
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
AGAIN = (1.5e3, 3e3, 6e3)  # units mixed after the longest stretch of ALONE
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
    run_arm(setup, "mixed", seed)
    found = []
    for number in CHECKPOINTS:
        start = list_steps(setup.path("mixed", seed))[number]
        setting, _, content = load_run(start)
        strategies = PretrainTask(setting).grid.strategies()
        mixed = mixture_by_budget([(s, 1 / len(strategies), setting.cost(s)) for s in strategies])
        reference = PretrainTask(setting).grid.reference
        ways: dict[str, Callable[[int], Strategy]] = {
            "mixed": lambda step, m=mixed: draw_from(m, seed=1, step=step),  # type: ignore[misc]
            "reference alone": lambda step, r=reference: r,  # type: ignore[misc]
            f"{ALONE} alone": lambda step: ALONE,
        }
        base = setup.folder / "fairness" / f"{seed}-{number}"

        def along(way: str, source: Path, units: tuple[float, ...], base: Path = base, ways: Any = ways) -> list[Path]:
            folders = [base / f"{way} {u:g}".replace(" ", "-").replace(",", "-") for u in units]
            return branch(source, ways[way.removesuffix(" again")], units, folders, setup.device)

        paths = {("mixed", 0.0): along("mixed", start, (0.0,))[0]}
        for way in ways:
            paths |= {(way, u): p for u, p in zip(STRETCHES, along(way, start, STRETCHES), strict=True)}
        # `ways` are asked by step, so that mixing again draws other strategies than before
        again = along("mixed again", paths[f"{ALONE} alone", STRETCHES[-1]], AGAIN)
        paths |= {("mixed again", u): p for u, p in zip(AGAIN, again, strict=True)}
        fraction = content["units"] / setting.config.budget
        for (way, units), path in paths.items():
            here = {"seed": seed, "fraction": round(fraction, 3), "trained": way, "units": units}
            found.append(here | measure(path.parent, setup.device, sub_batches))
            print(f"seed {seed} at {fraction:.2f}, {way} {units:,.0f} units: {found[-1]['alignment']}", flush=True)
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
        share = f"{way}, {units / content['budget']:.2%} of the budget" if units else "mixed run, as it is"
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


def _order(key: tuple[str, float]) -> tuple[int, float]:
    ways = ["mixed", f"{ALONE} alone", "mixed again", "reference alone"]
    return ways.index(key[0]), key[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one seed of few samples; writes no results")
    options = parser.parse_args()
    setup = Setup(BUDGET, options.device, WORK, samples=0, quiet=True)
    if options.quick:
        setup = Setup(6e3, options.device, WORK.parent / "adaptive-quick", samples=0, quiet=True)
    seeds = options.seeds[:1] if options.quick else options.seeds
    points = [p for seed in seeds for p in run_seed(seed, setup, 4 if options.quick else SUB_BATCHES)]
    if not options.quick:
        content = {
            "budget": BUDGET, "sub_batches": SUB_BATCHES, "device": device_text(options.device),
            "date": str(datetime.date.today()), "points": points,
        }  # fmt: skip
        write_text(FILE, json.dumps(content, indent=1) + "\n")
        print(table([("adaptive", row) for row in rows()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
