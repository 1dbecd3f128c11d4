"""Which criterion ranks strategies as short training does: the true progress of each from the checkpoints of pilots.

    python -m benchmarks.acceleration.ranking [--cases mocov3 ...] [--seeds 0 1 2] [--pilots none mixed paper] [--quick]

From a checkpoint at a quarter, half and three quarters of a pilot training goes on under each strategy of the grid
alone, for HORIZONS of the pilot's budget, with the learning rate as the pilot had it; then for RECOVERY of it under the
reference, which takes out that a model is not used to the strategy that is measured. Progress is the drop of the
reference's loss, on common batches of training images, and the gain in kNN accuracy, each of IMAGES images voted on by
all others (training needs no labels, so training images serve as well). The table gives the rank correlation
(Spearman's) of both with the scores of the criteria in both metrics at that checkpoint, from the pilot's cube
(`benchmarks.acceleration.runs`, which makes pilots and cubes where they are missing). Branches lie in
`build/acceleration/<case>/ranking` and are continued there; `results/ranking-<case>-<seed>.json` keeps what was
measured.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from benchmarks.acceleration.cases import CASES, Case, cases_for
from benchmarks.acceleration.runs import FOLDER, WORK, Plan, run_key
from benchmarks.arms import CRITERIA, Offline
from benchmarks.branch import branch
from benchmarks.machine import device_text
from benchmarks.summary import SHOWN, Row, table
from gradscope.checkpoints import list_steps, load_checkpoint
from gradscope.cube import open_cube, profile_of
from gradscope.data import Dataset
from gradscope.evaluation import extract_features
from gradscope.files import write_text
from gradscope.models import VisionTransformer
from gradscope.tasks import PretrainTask
from schedulers import Strategy

COMMAND = "python -m benchmarks.acceleration.ranking --cases"
PILOTS = {"none": Offline("none"), "mixed": Offline("mixed"), "paper": Offline("paper")}
CHECKPOINTS = (1, 2, 3)
HORIZONS = (0.02, 0.08)  # of the pilot's budget
RECOVERY = 0.02
BATCHES, BATCH = 8, 64  # on which the reference's loss is measured
IMAGES = 3000  # on which accuracy is: the test images and some for training
NEIGHBOURS, TEMPERATURE = 20, 0.07
MEASURES = ("loss", "accuracy")
OURS, PAPERS = "descent, optimizer", "ca-mse, euclidean"


def state_of(path: Path, device: str) -> dict[str, float]:
    """The reference's loss on common batches and kNN accuracy, of a checkpoint; kept beside it."""
    kept = path.with_suffix(".json")
    if kept.is_file():
        return dict(json.loads(kept.read_text(encoding="utf-8")))
    task = PretrainTask.from_folder(path.parent, device=torch.device(device))
    model = task.load(path)
    task.fraction = 0.0  # one loss for all
    losses = []
    with torch.no_grad():
        for number, batch in enumerate(itertools.islice(task.sub_batches(BATCH, seed=11), BATCHES)):
            generator = torch.Generator().manual_seed(number)
            losses.append(float(task.loss(model, batch, task.grid.reference, generator)))
    found = {"loss": statistics.fmean(losses), "accuracy": _accuracy(model.evaluated, task.setting.data)}  # type: ignore[arg-type]
    write_text(kept, json.dumps(found))
    return found


def _accuracy(backbone: VisionTransformer, data: Dataset) -> float:
    """Of a vote on each of IMAGES by the others, as `gradscope.evaluation.knn_accuracy` counts votes."""
    few = max(0, IMAGES - data.test_count)
    images_NCSS = torch.cat(
        [
            data.plain("test", torch.arange(min(IMAGES, data.test_count))),
            data.plain("train", torch.arange(min(few, data.train_count))),
        ]
    )
    label_N = torch.cat([data.test_labels[: len(images_NCSS)], data.train_labels[:few]])
    feature_NF = F.normalize(extract_features(backbone, images_NCSS, data), dim=1).cpu()
    likeness_NN = (feature_NF @ feature_NF.T).fill_diagonal_(-math.inf)
    near_NK, at_NK = likeness_NN.topk(NEIGHBOURS, dim=1)
    votes_NC = torch.zeros(len(label_N), int(label_N.max()) + 1)
    votes_NC.scatter_add_(1, label_N[at_NK], ((near_NK - near_NK[:, :1]) / TEMPERATURE).exp())
    return float((votes_NC.argmax(1) == label_N).double().mean())


def run_seed(plan: Plan, seed: int, pilots: Sequence[str]) -> list[dict[str, Any]]:
    """Progress of every strategy from every checkpoint, with the scores of the criteria there, as JSON values."""
    found = []
    for pilot in pilots:
        keys, _ = plan.keys((pilot,), math.inf)
        for key in keys:  # what the pilot needs, and itself at the largest budget
            if key.startswith("cube") or key.endswith(run_key("", plan.pilot_budget)):
                plan.run(key, seed)
        setup, offline = plan.setup(plan.pilot_budget), PILOTS[pilot]
        cube = plan.folder / f"ranking-{pilot}-{seed}.nc"
        setup.gradscope(
            "profile", str(setup.path(pilot, seed)), "-o", str(cube), "--samples", str(setup.samples),
            "--samples-per-cell", "fixed", "--seed", str(seed), *offline.decision, *setup.watched,
        )  # fmt: skip
        for number in CHECKPOINTS:
            start = list_steps(setup.path(pilot, seed))[number]
            found += _from(plan, pilot, seed, number, start, cube)
    return found


def _from(plan: Plan, pilot: str, seed: int, number: int, start: Path, cube: Path) -> list[dict[str, Any]]:
    base, budget = plan.folder / "ranking" / f"{pilot}-{seed}-{number}", plan.pilot_budget
    dataset = open_cube(cube).dataset
    reference = profile_of(dataset).grid.reference
    (same,) = branch(start, lambda step: reference, [0.0], [base / "start"], plan.device)
    before, here = state_of(same, plan.device), load_checkpoint(start)["units"] / budget
    made = []
    for position, strategy in enumerate(profile_of(dataset).grid.strategies()):
        folders = [base / f"{strategy} {horizon:g}".replace(" ", "-").replace(",", "-") for horizon in HORIZONS]
        ends = branch(start, _always(strategy), [h * budget for h in HORIZONS], folders, plan.device)
        entry: dict[str, Any] = {
            "pilot": pilot, "fraction": round(here, 3), "strategy": str(strategy), "scores": {
                f"{criterion}, {metric}": _score(dataset, criterion, metric, number, position)
                for criterion, metric in CRITERIA
            },
        }  # fmt: skip
        for horizon, end in zip(HORIZONS, ends, strict=True):
            (rested,) = branch(end, _always(reference), [RECOVERY * budget], [end.parent / "recovered"], plan.device)
            for name, path in (("at once", end), ("recovered", rested)):
                after = state_of(path, plan.device)
                gain = {"loss": before["loss"] - after["loss"], "accuracy": after["accuracy"] - before["accuracy"]}
                entry[f"{horizon:g}, {name}"] = {what: round(value, 5) for what, value in gain.items()}
        made.append(entry)
        print(f"{pilot} seed {seed} at {here:.2f}, {strategy}: {entry[f'{HORIZONS[-1]:g}, recovered']}", flush=True)
    return made


def _always(strategy: Strategy) -> Any:
    return lambda step: strategy


def _score(dataset: Any, criterion: str, metric: str, number: int, position: int) -> float:
    """Higher is better."""
    from schedulers import get_criterion

    profile = profile_of(dataset, metric=metric)
    score = float(profile.scores(criterion, [profile.progress[number]])[0][0, position])
    return -score if get_criterion(criterion).lower_is_better else score


def correlations(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str, str], list[float]]:
    """Spearman's correlation over the strategies of a checkpoint, by pilot, criterion, way and measure."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    places = sorted({(p["seed"], p["pilot"], p["fraction"]) for p in points})
    for seed, pilot, fraction in places:
        here = [p for p in points if (p["seed"], p["pilot"], p["fraction"]) == (seed, pilot, fraction)]
        ways = [name for name, value in here[0].items() if isinstance(value, dict) and name != "scores"]
        for criterion, way, measure in itertools.product(here[0]["scores"], ways, MEASURES):
            pairs = [(p["scores"][criterion], p[way][measure]) for p in here]
            known = np.array([pair for pair in pairs if np.isfinite(pair).all()])
            if len(known) >= 3 and (np.ptp(known, axis=0) > 0).all():
                value = float(spearmanr(known[:, 0], known[:, 1]).statistic)
                found.setdefault((pilot, criterion, way, measure), []).append(value)
    return found


def read_results(case: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """What was measured of a case, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"ranking-{case}-*.json"))]
    return [one for one in found if one["case"] == case]


def rows_of(case: Case, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows for `summary.json`: the mean correlation over seeds and checkpoints, with its range.

    The default criterion is meant to be ahead of the paper's.
    """
    points = [p | {"seed": found["seed"]} for found in results for p in found["points"]]
    made = []
    found = correlations(points)
    for (pilot, criterion, way, measure), values in sorted(found.items()):
        gain = "the reference's loss" if measure == "loss" else "kNN accuracy"
        claim = f"{case.name}: rank correlation of {criterion} with progress in {gain}, {way}, checkpoints of '{pilot}'"
        value, low, high = (round(v, 3) for v in (statistics.fmean(values), min(values), max(values)))
        paper = found.get((pilot, PAPERS, way, measure), [])
        aim, holds = SHOWN, True
        if criterion == OURS and paper:
            theirs = round(statistics.fmean(paper), 3)
            aim, holds = f"above that of {PAPERS}, {theirs}", value > theirs
        made.append(
            Row(claim, value, "1", low, high, aim, holds, results[0]["device"], results[0]["date"],
                len(values), f"{COMMAND} {case.name}")
        )  # fmt: skip
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default all for the device")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pilots", nargs="+", choices=PILOTS, default=list(PILOTS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="tiny budgets; writes nothing")
    options = parser.parse_args()
    for name in options.cases or cases_for(options.device):
        case, folder, seeds = CASES[name], WORK / name, options.seeds
        if options.quick:
            case, folder, seeds = replace(case, budgets=(6e3,)), WORK / "quick" / name, seeds[:1]
        plan = Plan(case, options.device, folder, quiet=True)
        for seed in seeds:
            points = run_seed(plan, seed, options.pilots)
            found = {
                "case": name, "seed": seed, "device": device_text(options.device, 1),
                "date": str(datetime.date.today()), "points": points,
            }  # fmt: skip
            if not options.quick:
                write_text(FOLDER / f"ranking-{name}-{seed}.json", json.dumps(found, indent=1) + "\n")
            print(table([("acceleration", row) for row in rows_of(case, [found])]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
