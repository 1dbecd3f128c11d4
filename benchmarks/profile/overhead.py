"""Time and memory of a profile over the bare passes that it consists of.

    python -m benchmarks.profile.overhead [--device cuda] [--threads 2] [--cases demo tiny] [--quick] [--again]
                                          [--clock processor]

A profile of one checkpoint (every strategy of a small grid, whole sub-batches, both metrics) is run by
`gradscope.profile`. After each sub-batch its clock stands still while the same passes are run bare: the same
losses on the same model, views, masks and device, differentiated by `torch.autograd.grad`, nothing else. So the
two alternate within seconds. The profile's time is everything from its start to its written file: loading,
checking, passes, statistics, estimates. The demo's views are augmented in the profile's time; those of the
larger models are random numbers made beforehand. `--clock processor` counts the processor time of the process
instead of the time on the wall, for a machine that is busy with other work (with `--threads 1`: waiting threads spin).

Peak memory is that of a fresh process, above what it takes with the libraries loaded: the profile's over that of
plain training (the reference's loss, backward, AdamW) with the same model and batch. A case that is in
`results/overhead.json` is not run again without `--again`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.config import Setting, TrainConfig, open_setting
from gradscope.data import ImageData, image_data
from gradscope.files import write_text
from gradscope.profiler import ProfileOptions, profile
from gradscope.task import Checkpoint, numbered_checkpoints
from gradscope.tasks import PretrainTask
from gradscope.untouched import buffer_guard
from schedulers import Strategy

RESULTS = Path(__file__).parent / "results" / "overhead.json"
COMMAND = "python -m benchmarks.profile.overhead"
TIME_AIM = {"cpu": 1.10, "cuda": 1.05}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Case:
    """A model (a name of VIT_SIZES), its images, the grid, K, and the sub-batches that are measured."""

    model: str
    image_size: int
    patches: tuple[int, ...]
    dropouts: tuple[float, ...]
    batch_size: int
    blocks: int

    @property
    def title(self) -> str:
        names = {"demo": "the demo's ViT", "tiny": "ViT-Ti", "small": "ViT-S", "base": "ViT-B"}
        return f"{names[self.model]}, {(self.image_size // self.patches[0]) ** 2 + 1} tokens, K={self.batch_size}"


CASES = {
    "demo": Case("demo", 28, (2, 4, 7), (0, 0.25, 0.5), batch_size=64, blocks=32),
    "tiny": Case("tiny", 224, (16, 32), (0, 0.5), batch_size=64, blocks=4),
    "small": Case("small", 224, (16, 32), (0, 0.5), batch_size=64, blocks=3),
    "base": Case("base", 224, (16, 32), (0, 0.5), batch_size=64, blocks=4),
}
QUICK = {"demo": Case("demo", 28, (4, 7), (0, 0.5), batch_size=16, blocks=3)}
ON_CPU = ("demo", "tiny", "small")


@dataclass
class _Pass:
    """One call of the loss: what is needed to run it again."""

    batch: tuple[Tensor, ...]
    strategy: Strategy
    seed: int


class RecordingTask(PretrainTask):
    """MoCo-v3 with random weights; notes every loss that the profiler asks for."""

    def __init__(self, case: Case, setting: Setting, device: torch.device, clock: str) -> None:
        super().__init__(setting, device=device)
        self.case, self.clock = case, CLOCKS[clock]
        self.passes: list[_Pass] = []
        self.model: nn.Module | None = None

    def load(self, checkpoint: Path) -> nn.Module:
        self.model = self.setting.new_model().to(self.device).train()
        return self.model

    def sub_batches(self, size: int, seed: int, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, ...]]:
        if self.case.model == "demo":
            yield from super().sub_batches(size, seed, first, every)
        generator = torch.Generator().manual_seed(seed)
        shape = (2, size, 3, self.case.image_size, self.case.image_size)
        views = torch.randn(shape, generator=generator).to(self.device)
        while True:  # the same numbers, but other tensors: a new batch to whoever keeps something of the last one
            yield views[0].view_as(views[0]), views[1].view_as(views[1])

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, ...], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        self.passes.append(_Pass(batch, strategy, generator.initial_seed()))
        return super().loss(model, batch, strategy, generator)

    def checkpoints(self, folder: Path) -> list[Checkpoint]:
        return numbered_checkpoints(folder)

    def training(self, folder: Path) -> dict[str, Any]:
        return {}

    def second_moment(self, checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
        return {name: torch.full_like(p, 1e-6) for name, p in model.named_parameters() if p.requires_grad}

    def run_bare(self, passes: list[_Pass]) -> float:
        """Seconds of the bare forward and backward passes; the model's buffers are put back outside the clock."""
        assert self.model is not None
        model, restore, batch, fresh = self.model, buffer_guard(self.model), None, ()
        trainable = [p for p in model.parameters() if p.requires_grad]
        seconds = 0.0
        for one in passes:
            if one.batch is not batch:
                batch, fresh = one.batch, tuple(view.view_as(view) for view in one.batch)
            start = self.now()
            loss = super().loss(model, fresh, one.strategy, torch.Generator().manual_seed(one.seed))
            torch.autograd.grad(loss, trainable, allow_unused=True)
            del loss
            seconds += self.now() - start
            restore()
        return seconds

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


def open_task(case: Case, device: torch.device, clock: str = "wall") -> RecordingTask:
    """The case's task; images of other sizes than the demo's are a stand-in, for the views are not made of them."""
    config = TrainConfig.for_run(
        "mocov3", case.model, budget=1e6, patch=case.patches[0], patches=case.patches, dropouts=case.dropouts,
        batch_size=case.batch_size,
    )  # fmt: skip
    if case.model == "demo":
        return RecordingTask(case, open_setting(config), device, clock)
    return RecordingTask(case, Setting(config, _blank(case), ()), device, clock)


def _blank(case: Case) -> ImageData:
    images = torch.zeros(case.batch_size, 3, case.image_size, case.image_size, dtype=torch.uint8)
    images[0] = 1
    labels = torch.arange(case.batch_size) % 2
    return image_data(
        "blank", train_images=images, train_labels=labels, test_images=images[:2], test_labels=labels[:2],
        classes=("a", "b"),
    )  # fmt: skip


def options_of(case: Case) -> ProfileOptions:
    samples = case.blocks * case.batch_size
    return ProfileOptions(samples=samples, allocation="fixed", estimator="subbatch", group_size=100)


def measure_time(case: Case, device: torch.device, folder: Path, clock: str = "wall") -> dict[str, Any]:
    """Seconds of a profile and of its passes bare, in total and per sub-batch."""
    task = open_task(case, device, clock)
    (folder / "step-1.pt").write_bytes(b"1")
    warm_up = open_task(case, device)
    batch = next(warm_up.batches(case.batch_size, 1))
    warm_up.load(folder / "step-1.pt")
    warm_up.run_bare([_Pass(batch, strategy, 0) for strategy in task.grid.strategies()])
    del warm_up, batch
    stretches: list[tuple[float, float, int]] = []
    began = task.now()

    def pause(fraction: float = 0.0, text: str = "") -> None:
        nonlocal began
        profiled = task.now() - began
        passes, task.passes = task.passes, []
        stretches.append((profiled, task.run_bare(passes) if passes else 0.0, len(passes)))
        began = task.now()

    profile(task, folder, folder / "cube.nc", options=options_of(case), report=pause)
    pause()
    profiled, bare, counts = (list(values) for values in zip(*stretches, strict=True))
    inner = range(1, len(stretches) - 1)  # without what comes before the first sub-batch and after the last one
    return {
        "clock": clock,
        "blocks": case.blocks,
        "passes": sum(counts),
        "seconds": sum(profiled),
        "bare_seconds": sum(bare),
        "ratio": sum(profiled) / sum(bare),
        "ratio_per_block": [profiled[i] / bare[i] for i in inner],
        "block_seconds": statistics.median(profiled[i] for i in inner),
        "bare_block_seconds": statistics.median(bare[i] for i in inner),
        "before_seconds": profiled[0] - bare[0],
        "after_seconds": profiled[-1] - bare[-1] - statistics.median(profiled[i] - bare[i] for i in inner),
        "parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad) if task.model else 0,
    }


def peak_of(what: str, case: Case, device: torch.device, folder: Path) -> int:
    """Bytes that this process, a fresh one, takes at most for `what`: `profile` or `training`."""
    base = _peak_resident()
    task = open_task(case, device)
    (folder / "step-1.pt").write_bytes(b"1")
    if what == "profile":
        profile(task, folder, folder / "cube.nc", options=options_of(case))
    else:
        model = task.load(folder / "step-1.pt")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _, batch in zip(range(2), task.batches(case.batch_size, 0), strict=False):
            optimizer.zero_grad()
            super(RecordingTask, task).loss(model, batch, task.grid.reference, torch.Generator()).backward()
            optimizer.step()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident() - base


def _peak_resident() -> int:
    """Bytes of memory that this process had at most; ru_maxrss, where there is no /proc, may be the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory(name: str, options: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of profile and plain training, each in a process of its own."""
    found = {}
    for what in ("training", "profile"):
        command = [sys.executable, "-m", "benchmarks.profile.overhead", "--peak", what, "--cases", name]
        command += ["--device", options.device, "--threads", str(options.threads), *["--quick"] * options.quick]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"{what}_bytes"] = int(done.stdout.split()[-1])
    return found


def rows(results: dict[str, Any]) -> list[Row]:
    """The claims that `results/overhead.json` bears out or not."""
    found = []
    for key, entry in results.items():
        case, device = CASES[key.split(":")[1]], key.split(":")[0]
        clock, ratio, each = (entry["time"][name] for name in ("clock", "ratio", "ratio_per_block"))
        command = COMMAND + f" --device {device} --threads {entry['threads']} --clock {clock}"
        common, aim = (entry["device"], entry["date"], 1, command), TIME_AIM[device]
        low, high = min(ratio, *each), max(ratio, *each)
        claim = f"overhead: time of a profile over its bare passes, {case.title}"
        found.append(
            Row(claim, round(ratio, 3), f"x of {clock} time (interval: single sub-batches)", round(low, 3),
                round(high, 3), f"at most {aim:.2f}", ratio <= aim, *common)
        )  # fmt: skip
        memory = entry["memory"]["profile_bytes"] / entry["memory"]["training_bytes"]
        claim = f"overhead: peak memory of a profile over plain training, {case.title}"
        found.append(Row(claim, round(memory, 3), "x", None, None, "none; stated", True, *common))
    return found


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not in the results yet; each case is written as soon as it is there."""
    cases, results = QUICK if options.quick else CASES, {} if options.quick else read_results()
    kind, device = options.device.split(":")[0], torch.device(options.device)
    for name in options.cases or (list(QUICK) if options.quick else CASES if kind == "cuda" else ON_CPU):
        key = f"{kind}:{name}"
        if key in results and not options.again:
            continue
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            measured = measure_time(cases[name], device, Path(folder), options.clock)
        results[key] = {
            "time": measured,
            "memory": measure_memory(name, options),
            "device": device_text(options.device, options.threads),
            "date": datetime.date.today().isoformat(),
            "threads": options.threads,
            "torch": str(torch.__version__),
            "load_average_before": round(load, 2),
        }
        if not options.quick:
            RESULTS.parent.mkdir(exist_ok=True)
            write_text(RESULTS, json.dumps(results, indent=2) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a profile over its bare passes.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), help="default: all that suit the device")
    parser.add_argument("--quick", action="store_true", help="a tiny case; writes nothing")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--peak", choices=("profile", "training"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        cases = QUICK if options.quick else CASES
        with tempfile.TemporaryDirectory() as folder:
            print(peak_of(options.peak, cases[options.cases[0]], torch.device(options.device), Path(folder)))
        return
    results = run(options)
    print(json.dumps(results, indent=2) if options.quick else table([("profile", row) for row in rows(results)]))


if __name__ == "__main__":
    main()
