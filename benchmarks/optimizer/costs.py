"""Where costs that are linear in tokens fail: measured time and FLOPs of training steps over token counts.

    python -m benchmarks.optimizer.costs [--device cuda] [--threads 1] [--clock processor] [--quick] [--again]

A MoCo-v3 step (zero_grad, loss, backward, AdamW) of ViT-Ti and ViT-S on random images, at four lengths of the
reference's sequence, under the reference, token dropout, a larger patch (2 or 3 times the side), and both. The ratio
of a strategy's cost by time to its cost by token counts is 1 where cost is linear in tokens.

All times are those of a batch of 64. A slow device measures two small batches instead and extends the lines through
them, T(b) = fixed + b · per sample, whose fixed part all strategies share: per sample + fixed / 64. `--clock
processor` counts the processor time of the process, for a machine that is busy with other work (with `--threads 1`:
waiting threads spin). A case that is in `results/costs-<device>.json` is not run again without `--again`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.files import write_text
from gradscope.timing import SyntheticTask, measure_costs
from schedulers import Grid, Strategy

FOLDER = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.optimizer.costs"
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
DROPOUTS = (0, 0.5, 0.75)
NAMES = {"demo": "the demo's ViT", "tiny": "ViT-Ti", "small": "ViT-S"}
BATCH = 64  # of which all times are
AIM = 0.1  # linear costs are good to this share


@dataclass(frozen=True)
class Case:
    """A model (a name of VIT_SIZES), its images, the base and a larger patch, the batches and rounds to time."""

    model: str
    image_size: int
    patch: int
    large_patch: int
    batch_sizes: tuple[int, ...]
    repeats: int

    @property
    def tokens(self) -> int:
        """Length of the reference's sequence, class token included."""
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def title(self) -> str:
        return f"{NAMES[self.model]}, {self.tokens} tokens of {self.patch} pixels"

    def grid(self) -> Grid:
        axes = {"patch": (self.patch, self.large_patch), "dropout": DROPOUTS}
        return Grid(axes, Strategy(patch=self.patch, dropout=0))


CASES = {
    "tiny-28": Case("tiny", 28, 2, 4, batch_sizes=(2, 8), repeats=3),
    "tiny-120": Case("tiny", 120, 8, 24, batch_sizes=(2, 8), repeats=3),
    "tiny-240": Case("tiny", 240, 16, 48, batch_sizes=(2, 8), repeats=3),
    "tiny-480": Case("tiny", 480, 16, 48, batch_sizes=(2, 12), repeats=2),
    "small-28": Case("small", 28, 2, 4, batch_sizes=(2, 6), repeats=2),
    "small-120": Case("small", 120, 8, 24, batch_sizes=(2, 6), repeats=2),
    "small-240": Case("small", 240, 16, 48, batch_sizes=(2, 6), repeats=2),
    "small-480": Case("small", 480, 16, 48, batch_sizes=(2, 6), repeats=1),
}
QUICK = {"demo-28": Case("demo", 28, 2, 4, batch_sizes=(2, 8), repeats=1)}


def measure(case: Case, device: torch.device, clock: str) -> dict[str, Any]:
    """Costs of every strategy of the case, and the conditions."""
    grid = case.grid()
    task = SyntheticTask(grid, model=case.model, image_size=case.image_size, batch_size=BATCH, device=device)
    model = task.load()
    found = [
        measure_costs(task, model, grid.strategies(), batch_size=size, repeats=case.repeats, clock=CLOCKS[clock])
        for size in case.batch_sizes
    ]
    flops = found[-1].units(task.cost(grid.reference), "flops")
    strategies = {
        str(s): {
            "tokens_query": task.tokens(s)["query"],
            "tokens_key": task.tokens(s)["key"],
            "cost": task.cost(s),
            "flops_over_tokens": round(flops[s] / task.cost(s), 4),
            "flops": found[-1][s].flops,
            "memory": found[-1][s].memory,
            "measured": {str(one.batch_size): one[s].seconds for one in found},
            "spread": {str(one.batch_size): round(one[s].spread, 4) for one in found},
        }
        for s in grid.strategies()
    }
    entry = {**dataclasses.asdict(case), "clock": clock, "date": found[-1].date, "strategies": strategies}
    return with_times(entry)


def with_times(entry: dict[str, Any]) -> dict[str, Any]:
    """`entry` with each strategy's seconds at a batch of BATCH and their ratio to token counts, from `measured`."""
    strategies = entry["strategies"]
    each = {name: {int(size): v for size, v in one["measured"].items()} for name, one in strategies.items()}
    seconds, fixed = seconds_at_batch(BATCH, each)
    reference = next(iter(strategies))
    for name, one in strategies.items():
        relative = seconds[name] / seconds[reference] * strategies[reference]["cost"]
        one["seconds"], one["time_over_tokens"] = seconds[name], round(relative / one["cost"], 4)
    return {**entry, "fixed_seconds": fixed}


def seconds_at_batch(batch: int, seconds: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], float | None]:
    """Seconds per sample of a batch, and seconds of a step whatever its batch and strategy.

    `seconds`: by name and batch size, per sample. With two sizes the steps' times are fitted by T(b) = fixed + b · s,
    where `fixed` (mostly the optimizer) is shared by all and relative errors count, by least squares. With one size
    the fixed part is not known (None), and it must be the size asked for.
    """
    names = list(seconds)
    if all(len(sizes) == 1 for sizes in seconds.values()):
        return {name: sizes[batch] for name, sizes in seconds.items()}, None
    equations = [(i, size, size * each) for i, name in enumerate(names) for size, each in seconds[name].items()]
    matrix = np.zeros((len(equations), 1 + len(names)))
    for row, (i, size, total) in enumerate(equations):
        matrix[row, 0], matrix[row, 1 + i] = 1 / total, size / total
    fixed, *each = (float(value) for value in np.linalg.lstsq(matrix, np.ones(len(equations)), rcond=None)[0])
    return {name: value + fixed / batch for name, value in zip(names, each, strict=True)}, fixed


def rows(folder: Path) -> list[dict[str, Any]]:
    """The claims that the result files `costs-*.json` of `folder` bear out or not, as rows of summary.json."""
    found: list[Row] = []
    for path in sorted(folder.glob("costs-*.json")):
        results = read_results(path)
        for name, entry in results.items():
            for quantity in ("time", "flops"):
                found.append(_row_of_case(CASES[name], entry, quantity))
        for model in NAMES:
            long, short = results.get(f"{model}-480"), results.get(f"{model}-240")
            if long and short:
                found.append(_row_of_length(model, long, short))
    return [dataclasses.asdict(row) for row in found]


def _row_of_case(case: Case, entry: Mapping[str, Any], quantity: str) -> Row:
    """The ratio to token counts that is furthest from 1; its interval is that of all strategies."""
    ratios = [one[f"{quantity}_over_tokens"] for one in entry["strategies"].values()]
    worst = max(ratios, key=lambda ratio: abs(math.log(ratio)))
    clock = "" if quantity == "flops" else f", {entry['clock']} clock"
    sizes = " and ".join(str(size) for size in entry["batch_sizes"])
    extended = f", from {sizes}" if quantity == "time" and len(entry["batch_sizes"]) > 1 else ""
    title = {"time": "time", "flops": "FLOPs"}[quantity]
    claim = f"costs: {title} over token counts, {case.title}, K={BATCH}{extended}"
    return Row(
        claim, worst, f"x, furthest from 1 (interval: all strategies{clock})", min(ratios), max(ratios),
        f"{1 - AIM:g} to {1 + AIM:g}", abs(worst - 1) <= AIM, entry["device"], entry["date"], entry["repeats"],
        _command(entry),
    )  # fmt: skip


def _row_of_length(model: str, long: Mapping[str, Any], short: Mapping[str, Any]) -> Row:
    """What a token of the 901-token reference takes in FLOPs over one of the 226-token reference."""
    (far, near) = (next(iter(entry["strategies"].values())) for entry in (long, short))
    ratio = far["flops"] / near["flops"] * near["tokens_query"] / far["tokens_query"]
    claim = f"costs: FLOPs of a token among {far['tokens_query']} over one among {near['tokens_query']}, {NAMES[model]}"
    return Row(
        claim, round(ratio, 3), "x", None, None, f"at most {1 + AIM:g}", ratio <= 1 + AIM, long["device"],
        long["date"], 1, _command(long),
    )  # fmt: skip


def _command(entry: Mapping[str, Any]) -> str:
    return f"{COMMAND} --device {entry['kind']} --threads {entry['threads']} --clock {entry['clock']}"


def read_results(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is not in the results yet; each case is written as soon as it is there."""
    kind, device = options.device.split(":")[0], torch.device(options.device)
    path = FOLDER / f"costs-{kind}.json"
    cases, results = (QUICK, {}) if options.quick else (CASES, read_results(path))
    for name in options.cases or cases:
        if name in results and not options.again:
            continue
        case = dataclasses.replace(cases[name], batch_sizes=(BATCH,), repeats=10) if kind == "cuda" else cases[name]
        about = {"kind": kind, "device": device_text(options.device, options.threads), "threads": options.threads}
        results[name] = {**measure(case, device, options.clock), **about, "torch": str(torch.__version__)}
        if not options.quick:
            FOLDER.mkdir(exist_ok=True)
            write_text(path, json.dumps(results, indent=2) + "\n")
        print("\n".join(_text(name, results[name])), flush=True)
    return results


def _text(name: str, entry: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: time and FLOPs over token counts"]
    for strategy, one in entry["strategies"].items():
        lines.append(
            f"  {strategy:<24} {one['tokens_query']:>4} tokens, {one['cost']:.3f} units: time "
            f"{one['time_over_tokens']:.2f}, FLOPs {one['flops_over_tokens']:.2f} "
            f"({one['seconds'] * 1e3:,.1f} ms and {one['memory'] / 1e6:.1f} MB per sample)"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measured costs over token counts.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), help="default: all")
    parser.add_argument("--quick", action="store_true", help="a tiny case; writes nothing")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    run(options)
    if not options.quick:
        print(table([("optimizer", Row(**row)) for row in rows(FOLDER)]))


if __name__ == "__main__":
    main()
