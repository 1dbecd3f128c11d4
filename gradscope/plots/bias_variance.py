"""Bias against cost-adjusted variance: where a strategy's error comes from, at each progress."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._theme import number, plain, strategy_text, with_error
from gradscope.plots._view import CubeView, read_view
from schedulers.errors import UsageError
from schedulers.strategy import AxisValue, Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

Floats = NDArray[np.float64]

_TOP, _BOTTOM_SLIDER, _BOTTOM_STILL, _PLOT = 64, 184, 112, 380
_FLOOR_GAP = 0.35  # decades between the smallest bias drawn to scale and the line of "no bias"


@dataclass(frozen=True)
class BiasVarianceInfo:
    """The numbers of the figure: C strategies in the grid's order at T progress points.

    `bias` is bias_sq / ‖G‖² and `noise` is C/β · variance / ‖G‖², both raw (their sum, with the bias
    clamped at 0, is `ca-mse`), shape (T, C); `floor` is the height at which biases too small for the
    logarithmic axis are drawn; `best` is the index of the lowest sum at each progress.
    """

    metric: str
    strategies: tuple[Strategy, ...]
    reference: int
    progress: tuple[float, ...]
    bias: Floats
    bias_error: Floats
    noise: Floats
    noise_error: Floats
    smallest: float
    floor: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    levels: tuple[float, ...]
    best: tuple[int | None, ...]
    hover: tuple[tuple[str, ...], ...]

    def heights(self) -> Floats:
        """`bias` as drawn: what lies below the smallest bias to scale is put on the floor."""
        return np.where(self.bias < self.smallest, np.where(np.isnan(self.bias), np.nan, self.floor), self.bias)


def plot_bias_variance(
    cube: xr.Dataset | xr.DataTree, *, progress: float | None = None, metric: str | None = None
) -> go.Figure:
    """Every strategy as a point: cost-adjusted variance across, squared bias up, both over ‖G‖².

    Lines join points of equal `ca-mse`; nearer to the lower left corner is better. Bars are one standard
    error. A bias that is zero or below (the reference's, and unbiased estimates of very little) lies on the
    lowest line. The colour is the value on the grid's first axis and the shape that on its second.

    Args:
        cube: the cube; its attribute `beta` and a cost for each strategy are needed.
        progress: where the slider starts (the nearest measured point); by default at the first.
        metric: `euclidean` or `optimizer`; by default `optimizer` where the cube has it.

    Raises:
        UsageError: an unknown metric, or a cube without `beta`.
    """
    info = _bias_variance_info(cube, metric=metric)
    return _bias_variance_figure(info, _theme.start_index(info.progress, progress))


def _bias_variance_info(cube: xr.Dataset | xr.DataTree, *, metric: str | None) -> BiasVarianceInfo:
    view = read_view(cube, metric=metric)
    beta = view.beta()
    if not beta > 0:
        raise UsageError("cube: the attribute 'beta', the budget of one update in units, is missing; profile writes it")
    count, strategies = len(view.progress), tuple(view.grid.strategies())
    reference = strategies.index(view.grid.reference)

    def table(values: Floats) -> Floats:
        return values.reshape(count, -1)

    if "norm_sq_ref" in view.dataset:
        norm = table(view.values("norm_sq_ref"))
    else:
        norm = table(view.values("norm_sq"))[:, [reference]]
    norm = np.where(norm > 0, norm, np.nan)
    share = view.cost.reshape(1, -1) / beta
    bias, bias_error = table(view.values("bias_sq")) / norm, table(view.errors("bias_sq")) / norm
    noise, noise_error = share * table(view.values("variance")) / norm, share * table(view.errors("variance")) / norm
    known = np.isfinite(bias) & (noise > 0)
    bias, bias_error, noise, noise_error = (
        np.where(known, array, np.nan) for array in (bias, bias_error, noise, noise_error)
    )
    total = np.maximum(bias, 0) + noise
    best = tuple(int(np.nanargmin(row)) if known[t].any() else None for t, row in enumerate(total))
    smallest, x_range, y_range, floor = _ranges(bias, bias_error, noise, known)
    return BiasVarianceInfo(
        metric=view.metric,
        strategies=strategies,
        reference=reference,
        progress=tuple(float(p) for p in view.progress),
        bias=bias,
        bias_error=bias_error,
        noise=noise,
        noise_error=noise_error,
        smallest=smallest,
        floor=floor,
        x_range=x_range,
        y_range=y_range,
        levels=_levels(float(total[known].min()), float(total[known].max())) if known.any() else (),
        best=best,
        hover=_hover(view, strategies, (bias, bias_error), (noise, noise_error), total, best),
    )


def _ranges(
    bias: Floats, error: Floats, noise: Floats, known: NDArray[np.bool_]
) -> tuple[float, tuple[float, float], tuple[float, float], float]:
    """Smallest bias to scale, the ranges of both axes over all frames, and the floor.

    Four decades at most: a bias that is smaller by chance would push all others into a corner.
    """
    clear = bias[known & (bias > np.nan_to_num(error)) & (bias > 0)]
    across = noise[known]
    if not across.size:
        return 0.1, (0.1, 1.0), (0.05, 1.0), 0.05
    top = float(clear.max()) if clear.size else float(across.max())
    smallest = max(float(clear.min()) if clear.size else top / 10, top / 1e4)
    floor = smallest / 10**_FLOOR_GAP
    x_range = float(across.min()) / 1.5, float(across.max()) * 1.5
    return smallest, x_range, (floor / 1.4, top * 1.8), floor


def _levels(low: float, high: float) -> tuple[float, ...]:
    """Values of ca-mse for the lines of equality: 1, 3, 10, ... within and just around the measured ones."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return tuple(m * 10.0**p for p in powers for m in (1, 3) if low / 3 <= m * 10.0**p <= high * 1.5)


def _hover(
    view: CubeView,
    strategies: tuple[Strategy, ...],
    bias: tuple[Floats, Floats],
    noise: tuple[Floats, Floats],
    total: Floats,
    best: tuple[int | None, ...],
) -> tuple[tuple[str, ...], ...]:
    costs, samples = view.cost.reshape(-1), view.n_samples.reshape(len(view.progress), -1)

    def text(t: int, c: int) -> str:
        mark = "<br>★ lowest CA-MSE at this progress" if best[t] == c else ""
        return (
            f"<b>{plain(strategy_text(strategies[c]))}</b><br>progress {_theme.frame_name(view.progress[t])}<br>"
            f"bias² / ‖G‖²: {with_error(bias[0][t, c], bias[1][t, c])}<br>"
            f"C/β · variance / ‖G‖²: {with_error(noise[0][t, c], noise[1][t, c])}<br>"
            f"CA-MSE / ‖G‖²: {number(total[t, c])}<br>"
            f"cost: {number(costs[c])} units per sample ({plain(view.cost_model)}), {samples[t, c]:,} samples{mark}"
        )

    return tuple(tuple(text(t, c) for c in range(len(strategies))) for t in range(len(view.progress)))


def _groups(info: BiasVarianceInfo) -> tuple[list[AxisValue], list[AxisValue], str, str]:
    """Values and names of the first axis (colours) and the second (shapes), in the grid's order."""
    names = list(info.strategies[0])
    first = list(dict.fromkeys(strategy[names[0]] for strategy in info.strategies))
    second = list(dict.fromkeys(strategy[names[1]] for strategy in info.strategies)) if len(names) > 1 else []
    return first, second, names[0], names[1] if second else ""


def _bias_variance_figure(info: BiasVarianceInfo, start: int) -> go.Figure:
    import plotly.graph_objects as go

    names = [_theme.frame_name(p) for p in info.progress]
    titles = [_title(info, t) for t in range(len(names))]
    bottom = _BOTTOM_SLIDER if len(names) > 1 else _BOTTOM_STILL
    top = _TOP - 30 + 19 * max(_theme.title_lines(text) for text in titles)
    moving = _points(info, start)
    figure = go.Figure(data=[*moving, *_lines(info), *_legend(info)])
    figure.frames = [
        go.Frame(name=name, data=_points(info, t), traces=list(range(len(moving))),
                 layout={"title": {"text": titles[t]}})
        for t, name in enumerate(names)
    ]  # fmt: skip
    ticks = [m * 10.0**p for p in range(-12, 13) for m in (1, 3) if info.smallest <= m * 10.0**p <= info.y_range[1]]
    if math.log10(info.y_range[1] / info.smallest) > 3:
        ticks = [tick for tick in ticks if abs(math.log10(tick) - round(math.log10(tick))) < 1e-9]
    figure.update_layout(
        template=_theme.template(),
        title={"text": titles[start]},
        height=top + _PLOT + bottom,
        margin={"l": 64, "r": 24, "t": top, "b": bottom},
        legend={"y": -(bottom - 66) / _PLOT, "yanchor": "top", "itemwidth": 30},
        hovermode="closest",
    )
    figure.update_xaxes(
        type="log", range=[math.log10(value) for value in info.x_range], title_text="C/β · variance / ‖G‖²",
        tickvals=_decimal_ticks(*info.x_range), ticktext=[number(v) for v in _decimal_ticks(*info.x_range)],
    )  # fmt: skip
    figure.update_yaxes(
        type="log", range=[math.log10(value) for value in info.y_range], title_text="bias² / ‖G‖²",
        tickvals=[info.floor, *ticks], ticktext=["≈ 0", *(number(tick) for tick in ticks)],
    )  # fmt: skip
    _theme.add_slider(figure, names, active=start, y=-52 / _PLOT)
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

    first, second, axis, other = _groups(info)
    heights = info.heights()[t]
    drawn_down = np.minimum(info.bias_error[t], heights - info.floor)
    drawn_up = np.maximum(info.bias[t] + info.bias_error[t] - heights, 0)
    traces = []
    for i, value in enumerate(first):
        at = [c for c, s in enumerate(info.strategies) if s[axis] == value and np.isfinite(heights[c])]
        shapes = [_theme.SYMBOLS[second.index(info.strategies[c][other]) % len(_theme.SYMBOLS)] if other else "circle"
                  for c in at]  # fmt: skip
        colour = _theme.PALETTE[i % len(_theme.PALETTE)]
        bars: dict[str, Any] = {"thickness": 1.2, "width": 0, "color": colour, "type": "data"}
        traces.append(
            go.Scatter(
                x=[float(info.noise[t, c]) for c in at] or [None],
                y=[float(heights[c]) for c in at] or [None],
                mode="markers",
                marker={"color": colour, "symbol": shapes or "circle", "size": 12,
                        "line": {"width": 1.5, "color": "white"}},
                error_x={**bars, "array": _numbers(info.noise_error[t, at])},
                error_y={**bars, "symmetric": False, "array": _numbers(drawn_up[at]),
                         "arrayminus": _numbers(drawn_down[at])},
                customdata=[info.hover[t][c] for c in at],
                hovertemplate="%{customdata}<extra></extra>",
                name=plain(f"{axis} {value}"),
                showlegend=False,
            )
        )  # fmt: skip
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


_BEST_MARK = {"symbol": "circle-open", "size": 24, "color": _theme.INK, "line": {"width": 2}}


def _numbers(values: Floats) -> list[float]:
    return [float(value) for value in np.nan_to_num(values)]


def _lines(info: BiasVarianceInfo) -> list[Any]:
    """Lines of equal ca-mse (x + y constant), each with its value at its left end."""
    import plotly.graph_objects as go

    low, high = info.x_range
    x: list[float | None] = []
    y: list[float | None] = []
    labels: list[tuple[float, float, str]] = []
    for level in info.levels:
        across = level - np.geomspace(level * 1e-6, level, 400)[::-1]
        up = level - across
        inside = (across >= low) & (across <= high) & (up >= info.floor) & (up <= info.y_range[1])
        if not inside.any():
            continue
        x += [*map(float, across[inside]), None]
        y += [*map(float, up[inside]), None]
        labels.append((float(across[inside][0]), float(up[inside][0]), number(level)))
    return [
        go.Scatter(x=x or [None], y=y or [None], mode="lines", line={"color": "#aeb4bd", "width": 1, "dash": "dot"},
                   hoverinfo="skip", name="equal CA-MSE", showlegend=True),
        go.Scatter(x=[label[0] for label in labels] or [None], y=[label[1] for label in labels] or [None],
                   text=[label[2] for label in labels], mode="text", textposition="top right",
                   textfont={"size": 10, "color": _theme.MUTED}, hoverinfo="skip", showlegend=False),
    ]  # fmt: skip


def _legend(info: BiasVarianceInfo) -> list[Any]:
    import plotly.graph_objects as go

    first, second, axis, other = _groups(info)
    colours = [(f"{axis} {value}", {"symbol": "circle", "color": _theme.PALETTE[i % len(_theme.PALETTE)]})
               for i, value in enumerate(first)]  # fmt: skip
    shapes = [(f"{other} {value}", {"symbol": _theme.SYMBOLS[i % len(_theme.SYMBOLS)], "color": _theme.MUTED})
              for i, value in enumerate(second)]  # fmt: skip
    marks = [(plain(name), {**marker, "size": 10}) for name, marker in colours + shapes]
    if any(best is not None for best in info.best):
        marks.append(("lowest CA-MSE", {**_BEST_MARK, "size": 14}))
    return [
        go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, hoverinfo="skip", showlegend=True)
        for name, marker in marks
    ]
