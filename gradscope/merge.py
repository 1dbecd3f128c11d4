"""Cells from one cube into another: taking over a file that is there, and joining cubes measured in parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from gradscope.cube import COST_MODELS, DONE, PENDING, grid_of, groups_of, new_cube, new_groups
from gradscope.errors import CubeError
from schedulers import Grid, Strategy


def copy_cells(
    source: xr.DataTree, cube: xr.Dataset, groups: xr.Dataset | None, *, keys: Sequence[str] | None = None
) -> int:
    """Copy the cells of `source` that are not pending to the same labels of `cube`; returns how many.

    With `keys`, one for each progress point of `cube`, a cell with another key is out of date and left behind.
    Raises CubeError when `source` holds a cell for which `cube` has no place.
    """
    old, grid, old_grid = source.dataset, grid_of(cube), grid_of(source.dataset)
    child = groups_of(source)
    copied = 0
    for t, progress in enumerate(old["progress"].values):
        match = np.flatnonzero(np.abs(cube["progress"].values - progress) < 1e-9)
        for strategy in old_grid.strategies():
            at = (t, *old_grid.position(strategy))
            if old["status"].values[at] == PENDING:
                continue
            if not match.size or any(strategy[axis] not in grid.axes.get(axis, ()) for axis in strategy):
                raise CubeError(f"the cell progress={progress:g}, {strategy} has no place in the new grid")
            to = (int(match[0]), *grid.position(strategy))
            if keys is not None and old["cell_key"].values[at] != keys[to[0]]:
                continue
            _copy(old, cube, at, to, len(at))
            cube["checkpoint_sha256"].values[to[0]] = str(old["checkpoint_sha256"].values[t])
            if groups is not None and child is not None:
                _copy(child, groups, at, to, len(at))
            copied += 1
    return copied


def merge_cubes(trees: Sequence[xr.DataTree]) -> tuple[xr.Dataset, xr.Dataset | None]:
    """Join cubes of one task measured in parts (other checkpoints, other strategies) into one.

    Raises CubeError when their tasks, seeds, K, metrics or references differ, or when two hold
    different numbers for one cell.
    """
    cubes = [tree.to_dataset() for tree in trees]
    first = cubes[0]
    for cube in cubes[1:]:
        for name in ("task_digest", "seed", "batch_size", "reference", "beta"):
            if cube.attrs.get(name) != first.attrs.get(name):
                raise CubeError(
                    f"the cubes differ in {name} ({first.attrs.get(name)} and {cube.attrs.get(name)}); "
                    "only cubes of one profile can be merged"
                )
        if list(cube["metric"].values) != list(first["metric"].values):
            raise CubeError("the cubes were measured in different metrics; only cubes of one profile can be merged")
    grids = [grid_of(cube) for cube in cubes]
    axes = {axis: tuple(dict.fromkeys(value for grid in grids for value in grid.axes[axis])) for axis in grids[0].axes}
    axes = {
        axis: tuple(sorted(values)) if all(not isinstance(v, str) for v in values) else values
        for axis, values in axes.items()
    }
    grid = Grid(axes, grids[0].reference, grids[0].units)
    points = {
        round(float(p), 12): (float(p), int(s), str(c))
        for cube in cubes
        for p, s, c in zip(cube["progress"].values, cube["step"].values, cube["checkpoint"].values, strict=True)
    }
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
        metrics=[str(name) for name in first["metric"].values],
        costs=costs,
        tokens=tokens,
        attributes={k: v for k, v in first.attrs.items() if k not in ("schema_version", "reference")},
    )
    child = next((groups for tree in trees if (groups := groups_of(tree)) is not None), None)
    groups = None if child is None else new_groups(merged, [str(name) for name in child["param_group"].values])
    for tree in trees:
        _check_agreement(tree.dataset, merged)
        copy_cells(tree, merged, groups)
    return merged, groups


def _check_agreement(old: xr.Dataset, merged: xr.Dataset) -> None:
    old_grid, grid = grid_of(old), grid_of(merged)
    for t, progress in enumerate(old["progress"].values):
        to_t = int(np.argmin(np.abs(merged["progress"].values - progress)))
        for strategy in old_grid.strategies():
            at, to = (t, *old_grid.position(strategy)), (to_t, *grid.position(strategy))
            both = old["status"].values[at] == DONE and merged["status"].values[to] == DONE
            if both and old["cell_key"].values[at] != merged["cell_key"].values[to]:
                raise CubeError(
                    f"two cubes hold different measurements of progress={progress:g}, {strategy}; leave one of them out"
                )


def _copy(source: xr.Dataset, target: xr.Dataset, at: tuple[int, ...], to: tuple[int, ...], depth: int) -> None:
    for name, variable in target.data_vars.items():
        if name in source and variable.dims[0] == "progress" and variable.ndim >= depth:
            value = source[name].transpose(*variable.dims).values[at]
            variable.values[to] = str(value) if variable.dtype == object else value
