"""`gradscope optimize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gradscope.cli.console import Budget, Json, complete, emit, table


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="The loop")(optimize)


def optimize(
    budget: Budget,
    cube: Annotated[Path, typer.Argument(help="The cube to optimize over.", envvar="GRADSCOPE_CUBE")] = Path("cube.nc"),
    out: Annotated[Path, typer.Option("--out", "-o", help="The schedule file.")] = Path("schedule.json"),
    criterion: Annotated[
        str, typer.Option(help="descent, descent-batch or ca-mse (the paper's).", envvar="GRADSCOPE_CRITERION")
    ] = "descent",
    metric: Annotated[
        str,
        typer.Option(help="optimizer (Adam's preconditioner) or euclidean (the paper's).", envvar="GRADSCOPE_METRIC"),
    ] = "optimizer",
    cost_model: Annotated[str, typer.Option(help="tokens, paper or measured.")] = "tokens",
    allow: Annotated[
        list[str] | None, typer.Option(help="Only these strategies (patch=4,dropout=0.5); repeatable.")
    ] = None,
    monotone: Annotated[
        list[str] | None,
        typer.Option(help="Axis along which strategies only move towards the reference, or 'cost'; repeatable."),
    ] = None,
    max_switches: Annotated[int | None, typer.Option(help="Largest number of changes of strategy.")] = None,
    min_dwell: Annotated[float, typer.Option(help="Shortest stage, as a fraction of the budget.")] = 0.0,
    final_reference: Annotated[
        float, typer.Option(help="Last fraction of the budget that must run the reference.")
    ] = 0.0,
    exploration: Annotated[float, typer.Option(help="Share of steps spread evenly over all allowed strategies.")] = 0.0,
    slices: Annotated[int, typer.Option(help="Parts of the budget.")] = 100,
    as_json: Json = False,
) -> None:
    """The best schedule under a budget, by exact dynamic programming over the measured cube.

    gradscope optimize --budget 100M
    """
    from gradscope.cube import grid_of, open_cube, profile_of
    from schedulers import Constraints, format_count, save_schedule, undecided_share
    from schedulers import optimize as solve

    dataset = open_cube(cube).dataset
    reference = grid_of(dataset).reference
    constraints = Constraints(
        allowed=tuple(complete(text, reference) for text in allow) if allow else None,
        monotone=tuple(monotone or ()),
        max_switches=max_switches,
        min_dwell=min_dwell,
        final_reference=final_reference,
    )
    profile = profile_of(dataset, metric=metric, cost_model=cost_model)
    plan = solve(profile, budget, criterion=criterion, constraints=constraints, slices=slices, exploration=exploration)
    save_schedule(plan, out)
    rows = []
    for stage in plan.stages:
        score = "" if stage.score is None else f"{stage.score:.3g}"
        error = "" if stage.score_se is None else f"{stage.score_se:.1g}"
        rows.append(
            [
                str(stage.strategy),
                f"{stage.start:.2f}-{stage.end:.2f}",
                f"{stage.cost:.3f}",
                f"{plan.samples(stage):,.0f}",
                score,
                error,
            ]
        )
    reference_samples = budget / profile.reference_cost
    lines = [
        f"budget {format_count(budget)} = {budget:,.0f} units; criterion {criterion} in the {metric} "
        f"metric; costs {cost_model}; progress by fraction of the budget",
        *table(["strategy", "fraction", "cost", "samples", criterion, "+-"], rows),
        f"{plan.total_samples:,.0f} samples, {plan.total_samples / reference_samples:.1f} x as many as "
        f"without acceleration -> {out}",
    ]
    undecided = undecided_share(profile, plan, criterion)
    if undecided:
        lines.append(
            f"in {undecided:.0%} of the budget another strategy is within two standard errors of the one chosen; "
            "`gradscope profile` with more --samples tells them apart"
        )
    emit(json.loads(plan.to_json()), lines, as_json=as_json)
