"""Bias against cost-adjusted variance: where a strategy's error comes from, at each progress: the drawing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._marks import Marks
from gradscope.plots._theme import number, plain, points, strategy_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from gradscope.plots.bias_variance import BiasVarianceInfo

_TOP, _AXIS, _PLOT = 38, 56, 380  # pixels: space above the titles, axis title, plot
_BEST_MARK = {"symbol": "circle-open", "size": 24, "color": _theme.INK, "line": {"width": 2}}


def bias_variance_figure(info: BiasVarianceInfo, start: int) -> go.Figure:
    """The figure, its slider at frame `start`."""
    import plotly.graph_objects as go

    names = _theme.progress_labels(info.progress)
    titles = [_title(info, t) for t in range(len(names))]
    legend = [*_lines(info), *_legend(info)]
    above_legend = _AXIS + (_theme.SLIDER if len(names) > 1 else 0)
    bottom = above_legend + _theme.legend_height(len(legend))
    top = _TOP + 19 * max(_theme.title_lines(text) for text in titles)
    moving = _points(info, start)
    figure = go.Figure(data=[*moving, *legend])
    figure.frames = [
        go.Frame(
            name=name, data=_points(info, t), traces=list(range(len(moving))), layout={"title": {"text": titles[t]}}
        )
        for t, name in enumerate(names)
    ]
    ticks = [m * 10.0**p for p in range(-12, 13) for m in (1, 3) if info.smallest <= m * 10.0**p <= info.y_range[1]]
    if math.log10(info.y_range[1] / info.smallest) > 3:
        ticks = [tick for tick in ticks if abs(math.log10(tick) - round(math.log10(tick))) < 1e-9]
    figure.update_layout(
        template=_theme.template(),
        title={"text": titles[start]},
        height=top + _PLOT + bottom,
        margin={"l": 64, "r": 24, "t": top, "b": bottom},
        legend={"y": (bottom - above_legend) / (top + _PLOT + bottom), "entrywidth": 80, "font": {"size": 11}},
        hovermode="closest",
    )
    figure.update_xaxes(
        type="log",
        range=[math.log10(value) for value in info.x_range],
        title_text="C/β · variance / ‖G‖²",
        tickvals=_decimal_ticks(*info.x_range),
        ticktext=[number(v) for v in _decimal_ticks(*info.x_range)],
    )
    figure.update_yaxes(
        type="log",
        range=[math.log10(value) for value in info.y_range],
        title_text="bias² / ‖G‖²",
        tickvals=[info.floor, *ticks],
        ticktext=["≈ 0", *(number(tick) for tick in ticks)],
    )
    _theme.add_slider(figure, names, active=start, y=-_AXIS / _PLOT)
    return figure


def _decimal_ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high / low < 300 else (1,)
    return [m * 10.0**p for p in range(math.floor(math.log10(low)), 13) for m in steps if low <= m * 10.0**p <= high]


def _title(info: BiasVarianceInfo, t: int) -> str:
    best = info.best[t]
    said = f"Lowest sum: {strategy_text(info.strategies[best])}" if best is not None else "Nothing measured here"
    return _theme.title_text("Bias against cost-adjusted variance", f"{info.metric} metric; lower left is better", said)


def _points(info: BiasVarianceInfo, t: int) -> list[Any]:
    """One trace per value of the first axis, then the ring around the best strategy."""
    import plotly.graph_objects as go

    marks = Marks.of(info.strategies)
    heights = info.heights()[t]
    drawn_down = np.minimum(info.bias_error[t], heights - info.floor)
    drawn_up = np.maximum(info.bias[t] + info.bias_error[t] - heights, 0)
    traces = []
    for value in marks.first:
        at = [c for c in marks.with_value(value) if np.isfinite(heights[c])]
        bars: dict[str, Any] = {"thickness": 1.2, "width": 0, "color": marks.colour(value), "type": "data"}
        traces.append(
            go.Scatter(
                x=points([float(info.noise[t, c]) for c in at]),
                y=points([float(heights[c]) for c in at]),
                mode="markers",
                marker=marks.marker(at, value),
                error_x={**bars, "array": _numbers(info.noise_error[t, at])},
                error_y={
                    **bars,
                    "symmetric": False,
                    "array": _numbers(drawn_up[at]),
                    "arrayminus": _numbers(drawn_down[at]),
                },
                customdata=[info.hover[t][c] for c in at],
                hovertemplate="%{customdata}<extra></extra>",
                name=plain(f"{marks.axis} {value}"),
                showlegend=False,
            )
        )
    best = info.best[t]
    traces.append(
        go.Scatter(
            x=[None if best is None else float(info.noise[t, best])],
            y=[None if best is None else float(heights[best])],
            mode="markers",
            marker=_BEST_MARK,
            hoverinfo="skip",
            showlegend=False,
        )
    )
    return traces


def _numbers(values: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in np.nan_to_num(values)]


def _lines(info: BiasVarianceInfo) -> list[Any]:
    """Lines of equal ca-mse (x + y constant), each with its value at its left end."""
    import plotly.graph_objects as go

    low, high = info.x_range
    x: list[float | None] = []
    y: list[float | None] = []
    labels: list[tuple[float, float, str]] = []
    for level in info.levels:
        half = np.geomspace(
            min(low, info.floor, level / 2), level / 2, 200
        )  # both ends of the curve, evenly on a log axis
        across = np.concatenate([half, level - half[-2::-1]])
        up = np.concatenate([level - half, half[-2::-1]])
        inside = (across >= low) & (across <= high) & (up >= info.floor) & (up <= info.y_range[1])
        if not inside.any():
            continue
        x += [*map(float, across[inside]), None]
        y += [*map(float, up[inside]), None]
        labels.append((float(across[inside][0]), float(up[inside][0]), number(level)))
    return [
        go.Scatter(
            x=points(x),
            y=points(y),
            mode="lines",
            line={"color": "#aeb4bd", "width": 1, "dash": "dot"},
            hoverinfo="skip",
            name="equal CA-MSE",
            showlegend=True,
        ),
        go.Scatter(
            x=points([label[0] for label in labels]),
            y=points([label[1] for label in labels]),
            text=[label[2] for label in labels],
            mode="text",
            textposition="top right",
            textfont={"size": 10, "color": _theme.MUTED},
            hoverinfo="skip",
            showlegend=False,
        ),
    ]


def _legend(info: BiasVarianceInfo) -> list[Any]:
    import plotly.graph_objects as go

    marks = Marks.of(info.strategies).legend()
    if any(best is not None for best in info.best):
        marks.append(("lowest CA-MSE", {**_BEST_MARK, "size": 14}))
    return [
        go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip", showlegend=True)
        for name, marker in marks
    ]
