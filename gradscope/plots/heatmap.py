"""Heat map of one variable over two axes of the grid, with a slider over progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._colour import ColourRange, colour_range
from gradscope.plots._theme import number, plain, strategy_text, with_error
from gradscope.plots._view import (
    FAILED,
    STATUS_TEXT,
    Best,
    CubeView,
    Variable,
    best_strategies,
    read_view,
    variable,
)
from schedulers.errors import UsageError
from schedulers.strategy import AxisValue, Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from schedulers.schedule import Schedule

Cell = tuple[int, int]
"""Index along the vertical axis, index along the horizontal axis."""

_TOP, _BOTTOM_SLIDER, _BOTTOM_STILL = 68, 170, 98  # pixels above and below the cells
_WRITTEN_COLUMNS = 8  # more columns than this leave no room for numbers on a narrow screen


@dataclass(frozen=True)
class HeatmapInfo:
    """The numbers of a heat map: T frames of `rows` by `columns` cells.

    `values` are raw; `positions` are colours (NaN = no value); `failed` and `missing` are masks, a
    failed cell being missing too. `chosen` lists the cells that the schedule runs at each progress,
    `best` the best cell where it lies on the slice shown, `notes` what each frame says in words.
    """

    variable: Variable
    metric: str
    columns: tuple[AxisValue, ...]
    rows: tuple[AxisValue, ...]
    column_title: str
    row_title: str
    fixed: dict[str, AxisValue]
    progress: tuple[float, ...]
    values: NDArray[np.float64]
    positions: NDArray[np.float64]
    missing: NDArray[np.bool_]
    failed: NDArray[np.bool_]
    colours: ColourRange
    hover: tuple[tuple[tuple[str, ...], ...], ...]
    chosen: tuple[tuple[Cell, ...], ...]
    best: tuple[Cell | None, ...]
    notes: tuple[tuple[str, ...], ...]


def plot_heatmap(
    cube: xr.Dataset | xr.DataTree,
    *,
    variable: str = "descent",
    metric: str | None = None,
    axes: Sequence[str] | None = None,
    schedule: Schedule | None = None,
    progress: float | None = None,
) -> go.Figure:
    """Heat map of `variable` over the grid, one frame per progress, with slider and play button.

    Args:
        cube: the cube (schema: design §10); a tree stands for its root.
        variable: a criterion (`ca-mse`, `descent`, `descent-batch`) or a moment (`bias_sq`, `variance`, `norm_sq`,
            `inner`, `bias_sq_plugin`).
        metric: `euclidean` or `optimizer`; by default `optimizer` where the cube has it.
        axes: one or two axis names, the first drawn horizontally; by default the grid's first two. The other
            axes stay at the reference's value, which the title says.
        schedule: its strategies at each progress are outlined and marked.
        progress: where the slider starts (the nearest measured point); by default at the first.

    Lighter is better for every variable that has a better end. Colours span one range over all frames,
    logarithmic where clear values span more than two decades. Cells without a value are grey, failed ones
    have a cross. The best strategy of a frame is marked for criteria.

    Raises:
        UsageError: a variable, metric or axis that the cube does not hold.
    """
    info = _heatmap_info(cube, name=variable, metric=metric, axes=axes, schedule=schedule)
    return _heatmap_figure(info, _theme.start_index(info.progress, progress))


def _heatmap_info(
    cube: xr.Dataset | xr.DataTree,
    *,
    name: str,
    metric: str | None,
    axes: Sequence[str] | None,
    schedule: Schedule | None,
) -> HeatmapInfo:
    view = read_view(cube, metric=metric, cost_model=None)
    shown = variable(cube, name)
    across, up = _shown_axes(view, axes)
    fixed = {axis: view.grid.reference[axis] for axis in view.grid.axes if axis not in (across, up)}
    best = best_strategies(view, shown) if shown.is_criterion else [None] * len(view.progress)
    shares = [_shares(view, schedule, p) for p in view.progress]

    rows: tuple[AxisValue, ...] = view.grid.axes[up] if up else ("",)
    columns = view.grid.axes[across]
    values, errors = (
        _slice(view, view.values(shown.name), across, up),
        _slice(view, view.errors(shown.name), across, up),
    )
    signed = shown.is_criterion and shown.better == "higher" or shown.name == "inner"
    colours = colour_range(values, errors, signed=signed)
    missing = np.isnan(values)
    return HeatmapInfo(
        variable=shown,
        metric=view.metric,
        columns=columns,
        rows=rows,
        column_title=view.unit(across),
        row_title=view.unit(up) if up else "",
        fixed=fixed,
        progress=tuple(float(p) for p in view.progress),
        values=values,
        positions=colours.colour(values),
        missing=missing,
        failed=missing & (_slice(view, view.status, across, up) == FAILED),
        colours=colours,
        hover=_hover(view, shown, _positions(view, across, up), shares, best),
        chosen=tuple(_chosen_cells(view, share, across, up) for share in shares),
        best=tuple(_cell(view, found.winner.strategy, across, up) if found else None for found in best),
        notes=tuple(_notes(found, share, fixed) for found, share in zip(best, shares, strict=True)),
    )


def _shown_axes(view: CubeView, axes: Sequence[str] | None) -> tuple[str, str]:
    """Horizontal and vertical axis; the second is "" for a single row."""
    names = tuple(view.grid.axes)
    chosen = names[:2] if axes is None else tuple(axes)
    if not 1 <= len(chosen) <= 2 or len(set(chosen)) != len(chosen) or any(axis not in names for axis in chosen):
        raise UsageError(
            f"axes={list(chosen)}: give one or two different axes of the cube, which are {', '.join(names)}"
        )
    return chosen[0], chosen[1] if len(chosen) == 2 else ""


def _positions(view: CubeView, across: str, up: str) -> list[list[tuple[int, ...]]]:
    """Index on the whole grid of every cell shown."""
    home = dict(zip(view.grid.axes, view.grid.position(view.grid.reference), strict=True))
    height = len(view.grid.axes[up]) if up else 1
    return [
        [tuple({**home, across: j, **({up: i} if up else {})}[axis] for axis in view.grid.axes) for j in
         range(len(view.grid.axes[across]))]
        for i in range(height)
    ]  # fmt: skip


def _slice(view: CubeView, array: NDArray[Any], across: str, up: str) -> NDArray[Any]:
    """(T, rows, columns) of a (T, *grid) array, the axes not shown at the reference's value."""
    where = np.array(_positions(view, across, up))
    return array[(slice(None), *(where[..., axis] for axis in range(where.shape[-1])))]


def _shares(view: CubeView, schedule: Schedule | None, progress: float) -> dict[Strategy, float]:
    """Share of the steps that each strategy has in the schedule at this progress; empty without a schedule."""
    if schedule is None or schedule.progress_mode != "fraction":
        return {}
    return {strategy: weight for strategy, weight in schedule.at(float(progress)).mixture if weight > 0}


def _main(shares: dict[Strategy, float]) -> list[Strategy]:
    """The strategies worth an outline: at least half as frequent as the most frequent one, so that an
    exploration share does not outline the whole grid."""
    top = max(shares.values(), default=0.0)
    return [strategy for strategy, weight in shares.items() if weight >= top / 2]


def _cell(view: CubeView, strategy: Strategy, across: str, up: str) -> Cell | None:
    """Where `strategy` is drawn; None where it is not on the slice shown or not on the grid."""
    try:
        strategy = view.grid.check(strategy)
    except UsageError:
        return None
    if any(strategy[axis] != value for axis, value in view.grid.reference.items() if axis not in (across, up)):
        return None
    row = view.grid.axes[up].index(strategy[up]) if up else 0
    return row, view.grid.axes[across].index(strategy[across])


def _chosen_cells(view: CubeView, shares: dict[Strategy, float], across: str, up: str) -> tuple[Cell, ...]:
    cells = (_cell(view, strategy, across, up) for strategy in _main(shares))
    return tuple(sorted(cell for cell in cells if cell is not None))


def _notes(best: Best | None, shares: dict[Strategy, float], fixed: dict[str, AxisValue]) -> tuple[str, ...]:
    notes = []
    if best:
        winner = best.winner
        notes.append(f"Best: {strategy_text(winner.strategy)} at {with_error(winner.value, winner.error)}")
    main = _main(shares)
    if main:
        listed = "; ".join(strategy_text(strategy) for strategy in main[:2])
        more = f" and {len(main) - 2} more" if len(main) > 2 else ""
        notes.append(f"Schedule runs: {listed}{more}")
    if fixed:
        notes.append("Shown at " + ", ".join(f"{axis} {value}" for axis, value in fixed.items()))
    return tuple(notes)


def _hover(
    view: CubeView,
    shown: Variable,
    positions: list[list[tuple[int, ...]]],
    shares: list[dict[Strategy, float]],
    best: list[Best | None],
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    names = [shown.name, *(name for name in ("bias_sq", "variance") if name != shown.name and name in view.dataset)]
    fields = {name: (view.values(name), view.errors(name)) for name in names}

    def text(t: int, position: tuple[int, ...]) -> str:
        at = (t, *position)
        strategy = view.strategy(position)
        step = f", step {view.step[t]:,}" if view.step is not None else ""
        lines = [f"progress {_theme.frame_name(view.progress[t])}{step}"]
        lines += [f"{plain(view.unit(axis))}: <b>{plain(value)}</b>" for axis, value in strategy.items()]
        for name in names:
            values, errors = fields[name]
            label = variable(view.dataset, name).short
            value = with_error(values[at], errors[at])
            if np.isnan(values[at]) and view.n_samples[at] > 0:
                value = "undefined (the reference gradient is lost in noise)"
            lines.append(
                f"{plain(label)}: {'<b>' if name == shown.name else ''}{value}{'</b>' if name == shown.name else ''}"
            )
        if np.isfinite(view.cost[position]):
            lines.append(f"cost: {number(view.cost[position])} units per sample ({plain(view.cost_model)})")
        lines.append(f"{view.n_samples[at]:,} samples, {STATUS_TEXT.get(int(view.status[at]), 'unknown')}")
        weight = shares[t].get(strategy, 0.0)
        if weight:
            lines.append("● the schedule runs this" + (f" in {weight:.0%} of steps" if weight < 1 else ""))
        found = best[t]
        if found and found.position == position:
            lines.append("★ best at this progress")
        elif found and any(rival.strategy == strategy for rival in found.rivals):
            lines.append("☆ within two standard errors of the best")
        return "<br>".join(lines)

    return tuple(tuple(tuple(text(t, p) for p in row) for row in positions) for t in range(len(view.progress)))


def _heatmap_figure(info: HeatmapInfo, start: int) -> go.Figure:
    import plotly.graph_objects as go

    names = [_theme.frame_name(p) for p in info.progress]
    titles = [_title(info, t) for t in range(len(names))]
    height, width = len(info.rows), len(info.columns)
    plot_height = min(max(62 * height, 150), 460)
    top = _TOP + 19 * max(_theme.title_lines(text) for text in titles)
    bottom = _BOTTOM_SLIDER if len(names) > 1 else _BOTTOM_STILL
    figure = go.Figure(data=_traces(info, start))
    figure.frames = [
        go.Frame(name=name, data=_traces(info, t), traces=list(range(len(_traces(info, t)))),
                 layout={"title": {"text": titles[t]}})
        for t, name in enumerate(names)
    ]  # fmt: skip
    for trace in _legend(info):
        figure.add_trace(trace)
    better = {"lower": "better (lower values)", "higher": "better (higher values)", "": "larger"}[info.variable.better]
    figure.update_layout(
        template=_theme.template(),
        title={"text": titles[start]},
        height=top + plot_height + bottom,
        margin={"l": 64, "r": 24, "t": top, "b": bottom},
        legend={"y": -(bottom - 44) / plot_height, "yanchor": "top"},
        coloraxis={
            "colorscale": _theme.COLOUR_SCALE,
            "reversescale": info.variable.better == "lower",
            "cmin": info.colours.low,
            "cmax": info.colours.high,
            "colorbar": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "xpad": 0,
                "y": 1 + 8 / plot_height,
                "yanchor": "bottom",
                "ypad": 0,
                "len": 1,
                "thickness": 10,
                "outlinewidth": 0,
                "ticks": "inside",
                "ticklen": 3,
                "tickcolor": "white",
                "tickvals": [position for position, _ in info.colours.ticks],
                "ticktext": [text for _, text in info.colours.ticks],
                "tickfont": {"size": 11, "color": _theme.MUTED},
            },
        },
    )
    # Not the colour bar's own title: above a horizontal bar plotly.js 4.1 moves the figure's title with it.
    figure.add_annotation(
        text=f"lighter is {better}", xref="paper", x=0, xanchor="left", yref="paper", y=1 + 38 / plot_height,
        yanchor="bottom", showarrow=False, font={"size": 12, "color": _theme.MUTED},
    )  # fmt: skip
    figure.update_xaxes(
        title_text=plain(info.column_title), tickvals=list(range(width)), ticktext=[plain(v) for v in info.columns],
        range=[-0.5, width - 0.5], showgrid=False, fixedrange=True,
    )  # fmt: skip
    figure.update_yaxes(
        title_text=plain(info.row_title), tickvals=list(range(height)), ticktext=[plain(v) for v in info.rows],
        range=[-0.5, height - 0.5], showgrid=False, fixedrange=True,
    )  # fmt: skip
    _theme.add_slider(figure, names, active=start, y=-52 / plot_height)
    return figure


def _title(info: HeatmapInfo, t: int) -> str:
    return _theme.title_text(info.variable.title, f"{info.metric} metric", *info.notes[t])


def _traces(info: HeatmapInfo, t: int) -> list[Any]:
    """What changes from frame to frame, in one order: grey cells, values, crosses, outlines, marks."""
    import plotly.graph_objects as go

    x, y = list(range(len(info.columns))), list(range(len(info.rows)))
    cells: dict[str, Any] = {"x": x, "y": y, "xgap": 3, "ygap": 3, "customdata": info.hover[t],
             "hovertemplate": "%{customdata}<extra></extra>"}  # fmt: skip
    grey = np.where(info.missing[t], 1.0, np.nan)
    written = [(int(i), int(j)) for i, j in np.argwhere(~info.missing[t]) if len(info.columns) <= _WRITTEN_COLUMNS]
    failed = np.argwhere(info.failed[t])
    outline = [point for cell in info.chosen[t] for point in _rectangle(cell)]
    line_x, line_y = [p[0] for p in outline], [p[1] for p in outline]
    best = info.best[t]
    silent: dict[str, Any] = {"hoverinfo": "skip", "showlegend": False}
    return [
        go.Heatmap(z=_lists(grey), colorscale=[[0, _theme.GREY], [1, _theme.GREY]], zmin=0, zmax=1, showscale=False,
                   **cells),
        go.Heatmap(z=_lists(info.positions[t]), coloraxis="coloraxis", **cells),
        go.Scatter(x=[j for _, j in written] or [None], y=[i for i, _ in written] or [None], mode="text",
                   text=[number(info.values[t][at], 2 if len(info.columns) > 5 else 3) for at in written],
                   textfont={"size": 12, "color": [_ink(info, t, at) for at in written]}, **silent),
        go.Scatter(x=[int(c[1]) for c in failed] or [None], y=[int(c[0]) for c in failed] or [None], mode="markers",
                   marker={"symbol": "x-thin", "size": 20, "line": {"width": 2, "color": _theme.INK}}, **silent),
        go.Scatter(x=line_x or [None], y=line_y or [None], mode="lines", line={"color": "white", "width": 7}, **silent),
        go.Scatter(x=line_x or [None], y=line_y or [None], mode="lines", line={"color": _theme.INK, "width": 3},
                   **silent),
        go.Scatter(x=[c[1] - 0.36 for c in info.chosen[t]] or [None], y=[c[0] + 0.29 for c in info.chosen[t]] or [None],
                   mode="markers", marker=_CHOSEN_MARK, **silent),
        go.Scatter(x=[best[1] + 0.36 if best else None], y=[best[0] + 0.29 if best else None], mode="markers",
                   marker=_BEST_MARK, **silent),
    ]  # fmt: skip


_CHOSEN_MARK = {"symbol": "circle", "size": 11, "color": _theme.INK, "line": {"width": 2, "color": "white"}}
_BEST_MARK = {"symbol": "star", "size": 15, "color": "white", "line": {"width": 1.5, "color": _theme.INK}}


def _legend(info: HeatmapInfo) -> list[Any]:
    """Entries for the marks that occur in any frame, so that the legend stays as it is while the slider moves."""
    import plotly.graph_objects as go

    square = {"size": 13, "color": _theme.GREY}
    entries: list[tuple[bool, str, dict[str, Any]]] = [
        (any(info.chosen), "the schedule runs this", _CHOSEN_MARK),
        (any(info.best), "best of all strategies", _BEST_MARK),
        (bool((info.missing & ~info.failed).any()), "no value", {"symbol": "square", **square}),
        (bool(info.failed.any()), "failed",
         {"symbol": "square-x", **square, "line": {"width": 1.5, "color": _theme.INK}}),
    ]  # fmt: skip
    return [
        go.Scatter(x=[None], y=[None], mode="markers", name=label, marker=marker, hoverinfo="skip", showlegend=True)
        for occurs, label, marker in entries
        if occurs
    ]


def _ink(info: HeatmapInfo, t: int, cell: Cell) -> str:
    """Colour of a number that stands out from its cell."""
    span = info.colours.high - info.colours.low
    share = min(max((float(info.positions[t][cell]) - info.colours.low) / span, 0.0), 1.0)
    return _theme.ink_on(_theme.scale_colour(1 - share if info.variable.better == "lower" else share))


def _rectangle(cell: Cell) -> list[tuple[float | None, float | None]]:
    row, column = cell
    left, right, low, high = column - 0.47, column + 0.47, row - 0.46, row + 0.46
    return [(left, low), (right, low), (right, high), (left, high), (left, low), (right, low), (None, None)]


def _lists(array: NDArray[np.float64]) -> list[list[float | None]]:
    """Nested lists with None for NaN: plain JSON instead of the base64 that NumPy arrays become."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in array]
