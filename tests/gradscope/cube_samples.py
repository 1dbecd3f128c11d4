"""A small synthetic cube, schedule and training logs with the schema of the real ones, for plots and report."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import xarray as xr

from gradscope.cube import digest_of, new_groups
from schedulers.costs import token_cost
from schedulers.criteria import CRITERIA, Moments
from schedulers.schedule import Schedule, Stage
from schedulers.strategy import Grid, Strategy

BATCH = 256
PENDING, DONE, FAILED = 0, 1, 2
FAILED_CELL = (2, 1, 2)
"""Indices (progress, patch, dropout) of the one failed cell of `sample_cube`."""
PENDING_CELLS = ((4, 2, 1), (4, 2, 2))
GROUPS = ("embed", "blocks.0", "a_very_long_name_of_a_module.that_nobody_can_read")
SHARES = (0.5, 0.3, 0.2)
"""Of GROUPS, of every moment of a tree made from the sample cube."""


def sample_cube(
    *,
    patches: Sequence[int] = (2, 4, 7),
    dropouts: Sequence[float] = (0.0, 0.25, 0.5),
    progress: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    image_size: int = 28,
    holes: bool = True,
    seed: int = 0,
) -> xr.Dataset:
    """Root dataset over (progress, patch, dropout, metric) whose best strategy moves to longer sequences.

    The gradient of a strategy is s·(cos θ·G + sin θ·orthogonal), so bias² = ‖G‖²(s² − 2s·cos θ + 1); θ
    and the noise grow with progress. Standard errors are 3 to 8 %, and an unbiased bias² may be negative.
    """
    rng = np.random.default_rng(seed)
    grid = Grid({"patch": tuple(patches), "dropout": tuple(dropouts)}, Strategy(patch=patches[0], dropout=0))
    costs = np.array([token_cost("mocov3", image_size, patches[0], s) for s in grid.strategies()]).reshape(grid.shape)
    reference_cost = float(costs[0, 0])
    beta = BATCH * reference_cost
    shape = (len(progress), *grid.shape, 2)
    moments = {name: np.empty(shape) for name in ("bias_sq", "variance", "norm_sq", "inner")}
    for t, p in enumerate(progress):
        for i, patch in enumerate(grid.axes["patch"]):
            for j, dropout in enumerate(grid.axes["dropout"]):
                for m, mildness in enumerate((1.0, 0.8)):
                    strength = mildness * (0.16 * (float(patch) - float(patches[0])) + 0.5 * float(dropout))
                    cos = 0.97 - min(strength * (0.06 + 1.1 * p**1.3), 1.1)
                    scale = 1 + 0.9 * strength * (1 - p)
                    norm = (0.9 if m == 0 else 2.4) * 0.02**p
                    moments["bias_sq"][t, i, j, m] = norm * (scale**2 - 2 * scale * cos + 1)
                    moments["variance"][t, i, j, m] = norm * BATCH * 0.5 * 12**p * (1 - 0.25 * strength) * scale**2
                    moments["norm_sq"][t, i, j, m] = norm * scale**2
                    moments["inner"][t, i, j, m] = norm * scale * cos
    moments["bias_sq"][:, 0, 0, :] = 0.0
    moments["inner"][:, 0, 0, :] = moments["norm_sq"][:, 0, 0, :]
    errors = {}
    for name, values in moments.items():
        size = np.abs(values) * {"bias_sq": 0.08, "variance": 0.03}.get(name, 0.05)
        if name == "bias_sq":
            size += 0.004 * moments["norm_sq"]
            size[:, 0, 0, :] = 0.0
        moments[name] = values + size * rng.standard_normal(values.shape)
        errors[name] = size
    moments["bias_sq"][0, 0, 1, :] = -np.abs(moments["bias_sq"][0, 0, 1, :]) / 5
    five = Moments(norm_sq_ref=moments["norm_sq"][:, :1, :1, :], **moments)
    scores = {
        name.replace("-", "_"): criterion.score(
            five, costs[None, :, :, None], beta=beta, batch_size=BATCH, reference_cost=reference_cost
        )
        for name, criterion in CRITERIA.items()
    }
    status = np.full(shape[:-1], DONE, dtype=np.int8)
    if holes:
        status[FAILED_CELL] = FAILED
        for cell in PENDING_CELLS:
            status[cell] = PENDING
    everything = {**moments, "bias_sq_plugin": np.abs(moments["bias_sq"]) + errors["bias_sq"], **scores}
    variables = {}
    for name, values in everything.items():
        error = errors.get(name, 0.06 * np.abs(values) + 1e-4)
        for key, array in ((name, values), (f"{name}_se", error)):
            variables[key] = (("progress", *grid.axes, "metric"), np.where(status[..., None] == DONE, array, np.nan))
    variables["status"] = (("progress", *grid.axes), status)
    variables["n_samples"] = (("progress", *grid.axes), np.where(status == DONE, 8192, 0).astype(np.int64))
    table = np.stack([costs, costs * 1.02, np.full_like(costs, np.nan)])
    variables["cost"] = (("cost_model", *grid.axes), table)
    steps = np.round(np.asarray(progress) * 4000).astype(np.int64)
    failures = {"progress=0.5,patch=4,dropout=0.5": "out of memory"} if holes else {}
    return xr.Dataset(
        variables,
        coords={
            "progress": np.asarray(progress, dtype=np.float64),
            "patch": ("patch", np.asarray(patches), {"units": "pixel"}),
            "dropout": ("dropout", np.asarray(dropouts), {"units": "1"}),
            "metric": ["euclidean", "optimizer"],
            "cost_model": ["tokens", "paper", "measured"],
            "step": ("progress", steps),
            "checkpoint": ("progress", [f"step-{s:06d}.pt" for s in steps]),
            "checkpoint_sha256": ("progress", [f"{s:064x}" for s in steps]),
        },
        attrs={
            "schema_version": 1,
            "reference": f"patch={patches[0]},dropout=0",
            "batch_size": BATCH,
            "beta": beta,
            "title": "gradient moments of a MoCo-v3 pilot",
            "source": "gradscope profile runs/pilot",
            "created_at": "2026-01-05T09:30:00+00:00",
            "history": "2026-01-05T09:30:00+00:00 gradscope profile runs/pilot",
            "method": "mocov3",
            "dataset_name": "fashion-mnist",
            "model_name": "vit-tiny",
            "seed": 0,
            "device_name": "cpu",
            "torch_version": "2.13.0",
            "creation_library_version": "0.1.0",
            "training_json": json.dumps(
                {"schedule": "mixed", "strategies": [str(s) for s in grid.strategies()[:-1]], "budget": 4_096_000.0}
            ),
            "config_json": json.dumps({"replicates": 32, "seed": 0}),
            "failures_json": json.dumps(failures),
        },
    )


def third_axis(cube: xr.Dataset) -> xr.Dataset:
    """`cube` with an axis `resolution` of 28 (the reference, `cube` itself) and 20 (half of every value)."""
    stack = xr.concat(
        [cube, cube.map(lambda v: v if v.dtype.kind != "f" else v / 2, keep_attrs=True)],
        dim="resolution",
        coords="minimal",
        compat="override",
        combine_attrs="override",
    )
    made = stack.assign_coords(resolution=[28, 20]).transpose("progress", "cost_model", "patch", "dropout", ...)
    made.attrs = {**cube.attrs, "reference": f"{cube.attrs['reference']},resolution=28"}
    return made


def tree_of(cube: xr.Dataset, names: Sequence[str] = GROUPS, shares: Sequence[float] = SHARES) -> xr.DataTree:
    """`cube` as the root of a tree with parameter groups, each of which has its share of every moment."""
    groups = new_groups(cube, names)
    for name in ("bias_sq", "bias_sq_se", "variance", "variance_se"):
        whole = cube[name].transpose("progress", "patch", "dropout", "metric").values
        groups[name].values[:] = whole[..., None] * np.asarray(shares)
    return xr.DataTree.from_dict({"/": cube, "/param_groups": groups})


def sample_schedule(cube: xr.Dataset) -> Schedule:
    """Three stages for `sample_cube`: patch 7 for a quarter, patch 4 until 0.7, then mostly the reference."""

    def cost(strategy: Strategy) -> float:
        return float(cube["cost"].sel(cost_model="tokens", patch=strategy["patch"], dropout=strategy["dropout"]))

    short, middle = Strategy(patch=7, dropout=0.5), Strategy(patch=4, dropout=0)
    full = Strategy(patch=2, dropout=0)
    mixture = ((full, 0.8), (middle, 0.2))
    return Schedule(
        stages=(
            Stage(0.0, 0.25, ((short, 1.0),), cost(short), 0.61, 0.02),
            Stage(0.25, 0.7, ((middle, 1.0),), cost(middle), 0.342, 0.011),
            Stage(0.7, 1.0, mixture, sum(w * cost(s) for s, w in mixture), 0.121, 0.009),
        ),
        budget=4e6,
        batch_size=BATCH,
        criterion="descent",
        metric="optimizer",
        cube_digest=digest_of(cube),
        library_version="0.1.0",
    )


def sample_runs(rows: int = 200, seed: int = 0) -> dict[str, list[dict[str, object]]]:
    """Logs of three runs: every row has a noisy loss, every twentieth an accuracy."""
    rng = np.random.default_rng(seed)
    runs: dict[str, list[dict[str, object]]] = {}
    for name, best, speed in (
        ("no acceleration", 0.79, 3.0),
        ("patch 4 throughout", 0.785, 4.2),
        ("schedule", 0.81, 5.0),
    ):
        log: list[dict[str, object]] = []
        for i in range(1, rows + 1):
            part = i / rows
            level = 1 - np.exp(-speed * part)
            row: dict[str, object] = {
                "step": i * 10,
                "units": 4e6 * part,
                "samples": i * 2560,
                "fraction": part,
                "strategy": "patch=4,dropout=0",
                "loss": float(5.5 - 2.2 * level + 0.35 * rng.standard_normal()),
                "lr": 1e-3 * (1 - part),
                "samples_per_second": 900.0,
                "seconds": 2.5 * i,
            }
            if i % 20 == 0 or i == 1:
                row["accuracy"] = float(best * (0.3 + 0.7 * level) + 0.004 * rng.standard_normal())
            log.append(row)
        runs[name] = log
    return runs
