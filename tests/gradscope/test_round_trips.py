"""Cubes of any grid come back from their file as they were, or are refused when they are made; parts make the whole."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from gradscope import ProfileOptions, merge_cubes, open_cube, profile, save_cube
from gradscope.cube import DONE, FAILED, digest_of, grid_of, groups_of, new_cube, new_groups
from gradscope.errors import CubeError, TaskError, UsageError
from schedulers import Grid, Strategy
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints

COUNTS = [15, pytest.param(2000, marks=pytest.mark.slow)]
ODD = [
    "é", "e\u0301", "𝛁", "☃" * 9, "a\nb", "a\tb", '"', "'", "\\", "a b", "a.b", "{}", "%", "#", ";", "A" * 300, "@",
    "x=1", "NAME", "dtype", "values", "coordinates", "units", "days", "time", "_FillValue", "nan?", "-", "+1+", "\x7f",
    "\ufeff",
]  # fmt: skip
REFUSED = [
    "", " a", "a ", "a,b", "\0", "a\0b", "a\0", "\ud800", "a\udfffb", "/", "a/b", ".", "..", "param_groups",
    "_nc4_non_coord_a", "metric", "status", "cost", "tokens_query", "variance_se", "a=b",
]  # fmt: skip
texts = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=9)
awkward = st.sampled_from([*REFUSED, "1", "0x", "nan", "inf", "1_0", "١٢", "1e5"]) | st.text(
    st.characters(), max_size=5
)
numbers = (
    st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0, -0.0, 5e-324, 1e300, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 0.1])
)  # fmt: skip
UNITS = ["1", "pixel", "days", "hours since 2000-01-01", "s", "seconds", "é", "m\0", "\ud800", ""]
any_floats = st.floats() | st.sampled_from([-0.0, 5e-324, math.nan, math.inf, -math.inf])
settled = {"derandomize": True, "deadline": None, "database": None}


@st.composite
def grids(draw: Any) -> Grid | None:
    """Up to three axes of numbers or texts, plain or odd; None where the values make no grid at all."""
    axes: dict[str, tuple[Any, ...]] = {}
    for name in draw(st.lists(texts | awkward, min_size=1, max_size=3, unique=True)):
        values = draw(st.sampled_from([texts, texts, texts | awkward, numbers, st.integers(-99, 99)]))
        axes[name] = tuple(draw(st.lists(values, min_size=1, max_size=3)))
    try:
        return Grid(
            axes,
            Strategy({name: values[-1] for name, values in axes.items()}),
            {name: draw(st.sampled_from(UNITS)) for name in axes if draw(st.booleans())},
        )
    except UsageError:
        return None


@st.composite
def cubes(draw: Any) -> tuple[Grid | None, dict[str, Any], list[str], int]:
    """A grid, the other labels and attributes of a cube, names of parameter groups, and a seed for its numbers."""
    count = draw(st.integers(1, 3))
    failures = draw(st.dictionaries(st.text(max_size=9), st.text(max_size=30), max_size=3))
    attributes = {
        "failures_json": json.dumps(failures) + " " * draw(st.sampled_from([0, 0, 70_000])),
        "config_json": json.dumps(draw(st.recursive(any_floats | st.text(max_size=9), st.lists, max_leaves=5))),
        "profile_command": draw(texts | awkward),
        "batch_size": 8, "beta": draw(st.floats(1e-300, 1e300)), "seed": draw(st.integers(0, 2**63 - 1)),
    }  # fmt: skip
    labels = {
        "progress": sorted(draw(st.lists(st.floats(0, 1), min_size=count, max_size=count, unique=True))),
        "steps": list(range(count)),
        "names": draw(st.lists(texts | awkward, min_size=count, max_size=count)),
        "digests": [f"{number:064x}" for number in range(count)],
        "metrics": ["euclidean"], "replicates": draw(st.integers(1, 3)), "attributes": attributes,
    }  # fmt: skip
    return draw(grids()), labels, draw(st.lists(texts | awkward, max_size=3, unique=True)), draw(st.integers(0, 99))


def filled(dataset: xr.Dataset, seed: int) -> xr.Dataset:
    """Every number of a dataset's variables is an arbitrary one of its type, also nan, infinity, -0 and denormals."""
    rng = np.random.default_rng(seed)
    for variable in dataset.data_vars.values():
        if variable.dtype.kind == "f":
            odd = rng.choice([np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e-310, 1.5, -1e308], variable.shape)
            with np.errstate(over="ignore", under="ignore"):
                variable.values[...] = odd
        elif variable.dtype.kind == "i":
            variable.values[...] = rng.integers(0, 3, variable.shape)
        else:
            variable.values[...] = rng.choice(np.array(["", "é" * 70, "k"], object), variable.shape)
    return dataset


def assert_same(made: xr.Dataset, read: xr.Dataset) -> None:
    """Variables, coordinates, kinds of types (a text is a text), attributes and bits of numbers are the same."""
    assert set(made.variables) == set(read.variables) and dict(made.sizes) == dict(read.sizes)
    for name, variable in made.variables.items():
        other = read.variables[name]
        assert variable.dims == other.dims and variable.dtype.kind.replace("O", "U") == other.dtype.kind.replace(
            "O", "U"
        )
        if variable.dtype.kind in "OU":
            assert list(map(str, variable.values.ravel())) == list(map(str, other.values.ravel()))
        else:
            assert variable.dtype == other.dtype and variable.values.tobytes() == other.values.tobytes()
        assert str(variable.attrs) == str({key: other.attrs[key] for key in variable.attrs})
    assert {key: str(value) for key, value in made.attrs.items()} == {k: str(v) for k, v in read.attrs.items()}


@pytest.mark.parametrize("count", COUNTS)
def test_a_cube_comes_back_as_it_was_or_is_refused_when_it_is_made(count: int, tmp_path: Path) -> None:
    kept = 0

    @settings(max_examples=count, **settled)  # type: ignore[arg-type]
    @given(cubes())
    def check(parts: tuple[Grid | None, dict[str, Any], list[str], int]) -> None:
        nonlocal kept
        grid, labels, group_names, seed = parts
        if grid is None:
            return
        costs = {"tokens": {strategy: 1.0 for strategy in grid.strategies()}}
        try:
            cube = new_cube(grid, costs=costs, tokens={"query": {}}, **labels)
            groups = new_groups(cube, group_names)
        except UsageError:
            return
        kept += 1
        filled(cube, seed), filled(groups, seed)
        save_cube(cube, groups, tmp_path / "cube.nc")
        read = open_cube(tmp_path / "cube.nc")
        assert_same(cube, read.to_dataset())
        found = groups_of(read)
        assert found is not None
        for name in groups.data_vars:
            assert groups[name].values.tobytes() == found[name].values.tobytes()
        assert [str(name) for name in found["param_group"].values] == group_names
        assert digest_of(read.to_dataset()) == digest_of(cube)
        again = grid_of(read.to_dataset())
        assert (again.axes, again.reference) == (grid.axes, grid.reference)
        assert again.units == {axis: unit for axis, unit in grid.units.items() if unit != "1"}
        for strategy in again.strategies():
            assert Strategy.parse(str(strategy)) == strategy

    with mock.patch("gradscope.files.os.fsync", lambda descriptor: None):
        check()
    assert kept > count // 10
    print(f"{kept} of {count} cubes could be made")


@pytest.mark.parametrize("name", REFUSED)
def test_an_axis_that_no_file_or_text_can_hold_is_refused_by_name(name: str, tmp_path: Path) -> None:
    task = LineTask()
    task.cost = lambda strategy: 1.0  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="axis"):
        task.grid = Grid({name: (1, 2)}, Strategy({name: 1}))
        profile(task, make_checkpoints(tmp_path / "c"), tmp_path / "cube.nc")
    assert not (tmp_path / "cube.nc").exists()


@pytest.mark.parametrize("value", ["", "a,b", " a", "a\0", "\ud800", "16", "nan", "1e3", "١٢"])
def test_a_value_that_no_file_or_text_can_hold_is_refused_by_axis(value: str, tmp_path: Path) -> None:
    task = LineTask()
    task.cost = lambda strategy: 1.0  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="axis 'mode'"):
        task.grid = Grid({"mode": ("plain", value)}, Strategy(mode="plain"))
        profile(task, make_checkpoints(tmp_path / "c"), tmp_path / "cube.nc")


@pytest.mark.parametrize("described", [{"when": {1, 2}}, {"path": Path("x")}, {(1, 2): 3}])
@pytest.mark.parametrize("method", ["describe", "training"])
def test_what_a_task_tells_must_be_json(method: str, described: Any, tmp_path: Path) -> None:
    task = LineTask()
    setattr(task, method, lambda *_: described)
    with pytest.raises(TaskError, match=method):
        profile(task, make_checkpoints(tmp_path / "c"), tmp_path / "cube.nc")


@pytest.fixture(scope="module")
def whole() -> xr.DataTree:
    """A profile whose axes are in no order."""
    task = LineTask()
    task.grid = Grid({"keep": ("half", "all"), "noise": (2, 0, 0.5)}, Strategy(keep="all", noise=0))
    with tempfile.TemporaryDirectory() as place:
        options = ProfileOptions(samples=24, allocation="fixed", seed=3)
        return profile(task, make_checkpoints(Path(place) / "c"), Path(place) / "cube.nc", options=options)[0]


def part_of(whole: xr.DataTree, cells: list[tuple[int, ...]]) -> xr.DataTree:
    """The cube with those cells alone, as a profile of these would have left it."""
    cube, groups = whole.to_dataset(), groups_of(whole)
    assert groups is not None
    grid = grid_of(cube)
    empty = new_cube(
        grid, progress=cube["progress"].values, steps=cube["step"].values, names=list(cube["checkpoint"].values),
        digests=list(cube["checkpoint_sha256"].values), metrics=list(cube["metric"].values),
        costs={"tokens": {s: float(cube["cost"].values[(0, *grid.position(s))]) for s in grid.strategies()}},
        tokens={}, attributes={k: v for k, v in cube.attrs.items() if k not in ("schema_version", "reference")},
        replicates=cube.sizes["replicate"],
    )  # fmt: skip
    blank = new_groups(empty, [str(name) for name in groups["param_group"].values])
    for at in cells:
        for source, target in ((cube, empty), (groups, blank)):
            for name, variable in target.data_vars.items():
                if variable.dims[0] == "progress":
                    variable.values[at] = source[name].values[at]
    return xr.DataTree.from_dict({"/": empty, "/param_groups": blank})


@pytest.mark.parametrize("count", [6, pytest.param(400, marks=pytest.mark.slow)])
def test_any_partition_merged_in_any_order_is_the_cube(count: int, whole: xr.DataTree) -> None:
    cube = whole.to_dataset()
    cells = list(itertools.product(*map(range, cube["status"].shape)))

    @settings(max_examples=count, **settled)  # type: ignore[arg-type]
    @given(st.lists(st.integers(0, 3), min_size=len(cells), max_size=len(cells)), st.permutations(range(4)), st.data())
    def check(owners: list[int], order: list[int], data: st.DataObject) -> None:
        parts = [part_of(whole, [at for at, owner in zip(cells, owners, strict=True) if owner == i]) for i in order]
        doubled = data.draw(st.integers(0, 3))
        parts.append(parts[doubled])  # what two parts hold alike counts once
        merged, groups = merge_cubes(parts)
        assert digest_of(merged) == digest_of(cube) and grid_of(merged) == grid_of(cube)
        assert groups is not None and digest_of(groups) == digest_of(groups_of(whole))  # type: ignore[arg-type]

    check()


def test_where_parts_overlap_the_larger_measurement_counts_and_a_failed_cell_never(whole: xr.DataTree) -> None:
    cells = list(itertools.product(*map(range, whole["status"].shape)))
    small, failed = part_of(whole, cells[:4]), part_of(whole, cells)
    for at in cells[:4]:
        small["n_samples"].values[at] -= 8
        small["variance"].values[at] += 1
    failed["status"].values[...] = FAILED
    failed["n_samples"].values[...] = 0
    for order in itertools.permutations([small, failed, whole]):
        assert digest_of(merge_cubes(order)[0]) == digest_of(whole.to_dataset())
    assert (merge_cubes([failed, small])[0]["status"].values == DONE).sum() == 4


def test_other_checkpoints_at_one_progress_are_refused_in_any_order(whole: xr.DataTree) -> None:
    other = part_of(whole, [])
    other["checkpoint_sha256"].values[1] = "f" * 64
    for order in ([whole, other], [other, whole]):
        with pytest.raises(CubeError, match=r"different checkpoints at progress 0\.5"):
            merge_cubes(order)
