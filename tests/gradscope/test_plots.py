"""Figures: the numbers they show against the arrays of a synthetic cube, and the rules of drawing."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import xarray as xr
from scipy.ndimage import median_filter

from gradscope.plots import plot_bias_variance, plot_heatmap, plot_schedule, plot_training
from gradscope.plots._theme import number, scale_colour, with_error
from gradscope.plots.bias_variance import _bias_variance_info
from gradscope.plots.heatmap import HeatmapInfo, _heatmap_info
from gradscope.plots.schedule import _schedule_info
from gradscope.plots.training import _training_info, running_median
from schedulers.decay import Decay
from schedulers.errors import UsageError
from schedulers.schedule import Schedule, mixed_schedule
from schedulers.strategy import Strategy
from tests.gradscope.cube_samples import (
    FAILED_CELL,
    PENDING_CELLS,
    sample_cube,
    sample_runs,
    sample_schedule,
    third_axis,
)

VARIABLES = ("descent", "ca-mse", "descent-batch", "bias_sq", "bias_sq_plugin", "variance", "norm_sq", "inner")


@pytest.fixture(scope="module")
def cube() -> xr.Dataset:
    return sample_cube()


@pytest.fixture(scope="module")
def schedule(cube: xr.Dataset) -> Schedule:
    return sample_schedule(cube)


def info_of(cube: xr.Dataset, name: str = "descent", **options: Any) -> HeatmapInfo:
    return _heatmap_info(cube, **{"name": name, "metric": None, "axes": None, "schedule": None, **options})


def text_axis(cube: xr.Dataset) -> xr.Dataset:
    made = cube.assign_coords(dropout=["none", "quarter", "half"])
    return made.assign_attrs(reference="patch=2,dropout=none")


def test_importing_plots_imports_neither_plotly_nor_xarray() -> None:
    code = "import sys, gradscope.plots; print([m for m in ('plotly', 'xarray', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_figures_leave_the_default_template_alone(cube: xr.Dataset) -> None:
    before = pio.templates.default
    figure = plot_heatmap(cube)
    assert pio.templates.default == before
    assert figure.layout.template.layout.font.size == 12


# Heat map: the numbers


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_heatmap_holds_the_cubes_values(cube: xr.Dataset, name: str, metric: str) -> None:
    info = info_of(cube, name, metric=metric)
    expected = cube[name.replace("-", "_")].sel(metric=metric).transpose("progress", "dropout", "patch").values
    np.testing.assert_array_equal(info.values, expected)
    np.testing.assert_array_equal(info.missing, np.isnan(expected))
    assert info.columns == (2, 4, 7) and info.rows == (0, 0.25, 0.5)


def test_heatmap_axes_are_horizontal_then_vertical(cube: xr.Dataset) -> None:
    turned = info_of(cube, axes=("dropout", "patch"))
    np.testing.assert_array_equal(turned.values, info_of(cube).values.transpose(0, 2, 1))
    assert (turned.column_title, turned.row_title) == ("dropout", "patch (pixel)")


def test_heatmap_reads_variables_by_the_names_of_their_dimensions(cube: xr.Dataset) -> None:
    turned = cube.copy()
    turned["descent"] = cube["descent"].transpose("metric", "dropout", "patch", "progress")
    np.testing.assert_array_equal(info_of(turned).values, info_of(cube).values)


def test_heatmap_takes_the_optimizer_metric_unless_told(cube: xr.Dataset) -> None:
    assert info_of(cube).metric == "optimizer"
    only = cube.copy()
    for name in cube.data_vars:
        if "metric" in cube[name].dims:
            only[name] = cube[name].where(cube["metric"] != "optimizer")
    assert info_of(only).metric == "euclidean"


def test_heatmap_separates_failed_from_pending_cells(cube: xr.Dataset) -> None:
    info = info_of(cube)
    t, patch, dropout = FAILED_CELL
    assert np.argwhere(info.failed).tolist() == [[t, dropout, patch]]
    for t, patch, dropout in PENDING_CELLS:
        assert info.missing[t, dropout, patch] and not info.failed[t, dropout, patch]


@pytest.mark.parametrize("name", ["descent", "ca-mse", "descent-batch"])
def test_heatmap_marks_the_best_cell(cube: xr.Dataset, name: str) -> None:
    info = info_of(cube, name)
    for t, cell in enumerate(info.best):
        ranked = sorted(
            (float(info.values[t, i, j]), (i, j)) for i in range(3) for j in range(3) if not info.missing[t, i, j]
        )
        assert cell == (ranked[0] if name == "ca-mse" else ranked[-1])[1]


def test_heatmap_marks_no_best_cell_of_a_moment(cube: xr.Dataset) -> None:
    assert info_of(cube, "bias_sq").best == (None,) * 5


def test_heatmap_marks_what_two_standard_errors_do_not_tell_from_the_best(cube: xr.Dataset) -> None:
    info = info_of(cube)
    errors = cube["descent_se"].sel(metric="optimizer").transpose("progress", "dropout", "patch").values
    for t, best in enumerate(info.best):
        assert best is not None
        near = np.abs(info.values[t] - info.values[t][best]) <= 2 * np.hypot(errors[t], errors[t][best])
        near[best] = False
        assert [list(cell) for cell in info.rivals[t]] == np.argwhere(near).tolist()
        hover = [[("standard errors of the best" in text) for text in row] for row in info.hover[t]]
        assert np.argwhere(hover).tolist() == np.argwhere(near).tolist()


def test_heatmap_marks_values_that_may_be_zero(cube: xr.Dataset) -> None:
    info = info_of(cube, "bias_sq")
    errors = cube["bias_sq_se"].sel(metric="optimizer").transpose("progress", "dropout", "patch").values
    expected = (errors > 0) & (np.abs(info.values) <= 2 * errors)
    assert expected.any() and not expected[:, 0, 0].any()  # the reference's bias is zero, and known to be
    np.testing.assert_array_equal(info.uncertain, expected)
    assert "(within two standard errors of zero)" in info.hover[0][1][0]
    figure = plot_heatmap(cube, variable="bias_sq")
    hatched = list(figure.select_traces({"mode": "lines", "line.width": 1.5}))
    assert len(hatched) == 1 and sum(x is None for x in hatched[0].x) == 3 * expected[0].sum()
    assert "≈ 0" in [trace.name for trace in figure.data if trace.showlegend]


def test_heatmap_outlines_what_the_schedule_runs(cube: xr.Dataset, schedule: Schedule) -> None:
    info = info_of(cube, schedule=schedule)
    # patch 7 at dropout .5; patch 4 at 0 until .7; then patch 2 in 80 % of steps (and patch 4 in the rest).
    assert info.chosen == (((2, 2),), ((0, 1),), ((0, 1),), ((0, 0),), ((0, 0),))
    assert "in 80% of steps" in info.hover[3][0][0] and "in 20% of steps" in info.hover[3][0][1]


def test_heatmap_outlines_every_part_of_an_even_mixture(cube: xr.Dataset) -> None:
    parts = [Strategy(patch=p, dropout=0) for p in (2, 4, 7)]
    assert info_of(cube, schedule=mixed_schedule(parts, [1, 1, 1])).chosen == (((0, 0), (0, 1), (0, 2)),) * 5


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        # at 0.25 two stages meet, and the one that moves farther is shown; 1 is past the end
        ([(0.0, 0.25), (0.25, 0.3), (0.3, 0.75)], ((2, 2), (2, 2), (0, 0), (0, 0), None)),
        ([(0.0, 0.1), (0.1, 0.5), (0.5, 1.0)], ((2, 2), (0, 1), (0, 0), (0, 0), (0, 0))),
        # stages that stand still yield to the one that moves through their point
        ([(0.0, 0.0), (0.0, 0.75), (0.75, 0.75)], ((0, 1), (0, 1), (0, 1), (0, 1), None)),
        ([(0.0, 0.2), (0.2, 0.2), (0.2, 0.2)], ((2, 2), None, None, None, None)),
        ([(0.0, 0.25), None, (0.75, 2.0)], ((2, 2), (2, 2), None, (0, 0), (0, 0))),
    ],
)
def test_heatmap_marks_a_schedule_by_trajectory_where_it_is_predicted_to_be(
    cube: xr.Dataset, schedule: Schedule, progress: list[tuple[float, float] | None], expected: tuple[object, ...]
) -> None:
    stages = [dataclasses.replace(s, progress=p) for s, p in zip(schedule.stages, progress, strict=True)]
    info = info_of(cube, schedule=dataclasses.replace(schedule, stages=tuple(stages), progress_mode="trajectory"))
    assert info.chosen == tuple(() if cell is None else (cell,) for cell in expected)
    for notes, cell in zip(info.notes, expected, strict=True):
        assert ("The schedule is not predicted to get here" in notes) == (cell is None)


def test_heatmap_says_which_strategy_outside_the_grid_is_scheduled(cube: xr.Dataset) -> None:
    foreign = mixed_schedule([Strategy(patch=14, dropout=0)], [1.0])
    info = info_of(cube, schedule=foreign)
    assert info.chosen == ((),) * 5
    assert any("14" in note for note in info.notes[0])


def test_heatmap_fixes_further_axes_at_the_reference(cube: xr.Dataset) -> None:
    info = info_of(third_axis(cube))
    assert info.fixed == {"resolution": 28}
    np.testing.assert_array_equal(info.values, info_of(cube).values)
    across = info_of(third_axis(cube), axes=("resolution", "dropout"))
    np.testing.assert_array_equal(across.values[:, :, 0], cube["descent"].sel(metric="optimizer", patch=2).values)
    assert across.fixed == {"patch": 2}
    # The best strategy of the whole grid is named even where it is not on the slice.
    assert across.best[1] is None and "patch" in across.notes[1][0]


def test_heatmap_of_one_axis_is_one_row(cube: xr.Dataset) -> None:
    info = info_of(cube, axes=("patch",))
    assert info.values.shape == (5, 1, 3)
    np.testing.assert_array_equal(info.values[:, 0], info_of(cube).values[:, 0])


def test_heatmap_of_axes_with_text_values(cube: xr.Dataset) -> None:
    assert info_of(text_axis(cube)).rows == ("none", "quarter", "half")


def test_heatmap_hover_tells_value_error_cost_and_state(cube: xr.Dataset) -> None:
    info = info_of(cube, "ca-mse", metric="euclidean")
    here = cube.isel(progress=1, patch=2, dropout=0).sel(metric="euclidean")
    text = info.hover[1][0][2]
    assert "progress 0.25, step 1,000" in text
    assert f"ca-mse: <b>{with_error(float(here['ca_mse']), float(here['ca_mse_se']))}</b>" in text
    assert f"bias_sq: {with_error(float(here['bias_sq']), float(here['bias_sq_se']))}" in text
    assert f"cost: {number(float(here['cost'].sel(cost_model='tokens')))} units per sample (tokens)" in text
    assert "8,192 samples, done" in text
    t, patch, dropout = FAILED_CELL
    assert "0 samples, failed" in info.hover[t][dropout][patch]
    assert "ca-mse: <b>not measured</b>" in info.hover[t][dropout][patch]


def test_heatmap_hover_tells_an_undefined_score_from_a_missing_one(cube: xr.Dataset) -> None:
    lost = cube.copy(deep=True)
    lost["descent"][0] = np.nan
    assert "descent: <b>undefined" in info_of(lost).hover[0][0][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variable": "loss"}, "variable 'loss' is not in the cube; it holds ca_mse, descent"),
        ({"metric": "fisher"}, "metric 'fisher' is not in the cube; it holds euclidean, optimizer"),
        ({"axes": ("patch", "depth")}, "axes of the cube, which are patch, dropout"),
        ({"axes": ("patch", "patch")}, "two different axes"),
        ({"axes": ()}, "one or two different axes"),
    ],
)
def test_heatmap_refuses_what_the_cube_lacks(cube: xr.Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plot_heatmap(cube, **options)


# Heat map: the figure


@pytest.mark.parametrize("name", VARIABLES)
def test_heatmap_has_one_colour_range_for_all_frames(cube: xr.Dataset, schedule: Schedule, name: str) -> None:
    figure = plot_heatmap(cube, variable=name, schedule=schedule)
    low, high = figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax
    positions = []
    for frame in figure.frames:
        shown = [trace for trace in frame.data if trace.type == "heatmap" and trace.coloraxis == "coloraxis"]
        assert len(shown) == 1 and shown[0].zmin is None and shown[0].zmax is None
        assert "coloraxis" not in frame.layout.to_plotly_json()
        positions += [z for row in shown[0].z for z in row if z is not None]
    assert low <= min(positions) and max(positions) <= high
    assert math.isclose(max(positions), high)


@pytest.mark.parametrize(
    ("name", "better", "reverse"),
    [
        ("descent", "better", False),
        ("ca-mse", "better", True),
        ("variance", "better", True),
        ("norm_sq", "larger", False),
    ],
)
def test_lighter_is_better_and_the_colour_bar_says_so(cube: xr.Dataset, name: str, better: str, reverse: bool) -> None:
    axis = plot_heatmap(cube, variable=name).layout.coloraxis
    assert axis.colorbar.title.text == f"lighter is {better}"
    assert bool(axis.reversescale) == reverse
    dark, light = scale_colour(0.0), scale_colour(1.0)
    assert sum(light) > sum(dark)  # the scale's high end is the light one, so lower-is-better needs the reversal


def test_heatmap_cells_are_either_coloured_or_grey(cube: xr.Dataset) -> None:
    for frame in plot_heatmap(cube).frames:
        grey, coloured = frame.data[0], frame.data[1]
        assert grey.zmin == 0 and grey.zmax == 1 and not grey.showscale
        for grey_row, row in zip(grey.z, coloured.z, strict=True):
            assert [(a is None) != (b is None) for a, b in zip(grey_row, row, strict=True)] == [True] * 3


def test_heatmap_frames_slider_and_legend(cube: xr.Dataset, schedule: Schedule) -> None:
    figure = plot_heatmap(cube, schedule=schedule, progress=0.7)
    names = ["0", "0.25", "0.5", "0.75", "1"]
    assert [frame.name for frame in figure.frames] == names
    assert [step.args[0][0] for step in figure.layout.sliders[0].steps] == names
    assert figure.layout.sliders[0].active == 3  # the measured progress nearest to 0.7
    assert figure.data[1].z == figure.frames[3].data[1].z
    assert figure.layout.updatemenus[0].buttons[0].label == "Play"
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert legend == ["schedule", "best", "rival", "no value", "failed"]
    assert all(trace.hovertemplate.endswith("<extra></extra>") for trace in figure.data if trace.hovertemplate)


def test_a_cube_of_one_progress_has_no_slider(cube: xr.Dataset) -> None:
    figure = plot_heatmap(cube.isel(progress=[1]))
    assert not figure.layout.sliders and not figure.layout.updatemenus


@pytest.mark.parametrize("name", VARIABLES)
def test_figures_of_cubes_are_valid(cube: xr.Dataset, schedule: Schedule, name: str) -> None:
    for figure in (plot_heatmap(cube, variable=name, schedule=schedule), plot_bias_variance(cube)):
        assert "NaN" not in pio.to_json(figure, validate=True)
        assert go.Figure(json.loads(pio.to_json(figure))).layout.height == figure.layout.height


def test_a_cube_without_any_value_draws_empty_figures(cube: xr.Dataset) -> None:
    empty = cube.map(lambda v: v * np.nan if v.dtype.kind == "f" and "progress" in v.dims else v, keep_attrs=True)
    empty = empty.assign_attrs(cube.attrs)
    empty["status"] = cube["status"] * 0
    for figure in (plot_heatmap(empty), plot_heatmap(empty, variable="bias_sq"), plot_bias_variance(empty)):
        assert "NaN" not in pio.to_json(figure, validate=True)


def test_text_of_a_cube_cannot_become_markup(cube: xr.Dataset) -> None:
    evil = text_axis(cube).assign_coords(dropout=["none", "<b>quarter</b>", "half"])
    evil["patch"].attrs["units"] = "<i>pixel</i>"
    for figure in (plot_heatmap(evil), plot_bias_variance(evil)):
        text = json.dumps(figure.to_plotly_json(), default=str)
        assert "<b>quarter" not in text and "<i>" not in text


# Bias and variance


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_bias_and_noise_add_up_to_the_cubes_ca_mse(cube: xr.Dataset, metric: str) -> None:
    info = _bias_variance_info(cube, metric=metric)
    expected = cube["ca_mse"].sel(metric=metric).values.reshape(5, 9)
    np.testing.assert_allclose(np.maximum(info.bias, 0) + info.noise, expected, rtol=1e-12)
    assert info.best == tuple(int(np.nanargmin(row)) for row in expected)


def test_a_bias_of_zero_or_less_lies_on_the_floor(cube: xr.Dataset) -> None:
    info = _bias_variance_info(cube, metric="euclidean")
    heights = info.heights()
    assert heights[0, 0] == info.floor and info.bias[0, 0] == 0
    assert heights[0, 1] == info.floor and info.bias[0, 1] < 0
    assert np.array_equal(heights[info.bias >= info.smallest], info.bias[info.bias >= info.smallest])
    assert info.floor < info.smallest


def test_bias_variance_needs_beta(cube: xr.Dataset) -> None:
    with pytest.raises(UsageError, match="'beta'"):
        plot_bias_variance(cube.assign_attrs(beta="unknown"))


def test_bias_variance_lines_join_points_of_equal_sum(cube: xr.Dataset) -> None:
    figure = plot_bias_variance(cube, progress=0.5)
    line = next(trace for trace in figure.data if trace.name == "equal CA-MSE")
    sums = {round(math.log10(x + y), 6) for x, y in zip(line.x, line.y, strict=True) if x is not None}
    levels = {round(math.log10(level), 6) for level in _bias_variance_info(cube, metric=None).levels}
    assert sums and sums <= levels
    assert figure.layout.sliders[0].active == 2


# Schedule


def test_schedule_blocks_fill_the_strip(cube: xr.Dataset, schedule: Schedule) -> None:
    info = _schedule_info(schedule, decay=None)
    assert sum((b.end - b.start) * b.share for blocks in info.blocks.values() for b in blocks) == pytest.approx(1)
    last = {s: b for s, blocks in info.blocks.items() for b in blocks if b.start == 0.7}
    full, middle = Strategy(patch=2, dropout=0), Strategy(patch=4, dropout=0)
    assert (last[full].share, last[middle].share) == (0.8, 0.2)
    assert {last[full].base, last[full].base + 0.8} & {last[middle].base, last[middle].base + 0.2}
    assert info.edges == (0.0, 0.25, 0.7, 1.0)
    assert info.costs == tuple(stage.cost for stage in schedule.stages)


def test_schedule_hover_tells_units_samples_and_score(schedule: Schedule) -> None:
    block = _schedule_info(schedule, decay=None).blocks[Strategy(patch=4, dropout=0)][0]
    for text in ("25.0% to 70.0% of the budget", "units 1M to 2.8M", "1.773M samples", "descent: 0.342 ± 0.011"):
        assert text in block.hover


def test_schedule_draws_how_sure_its_stages_are(schedule: Schedule) -> None:
    assert _schedule_info(schedule, decay=None).sure is None
    stages = zip(schedule.stages, (0.95, None, 0.4), strict=True)
    found = dataclasses.replace(schedule, stages=tuple(dataclasses.replace(s, probability=p) for s, p in stages))
    assert _schedule_info(found, decay=None).sure == (0.95, None, 0.4)
    figure = plot_schedule(found, decay=Decay("cosine"))
    (line,) = figure.select_traces({"name": "probability that the stage's main strategy is the best"})
    assert line.x == (0.0, 0.25, None, 0.7, 1.0, None) and line.y == (0.95, 0.95, None, 0.4, 0.4, None)
    assert [axis.title.text for axis in figure.select_yaxes()][1:] == ["cost", "confidence", "rate"]
    assert len(plot_schedule(schedule, decay=Decay("cosine")).data) == len(figure.data) - 1


def test_schedule_draws_the_decay_only_when_given(schedule: Schedule) -> None:
    decay = Decay(kind="cosine", warmup=0.1)
    info = _schedule_info(schedule, decay=decay)
    assert info.decay is not None
    assert info.decay[1] == tuple(decay.factor(f) for f in info.decay[0])
    assert len(plot_schedule(schedule, decay=decay).data) == len(plot_schedule(schedule).data) + 1


def test_schedule_colours_and_patterns_tell_many_strategies_apart() -> None:
    parts = [Strategy(patch=p, dropout=d / 10) for p in (2, 4, 7) for d in range(5)]
    figure = plot_schedule(mixed_schedule(parts, [1.0] * 15))
    looks = [(bar.marker.color, bar.marker.pattern.shape) for bar in figure.data if bar.type == "bar"]
    assert len(set(looks)) == len(looks) == 15
    assert [bar.name.replace("\u00a0", " ") for bar in figure.data[:2]] == [
        "patch 2, dropout 0",
        "patch 2, dropout 0.1",
    ]


def test_a_schedule_without_budget_is_drawn() -> None:
    figure = plot_schedule(mixed_schedule([Strategy(kind="<b>a</b>"), Strategy(kind="b")], [1.0, 3.0]))
    text = pio.to_json(figure, validate=True)
    assert "NaN" not in text and "<b>a</b>" not in json.dumps(json.loads(text), ensure_ascii=False)


# Training


def test_training_keeps_the_rows_that_have_a_value() -> None:
    rows = [
        {"units": 30.0, "loss": 1.0},
        {"units": 10.0, "loss": 3.0, "accuracy": 0.1},
        {"units": 20.0, "loss": math.nan, "accuracy": 0.2},
        {"units": 40.0, "loss": None},
    ]
    (curve,) = _training_info({"run": rows})
    assert curve.accuracy_units.tolist() == [10, 20] and curve.accuracy.tolist() == [0.1, 0.2]
    assert curve.loss_units.tolist() == [10, 30] and curve.loss.tolist() == [3, 1]


def test_a_row_logged_again_after_a_resume_replaces_the_first() -> None:
    (curve,) = _training_info({"run": [{"units": 1, "loss": 5.0}, {"units": 1, "loss": 4.0}]})
    assert curve.loss.tolist() == [4.0]


@pytest.mark.parametrize("window", [1, 3, 9])
def test_running_median_agrees_with_scipy_inside(window: int) -> None:
    values = np.random.default_rng(0).standard_normal(40)
    half = window // 2
    inner = slice(half, len(values) - half)
    np.testing.assert_array_equal(running_median(values, window)[inner], median_filter(values, window)[inner])
    assert running_median(values, window)[0] == np.median(values[: half + 1])


def test_long_runs_are_thinned_and_keep_their_ends() -> None:
    (curve,) = _training_info({"run": [{"units": i, "loss": 1.0} for i in range(5000)]})
    assert len(curve.loss) <= 400 and curve.loss_units[0] == 0 and curve.loss_units[-1] == 4999


def test_training_figure_tells_runs_apart_without_colour() -> None:
    figure = plot_training(sample_runs())
    accuracy = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len({trace.line.dash for trace in accuracy}) == len({trace.marker.symbol for trace in accuracy}) == 3
    assert [trace.name for trace in figure.data if trace.showlegend] == list(sample_runs())
    assert "NaN" not in pio.to_json(figure, validate=True)


def test_training_without_accuracy_shows_the_loss_alone() -> None:
    figure = plot_training({"<b>run</b>": [{"units": 1, "loss": 2.0}, {"units": 2, "loss": 1.0}]})
    assert [trace.yaxis for trace in figure.data] == ["y"] and figure.layout.yaxis.title.text == "loss"
    assert figure.data[0].name == "&lt;b&gt;run&lt;/b&gt;"


@pytest.mark.parametrize(
    ("runs", "message"),
    [({}, "no run to draw"), ({"a": [{"loss": 1.0}]}, "run 'a': row 0 has no number under 'units'")],
)
def test_training_refuses_logs_that_cannot_be_drawn(runs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plot_training(runs)
