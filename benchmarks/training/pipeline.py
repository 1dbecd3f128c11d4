"""Images a second of the input pipeline alone: without a model, for each method's views.

    python -m benchmarks.training.pipeline [--device cpu] [--threads N] [--quick] [--again]

Three sources: Fashion-MNIST in memory, a folder of JPEG photographs of 500 x 375 pixels (about ImageNet's mean) and
one of 3264 x 2448 (a telephone's), both made on the spot in a temporary folder from noise with the spectrum of
natural pictures, brought to 224 pixels. An image is one training image with all of its views. `prepare` is the
work that runs in threads beside the training (random numbers, decoding, crops), `views` is that and the rest of
the work on the device. Every repeat is a new batch; medians with quartiles over repeats, by the clock on the wall
and by the processor's seconds of this process, all threads together. Files come from the system's cache.
Results go to `results/pipeline-<device>.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import device_text
from benchmarks.summary import Row
from gradscope.data import RECIPES, Dataset, folder_data, load_data, views_of
from gradscope.files import write_text

FOLDER = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.training.pipeline"
SMALL_CROPS = 6
STEPS = {"memory": "demo-28", "photographs": "small-240"}
"""Cases of `benchmarks.training.speed` whose steps use such images."""


@dataclass(frozen=True)
class Source:
    """Where images come from. `size`: (height, width) of photographs, None for Fashion-MNIST; `count` files."""

    size: tuple[int, int] | None
    count: int
    image_size: int
    batches: tuple[int, ...]
    repeats: int


SOURCES = {
    "memory": Source(None, 0, 28, (64, 256), repeats=40),
    "photographs": Source((375, 500), 256, 224, (64,), repeats=9),
    "large photographs": Source((2448, 3264), 16, 224, (16,), repeats=7),
}
QUICK = {
    "memory": Source(None, 0, 28, (64,), repeats=3),
    "photographs": Source((375, 500), 16, 224, (8,), repeats=2),
}


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """A picture whose amplitudes fall as one over the frequency, as those of natural pictures do, in soft colours."""
    rng = np.random.default_rng(seed)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(y, x), 1 / max(height, width))
    planes = []
    for _ in range(3):
        phase = rng.uniform(0, 2 * np.pi, amplitude.shape)
        plane = np.fft.irfft2(amplitude * np.exp(1j * phase), s=(height, width))
        planes.append(plane / plane.std())
    light, *colour = planes
    channels = [128 + 50 * light + 15 * other for other in (*colour, -colour[0])]
    return Image.fromarray(np.stack(channels, 2).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, source: Source) -> int:
    """Fill a flat folder; returns the bytes of all files."""
    assert source.size is not None
    for index in range(source.count):
        photograph(*source.size, seed=index % 32).save(folder / f"{index:04d}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir())


def measure(name: str, source: Source, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One plain dict for each method and batch size of a source."""
    with tempfile.TemporaryDirectory() as folder:
        facts: dict[str, Any] = {"source": name, "image_size": source.image_size, "threads": threads}
        data: Dataset
        if source.size is None:
            data = load_data("fashion-mnist-10k")
        else:
            facts |= {"pixels": list(source.size), "bytes_per_file": write_photographs(Path(folder), source)}
            facts["bytes_per_file"] //= source.count
            data = folder_data(Path(folder), image_size=source.image_size, threads=threads)
        return [
            {**facts, **measure_method(data, method, batch, source.repeats, device)}
            for method in RECIPES
            for batch in source.batches
        ]


def measure_method(data: Dataset, method: str, batch: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Images a second of preparing a batch, and of preparing and finishing it."""
    views = views_of(
        method,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        channels=data.channels,
        small_count=SMALL_CROPS if method == "dino" else 0,
    )
    generator = torch.Generator().manual_seed(0)
    order_N = torch.randperm(data.train_count, generator=generator)
    batches = [order_N[torch.arange(batch * index, batch * (index + 1)) % len(order_N)] for index in range(repeats)]
    found: dict[str, Any] = {"method": method, "view_count": len(views), "batch": batch, "repeats": repeats}
    for stage, body in (
        ("prepare", lambda indices_B: data.prepare(indices_B, views, generator)),
        ("views", lambda indices_B: data.views(indices_B, views, generator, device)),
    ):
        body(batches[0])
        found[stage] = rates(body, batches, device)
    return found


def rates(body: Callable[[torch.Tensor], object], batches: list[torch.Tensor], device: torch.device) -> dict[str, Any]:
    """Quartiles of images a second over the batches: {"wall": {"low", "median", "high"}, "processor": ...}."""
    seconds: dict[str, list[float]] = {"wall": [], "processor": []}
    for indices_B in batches:
        wall, processor = time.perf_counter(), time.process_time()
        body(indices_B)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds["wall"].append(time.perf_counter() - wall)
        seconds["processor"].append(time.process_time() - processor)
    found = {}
    for clock, values in seconds.items():
        low, median, high = np.quantile([len(batches[0]) / value for value in values], (0.25, 0.5, 0.75))
        found[clock] = {"low": round(low, 1), "median": round(median, 1), "high": round(high, 1)}
    return found


def results_path(device: str) -> Path:
    return FOLDER / f"pipeline-{device.split(':')[0]}.json"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the sources that are not in the results yet: {source: {"measured": [...], "device", "date", ...}}."""
    path, sources = results_path(options.device), QUICK if options.quick else SOURCES
    known = path.exists() and not options.quick
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if known else {}
    for name in sources:
        if name in results and not options.again:
            continue
        load = os.getloadavg()[0]
        results[name] = {
            "measured": measure(name, sources[name], torch.device(options.device), options.threads),
            "device": device_text(options.device, options.threads),
            "date": datetime.date.today().isoformat(),
            "torch": str(torch.__version__),
            "load_average_before": round(load, 2),
            "command": f"{COMMAND} --device {options.device} --threads {options.threads}",
        }
        if not options.quick:
            FOLDER.mkdir(exist_ok=True)
            write_text(path, json.dumps(results, indent=2) + "\n")
    return results


def fastest(folder: Path, kind: str, source: str) -> tuple[str, float] | None:
    """The strategy of MoCo-v3 whose step takes the most images a second, where `benchmarks.training.speed` knows."""
    path = folder / f"speed-{kind}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    if STEPS.get(source) not in cases:
        return None
    case = cases[STEPS[source]]
    strategies = case["strategies"]
    name = max(strategies, key=lambda each: strategies[each]["samples_per_second"])
    return f"a step of {case['title']} under {name}", float(strategies[name]["samples_per_second"])


def rows(folder: Path = FOLDER) -> list[Row]:
    """Rows for `summary.json`: images a second of every source and method, MoCo-v3's against the fastest step.

    By the processor's seconds where the model runs on the processor too (one thread does either), else by the
    clock on the wall.
    """
    made = []
    for path in sorted(folder.glob("pipeline-*.json")):
        kind = path.stem.removeprefix("pipeline-")
        for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
            for measured in entry["measured"]:
                rate = measured["views"]["processor" if kind == "cpu" else "wall"]
                step = fastest(folder, kind, name) if measured["method"] == "mocov3" else None
                pixels = " of {1} x {0}".format(*measured["pixels"]) if "pixels" in measured else ""
                made.append(
                    Row(
                        claim=f"input pipeline: {name}{pixels} to {measured['image_size']}, {measured['method']}, "
                        f"{measured['view_count']} views, batch {measured['batch']}",
                        value=rate["median"],
                        unit="images/s",
                        low=rate["low"],
                        high=rate["high"],
                        aim=f"at least {step[1]:.0f}, {step[0]}" if step else "none; stated",
                        holds=step is None or rate["median"] >= step[1],
                        device=entry["device"],
                        date=entry["date"],
                        runs=measured["repeats"],
                        command=entry["command"],
                    )
                )
    return made


def table(results: dict[str, Any]) -> str:
    """Images a second as lines of text."""
    lines = [f"{'source':18} {'method':7} {'views':>5} {'batch':>5} {'threads':>7}  images/s: wall, processor"]
    for entry in results.values():
        for row in entry["measured"]:
            parts = [
                f"{stage} {row[stage]['wall']['median']:.0f}, {row[stage]['processor']['median']:.0f}"
                for stage in ("prepare", "views")
            ]
            head = f"{row['source']:18} {row['method']:7} {row['view_count']:5} {row['batch']:5} {row['threads']:7}"
            lines.append(f"{head}  {'; '.join(parts)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Images a second of the input pipeline alone.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads that decode, and torch's")
    parser.add_argument("--quick", action="store_true", help="small, for a look; writes nothing")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(table(run(options)))


if __name__ == "__main__":
    main()
