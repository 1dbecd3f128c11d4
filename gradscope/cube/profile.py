"""What the optimizer reads of a cube."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from gradscope.cube.schema import COST_MODELS, DONE, digest_of, grid_of
from gradscope.cube_costs import measured_of
from gradscope.errors import CubeError, UsageError
from gradscope.pilot import budget_in, pilot_of, training_of
from gradscope.races import RaceBook
from schedulers import CRITERIA, MOMENTS, Grid, Moments
from schedulers.profile import Profile


def profile_of(cube: xr.Dataset, *, metric: str = "optimizer", cost_model: str = "tokens") -> Profile:
    """The optimizer's view of a cube in one metric and cost model.

    norm_sq_ref and its variance are taken from the reference's own cell at every progress point where that is done, so
    that all strategies share one denominator also when their cells hold different numbers of samples. Verdicts of
    races, which went by costs in tokens, bind no other cost model. The budget of the profiled run is in units of
    `cost_model` (`pilot.budget_in`). Raises UsageError when the cube has no such metric or costs, CubeError when its
    `training_json` is damaged.
    """
    metrics = [str(name) for name in cube["metric"].values]
    if metric not in metrics:
        raise UsageError(f"the cube has no metric {metric!r}; it has {', '.join(metrics)}")
    if cost_model not in COST_MODELS or bool(cube["cost"].sel(cost_model=cost_model).isnull().all()):
        known = [model for model in COST_MODELS if not bool(cube["cost"].sel(cost_model=model).isnull().all())]
        cure = "; `gradscope cost CKPT_DIR --cube FILE` measures them" if cost_model == "measured" else ""
        raise UsageError(f"the cube holds no costs of the model {cost_model!r}; it has {', '.join(known)}{cure}")
    grid = grid_of(cube)
    here = cube.sel(metric=metric).transpose("progress", *grid.axes, ...)
    moments, covariance, done = moments_of(here, grid)
    cost = cube["cost"].sel(cost_model=cost_model).values.reshape(-1)
    reference = int(np.ravel_multi_index(grid.position(grid.reference), grid.shape))
    batch_size = int(cube.attrs["batch_size"])
    training = training_of(cube)
    pilot, budget = pilot_of(training, grid)
    by_tokens = cost_model == "tokens"
    if not by_tokens:
        budget = budget_in(budget, pilot, grid, cube["cost"].sel(cost_model="tokens").values.reshape(-1), cost)
    profile = Profile(
        grid=grid,
        progress=here["progress"].values,
        cost=cost,
        moments=moments,
        covariance=covariance,
        batch_size=batch_size,
        beta=batch_size * float(cost[reference]),
        metric=metric,
        cost_model=cost_model,
        digest=digest_of(cube),
        reference_budget=budget,
        contenders=contenders_of(cube, metric) if by_tokens else {},
        seconds=measured_of(cube, "seconds"),
        memory=measured_of(cube, "memory"),
        influence=_influence(here, done, reference),
        pilot=pilot,
    )
    if cube.attrs.get("source") != "gradscope online" or "batch_size" not in training:
        return profile
    trained = training["batch_size"]  # probes may have had other sub-batches
    if isinstance(trained, bool) or not isinstance(trained, int) or trained < 1:
        raise CubeError(f"the cube's attribute training_json is damaged (batch_size={trained!r})")
    return profile.for_batch(trained)


def moments_of(here: xr.Dataset, grid: Grid) -> tuple[Moments, NDArray[np.float64], NDArray[np.bool_]]:
    """Moments (T, C), NaN but where done, their covariance (T, C, 5, 5), and which cells are done (T, C).

    `here` is a cube in one metric, progress and axes first. Where the reference is done, all cells of its progress have
    its norm_sq_ref.
    """
    done = here["status"].values.reshape(here.sizes["progress"], -1) == DONE
    reference = int(np.ravel_multi_index(grid.position(grid.reference), grid.shape))
    flat = {name: here[name].values.reshape(done.shape) for name in MOMENTS}
    own = flat["norm_sq_ref"]
    flat["norm_sq_ref"] = np.where(done[:, reference, None], own[:, reference, None], own)
    moments = Moments(**{name: np.where(done, values, np.nan) for name, values in flat.items()})
    return moments, _covariance(here, done, reference), done


def _covariance(here: xr.Dataset, done: NDArray[np.bool_], reference: int) -> NDArray[np.float64]:
    """Profile.covariance (T, C, 5, 5), with the reference's variance of norm_sq_ref in every cell where it is done.

    A cell's covariances with norm_sq_ref are scaled by the ratio of the two standard errors: its correlations stay,
    and with them the matrix positive semidefinite.
    """
    values = here["moment_cov"].values.reshape(*done.shape, len(MOMENTS), len(MOMENTS)).astype(np.float64)
    norm = MOMENTS.index("norm_sq_ref")
    own = values[:, :, norm, norm].copy()
    shared = np.broadcast_to(own[:, reference, None], own.shape)
    replaced = done & done[:, reference, None] & np.isfinite(shared)
    ratio = np.sqrt(np.where(own > 0, shared, 0.0) / np.where(own > 0, own, 1.0))
    scale = np.where(replaced, ratio, 1.0)
    values[:, :, norm, :] *= scale[..., None]
    values[:, :, :, norm] *= scale[..., None]
    values[:, :, norm, norm] = np.where(replaced, shared, own)
    return values


def _influence(here: xr.Dataset, done: NDArray[np.bool_], reference: int) -> NDArray[np.float64] | None:
    """Profile.influence (T, C, 5, R); None when the cube has none, or lacks that of a cell with a covariance.

    Such a cell was taken over from a file that had no influence yet; with zeros it would count as exactly known.
    """
    if "influence" not in here:
        return None
    values = here["influence"].values.reshape(*done.shape, len(MOMENTS), -1)
    spread = np.nan_to_num(here["moment_cov"].values.reshape(*done.shape, -1)).any(-1)
    if bool((done & spread & ~values.any((-2, -1))).any()):
        return None
    norm, values = MOMENTS.index("norm_sq_ref"), np.where(done[..., None, None], values, 0).astype(np.float64)
    values[:, :, norm] = np.where(done[:, reference, None, None], values[:, reference, None, norm], values[:, :, norm])
    return values


def contenders_of(cube: xr.Dataset, metric: str) -> dict[str, NDArray[np.bool_]]:
    """Per criterion by which strategies raced in a metric, who was left: (T, C), all at points without a race.

    A strategy that left, but has since been measured with as many samples as any that was left, counts again.
    """
    book = RaceBook.read(cube.attrs.get("races_json", "{}"))
    if not book.entries:
        return {}
    metric_index = [str(name) for name in cube["metric"].values].index(metric)
    grid = grid_of(cube)
    strategies, counts = grid.strategies(), cube["n_samples"].where(cube["status"] == DONE, 0)
    samples = counts.transpose("progress", *grid.axes).values.reshape(-1, len(strategies))
    rows = [f"{d[:16]}:{s}" for d, s in zip(cube["checkpoint_sha256"].values, cube["step"].values, strict=True)]
    found = {}
    for criterion in CRITERIA:
        left = [book.contenders(row, criterion, metric_index) for row in rows]
        if any(texts is not None for texts in left):
            stays = np.array([[t is None or str(s) in t for s in strategies] for t in left])
            most = np.where(stays, samples, 0).max(axis=1, keepdims=True)
            found[criterion] = stays | ((most > 0) & (samples >= most))
    return found
