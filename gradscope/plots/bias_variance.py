"""Bias against cost-adjusted variance: where a strategy's error comes from, at each progress: the numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._bias_variance_figure import bias_variance_figure
from gradscope.plots._theme import number, plain, strategy_text, with_error
from gradscope.plots._view import CubeView, read_view
from schedulers.errors import UsageError
from schedulers.strategy import Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

Floats = NDArray[np.float64]

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
    return bias_variance_figure(info, _theme.start_index(info.progress, progress))


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
    labels = view.labels
    costs, samples = view.cost.reshape(-1), view.n_samples.reshape(len(view.progress), -1)

    def text(t: int, c: int) -> str:
        mark = "<br>★ lowest CA-MSE at this progress" if best[t] == c else ""
        return (
            f"<b>{plain(strategy_text(strategies[c]))}</b><br>progress {labels[t]}<br>"
            f"bias² / ‖G‖²: {with_error(bias[0][t, c], bias[1][t, c])}<br>"
            f"C/β · variance / ‖G‖²: {with_error(noise[0][t, c], noise[1][t, c])}<br>"
            f"CA-MSE / ‖G‖²: {number(total[t, c])}<br>"
            f"cost: {number(costs[c])} units per sample ({plain(view.cost_model)}), {samples[t, c]:,} samples{mark}"
        )

    return tuple(tuple(text(t, c) for c in range(len(strategies))) for t in range(len(view.progress)))
