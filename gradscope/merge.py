"""Cells from one cube into another: taking over a file that is there, and joining cubes measured in parts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

import numpy as np
import xarray as xr

from gradscope.cube import (
    COST_MODELS,
    DONE,
    PENDING,
    failed_names,
    grid_of,
    groups_of,
    new_cube,
    new_groups,
    score_cells,
)
from gradscope.cube_costs import keep_costs
from gradscope.errors import CubeError
from gradscope.influence import common_replicates, folded
from gradscope.races import RaceBook
from schedulers import Grid, Strategy
from schedulers.strategy import AxisValue


def copy_cells(source: xr.DataTree, cube: xr.Dataset, groups: xr.Dataset | None) -> int:
    """Copy the cells of `source` that are not pending to their places in `cube`; returns how many.

    A row's place is that of the checkpoint with the same digest and step (its progress may have changed, when the run
    went on), a cell's that of the same values on every axis. What `cube` already holds is only replaced by a
    measurement of more samples. Criteria are computed anew. Replicates of `influence` are added up where `cube` has
    room for fewer, and 0 where `source` has none. Raises CubeError when `source` holds a cell for which `cube` has no
    place.
    """
    old, grid = source.dataset, grid_of(cube)
    old_grid, child = grid_of(old), groups_of(source)
    rows = {checkpoint: t for t, checkpoint in enumerate(_checkpoints(cube))}
    copied, touched = 0, set[int]()
    for t, which in enumerate(_checkpoints(old)):
        for strategy in old_grid.strategies():
            at = (t, *old_grid.position(strategy))
            if old["status"].values[at] == PENDING:
                continue
            name = f"progress={float(old['progress'].values[t]):g}, {strategy}"
            if which not in rows:
                checkpoint = str(old["checkpoint"].values[t])
                raise CubeError(f"the checkpoint {checkpoint} of the cell {name} is gone or has changed")
            if any(strategy[axis] not in grid.axes.get(axis, ()) for axis in strategy):
                raise CubeError(f"the cell {name} has no place in the new grid")
            to = (rows[which], *grid.position(strategy))
            if _worth(old, at) > _worth(cube, to):
                _copy(old, cube, at, to, len(at))
                if groups is not None and child is not None:
                    _copy(child, groups, at, to, len(at))
                copied += 1
                touched.add(to[0])
    for t in touched:  # the reference may have come from one file and its rivals from another
        score_cells(cube, t)
    return copied


def _checkpoints(cube: xr.Dataset) -> list[tuple[str, int]]:
    return [(str(d), int(s)) for d, s in zip(cube["checkpoint_sha256"].values, cube["step"].values, strict=True)]


def _worth(cube: xr.Dataset, at: tuple[int, ...]) -> tuple[bool, int, int]:
    """Orders what a cell may hold: pending, failed, done with few samples, done with many."""
    status = int(cube["status"].values[at])
    return status == DONE, int(cube["n_samples"].values[at]), status


def merge_cubes(trees: Sequence[xr.DataTree]) -> tuple[xr.Dataset, xr.Dataset | None]:
    """Join cubes of one task measured in parts (other checkpoints, other strategies) into one.

    Where two hold a cell, the one with more samples counts; of measured costs, the first cube's that has the strategy
    (those measured elsewhere are left out). Raises CubeError when their tasks, seeds, K, metrics, references or
    parameter groups differ, or when they hold different checkpoints at one progress.
    """
    cubes = [tree.to_dataset() for tree in trees]
    first = cubes[0]
    for cube in cubes[1:]:
        for name in ("task_digest", "seed", "batch_size", "reference", "beta", "engine", "precision"):
            if cube.attrs.get(name) != first.attrs.get(name):
                raise CubeError(
                    f"the cubes differ in {name} ({first.attrs.get(name)} and {cube.attrs.get(name)}); "
                    "only cubes of one profile can be merged"
                )
        if list(cube["metric"].values) != list(first["metric"].values):
            raise CubeError("the cubes were measured in different metrics; only cubes of one profile can be merged")
    grids = [grid_of(cube) for cube in cubes]
    axes = {axis: _joined_values([grid.axes[axis] for grid in grids]) for axis in grids[0].axes}
    grid = Grid(axes, grids[0].reference, grids[0].units)
    points: dict[float, tuple[float, int, str, str]] = {}
    for cube in cubes:
        columns = [cube[name].values for name in ("progress", "step", "checkpoint", "checkpoint_sha256")]
        for progress, step, checkpoint, digest in zip(*columns, strict=True):
            row = (float(progress), int(step), str(checkpoint), str(digest))
            if points.setdefault(round(row[0], 12), row)[3] != row[3]:
                raise CubeError(
                    f"the cubes hold different checkpoints at progress {row[0]:g}; merge one run's cubes only"
                )
    rows = [points[key] for key in sorted(points)]
    costs: dict[str, dict[Strategy, float]] = {model: {} for model in COST_MODELS}
    tokens: dict[str, dict[Strategy, int]] = {}
    for cube, part in zip(cubes, grids, strict=True):
        for strategy in part.strategies():
            at = part.position(strategy)
            for i, model in enumerate(COST_MODELS):
                if np.isfinite(cube["cost"].values[(i, *at)]):
                    costs[model][strategy] = float(cube["cost"].values[(i, *at)])
            for variable in map(str, cube.data_vars):
                if variable.startswith("tokens_"):
                    lengths = tokens.setdefault(variable.removeprefix("tokens_"), {})
                    lengths[strategy] = int(cube[variable].values[at])
    merged = new_cube(
        grid,
        progress=[row[0] for row in rows],
        steps=[row[1] for row in rows],
        names=[row[2] for row in rows],
        digests=[row[3] for row in rows],
        metrics=[str(name) for name in first["metric"].values],
        costs=costs,
        tokens=tokens,
        attributes={
            **{k: v for k, v in first.attrs.items() if k not in ("schema_version", "reference")},
            **_joined_attributes(cubes),
        },
        replicates=common_replicates(cubes, 1),
    )
    children = [child for tree in trees if (child := groups_of(tree)) is not None]
    names = [[str(name) for name in child["param_group"].values] for child in children]
    if any(other != names[0] for other in names):
        raise CubeError("the cubes have different parameter groups; only cubes of one profile can be merged")
    groups = new_groups(merged, names[0]) if names else None
    for tree in trees:
        copy_cells(tree, merged, groups)
        keep_costs(tree.dataset, merged)
    failed, told = failed_names(merged), json.loads(merged.attrs["failures_json"])
    merged.attrs["failures_json"] = json.dumps({name: why for name, why in told.items() if name in failed})
    return merged, groups


def _joined_values(parts: Sequence[tuple[AxisValue, ...]]) -> tuple[AxisValue, ...]:
    """The values of an axis: in the order of the part that has all of them, else numbers sorted and texts as met."""
    values = tuple(dict.fromkeys(value for part in parts for value in part))
    whole = next((part for part in parts if len(part) == len(values)), None)
    if whole is not None:
        return whole
    return values if any(isinstance(value, str) for value in values) else tuple(sorted(values))


def _joined_attributes(cubes: Sequence[xr.Dataset]) -> dict[str, str | float]:
    """What the parts' profiles spent, failed at and remember of their races, together."""
    book, failures = RaceBook(), dict[str, str]()
    for cube in cubes:
        book.join(RaceBook.read(cube.attrs.get("races_json", "{}")))
        failures |= json.loads(cube.attrs.get("failures_json", "{}"))
    units = sum(float(cube.attrs.get("units", 0.0)) for cube in cubes)
    return {
        "races_json": book.text(),
        "failures_json": json.dumps(failures),
        "units": units,
        "profile_command": _joined_command([str(cube.attrs.get("profile_command", "")) for cube in cubes]),
    }


def _joined_command(commands: Sequence[str]) -> str:
    """The command that profiles the joined cube: the parts' own without their `--out`, "" where these differ."""
    found = set[str]()
    for command in commands:
        try:
            words = shlex.split(command)
        except ValueError:  # edited by hand
            return ""
        if "--out" in words:
            at = words.index("--out")
            del words[at : at + 2]
        found.add(shlex.join(words))
    return found.pop() if len(found) == 1 else ""


def _copy(source: xr.Dataset, target: xr.Dataset, at: tuple[int, ...], to: tuple[int, ...], depth: int) -> None:
    for name, variable in target.data_vars.items():
        if name in source and variable.dims[0] == "progress" and variable.ndim >= depth:
            value = source[name].transpose(*variable.dims).values[at]
            if name == "influence":
                value = folded(value, target.sizes["replicate"])
            variable.values[to] = str(value) if variable.dtype == object else value
    if "influence" in target and "influence" not in source:
        target["influence"].values[to] = 0
