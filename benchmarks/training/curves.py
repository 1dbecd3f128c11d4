"""kNN accuracy over the budget of all three methods, beside raw pixels.

    python -m benchmarks.training.curves [--methods mocov3 simclr dino] [--seeds 0 1 2] [--device cpu] [--quick]
    python -m benchmarks.training.curves --picture docs/pictures/training-curves.png

Each run is one `gradscope train` on Fashion-MNIST's 60,000 training images (28 pixels; found as `--data fashion-mnist`
finds them), with the settings of RUNS. Accuracy is that of the 20 nearest neighbours by cosine, on full-length
sequences, of the first 2,000 test images among the first 10,000 training images, at every tenth of the budget; that
of raw pixels is by the same vote on the same images. Runs lie in `build/training` and are continued there;
`results/curve-<method>-<seed>.json` keeps what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from gradscope.checkpoints import list_steps
from gradscope.data import load_data
from gradscope.evaluation import extract_features, knn_accuracy
from gradscope.files import write_text
from gradscope.runlog import read_log
from gradscope.trainer import load_run

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "training"
FOLDER = Path(__file__).parent / "results"
COMMAND = "python -m benchmarks.training.curves"
AIM = 0.827  # what raw pixels were known to give
BANK, TEST = 10_000, 2_000  # images among which, and of which, neighbours are sought
DEVIATIONS = {"dino": ", with BatchNorm in the head and without small crops"}
DATA = "fashion-mnist"
COMMON = ("--data", DATA, "--set", "evaluations=()", "--set", "checkpoints=(0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1)")
MODEL = (
    "--patch", "7", "--grid", "patch=7;dropout=0", "--batch-size", "128", "--set", "width=128", "--set", "depth=2",
    "--set", "heads=2", "--set", "freeze_patch_embed=False",
    "--set", "warmup=0.05", "--set", "crop_scale=(0.3,1.0)",
)  # fmt: skip
HEADS = ("--set", "head_hidden=512", "--set", "head_width=128")
RUNS: dict[str, tuple[str, ...]] = {
    "mocov3": ("--budget", "8M", *MODEL, *HEADS, "--lr", "4e-3", "--set", "weight_decay=0.02"),
    "simclr": (
        "--budget", "12M", *MODEL, *HEADS, "--lr", "4e-3", "--set", "weight_decay=0.02", "--set", "temperature=0.2",
    ),
    "dino": (
        "--budget", "8M", *MODEL, "--lr", "1e-3", "--set", "head_hidden=256", "--set", "head_width=64",
        "--set", "positions=sincos", "--set", "head_batchnorm=True", "--set", "prototypes=1024",
        "--set", "small_crops=0", "--set", "weight_decay_end=-1.0", "--set", "clip=0", "--set", "freeze_last_layer=0",
    ),
}  # fmt: skip
"""Of a ViT of 2 blocks of width 128 on the 17 tokens of 7-pixel patches: a unit is a pass over these."""


def knn_of(features: Callable[[Tensor], Tensor]) -> float:
    """kNN accuracy of `features` of uint8 images (N, 1, 28, 28)."""
    data = load_data(DATA)
    train_ND, test_MD = (
        features(data.plain(part, torch.arange(count))) for part, count in (("train", BANK), ("test", TEST))
    )
    return knn_accuracy(train_ND, data.train_labels[:BANK], test_MD, data.test_labels[:TEST])


def raw_pixels() -> dict[str, float]:
    """Of the pixels, as they are and standardised as a model sees them."""
    data = load_data(DATA)
    return {
        "raw": knn_of(lambda images: (images / 255).flatten(1)),
        "standardised": knn_of(lambda images: (images / 255).sub(data.mean[0]).div(data.std[0]).flatten(1)),
    }


def points_of(out: Path) -> list[dict[str, Any]]:
    """Accuracy at every checkpoint of a run."""
    points = []
    for path in list_steps(out):
        setting, model, content = load_run(path)
        backbone = model.evaluated
        accuracy = knn_of(lambda images, b=backbone, d=setting.data: extract_features(b, images, d))  # type: ignore[misc]
        points.append({name: content[name] for name in ("step", "units", "samples")} | {"accuracy": accuracy})
    return points


def train(
    method: str, seed: int, device: str, *, quick: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The log and the accuracies of one run, trained or continued."""
    WORK.mkdir(parents=True, exist_ok=True)
    out = WORK / f"{method}-{seed}{'-quick' if quick else ''}"
    words = list(RUNS[method])
    if quick:
        words[words.index("--budget") + 1] = "10K"
    command = [sys.executable, "-m", "gradscope", "train", "--method", method, *COMMON, *words, "--seed", str(seed)]
    subprocess.run([*command, "--device", device, "--out", str(out)], cwd=ROOT, check=True)
    return read_log(out), points_of(out)


def rows(folder: Path = FOLDER) -> list[Row]:
    """Rows for `summary.json`: the accuracy at the end of every method's runs, and that of raw pixels."""
    made = []
    for method in RUNS:
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"curve-{method}-*.json"))]
        if not runs:
            continue
        last = [run["points"][-1] for run in runs]
        ends = [point["accuracy"] for point in last]
        raw = runs[0]["raw_pixels"]
        made.append(
            Row(
                claim=f"{method}{DEVIATIONS.get(method, '')}: kNN accuracy after {last[0]['units']:,.0f} units "
                f"({last[0]['samples']:,} samples), {BANK:,} / {TEST:,} images; raw pixels by the same vote "
                f"{raw['raw']:.1%}, standardised {raw['standardised']:.1%}",
                value=sum(ends) / len(ends),
                unit="",
                low=min(ends),
                high=max(ends),
                aim=f"above {AIM} in every run",
                holds=min(ends) > AIM,
                device=runs[0]["device"],
                date=runs[-1]["date"],
                runs=len(ends),
                command=COMMAND,
            )
        )
    return made


def draw(path: Path, folder: Path = FOLDER) -> None:
    """The accuracy and loss of all runs in `folder` as a PNG file (needs a headless Chromium)."""
    from benchmarks.pictures import draw_figure, find_browser
    from gradscope.plots import plot_training

    runs = {}
    for source in sorted(folder.glob("curve-*.json")):
        run = json.loads(source.read_text(encoding="utf-8"))
        losses = [{"units": units, "loss": loss} for units, loss in run["losses"]]
        runs[f"{run['method']}, seed {run['seed']}"] = [*run["points"], *losses]
    draw_figure(find_browser(), plot_training(runs), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="10K units each; writes nothing")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw what is measured, and stop")
    options = parser.parse_args()
    if options.picture:
        draw(options.picture)
        return
    raw = raw_pixels()
    for method in options.methods:
        for seed in options.seeds:
            log, points = train(method, seed, options.device, quick=options.quick)
            losses = [[row["units"], round(row["loss"], 4)] for row in log if "loss" in row]
            found = {
                "method": method, "seed": seed, "settings": RUNS[method], "raw_pixels": raw, "points": points,
                "losses": losses, "device": device_text(options.device, 1), "date": str(datetime.date.today()),
            }  # fmt: skip
            if not options.quick:
                write_text(FOLDER / f"curve-{method}-{seed}.json", json.dumps(found, indent=1) + "\n")
            print(method, seed, [round(point["accuracy"], 4) for point in points], f"raw pixels {raw}", flush=True)
    print(table([("training", row) for row in rows()]))


if __name__ == "__main__":
    main()
