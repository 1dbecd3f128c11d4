"""Heat map of one variable over two axes of the grid, with a slider over progress: the drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._theme import number, plain, points

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from gradscope.plots.heatmap import Cell, HeatmapInfo

_TOP, _AXIS = 36, 52  # pixels: space above the titles, axis title
_WRITTEN_COLUMNS = 5  # more columns than this leave no room for numbers on a narrow screen
_CHOSEN_MARK = {"symbol": "circle", "size": 11, "color": _theme.INK, "line": {"width": 2, "color": "white"}}
_BEST_MARK = {"symbol": "star", "size": 15, "color": "white", "line": {"width": 1.5, "color": _theme.INK}}
_RIVAL_MARK = {"symbol": "star", "size": 8, "color": "white", "line": {"width": 1.2, "color": _theme.INK}}
_HATCH = (0.1, 0.18, 0.26)  # how far lines reach into a cell from its lower right corner, in cells


def heatmap_figure(info: HeatmapInfo, start: int) -> go.Figure:
    """The figure, its slider at frame `start`."""
    import plotly.graph_objects as go

    names = _theme.progress_labels(info.progress)
    titles = [_title(info, t) for t in range(len(names))]
    height, width = len(info.rows), len(info.columns)
    plot_height = min(max(62 * height, 150), 460)
    top = _TOP + 19 * max(_theme.title_lines(text) for text in titles)
    legend = _legend(info)
    above_legend = _AXIS + (_theme.SLIDER if len(names) > 1 else 0)
    bottom = above_legend + _theme.legend_height(len(legend))
    full_height = top + plot_height + bottom
    figure = go.Figure(data=_traces(info, start))
    figure.frames = [
        go.Frame(
            name=name,
            data=_traces(info, t),
            traces=list(range(len(_traces(info, t)))),
            layout={"title": {"text": titles[t]}},
        )
        for t, name in enumerate(names)
    ]
    figure.add_traces(legend)
    better = "better" if info.variable.better else "larger"
    figure.update_layout(
        template=_theme.template(),
        title={"text": titles[start]},
        height=full_height,
        margin={"l": 60, "r": 88, "t": top, "b": bottom},
        legend={
            "y": (bottom - above_legend) / full_height,
            "entrywidth": 48,
            "itemsizing": "trace",
            "font": {"size": 11},
        },
        coloraxis={
            "colorscale": _theme.COLOUR_SCALE,
            "reversescale": info.variable.better == "lower",
            "cmin": info.colours.low,
            "cmax": info.colours.high,
            "colorbar": {
                "x": 1,
                "xpad": 10,
                "y": 0.5,
                "ypad": 0,
                "len": 1,
                "thickness": 11,
                "outlinewidth": 0,
                "ticks": "outside",
                "ticklen": 3,
                "tickcolor": _theme.MUTED,
                "tickvals": [position for position, _ in info.colours.ticks],
                "ticktext": [text for _, text in info.colours.ticks],
                "tickfont": {"size": 11, "color": _theme.MUTED},
                "title": {"text": f"lighter is {better}", "side": "right", "font": {"size": 12, "color": _theme.MUTED}},
            },
        },
    )
    figure.update_xaxes(
        title_text=plain(info.column_title),
        tickvals=list(range(width)),
        ticktext=[plain(v) for v in info.columns],
        range=[-0.5, width - 0.5],
        showgrid=False,
        fixedrange=True,
    )
    figure.update_yaxes(
        title_text=plain(info.row_title),
        tickvals=list(range(height)),
        ticktext=[plain(v) for v in info.rows],
        range=[-0.5, height - 0.5],
        showgrid=False,
        fixedrange=True,
    )
    _theme.add_slider(figure, names, active=start, y=-_AXIS / plot_height)
    return figure


def _title(info: HeatmapInfo, t: int) -> str:
    return _theme.title_text(info.variable.title, f"{info.metric} metric", *info.notes[t])


def _traces(info: HeatmapInfo, t: int) -> list[Any]:
    """What changes from frame to frame, in one order: grey cells, values, crosses, hatches, outlines, marks."""
    import plotly.graph_objects as go

    x, y = list(range(len(info.columns))), list(range(len(info.rows)))
    cells: dict[str, Any] = {
        "x": x,
        "y": y,
        "xgap": 3,
        "ygap": 3,
        "customdata": info.hover[t],
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    grey = np.where(info.missing[t], 1.0, np.nan)
    written = [(int(i), int(j)) for i, j in np.argwhere(~info.missing[t]) if len(info.columns) <= _WRITTEN_COLUMNS]
    failed = np.argwhere(info.failed[t])
    outline = _line_of(_rectangle(cell) for cell in info.chosen[t])
    hatch = _line_of(_hatch((int(i), int(j))) for i, j in np.argwhere(info.uncertain[t]))
    best = info.best[t]
    silent: dict[str, Any] = {"hoverinfo": "skip", "showlegend": False}
    return [
        go.Heatmap(
            z=_lists(grey), colorscale=[[0, _theme.GREY], [1, _theme.GREY]], zmin=0, zmax=1, showscale=False, **cells
        ),
        go.Heatmap(z=_lists(info.positions[t]), coloraxis="coloraxis", **cells),
        go.Scatter(
            x=points([j for _, j in written]),
            y=points([i for i, _ in written]),
            mode="text",
            text=[number(info.values[t][at], 2 if len(info.columns) > 4 else 3) for at in written],
            textfont={"size": 12, "color": [_ink(info, t, at) for at in written]},
            **silent,
        ),
        go.Scatter(
            x=points([int(c[1]) for c in failed]),
            y=points([int(c[0]) for c in failed]),
            mode="markers",
            marker={"symbol": "x-thin", "size": 20, "line": {"width": 2, "color": _theme.INK}},
            **silent,
        ),
        go.Scatter(**hatch, mode="lines", line={"color": "white", "width": 3.5}, **silent),
        go.Scatter(**hatch, mode="lines", line={"color": _theme.INK, "width": 1.5}, **silent),
        go.Scatter(**outline, mode="lines", line={"color": "white", "width": 7}, **silent),
        go.Scatter(**outline, mode="lines", line={"color": _theme.INK, "width": 3}, **silent),
        go.Scatter(
            x=points([c[1] - 0.36 for c in info.chosen[t]]),
            y=points([c[0] + 0.29 for c in info.chosen[t]]),
            mode="markers",
            marker=_CHOSEN_MARK,
            **silent,
        ),
        go.Scatter(
            x=points([c[1] + 0.36 for c in info.rivals[t]]),
            y=points([c[0] + 0.29 for c in info.rivals[t]]),
            mode="markers",
            marker=_RIVAL_MARK,
            **silent,
        ),
        go.Scatter(
            x=[best[1] + 0.36 if best else None],
            y=[best[0] + 0.29 if best else None],
            mode="markers",
            marker=_BEST_MARK,
            **silent,
        ),
    ]


def _legend(info: HeatmapInfo) -> list[Any]:
    """Entries for the marks that occur in any frame, so that the legend stays as it is while the slider moves."""
    import plotly.graph_objects as go

    square = {"size": 13, "color": _theme.GREY}
    entries: list[tuple[bool, str, dict[str, Any]]] = [
        (any(info.chosen), "schedule", _CHOSEN_MARK),
        (any(info.best), "best", _BEST_MARK),
        (any(info.rivals), "rival", _RIVAL_MARK),
        (
            bool(info.uncertain.any()),
            "≈ 0",
            {"symbol": "line-ne", "size": 10, "line": {"width": 2, "color": _theme.INK}},
        ),
        (bool((info.missing & ~info.failed).any()), "no value", {"symbol": "square", **square}),
        (
            bool(info.failed.any()),
            "failed",
            {"symbol": "square-x", **square, "line": {"width": 1.5, "color": _theme.INK}},
        ),
    ]
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


def _rectangle(cell: Cell) -> list[tuple[float, float]]:
    row, column = cell
    left, right, low, high = column - 0.487, column + 0.487, row - 0.47, row + 0.47
    return [(left, low), (right, low), (right, high), (left, high), (left, low), (right, low)]


def _hatch(cell: Cell) -> list[tuple[float | None, float | None]]:
    """Lines across the lower right corner of a cell."""
    row, column = cell
    right, low = column + 0.47, row - 0.45
    return [
        point
        for i, far in enumerate(_HATCH)
        for point in [*([(None, None)] if i else []), (right - far, low), (right, low + far)]
    ]


def _line_of(parts: Iterable[Sequence[tuple[float | None, float | None]]]) -> dict[str, Any]:
    """x and y of one line that is interrupted between the parts."""
    joined = [point for part in parts for point in [*part, (None, None)]]
    return {"x": points([x for x, _ in joined]), "y": points([y for _, y in joined])}


def _lists(array: NDArray[np.float64]) -> list[list[float | None]]:
    """Nested lists with None for NaN: plain JSON instead of the base64 that NumPy arrays become."""
    return [[None if np.isnan(value) else float(value) for value in row] for row in array]
