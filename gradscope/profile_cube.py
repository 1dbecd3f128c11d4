"""The cube of a profile before anything is measured: labels, costs and provenance of a task's run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import xarray as xr

from gradscope.cube import new_cube
from gradscope.measuring import Conditions
from gradscope.task import Checkpoint, Task, task_digest
from schedulers import Strategy
from schedulers.schedule import library_version


def empty_cube(
    task: Task, folder: Path, checkpoints: Sequence[Checkpoint], digests: Sequence[str], given: Conditions
) -> xr.Dataset:
    """Every cell of `task.grid` at every checkpoint, pending; `digests` are those of the checkpoint files."""
    grid = task.grid
    strategies = grid.strategies()
    costs: dict[str, dict[Strategy, float]] = {"tokens": {s: task.cost(s) for s in strategies}}
    tokens: dict[str, dict[Strategy, int]] = {}
    for strategy in strategies:
        for model, value in task.other_costs(strategy).items():
            costs.setdefault(model, {})[strategy] = value
        for name, length in task.tokens(strategy).items():
            tokens.setdefault(name, {})[strategy] = length
    described = task.describe()
    return new_cube(
        grid,
        progress=[checkpoint.progress for checkpoint in checkpoints],
        steps=[checkpoint.step for checkpoint in checkpoints],
        names=[checkpoint.path.name for checkpoint in checkpoints],
        digests=digests,
        metrics=given.metrics,
        costs=costs,
        tokens=tokens,
        attributes={
            "Conventions": "CF-1.11",
            "title": "Cost-adjusted bias and variance of accelerated gradients",
            "source": "gradscope profile",
            "references": "Accelerating Augmentation Invariance Pretraining, NeurIPS 2024",
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "creation_library": "gradscope",
            "creation_library_version": library_version(),
            "creation_library_language": "Python",
            "history": f"{datetime.now(UTC):%Y-%m-%d} gradscope {' '.join(sys.argv[1:2])}".rstrip(),
            "task_digest": task_digest(task),
            "config_json": json.dumps(described, sort_keys=True),
            "training_json": json.dumps(dict(task.training(folder))),
            "failures_json": "{}",
            "batch_size": given.batch_size,
            "beta": given.batch_size * task.cost(grid.reference),
            "seed": given.seed,
            "engine": "",
            "precision": given.precision,
            "races_json": "{}",
            "torch_version": str(torch.__version__),
            "device_name": _device_name(task),
        },
    )


def _device_name(task: Task) -> str:
    device = getattr(task, "device", None)
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu"
