"""The cube's file: round trip, refusals, merging."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

from gradscope import Grid, ProfileOptions, Strategy, merge_cubes, open_cube, profile, profile_of, save_cube
from gradscope.cube import grid_of, groups_of
from gradscope.cube_costs import MEASURED, lost_costs, put_costs
from gradscope.errors import CubeError, GradscopeError, UsageError
from schedulers import optimize
from tests.gradscope.tasks_for_tests import FailingTask, LineTask, make_checkpoints

OPTIONS = ProfileOptions(samples=32, allocation="fixed")


@pytest.fixture
def cube_file(tmp_path: Path) -> Path:
    profile(FailingTask(), make_checkpoints(tmp_path / "ckpt_dir"), tmp_path / "cube.nc", options=OPTIONS)
    return tmp_path / "cube.nc"


def test_round_trip_is_identity_also_with_nan_and_text_labels(cube_file: Path, tmp_path: Path) -> None:
    tree = open_cube(cube_file)
    save_cube(tree.to_dataset(), groups_of(tree), tmp_path / "again.nc")
    again = open_cube(tmp_path / "again.nc")
    xr.testing.assert_identical(tree.dataset, again.dataset)
    xr.testing.assert_identical(groups_of(tree), groups_of(again))
    grid = grid_of(again.dataset)
    assert grid == FailingTask.grid and grid.strategies() == FailingTask.grid.strategies()


def test_any_netcdf_reader_sees_labels_units_and_flags(cube_file: Path) -> None:
    with h5py.File(cube_file) as file:
        assert file["bias_sq"].attrs["ancillary_variables"] == "bias_sq_se n_samples status"
        assert file["status"].attrs["flag_meanings"] == "pending done failed"
        assert [x.decode() for x in file["keep"][:]] == ["all", "half"]
        assert "progress" in file["param_groups"]  # the group can be read alone


@pytest.mark.parametrize("damage", ["empty", "half", "text", "zeroed"])
def test_damaged_files_are_named_and_kept(cube_file: Path, damage: str) -> None:
    content = cube_file.read_bytes()
    broken = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "text": b"not a cube",
        "zeroed": b"\0" * len(content),
    }[damage]
    cube_file.write_bytes(broken)
    with pytest.raises(CubeError, match=r"cube.nc: cannot be read as a cube"):
        open_cube(cube_file)
    with pytest.raises(CubeError):
        profile(FailingTask(), cube_file.parent / "ckpt_dir", cube_file, options=OPTIONS)
    assert cube_file.read_bytes() == broken


def test_foreign_newer_and_missing_files_are_refused(cube_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CubeError, match="no such cube"):
        open_cube(tmp_path / "absent.nc")
    xr.Dataset({"x": 1.0}).to_netcdf(tmp_path / "foreign.nc", engine="h5netcdf")
    with pytest.raises(CubeError, match="no cube of gradscope"):
        open_cube(tmp_path / "foreign.nc")
    with h5py.File(cube_file, "a") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(CubeError, match="schema version 99 is newer"):
        open_cube(cube_file)


def test_a_folder_that_cannot_be_written_is_one_clear_error(cube_file: Path, tmp_path: Path) -> None:
    tree = open_cube(cube_file)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GradscopeError, match=r"cannot be written .*; choose a folder you may write to"):
        save_cube(tree.to_dataset(), None, tmp_path / "file" / "cube.nc")


def test_parts_of_one_profile_merge_to_the_whole(tmp_path: Path) -> None:
    folder = make_checkpoints(tmp_path / "ckpt_dir")
    whole, _ = profile(LineTask(), folder, tmp_path / "whole.nc", options=OPTIONS)
    parts = []
    for i, noise in enumerate([(0, 0.5), (0, 2)]):
        task = LineTask()
        task.grid = Grid({**LineTask.grid.axes, "noise": noise}, LineTask.grid.reference)
        parts.append(profile(task, folder, tmp_path / f"{i}.nc", options=OPTIONS)[0])
    cube, groups = merge_cubes(parts)
    xr.testing.assert_identical(cube.drop_attrs(), whole.dataset.drop_attrs())
    assert groups is not None
    xr.testing.assert_identical(groups.drop_attrs(), groups_of(whole).drop_attrs())
    other, _ = profile(LineTask(), folder, tmp_path / "other.nc", options=dataclasses.replace(OPTIONS, seed=1))
    with pytest.raises(CubeError, match="differ in seed"):
        merge_cubes([whole, other])


def test_profile_of_feeds_the_optimizer_and_leaves_failed_cells_out(cube_file: Path) -> None:
    cube = open_cube(cube_file).dataset
    found = profile_of(cube, metric="euclidean")
    assert found.cost.tolist() == [3, 2, 1, 1.5, 1, 0.5] and found.beta == 8 * 3
    failed = [i for i, s in enumerate(found.grid.strategies()) if s.number("noise") == 2]
    assert np.isnan(found.moments.variance[:, failed]).all()
    at = dict(progress=0.5, keep="half", noise=0.5, metric="euclidean")
    assert found.moments.inner[1, 4] == float(cube["inner"].sel(at))
    plan = optimize(found, 1e4, criterion="ca-mse")
    assert all(s.number("noise") != 2 for s in plan.strategies)
    scores, errors = found.scores("ca-mse", [0.5])
    assert scores[0, 4] == pytest.approx(float(cube["ca_mse"].sel(at)))
    assert errors[0, 4] == pytest.approx(float(cube["ca_mse_se"].sel(at)))
    with pytest.raises(UsageError, match="no metric 'cosine'; it has euclidean, optimizer"):
        profile_of(cube, metric="cosine")
    with pytest.raises(UsageError, match="no costs of the model 'measured'; it has tokens"):
        profile_of(cube, cost_model="measured")


def test_an_axis_may_not_take_a_name_of_the_cube(tmp_path: Path) -> None:
    class Clash(LineTask):
        grid = Grid({"metric": ("a", "b")}, Strategy(metric="a"))

        def cost(self, strategy: Strategy) -> float:
            return 1.0

    with pytest.raises(UsageError, match="cannot be called 'metric'"):
        profile(Clash(), make_checkpoints(tmp_path / "c"), tmp_path / "cube.nc", options=OPTIONS)


def test_merging_keeps_the_larger_measurement_and_refuses_other_runs(tmp_path: Path) -> None:
    folder = make_checkpoints(tmp_path / "ckpt_dir")
    large, _ = profile(LineTask(), folder, tmp_path / "large.nc", options=dataclasses.replace(OPTIONS, samples=64))

    class Failing(FailingTask):
        def describe(self):  # type: ignore[no-untyped-def]
            return LineTask().describe()

    small, _ = profile(Failing(), folder, tmp_path / "small.nc", options=OPTIONS)
    for order in ([large, small], [small, large]):
        cube, _ = merge_cubes(order)
        xr.testing.assert_identical(cube.drop_attrs(), large.dataset.drop_attrs())
    (folder / "step-5.pt").write_bytes(b"another run")
    other, _ = profile(LineTask(), folder, tmp_path / "other.nc", options=OPTIONS)
    with pytest.raises(CubeError, match=r"different checkpoints at progress 0.5"):
        merge_cubes([large, other])


def test_strategies_share_the_references_own_norm(tmp_path: Path) -> None:
    folder = make_checkpoints(tmp_path / "ckpt_dir")
    tree, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    cube = tree.to_dataset()
    cube["norm_sq_ref"].loc[dict(keep="half", noise=0.5)] = 123.0  # as if measured on other samples
    found = profile_of(cube)
    reference = cube["norm_sq_ref"].sel(keep="all", noise=0, metric="optimizer")
    assert (found.moments.norm_sq_ref == reference.values[:, None]).all()


def test_axes_of_mixed_labels_are_refused(tmp_path: Path) -> None:
    class Mixed(LineTask):
        grid = Grid({"noise": (0, "much")}, Strategy(noise=0))

        def cost(self, strategy: Strategy) -> float:
            return 1.0

    with pytest.raises(UsageError, match="mixes texts and numbers"):
        profile(Mixed(), make_checkpoints(tmp_path / "c"), tmp_path / "cube.nc", options=OPTIONS)


ABOUT = {"device": "a device", "threads": 1, "batch_size": 8, "spread": {}, "failures": {}}


def with_costs(tree: xr.DataTree, seconds: dict[str, float], path: Path, **about: object) -> xr.DataTree:
    """The cube with seconds per strategy (FLOPs ten times, bytes a hundred times that), written and read again."""
    values = {
        name: {Strategy.parse(text): factor * value for text, value in seconds.items()}
        for name, factor in zip(MEASURED, (1, 10, 100), strict=True)
    }
    save_cube(put_costs(tree.to_dataset(), values, {**ABOUT, **about}), groups_of(tree), path)
    return open_cube(path)


def measured(cube: xr.Dataset, name: str = "seconds") -> list[float | None]:
    """Over keep=all, half by noise=0, 0.5, 2; None where not measured."""
    values = cube.sel(cost_model="measured")["cost"] if name == "cost" else cube[name]
    flat = values.transpose("keep", "noise").values.ravel()
    return [None if np.isnan(value) else float(value) for value in flat]


def test_measured_costs_survive_the_file_and_reach_the_optimizer(cube_file: Path, tmp_path: Path) -> None:
    fresh = open_cube(cube_file)
    assert all(measured(fresh.dataset, name) == [None] * 6 for name in MEASURED)
    assert fresh.attrs["measured_json"] == "{}"
    assert profile_of(fresh.dataset).seconds is None and profile_of(fresh.dataset).memory is None
    seconds = {"keep=all,noise=0": 0.02, "keep=half,noise=0": 0.01, "keep=half,noise=2": 0.005}
    cube = with_costs(fresh, seconds, cube_file).dataset
    assert measured(cube) == [0.02, None, None, 0.01, None, 0.005]
    assert measured(cube, "cost") == [3, None, None, 1.5, None, 0.75]  # the reference's as in tokens
    found = profile_of(cube, cost_model="measured")
    assert found.reference_cost == profile_of(cube).reference_cost == 3
    np.testing.assert_array_equal(found.seconds, cube["seconds"].values.ravel())
    np.testing.assert_array_equal(found.memory, 100 * cube["seconds"].values.ravel())
    for name in ("device", "threads", "batch_size", "source"):
        again = with_costs(open_cube(cube_file), {"keep=all,noise=0": 0.04}, tmp_path / "b.nc", **{name: 2}).dataset
        assert measured(again) == [0.04] + [None] * 5  # never those of two machines or models side by side
    with pytest.raises(CubeError, match="keep=none,noise=0 has no place in the cube"):
        with_costs(fresh, {"keep=none,noise=0": 1.0}, cube_file)


def test_costs_of_further_strategies_join_those_of_the_same_conditions(cube_file: Path) -> None:
    first = {"keep=all,noise=0": 0.02, "keep=half,noise=0": 0.01, "keep=half,noise=2": 0.005}
    spread, failures = {"keep=half,noise=0": 0.1, "keep=half,noise=2": 0.2}, {"keep=all,noise=0.5": "out of memory"}
    cube = with_costs(open_cube(cube_file), first, cube_file, spread=spread, failures=failures)
    new = {"keep=all,noise=0": 0.04, "keep=all,noise=0.5": 0.03, "keep=half,noise=2": np.nan}
    about = {**ABOUT, "spread": {"keep=all,noise=0.5": 0.3}, "failures": {"keep=half,noise=2": "no memory"}}
    strategies = [Strategy.parse(text) for text in new]
    assert lost_costs(cube.dataset, strategies, about) == 0
    assert lost_costs(cube.dataset, strategies, {**about, "source": "random numbers"}) == 1  # keep=half,noise=0
    joined = with_costs(cube, new, cube_file, **about).dataset
    assert measured(joined) == [0.04, 0.03, None, 0.01, None, None]
    assert measured(joined, "cost") == pytest.approx([3, 2.25, None, 0.75, None, None], nan_ok=True)
    told = json.loads(joined.attrs["measured_json"])
    assert told["spread"] == {"keep=half,noise=0": 0.1, "keep=all,noise=0.5": 0.3}
    assert told["failures"] == {"keep=half,noise=2": "no memory"}


def test_a_resumed_profile_keeps_measured_costs_where_the_grid_grew(tmp_path: Path) -> None:
    folder, out, task = make_checkpoints(tmp_path / "ckpt_dir"), tmp_path / "cube.nc", LineTask()
    task.grid = Grid({"keep": ("half", "all"), "noise": (2, 0)}, LineTask.grid.reference)
    small, _ = profile(task, folder, out, options=OPTIONS)
    with_costs(small, {"keep=all,noise=0": 0.03, "keep=half,noise=0": 0.01, "keep=half,noise=2": 0.02}, out)
    profile(LineTask(), folder, out, options=OPTIONS)
    cube = open_cube(out).dataset
    assert measured(cube) == [0.03, None, None, 0.01, None, 0.02]
    assert measured(cube, "memory") == pytest.approx([3, None, None, 1, None, 2])
    assert measured(cube, "cost") == [3, None, None, 1, None, 2]
    assert json.loads(cube.attrs["measured_json"])["device"] == "a device"


def test_a_cube_from_before_measured_costs_can_be_read_resumed_and_given_some(tmp_path: Path) -> None:
    folder, out = make_checkpoints(tmp_path / "ckpt_dir"), tmp_path / "cube.nc"
    tree, _ = profile(LineTask(), folder, out, options=OPTIONS)
    old = tree.to_dataset().drop_vars(list(MEASURED))
    del old.attrs["measured_json"]
    save_cube(old, groups_of(tree), out)
    assert profile_of(open_cube(out).dataset).seconds is None
    assert measured(with_costs(open_cube(out), {"keep=all,noise=0": 0.02}, tmp_path / "b.nc").dataset)[0] == 0.02
    profile(LineTask(), folder, out, options=OPTIONS)
    assert measured(open_cube(out).dataset) == [None] * 6


def test_merged_cubes_keep_measured_costs_the_first_counts_and_other_machines_do_not(tmp_path: Path) -> None:
    folder, parts = make_checkpoints(tmp_path / "ckpt_dir"), []
    for i, noise in enumerate([(0, 0.5), (0, 2)]):
        task = LineTask()
        task.grid = Grid({**LineTask.grid.axes, "noise": noise}, LineTask.grid.reference)
        parts.append(profile(task, folder, tmp_path / f"{i}.nc", options=OPTIONS)[0])
    first = with_costs(parts[0], {"keep=all,noise=0": 0.03, "keep=half,noise=0.5": 0.01}, tmp_path / "a.nc")
    second = {"keep=all,noise=0": 0.06, "keep=half,noise=2": 0.02}
    same = with_costs(parts[1], second, tmp_path / "b.nc")
    other = with_costs(parts[1], second, tmp_path / "c.nc", device="another device")
    cube, _ = merge_cubes([first, same])
    assert measured(cube) == [0.03, None, None, None, 0.01, 0.02]
    assert measured(cube, "cost") == [3, None, None, None, 1, 2]
    assert measured(merge_cubes([first, other])[0]) == [0.03, None, None, None, 0.01, None]
    drawn = with_costs(parts[1], second, tmp_path / "d.nc", source="random numbers, model small")
    assert measured(merge_cubes([first, drawn])[0]) == [0.03, None, None, None, 0.01, None]
    assert measured(merge_cubes([parts[0], other])[0]) == [0.06, None, None, None, None, 0.02]
    assert measured(merge_cubes(parts)[0]) == [None] * 6


def test_an_axis_may_not_take_the_name_of_a_measured_cost(tmp_path: Path) -> None:
    class Clash(LineTask):
        grid = Grid({"memory": (1, 2)}, Strategy(memory=1))

        def cost(self, strategy: Strategy) -> float:
            return 1.0

    with pytest.raises(UsageError, match="cannot be called 'memory'"):
        profile(Clash(), make_checkpoints(tmp_path / "c"), tmp_path / "cube.nc", options=OPTIONS)
