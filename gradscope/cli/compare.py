"""`gradscope compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.cli.console import Json, emit, note, table

if TYPE_CHECKING:
    from schedulers import Comparison, Schedule, Stage

LISTED = 3  # strategies of a mixture that a table names


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Further")(compare)


def compare(
    a: Annotated[Path, typer.Argument(help="A schedule file.")],
    b: Annotated[Path, typer.Argument(help="Another schedule file.")],
    as_json: Json = False,
) -> None:
    """Two schedules side by side: where they run the same, and what each one's budget pays for.

    gradscope compare a.json b.json
    """
    from schedulers import compare_schedules, load_schedule

    plans = [load_schedule(path) for path in (a, b)]
    found = compare_schedules(*plans)
    if plans[0].cost_model != plans[1].cost_model:
        note(f"note: {a} counts costs by {plans[0].cost_model}, {b} by {plans[1].cost_model}; they are not one unit")
    rows = [
        [
            f"{segment.start:.2f}-{segment.end:.2f}",
            mixture_text(segment.a),
            mixture_text(segment.b),
            f"{segment.a.cost:.3f}",
            f"{segment.b.cost:.3f}",
            "yes" if segment.same else "no",
        ]
        for segment in found.segments
    ]
    lines = [*table(["fraction", "a", "b", "cost a", "cost b", "same"], rows), _summary(found, *plans)]
    emit(_facts(found), lines, as_json=as_json)


def mixture_text(stage: Stage) -> str:
    """`patch=7,dropout=0`, or `70% patch=7,dropout=0 + 30% ...` with the largest shares first."""
    entries = sorted(((s, w) for s, w in stage.mixture if w > 0), key=lambda entry: -entry[1])
    if len(entries) == 1:
        return str(entries[0][0])
    shown = [f"{100 * weight:.3g}% {strategy}" for strategy, weight in entries[:LISTED]]
    return " + ".join(shown) + (f" + {len(entries) - LISTED} more" if len(entries) > LISTED else "")


def _summary(found: Comparison, a: Schedule, b: Schedule) -> str:
    from schedulers import format_count

    def side(name: str, plan: Schedule, cost: float, samples: float | None) -> str:
        if samples is None or plan.budget is None:
            return f"{name} {cost:.3f} units per sample (no budget)"
        return (
            f"{name} {cost:.3f} units per sample, {format_count(samples)} samples for {format_count(plan.budget)} units"
        )

    ratio = ""
    if found.samples_a is not None and found.samples_b is not None:
        ratio = f"; b sees {found.samples_b / found.samples_a:.2f} x as many samples"
    return (
        f"the same in {found.same_share:.1%} of the budget; {side('a', a, found.cost_a, found.samples_a)}; "
        f"{side('b', b, found.cost_b, found.samples_b)}{ratio}"
    )


def _facts(found: Comparison) -> dict[str, Any]:
    return {
        "segments": [
            {
                "start": segment.start,
                "end": segment.end,
                "a": _stage_facts(segment.a),
                "b": _stage_facts(segment.b),
                "same": segment.same,
            }
            for segment in found.segments
        ],
        "same_share": found.same_share,
        "cost": {"a": found.cost_a, "b": found.cost_b, "difference": found.cost_difference},
        "samples": {"a": found.samples_a, "b": found.samples_b, "difference": found.samples_difference},
    }


def _stage_facts(stage: Stage) -> dict[str, Any]:
    mixture = [{"strategy": dict(strategy), "weight": weight} for strategy, weight in stage.mixture]
    return {"mixture": mixture, "cost": stage.cost}
