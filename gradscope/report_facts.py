"""What a report says first, as JSON values: the best strategies, what is predicted, what is uncertain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.plots._view import (
    DONE,
    FAILED,
    Best,
    CubeView,
    Variable,
    best_strategies,
    criteria_of,
    default_metric,
    metrics_of,
    near_zero,
    read_view,
    root_dataset,
    untrained_strategies,
    variable,
)
from schedulers.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr

    from schedulers.schedule import Schedule, Stage

Facts = dict[str, Any]

THIS = "the one shown"  # what a run followed that followed the schedule of the report
SURE = 0.95  # probability of a stage's strategy from which on it counts as decided


@dataclass(frozen=True)
class Shown:
    """A cube with the metric and the criterion that lead a report."""

    dataset: xr.Dataset
    view: CubeView
    metric: str
    criterion: str

    @classmethod
    def of(cls, cube: xr.DataTree | xr.Dataset, schedule: Schedule | None) -> Shown:
        """Those of the schedule where the cube has them, else the cube's default metric and `descent`.

        Raises UsageError for a cube without any criterion.
        """
        dataset = root_dataset(cube)
        names = [found.short for found in criteria_of(dataset)]
        if not names:
            raise UsageError("cube: it holds no criterion; profile it with this version")
        metric, criterion = (schedule.metric, schedule.criterion) if schedule else (None, None)
        if metric is None or metric not in metrics_of(dataset):
            metric = default_metric(dataset)
        if criterion is None or criterion not in names:
            criterion = "descent" if "descent" in names else names[0]
        return cls(dataset, read_view(dataset, metric=metric), metric, criterion)

    @property
    def variable(self) -> Variable:
        return variable(self.dataset, self.criterion)

    def costs(self, cost_model: str) -> CubeView | None:
        """The view in a schedule's cost model, None where the cube does not have it."""
        known = "cost" in self.dataset and cost_model in self.dataset["cost_model"].values
        return read_view(self.dataset, metric=self.metric, cost_model=cost_model) if known else None


def report_facts(
    shown: Shown | None, schedule: Schedule | None, table: Sequence[Mapping[str, str | float]] | None
) -> Facts:
    """The facts of a report, JSON values; parts that the report lacks are left out.

    `profile`: what was measured. `best`: at each progress the best of the strategies `compared` by the leading
    criterion (None where there is none), those `as_good` within two standard errors, and whether it is `decided`: False
    where others are as good, None where only one was measured or standard errors are not known. `gain` is the ratio of
    its score to the reference's, None where two standard errors do not tell the two, or one of them and zero, apart.
    `schedule`: what its budget pays for and what is predicted of it; `unlike_best`: in how many stages it runs another
    strategy than the best of the nearest point measured, None where its stages have no progress in this cube.
    `uncertain`: counts of what is not settled. `results`: `table`.
    """
    facts: Facts = {}
    if shown:
        facts |= {"profile": _profile(shown), "best": _best(shown)}
    if schedule:
        facts["schedule"] = _schedule(schedule, shown)
        if shown:
            facts["schedule"]["unlike_best"] = _unlike_best(schedule, shown, facts["best"])
    if shown:
        facts["uncertain"] = _uncertain(shown, facts["best"], schedule)
    if table:
        facts["results"] = [dict(row) for row in table]
    return facts


def _profile(shown: Shown) -> Facts:
    view = shown.view
    done, failed = int((view.status == DONE).sum()), int((view.status == FAILED).sum())
    return {
        "strategies": len(view.grid), "progress": [float(p) for p in view.progress],
        "cells": {"all": view.status.size, "measured": done, "failed": failed,
                  "pending": view.status.size - done - failed},
        "reference": str(view.grid.reference), "cost_model": view.cost_model,
        "metric": shown.metric, "criterion": shown.criterion, "better": shown.variable.better,
    }  # fmt: skip


def _best(shown: Shown) -> list[Facts | None]:
    found = best_strategies(shown.view, shown.variable)
    return [None if best is None else _best_at(t, best, shown) for t, best in enumerate(found)]


def _best_at(t: int, best: Best, shown: Shown) -> Facts:
    view, name, winner, reference = shown.view, shown.variable.name, best.winner, shown.view.grid.reference
    values, errors = view.values(name)[t], view.errors(name)[t]
    compared = np.isfinite(values)
    decided = not best.rivals if int(compared.sum()) > 1 and bool(np.isfinite(errors[compared]).all()) else None
    home = view.grid.position(reference)
    told = winner.strategy == reference or all(rival.strategy != reference for rival in best.rivals)
    doubtful = near_zero(values, errors)
    clear = told and decided is not None and not (doubtful[home] or doubtful[best.position])
    gain = _gain(winner.value, float(values[home]), shown.variable.better) if clear else None
    return {
        "progress": float(view.progress[t]),
        "strategy": str(winner.strategy),
        "value": winner.value,
        "se": winner.error if math.isfinite(winner.error) else None,
        "gain": gain,
        "compared": int(compared.sum()),
        "as_good": [str(rival.strategy) for rival in best.rivals],
        "decided": decided,
    }


def _gain(value: float, reference: float, better: str) -> float | None:
    """How many times better, by the criterion; None where that is no finite number above 0."""
    above, below = (value, reference) if better == "higher" else (reference, value)
    gain = above / below if above > 0 and below > 0 else math.nan
    return gain if math.isfinite(gain) else None


def _schedule(schedule: Schedule, shown: Shown | None) -> Facts:
    facts: Facts = {
        "budget": schedule.budget,
        "samples": None if schedule.budget is None else schedule.total_samples,
        "units_per_sample": schedule.cost,
        "times_the_samples": times_the_samples(schedule, shown.costs(schedule.cost_model) if shown else None),
        "stages": [_stage(stage) for stage in schedule.stages],
        "predicted": {name: value for name, value in schedule.predicted.items() if not isinstance(value, list | dict)},
    }
    sure = [stage.probability for stage in schedule.stages if stage.probability is not None]
    return facts | {"unsure_stages": sum(p < SURE for p in sure)}


def _unlike_best(schedule: Schedule, shown: Shown, best: Sequence[Facts | None]) -> int | None:
    from gradscope.cube import digest_of

    if (schedule.criterion, schedule.metric, schedule.cube_digest) != (
        shown.criterion, shown.metric, digest_of(shown.dataset),
    ):  # fmt: skip
        return None
    count = 0
    for stage in schedule.stages:
        span = stage.progress or ((stage.start, stage.end) if schedule.progress_mode == "fraction" else None)
        if span is None:
            return None
        near = best[int(np.abs(shown.view.progress - sum(span) / 2).argmin())]
        most = max(stage.mixture, key=lambda entry: entry[1])[0]
        count += near is not None and near["strategy"] != str(most)
    return count


def times_the_samples(schedule: Schedule, view: CubeView | None) -> float | None:
    """Samples that the schedule's budget pays for over those of the reference; None where its cost is not known.

    `view` is a cube's in the schedule's cost model.
    """
    if view is None or view.cost_model != schedule.cost_model:
        return None
    reference = float(view.cost[view.grid.position(view.grid.reference)])
    return reference / schedule.cost if math.isfinite(reference) else None


def _stage(stage: Stage) -> Facts:
    return {
        "start": stage.start,
        "end": stage.end,
        "mixture": {str(strategy): weight for strategy, weight in stage.mixture if weight > 0},
        "units_per_sample": stage.cost,
        "probability": stage.probability,
        "regret": stage.regret,
    }


def _uncertain(shown: Shown, best: Sequence[Facts | None], schedule: Schedule | None) -> Facts:
    from gradscope.cube import digest_of

    view, name = shown.view, shown.variable.name
    values, errors = view.values(name), view.errors(name)
    untrained = untrained_strategies(shown.dataset)
    return {
        "undecided": [one["progress"] for one in best if one is not None and one["decided"] is False],
        "unknown": [one["progress"] for one in best if one is not None and one["decided"] is None],
        "undefined": [
            float(view.progress[t]) for t in range(len(best)) if best[t] is None and (view.status[t] == DONE).any()
        ],
        "near_zero": int(near_zero(values, errors).sum()),
        "untrained": None if untrained is None else [str(strategy) for strategy in untrained],
        "other_cube": bool(schedule and schedule.cube_digest and schedule.cube_digest != digest_of(shown.dataset)),
    }
