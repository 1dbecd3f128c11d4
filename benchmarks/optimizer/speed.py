"""How fast and how exact the optimizer is, beside an integer program.

    python -m benchmarks.optimizer.speed [--quick] [--repeats 5]

On profiles made up with a drift like the measured ones (compression pays early, the reference late): time of
`schedulers.optimize` on the paper's grid and on 1,000 strategies x 1,000 slices, without and with every
constraint; how the time grows; HiGHS (scipy.optimize.milp, gap 0) on the same problem in the same run; what the number
of slices and of intervals of seconds changes. Times are processor time of one thread; the median of the repeats counts.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from benchmarks.machine import device_text
from benchmarks.summary import Row, table
from schedulers import Constraints, Grid, Moments, Profile, Strategy, optimize
from schedulers.problem import Problem

FILE = Path(__file__).parent / "results" / "speed.json"
COMMAND = "python -m benchmarks.optimizer.speed"
PAPER = {"patch": (16, 20, 24, 30, 40, 48), "dropout": (0, 0.25, 0.5, 0.75, 0.9)}
BUDGET, PILOT = 100e6, 80e6
HIGHS_SECONDS = 600


def made_up(axes: dict[str, tuple[float, ...]], seed: int, points: int = 9) -> Profile:
    """A profile whose gain per unit favours short sequences early and the reference late, with smooth noise."""
    rng = np.random.default_rng(seed)
    grid = Grid(axes, Strategy({name: values[0] for name, values in axes.items()}))
    place = np.array([grid.position(s) for s in grid.strategies()]) / np.maximum(np.array(grid.shape) - 1, 1)
    cost = 4 * np.exp(-2.5 * place.mean(axis=1)) * rng.uniform(0.97, 1.03, len(grid))
    progress = np.linspace(0, 1, points)
    # the best place on the grid moves from the far corner to the reference
    wanted = 1 - progress[:, None] ** 0.7
    fit = np.exp(-((place.mean(axis=1)[None] - wanted) ** 2) / 0.3 + 0.1 * rng.standard_normal((points, len(grid))))
    inner = np.sqrt(np.clip(fit * np.exp(-2 * progress)[:, None] * 0.3, 0, 1))
    ones = np.ones_like(inner)
    return Profile(
        grid=grid,
        progress=progress,
        cost=cost,
        moments=Moments(ones - inner, ones * 0.0, ones, inner, ones),
        covariance=None,
        batch_size=64,
        beta=256.0,
        metric="optimizer",
        cost_model="tokens",
        digest="made up",
        reference_budget=PILOT,
        seconds=1e-3 * cost * rng.uniform(0.8, 1.3, len(grid)),
        memory=1e6 * cost,
    )


def everything(profile: Profile, mode: str) -> Constraints:
    """Every constraint at once, each of which binds."""
    free = optimize(profile, BUDGET, progress=mode)
    memory = np.asarray(profile.memory)
    some = Constraints(
        allowed=tuple(profile.grid.strategies()[: -len(profile.grid) // 10]),
        monotone=("cost", *profile.grid.axes),
        max_switches=5,
        min_dwell=0.05,
        final_reference=0.1,
        max_memory=float(memory.max()),
    )
    kept = optimize(profile, BUDGET, constraints=some, progress=mode)
    assert free.predicted["seconds"] and kept.predicted["seconds"]
    return Constraints(**{**vars(some), "max_seconds": 0.99 * kept.predicted["seconds"]})


def timed(run: Callable[[], Any], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        found.append(time.process_time() - begun)
    return found


def integer_program(problem: Problem, loss: np.ndarray, dwell: int, switches: int, cost: np.ndarray) -> Any:
    """The same problem for HiGHS: monotone by cost, dwell, switches."""
    slices, strategies = loss.shape
    x = np.arange(loss.size).reshape(loss.shape)
    z = loss.size + np.arange(slices)
    data: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def add(terms: list[tuple[int, float]], least: float, most: float) -> None:
        data.extend((len(low), column, factor) for column, factor in terms)
        low.append(least)
        high.append(most)

    for k in range(slices):
        add([(int(i), 1.0) for i in x[k]], 1, 1)
    for k, c in itertools.product(range(1, slices), range(strategies)):
        add([(int(z[k]), 1.0), (int(x[k, c]), -1.0), (int(x[k - 1, c]), 1.0)], 0, np.inf)
        for later in range(k + 1, min(k + dwell, slices)):
            add([(int(x[later, c]), 1.0), (int(x[k, c]), -1.0), (int(x[k - 1, c]), 1.0)], 0, np.inf)
        if k + dwell > slices:
            add([(int(x[k - 1, c]), 1.0), (int(x[k, c]), -1.0)], 0, np.inf)
    for c, later in itertools.product(range(strategies), range(1, dwell)):
        add([(int(x[later, c]), 1.0), (int(x[0, c]), -1.0)], 0, np.inf)
    for k in range(1, slices):
        terms = [(int(x[k, c]), float(cost[c])) for c in range(strategies)]
        add(terms + [(int(x[k - 1, c]), -float(cost[c])) for c in range(strategies)], -1e-9, np.inf)
    add([(int(i), 1.0) for i in z[1:]], -np.inf, switches)
    rows, columns, factors = zip(*data, strict=True)
    matrix = coo_array((factors, (rows, columns)), shape=(len(low), int(z[-1]) + 1)).tocsr()
    return milp(
        np.concatenate([loss.ravel(), np.zeros(slices)]),
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.ones(int(z[-1]) + 1),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0, "time_limit": HIGHS_SECONDS},
    )


def beside_highs(repeats: int, *, slices: int) -> dict[str, Any]:
    profile = made_up(PAPER, 0)
    constraints = Constraints(monotone=("cost",), max_switches=5, min_dwell=0.05)
    problem = Problem.of(profile, "descent", constraints, slices, 0.0, "fraction")
    ours = timed(lambda: problem.solve(BUDGET), repeats)
    value = problem.value(problem.solve(BUDGET)[0], BUDGET)
    begun = time.process_time()
    result = integer_program(problem, -problem.score, problem.rules.min_dwell, 5, profile.cost)
    theirs = time.process_time() - begun
    return {
        "slices": slices,
        "seconds": ours,
        "highs_seconds": theirs,
        "highs_status": int(result.status),
        "value": value,
        "highs_value": None if result.x is None else -float(result.fun) / slices,
    }


def discretisation(count: int) -> dict[str, Any]:
    """Relative difference of the predicted progress to that with 2,000 slices; of intervals of seconds to 4,000."""
    slices, intervals = [], []
    for seed in range(count):
        profile = made_up(PAPER, seed)
        for budget in (PILOT / 8, PILOT, 4 * PILOT):
            values = [
                optimize(profile, budget, progress="trajectory", slices=n).predicted["progress"] for n in (100, 2000)
            ]
            slices.append(abs(values[0] / values[1] - 1))
        free = optimize(profile, PILOT, progress="trajectory")
        limit = Constraints(max_seconds=0.9 * free.predicted["seconds"], max_switches=4)
        problem = Problem.of(profile, "descent", limit, 100, 0.0, "trajectory")
        reached = [problem.value(problem.solve(PILOT, intervals=n)[0], PILOT) for n in (200, 4000)]
        intervals.append(1 - reached[0] / reached[1])
    return {"slices": slices, "intervals": intervals}


def measure(quick: bool, repeats: int) -> dict[str, Any]:
    paper = made_up(PAPER, 0)
    many = made_up({"a": tuple(range(40)), "b": tuple(range(25))}, 0)
    found: dict[str, Any] = {"device": device_text("cpu", 1), "date": datetime.date.today().isoformat(), "times": {}}
    for mode in ("fraction", "trajectory"):
        limits = everything(paper, mode)
        found["times"][f"paper, {mode}"] = timed(lambda m=mode: optimize(paper, BUDGET, progress=m), repeats)
        found["times"][f"paper, {mode}, all constraints"] = timed(
            lambda m=mode, c=limits: optimize(paper, BUDGET, constraints=c, progress=m), repeats
        )
    found["times"]["paper, with 400 draws"] = timed(
        lambda: optimize(paper_with_errors(paper), BUDGET, draws=400), repeats
    )
    size = 200 if quick else 1000
    some = Constraints(monotone=("cost",), max_switches=5, min_dwell=0.05)
    for mode in ("fraction", "trajectory"):
        found["times"][f"{size} slices, 1,000 strategies, {mode}"] = timed(
            lambda m=mode: optimize(many, BUDGET, progress=m, slices=size), min(repeats, 3)
        )
        found["times"][f"{size} slices, 1,000 strategies, {mode}, constraints"] = timed(
            lambda m=mode: optimize(many, BUDGET, constraints=some, progress=m, slices=size), min(repeats, 3)
        )
    found["growth"] = growth(quick)
    found["highs"] = beside_highs(repeats, slices=20 if quick else 100)
    found["discretisation"] = discretisation(2 if quick else 10)
    return found


def paper_with_errors(profile: Profile) -> Profile:
    """The profile with standard errors of a tenth of every moment."""
    rng = np.random.default_rng(1)
    scale = 0.1 * np.stack(
        [getattr(profile.moments, n) for n in ("bias_sq", "variance", "norm_sq", "inner", "norm_sq_ref")], -1
    )
    influence = scale[..., None] * rng.standard_normal((*scale.shape, 128)) / math.sqrt(128)
    covariance = np.einsum("tcir,tcjr->tcij", influence, influence)
    return Profile(**{**vars(profile), "covariance": covariance, "influence": influence})


def growth(quick: bool) -> dict[str, list[tuple[int, float]]]:
    """Seconds of the program alone, in fraction mode with 5 switches: over slices, and over strategies."""
    constraints = Constraints(monotone=("cost",), max_switches=5)

    def seconds(strategies: int, slices: int) -> float:
        profile = made_up({"a": tuple(range(strategies))}, 0)
        problem = Problem.of(profile, "descent", constraints, slices, 0.0, "fraction")
        return median(timed(lambda: problem.solve(BUDGET), 3))

    steps = (1, 2, 4) if quick else (1, 2, 4, 8, 16)
    return {
        "slices, 30 strategies": [(100 * n, seconds(30, 100 * n)) for n in steps],
        "strategies, 100 slices": [(60 * n, seconds(60 * n, 100)) for n in steps],
    }


def rows(results: dict[str, Any]) -> list[Row]:
    """Rows for `summary.json`."""

    def row(claim: str, values: list[float], unit: str, aim: str | float, holds: bool) -> Row:
        return Row(
            claim, median(values), unit, min(values), max(values), aim, holds, results["device"], results["date"],
            len(values), COMMAND,
        )  # fmt: skip

    made = []
    for name, seconds in results["times"].items():
        limit = 10.0 if "1,000 strategies" in name else 0.5 if "draws" not in name else None
        aim = f"under {limit:g} s" if limit else "no aim"
        made.append(row(f"optimize: {name}", seconds, "s", aim, limit is None or median(seconds) < limit))
    for what, points in results["growth"].items():
        power = float(np.polyfit(np.log([n for n, _ in points]), np.log([s for _, s in points]), 1)[0])
        made.append(
            row(f"growth of the program's time with {what}: power of the number", [power], "power", "no aim", True)
        )
    highs = results["highs"]
    ratio = [highs["highs_seconds"] / s for s in highs["seconds"]]
    made.append(
        row(f"HiGHS over the program, 30 strategies x {highs['slices']} slices (time)", ratio, "x", "no aim", True)
    )
    apart = (
        math.inf if highs["highs_value"] is None else abs(highs["value"] - highs["highs_value"]) / abs(highs["value"])
    )
    finished = highs["highs_status"] == 0
    made.append(
        row(
            "objective beside HiGHS with gap 0: relative difference",
            [apart],
            "1",
            "at most 1e-6",
            finished and apart < 1e-6,
        )
    )
    slices, intervals = results["discretisation"]["slices"], results["discretisation"]["intervals"]
    made.append(
        row(
            "predicted progress with 100 slices beside 2,000: relative difference",
            slices,
            "1",
            "at most 0.005",
            max(slices) <= 0.005,
        )
    )
    made.append(
        row(
            "progress lost to intervals of seconds under a limit of time (200 beside 4,000)",
            intervals,
            "1",
            "at most 0.005",
            max(intervals) <= 0.005,
        )
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small, for a look; writes nothing")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="the optimizer runs on the processor alone")
    options = parser.parse_args()
    results = measure(options.quick, options.repeats)
    if not options.quick:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table([("optimizer", row) for row in rows(results)]))


if __name__ == "__main__":
    main()
