"""The schema of a cube: what an empty one holds, and what its labels mean."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import xarray as xr

from gradscope.cube.names import axis_labels, check_attributes, check_grid, check_name, check_text
from gradscope.cube_costs import MEASURED, add_measured
from gradscope.errors import UsageError
from schedulers import CRITERIA, MOMENTS, Grid, Strategy

SCHEMA_VERSION = 1
PENDING, DONE, FAILED = 0, 1, 2
COST_MODELS = ("tokens", "paper", "measured")
QUANTITIES = {
    "bias_sq": "squared bias against the reference gradient, unbiased estimate",
    "bias_sq_plugin": "squared norm of the mean difference to the reference gradient, the paper's estimate",
    "variance": "trace of the per-sample gradient covariance",
    "norm_sq": "squared norm of the expected gradient, unbiased estimate",
    "inner": "inner product of the expected gradient with the reference's, unbiased estimate",
}


def variable_name(criterion: str) -> str:
    """Name of a criterion's variable in the cube: `ca-mse` -> `ca_mse`."""
    return criterion.replace("-", "_")


def new_cube(
    grid: Grid,
    *,
    progress: Sequence[float],
    steps: Sequence[int],
    names: Sequence[str],
    digests: Sequence[str],
    metrics: Sequence[str],
    costs: Mapping[str, Mapping[Strategy, float]],
    tokens: Mapping[str, Mapping[Strategy, int]],
    attributes: Mapping[str, str | int | float],
    replicates: int,
) -> xr.Dataset:
    """An empty root dataset: every cell pending, every estimate NaN.

    `progress`, `steps`, file `names` and `digests` describe the checkpoints, one each. `costs` maps a cost
    model to units per sample of each strategy, `tokens` a sequence's name to lengths; `attributes` must hold
    `batch_size` (K) and `beta` (units of one update). `replicates`: how many `influence` has room for.
    """
    axes = list(grid.axes)
    _check_axes(grid, tokens)
    check_attributes(attributes)
    for name in names:
        check_text("checkpoint file", name)
    for name in tokens:
        check_name("sequence of tokens", f"tokens_{name}")
    cell = ("progress", *axes)
    shape = (len(progress), *grid.shape)
    cube = xr.Dataset(
        coords={
            "progress": ("progress", np.asarray(progress, float), {"long_name": "training progress", "units": "1"}),
            **{
                name: (name, axis_labels(name, values), {"long_name": name, "units": grid.units.get(name, "1")})
                for name, values in grid.axes.items()
            },
            "metric": ("metric", np.array(metrics, object)),
            "moment": ("moment", np.array(MOMENTS, object)),
            "moment_2": ("moment_2", np.array(MOMENTS, object)),
            "cost_model": ("cost_model", np.array(COST_MODELS, object)),
            "step": ("progress", np.asarray(steps, np.int64), {"long_name": "optimizer step", "units": "1"}),
            "checkpoint": ("progress", np.array(names, object), {"long_name": "checkpoint file"}),
            "checkpoint_sha256": (
                "progress",
                np.array(digests, object),
                {"long_name": "digest of the checkpoint file"},
            ),
        },
        attrs={"schema_version": SCHEMA_VERSION, "reference": str(grid.reference), **attributes},
    )
    for name, title in (
        *QUANTITIES.items(),
        ("norm_sq_ref", "squared norm of the expected reference gradient, unbiased estimate"),
    ):
        _add_estimate(cube, name, title, (*cell, "metric"), (*shape, len(metrics)))
    for criterion in CRITERIA.values():
        direction = "lower is better" if criterion.lower_is_better else "higher is better"
        _add_estimate(
            cube,
            variable_name(criterion.name),
            f"{criterion.title}; {direction}",
            (*cell, "metric"),
            (*shape, len(metrics)),
        )
    moment_shape = (*shape, len(metrics), len(MOMENTS), len(MOMENTS))
    cube["moment_cov"] = (
        (*cell, "metric", "moment", "moment_2"),
        np.full(moment_shape, np.nan),
        {"long_name": "jackknife covariance of the moments"},
    )
    set_replicates(cube, replicates)
    cube["status"] = (
        cell,
        np.zeros(shape, np.int8),
        {
            "long_name": "state of the cell",
            "flag_values": np.array([0, 1, 2], np.int8),
            "flag_meanings": "pending done failed",
        },
    )
    cube["n_samples"] = (
        cell,
        np.zeros(shape, np.int64),
        {"long_name": "samples measured", "standard_name": "number_of_observations", "units": "1"},
    )
    cube["cell_key"] = (cell, np.full(shape, "", object), {"long_name": "digest of what fixes the cell's number"})
    cost = np.full((len(COST_MODELS), *grid.shape), np.nan)
    for i, model in enumerate(COST_MODELS):
        for strategy, value in costs.get(model, {}).items():
            cost[(i, *grid.position(strategy))] = value
    cube["cost"] = (
        ("cost_model", *axes),
        cost,
        {"long_name": "cost per sample", "units": "1", "comment": "1 = one forward pass of one reference sequence"},
    )
    for name, lengths in tokens.items():
        values = np.zeros(grid.shape, np.int64)
        for strategy, length in lengths.items():
            values[grid.position(strategy)] = length
        cube[f"tokens_{name}"] = (
            tuple(axes),
            values,
            {"long_name": f"{name} sequence length, class token included", "units": "1"},
        )
    add_measured(cube, axes)
    return cube


def set_replicates(cube: xr.Dataset, replicates: int) -> None:
    """Make room for that many replicates in a cube without cells: `influence`, 0 everywhere."""
    if "influence" in cube:
        del cube["influence"]
    dims = tuple(str(dim) for dim in cube["moment_cov"].dims[:-1])
    cube["influence"] = (
        (*dims, "replicate"),
        np.zeros((*(cube.sizes[dim] for dim in dims), replicates), np.float32),
        {
            "long_name": "influence of the sub-batches on the moments, number m in replicate m modulo their number",
            "comment": "0 where not measured; summed over replicates, products give the covariance within and "
            "between cells, also of different checkpoints: all are measured on the same sub-batches",
        },
    )


def new_groups(cube: xr.Dataset, group_names: Sequence[str]) -> xr.Dataset:
    """An empty `/param_groups` dataset that fits `cube`. Raises UsageError for a name that its file cannot hold."""
    for name in group_names:
        check_text("parameter group", name)
    axes = list(grid_of(cube).axes)
    coords = {name: cube.coords[name] for name in ("progress", *axes, "metric")}
    groups = xr.Dataset(
        coords={
            **coords,
            "param_group": ("param_group", np.array(group_names, object), {"long_name": "parameter group"}),
        }
    )
    dims = ("progress", *axes, "metric", "param_group")
    for name, title in QUANTITIES.items():
        _add_estimate(groups, name, title, dims, tuple(groups.sizes[dim] for dim in dims))
    return groups


def groups_of(tree: xr.DataTree) -> xr.Dataset | None:
    """The `/param_groups` dataset of a cube without the coordinates that it only inherits, or None."""
    if "param_groups" not in tree.children:
        return None
    groups = tree["param_groups"].to_dataset()
    return groups.drop_vars(
        [
            name
            for name in groups.coords
            if name not in (*groups["variance"].dims, "step", "checkpoint", "checkpoint_sha256")
        ]
    )


def grid_of(cube: xr.Dataset) -> Grid:
    """The grid a cube was measured on."""
    axes = [str(dim) for dim in cube["status"].dims if dim != "progress"]
    values = {
        axis: tuple(value.item() if hasattr(value, "item") else value for value in cube[axis].values) for axis in axes
    }
    return Grid(
        values,
        Strategy.parse(cube.attrs["reference"]),
        {axis: unit for axis in axes if (unit := cube[axis].attrs.get("units", "1")) != "1"},
    )


def failed_names(cube: xr.Dataset) -> set[str]:
    """The names under which `failures_json` tells of the cells that are failed."""
    grid = grid_of(cube)
    return {
        f"progress={float(progress):g},{strategy}"
        for t, progress in enumerate(cube["progress"].values)
        for strategy in grid.strategies()
        if cube["status"].values[(t, *grid.position(strategy))] == FAILED
    }


def digest_of(cube: xr.Dataset) -> str:
    """Digest of a cube's numbers and labels; independent of when and where it was written."""
    state = hashlib.sha256()
    for name in sorted(str(name) for name in (*cube.data_vars, *cube.coords)):
        values = cube[name].values
        state.update(f"{name}{cube[name].dims}".encode())
        state.update(
            "\x1f".join(map(str, values.ravel())).encode()
            if values.dtype.kind in "OU"
            else np.ascontiguousarray(values).tobytes()
        )
    return state.hexdigest()[:16]


def _check_axes(grid: Grid, tokens: Collection[str]) -> None:
    estimates = [*QUANTITIES, "norm_sq_ref", *map(variable_name, CRITERIA)]
    taken = {"progress", "metric", "moment", "moment_2", "replicate", "cost_model", "param_group", "step", "checkpoint"}
    taken |= {
        "checkpoint_sha256",
        "moment_cov",
        "influence",
        "status",
        "n_samples",
        "cell_key",
        "cost",
        "tokens_query",
        "tokens_key",
        *MEASURED,
        *(f"tokens_{name}" for name in tokens),
    }
    for axis in grid.axes:
        if axis in taken or axis.removesuffix("_se") in estimates:
            raise UsageError(f"a grid axis cannot be called {axis!r}: the cube uses that name itself; choose another")
    check_grid(grid)


def _add_estimate(cube: xr.Dataset, name: str, title: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
    related = " ".join((f"{name}_se", *(other for other in ("n_samples", "status") if "param_group" not in dims)))
    cube[name] = (dims, np.full(shape, np.nan), {"long_name": title, "units": "1", "ancillary_variables": related})
    cube[f"{name}_se"] = (dims, np.full(shape, np.nan), {"long_name": f"one standard error of {name}", "units": "1"})
