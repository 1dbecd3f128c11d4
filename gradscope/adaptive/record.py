"""The probes of an online run as a cube: one point of progress a probe, so that `gradscope plot` shows them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr

from gradscope.adaptive.probe import Probe
from gradscope.cube import FAILED, groups_of, new_groups, open_cube, put_cell, save_cube
from gradscope.measuring import Conditions
from gradscope.pilot import stages_json
from gradscope.profile_cube import SAVE_SECONDS, SAVE_SHARE, TERMS, empty_cube
from gradscope.task import Checkpoint, Task, task_digest
from schedulers import Strategy

if TYPE_CHECKING:
    from gradscope.adaptive.controller import AdaptiveController


class ProbeRows:
    """The rows of a run's cube, and its file, which is written whole: at most a 50th of the time goes on that."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[tuple[xr.Dataset, xr.Dataset]] | None = None
        self._saved, self._took = -math.inf, 0.0

    def add(self, controller: AdaptiveController, step: int, probe: Probe) -> None:
        """Add a probe made after `step`, and write the file if that is due."""
        before = self._known(controller, step)
        self._rows = [*before, _row(controller, step, probe)]
        if time.monotonic() - self._saved >= max(SAVE_SECONDS, SAVE_SHARE * self._took):
            self.save(controller)

    def save(self, controller: AdaptiveController) -> None:
        """Write the file; of a run that was continued and has made no probe since, bring it up to date."""
        begun = time.monotonic()
        self._rows = self._known(controller, controller.step)
        if not self._rows:
            return
        cube, groups = (_joined([row[i] for row in self._rows]) for i in (0, 1))
        failures = [json.loads(row[0].attrs["failures_json"]) for row in self._rows]
        cube.attrs = {
            **self._rows[-1][0].attrs,
            "created_at": self._rows[0][0].attrs["created_at"],
            "failures_json": json.dumps({name: why for part in failures for name, why in part.items()}),
            **_of_run(controller),
        }
        save_cube(cube, groups, self.path)
        self._saved = time.monotonic()
        self._took = self._saved - begun

    def _known(self, controller: AdaptiveController, step: int) -> list[tuple[xr.Dataset, xr.Dataset]]:
        """The rows before `step`: at first those of the file, where they are of this run, which was continued."""
        if self._rows is not None:
            return self._rows
        steps = {record.step for record in controller.probes if record.step < step}
        stored = _stored(self.path, task_digest(_untrained(controller.task)))  # refuses a file that is no cube
        metrics = list(controller._conduct.metrics)
        return [
            row
            for row in stored
            if int(row[0]["step"][0]) in steps and [str(name) for name in row[0]["metric"].values] == metrics
        ]


def _stored(path: Path, task: str) -> list[tuple[xr.Dataset, xr.Dataset]]:
    """The rows of a cube's file, one point of progress each; none of another task's, or where there is no file."""
    if not path.exists():
        return []
    tree = open_cube(path)
    cube, groups = tree.to_dataset(), groups_of(tree)
    if cube.attrs.get("task_digest") != task or groups is None:
        return []
    failures = json.loads(cube.attrs["failures_json"])
    rows = []
    for i, progress in enumerate(cube["progress"].values):
        row = cube.isel(progress=[i])
        mine = {name: why for name, why in failures.items() if name.startswith(f"progress={float(progress):g},")}
        row.attrs = {**cube.attrs, "failures_json": json.dumps(mine)}
        rows.append((row, groups.isel(progress=[i])))
    return rows


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
        "batch_size": controller.policy.batch_size,
        "stages": stages_json(schedule),
    }
    return {"training_json": json.dumps(training), "units": controller.probe_units}


def _joined(rows: list[xr.Dataset]) -> xr.Dataset:
    joined: xr.Dataset = xr.concat(
        rows, dim="progress", data_vars="minimal", coords="minimal", compat="override", join="override",
        combine_attrs="override",
    )  # fmt: skip
    return joined


def _untrained(task: Task) -> Task:
    """The task without what it knows of a folder of checkpoints: there is none."""
    bare = copy.copy(task)
    object.__setattr__(bare, "training", lambda folder: {})
    return bare
