"""The cube: gradient moments over (progress, *axes) as an xarray dataset, and its file.

Root dataset: dims ("progress", *axes, "metric"); estimates and one standard error each (`<name>_se`), NaN
where not measured; `status` per cell; `moment_cov`, the jackknife covariance of the moments, from which the
standard error of any criterion follows; `influence`, from which covariances between cells follow too. Child
group `/param_groups`: the estimates per parameter group.

A file is always written whole to a temporary sibling and renamed. Existence never means complete: a cell
counts as done when its `status` says so and its `cell_key` matches what would be measured.
"""

from __future__ import annotations

from gradscope.cube.cells import put_cell, score_cells
from gradscope.cube.file import open_cube, save_cube
from gradscope.cube.profile import contenders_of, profile_of
from gradscope.cube.schema import (
    COST_MODELS,
    DONE,
    FAILED,
    PENDING,
    digest_of,
    failed_names,
    grid_of,
    groups_of,
    new_cube,
    new_groups,
    set_replicates,
    variable_name,
)

__all__ = [
    "COST_MODELS",
    "DONE",
    "FAILED",
    "PENDING",
    "contenders_of",
    "digest_of",
    "failed_names",
    "grid_of",
    "groups_of",
    "new_cube",
    "new_groups",
    "open_cube",
    "profile_of",
    "put_cell",
    "save_cube",
    "score_cells",
    "set_replicates",
    "variable_name",
]
