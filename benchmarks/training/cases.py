"""Training steps on random numbers in place of images: what a step costs, whatever it learns."""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.config import Setting, TrainConfig
from gradscope.files import write_text
from gradscope.stepper import Stepper
from gradscope.timing import SyntheticTask
from schedulers import Grid, Strategy

FOLDER = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Measure = Callable[[str, "Case", argparse.Namespace], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model (a name of VIT_SIZES), its images and base patch, the strategies besides the reference, the batch."""

    model: str
    image_size: int
    patch: int
    batch_size: int
    strategies: tuple[str, ...]
    repeats: int
    precision: str = "float32"

    @property
    def reference(self) -> Strategy:
        return Strategy(patch=self.patch, dropout=0)

    @property
    def tokens(self) -> int:
        """Length of the reference's sequence, class token included."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def title(self) -> str:
        name = {"demo": "the demo's ViT", "tiny": "ViT-Ti", "small": "ViT-S", "base": "ViT-B"}[self.model]
        return f"{name}, {self.tokens} tokens, batch {self.batch_size}, {self.precision}"


def new_setting(case: Case, **changes: Any) -> Setting:
    """The published MoCo-v3 recipe for the case's model, on images that are random numbers."""
    grid = Grid({"patch": (case.patch,), "dropout": (0,)}, case.reference)
    blank = SyntheticTask(grid, model=case.model, image_size=case.image_size, batch_size=case.batch_size).setting
    config = TrainConfig.for_run(
        "mocov3", case.model, budget=1e12, patch=case.patch, patches=(case.patch,), batch_size=case.batch_size,
        precision=case.precision, warmup=0.5, **changes,
    )  # fmt: skip
    return Setting(config, blank.data, blank.augmentations)


def new_stepper(case: Case, device: torch.device, *, compiled: bool = False) -> Stepper:
    setting = new_setting(case)
    return Stepper(setting, setting.new_model().to(device).train(), device=device, compiled=compiled)


def random_views(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, 3, case.image_size, case.image_size)
    first, second = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    return first, second


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def new_parser(description: str) -> argparse.ArgumentParser:
    """Options that the parts of this benchmark share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor", help="on a GPU always the wall's")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--quick", action="store_true", help="one small case; writes nothing")
    parser.add_argument("--again", action="store_true", help="also what is already measured")
    return parser


def run_cases(
    name: str,
    options: argparse.Namespace,
    cases: Mapping[str, Mapping[str, Case]],
    quick: Mapping[str, Case],
    measure: Measure,
    rows: Callable[[], Sequence[Row]],
) -> None:
    """Measure what is missing in `results/<name>-<device>.json`, case by case, and print the rows of all results."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        options.clock = "wall"
    chosen, path = quick if options.quick else cases[device.type], FOLDER / f"{name}-{device.type}.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    for case in options.cases or chosen:
        if case in results["cases"] and not options.again:
            continue
        found = measure(case, chosen[case], options)
        print(json.dumps(found, indent=1), flush=True)
        if not options.quick:
            results |= {"device": device_text(options.device, options.threads), "date": str(datetime.date.today())}
            results["cases"][case] = found
            write_text(path, json.dumps(results, indent=1) + "\n")
    print(table([("training", row) for row in rows()]))
