"""Sample efficiency of gradient statistics: how many samples a decision needs, by four ways of estimating.

    python -m benchmarks.profile.efficiency [--quick] [--work build/profile]

(a) the paper's plug-in with other samples for the reference than for the strategies, (b) the plug-in with paired
samples, (c) the library's unbiased paired estimator, (d) the same with racing. Checkpoints are early, middle and
late in a mixed run and in an unaccelerated run of the bundled trainer (`efficiency_data`); the judge of a choice
is the other half of some ten thousand samples per cell (`efficiency_study`). Gradients lie in the work folder
while they are collected, about 11 MB for a sub-batch of a checkpoint; an interrupted measurement resumes.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import device_text
from benchmarks.profile import efficiency_data as data
from benchmarks.profile import efficiency_study as study
from benchmarks.summary import Row, table
from gradscope.engines import FlatParameters
from gradscope.files import write_text
from gradscope.tasks import PretrainTask
from schedulers.racing import RaceRule

COMMAND = "python -m benchmarks.profile.run --part efficiency"
RESULT = Path(__file__).parent / "results" / "efficiency.json"
REPLICATES = {"mixed": 256, "none": 256}
TRIALS = 400
COUNTS = (4, 8, 16, 32, 64, 128, 256)  # sub-batches per cell
PAPER_SAMPLES = 16_384
CURVE = ("samples", "best", "near", "regret", "bias_sq_error")
RACE = (
    *(field.name for field in fields(RaceRule)),
    *("samples", "last_samples", "units", "units_paper", "decided", "best", "near", "regret"),
    *("near_of_all_cells", "alike_with_exact_errors", "samples_with_exact_errors", "near_with_exact_errors"),
)
CRITERIA = (("ca-mse", "euclidean"), ("descent", "optimizer"))
PAPER_SCALE = 2  # 240 pixels, base patch 16: twice the pixels of ours, the same grids of tokens
CHECKPOINTS, TRAINING_BUDGET = 5, 100e6  # of the paper's profile and of its IN-100 runs
CLAIMED = tuple(RaceRule(minimum=8, maximum=most, tolerance=0.05, confidence=0.95, growth=1.5) for most in (256, 128))
SHOWN = "none; shown for comparison"
SLACK = 0.01  # by which two shares count as the same


def rules(most: int) -> list[RaceRule]:
    """Settings of the race under study: caps by confidences, then one thing varied at a time."""
    caps = [cap for cap in (32, 64, 128, 256) if cap <= most] or [most]
    minimum = min(8, most)
    studied = [RaceRule(minimum, cap, 0.05, confidence) for cap in caps for confidence in (0.9, 0.95, 0.98, 0.99)]
    middle = RaceRule(minimum, min(128, caps[-1]), 0.05, 0.95)
    studied += [replace(middle, minimum=least) for least in (4, 16) if least <= middle.maximum]
    studied += [replace(middle, tolerance=tolerance) for tolerance in (0.0, 0.02, 0.1)]
    studied += [replace(middle, confidence=0.8), replace(middle, growth=2.0)]
    return list(dict.fromkeys(studied))


def cases_of(folder: Path, replicates: int) -> Iterator[tuple[float, int, str, dict[str, Any]]]:
    """(progress, step, name of the file, Gram matrices) of the collected checkpoints of a run; kept in the folder."""
    task = PretrainTask(data.new_setting(data.RUNS[folder.name]))
    for checkpoint in data.chosen_checkpoints(folder):
        place = data.gradient_folder(checkpoint)
        cache = place / f"grams-{replicates}.npz"
        if not cache.exists():
            parameters = FlatParameters.of(task, task.load(checkpoint.path)).layout.total
            kept = data.Collection(place, replicates, len(task.grid), parameters)
            np.savez(cache, **data.grams(task, checkpoint, kept, replicates))
        with np.load(cache) as content:
            yield checkpoint.progress, checkpoint.step, checkpoint.path.name, dict(content)


def case_of(grams: Mapping[str, Any], run: str, criterion: str, metric: str) -> study.Case:
    """The Gram matrices in one metric, with exact diagonals in the sketched ones, and the paper's costs."""
    grid = data.new_grid()
    w = data.METRICS.index(metric)
    arrays = {name: grams[name][w].astype(np.float64) for name in ("gg", "gz", "sketch_gg", "sketch_gz")}
    for name in ("gg", "gz"):
        m = np.arange(arrays[name].shape[1])
        arrays[f"sketch_{name}"][:, m, m] = arrays[name][:, m, m]
    return study.Case(
        run,
        criterion,
        arrays["gg"],
        arrays["gz"],
        arrays["sketch_gg"],
        arrays["sketch_gz"],
        reference=grid.strategies().index(grid.reference),
        costs=study.Costs.of(grid, data.IMAGE_SIZE, data.PATCH),
        paper_costs=study.Costs.paper(
            data.new_grid(PAPER_SCALE), PAPER_SCALE * data.IMAGE_SIZE, PAPER_SCALE * data.PATCH
        ),
        batch_size=data.BATCH,
    )


def examine(case: study.Case, trials: int) -> dict[str, Any]:
    """What is true of a case, and tables of its choices in both designs, as JSON values."""
    resampled = study.Draws.resampled(trials, case.sub_batches, 2 * max(COUNTS), data.SEED)
    shuffled = study.Draws.shuffled(trials, case.sub_batches, data.SEED)
    first_half = study.Draws(shuffled.order_TN[:, : case.sub_batches // 2], case.sub_batches)
    population = study.Judge.population(case, trials)
    everything = study.paired_moments(case, np.ones((1, case.sub_batches)), unbiased=True)
    norm_sq_ref = float(everything["norm_sq"][0, case.reference])
    return {
        "best": population.best,
        "score": case.score(everything)[0].tolist(),
        "score_se": study.score_errors(case).tolist(),
        "bias_sq_relative": (everything["bias_sq"][0] / norm_sq_ref).tolist(),
        "noise_of_sub_batch_relative": float(everything["variance"][0, case.reference] / case.batch_size / norm_sq_ref),
        "resampled": tables(case, resampled, population, norm_sq_ref),
        "halves": tables(case, first_half, study.Judge.second_half(case, shuffled), norm_sq_ref),
    }


def tables(case: study.Case, draws: study.Draws, judge: study.Judge, norm_sq_ref: float) -> dict[str, Any]:
    """`curves`: estimator -> rows of CURVE for fixed allocations; `races`: rows of RACE; as far as the draws go."""
    drawn = draws.order_TN.shape[1]
    others = np.arange(len(judge.score_C)) != case.reference
    curves: dict[str, list[list[float]]] = {name: [] for name in study.ESTIMATORS}
    for name in study.ESTIMATORS:
        for count in [n for n in COUNTS if (2 * n if name == study.INDEPENDENT else n) <= drawn]:
            choice_T, bias_sq_TC = study.fixed_allocation(case, draws, name, count)
            error_C = np.sqrt(((bias_sq_TC - judge.bias_sq_TC) ** 2).mean(0))[others] / norm_sq_ref
            found = judge.quality(choice_T)
            curves[name].append([count * case.batch_size, *found.values(), float(np.median(error_C))])
    studied = rules(min(drawn, max(COUNTS)))
    counts = sorted({count for rule in studied for count in rule.looks()})
    exact, sketched = (study.looks_of(case, draws, counts, sketch=sketch) for sketch in (False, True))
    races = []
    for rule in studied:
        ended, alike = study.race(case, sketched, rule), study.race(case, exact, rule)
        samples_TC = ended.count_TC * case.batch_size
        races.append(
            [
                *asdict(rule).values(),
                float(samples_TC.mean()),
                float(samples_TC.max(1).mean()),
                float(case.costs.spent(samples_TC).mean()),
                float(case.paper_costs.spent(samples_TC).mean()),
                ended.decided,
                *judge.quality(ended.choice_T).values(),
                judge.quality(ended.choice_of_all_T)["near"],
                float((alike.choice_T == ended.choice_T).mean()),
                float(alike.count_TC.mean() * case.batch_size),
                judge.quality(alike.choice_T)["near"],
            ]
        )
    return {"curves": curves, "races": races}


def measure(work: Path, device: torch.device, replicates: Mapping[str, int], trials: int) -> dict[str, Any]:
    """Train, collect and examine; everything but the figures stays in `work`."""
    found = []
    for run, count in replicates.items():
        folder = data.make_run(run, work, device)
        data.collect(folder, count)
        for progress, step, _, grams in cases_of(folder, count):
            for criterion, metric in CRITERIA:
                case = case_of(grams, run, criterion, metric)
                found.append(
                    {
                        "run": run,
                        "progress": progress,
                        "step": step,
                        "criterion": criterion,
                        "metric": metric,
                        "sub_batches": case.sub_batches,
                        **examine(case, trials),
                    }
                )
    grid = data.new_grid()
    costs = study.Costs.of(grid, data.IMAGE_SIZE, data.PATCH)
    return {
        "device": device_text(str(device), torch.get_num_threads()),
        "date": datetime.date.today().isoformat(),
        "batch_size": data.BATCH,
        "trials": trials,
        "curve_fields": CURVE,
        "race_fields": RACE,
        "strategies": [str(strategy) for strategy in grid.strategies()],
        "units_per_sample_of_all_cells": float(costs.spent(np.ones((1, len(grid))))[0]),
        "units_per_sample_apart": float(costs.total_C.sum()),
        "cases": found,
    }


def rows(results: Mapping[str, Any]) -> list[Row]:
    """Claims, each a mean over the cases (checkpoints by criteria) of a run with the range over them."""
    found: list[Row] = []

    def add(claim: str, values: Sequence[float], unit: str, aim: str, holds: bool) -> None:
        mean, low, high = (float(f"{value:.4g}") for value in (np.mean(values), min(values), max(values)))
        low, high = min(low, mean), max(high, mean)
        device, date = results["device"], results["date"]
        found.append(Row(f"efficiency: {claim}", mean, unit, low, high, aim, holds, device, date, len(values), COMMAND))

    def at_most(claim: str, values: Sequence[float], unit: str, limit: float) -> None:
        add(claim, values, unit, f"at most {limit:g}", float(np.mean(values)) <= limit)

    for run, label in (("mixed", "mixed run"), ("none", "unaccelerated run")):
        cases = [case for case in results["cases"] if case["run"] == run]
        if not cases:
            continue

        def at(estimator: str, samples: int, field: str, some: Sequence[Mapping[str, Any]] = cases) -> list[float]:
            tables = [case["resampled"]["curves"][estimator] for case in some]
            return [dict(zip(CURVE, row, strict=True))[field] for table in tables for row in table if row[0] == samples]

        for rule in CLAIMED:
            races = [race for case in cases if (race := race_by(case["resampled"]["races"], rule))]
            most = rule.maximum * results["batch_size"]
            racing = f"race up to {most:,} per cell"
            for field, title, sign in (
                ("near", "choices within 5 % of the best score", 1),
                ("regret", "shortfall of the choice, share of the best score", -1),
            ):
                theirs, ours = at(study.INDEPENDENT, most, field), [race[field] for race in races]
                add(f"{title}, independent plug-in, {most:,} per cell ({label})", theirs, "fraction", SHOWN, True)
                holds = sign * (float(np.mean(ours)) - float(np.mean(theirs))) >= -SLACK
                aim = f"that of the independent plug-in at {most:,}, give or take {SLACK:g}"
                add(f"{title}, {racing} ({label})", ours, "fraction", aim, holds)
            claim = f"mean samples per cell of the {racing}, over {most:,} ({label})"
            at_most(claim, [race["samples"] / most for race in races], "fraction", 0.125)
            apart = most * results["units_per_sample_apart"]
            claim = f"units of the {racing}, over those of {most:,} with every pass on its own ({label})"
            at_most(claim, [race["units"] / apart for race in races], "fraction", 0.125)
            for field, convention in (("units", "token counts"), ("units_paper", "the paper's convention")):
                title = f"five checkpoints, {racing}, K = {results['batch_size']}, over 100M units, {convention}"
                shares = [CHECKPOINTS * race[field] / TRAINING_BUDGET for race in races]
                at_most(f"{title} ({label})", shares, "fraction", 0.005)
            lost = [race["near"] - race["near_of_all_cells"] for race in races]
            claim = f"{racing}: choices within 5 % lost if cells that left the race may be chosen by their last scores"
            add(f"{claim} ({label})", lost, "fraction", SHOWN, True)
            same = [race["alike_with_exact_errors"] for race in races]
            claim = f"{racing}: same choice with errors from the sketch as with exact ones"
            add(f"{claim} ({label})", same, "fraction", "at least 0.95", float(np.mean(same)) >= 0.95)
        eighth = CLAIMED[0].maximum * results["batch_size"] // 8
        for name in study.ESTIMATORS:
            title = f"choices within 5 % of the best score, {name}, {eighth:,} per cell"
            add(f"{title} ({label})", at(name, eighth, "near"), "fraction", SHOWN, True)
        errors = [at(name, eighth, "bias_sq_error") for name in (study.INDEPENDENT, study.UNBIASED)]
        ratios = [a / b for a, b in zip(*errors, strict=True)]
        claim = f"error of bias_sq, independent plug-in over unbiased paired, {eighth:,} per cell ({label})"
        add(claim, ratios, "x", "above 1 in every case", min(ratios) > 1)
        gaps = [halves - resampled for halves, resampled in zip(*both_designs(cases), strict=True)]
        claim = "choices within 5 %, disjoint halves against resampling, unbiased paired, 64 sub-batches or all"
        add(f"{claim} ({label})", gaps, "difference", "at most 0.1 either way", abs(float(np.mean(gaps))) <= 0.1)
    return found


def race_by(races: Sequence[Sequence[float]], rule: RaceRule) -> dict[str, float] | None:
    """The figures of a studied race, by name; None where this rule was not studied."""
    found = [dict(zip(RACE, row, strict=True)) for row in races]
    return next((race for race in found if all(race[name] == value for name, value in asdict(rule).items())), None)


def both_designs(cases: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Shares within 5 % by the unbiased estimator from 64 sub-batches: by halves and resampled, where both are."""
    tables = [[case[design]["curves"][study.UNBIASED] for case in cases] for design in ("halves", "resampled")]
    position = COUNTS.index(64)
    return [[table[min(position, len(tables[0][i]) - 1)][2] for i, table in enumerate(one)] for one in tables]


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample efficiency of gradient statistics.")
    parser.add_argument("--work", type=Path, default=Path("build/profile"), help="runs and gradients; may be deleted")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--replicates", type=int, help="sub-batches of a checkpoint, for both runs alike")
    parser.add_argument("--quick", action="store_true", help="16 sub-batches of one short run; writes nothing")
    options = parser.parse_args()
    device = torch.device(options.device)
    replicates = {run: options.replicates or count for run, count in REPLICATES.items()}
    if options.quick:
        data.RUNS["mixed"] = 3e3
        found = measure(options.work / "quick", device, {"mixed": 16}, 20)
        print(table([("profile", row) for row in rows(found)]))
        return
    found = measure(options.work, device, replicates, TRIALS)
    RESULT.parent.mkdir(exist_ok=True)
    write_text(RESULT, json.dumps(rounded(found)) + "\n")


def rounded(value: Any) -> Any:
    """JSON values with four significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


if __name__ == "__main__":
    main()
