"""One finished cell, put into a cube with the criteria of its progress."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from gradscope.cube.profile import moments_of
from gradscope.cube.schema import DONE, QUANTITIES, grid_of, variable_name
from gradscope.estimators import ESTIMATES, Estimates
from gradscope.influence import influence_of
from schedulers import CRITERIA, MOMENTS, criterion_se, readable


def put_cell(cube: xr.Dataset, groups: xr.Dataset, index: tuple[int, ...], found: Estimates, *, key: str) -> None:
    """Write one finished cell at `index` = positions (progress, *axes), its criteria at the cube's beta included."""
    values, errors = found.total_WE, found.total_se_WE
    for name in (*QUANTITIES, "norm_sq_ref"):
        cube[name].values[index] = values[:, ESTIMATES.index(name)]
        cube[f"{name}_se"].values[index] = errors[:, ESTIMATES.index(name)]
    for name in QUANTITIES:
        groups[name].values[index] = found.groups_WGE[:, :, ESTIMATES.index(name)]
        groups[f"{name}_se"].values[index] = found.groups_se_WGE[:, :, ESTIMATES.index(name)]
    order = [ESTIMATES.index(name) for name in MOMENTS]
    cube["moment_cov"].values[index] = found.covariance_WEE[:, order][:, :, order]
    influence = influence_of(found.deleted_MWE[:, :, order], cube.sizes["replicate"])
    cube["influence"].values[index] = influence if influence.dtype == np.float32 else 0  # too large or small for it
    cube["status"].values[index] = DONE
    cube["n_samples"].values[index] = found.samples
    cube["cell_key"].values[index] = key
    score_cells(cube, index[0])


def score_cells(cube: xr.Dataset, t: int) -> None:
    """Write the criteria of all finished cells at one progress, with the norm_sq_ref that `profile_of` gives them."""
    grid, here = grid_of(cube), cube.isel(progress=[t])
    cost = cube["cost"].sel(cost_model="tokens").values.reshape(-1)
    settings: dict[str, Any] = {
        "beta": float(cube.attrs["beta"]),
        "batch_size": int(cube.attrs["batch_size"]),
        "reference_cost": float(cost[np.ravel_multi_index(grid.position(grid.reference), grid.shape)]),
    }
    for w, metric in enumerate(cube["metric"].values):
        moments, covariance, done = moments_of(here.sel(metric=metric), grid)
        moments = readable(moments, covariance)
        for criterion in CRITERIA.values():
            found = (
                criterion.score(moments, cost, **settings),
                criterion_se(criterion, moments, covariance, cost, **settings),
            )
            for name, values in zip(("", "_se"), found, strict=True):
                into = cube[f"{variable_name(criterion.name)}{name}"].values[t, ..., w]
                into[...] = np.where(done[0], values[0], np.nan).reshape(grid.shape)
