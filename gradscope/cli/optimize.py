"""`gradscope optimize`."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.cli.console import Json, complete, emit, parse_units, table

if TYPE_CHECKING:
    import xarray as xr

    from schedulers import Profile, Schedule

_BUDGET_FORM = "N[K|M|B]"


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="The loop")(optimize)


def optimize(
    cube: Annotated[Path, typer.Argument(help="The cube to optimize over.", envvar="GRADSCOPE_CUBE")] = Path("cube.nc"),
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            "-b",
            parser=parse_units,
            metavar=_BUDGET_FORM,
            help="Budget in units (a unit is one forward pass of a full-length sequence), as 300K or 100M.",
            envvar="GRADSCOPE_BUDGET",
        ),
    ] = None,
    target_progress: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: the smallest one that reaches this (1: the profiled run's end)."),
    ] = None,
    match_reference: Annotated[
        float | None,
        typer.Option(
            parser=parse_units,
            metavar=_BUDGET_FORM,
            help="Instead of a budget: the smallest one that gets as far as this many units without acceleration.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The schedule file.")] = Path("schedule.json"),
    progress: Annotated[
        str | None,
        typer.Option(
            help="trajectory: training moves at the speed that strategies earn, so the budget matters; fraction (the "
            "paper's): it stands at the spent fraction of the budget. Default: trajectory where the cube knows the "
            "profiled run's budget.",
            metavar="trajectory|fraction",
        ),
    ] = None,
    profiled_budget: Annotated[
        float | None,
        typer.Option(
            parser=parse_units,
            metavar=_BUDGET_FORM,
            help="Units of the profiled run, where the cube does not know them (own tasks without `training`).",
        ),
    ] = None,
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
    max_hours: Annotated[
        float | None, typer.Option(help="Longest training time, by seconds that `gradscope cost` measured.")
    ] = None,
    max_memory: Annotated[
        float | None, typer.Option(help="Largest activation memory in MB per sample, as `gradscope cost` measured it.")
    ] = None,
    exploration: Annotated[float, typer.Option(help="Share of steps spread evenly over all allowed strategies.")] = 0.0,
    slices: Annotated[int, typer.Option(help="Parts of the budget.")] = 100,
    draws: Annotated[
        int, typer.Option(help="Draws of the bootstrap that says how sure the choices are; 0: none.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """The best schedule under a budget, by exact dynamic programming over the measured cube.

    gradscope optimize --budget 100M
    """
    from gradscope.cube import grid_of, open_cube, profile_of
    from gradscope.errors import UsageError
    from schedulers import Constraints, reference_progress, save_schedule, smallest_budget
    from schedulers import optimize as solve

    asked = {"--budget": budget, "--target-progress": target_progress, "--match-reference": match_reference}
    if sum(value is not None for value in asked.values()) != 1:
        raise UsageError(f"give one of {', '.join(asked)}: the budget to spend, or what the smallest one is to reach")
    if draws < 0:
        raise UsageError(f"--draws {draws}: at least 0")
    dataset = open_cube(cube).dataset
    reference = grid_of(dataset).reference
    constraints = Constraints(
        allowed=tuple(complete(text, reference) for text in allow) if allow else None,
        monotone=tuple(monotone or ()),
        max_switches=max_switches,
        min_dwell=min_dwell,
        final_reference=final_reference,
        max_seconds=None if max_hours is None else max_hours * 3600,
        max_memory=None if max_memory is None else max_memory * 1e6,
    )
    profile = profile_of(dataset, metric=metric, cost_model=cost_model)
    if profiled_budget is not None:
        profile = replace(profile, reference_budget=profiled_budget)
    if profile.covariance is None and profile.influence is None:
        draws = 0
    given: dict[str, Any] = {
        "criterion": criterion, "constraints": constraints, "slices": slices, "exploration": exploration,
        "draws": draws, "seed": seed,
    }  # fmt: skip
    if budget is not None:
        plan = solve(profile, budget, progress=progress, **given)
    elif progress == "fraction":
        raise UsageError("--progress fraction has no smallest budget: its schedule is the same for all of them")
    else:
        target = target_progress or reference_progress(profile, match_reference or 0.0, criterion=criterion)
        plan = smallest_budget(profile, target, **given)
    save_schedule(plan, out)
    command, units = more_samples(dataset, cube, plan, profile)
    emit(
        {**json.loads(plan.to_json()), "more_samples_command": command, "more_samples_units": units},
        _lines(profile, plan, out, (command, units), chosen=progress),
        as_json=as_json,
    )


def more_samples(cube: xr.Dataset, path: Path, plan: Schedule, profile: Profile) -> tuple[str, float]:
    """The `gradscope profile` command that measures the cells which leave stages open, into `path`, and its units.

    "" and 0 when none do.
    """
    from gradscope.cube import grid_of
    from schedulers import Strategy

    wishes = plan.predicted.get("more_samples", [])
    if not wishes:
        return "", 0.0
    grid, samples = grid_of(cube), 0
    for wish in wishes:
        have = int(cube["n_samples"].values[(wish["checkpoint"], *grid.position(Strategy(wish["strategy"])))])
        samples = max(samples, have * wish["times"])
    only = dict.fromkeys(str(Strategy(wish["strategy"])) for wish in wishes)
    parts = shlex.split(str(cube.attrs.get("profile_command") or "gradscope profile CKPT_DIR"))
    if "--out" in parts:  # where it was written first; this is the file that was read
        at = parts.index("--out")
        del parts[at : at + 2]
    parts += [] if str(path) == "cube.nc" else ["--out", str(path)]
    parts += ["--checkpoints", ",".join(str(t) for t in sorted({wish["checkpoint"] for wish in wishes}))]
    parts += [word for text in only for word in ("--only", text)]
    names = profile.grid.strategies()
    chosen = {names.index(Strategy.parse(text)) for text in only} | {profile.reference_index}
    units = len({wish["checkpoint"] for wish in wishes}) * samples * float(profile.cost[sorted(chosen)].sum())
    return shlex.join([*parts, "--samples", str(samples)]), units


def _lines(profile: Profile, plan: Schedule, out: Path, wish: tuple[str, float], *, chosen: str | None) -> list[str]:
    from schedulers import format_count

    budget, predicted = plan.budget or 0.0, plan.predicted
    trajectory = plan.progress_mode == "trajectory"
    why = "" if chosen else " (the profiled run's budget is known)" if trajectory else (
        " (the cube does not know the profiled run's budget: give it with --profiled-budget)"
    )  # fmt: skip
    lines = [
        f"budget {format_count(budget)} = {budget:,.0f} units; criterion {plan.criterion} in the {plan.metric} "
        f"metric; costs {plan.cost_model}",
        f"progress by {'trajectory' if trajectory else 'fraction of the budget'}{why}",
        *_stage_table(plan),
        f"{plan.total_samples:,.0f} samples, {plan.total_samples * profile.reference_cost / budget:.1f} x as many as "
        f"without acceleration -> {out}",
    ]
    if trajectory:
        lines += _trajectory_lines(plan)
    elif predicted.get("score_reference") is not None:
        lines.append(
            f"mean {plan.criterion} {predicted['score']:.3g}; without acceleration {predicted['score_reference']:.3g}"
        )
    if "seconds" in predicted:
        lines.append(
            f"about {_duration(predicted['seconds'])} of training at the measured speed (without data loading)"
        )
    if not predicted.get("exact", True):
        lines.append("within the limit of time the best schedule is found up to a small part of a percent, not exactly")
    return [*lines, *_doubt_lines(plan, *wish)]


def _stage_table(plan: Schedule) -> list[str]:
    trajectory = plan.progress_mode == "trajectory"
    sure = any(stage.probability is not None for stage in plan.stages)
    header = [
        "strategy",
        "fraction",
        *(["progress"] if trajectory else []),
        "cost",
        "samples",
        str(plan.criterion),
        "+-",
    ]
    header += ["best", "else by", "rival"] if sure else []
    rows = []
    for stage in plan.stages:
        explores = "" if stage.pure else " + exploration"
        row = [f"{stage.strategy}{explores}", f"{stage.start:.2f}-{stage.end:.2f}"]
        if trajectory:
            row.append("" if stage.progress is None else f"{stage.progress[0]:.3f}-{stage.progress[1]:.3f}")
        row += [
            f"{stage.cost:.3f}",
            f"{plan.stage_samples(stage):,.0f}",
            "" if stage.score is None else f"{stage.score:.3g}",
            "" if stage.score_se is None else f"{stage.score_se:.1g}",
        ]
        if sure:
            rival = "" if stage.rival is None else str(stage.rival)
            row.append("" if stage.probability is None else f"{stage.probability:.0%}")
            row += ["" if stage.regret is None or not rival else f"{stage.regret:.1%}", rival]
        rows.append(row)
    return table(header, rows)


def _trajectory_lines(plan: Schedule) -> list[str]:
    from schedulers import format_count

    predicted = plan.predicted
    line = f"predicted progress {predicted['progress']:.3f}; without acceleration {predicted['progress_reference']:.3f}"
    if predicted["speed_up"] is not None:
        line += (
            f", which would need {format_count(predicted['reference_budget'])} units to get as far: "
            f"{predicted['speed_up']:.2f} x"
        )
    lines = [line]
    if predicted["reference_budget"] is None and predicted["progress"] > predicted["progress_reference"]:
        lines.append("without acceleration training would never get as far, by these measurements")
    if predicted["beyond_profile"]:
        lines.append(
            f"this goes beyond the profiled run ({format_count(predicted['profiled_budget'])} units): past its end the "
            "last checkpoint's measurements are held; profile a longer run to know better"
        )
    if predicted["stuck"]:
        lines.append("the schedule ends where no allowed strategy is measured to make progress")
    return lines


def _doubt_lines(plan: Schedule, command: str, units: float) -> list[str]:
    from schedulers import format_count

    if not any(stage.probability is not None for stage in plan.stages):
        return []
    lines = [
        "best: how probable it is that the strategy is the best there; else by: how much it falls short if it is not"
    ]
    if "regret" in plan.predicted:
        what = "progress" if plan.progress_mode == "trajectory" else "mean score"
        lines.append(
            f"a schedule from perfect measurements is expected to be {plan.predicted['regret']:.1%} better ({what})"
        )
    if command:
        lines += [f"cells worth more samples (about {format_count(units)} units):", f"  {command}"]
    return lines


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
