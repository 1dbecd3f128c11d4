"""Two cubes side by side: the drawing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._marks import Marks
from gradscope.plots._theme import plain, points

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from gradscope.plots.compare import CompareInfo

_TOP, _AXIS, _PLOT = 38, 56, 400  # pixels: space above the titles, axis title, plot
_RINGS = (
    {"symbol": "circle-open", "size": 24, "color": _theme.INK, "line": {"width": 2}},
    {"symbol": "square-open", "size": 26, "color": _theme.INK, "line": {"width": 2}},
)


def compare_figure(info: CompareInfo, start: int) -> go.Figure:
    """The figure, its slider at frame `start`."""
    import plotly.graph_objects as go

    labels = _theme.progress_labels(info.progress)
    titles = [_title(info, t) for t in range(len(labels))]
    legend = _legend(info)
    above_legend = _AXIS + (_theme.SLIDER if len(labels) > 1 else 0)
    bottom = above_legend + _theme.legend_height(len(legend))
    top = _TOP + 19 * max(_theme.title_lines(text) for text in titles)
    moving = _points(info, start)
    low, high = info.scale.low, info.scale.high
    margin = 0.06 * (high - low)
    ends = [low - margin, high + margin]
    diagonal = go.Scatter(
        x=ends, y=ends, mode="lines", line={"color": "#aeb4bd", "width": 1, "dash": "dot"}, hoverinfo="skip",
        name="equal in both",
    )  # fmt: skip
    figure = go.Figure(data=[*moving, diagonal, *legend])
    figure.frames = [
        go.Frame(
            name=label, data=_points(info, t), traces=list(range(len(moving))), layout={"title": {"text": titles[t]}}
        )
        for t, label in enumerate(labels)
    ]
    figure.update_layout(
        template=_theme.template(),
        title={"text": titles[start]},
        height=top + _PLOT + bottom,
        margin={"l": 72, "r": 24, "t": top, "b": bottom},
        legend={"y": (bottom - above_legend) / (top + _PLOT + bottom)},
        hovermode="closest",
    )
    axis = {
        "range": ends,
        "tickvals": [position for position, _ in info.scale.ticks],
        "ticktext": [text for _, text in info.scale.ticks],
    }
    figure.update_xaxes(title_text=plain(info.names[0]), **axis)
    figure.update_yaxes(title_text=plain(info.names[1]), **axis)
    _theme.add_slider(figure, labels, active=start, y=-_AXIS / _PLOT)
    return figure


def _title(info: CompareInfo, t: int) -> str:
    better = f"; {info.variable.better} is better" if info.variable.better else ""
    return _theme.title_text(
        f"{info.variable.title}: {info.names[1]} against {info.names[0]}",
        f"{info.metric} metric{better}",
        *info.notes[t],
    )


def _points(info: CompareInfo, t: int) -> list[Any]:
    """One trace for each value of the first axis, then the rings around the best strategies."""
    import plotly.graph_objects as go

    marks = Marks.of(info.strategies)
    x, y = info.scale.colour(info.values[:, t])
    traces = []
    for value in marks.first:
        at = [c for c in marks.with_value(value) if np.isfinite(x[c]) and np.isfinite(y[c])]
        look = {"thickness": 1.2, "width": 0, "color": marks.colour(value), "type": "data", "symmetric": False}
        traces.append(
            go.Scatter(
                x=points([float(x[c]) for c in at]),
                y=points([float(y[c]) for c in at]),
                mode="markers",
                marker=marks.marker(at, value),
                error_x={**look, **_bars(info, 0, t, at)},
                error_y={**look, **_bars(info, 1, t, at)},
                customdata=[info.hover[t][c] for c in at],
                hovertemplate="%{customdata}<extra></extra>",
                showlegend=False,
            )
        )
    for ring, best in zip(_RINGS, info.best[t], strict=True):
        drawn = best is not None and np.isfinite(x[best]) and np.isfinite(y[best])
        traces.append(
            go.Scatter(
                x=[float(x[best]) if drawn else None],
                y=[float(y[best]) if drawn else None],
                mode="markers",
                marker=ring,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    return traces


def _bars(info: CompareInfo, k: int, t: int, at: list[int]) -> dict[str, list[float]]:
    """One standard error to either side, on the axis's scale."""

    def drawn(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(info.scale.colour(values))

    value, error = info.values[k, t, at], np.nan_to_num(info.errors[k, t, at])
    up, down = drawn(value + error) - drawn(value), drawn(value) - drawn(value - error)
    return {"array": [float(v) for v in up], "arrayminus": [float(v) for v in down]}


def _legend(info: CompareInfo) -> list[Any]:
    import plotly.graph_objects as go

    entries = Marks.of(info.strategies).legend()
    for k, ring in enumerate(_RINGS):
        if any(best[k] is not None for best in info.best):
            entries.append((f"best in {plain(info.names[k])}", {**ring, "size": 14}))
    return [
        go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip", showlegend=True)
        for name, marker in entries
    ]
