"""Measured costs in a cube: `seconds`, `flops` and `memory` per sample over the grid, and the cost model `measured`.

All of one cube are of one device, number of threads, batch size and model (`source`), which `measured_json` tells.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from gradscope.errors import CubeError
from schedulers import Strategy

MEASURED = {
    "seconds": ("seconds per sample of a training step", "s"),
    "flops": ("floating-point operations per sample of loss and backward pass", "1"),
    "memory": ("bytes per sample kept for the backward pass", "byte"),
}
SAME = ("device", "threads", "batch_size", "source")  # what costs must share to stand in one cube


def add_measured(cube: xr.Dataset, axes: Sequence[str]) -> None:
    """Make room for measured costs: NaN over `axes`, and an empty `measured_json`."""
    for name, (title, unit) in MEASURED.items():
        shape = tuple(cube.sizes[axis] for axis in axes)
        cube[name] = (tuple(axes), np.full(shape, np.nan), {"long_name": title, "units": unit})
    cube.attrs["measured_json"] = "{}"


def put_costs(cube: xr.Dataset, values: Mapping[str, Mapping[Strategy, float]], about: Mapping[str, Any]) -> xr.Dataset:
    """`cube` with measured costs beside what it held of them, or in their place where the conditions (SAME) differ.

    `values`: per name of MEASURED; `about`: the conditions, JSON values. `cost` of the model `measured` becomes
    C_tokens(reference) · seconds / seconds(reference). Raises CubeError for a strategy that is not on its grid.
    """
    axes, about, held = _axes(cube), dict(about), _held(cube)
    kept = bool(held) and _same(held, about)
    cube = cube.copy(deep=True)
    if not kept:
        add_measured(cube, axes)
    for name, by_strategy in values.items():
        for strategy, value in by_strategy.items():
            cube[name].values[_position(cube, axes, strategy)] = value
    if kept:
        new = {str(strategy) for by_strategy in values.values() for strategy in by_strategy}
        for part in ("spread", "failures"):
            old = {text: value for text, value in held.get(part, {}).items() if text not in new}
            about[part] = {**old, **about.get(part, {})}
    cube.attrs["measured_json"] = json.dumps(about, sort_keys=True)
    _set_cost(cube)
    return cube


def lost_costs(cube: xr.Dataset, strategies: Collection[Strategy], about: Mapping[str, Any]) -> int:
    """Of how many strategies `put_costs` of `strategies` under the conditions `about` would drop measured seconds."""
    held = _held(cube)
    if "seconds" not in cube or (held and _same(held, about)):
        return 0
    axes = _axes(cube)
    seconds = cube["seconds"].transpose(*axes).copy(deep=True)
    for strategy in strategies:
        seconds.values[_position(cube, axes, strategy)] = np.nan
    return int(seconds.notnull().sum())


def keep_costs(source: xr.Dataset, cube: xr.Dataset) -> None:
    """Give `cube` the measured costs of `source` for strategies of which it has none.

    Where `cube` has some already, only if both were measured of the same model, on the same device with as many threads
    and the same batch size: seconds of two machines in one cube would be compared with each other.
    """
    if "seconds" not in source or bool(source["seconds"].isnull().all()):
        return
    axes, about = _axes(cube), _conditions(source)
    empty = bool(cube["seconds"].isnull().all())
    held = {} if empty else _conditions(cube)
    if not empty and not _same(held, about):
        return
    new = np.isnan(cube["seconds"].values) & ~np.isnan(_on_grid_of(cube, axes, source["seconds"]))
    for name in MEASURED:
        cube[name].values[new] = _on_grid_of(cube, axes, source[name])[new]
    joined = {part: {**about.get(part, {}), **held.get(part, {})} for part in ("spread", "failures")}
    cube.attrs["measured_json"] = json.dumps({**about, **held, **joined}, sort_keys=True)
    _set_cost(cube)


def measured_of(cube: xr.Dataset, name: str) -> NDArray[np.float64] | None:
    """A measured quantity (C,) in the order of the grid's strategies, NaN where not measured; None if nowhere."""
    if name not in cube or bool(cube[name].isnull().all()):
        return None
    values = cube[name].transpose(*_axes(cube)).values.reshape(-1)
    return np.where(values > 0, values, np.nan)


def _same(held: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    return all(held.get(name) == about.get(name) for name in SAME)


def _held(cube: xr.Dataset) -> dict[str, Any]:
    """The conditions of the costs that a cube has; {} without any, and where nobody can tell what they were."""
    if "seconds" not in cube or bool(cube["seconds"].isnull().all()):
        return {}
    try:
        return _conditions(cube)
    except CubeError:
        return {}


def _set_cost(cube: xr.Dataset) -> None:
    axes = _axes(cube)
    at = _position(cube, axes, Strategy.parse(cube.attrs["reference"]))
    seconds = cube["seconds"].values
    cost = cube["cost"].transpose("cost_model", *axes)
    cost.loc[{"cost_model": "measured"}] = cost.sel(cost_model="tokens").values[at] * seconds / seconds[at]
    cube["cost"] = cost


def _axes(cube: xr.Dataset) -> list[str]:
    return [str(dim) for dim in cube["status"].dims if dim != "progress"]


def _position(cube: xr.Dataset, axes: Sequence[str], strategy: Strategy) -> tuple[int, ...]:
    found = [[i for i, value in enumerate(cube[axis].values) if value == strategy.get(axis)] for axis in axes]
    if set(strategy) != set(axes) or not all(found):
        raise CubeError(f"the strategy {strategy} has no place in the cube")
    return tuple(places[0] for places in found)


def _on_grid_of(cube: xr.Dataset, axes: Sequence[str], variable: xr.DataArray) -> NDArray[np.float64]:
    return np.asarray(variable.reindex({axis: cube[axis].values for axis in axes}).transpose(*axes).values)


def _conditions(cube: xr.Dataset) -> dict[str, Any]:
    try:
        return dict(json.loads(cube.attrs.get("measured_json", "{}")))
    except (TypeError, ValueError) as error:
        raise CubeError(
            "the cube's attribute measured_json is damaged; measure with `gradscope cost --cube`"
        ) from error
