"""A cube read for plotting: plain arrays of one metric, and what is best at each progress."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gradscope.plots._theme import progress_labels
from schedulers.criteria import CRITERIA
from schedulers.errors import UsageError
from schedulers.strategy import Grid, Strategy

if TYPE_CHECKING:
    import xarray as xr

Floats = NDArray[np.float64]
Better = Literal["lower", "higher", ""]

PENDING, DONE, FAILED = 0, 1, 2
STATUS_TEXT = {PENDING: "pending", DONE: "done", FAILED: "failed"}

_MOMENTS: dict[str, tuple[str, Better]] = {
    "bias_sq": ("Squared bias (unbiased estimate)", "lower"),
    "bias_sq_plugin": ("Squared bias (plug-in estimate)", "lower"),
    "variance": ("Gradient variance per sample", "lower"),
    "norm_sq": ("Squared norm of the mean gradient", ""),
    "inner": ("Inner product with the reference gradient", "higher"),
}


@dataclass(frozen=True)
class Variable:
    """What a figure shows: its name in the cube, its title, and which end is the better one ("" = neither)."""

    name: str
    title: str
    better: Better
    is_criterion: bool

    @property
    def short(self) -> str:
        """The name as a user writes it: criteria with a hyphen."""
        return self.name.replace("_", "-") if self.is_criterion else self.name


@dataclass(frozen=True)
class CubeView:
    """One metric of a cube as arrays: T progress points, then one dimension per axis of the grid.

    `step` is None where the cube records none; `cost` is in units per sample and NaN where the
    chosen cost model does not know it.
    """

    dataset: xr.Dataset
    grid: Grid
    progress: Floats
    step: NDArray[np.int64] | None
    metric: str
    cost_model: str
    cost: Floats
    status: NDArray[np.int8]
    n_samples: NDArray[np.int64]

    @property
    def labels(self) -> list[str]:
        """Text of each progress, as sliders, hover and tables write it."""
        return progress_labels(self.progress.tolist())

    def values(self, name: str) -> Floats:
        """(T, *grid.shape), NaN where not measured (an infinite value counts as such)."""
        array = self.dataset[name]
        if "metric" in array.dims:
            array = array.sel(metric=self.metric)
        found = np.asarray(array.transpose("progress", *self.grid.axes).values, dtype=np.float64)
        return np.where(np.isfinite(found), found, np.nan)

    def errors(self, name: str) -> Floats:
        """Standard errors of `values(name)`; NaN throughout where the cube has none."""
        if f"{name}_se" not in self.dataset:
            return np.full((len(self.progress), *self.grid.shape), np.nan)
        return self.values(f"{name}_se")

    def strategy(self, position: tuple[int, ...]) -> Strategy:
        """The strategy at an index along each axis."""
        return Strategy({name: values[i] for (name, values), i in zip(self.grid.axes.items(), position, strict=True)})

    def unit(self, axis: str) -> str:
        """The axis with its unit, as an axis title: `patch (pixel)`."""
        unit = self.grid.units.get(axis, "1")
        return f"{axis} ({unit})" if unit not in ("", "1") else axis

    def beta(self) -> float:
        """Budget of one update in units, the cube's `beta`. NaN where it is not recorded."""
        try:
            return float(self.dataset.attrs["beta"])
        except (KeyError, TypeError, ValueError):
            return float("nan")


@dataclass(frozen=True)
class Candidate:
    """A strategy with its value and one standard error (NaN = unknown)."""

    strategy: Strategy
    value: float
    error: float


@dataclass(frozen=True)
class Best:
    """The best measured strategy at one progress, and those that two standard errors do not separate from it."""

    position: tuple[int, ...]
    winner: Candidate
    rivals: tuple[Candidate, ...]


def root_dataset(cube: xr.Dataset | xr.DataTree) -> xr.Dataset:
    """The root of a tree, or the dataset itself."""
    import xarray as xr

    return cube.to_dataset() if isinstance(cube, xr.DataTree) else cube


def metrics_of(cube: xr.Dataset | xr.DataTree) -> list[str]:
    """The cube's metrics, in its order."""
    return [str(name) for name in root_dataset(cube)["metric"].values]


def default_metric(cube: xr.Dataset | xr.DataTree) -> str:
    """`optimizer` where the cube holds any value of it (design §4), else the first metric that has values."""
    dataset, names = root_dataset(cube), metrics_of(cube)
    for name in sorted(names, key=lambda name: name != "optimizer"):
        if bool(np.isfinite(dataset["variance"].sel(metric=name)).any()):
            return name
    return names[0]


def read_view(cube: xr.Dataset | xr.DataTree, *, metric: str | None = None, cost_model: str | None = None) -> CubeView:
    """Arrays of `metric` (default: `default_metric`) with the costs of `cost_model` (default: the first that is known).

    Raises UsageError for a metric or cost model that the cube lacks, naming those it has.
    """
    from gradscope.cube import grid_of

    dataset = root_dataset(cube)
    if "progress" not in dataset.dims or "status" not in dataset:
        raise UsageError(
            "cube: it has no dimension 'progress' or no variable 'status'; give the file written by profile"
        )
    grid = grid_of(dataset)
    metrics = metrics_of(dataset)
    if metric is None:
        metric = default_metric(dataset)
    if metric not in metrics:
        raise UsageError(f"metric {metric!r} is not in the cube; it holds {', '.join(metrics)}")
    order = ("progress", *grid.axes)
    chosen_cost, cost = _cost(dataset, tuple(grid.axes), cost_model)
    counts = dataset["n_samples"] if "n_samples" in dataset else dataset["status"] * 0
    return CubeView(
        dataset=dataset,
        grid=grid,
        progress=np.asarray(dataset["progress"].values, dtype=np.float64),
        step=np.asarray(dataset["step"].values, dtype=np.int64) if "step" in dataset.coords else None,
        metric=metric,
        cost_model=chosen_cost,
        cost=cost,
        status=np.asarray(dataset["status"].transpose(*order).values, dtype=np.int8),
        n_samples=np.asarray(counts.transpose(*order).values, dtype=np.int64),
    )


def criteria_of(cube: xr.Dataset | xr.DataTree) -> list[Variable]:
    """Every criterion that the cube holds."""
    dataset = root_dataset(cube)
    return [variable(dataset, name) for name in CRITERIA if name.replace("-", "_") in dataset]


def variable(cube: xr.Dataset | xr.DataTree, name: str) -> Variable:
    """The variable `name`: a criterion (`ca-mse` or `ca_mse`) or a moment. Raises UsageError naming what there is."""
    dataset = root_dataset(cube)
    stored = name.replace("-", "_")
    criteria = {key.replace("-", "_"): value for key, value in CRITERIA.items()}
    shown = [key for key in (*criteria, *_MOMENTS) if key in dataset]
    if stored not in shown:
        raise UsageError(f"variable {name!r} is not in the cube; it holds {', '.join(shown)}")
    if stored in criteria:
        found = criteria[stored]
        return Variable(stored, found.title, "lower" if found.lower_is_better else "higher", True)
    title, better = _MOMENTS[stored]
    return Variable(stored, title, better, False)


def best_strategies(view: CubeView, shown: Variable) -> list[Best | None]:
    """The best strategy at each progress over the whole grid; None where nothing is measured or neither end is better.

    Where strategies raced by this variable, the best is one that was left: others stopped at what few samples said.
    A rival is a strategy whose value lies within two standard errors of the difference: that of paired measurements
    where the variable is a criterion and the cube has the influence of its sub-batches (as `optimize` judges), else
    sqrt(se² + se_best²), which errs towards naming too many.
    """
    from gradscope.cube import contenders_of, variable_name  # only here: importing the plots stays cheap

    values, errors = view.values(shown.name), view.errors(shown.name)
    raced = {variable_name(name): left for name, left in contenders_of(view.dataset, view.metric).items()}
    left = raced[shown.name].reshape(values.shape) if shown.name in raced else np.ones(values.shape, dtype=bool)
    influence = _score_influence(view, shown)
    return [
        _best(view, values[t], errors[t], left[t], shown.better, None if influence is None else influence[t])
        for t in range(len(view.progress))
    ]


def _score_influence(view: CubeView, shown: Variable) -> Floats | None:
    """The influence (T, *grid.shape, R) of every sub-batch on a criterion, None where it is not known.

    It is not known for values that were not computed from the cube's moments as they are read now: by an earlier
    version, or for another batch than that of an online run.
    """
    from gradscope.cube import profile_of

    if not shown.is_criterion or not {"influence", "cost"} <= set(view.dataset):
        return None
    costs = view.dataset["cost"]
    if "tokens" not in costs["cost_model"] or bool(costs.sel(cost_model="tokens").isnull().all()):
        return None
    profile = replace(profile_of(view.dataset, metric=view.metric), contenders={})
    shape = (len(view.progress), *view.grid.shape)
    scores = profile.scores(shown.short, profile.progress)[0].reshape(shape)
    if not np.allclose(scores, view.values(shown.name), rtol=1e-6, atol=0, equal_nan=True):
        return None
    found = profile.score_influence(shown.short)
    return None if found is None else found.reshape(*shape, -1)


def _best(
    view: CubeView,
    values: Floats,
    errors: Floats,
    left: NDArray[np.bool_],
    better: Better,
    influence: Floats | None,
) -> Best | None:
    if not better or bool(np.isnan(values).all()):
        return None
    among = np.where(left, values, np.nan) if bool((left & ~np.isnan(values)).any()) else values
    flat = int(np.nanargmin(among) if better == "lower" else np.nanargmax(among))
    position = tuple(int(i) for i in np.unravel_index(flat, values.shape))
    winner = Candidate(view.strategy(position), float(values[position]), float(errors[position]))
    distance = np.abs(values - winner.value)
    if influence is None:
        apart = np.hypot(np.nan_to_num(errors), np.nan_to_num(winner.error))
    else:
        apart = np.sqrt(np.sum((influence - influence[position]) ** 2, axis=-1))
    near = distance <= 2 * np.nan_to_num(apart)
    others = [tuple(int(i) for i in index) for index in np.argwhere(near) if tuple(index) != position]
    others.sort(key=lambda index: float(distance[index]))
    rivals = tuple(Candidate(view.strategy(i), float(values[i]), float(errors[i])) for i in others)
    return Best(position, winner, rivals)


def near_zero(values: Floats, errors: Floats) -> NDArray[np.bool_]:
    """Where two standard errors do not tell a value from zero; never where the error is unknown or zero."""
    return np.asarray((errors > 0) & (np.abs(values) <= 2 * errors))


def untrained_strategies(cube: xr.Dataset | xr.DataTree) -> list[Strategy] | None:
    """Strategies of the grid that the checkpoints were never trained under (design §4); None where not recorded."""
    view = read_view(cube)
    try:
        recorded = json.loads(view.dataset.attrs["training_json"])["strategies"]
        trained = {Strategy.parse(text) for text in recorded}
    except (KeyError, TypeError, ValueError):
        return None
    return [strategy for strategy in view.grid.strategies() if strategy not in trained]


def _cost(dataset: xr.Dataset, axes: tuple[str, ...], wanted: str | None) -> tuple[str, Floats]:
    shape = tuple(dataset.sizes[axis] for axis in axes)
    if "cost" not in dataset:
        return "", np.full(shape, np.nan)
    models = [str(name) for name in dataset["cost_model"].values]
    tables: dict[str, Any] = {
        name: dataset["cost"].sel(cost_model=name).transpose(*axes).values.astype(np.float64) for name in models
    }
    if wanted is None:
        wanted = next((name for name in models if np.isfinite(tables[name]).any()), models[0])
    if wanted not in tables:
        raise UsageError(f"cost model {wanted!r} is not in the cube; it holds {', '.join(models)}")
    return wanted, tables[wanted]
