"""Seconds of a training step under every strategy of a case, so that budgets can be told in time as well.

    python -m benchmarks.acceleration.clock [--cases mocov3 simclr dino] [--device cpu]

`gradscope cost` on the last checkpoint of the unaccelerated run at the largest budget of seed 0, one thread: rounds in
which every strategy takes one step, so that what else the machine does hits all of them; medians. Runs side by side on
a busy machine take longer than that, all of them. `results/clock-<case>.json` keeps it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.acceleration.cases import CASES, cases_for
from benchmarks.acceleration.runs import FOLDER, WORK, Plan
from gradscope.files import write_text
from schedulers import Strategy

REPEATS = 15


def read_seconds(case: str, folder: Path = FOLDER) -> dict[str, float]:
    """Seconds per sample by strategy; empty where they were not measured."""
    path = folder / f"clock-{case}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.is_file() else {}


def seconds_of(run: Mapping[str, Any], seconds: Mapping[str, float]) -> float:
    """How long the steps of a run take on an idle machine, by the share of each strategy in them."""
    per_sample = sum(share * seconds[strategy] for strategy, share in run["shares"].items())
    return float(run["points"][-1]["samples"] * per_sample)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default all for the device")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="one round; writes nothing")
    options = parser.parse_args()
    for name in options.cases or cases_for(options.device):
        case = CASES[name]
        setup = Plan(case, options.device, WORK / name, quiet=True).setup(case.budgets[-1])
        text = setup.gradscope(
            "cost", str(setup.path("none", 0)), "--repeats", str(1 if options.quick else REPEATS), "--json",
            "--device", options.device,
        )  # fmt: skip
        told = json.loads(text)
        strategies = {str(Strategy(patch=row["patch"], dropout=row["dropout"])): row for row in told["rows"]}
        found = {
            "case": name, "about": told["measured"], "seconds": {s: row["seconds"] for s, row in strategies.items()},
            "units": {s: row["cost"]["tokens"] for s, row in strategies.items()},
        }  # fmt: skip
        print(json.dumps(found, indent=1), flush=True)
        if not options.quick:
            write_text(FOLDER / f"clock-{name}.json", json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
