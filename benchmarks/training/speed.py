"""Does wall-clock time follow tokens: the speed-up of whole training steps over what the cost formula promises.

    python -m benchmarks.training.speed [--device cuda] [--threads 1] [--clock processor] [--quick] [--again]

A step is the trainer's own (momentum update, loss, backward, AdamW; MoCo-v3's published heads), on random images. In
every round each strategy takes one step, so that what else the machine does hits all of them; of the rounds after the
first the median is taken, and quartiles. Ideal is the ratio of costs in units. `--clock processor` counts the
processor time of the process, for a machine that is busy with other work (with `--threads 1`). A case that is in
`results/speed-<device>.json` is not run again without `--again`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.summary import Row
from benchmarks.training.cases import (
    CLOCKS,
    FOLDER,
    Case,
    new_parser,
    new_stepper,
    random_views,
    run_cases,
    synchronize,
)
from schedulers import Strategy

COMMAND = "python -m benchmarks.training.speed"
AIM = 0.85
PAPER = ("patch=16,dropout=0.5", "patch=30,dropout=0", "patch=30,dropout=0.5", "patch=48,dropout=0.5")
DEMO = tuple(f"patch={p},dropout={d}" for p in (2, 4, 7) for d in (0, 0.25, 0.5) if (p, d) != (2, 0))
CASES = {
    "cpu": {
        "demo-28": Case("demo", 28, 2, 64, DEMO, repeats=9),
        "tiny-240": Case("tiny", 240, 16, 32, PAPER, repeats=3),
        "small-240": Case("small", 240, 16, 16, PAPER, repeats=2),
    },
    "cuda": {
        "demo-28": Case("demo", 28, 2, 512, DEMO, repeats=20),
        "small-240": Case("small", 240, 16, 256, PAPER, repeats=20, precision="bf16"),
        "base-240": Case("base", 240, 16, 256, PAPER, repeats=20, precision="bf16"),
    },
}
QUICK = {"demo-28-quick": Case("demo", 28, 2, 16, DEMO[3:5], repeats=2)}


def measure(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step under every strategy of the case: median and quartiles, and samples per second."""
    device, clock, compiled = torch.device(options.device), options.clock, options.compiled
    strategies = [case.reference, *(Strategy.parse(text) for text in case.strategies)]
    stepper, views, now = new_stepper(case, device, compiled=compiled), random_views(case, device), CLOCKS[clock]
    stepper.start(strategies)
    seconds: dict[str, list[float]] = {str(s): [] for s in strategies}
    step = 0
    for _ in range(case.repeats + 1):
        for strategy in strategies:
            synchronize(device)
            begun = now()
            stepper.step(step, 0.25, strategy, views)
            synchronize(device)
            seconds[str(strategy)].append(now() - begun)
            step += 1
    cost = {str(s): stepper.model.cost(s) for s in strategies}
    reference = str(case.reference)
    found = {}
    for text, times in seconds.items():
        low, middle, high = np.quantile(times[1:], (0.25, 0.5, 0.75))
        ratios = [a / b for a, b in zip(seconds[reference][1:], times[1:], strict=True)]  # within each round
        ideal = cost[reference] / cost[text]
        share = [ratio / ideal for ratio in ratios]
        found[text] = {
            "cost": cost[text], "seconds": middle, "seconds_quartiles": [low, high],
            "samples_per_second": case.batch_size / middle, "speed_up": float(np.median(ratios)), "ideal": ideal,
            "share": float(np.median(share)), "share_range": [min(share), max(share)],
        }  # fmt: skip
    return {"title": case.title, "repeats": case.repeats, "clock": clock, "strategies": found}


def rows(folder: Path = FOLDER) -> list[Row]:
    """Rows for `summary.json`: the share of the ideal speed-up of every strategy of every case."""
    made = []
    for path in sorted(folder.glob("speed-*.json")):
        results: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for case in results["cases"].values():
            for name, one in list(case["strategies"].items())[1:]:
                made.append(
                    Row(
                        claim=f"{case['title']}: speed-up of a step under {name}, {one['speed_up']:.2f}, over the "
                        f"formula's {one['ideal']:.2f}",
                        value=one["share"],
                        unit="of ideal",
                        low=one["share_range"][0],
                        high=one["share_range"][1],
                        aim=f"at least {AIM}",
                        holds=one["share"] >= AIM,
                        device=results["device"],
                        date=results["date"],
                        runs=case["repeats"],
                        command=COMMAND,
                    )
                )
    return made


def main() -> None:
    parser = new_parser(__doc__.partition("\n")[0])
    parser.add_argument("--compile", action="store_true", dest="compiled")
    options = parser.parse_args()
    run_cases("speed-compiled" if options.compiled else "speed", options, CASES, QUICK, measure, rows)


if __name__ == "__main__":
    main()
