"""A schedule as a strip over the budget, with its cost per sample and learning-rate factor beneath."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradscope.plots import _theme
from gradscope.plots._theme import number, plain, strategy_text, with_error
from schedulers.counts import format_count
from schedulers.strategy import Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from schedulers.decay import Decay
    from schedulers.schedule import Schedule, Stage

_STRIP, _LINE, _GAP, _AXIS = 130, 90, 40, 66  # pixels: strip, line plots, between them, axis labels and title


@dataclass(frozen=True)
class Block:
    """One strategy within one stage: `share` is its probability per step, `base` what lies beneath it."""

    start: float
    end: float
    base: float
    share: float
    hover: str


@dataclass(frozen=True)
class ScheduleInfo:
    """The numbers of the strip. `blocks` holds each strategy's parts, in the order of first appearance;
    `edges` (S+1,) and `costs` (S,) are the stages' ends as fractions of the budget and their units per
    sample; `decay` is (fractions, factors) or None.
    """

    blocks: dict[Strategy, tuple[Block, ...]]
    edges: tuple[float, ...]
    costs: tuple[float, ...]
    decay: tuple[tuple[float, ...], tuple[float, ...]] | None
    budget: float | None
    note: str


def plot_schedule(schedule: Schedule, *, decay: Decay | None = None) -> go.Figure:
    """Strip of strategies over the spent budget; a mixture is shown as stacked shares of the steps.

    Under it the cost per sample, and with `decay` the factor on the learning rate, against the same axis.
    """
    return _schedule_figure(_schedule_info(schedule, decay=decay))


def _schedule_info(schedule: Schedule, *, decay: Decay | None) -> ScheduleInfo:
    blocks: dict[Strategy, list[Block]] = {strategy: [] for strategy in schedule.strategies}
    for stage in schedule.stages:
        base = 0.0
        for strategy in blocks:
            share = dict(stage.mixture).get(strategy, 0.0)
            if share > 0:
                blocks[strategy].append(
                    Block(stage.start, stage.end, base, share, _hover(schedule, stage, strategy, share))
                )
                base += share
    fractions = tuple(float(f) for f in np.linspace(0, 1, 201))
    said = [f"criterion {schedule.criterion}"] if schedule.criterion else []
    said += [f"{schedule.metric} metric"] if schedule.metric else []
    said += [f"{format_count(schedule.total_samples)} samples"] if schedule.budget else []
    said += [f"{number(schedule.cost)} units per sample on average"]
    return ScheduleInfo(
        blocks={strategy: tuple(parts) for strategy, parts in blocks.items()},
        edges=(schedule.stages[0].start, *(stage.end for stage in schedule.stages)),
        costs=tuple(stage.cost for stage in schedule.stages),
        decay=(fractions, tuple(decay.factor(f) for f in fractions)) if decay else None,
        budget=schedule.budget,
        note=", ".join(said),
    )


def _hover(schedule: Schedule, stage: Stage, strategy: Strategy, share: float) -> str:
    lines = [f"<b>{plain(strategy_text(strategy))}</b>" + (f", {share:.0%} of the steps" if share < 1 else "")]
    span = f"{stage.start:.1%} to {stage.end:.1%} of the budget"
    if schedule.budget:
        units = [format_count(edge * schedule.budget) for edge in (stage.start, stage.end)]
        lines += [span, f"units {units[0]} to {units[1]}", f"{format_count(schedule.samples(stage))} samples"]
    else:
        lines.append(span)
    lines.append(f"cost: {number(stage.cost)} units per sample ({plain(schedule.cost_model)})")
    if stage.score is not None:
        error = float("nan") if stage.score_se is None else stage.score_se
        lines.append(f"{plain(schedule.criterion or 'score')}: {with_error(stage.score, error)}")
    return "<br>".join(lines)


def _schedule_figure(info: ScheduleInfo) -> go.Figure:
    from plotly.subplots import make_subplots

    heights = [_STRIP, _LINE] + ([_LINE] if info.decay else [])
    plot = sum(heights) + _GAP * (len(heights) - 1)
    title = _theme.title_text("Schedule", info.note)
    top = 36 + 19 * _theme.title_lines(title)
    bottom = _AXIS + _theme.legend_height(len(info.blocks), columns=1)
    figure = make_subplots(
        rows=len(heights),
        cols=1,
        shared_xaxes=True,
        row_heights=[float(h) for h in heights],
        vertical_spacing=_GAP / plot,
    )
    for i, (strategy, blocks) in enumerate(info.blocks.items()):
        figure.add_trace(_bars(i, strategy, blocks), row=1, col=1)
    figure.add_trace(_cost_line(info), row=2, col=1)
    if info.decay:
        figure.add_trace(_decay_line(*info.decay), row=3, col=1)
    figure.update_layout(
        template=_theme.template(),
        title={"text": title},
        height=top + plot + bottom,
        margin={"l": 64, "r": 24, "t": top, "b": bottom},
        barmode="overlay",
        bargap=0,
        uniformtext={"minsize": 10, "mode": "hide"},
        legend={"y": (bottom - _AXIS) / (top + plot + bottom), "traceorder": "normal"},
        hovermode="closest",
    )
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    under = [f"<br>{format_count(t * info.budget) if t else 0}" if info.budget else "" for t in ticks]
    figure.update_xaxes(
        range=[0, 1],
        tickvals=ticks,
        ticktext=[f"{t:.0%}{u}" for t, u in zip(ticks, under, strict=True)],
        showgrid=False,
    )
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
    if info.decay:
        figure.update_yaxes(range=[0, 1.08], tickvals=[0, 0.5, 1], title_text="rate", row=3, col=1)
    bottom_title = "budget spent" + (f" (of {format_count(info.budget)} units)" if info.budget else "")
    figure.update_xaxes(title_text=bottom_title, row=len(heights), col=1)
    return figure


def _bars(i: int, strategy: Strategy, blocks: tuple[Block, ...]) -> Any:
    import plotly.graph_objects as go

    colours, patterns = _theme.PALETTE, _theme.PATTERNS
    label = plain(strategy_text(strategy))
    short = "<br>".join(plain(f"{axis} {value}") for axis, value in strategy.items())
    return go.Bar(
        x=[(block.start + block.end) / 2 for block in blocks],
        width=[block.end - block.start for block in blocks],
        y=[block.share for block in blocks],
        base=[block.base for block in blocks],
        name=label,
        marker={
            "color": colours[i % len(colours)],
            "pattern": {
                "shape": patterns[i // len(colours) % len(patterns)],
                "fillmode": "overlay",
                "fgcolor": "white",
                "size": 8,
                "solidity": 0.2,
            },
            "line": {"width": 1.5, "color": "white"},
        },
        text=[short if block.share > 0.3 else "" for block in blocks],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        insidetextfont={"size": 12, "color": _theme.ink_on(_theme.hex_colour(colours[i % len(colours)]))},
        customdata=[block.hover for block in blocks],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=True,
    )


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
