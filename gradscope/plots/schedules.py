"""Several schedules as strips under each other, on one axis of the spent fraction of the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradscope.plots import _theme
from gradscope.plots._strips import AXIS, Block, bars, budget_title, fraction_axis, layout, strategy_blocks
from gradscope.plots._theme import number, strategy_text, wrapped
from schedulers.counts import format_count
from schedulers.errors import UsageError
from schedulers.strategy import Strategy

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from schedulers.schedule import Schedule

_STRIP, _LABEL_LINE, _GAP = 58, 16, 10  # pixels: a strip, a line of its label, between a strip and the next label
_SHORT = 22  # letters of a strategy's name of which two fit beside each other on a narrow screen


@dataclass(frozen=True)
class Strip:
    """One schedule: its name, what is said beside it, and each strategy's parts."""

    name: str
    note: str
    blocks: dict[Strategy, tuple[Block, ...]]

    @property
    def mixed(self) -> bool:
        return any(block.share < 1 for blocks in self.blocks.values() for block in blocks)


@dataclass(frozen=True)
class SchedulesInfo:
    """The numbers of the strips. `strategies` are those of all schedules, in the order of first appearance;
    `budget` is the one that all share, None when they differ or one has none.
    """

    strips: tuple[Strip, ...]
    strategies: tuple[Strategy, ...]
    budget: float | None


def plot_schedules(schedules: Mapping[str, Schedule]) -> go.Figure:
    """One strip of strategies for each named schedule, all over the fraction of its own budget.

    A strategy has one colour in all strips; a mixture is shown as stacked shares of the steps. Raises
    UsageError when there is no schedule.
    """
    return _schedules_figure(_schedules_info(schedules))


def _schedules_info(schedules: Mapping[str, Schedule]) -> SchedulesInfo:
    if not schedules:
        raise UsageError("there is no schedule to draw; give at least one")
    budgets = {schedule.budget for schedule in schedules.values()}
    return SchedulesInfo(
        strips=tuple(Strip(name, _note(schedule), strategy_blocks(schedule)) for name, schedule in schedules.items()),
        strategies=tuple(dict.fromkeys(s for schedule in schedules.values() for s in schedule.strategies)),
        budget=budgets.pop() if len(budgets) == 1 else None,
    )


def _note(schedule: Schedule) -> str:
    said = [f"{format_count(schedule.budget)} units"] if schedule.budget else []
    said += [f"{number(schedule.cost)} per sample"]
    said += [f"{format_count(schedule.total_samples)} samples"] if schedule.budget else []
    return ", ".join(said)


def _label(strip: Strip) -> str:
    note = f"<span style='font-size:12px;color:{_theme.MUTED}'>{wrapped(strip.note)}</span>"
    return f"<b>{wrapped(strip.name, 42)}</b><br>{note}"


def _schedules_figure(info: SchedulesInfo) -> go.Figure:
    import plotly.graph_objects as go

    labels = [_label(strip) for strip in info.strips]
    rooms = [_GAP + _LABEL_LINE * _theme.title_lines(label) for label in labels]
    plot = sum(rooms) + _STRIP * len(labels)
    title = _theme.title_text("Schedules")
    columns = 2 if max(len(strategy_text(s)) for s in info.strategies) <= _SHORT else 1
    top, bottom = 46, AXIS + _theme.legend_height(len(info.strategies), columns=columns)
    figure = go.Figure()
    shown: set[Strategy] = set()
    for i, strip in enumerate(info.strips):
        for strategy, blocks in strip.blocks.items():
            trace = bars(info.strategies.index(strategy), strategy, blocks)
            trace.update(yaxis=f"y{i + 1}" if i else "y", legendgroup=str(strategy), showlegend=strategy not in shown)
            shown.add(strategy)
            figure.add_trace(trace)
        high = 1 - (sum(rooms[: i + 1]) + _STRIP * i) / plot
        axis = {
            "domain": [max(high - _STRIP / plot, 0), high],
            "range": [0, 1],
            "anchor": "x",
            "showgrid": False,
            "tickvals": [0, 0.5, 1] if strip.mixed else [],
            "tickformat": ".0%",
            "tickfont": {"size": 10},
        }
        figure.update_layout({f"yaxis{i + 1}" if i else "yaxis": axis})
        figure.add_annotation(
            text=labels[i],
            font={"size": 13},
            align="left",
            showarrow=False,
            **{"xref": "paper", "x": 0, "xanchor": "left", "xshift": -2},
            **{"yref": "paper", "y": high, "yanchor": "bottom", "yshift": 3},
        )
    figure.update_layout(**layout(title=title, top=top, plot=plot, bottom=bottom))
    legend_columns = {"entrywidth": 1 / columns, "entrywidthmode": "fraction"}  # those that room was left for
    figure.update_layout(
        margin_l=38 if any(strip.mixed for strip in info.strips) else 18,  # room for the shares, or for "0%"
        legend={**legend_columns, "font": {"size": 11}},
    )
    last = f"y{len(labels)}" if len(labels) > 1 else "y"
    figure.update_xaxes(**fraction_axis(info.budget), anchor=last, title_text=budget_title(info.budget))
    return figure
