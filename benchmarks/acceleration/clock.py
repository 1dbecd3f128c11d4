"""Seconds of a training step under every strategy of a case, so that budgets can be told in time as well.

    python -m benchmarks.acceleration.clock [--cases mocov3 simclr dino] [--device cpu] [--quick]

Whole steps of the trainer (augmentation, momentum update, loss, backward, AdamW) from the last checkpoint of the run
without acceleration, seed 0, on one thread; on a CPU by processor time. In every round each strategy takes one step, so
that what else the machine does hits all of them; medians. `results/clock-<case>.json` keeps it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.acceleration.cases import CASES, cases_for
from benchmarks.acceleration.runs import FOLDER, WORK, Plan
from benchmarks.machine import device_text
from gradscope.checkpoints import list_steps
from gradscope.engines import derive_seed
from gradscope.files import write_text
from gradscope.stepper import Stepper
from gradscope.trainer import load_run

ROUNDS = 15


def read_seconds(case: str, folder: Path = FOLDER) -> dict[str, float]:
    """Seconds per sample by strategy; empty where they were not measured."""
    path = folder / f"clock-{case}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))["seconds"]) if path.is_file() else {}


def seconds_of(run: Mapping[str, Any], seconds: Mapping[str, float]) -> float:
    """How long a run takes: its steps, by the share of each strategy in them, and its probes."""
    per_sample = sum(share * seconds[strategy] for strategy, share in run["shares"].items())
    return float(run["points"][-1]["samples"] * per_sample + run.get("probe_seconds", 0.0))


def measure(checkpoint: Path, device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds per sample of a step under every strategy of a run's grid."""
    setting, model, _ = load_run(checkpoint)
    config, strategies = setting.config, list(setting.config.grid(setting.image_size).strategies())
    stepper = Stepper(setting, model.to(device), device=device)
    now = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {str(strategy): [] for strategy in strategies}
    for number in range(rounds + 1):
        for strategy in strategies:
            _wait(device)
            begun = now()
            generator = torch.Generator().manual_seed(derive_seed("views", config.seed, number))
            views = setting.views(torch.arange(config.batch_size), generator, device)
            stepper.step(number, 0.5, strategy, views)
            _wait(device)
            seconds[str(strategy)].append((now() - begun) / config.batch_size)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default all for the device")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="one round of the quick runs; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.cases or cases_for(options.device):
        folder = WORK / "quick" / name if options.quick else WORK / name
        budget = 4e3 if options.quick else CASES[name].budgets[-1]
        run = Plan(CASES[name], options.device, folder, quiet=True).setup(budget).path("none", 0)
        if not run.is_dir() or not list_steps(run):
            print(f"{name}: no run without acceleration yet; `python -m benchmarks.acceleration.runs --cases {name}`")
            continue
        seconds = measure(list_steps(run)[-1], torch.device(options.device), 1 if options.quick else ROUNDS)
        found = {
            "case": name, "seconds": seconds, "rounds": ROUNDS, "device": device_text(options.device, 1),
            "date": str(datetime.date.today()),
        }  # fmt: skip
        print(json.dumps(found, indent=1), flush=True)
        if not options.quick:
            write_text(FOLDER / f"clock-{name}.json", json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
