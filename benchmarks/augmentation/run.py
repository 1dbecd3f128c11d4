"""Seconds an image for both views of MoCo-v3's recipe: gradscope's `augment` against kornia's transforms.

    python -m benchmarks.augmentation.run [--quick] [--device cpu]

Needs kornia (`pip install kornia==0.9.0`), which gradscope itself does not use. Both run in one process
on one thread and take turns, so that another load on the machine meets both; a repetition is one
turn of each; on a CPU the seconds are those of the processor, not of the clock on the wall. Both
start from the same uint8 batch and end with normalised float32. kornia blurs only where gradscope
does: at 28 pixels the recipe's widest Gaussian is a quarter of a pixel, which changes nothing at 8
bits (`gradscope.data.augment.MIN_SIGMA`). The hue differs in kind: gradscope turns it in YIQ, kornia
in HSV. `--quick` writes no files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import device_text
from benchmarks.summary import Row, write_summary
from gradscope.data.augment import MIN_SIGMA, REFERENCE_SIZE, Augmentation, augment
from gradscope.data.recipes import mocov3_views

FOLDER = Path(__file__).parent
SETTINGS = ((28, 1, 64), (28, 1, 256), (64, 3, 64), (64, 3, 256))
AIM_MICROSECONDS = 40
COMMAND = "python -m benchmarks.augmentation.run"


def kornia_view(view: Augmentation, channels: int) -> nn.Module:
    """kornia's transforms with the parameters of `view`, in the same order."""
    import kornia.augmentation as K

    steps: list[nn.Module] = [
        K.RandomResizedCrop(
            (view.size, view.size), scale=view.crop_scale, ratio=view.crop_ratio, cropping_mode="resample"
        ),
        K.RandomHorizontalFlip(p=view.flip),
    ]
    if channels == 3:
        steps.append(K.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue, p=view.jitter))
        steps.append(K.RandomGrayscale(p=view.gray))
    else:
        steps.append(K.RandomBrightness((1 - view.brightness, 1 + view.brightness), p=view.jitter))
        steps.append(K.RandomContrast((1 - view.contrast, 1 + view.contrast), p=view.jitter))
    sigma = (view.blur_sigma[0] * view.size / REFERENCE_SIZE, view.blur_sigma[1] * view.size / REFERENCE_SIZE)
    if sigma[1] >= MIN_SIGMA:
        width = 2 * math.ceil(3 * sigma[1]) + 1
        steps.append(K.RandomGaussianBlur((width, width), sigma, p=view.blur))
    if view.solarize:
        steps.append(K.RandomSolarize(thresholds=(view.solarize_threshold,) * 2, additions=(0.0, 0.0), p=view.solarize))
    steps.append(K.Normalize(mean=torch.tensor(view.mean), std=torch.tensor(view.std)))
    return nn.Sequential(*steps)


def measure(size: int, channels: int, batch: int, *, device: str, repetitions: int, seconds: float) -> dict[str, Any]:
    """Microseconds an image of each repetition, for both; a turn lasts about `seconds`."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator).to(device)
    views = mocov3_views(size, (0.3,) * channels, (0.35,) * channels, channels)
    transforms = [kornia_view(view, channels).to(device) for view in views]

    def ours() -> list[Tensor]:
        return [augment(images, view, generator) for view in views]

    def theirs() -> list[Tensor]:
        return [transform(images.float() / 255) for transform in transforms]

    bodies = {"gradscope": ours, "kornia": theirs}
    calls = {}
    for name, body in bodies.items():
        for view in body():
            if view.shape != images.shape or view.dtype != torch.float32 or not view.isfinite().all():
                raise RuntimeError(f"{name} returned {view.dtype} of shape {tuple(view.shape)}, or values not finite")
        timed(body, 3, device)
        calls[name] = max(1, round(seconds / timed(body, 3, device)))
    times: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(repetitions):
        for name, body in bodies.items():
            times[name].append(round(timed(body, calls[name], device) / batch * 1e6, 3))
    return {"size": size, "channels": channels, "batch": batch, "calls": calls, "microseconds_per_image": times}


def timed(body: Callable[[], object], calls: int, device: str) -> float:
    """Mean seconds of one call: of this process on a CPU, of the wall clock on a GPU."""
    if not device.startswith("cuda"):
        start = time.process_time()
        for _ in range(calls):
            body()
        return (time.process_time() - start) / calls
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        body()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def rows(results: list[dict[str, Any]], *, device: str, date: str) -> list[Row]:
    """Claims: medians over the repetitions, with the smallest and largest as the interval."""
    found = []
    for result in results:
        times = result["microseconds_per_image"]
        ratios = [theirs / ours for ours, theirs in zip(times["gradscope"], times["kornia"], strict=True)]
        where = f"{result['size']} x {result['size']} x {result['channels']}, batch {result['batch']}"
        found.append(_row(f"batched augmentation: kornia's time over ours, {where}", "x", ratios, 2, device, date))
        if result["size"] == 28:
            ours = times["gradscope"]
            claim = f"batched augmentation: a pair of views, {where}"
            found.append(_row(claim, "µs/image", ours, AIM_MICROSECONDS, device, date))
    return found


def _row(claim: str, unit: str, values: list[float], aim: float, device: str, date: str) -> Row:
    value, low, high = (round(number, 3) for number in (statistics.median(values), min(values), max(values)))
    at_least = unit == "x"
    return Row(
        claim=claim,
        value=value,
        unit=unit,
        low=low,
        high=high,
        aim=f"{'at least' if at_least else 'at most'} {aim}",
        holds=value >= aim if at_least else value <= aim,
        device=device,
        date=date,
        runs=len(values),
        command=COMMAND,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="short turns and no files")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repetitions, seconds = (7, 0.05) if options.quick else (15, 0.5)
    results = []
    for size, channels, batch in SETTINGS:
        result = measure(size, channels, batch, device=options.device, repetitions=repetitions, seconds=seconds)
        results.append(result)
        medians = {name: statistics.median(values) for name, values in result["microseconds_per_image"].items()}
        told = ", ".join(f"{name} {value:.1f}" for name, value in medians.items())
        print(f"{size} x {size} x {channels}, batch {batch}: {told} µs/image", flush=True)
    date = datetime.date.today().isoformat()
    device = device_text(options.device, 1)
    claims = rows(results, device=device, date=date)
    for row in claims:
        print(f"{row.claim}: {row.value} {row.unit} [{row.low}, {row.high}], aim {row.aim}")
    if options.quick:
        return
    import kornia

    raw = {"device": device, "date": date, "torch": torch.__version__, "kornia": kornia.__version__, "results": results}
    folder = FOLDER / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{date}-{options.device.replace(':', '')}.json").write_text(json.dumps(raw, indent=1) + "\n")
    write_summary(FOLDER / "summary.json", claims)


if __name__ == "__main__":
    main()
