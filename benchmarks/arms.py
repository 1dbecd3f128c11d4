"""Runs of the bundled trainer at equal budgets, each an *arm*: what is compared with what, and how it is made.

Every arm is one `gradscope train` with the settings of a `Setup`; the schedule of an `Offline` arm is made from a
profile of another arm's checkpoints, its pilot. Runs, cubes and schedules lie in the setup's folder and are continued
there.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradscope.checkpoints import list_steps
from gradscope.config import TrainConfig
from gradscope.cube import open_cube, profile_of
from gradscope.errors import GradscopeError
from gradscope.files import write_text
from gradscope.runlog import read_log
from schedulers import Strategy, get_criterion, load_schedule

ROOT = Path(__file__).parents[1]
PROFILE_SHARE = 0.25  # of the budget: what a profile may cost at most
LEAST_SUB_BATCHES = 8  # of a cell, below which a profile's race does not start
CRITERIA = tuple(itertools.product(("descent", "ca-mse", "descent-batch"), ("optimizer", "euclidean")))
KEPT = ("step", "units", "samples", "seconds", "accuracy")


@dataclass(frozen=True)
class Offline:
    """An arm whose schedule is made from a profile of another arm's checkpoints.

    `decision`: options of both `profile` and `optimize`; `optimize`: further ones of the latter.
    """

    pilot: str
    decision: tuple[str, ...] = ()
    optimize: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """What is trained, on what, with which strategies: the base `patch`, and the grid's `patches` and `dropouts`.

    `size` is a name of VIT_SIZES, `image_size` in pixels. `settings`: further ones of `gradscope train --set`,
    `options`: other options.
    """

    patch: int
    patches: tuple[int, ...]
    dropouts: tuple[float, ...]
    method: str = "mocov3"
    data: str = "fashion-mnist-10k"
    image_size: int = 28
    batch_size: int = 64
    size: str = "demo"
    settings: tuple[tuple[str, Any], ...] = ()
    options: tuple[str, ...] = ()

    @property
    def grid(self) -> str:
        return f"patch={','.join(map(str, self.patches))};dropout={','.join(f'{d:g}' for d in self.dropouts)}"

    @property
    def words(self) -> tuple[str, ...]:
        """The options of `gradscope train`."""
        return (
            "--method", self.method, "--data", self.data, "--patch", str(self.patch), "--grid", self.grid,
            "--batch-size", str(self.batch_size), *(["--model", self.size] if self.size != "demo" else []),
            *(["--image-size", str(self.image_size)] if self.image_size != 28 else []), *self.options,
            *(word for name, value in self.settings for word in ("--set", f"{name}={value}")),
        )  # fmt: skip

    def config(self, budget: float = 1.0) -> TrainConfig:
        """The configuration of runs, as far as grid, costs and learning rate go."""
        return TrainConfig.for_run(
            self.method, self.size, budget=budget, patch=self.patch, patches=self.patches, dropouts=self.dropouts,
            batch_size=self.batch_size, **dict(self.settings),
        )  # fmt: skip

    def cost(self, strategy: Strategy) -> float:
        """Units per sample."""
        return self.config().cost(self.image_size, strategy)

    def profile_samples(self, budget: float, checkpoints: int) -> int:
        """Most samples per cell with which a profile costs at most PROFILE_SHARE of `budget`, in whole sub-batches.

        Never fewer than LEAST_SUB_BATCHES of them.
        """
        costs = [self.cost(strategy) for strategy in self.config().grid(self.image_size).strategies()]
        sub_batches = int(PROFILE_SHARE * budget / (checkpoints * sum(costs) * self.batch_size))
        return self.batch_size * max(sub_batches, LEAST_SUB_BATCHES)


@dataclass(frozen=True)
class Setup:
    """What all runs have in common; `folder` is where they lie.

    `samples`: most per cell of a profile. `train`: more options of `gradscope train`.
    """

    model: Model
    budget: float
    device: str
    folder: Path
    samples: int = 0
    train: tuple[str, ...] = ()
    quiet: bool = False

    def path(self, arm: str, seed: int, ending: str = "") -> Path:
        return self.folder / f"{arm}-{seed}{ending}"

    def gradscope(self, *arguments: str) -> str:
        """What the command prints, run on one thread. With `--json` it is not shown. Raises CalledProcessError."""
        command = [sys.executable, "-m", "gradscope", *arguments]
        kept = subprocess.PIPE if "--json" in arguments else None
        done = subprocess.run(
            command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=kept, text=True
        )
        return done.stdout or ""

    @property
    def watched(self) -> tuple[str, ...]:
        """Options of the commands that show their progress: none of it where several run side by side."""
        return ("--device", self.device, *(["--quiet"] if self.quiet else []))


def train_arm(setup: Setup, arm: str, seed: int, schedule: str) -> list[dict[str, Any]]:
    """Train under `schedule`, or continue that; the rows of its log, JSON values."""
    out = setup.path(arm, seed)
    setup.gradscope(
        "train", "--budget", f"{setup.budget:.0f}", "--schedule", schedule, *setup.model.words,
        "--seed", str(seed), "--out", str(out), *setup.train, *setup.watched,
    )  # fmt: skip
    return read_log(out)


def points_of(log: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a log knows of each evaluation: step, units, samples, seconds, kNN accuracy."""
    return [{name: row[name] for name in KEPT} for row in log if "accuracy" in row]


def shares_of(log: Sequence[Mapping[str, Any]], model: Model) -> dict[str, float]:
    """The share of the steps under each strategy, from the units spent between the rows of a log.

    Rows are evenly spaced in units, so of many steps they show dear strategies more often than cheap ones.
    """
    samples: dict[str, float] = {}
    spent = 0.0
    for row in log:
        if "strategy" in row:
            strategy = str(row["strategy"])
            units, spent = row["units"] - spent, row["units"]
            samples[strategy] = samples.get(strategy, 0.0) + units / model.cost(Strategy.parse(strategy))
    return {strategy: round(count / sum(samples.values()), 4) for strategy, count in sorted(samples.items())}


def linear_accuracy(setup: Setup, out: Path) -> float:
    """Accuracy of the linear probe on the last checkpoint of a run; kept beside it."""
    kept = out / "linear.json"
    last = list_steps(out)[-1].name
    if not kept.is_file() or json.loads(kept.read_text(encoding="utf-8"))["checkpoint"] != last:
        text = setup.gradscope("evaluate", str(out), "--linear", "--json", "--device", setup.device)
        write_text(kept, json.dumps({"checkpoint": last, "accuracy": json.loads(text)["accuracy"]["linear"]}))
    return float(json.loads(kept.read_text(encoding="utf-8"))["accuracy"])


def profile_pilot(setup: Setup, pilot: Path, cube: Path, seed: int, offline: Offline) -> dict[str, Any]:
    """Profile the run in `pilot` into `cube`, or continue that, and tell what both cost in units."""
    setup.gradscope(
        "profile", str(pilot), "-o", str(cube), "--samples", str(setup.samples), "--seed", str(seed),
        *offline.decision, *setup.watched,
    )  # fmt: skip
    profile_units = float(open_cube(cube).attrs["units"])
    pilot_units = read_log(pilot)[-1]["units"]
    return {"pilot": offline.pilot, "pilot_units": pilot_units, "profile_units": profile_units, "best": best_of(cube)}


def best_of(cube: Path) -> dict[str, list[list[Any]]]:
    """(progress, strategy that is first there) of every checkpoint of a cube, by criterion and metric."""
    dataset, found = open_cube(cube).dataset, {}
    for criterion, metric in CRITERIA:
        profile = profile_of(dataset, metric=metric)
        score_TC = profile.scores(criterion, profile.progress)[0]
        if get_criterion(criterion).lower_is_better:
            score_TC = -score_TC
        strategies = profile.grid.strategies()
        firsts = [str(strategies[int(np.nanargmax(score_C))]) for score_C in score_TC]
        found[f"{criterion}, {metric}"] = [
            [round(float(p), 4), s] for p, s in zip(profile.progress, firsts, strict=True)
        ]
    return found


def find_schedule(setup: Setup, cube: Path, plan: Path, offline: Offline) -> None:
    """Find the schedule for the setup's budget in a cube, into the file `plan`."""
    setup.gradscope(
        "optimize", str(cube), "--budget", f"{setup.budget:.0f}", "--out", str(plan),
        *offline.decision, *offline.optimize,
    )  # fmt: skip


def stages_of(path: Path) -> list[list[Any]]:
    """(start, end, probability per step of each strategy) of the stages of a schedule's file, by fraction of budget."""
    return [
        [round(stage.start, 4), round(stage.end, 4), {str(strategy): round(p, 4) for strategy, p in stage.mixture}]
        for stage in load_schedule(path).stages
    ]


def probe_facts(out: Path, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the probes of an online run cost, in units and in seconds.

    The units are those of the schedule, which also counts the samples on which strategies were tried at the start.
    """
    probes = [row for row in log if "probe" in row]
    units = float(load_schedule(out / "schedule.json").constraints["probe_units"])
    seconds = sum(row["probe_seconds"] for row in probes)
    return {"probes": len(probes), "probe_units": units, "probe_seconds": round(seconds, 3)}


def run_all(
    run: Callable[[str, int], dict[str, Any]],
    arms: Sequence[str],
    pilots: Mapping[str, str],
    seeds: Sequence[int],
    workers: int,
) -> Iterator[tuple[str, int, Future[dict[str, Any]]]]:
    """`run(arm, seed)` of every arm for every seed, arm after arm in the order given, as each is done.

    An arm of `pilots` waits for the pilot that it names, which has begun before it, so that workers cannot wait for
    each other.
    """
    waiting: dict[tuple[str, int], Future[dict[str, Any]]] = {}

    def after_pilot(arm: str, seed: int) -> dict[str, Any]:
        pilot = pilots.get(arm)
        if pilot is not None and waiting[pilot, seed].exception() is not None:
            raise GradscopeError(f"its pilot {pilot}-{seed} failed")
        return run(arm, seed)

    with ThreadPoolExecutor(workers) as pool:
        for arm in arms:
            for seed in seeds:
                waiting[arm, seed] = pool.submit(after_pilot, arm, seed)
        names = {future: name for name, future in waiting.items()}
        try:
            for future in as_completed(names):
                yield *names[future], future
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def told(error: subprocess.CalledProcessError | GradscopeError) -> str:
    """What went wrong in an arm, in a few words."""
    if isinstance(error, subprocess.CalledProcessError):
        return f"gradscope {error.cmd[3]} ended with exit code {error.returncode}"
    return str(error)
