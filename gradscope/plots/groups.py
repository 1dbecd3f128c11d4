"""Which parameter groups (layers) carry the error of a strategy, at each progress: the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._colour import colour_range
from gradscope.plots._heatmap_figure import heatmap_figure
from gradscope.plots._theme import number, plain, strategy_text, with_error
from gradscope.plots._view import FAILED, CubeView, Variable, near_zero, read_view
from gradscope.plots.heatmap import HeatmapInfo
from schedulers.errors import UsageError
from schedulers.strategy import AxisValue, Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

Floats = NDArray[np.float64]
Index = tuple[Any, ...]

PARTS = {
    "bias_sq": Variable("bias_sq", "Squared bias by parameter group", "lower", False),
    "variance": Variable("variance", "Cost-adjusted variance by parameter group", "lower", False),
}
"""What can be shown: the two parts of `ca-mse`, which sum over the groups to those of the whole gradient."""

_MOST = 12  # strategies of a grid that are all shown; of a larger one those along its axes
_LETTER, _LONGEST = 6.4, 16  # pixels of a letter of a group's name, and letters of which there is room


def plot_groups(
    cube: xr.DataTree,
    *,
    variable: str = "bias_sq",
    metric: str | None = None,
    strategies: Sequence[Strategy | Mapping[str, AxisValue]] | None = None,
    progress: float | None = None,
) -> go.Figure:
    """Heat map of parameter groups (up, those next to the input on top) and strategies (across), a frame per progress.

    Args:
        cube: the whole tree of a cube, with its child `/param_groups`.
        variable: `bias_sq`, which is shown over ‖G‖² of the whole reference gradient, or `variance`, shown as
            C/β · variance / ‖G‖²: a column sums to the strategy's part of `ca-mse`.
        metric: `euclidean` or `optimizer`; by default `optimizer` where the cube has it.
        strategies: which ones; by default all of a grid of at most 12, else those with one axis unlike the reference.
        progress: where the slider starts (the nearest measured point); by default at the first.

    Lighter is better. Cells without a value are grey, failed ones have a cross; estimates of a squared bias that came
    out at or below zero take the lowest colour.

    Raises:
        UsageError: a cube without parameter groups or without `beta`, an unknown variable, metric or strategy.
    """
    info = _groups_info(cube, name=variable, metric=metric, strategies=strategies)
    figure = heatmap_figure(info, _theme.start_index(info.progress, progress))
    longest = min(max(len(str(row)) for row in info.rows), _LONGEST)
    figure.update_layout(margin_l=20 + round(_LETTER * longest))
    return figure


def _groups_info(
    cube: xr.DataTree,
    *,
    name: str,
    metric: str | None,
    strategies: Sequence[Strategy | Mapping[str, AxisValue]] | None,
) -> HeatmapInfo:
    from gradscope.cube import groups_of  # only here: importing the plots stays cheap

    groups = groups_of(cube) if hasattr(cube, "children") else None
    if groups is None:
        raise UsageError("cube: it has no parameter groups; give the whole tree, as `open_cube` gives it")
    if name not in PARTS:
        raise UsageError(f"variable {name!r}: choose from {', '.join(PARTS)}")
    view = read_view(cube, metric=metric, cost_model="tokens")
    shown = _chosen(view, strategies)
    cells: Index = (slice(None), *np.array([view.grid.position(s) for s in shown]).T)

    def table(quantity: str) -> Floats:
        array = groups[quantity].sel(metric=view.metric).transpose("progress", *view.grid.axes, "param_group")
        found = np.asarray(array.values, dtype=np.float64)[cells]
        return np.where(np.isfinite(found), found, np.nan)  # (T, C, G)

    scale_TC = _scale(view, name, cells)
    values_TCG, errors_TCG = (table(q) * scale_TC[:, :, None] for q in (name, f"{name}_se"))
    values, errors = (np.swapaxes(found, 1, 2)[:, ::-1] for found in (values_TCG, errors_TCG))  # input on top
    names = [str(group) for group in groups["param_group"].values][::-1]
    missing = np.isnan(values)
    status_TC = view.status[cells]
    colours = colour_range(values, errors, signed=False)
    return HeatmapInfo(
        variable=PARTS[name],
        metric=view.metric,
        columns=tuple(" / ".join(str(value) for value in strategy.values()) for strategy in shown),
        rows=tuple(_shortened(group) for group in names),
        column_title=" / ".join(view.unit(axis) for axis in view.grid.axes),
        row_title="",
        fixed={},
        progress=tuple(float(p) for p in view.progress),
        values=values,
        positions=colours.colour(values),
        missing=missing,
        failed=missing & (status_TC == FAILED)[:, None, :],
        uncertain=near_zero(values, errors),
        colours=colours,
        hover=_hover(view, name, names, shown, values, errors),
        chosen=tuple(() for _ in view.progress),
        best=tuple(None for _ in view.progress),
        rivals=tuple(() for _ in view.progress),
        notes=tuple(_notes(names, frame, name) for frame in values),
    )


def _chosen(view: CubeView, wanted: Sequence[Strategy | Mapping[str, AxisValue]] | None) -> list[Strategy]:
    """The strategies shown, in the grid's order where none were asked for."""
    if wanted is not None:
        if not wanted:
            raise UsageError("strategies: give at least one")
        return [view.grid.check(Strategy(dict(strategy))) for strategy in wanted]
    every = list(view.grid.strategies())
    if len(every) <= _MOST:
        return every
    home = view.grid.reference
    return [s for s in every if sum(s[axis] != home[axis] for axis in home) <= 1]


def _scale(view: CubeView, name: str, cells: Index) -> Floats:
    """What a group's moment is multiplied by, (T, C): 1 / ‖G‖², for the variance C/β besides."""
    home: Index = (slice(None), *view.grid.position(view.grid.reference))
    if "norm_sq_ref" in view.dataset:
        norm_TC = view.values("norm_sq_ref")[cells]
    else:
        norm_TC = view.values("norm_sq")[home][:, None]
    scale_TC: Floats = 1 / np.where(norm_TC > 0, norm_TC, np.nan)
    if name == "variance":
        beta = view.beta()
        if not beta > 0:
            raise UsageError(
                "cube: the attribute 'beta', the budget of one update in units, is missing; profile writes it"
            )
        scale_TC = scale_TC * (view.cost[cells[1:]] / beta)[None]
    return scale_TC


def _shortened(name: str) -> str:
    """A group's name with its middle left out where there is no room for it."""
    half = _LONGEST // 2
    return name if len(name) <= _LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def _shares(values_GC: Floats) -> Floats:
    """Each group's share of its strategy's sum over groups, negative estimates as zero; NaN where that is zero."""
    positive = np.maximum(np.nan_to_num(values_GC), 0.0)
    total = positive.sum(axis=0, keepdims=True)
    return positive / np.where(total > 0, total, np.nan)


def _notes(names: Sequence[str], values_GC: Floats, name: str) -> tuple[str, ...]:
    """The group that carries most, by the mean share over strategies whose shares are known."""
    shares = _shares(values_GC)
    known = ~np.isnan(shares).all(axis=0)
    if not known.any():
        return ("Nothing measured here",)
    mean = shares[:, known].mean(axis=1)
    first = int(np.argmax(mean))
    part = "bias" if name == "bias_sq" else "variance"
    return (
        "Over ‖G‖² of the whole gradient",
        f"Most of the {part}: {names[first]}, {mean[first]:.0%} (mean over strategies)",
    )


def _hover(
    view: CubeView, name: str, names: Sequence[str], shown: Sequence[Strategy], values: Floats, errors: Floats
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    title = "bias² / ‖G‖²" if name == "bias_sq" else "C/β · variance / ‖G‖²"

    def text(t: int, g: int, c: int, share: float) -> str:
        lines = [
            f"<b>{plain(names[g])}</b>",
            f"{plain(strategy_text(shown[c]))}, progress {view.labels[t]}",
            f"{title} of this group: {with_error(values[t, g, c], errors[t, g, c])}",
        ]
        if np.isfinite(share):
            lines.append(f"{share:.1%} of the sum over groups, {number(float(np.nansum(values[t, :, c])))}")
        return "<br>".join(lines)

    found = []
    for t, frame in enumerate(values):
        shares = _shares(frame)
        found.append(
            tuple(
                tuple(text(t, g, c, float(shares[g, c])) for c in range(len(shown))) for g in range(len(names))
            )
        )  # fmt: skip
    return tuple(found)
