"""The figure of two cubes: its numbers against the arrays of synthetic cubes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr

from gradscope.plots import plot_compare
from gradscope.plots._view import best_strategies, read_view, variable
from gradscope.plots.compare import CompareInfo, _compare_info
from schedulers.errors import UsageError
from schedulers.strategy import Strategy
from tests.gradscope.cube_samples import sample_cube, sample_schedule


@pytest.fixture(scope="module")
def cubes() -> tuple[xr.Dataset, xr.Dataset]:
    return sample_cube(), sample_cube(seed=1, patches=(2, 4, 14), progress=(0.01, 0.26, 0.4, 1.0), holes=False)


def info_of(a: xr.Dataset, b: xr.Dataset, **options: Any) -> CompareInfo:
    return _compare_info(a, b, **{"names": ("a", "b"), "name": "descent", "metric": None, **options})


@pytest.mark.parametrize("name", ["descent", "ca-mse", "bias_sq"])
@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_points_are_the_values_of_both_where_they_meet(
    cubes: tuple[xr.Dataset, xr.Dataset], name: str, metric: str
) -> None:
    info = info_of(*cubes, name=name, metric=metric)
    assert info.progress == (0.0, 0.25, 1.0)  # .4 is near nothing, .5 and .75 have no partner
    assert [(s["patch"], s["dropout"]) for s in info.strategies] == [(p, d) for p in (2, 4) for d in (0, 0.25, 0.5)]
    for k, (cube, at) in enumerate(zip(cubes, ((0, 1, 4), (0, 1, 3)), strict=True)):
        for part, ending in ((info.values, ""), (info.errors, "_se")):
            array = cube[name.replace("-", "_") + ending].sel(metric=metric, patch=[2, 4])
            expected = array.transpose("progress", "patch", "dropout").values[list(at)].reshape(3, 6)
            np.testing.assert_allclose(part[k], np.where(np.isfinite(expected), expected, np.nan), rtol=1e-12)
    for t in range(3):
        known = np.isfinite(info.values[:, t]).all(axis=0)
        assert info.correlation[t] == pytest.approx(spearmanr(*info.values[:, t][:, known]).statistic)


def test_best_strategies_are_those_of_each_cube(cubes: tuple[xr.Dataset, xr.Dataset]) -> None:
    info = info_of(*cubes, name="ca-mse")
    for k, (cube, at) in enumerate(zip(cubes, ((0, 1, 4), (0, 1, 3)), strict=True)):
        found = best_strategies(read_view(cube), variable(cube, "ca-mse"))
        for t, position in enumerate(at):
            best = found[position]
            assert best is not None
            there = info.best[t][k]
            if there is None:  # a patch that the other cube lacks
                assert best.winner.strategy["patch"] in (7, 14)
            else:
                assert dict(info.strategies[there]) == dict(best.winner.strategy)
    assert info_of(*cubes, name="variance").best == ((None, None),) * 3  # of a moment none is called the best


def test_a_cube_against_itself_lies_on_the_diagonal(cubes: tuple[xr.Dataset, xr.Dataset]) -> None:
    info = info_of(cubes[0], cubes[0])
    np.testing.assert_array_equal(info.values[0], info.values[1])
    assert all(rho == pytest.approx(1) for rho in info.correlation) and len(info.progress) == 5
    assert all(a == b for a, b in info.best) and "difference: 0" in info.hover[0][3]


def test_points_without_a_value_are_left_out_and_bars_are_on_the_scale(cubes: tuple[xr.Dataset, xr.Dataset]) -> None:
    figure = plot_compare(cubes[0], cubes[0], variable="bias_sq", names=("one", "two"), progress=0.5)
    assert len(figure.frames) == 5 and figure.layout.sliders[0].active == 2
    drawn = sum(x is not None for trace in figure.data[:3] for x in trace.x)
    assert drawn == 8  # one of the nine failed there
    bars = np.array([v for trace in figure.data[:3] for v in (*trace.error_x.array, *trace.error_x.arrayminus)])
    assert np.isfinite(bars).all() and (bars >= 0).all() and bars.max() > 0
    assert figure.layout.xaxis.title.text == "one" and "Rank correlation" in figure.layout.title.text


def test_two_schedules_are_strips(cubes: tuple[xr.Dataset, xr.Dataset]) -> None:
    schedule = sample_schedule(cubes[0])
    figure = plot_compare(schedule, schedule, names=("one", "two"))
    assert "Schedules" in figure.layout.title.text
    assert {"one", "two"} <= {
        text for note in figure.layout.annotations for text in ("one", "two") if text in note.text
    }


def test_what_cannot_be_compared_is_told(cubes: tuple[xr.Dataset, xr.Dataset]) -> None:
    a, b = cubes
    renamed = a.rename(dropout="drop").assign_attrs(reference="patch=2,drop=0")
    wrong: list[tuple[Any, Any, dict[str, Any], str]] = [
        (a, sample_schedule(a), {}, "a cube and a schedule"),
        (a, b, {"names": ("x", "x")}, "two different ones"),
        (a, b, {"variable": "other"}, "it holds"),
        (a, b, {"metric": "other"}, "it holds"),
        (a, sample_cube(patches=(3, 6), image_size=30, holes=False), {}, "no strategy in common"),
        (a, sample_cube(progress=(0.1, 0.4), holes=False), {}, "progress points"),
        (a, renamed, {}, "one has the axes patch, dropout and the other patch, drop"),
    ]
    for first, second, options, said in wrong:
        with pytest.raises(UsageError, match=said):
            plot_compare(first, second, **options)


def test_strategies_look_the_same_wherever_they_are_drawn(cubes: tuple[xr.Dataset, xr.Dataset]) -> None:
    from gradscope.plots._marks import Marks

    marks = Marks.of([Strategy(patch=p, dropout=d) for p in range(1, 11) for d in (0, 0.5)])
    assert marks.symbol(0) != marks.symbol(1) and marks.colour(1) == marks.colour(9)  # past eight colours ...
    assert marks.symbol(16).endswith("-open") and not marks.symbol(0).endswith("-open")  # ... the symbol is open
    assert len(marks.legend()) == 12 and Marks.of([Strategy(patch=1)]).other == ""
