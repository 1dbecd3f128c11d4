"""Training curves of several runs over the units they spent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._theme import number, plain
from schedulers.counts import format_count
from schedulers.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

_ACCURACY, _LOSS, _GAP, _AXIS = 250, 170, 40, 54  # pixels: the two plots, between them, axis title
_POINTS = 400  # of the smoothed loss per run: more cannot be seen


@dataclass(frozen=True)
class Curve:
    """One run: accuracy in [0, 1] at the evaluated rows, and the running median of the loss over `window` rows."""

    name: str
    accuracy_units: Floats
    accuracy: Floats
    loss_units: Floats
    loss: Floats
    window: int


def plot_training(runs: Mapping[str, Sequence[Row]]) -> go.Figure:
    """Accuracy and loss of each run over the units spent; one colour, dash and marker per run.

    Args:
        runs: name -> rows of a training log (`units`, and `loss` or `accuracy` or both). The loss is drawn as a
            running median over about a thirtieth of its rows, because strategies differ in loss from step to step.

    Raises:
        UsageError: there is no run, or a row has no number of units.
    """
    return _training_figure(_training_info(runs))


def _training_info(runs: Mapping[str, Sequence[Row]]) -> tuple[Curve, ...]:
    if not runs:
        raise UsageError("runs: there is no run to draw; give at least one training log")
    return tuple(_curve(name, rows) for name, rows in runs.items())


def _curve(name: str, rows: Sequence[Row]) -> Curve:
    accuracy_units, accuracy = _column(name, rows, "accuracy")
    units, loss = _column(name, rows, "loss")
    window = max(1, len(loss) // 30) | 1
    smooth = running_median(loss, window)
    kept = np.unique(np.linspace(0, max(len(loss) - 1, 0), min(len(loss), _POINTS)).astype(np.int64))
    return Curve(name, accuracy_units, accuracy, units[kept], smooth[kept], window)


def _column(name: str, rows: Sequence[Row], key: str) -> tuple[Floats, Floats]:
    """Units and finite values of the rows that have `key`, by units; of rows at the same units the later one."""
    found: dict[float, float] = {}
    for i, row in enumerate(rows):
        value = row.get(key)
        if value is None or not math.isfinite(float(value)):
            continue
        if not isinstance(row.get("units"), int | float):
            raise UsageError(f"run {name!r}: row {i} has no number under 'units'; give rows of a training log")
        found[float(row["units"])] = float(value)
    units = sorted(found)
    return np.array(units, dtype=np.float64), np.array([found[u] for u in units], dtype=np.float64)


def running_median(values: Floats, window: int) -> Floats:
    """Median of the `window` (odd) values around each; at the ends, of those that there are."""
    half = window // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))], dtype=np.float64)


def _training_figure(curves: tuple[Curve, ...]) -> go.Figure:
    from plotly.subplots import make_subplots

    parts = [
        (any(curve.accuracy.size for curve in curves), _ACCURACY, "accuracy"),
        (any(curve.loss.size for curve in curves), _LOSS, "loss"),
    ]
    shown = [(height, label) for exists, height, label in parts if exists] or [(_ACCURACY, "accuracy")]
    plot = sum(height for height, _ in shown) + _GAP * (len(shown) - 1)
    several = parts[1][0] and sum(bool(curve.loss.size) for curve in curves) > 1
    title = _theme.title_text(
        "Training",
        "over the units spent" + ("; loss: running median" if parts[1][0] else ""),
        "a loss under another strategy is another loss: compare accuracies" if several else "",
    )
    top = 28 + 19 * _theme.title_lines(title)
    figure = make_subplots(
        rows=len(shown),
        cols=1,
        shared_xaxes=True,
        row_heights=[float(h) for h, _ in shown],
        vertical_spacing=_GAP / plot,
    )
    for row, (_, label) in enumerate(shown, start=1):
        for i, curve in enumerate(curves):
            in_legend = label == ("accuracy" if curve.accuracy.size else "loss")
            figure.add_trace(_trace(i, curve, label, in_legend=in_legend), row=row, col=1)
        figure.update_yaxes(
            title_text=label, tickformat=".1%" if label == "accuracy" else None, nticks=6, row=row, col=1
        )
    bottom = _AXIS + _theme.legend_height(len(curves), columns=1)  # names are long
    figure.update_layout(
        template=_theme.template(),
        title={"text": title},
        height=top + plot + bottom,
        margin={"l": 64, "r": 24, "t": top, "b": bottom},
        legend={"y": (bottom - _AXIS) / (top + plot + bottom)},
        hovermode="closest",
    )
    figure.update_xaxes(tickformat="~s", nticks=6, rangemode="tozero")
    figure.update_xaxes(title_text="units", row=len(shown), col=1)
    return figure


def _trace(i: int, curve: Curve, label: str, *, in_legend: bool) -> Any:
    import plotly.graph_objects as go

    colour, dash = _theme.PALETTE[i % len(_theme.PALETTE)], _theme.DASHES[i % len(_theme.DASHES)]
    accuracy = label == "accuracy"
    units, values = (curve.accuracy_units, curve.accuracy) if accuracy else (curve.loss_units, curve.loss)
    name = plain(curve.name)
    hover = [
        f"<b>{name}</b><br>{format_count(u)} units<br>"
        + (f"accuracy {value:.2%}" if accuracy else f"loss {number(value)} (median of {curve.window} rows)")
        for u, value in zip(units, values, strict=True)
    ]
    return go.Scatter(
        x=[float(u) for u in units],
        y=[float(value) for value in values],
        mode="lines+markers" if accuracy else "lines",
        line={"color": colour, "width": 2.2 if accuracy else 1.8, "dash": dash},
        marker={"symbol": _theme.SYMBOLS[i % len(_theme.SYMBOLS)], "size": 8, "line": {"width": 1, "color": "white"}},
        name=name,
        legendgroup=str(i),
        showlegend=in_legend,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
    )
