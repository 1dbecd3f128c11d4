"""A schedule as a strip over the budget; beneath it cost per sample, confidence and learning-rate factor."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.plots import _theme
from gradscope.plots._strips import AXIS, Block, bars, budget_title, fraction_axis, layout, strategy_blocks
from gradscope.plots._theme import number
from schedulers.counts import format_count
from schedulers.strategy import Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from schedulers.decay import Decay
    from schedulers.schedule import Schedule

_STRIP, _LINE, _GAP = 130, 90, 40  # pixels: strip, line plots, between them


@dataclass(frozen=True)
class ScheduleInfo:
    """The numbers of the strip. `blocks` holds each strategy's parts, in the order of first appearance;
    `edges` (S+1,) and `costs` (S,) are the stages' ends as fractions of the budget and their units per
    sample; `sure` (S,) the probabilities that the stages' main strategies are the best ones, None where a stage has
    none, or None for a schedule without any; `decay` is (fractions, factors) or None.
    """

    blocks: dict[Strategy, tuple[Block, ...]]
    edges: tuple[float, ...]
    costs: tuple[float, ...]
    sure: tuple[float | None, ...] | None
    decay: tuple[tuple[float, ...], tuple[float, ...]] | None
    budget: float | None
    note: str


def plot_schedule(schedule: Schedule, *, decay: Decay | None = None) -> go.Figure:
    """Strip of strategies over the spent budget; a mixture is shown as stacked shares of the steps.

    Under it, against the same axis, the cost per sample, the probability that each stage's main strategy is the best
    one where the schedule has it (`optimize` says it), and with `decay` the factor on the learning rate.
    """
    return _schedule_figure(_schedule_info(schedule, decay=decay))


def _schedule_info(schedule: Schedule, *, decay: Decay | None) -> ScheduleInfo:
    fractions = tuple(float(f) for f in np.linspace(0, 1, 201))
    sure = tuple(stage.probability for stage in schedule.stages)
    said = [f"criterion {schedule.criterion}"] if schedule.criterion else []
    said += [f"{schedule.metric} metric"] if schedule.metric else []
    said += [f"{format_count(schedule.total_samples)} samples"] if schedule.budget else []
    said += [f"{number(schedule.cost)} units per sample on average"]
    return ScheduleInfo(
        blocks=strategy_blocks(schedule),
        edges=(schedule.stages[0].start, *(stage.end for stage in schedule.stages)),
        costs=tuple(stage.cost for stage in schedule.stages),
        sure=sure if any(p is not None for p in sure) else None,
        decay=(fractions, tuple(decay.factor(f) for f in fractions)) if decay else None,
        budget=schedule.budget,
        note=", ".join(said),
    )


def _schedule_figure(info: ScheduleInfo) -> go.Figure:
    from plotly.subplots import make_subplots

    lines = [_cost_line(info)]
    if info.sure:
        lines.append(_sure_line(info.edges, info.sure))
    if info.decay:
        lines.append(_decay_line(*info.decay))
    heights = [_STRIP, *(_LINE for _ in lines)]
    plot = sum(heights) + _GAP * (len(heights) - 1)
    title = _theme.title_text("Schedule", info.note)
    top = 36 + 19 * _theme.title_lines(title)
    bottom = AXIS + _theme.legend_height(len(info.blocks), columns=1)
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        shared_xaxes=True,
        row_heights=[float(h) for h in heights],
        vertical_spacing=_GAP / plot,
    )
    for i, (strategy, blocks) in enumerate(info.blocks.items()):
        figure.add_trace(bars(i, strategy, blocks), row=1, col=1)
    for row, line in enumerate(lines, 2):
        figure.add_trace(line, row=row, col=1)
    figure.update_layout(**layout(title=title, top=top, plot=plot, bottom=bottom))
    figure.update_xaxes(**fraction_axis(info.budget))
    mixed = any(block.share < 1 for blocks in info.blocks.values() for block in blocks)
    figure.update_yaxes(
        range=[0, 1],
        showgrid=False,
        tickvals=[0, 0.5, 1] if mixed else [],
        tickformat=".0%",
        title_text="share of steps" if mixed else None,
        row=1,
        col=1,
    )
    figure.update_yaxes(rangemode="tozero", nticks=4, title_text="cost", row=2, col=1)
    share: dict[str, Any] = {"range": [0, 1.08], "tickvals": [0, 0.5, 1]}
    if info.sure:
        figure.update_yaxes(**share, tickformat=".0%", title_text="confidence", row=3, col=1)
    if info.decay:
        figure.update_yaxes(**share, title_text="rate", row=len(heights), col=1)
    figure.update_xaxes(title_text=budget_title(info.budget), row=len(heights), col=1)
    return figure


def _cost_line(info: ScheduleInfo) -> Any:
    import plotly.graph_objects as go

    levels = [*info.costs, info.costs[-1]]
    return go.Scatter(
        x=list(info.edges),
        y=levels,
        mode="lines",
        line={"color": _theme.INK, "width": 2, "shape": "hv"},
        name="cost in units per sample",
        showlegend=False,
        customdata=[f"cost: {number(level)} units per sample" for level in levels],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _sure_line(edges: tuple[float, ...], sure: tuple[float | None, ...]) -> Any:
    import plotly.graph_objects as go

    stages = [
        (edge, p) for ends, p in zip(pairwise(edges), sure, strict=True) if p is not None for edge in (*ends, None)
    ]
    return go.Scatter(
        x=[edge for edge, _ in stages],
        y=[None if edge is None else p for edge, p in stages],
        mode="lines",
        line={"color": _theme.PALETTE[0], "width": 2},
        name="probability that the stage's main strategy is the best",
        showlegend=False,
        customdata=[f"the best with probability {p:.0%}" for _, p in stages],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _decay_line(fractions: tuple[float, ...], factors: tuple[float, ...]) -> Any:
    import plotly.graph_objects as go

    return go.Scatter(
        x=list(fractions),
        y=list(factors),
        mode="lines",
        line={"color": _theme.MUTED, "width": 2, "dash": "dash"},
        name="learning-rate factor",
        showlegend=False,
        customdata=[
            f"learning-rate factor {number(value)} at {x:.0%}" for x, value in zip(fractions, factors, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
