"""What figures of one schedule and of several share: strategies as blocks over the budget, and their looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradscope.plots import _theme
from gradscope.plots._theme import number, plain, strategy_text, with_error
from schedulers.counts import format_count
from schedulers.strategy import Strategy

if TYPE_CHECKING:
    from schedulers.schedule import Schedule, Stage

AXIS = 66  # pixels for the labels and the title of the axis of the budget


@dataclass(frozen=True)
class Block:
    """One strategy within one stage: `share` is its probability per step, `base` what lies beneath it."""

    start: float
    end: float
    base: float
    share: float
    hover: str


def strategy_blocks(schedule: Schedule) -> dict[Strategy, tuple[Block, ...]]:
    """Each strategy's parts, in the order of first appearance; a mixture is stacked in that order."""
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
    return {strategy: tuple(parts) for strategy, parts in blocks.items()}


def _hover(schedule: Schedule, stage: Stage, strategy: Strategy, share: float) -> str:
    lines = [f"<b>{plain(strategy_text(strategy))}</b>" + (f", {share:.0%} of the steps" if share < 1 else "")]
    span = f"{stage.start:.1%} to {stage.end:.1%} of the budget"
    if schedule.budget:
        units = [format_count(edge * schedule.budget) for edge in (stage.start, stage.end)]
        lines += [span, f"units {units[0]} to {units[1]}", f"{format_count(schedule.stage_samples(stage))} samples"]
    else:
        lines.append(span)
    lines.append(f"cost: {number(stage.cost)} units per sample ({plain(schedule.cost_model)})")
    if stage.score is not None:
        error = float("nan") if stage.score_se is None else stage.score_se
        lines.append(f"{plain(schedule.criterion or 'score')}: {with_error(stage.score, error)}")
    return "<br>".join([*lines, *_predictions(stage)])


def _predictions(stage: Stage) -> list[str]:
    """Lines on the training progress at the stage's edges, and on how sure the choice of its main strategy is."""
    lines = []
    if stage.progress is not None:
        lines.append(f"predicted progress {number(stage.progress[0])} to {number(stage.progress[1])}")
    if stage.probability is not None:
        subject = "" if stage.pure else f"{plain(strategy_text(stage.strategy))} is "
        lines.append(f"{subject}the best with probability {stage.probability:.0%}")
    if stage.rival is not None:
        lines.append(f"otherwise most often {plain(strategy_text(stage.rival))}")
    if stage.regret is not None:
        lines.append(f"shortfall of the score then {stage.regret:.1%}")
    return lines


def bars(i: int, strategy: Strategy, blocks: Sequence[Block]) -> Any:
    """A bar trace of one strategy's blocks, in the `i`-th colour and, past the colours, pattern."""
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
            "line": {"width": [1.5 if block.share > 0.1 else 0.0 for block in blocks], "color": "white"},
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


def fraction_axis(budget: float | None) -> dict[str, Any]:
    """Layout of the axis of the spent fraction, with the units beneath the percentages where the budget is known."""
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    under = [f"<br>{format_count(t * budget) if t else 0}" if budget else "" for t in ticks]
    return {
        "range": [0, 1],
        "tickvals": ticks,
        "ticktext": [f"{t:.0%}{u}" for t, u in zip(ticks, under, strict=True)],
        "showgrid": False,
    }


def budget_title(budget: float | None) -> str:
    """Title of that axis."""
    return "budget spent" + (f" (of {format_count(budget)} units)" if budget else "")


def layout(*, title: str, top: int, plot: int, bottom: int) -> dict[str, Any]:
    """Layout of a figure of strips: pixels above, of, and below the plots; the legend starts AXIS below them."""
    return {
        "template": _theme.template(),
        "title": {"text": title},
        "height": top + plot + bottom,
        "margin": {"l": 64, "r": 24, "t": top, "b": bottom},
        "barmode": "overlay",
        "bargap": 0,
        "uniformtext": {"minsize": 10, "mode": "hide"},
        "legend": {"y": (bottom - AXIS) / (top + plot + bottom), "traceorder": "normal"},
        "hovermode": "closest",
    }
