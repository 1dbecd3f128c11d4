"""The figure of parameter groups: its numbers against the arrays of a synthetic cube."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from gradscope.plots import plot_groups
from gradscope.plots.groups import _groups_info
from gradscope.plots.heatmap import HeatmapInfo
from schedulers.errors import UsageError
from tests.gradscope.cube_samples import FAILED_CELL, GROUPS, SHARES, sample_cube, tree_of


def info_of(tree: xr.DataTree, **options: Any) -> HeatmapInfo:
    return _groups_info(tree, **{"name": "bias_sq", "metric": None, "strategies": None, **options})


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_cells_are_the_groups_parts_of_the_criterion(metric: str) -> None:
    cube = sample_cube()
    tree, chosen = tree_of(cube), cube.sel(metric=metric)
    norm = chosen["norm_sq_ref"] if "norm_sq_ref" in cube else chosen["norm_sq"].isel(patch=0, dropout=0)
    cost = cube["cost"].sel(cost_model="tokens") / cube.attrs["beta"]
    for name, whole in (("bias_sq", chosen["bias_sq"]), ("variance", cost * chosen["variance"])):
        info = info_of(tree, name=name, metric=metric)
        expected = (whole / norm).transpose("progress", "patch", "dropout").values.reshape(5, 9)
        assert info.values.shape == (5, 3, 9) and info.rows[-1] == "embed"  # next to the input, on top
        for row, share in zip(range(3), SHARES[::-1], strict=True):
            np.testing.assert_allclose(info.values[:, row], share * expected, rtol=1e-12)


def test_columns_are_all_strategies_or_those_along_the_axes_or_those_asked_for() -> None:
    tree = tree_of(sample_cube())
    assert info_of(tree).columns == tuple(f"{p} / {d:g}" for p in (2, 4, 7) for d in (0.0, 0.25, 0.5))
    assert info_of(tree).column_title == "patch (pixel) / dropout"
    large = tree_of(sample_cube(patches=(2, 4, 7, 14), dropouts=(0.0, 0.25, 0.5, 0.75)))
    along = [(2, 0.0), (2, 0.25), (2, 0.5), (2, 0.75), (4, 0.0), (7, 0.0), (14, 0.0)]
    assert info_of(large).columns == tuple(f"{p} / {d:g}" for p, d in along)
    asked = info_of(tree, strategies=[{"patch": 7, "dropout": 0.5}, {"patch": 2, "dropout": 0}])
    assert asked.columns == ("7 / 0.5", "2 / 0")
    np.testing.assert_array_equal(asked.values[..., 0], info_of(tree).values[..., 8])


def test_what_failed_or_is_missing_is_told_apart_and_the_heaviest_group_is_named() -> None:
    info = info_of(tree_of(sample_cube()))
    t, patch, dropout = FAILED_CELL
    assert info.failed[t, :, 3 * patch + dropout].all() and info.failed.sum() == 3
    assert info.missing[4, :, 7:].all() and not info.failed[4].any()
    assert info.notes[0] == ("Over ‖G‖² of the whole gradient", "Most of the bias: embed, 50% (mean over strategies)")
    long = info.rows[0]
    assert len(long) == 16 and long.startswith("a_very_") and long.endswith("can_read") and "…" in long
    assert GROUPS[2] in info.hover[1][0][4] and "20.0% of the sum over groups" in info.hover[1][0][4]


def test_nothing_measured_is_said() -> None:
    tree = tree_of(sample_cube())
    tree["param_groups"]["bias_sq"].values[0] = np.nan
    assert info_of(tree).notes[0] == ("Nothing measured here",)


def test_the_figure_has_a_frame_per_progress_and_room_for_names() -> None:
    figure = plot_groups(tree_of(sample_cube()), variable="variance", progress=0.8)
    assert len(figure.frames) == 5 and figure.layout.sliders[0].active == 3
    assert 100 < figure.layout.margin.l < 130 and "variance" in figure.layout.title.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variable": "norm_sq"}, "choose from bias_sq, variance"),
        ({"metric": "other"}, "it holds euclidean, optimizer"),
        ({"strategies": []}, "give at least one"),
        ({"strategies": [{"patch": 3, "dropout": 0}]}, "patch"),
    ],
)
def test_wrong_use_is_told(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plot_groups(tree_of(sample_cube()), **change)


def test_a_cube_without_groups_or_beta_is_refused() -> None:
    cube = sample_cube()
    for without in (cube, xr.DataTree(cube)):
        with pytest.raises(UsageError, match="no parameter groups"):
            plot_groups(without)  # type: ignore[arg-type]
    del cube.attrs["beta"]
    with pytest.raises(UsageError, match="beta"):
        plot_groups(tree_of(cube), variable="variance")
    assert plot_groups(tree_of(cube)) is not None
