"""Two cubes or two schedules side by side: the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._colour import ColourRange, colour_range
from gradscope.plots._compare_figure import compare_figure
from gradscope.plots._theme import plain, strategy_text, with_error
from gradscope.plots._view import Best, CubeView, Variable, best_strategies, read_view, variable
from gradscope.plots.schedules import plot_schedules
from schedulers.errors import UsageError
from schedulers.schedule import Schedule
from schedulers.strategy import Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

Floats = NDArray[np.float64]

NEAR = 0.03  # progress points of two cubes no further apart than this are compared


@dataclass(frozen=True)
class CompareInfo:
    """The numbers of the figure: T pairs of progress points, C strategies that both cubes have.

    `values` and `errors` are (2, T, C), NaN where not measured; `best` the index of each cube's best strategy (None:
    none, or not among those of both); `correlation` Spearman's over the strategies measured in both (NaN below three).
    """

    variable: Variable
    metric: str
    names: tuple[str, str]
    strategies: tuple[Strategy, ...]
    progress: tuple[float, ...]
    values: Floats
    errors: Floats
    scale: ColourRange
    best: tuple[tuple[int | None, int | None], ...]
    correlation: tuple[float, ...]
    hover: tuple[tuple[str, ...], ...]
    notes: tuple[tuple[str, ...], ...]


def plot_compare(
    first: xr.Dataset | xr.DataTree | Schedule,
    second: xr.Dataset | xr.DataTree | Schedule,
    *,
    names: Sequence[str] = ("first", "second"),
    variable: str = "descent",
    metric: str | None = None,
    progress: float | None = None,
) -> go.Figure:
    """Two cubes as points, one a strategy: its value in the first across, in the second up. Or two schedules as strips.

    Points on the diagonal are equal in both. Bars are one standard error. The colour is the value on the grid's first
    axis and the shape that on its second; rings mark the best strategy of each cube. Progress points of the two are
    paired where they are no more than .03 apart, a frame for each pair.

    Args:
        first, second: two cubes (a tree stands for its root), or two schedules.
        names: what they are called.
        variable: a criterion or a moment, as in `plot_heatmap`; not used for schedules.
        metric: `euclidean` or `optimizer`; by default `optimizer` where both cubes have it.
        progress: where the slider starts (the nearest pair); by default at the first.

    Raises:
        UsageError: a cube and a schedule, cubes with other axes, without a common strategy or without progress points
            near each other, or a variable or metric that one of them does not hold.
    """
    if len(names) != 2 or names[0] == names[1]:
        raise UsageError(f"names={list(names)}: give two different ones")
    if isinstance(first, Schedule) and isinstance(second, Schedule):
        return plot_schedules({names[0]: first, names[1]: second})
    if isinstance(first, Schedule) or isinstance(second, Schedule):
        raise UsageError("a cube and a schedule cannot be compared; give two cubes or two schedules")
    info = _compare_info(first, second, names=(names[0], names[1]), name=variable, metric=metric)
    return compare_figure(info, _theme.start_index(info.progress, progress))


def _compare_info(
    first: xr.Dataset | xr.DataTree,
    second: xr.Dataset | xr.DataTree,
    *,
    names: tuple[str, str],
    name: str,
    metric: str | None,
) -> CompareInfo:
    views = read_view(first, metric=metric), read_view(second, metric=metric)
    if views[0].metric != views[1].metric:  # each has its own default
        views = read_view(first, metric=views[0].metric), read_view(second, metric=views[0].metric)
    shown = variable(first, name), variable(second, name)
    strategies = _common(*views)
    pairs = _pairs(*(view.progress.tolist() for view in views))
    sides = []
    for k, (view, one) in enumerate(zip(views, shown, strict=True)):
        tables = view.values(one.name), view.errors(one.name)
        sides.append([_cells(view, table, strategies)[[pair[k] for pair in pairs]] for table in tables])
    values, errors = (np.stack([side[part] for side in sides]) for part in (0, 1))
    left, right = (_bests(view, s) for view, s in zip(views, shown, strict=True))
    best = tuple((_position(strategies, left[a]), _position(strategies, right[b])) for a, b in pairs)
    signed = (shown[0].is_criterion and shown[0].better == "higher") or shown[0].name == "inner"
    correlation = tuple(_rank_correlation(values[0, t], values[1, t]) for t in range(len(pairs)))
    return CompareInfo(
        variable=shown[0],
        metric=views[0].metric,
        names=names,
        strategies=strategies,
        progress=tuple(float(views[0].progress[a]) for a, _ in pairs),
        values=values,
        errors=errors,
        scale=colour_range(values, errors, signed=signed),
        best=best,
        correlation=correlation,
        hover=_hover(views, pairs, shown[0], names, strategies, values, errors),
        notes=tuple(_notes(names, strategies, one, rho) for one, rho in zip(best, correlation, strict=True)),
    )


def _common(a: CubeView, b: CubeView) -> tuple[Strategy, ...]:
    """The strategies of both grids, in the order of the first."""
    if set(a.grid.axes) != set(b.grid.axes):
        raise UsageError(
            f"these cubes cannot be compared: one has the axes {', '.join(a.grid.axes)} and the other "
            f"{', '.join(b.grid.axes)}; give two cubes of one kind of grid"
        )
    theirs = {frozenset(strategy.items()) for strategy in b.grid.strategies()}
    common = tuple(strategy for strategy in a.grid.strategies() if frozenset(strategy.items()) in theirs)
    if not common:
        raise UsageError("these cubes cannot be compared: their grids have no strategy in common")
    return common


def _pairs(a: Sequence[float], b: Sequence[float]) -> list[tuple[int, int]]:
    """Positions of points that are nearest to each other, and no more than NEAR apart."""
    found = []
    for i, here in enumerate(a):
        j = min(range(len(b)), key=lambda k: abs(b[k] - here))
        nearest = min(range(len(a)), key=lambda k: abs(a[k] - b[j]))
        if nearest == i and abs(b[j] - here) <= NEAR:
            found.append((i, j))
    if not found:
        raise UsageError(f"these cubes cannot be compared: no two of their progress points are within {NEAR:g}")
    return found


def _cells(view: CubeView, table: Floats, strategies: Sequence[Strategy]) -> Floats:
    """(T, C) of a (T, *grid) array."""
    where = np.array([view.grid.position(strategy) for strategy in strategies]).T
    return np.asarray(table[(slice(None), *where)])


def _bests(view: CubeView, shown: Variable) -> list[Best | None]:
    return best_strategies(view, shown) if shown.is_criterion else [None] * len(view.progress)


def _position(strategies: Sequence[Strategy], best: Best | None) -> int | None:
    if best is None:
        return None
    wanted = dict(best.winner.strategy)
    return next((i for i, strategy in enumerate(strategies) if dict(strategy) == wanted), None)


def _rank_correlation(a: Floats, b: Floats) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 3 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    from scipy.stats import spearmanr

    return float(spearmanr(a[known], b[known]).statistic)


def _notes(
    names: tuple[str, str], strategies: Sequence[Strategy], best: tuple[int | None, int | None], correlation: float
) -> tuple[str, ...]:
    notes = [
        f"Best in {name}: {strategy_text(strategies[position])}"
        for name, position in zip(names, best, strict=True)
        if position is not None
    ]
    if np.isfinite(correlation):
        notes.append(f"Rank correlation over the strategies: {correlation:.2f}")
    return tuple(notes)


def _hover(
    views: tuple[CubeView, CubeView],
    pairs: Sequence[tuple[int, int]],
    shown: Variable,
    names: tuple[str, str],
    strategies: Sequence[Strategy],
    values: Floats,
    errors: Floats,
) -> tuple[tuple[str, ...], ...]:
    def text(t: int, c: int) -> str:
        lines = [f"<b>{plain(strategy_text(strategies[c]))}</b>"]
        for k, (view, name) in enumerate(zip(views, names, strict=True)):
            value = with_error(float(values[k, t, c]), float(errors[k, t, c]))
            at = view.labels[pairs[t][k]]
            lines.append(f"{shown.short} in {plain(name)} at progress {at}: {value}")
        difference = values[1, t, c] - values[0, t, c]
        spread = float(np.hypot(errors[0, t, c], errors[1, t, c]))
        if np.isfinite(difference):
            lines.append(f"difference: {with_error(float(difference), spread)}")
        return "<br>".join(lines)

    return tuple(tuple(text(t, c) for c in range(len(strategies))) for t in range(len(pairs)))
