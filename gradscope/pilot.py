"""How the profiled checkpoints were trained, as a task tells it and a cube remembers it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradscope.errors import CubeError
from schedulers import Grid, Profile, Schedule, ScheduleError, Stage, Strategy

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr
    from numpy.typing import NDArray


def training_of(cube: xr.Dataset) -> dict[str, Any]:
    """A cube's `training_json`, what `Task.training` said. Raises CubeError when it is damaged."""
    try:
        return dict(json.loads(cube.attrs.get("training_json", "{}")))
    except (TypeError, ValueError) as error:
        raise CubeError("the cube's attribute training_json is damaged; profile again with --overwrite") from error


def pilot_of(training: Mapping[str, Any], grid: Grid) -> tuple[tuple[Stage, ...] | None, float | None]:
    """Stages under which a cube's checkpoints were trained, and the budget: `read_training`, raising CubeError."""
    try:
        return read_training(training, grid)
    except ScheduleError as error:
        raise CubeError(f"the cube's attribute training_json: {error}; profile again with --overwrite") from error


def read_training(training: Mapping[str, Any], grid: Grid) -> tuple[tuple[Stage, ...] | None, float | None]:
    """`stages` and `budget` (units by `Task.cost`) of what `Task.training` said, None where it said nothing.

    Raises ScheduleError, naming the field, for stages that make no schedule or lie on other axes than the grid's, and
    for a budget that is no positive number.
    """
    stages, budget = read_stages(training.get("stages")), training.get("budget")
    if stages is not None and set(stages[0].strategy) != set(grid.axes):
        raise ScheduleError(f"stages: {stages[0].strategy} has other axes than the grid ({', '.join(grid.axes)})")
    if budget is None:
        return stages, None
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= sys.float_info.max:
        raise ScheduleError(f"budget: {budget!r} must be a positive number of units")
    return stages, float(budget)


def budget_in(
    budget: float | None,
    stages: Sequence[Stage] | None,
    grid: Grid,
    tokens: NDArray[np.float64],
    cost: NDArray[np.float64],
) -> float | None:
    """The budget T of a run, counted in `tokens` (C,) per sample, in another cost model's units `cost` (C,).

    T' = Σ over stages (end − start) · T / C_tokens · C_cost, C of a stage the mean by its mixture's weights: what the
    same samples cost there. A run whose stages are not known counts as the reference throughout. None when the budget
    is not known, or a strategy that the run trained under is off the grid or has no cost. The progress of checkpoints
    stays the share of T by tokens at which they were taken, whatever the cost model: it is their label.
    """
    names = grid.strategies()
    ran = stages or (Stage(0.0, 1.0, ((grid.reference, 1.0),), 1.0),)
    mixtures = [[(strategy, weight) for strategy, weight in stage.mixture if weight > 0] for stage in ran]
    if budget is None or any(strategy not in names for mixture in mixtures for strategy, _ in mixture):
        return None
    total = 0.0
    for stage, mixture in zip(ran, mixtures, strict=True):
        by_tokens, by_cost = (sum(w * float(table[names.index(s)]) for s, w in mixture) for table in (tokens, cost))
        total += (stage.end - stage.start) * budget / by_tokens * by_cost
    return total if math.isfinite(total) else None


def pilot_note(profile: Profile) -> str:
    """A line that tells how progress is counted where the profiled run trained under strategies off this grid, or "".

    Also where the run's own costs are not known under the profile's cost model, so that its budget is not, either.
    """
    ran = dict.fromkeys(s for stage in profile.pilot or () for s, weight in stage.mixture if weight > 0)
    names = profile.grid.strategies()
    off = [strategy for strategy in ran if strategy not in names]
    if off:
        counts = "as if it had trained under its others alone" if len(off) < len(ran) else "as if without acceleration"
        units = _unknown_units(profile)
        return (
            f"the profiled run trained under strategies off this grid ({_some(off)}); its progress is counted {counts}"
            f"{units}; profile a grid that holds them"
        )
    unknown = [s for s in ran or (profile.grid.reference,) if math.isnan(profile.cost[names.index(s)])]
    if unknown and profile.reference_budget is None:
        return (
            f"the profiled run trained under {_some(unknown)}, without known cost in the model {profile.cost_model}"
            f"{_unknown_units(profile)}; measure all of its grid"
        )
    return ""


def _unknown_units(profile: Profile) -> str:
    if profile.reference_budget is not None:
        return ""
    return f", and its budget in units of the cost model {profile.cost_model} is not known"


def _some(strategies: Sequence[Strategy]) -> str:
    more = f" and {len(strategies) - 3} more" if len(strategies) > 3 else ""
    return ", ".join(map(str, strategies[:3])) + more


def stages_json(schedule: Schedule) -> list[dict[str, Any]]:
    """A schedule's stages as `Task.training` gives them, [{"start", "end", "cost", "mixture"}, ...].

    `mixture` is [[{axis: value}, weight], ...].
    """
    return [
        {
            "start": stage.start,
            "end": stage.end,
            "cost": stage.cost,
            "mixture": [[dict(strategy), weight] for strategy, weight in stage.mixture],
        }
        for stage in schedule.stages
    ]


def read_stages(values: Any) -> tuple[Stage, ...] | None:
    """The inverse of `stages_json`, None for None. Raises ScheduleError, naming the field, for anything else."""
    if values is None:
        return None
    try:
        stages = tuple(
            Stage(
                start=float(value["start"]),
                end=float(value["end"]),
                mixture=tuple((Strategy(strategy), float(weight)) for strategy, weight in value["mixture"]),
                cost=float(value["cost"]),
            )
            for value in values
        )
    except KeyError as error:
        raise ScheduleError(f"stages: one has no {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ScheduleError(f"stages: {error}") from error
    return Schedule(stages=stages).stages
