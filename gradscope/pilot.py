"""How the profiled checkpoints were trained, as a task tells it and a cube remembers it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gradscope.errors import CubeError
from schedulers import Schedule, ScheduleError, Stage, Strategy

if TYPE_CHECKING:
    import xarray as xr


def training_of(cube: xr.Dataset) -> dict[str, Any]:
    """A cube's `training_json`, what `Task.training` said. Raises CubeError when it is damaged."""
    try:
        return dict(json.loads(cube.attrs.get("training_json", "{}")))
    except (TypeError, ValueError) as error:
        raise CubeError("the cube's attribute training_json is damaged; profile again with --overwrite") from error


def pilot_of(training: Mapping[str, Any]) -> tuple[Stage, ...] | None:
    """The stages under which checkpoints were trained, None when unknown. Raises CubeError for damaged ones."""
    try:
        return read_stages(training.get("stages"))
    except ScheduleError as error:
        raise CubeError(f"the cube's attribute training_json: {error}; profile again with --overwrite") from error


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
