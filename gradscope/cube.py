"""The cube: gradient moments over (progress, *axes) as an xarray dataset, and its file.

Root dataset: dims ("progress", *axes, "metric"); estimates and one standard error each (`<name>_se`), NaN
where not measured; `status` per cell; `moment_cov`, the jackknife covariance of the moments, from which the
standard error of any criterion follows; `influence`, from which covariances between cells follow too. Child
group `/param_groups`: the estimates per parameter group.

A file is always written whole to a temporary sibling and renamed. Existence never means complete: a cell
counts as done when its `status` says so and its `cell_key` matches what would be measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from gradscope.cube_costs import MEASURED, add_measured, measured_of
from gradscope.errors import CubeError, UsageError
from gradscope.estimators import ESTIMATES, Estimates
from gradscope.files import seal, seal_holds, write_atomically
from gradscope.influence import influence_of
from gradscope.pilot import budget_in, pilot_of, training_of
from gradscope.races import RaceBook
from schedulers import CRITERIA, MOMENTS, Grid, Moments, Strategy, criterion_se, readable
from schedulers.profile import Profile

SCHEMA_VERSION = 1
ENGINE: Literal["h5netcdf"] = "h5netcdf"
LARGEST, DENSEST = 1 << 30, 1000  # bytes of numbers in a cube, and how many times the file that holds them
UNREADABLE = (  # what the readers of a damaged file were seen to raise
    OSError, ValueError, LookupError, RuntimeError, AttributeError, TypeError, ArithmeticError, MemoryError, EOFError
)  # fmt: skip
PENDING, DONE, FAILED = 0, 1, 2
COMPRESSED = {"zlib": True, "complevel": 1}  # for the one large variable; mostly 0 where strategies left races early
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
    _check_axes(grid)
    cell = ("progress", *axes)
    shape = (len(progress), *grid.shape)
    cube = xr.Dataset(
        coords={
            "progress": ("progress", np.asarray(progress, float), {"long_name": "training progress", "units": "1"}),
            **{
                name: (name, np.array(values), {"long_name": name, "units": grid.units.get(name, "1")})
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
    """An empty `/param_groups` dataset that fits `cube`."""
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
    cube["influence"].values[index] = influence_of(found.deleted_MWE[:, :, order], cube.sizes["replicate"])
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
        moments, covariance, done = _moments_of(here.sel(metric=metric), grid)
        moments = readable(moments, covariance)
        for criterion in CRITERIA.values():
            found = (
                criterion.score(moments, cost, **settings),
                criterion_se(criterion, moments, covariance, cost, **settings),
            )
            for name, values in zip(("", "_se"), found, strict=True):
                into = cube[f"{variable_name(criterion.name)}{name}"].values[t, ..., w]
                into[...] = np.where(done[0], values[0], np.nan).reshape(grid.shape)


def save_cube(cube: xr.Dataset, groups: xr.Dataset | None, path: Path) -> None:
    """Write the cube's file atomically; `digest_of` of the result identifies its numbers."""
    tree = xr.DataTree.from_dict(
        {"/": cube.drop_encoding(), **({"/param_groups": groups.drop_encoding()} if groups is not None else {})}
    )
    encoding = {"/": {"influence": COMPRESSED}} if "influence" in cube else None

    def write(temporary: Path) -> None:
        tree.to_netcdf(temporary, engine=ENGINE, write_inherited_coords=True, encoding=encoding)
        seal(temporary)

    write_atomically(path, write)


def open_cube(path: Path) -> xr.DataTree:
    """Read a cube into memory and close the file. Raises CubeError for a missing, damaged, foreign or newer file."""
    if path.is_dir():
        raise CubeError(f"{path}: a folder, not a cube; name a file in it")
    if not path.is_file():
        raise CubeError(
            f"{path}: no such cube; make one with `gradscope profile CKPT_DIR` (an online run writes one with its "
            "first probe)"
        )
    if path.suffix == ".json":
        raise CubeError(
            f"{path}: a schedule or other JSON, not a cube; name the .nc file that `gradscope profile` wrote"
        )
    with path.open("rb") as stream:
        if stream.read(8) != b"\x89HDF\r\n\x1a\n":
            raise CubeError(
                f"{path}: cannot be read as a cube, it is no NetCDF4 file, or damaged; name the .nc file that "
                "`gradscope profile` wrote"
            )
    if seal_holds(path) is False:
        raise CubeError(
            f"{path}: damaged, its bytes are not those that were written (whose digest stands at its end); profile "
            "again into another file"
        )
    try:
        with xr.open_datatree(path, engine=ENGINE) as tree:
            _check_size(tree, path)
            loaded = tree.load()
    except CubeError:
        raise
    except UNREADABLE as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise CubeError(
            f"{path}: cannot be read as a cube, it is damaged or not one ({reason}); profile again into another file"
        ) from error
    version = loaded.attrs.get("schema_version")
    missing = [name for name in (*QUANTITIES, "status", "cost", "n_samples") if name not in loaded.dataset]
    if version is None or missing or "reference" not in loaded.attrs:
        raise CubeError(
            f"{path}: a NetCDF file, but no cube of gradscope (it lacks {', '.join(missing) or 'schema_version'})"
        )
    if int(version) > SCHEMA_VERSION:
        raise CubeError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest this version "
            "reads; upgrade gradscope"
        )
    return loaded


def _check_size(tree: xr.DataTree, path: Path) -> None:
    """Raise CubeError before memory is asked for that no cube of such a file needs."""
    declared = sum(variable.nbytes for node in tree.subtree for variable in node.dataset.variables.values())
    if declared > max(LARGEST, DENSEST * path.stat().st_size):
        raise CubeError(
            f"{path}: declares {declared / 2**30:,.1f} GiB of numbers in a file of {path.stat().st_size:,} bytes; no "
            "profile writes that"
        )


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
    moments, covariance, done = _moments_of(here, grid)
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


def _moments_of(here: xr.Dataset, grid: Grid) -> tuple[Moments, NDArray[np.float64], NDArray[np.bool_]]:
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


def _check_axes(grid: Grid) -> None:
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
    }
    for axis, values in grid.axes.items():
        if axis in taken or axis.removesuffix("_se") in estimates:
            raise UsageError(f"a grid axis cannot be called {axis!r}: the cube uses that name itself; choose another")
        if len({isinstance(value, str) for value in values}) > 1:
            raise UsageError(
                f"axis {axis!r} mixes texts and numbers ({', '.join(map(str, values))}); write all as texts"
            )


def _add_estimate(cube: xr.Dataset, name: str, title: str, dims: tuple[str, ...], shape: tuple[int, ...]) -> None:
    related = " ".join((f"{name}_se", *(other for other in ("n_samples", "status") if "param_group" not in dims)))
    cube[name] = (dims, np.full(shape, np.nan), {"long_name": title, "units": "1", "ancillary_variables": related})
    cube[f"{name}_se"] = (dims, np.full(shape, np.nan), {"long_name": f"one standard error of {name}", "units": "1"})
