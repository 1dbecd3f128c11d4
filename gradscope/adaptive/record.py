"""The probes of an online run as a cube: one point of progress a probe, so that `gradscope plot` shows them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from gradscope.adaptive.probe import Probe
from gradscope.cube import FAILED, groups_of, new_groups, open_cube, put_cell, save_cube
from gradscope.measuring import Conditions
from gradscope.pilot import stages_json
from gradscope.profile_cube import TERMS, empty_cube
from gradscope.task import Checkpoint, Task, task_digest
from schedulers import Strategy

if TYPE_CHECKING:
    from gradscope.adaptive.controller import AdaptiveController


def add_row(path: Path, controller: AdaptiveController, step: int, probe: Probe) -> None:
    """Add a probe made after `step` to the cube at `path`, which is written whole.

    Rows of later steps, of a run that was continued from before them, are dropped.
    """
    cube, groups = _row(controller, step, probe)
    if path.exists():
        old = open_cube(path)
        before, before_groups = old.to_dataset(), groups_of(old)
        kept = np.flatnonzero((before["step"].values < step) & (before["progress"].values < controller.fraction))
        if len(kept) and before.attrs.get("task_digest") == cube.attrs["task_digest"] and before_groups is not None:
            failures = {**json.loads(before.attrs["failures_json"]), **json.loads(cube.attrs["failures_json"])}
            attributes = {**before.attrs, **cube.attrs, "created_at": before.attrs["created_at"]}
            cube = _joined(before.isel(progress=kept), cube)
            groups = _joined(before_groups.isel(progress=kept), groups)
            cube.attrs = {**attributes, "failures_json": json.dumps(failures)}
    save_cube(cube, groups, path)


def refresh(path: Path, controller: AdaptiveController) -> None:
    """Bring what a cube says of the whole run up to date: its schedule, and what probes cost."""
    if not path.exists():
        return
    old = open_cube(path)
    cube = old.to_dataset()
    cube.attrs |= _of_run(controller)
    save_cube(cube, groups_of(old), path)


def _row(controller: AdaptiveController, step: int, probe: Probe) -> tuple[xr.Dataset, xr.Dataset]:
    task, conduct, policy = controller.task, controller._conduct, controller.policy
    fraction = controller.fraction
    here = Checkpoint(Path(f"online-step-{step:08d}"), step, fraction)
    digest = hashlib.sha256(f"{task_digest(task)}:{conduct.seed}:{step}".encode()).hexdigest()
    conditions = Conditions(conduct.sub_batch, conduct.seed, conduct.metrics, probe.engine, conduct.precision)
    cube = empty_cube(_untrained(task), Path(), [here], [digest], conditions, policy.rule.maximum)
    groups = new_groups(cube, probe.groups)
    failures: dict[Strategy, str] = {s: why for s, why in probe.failures.items() if s not in probe.found}
    for strategy, found in probe.found.items():
        put_cell(cube, groups, (0, *task.grid.position(strategy)), found, key=digest[:16])
    for strategy in failures:
        cube["status"].values[(0, *task.grid.position(strategy))] = FAILED
    cube.attrs |= {
        "source": "gradscope online",
        "history": "measured while training ran",
        "engine": probe.engine,
        "term": TERMS[probe.engine == "subbatch"],
        "failures_json": json.dumps({f"progress={fraction:g},{s}": why for s, why in failures.items()}),
        "profile_command": "",
        **_of_run(controller),
    }
    return cube, groups


def _of_run(controller: AdaptiveController) -> dict[str, str | float]:
    schedule = controller.schedule()
    training = {
        "schedule": "online",
        "strategies": [str(s) for s in schedule.strategies],
        "budget": controller.budget,
        "stages": stages_json(schedule),
    }
    return {"training_json": json.dumps(training), "units": controller.probe_units}


def _joined(before: xr.Dataset, after: xr.Dataset) -> xr.Dataset:
    joined: xr.Dataset = xr.concat(
        [before, after], dim="progress", data_vars="minimal", coords="minimal", compat="override", join="override",
        combine_attrs="override",
    )  # fmt: skip
    return joined


def _untrained(task: Task) -> Task:
    """The task without what it knows of a folder of checkpoints: there is none."""
    import copy

    bare = copy.copy(task)
    object.__setattr__(bare, "training", lambda folder: {})
    return bare
