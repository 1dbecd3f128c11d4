"""The whole loop on real images, small: pilot, profile, schedule, training on it, report.

Every part leaves its result in the output folder and is skipped or continued when it is already there.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from gradscope.config import TrainConfig, open_setting
from gradscope.cube import FAILED, profile_of
from gradscope.files import write_text
from gradscope.profile_options import ProfileOptions
from gradscope.profiler import profile
from gradscope.progress import Progress
from gradscope.report import write_report
from gradscope.runlog import read_log
from gradscope.tasks import PretrainTask
from gradscope.trainer import TrainResult, train
from schedulers import (
    Schedule,
    constant_schedule,
    format_count,
    load_schedule,
    mixed_schedule,
    optimize,
    save_schedule,
)
from schedulers.uncertainty import DRAWS

BUDGET = 120e3
SAMPLES = 1024  # most per cell of the profile
PILOT, PLAIN, OPTIMIZED = "ckpt_dir", "none", "optimized"
KEPT = "demo-schedule.json"


@dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table."""

    run: str
    budget: float
    samples: int
    seconds: float
    knn_accuracy: float


@dataclass(frozen=True)
class DemoResult:
    """The table, what the profile cost in units, how many of its cells failed, and where the report lies."""

    rows: tuple[DemoRow, ...]
    profile_units: float
    failed_cells: int
    report: Path

    def facts(self) -> dict[str, Any]:
        return {
            "rows": [asdict(row) for row in self.rows],
            "profile_units": self.profile_units,
            "failed_cells": self.failed_cells,
            "report": str(self.report),
        }

    def lines(self) -> list[str]:
        lines = [f"{'run':<20}{'budget':>10}{'samples':>11}{'seconds':>9}{'kNN accuracy':>14}"]
        for row in self.rows:
            lines.append(
                f"{row.run:<20}{format_count(row.budget):>10}{row.samples:>11,}{row.seconds:>9.0f}{row.knn_accuracy:>14.1%}"
            )
        folder = self.report.parent
        if self.failed_cells:
            lines.append(f"{self.failed_cells} cells of the profile failed: see the report's provenance")
        return [
            *lines,
            f"the profile cost {format_count(self.profile_units)} units; one seed is an anecdote: the "
            "README has several",
            f"report: {self.report}",
            f"try, in {folder}: gradscope optimize --budget 240K && gradscope plot; for a finer profile, gradscope "
            f"profile {PILOT} --dry-run says what it costs",
        ]


def demo_config(budget: float, data: str, seed: int) -> TrainConfig:
    """The demo's configuration: 28-pixel images at base patch 2, so that the reference has 196 tokens."""
    return TrainConfig(budget=budget, data=data, seed=seed, evaluations=(0.5, 1.0))


def run_demo(
    out: Path,
    *,
    budget: float = BUDGET,
    data: str,
    data_folder: Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    device: torch.device | None = None,
) -> DemoResult:
    """Run or continue the demo in `out`. Raises what its parts raise; finished parts stay."""
    config = demo_config(budget, data, seed)
    setting = open_setting(config, data_folder)
    strategies = config.grid(setting.image_size).strategies()

    def trained(name: str, title: str, schedule: Any) -> TrainResult:
        with Progress(title, quiet=quiet) as progress:
            return train(setting, schedule, out / name, device=device, report=progress.update)

    mixed = mixed_schedule(strategies, [setting.cost(s) for s in strategies])
    reference = constant_schedule(config.reference, setting.cost(config.reference))
    pilot = trained(PILOT, "1/4 pilot", mixed)
    with Progress("2/4 profile", quiet=quiet) as progress:
        tree, _ = profile(
            PretrainTask(setting, device=device),
            out / PILOT,
            out / "cube.nc",
            options=ProfileOptions(samples=SAMPLES),
            report=progress.update,
        )
    schedule = _schedule(tree, budget, out)
    optimized = trained(OPTIMIZED, "3/4 optimized", schedule)
    plain = trained(PLAIN, "4/4 none", reference)

    results = {"no acceleration": plain, "mixed pilot": pilot, "optimized schedule": optimized}
    rows = tuple(DemoRow(name, budget, r.samples, r.seconds, _known(r.accuracy)) for name, r in results.items())
    failed = int((tree["status"] == FAILED).sum())
    result = DemoResult(rows, float(tree.attrs["units"]), failed, out / "report.html")
    write_report(
        result.report,
        cube=tree,
        schedule=schedule,
        runs={name: read_log(r.out) for name, r in results.items()},
        followed={"mixed pilot": mixed, "optimized schedule": schedule, "no acceleration": reference},
        title="gradscope demo: MoCo-v3 on Fashion-MNIST",
    )
    write_text(out / "results.json", json.dumps(result.facts(), indent=2) + "\n")
    return result


def _schedule(tree: xr.DataTree, budget: float, out: Path) -> Schedule:
    """The schedule that the demo trains with: found once, so that whatever is tried in its folder changes no run."""
    kept, shown = out / KEPT, out / "schedule.json"
    if kept.is_file() and (found := load_schedule(kept)).budget == budget:
        return found
    schedule = optimize(profile_of(tree.dataset), budget, draws=DRAWS)
    for path in (kept, shown):
        save_schedule(schedule, path)
    return schedule


def _known(accuracy: float | None) -> float:
    assert accuracy is not None, "demo_config evaluates at the end"
    return accuracy
