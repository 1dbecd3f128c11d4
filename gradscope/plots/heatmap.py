"""Heat map of one variable over two axes of the grid, with a slider over progress: the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradscope.plots import _theme
from gradscope.plots._colour import ColourRange, colour_range
from gradscope.plots._heatmap_figure import heatmap_figure
from gradscope.plots._theme import number, plain, strategy_text, with_error
from gradscope.plots._view import (
    DONE,
    FAILED,
    STATUS_TEXT,
    Best,
    CubeView,
    Variable,
    best_strategies,
    near_zero,
    read_view,
    variable,
)
from schedulers.errors import UsageError
from schedulers.strategy import AxisValue, Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

    from schedulers.schedule import Schedule, Stage

Cell = tuple[int, int]
"""Index along the vertical axis, index along the horizontal axis."""


@dataclass(frozen=True)
class HeatmapInfo:
    """The numbers of a heat map: T frames of `rows` by `columns` cells.

    `values` are raw; `positions` are colours (NaN = no value); `failed` and `missing` are masks, a
    failed cell being missing too. `chosen` lists the cells that the schedule runs at each progress,
    `best` the best cell where it lies on the slice shown, `rivals` those that two standard errors do not
    tell from it, `notes` what each frame says in words. `uncertain` is a mask of values that two standard
    errors do not tell from zero.
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
    uncertain: NDArray[np.bool_]
    colours: ColourRange
    hover: tuple[tuple[tuple[str, ...], ...], ...]
    chosen: tuple[tuple[Cell, ...], ...]
    best: tuple[Cell | None, ...]
    rivals: tuple[tuple[Cell, ...], ...]
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
        schedule: its strategies at each progress are outlined and marked, where it was made by trajectory at the
            progress it is predicted to be at; there is no mark where it never gets.
        progress: where the slider starts (the nearest measured point); by default at the first.

    Lighter is better for every variable that has a better end. Colours span one range over all frames,
    logarithmic where clear values span more than two decades. Cells without a value are grey, failed ones
    have a cross; values that two standard errors do not tell from zero have a hatched corner. For criteria
    the best strategy of a frame has a star, and those within two standard errors of it a small one.

    Raises:
        UsageError: a variable, metric or axis that the cube does not hold.
    """
    info = _heatmap_info(cube, name=variable, metric=metric, axes=axes, schedule=schedule)
    return heatmap_figure(info, _theme.start_index(info.progress, progress))


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
    best: list[Best | None] = [None] * len(view.progress)
    if shown.is_criterion:
        best = best_strategies(view, shown)
    shares = [_shares(schedule, float(p)) for p in view.progress]

    rows: tuple[AxisValue, ...] = view.grid.axes[up] if up else ("",)
    columns = view.grid.axes[across]
    values, errors = (
        _slice(view, view.values(shown.name), across, up),
        _slice(view, view.errors(shown.name), across, up),
    )
    signed = (shown.is_criterion and shown.better == "higher") or shown.name == "inner"
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
        uncertain=near_zero(values, errors),
        colours=colours,
        hover=_hover(view, shown, _positions(view, across, up), shares, best),
        chosen=tuple(_chosen_cells(view, share, across, up) for share in shares),
        best=tuple(_cell(view, found.winner.strategy, across, up) if found else None for found in best),
        rivals=tuple(_cells(view, [r.strategy for r in found.rivals] if found else [], across, up) for found in best),
        notes=tuple(
            _notes(found, share, fixed, gets_there=schedule is None or bool(share))
            for found, share in zip(best, shares, strict=True)
        ),
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
        [
            tuple({**home, across: j, **({up: i} if up else {})}[axis] for axis in view.grid.axes)
            for j in range(len(view.grid.axes[across]))
        ]
        for i in range(height)
    ]


def _slice(view: CubeView, array: NDArray[Any], across: str, up: str) -> NDArray[Any]:
    """(T, rows, columns) of a (T, *grid) array, the axes not shown at the reference's value."""
    where = np.array(_positions(view, across, up))
    index: tuple[Any, ...] = (slice(None), *(where[..., axis] for axis in range(where.shape[-1])))
    return np.asarray(array[index])


def _shares(schedule: Schedule | None, progress: float) -> dict[Strategy, float]:
    """Share of the steps that each strategy has in the schedule at this progress; empty where it never gets there."""
    stage = None if schedule is None else _stage_at(schedule, progress)
    return {} if stage is None else {strategy: weight for strategy, weight in stage.mixture if weight > 0}


def _stage_at(schedule: Schedule, progress: float) -> Stage | None:
    """The stage that runs at this progress.

    By trajectory the one whose predicted progress, ends included, holds it, of several the one that moves farthest and
    then the one of most budget; None where none does, as past the progress that the schedule reaches.
    """
    if schedule.progress_mode == "fraction":
        return schedule.at(progress)
    moves = {i: s.progress for i, s in enumerate(schedule.stages) if s.progress is not None}
    there = [i for i, (first, last) in moves.items() if first <= progress <= last]
    if not there:
        return None

    def length(i: int) -> tuple[float, float]:
        return moves[i][1] - moves[i][0], schedule.stages[i].end - schedule.stages[i].start

    return schedule.stages[max(there, key=length)]


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
    return _cells(view, _main(shares), across, up)


def _cells(view: CubeView, strategies: Sequence[Strategy], across: str, up: str) -> tuple[Cell, ...]:
    cells = (_cell(view, strategy, across, up) for strategy in strategies)
    return tuple(sorted(cell for cell in cells if cell is not None))


def _notes(
    best: Best | None, shares: dict[Strategy, float], fixed: dict[str, AxisValue], *, gets_there: bool
) -> tuple[str, ...]:
    notes = []
    if best:
        winner = best.winner
        notes.append(f"Best: {strategy_text(winner.strategy)} at {with_error(winner.value, winner.error)}")
    main = _main(shares)
    if main:
        listed = "; ".join(strategy_text(strategy) for strategy in main[:2])
        more = f" and {len(main) - 2} more" if len(main) > 2 else ""
        notes.append(f"Schedule runs: {listed}{more}")
    elif not gets_there:
        notes.append("The schedule is not predicted to get here")
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
    labels, strategies = view.labels, {p: view.strategy(p) for row in positions for p in row}
    fields = {variable(view.dataset, name): (view.values(name), view.errors(name)) for name in names}

    def text(t: int, position: tuple[int, ...]) -> str:
        at = (t, *position)
        strategy = strategies[position]
        step = f", step {view.step[t]:,}" if view.step is not None else ""
        lines = [f"progress {labels[t]}{step}"]
        lines += [f"{plain(view.unit(axis))}: <b>{plain(value)}</b>" for axis, value in strategy.items()]
        for field, (values, errors) in fields.items():
            value = with_error(values[at], errors[at])
            if np.isnan(values[at]) and field.is_criterion and view.status[at] == DONE:
                value = "undefined (the reference gradient is lost in noise)"
            elif errors[at] > 0 and abs(values[at]) <= 2 * errors[at]:
                value += " (within two standard errors of zero)"
            lines.append(f"{field.short}: <b>{value}</b>" if field == shown else f"{field.short}: {value}")
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
            lines.append("⋆ within two standard errors of the best")
        return "<br>".join(lines)

    return tuple(tuple(tuple(text(t, p) for p in row) for row in positions) for t in range(len(view.progress)))
