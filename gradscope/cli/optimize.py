"""`gradscope optimize`."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.cli.console import Json, complete, emit, parse_units, table

if TYPE_CHECKING:
    import xarray as xr

    from schedulers import Profile, Schedule
    from schedulers.errors import Change, InfeasibleError

_BUDGET_FORM = "N[K|M|B]"


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="The loop")(optimize)


def optimize(
    context: typer.Context,
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
            help="Units (of the chosen cost model) of the profiled run, where the cube does not know them.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Batch of the training that the schedule is for; default: that of the profile (K)."),
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
        list[str] | None,
        typer.Option(help="Only these strategies (patch=4,dropout=0.5; left-out axes as the reference); repeatable."),
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
        float | None,
        typer.Option(
            help="Most MB of activations that a sample keeps for its backward pass, as `gradscope cost` measured."
        ),
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
    import numpy as np

    from gradscope.cube import grid_of, open_cube, profile_of
    from gradscope.errors import InfeasibleError, UsageError
    from schedulers import Constraints, reference_progress, save_schedule, smallest_budget
    from schedulers import optimize as solve

    if target_progress is not None or match_reference is not None:
        source = context.get_parameter_source("budget")
        budget = budget if source is not None and source.name == "COMMANDLINE" else None  # a flag wins over a default
    asked = {"--budget": budget, "--target-progress": target_progress, "--match-reference": match_reference}
    if sum(value is not None for value in asked.values()) != 1:
        raise UsageError(f"give one of {', '.join(asked)}: the budget to spend, or what the smallest one is to reach")
    for name, value in (("--draws", draws), ("--seed", seed)):
        if value < 0:
            raise UsageError(f"{name} {value}: at least 0")
    for name, limit in (("--max-hours", max_hours), ("--max-memory", max_memory)):
        if limit is not None and not limit > 0:
            raise UsageError(f"{name} {limit:g}: a positive number of {'hours' if name == '--max-hours' else 'MB'}")
    dataset = open_cube(cube).dataset
    reference = grid_of(dataset).reference
    constraints = Constraints(
        allowed=tuple(complete("--allow", text, reference) for text in allow) if allow else None,
        monotone=tuple(monotone or ()),
        max_switches=max_switches,
        min_dwell=min_dwell,
        final_reference=final_reference,
        max_seconds=None if max_hours is None else max_hours * 3600,
        max_memory=None if max_memory is None else max_memory * 1e6,
    )
    profile = profile_of(dataset, metric=metric, cost_model=cost_model)
    if batch_size is not None:
        profile = profile.for_batch(batch_size)
    if profiled_budget is not None:
        profile = replace(profile, reference_budget=profiled_budget)
    if profile.influence is None and not np.isfinite(np.asarray(profile.covariance, float)).any():
        draws = 0
    given: dict[str, Any] = {
        "criterion": criterion, "constraints": constraints, "slices": slices, "exploration": exploration,
        "draws": draws, "seed": seed,
    }  # fmt: skip
    try:
        if budget is not None:
            plan = solve(profile, budget, progress=progress, **given)
        elif progress == "fraction":
            raise UsageError("--progress fraction has no smallest budget: its schedule is the same for all of them")
        else:
            target = target_progress or reference_progress(profile, match_reference or 0.0, criterion=criterion)
            plan = smallest_budget(profile, target, **given)
    except InfeasibleError as error:
        raise _in_options(error) from None
    save_schedule(plan, out)
    wishes = more_samples(dataset, cube, plan, profile)
    emit(
        {
            **json.loads(plan.to_json()),
            "more_samples": [{"command": wish.command, "units": wish.units} for wish in wishes],
        },
        _lines(profile, plan, out, wishes, chosen=progress),
        as_json=as_json,
    )


FEW_STEPS = 50  # below which a budget is more likely a slip of the pen than a training run


@dataclass(frozen=True)
class Wish:
    """A command that measures cells which leave stages open, and the units that it spends."""

    command: str
    units: float


def more_samples(cube: xr.Dataset, path: Path, plan: Schedule, profile: Profile) -> list[Wish]:
    """The `gradscope profile` commands that measure the cells which leave stages open, into `path`; [] when none do.

    One command for all checkpoints at which the same strategies get the same number of samples. [] for a cube that an
    online run measured on its way: there are no checkpoints to go back to.
    """
    from gradscope.cube import grid_of
    from schedulers import Strategy

    if cube.attrs.get("source") == "gradscope online":
        return []
    grid, wanted = grid_of(cube), dict[int, dict[str, int]]()
    for wish in plan.predicted.get("more_samples", []):
        strategy, t = Strategy(wish["strategy"]), int(wish["checkpoint"])
        have = int(cube["n_samples"].values[(t, *grid.position(strategy))])
        wanted.setdefault(t, {})[str(strategy)] = have * wish["times"]
    groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for t, cells in sorted(wanted.items()):
        groups.setdefault((tuple(cells), max(cells.values())), []).append(t)
    names, found = profile.grid.strategies(), []
    for (only, samples), checkpoints in groups.items():
        parts = [*_profile_command(cube, path), "--checkpoints", ",".join(map(str, checkpoints))]
        parts += [word for text in only for word in ("--only", text)]
        chosen = sorted({names.index(Strategy.parse(text)) for text in only} | {profile.reference_index})
        units = len(checkpoints) * samples * float(profile.cost[chosen].sum())
        found.append(Wish(shlex.join([*parts, "--samples", str(samples)]), units))
    return sorted(found, key=lambda wish: wish.units)


def _profile_command(cube: xr.Dataset, path: Path) -> list[str]:
    """The words of the command that made the cube, writing to `path`, its folder found from here or beside the cube."""
    parts = shlex.split(str(cube.attrs.get("profile_command") or "gradscope profile CKPT_DIR"))
    if "--out" in parts:  # where it was written first; `path` is the file that was read
        at = parts.index("--out")
        del parts[at : at + 2]
    beside = path.parent / parts[2]
    if not Path(parts[2]).is_dir() and beside.is_dir():
        parts[2] = str(beside)
    return parts + ([] if str(path) == "cube.nc" else ["--out", str(path)])


def _in_options(error: InfeasibleError) -> InfeasibleError:
    """The error with its changes in the command's options and units."""
    from schedulers.errors import InfeasibleError

    if not error.changes:
        return error
    changes = " or ".join(map(_option, error.changes))
    head = re.sub(r"max_seconds=([0-9.,e+-]+)", _hours, str(error).partition("; ")[0])
    for name, option in (("allowed", "--allow"), ("max_seconds", "--max-hours"), ("monotone=", "--monotone ")):
        head = head.replace(name, option)
    head = re.sub(r"\b(max_switches|min_dwell|final_reference|max_memory)\b", lambda m: _flag(m[1]), head)
    return InfeasibleError(f"{head}; what is enough: {changes}", error.smallest, error.changes)


def _hours(found: re.Match[str]) -> str:
    return f"{float(found[1].replace(',', '')) / 3600:.4g} hours"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option(change: Change) -> str:
    name, value = change.name, change.value
    if name.startswith("monotone="):
        return f"no --monotone {name.removeprefix('monotone=')}"
    scale = {"max_seconds": 3600.0, "max_memory": 1e6}.get(name)
    option = {"allowed": "--allow", "max_seconds": "--max-hours"}.get(name, _flag(name))
    if value is None:
        return f"no {option}"
    if isinstance(value, str):
        return f"{option} {value} as well"
    if scale is not None:  # rounded up
        digits = 10.0 ** (math.floor(math.log10(value / scale)) - 3)
        value = math.ceil(value / scale / digits - 1e-9) * digits
    lower = "" if change.budget is None else f" (or --budget {change.budget:.15g})"
    unit = " (MB per sample)" if name == "max_memory" else ""
    return f"{option} {value:.10g}{unit}{lower}"


def _lines(profile: Profile, plan: Schedule, out: Path, wishes: Sequence[Wish], *, chosen: str | None) -> list[str]:
    from gradscope.pilot import pilot_note
    from schedulers import format_count

    budget, predicted = plan.budget or 0.0, plan.predicted
    trajectory = plan.progress_mode == "trajectory"
    why = "" if chosen else " (the profiled run's budget is known)"
    if not chosen and not trajectory:
        why = " (the cube does not know the profiled run's budget: give it with --profiled-budget)"
        if profile.reference_budget is not None:
            why = " (the profiled run's own score is nowhere above 0, so relative speeds are lost in noise)"
    lines = [
        f"budget {format_count(budget)} = {budget:,.0f} units; criterion {plan.criterion} in the {plan.metric} "
        f"metric; costs {plan.cost_model}; batch {plan.batch_size}",
        f"progress by {'trajectory' if trajectory else 'fraction of the budget'}{why}",
        *([said] if (said := pilot_note(profile)) else []),
        *([f"allowed: {'; '.join(allowed)}"] if (allowed := plan.constraints.get("allowed")) else []),
        *_stage_table(plan),
        f"{plan.total_samples:,.0f} samples, {plan.total_samples * profile.reference_cost / budget:.1f} x as many as "
        f"without acceleration -> {out}",
    ]
    if plan.batch_size and (steps := plan.total_samples / plan.batch_size) < FEW_STEPS:
        lines.append(
            f"about {steps:.0f} steps of {plan.batch_size} samples: too few to train with; a unit is one forward pass "
            "of one sequence"
        )
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
    return [*lines, *_doubt_lines(plan, profile, wishes)]


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
    if predicted["progress_reference"] is None:
        line = f"predicted progress {_progress(predicted)}; without acceleration: not known, it was not measured"
    else:
        line = f"predicted progress {_progress(predicted)}; without acceleration "
        line += f"{predicted['progress_reference']:.3f}"
    if predicted["speed_up"] is not None:
        line += (
            f", which would need {format_count(predicted['reference_budget'])} units to get as far: "
            f"{predicted['speed_up']:.2f} x"
        )
    lines = [line]
    alone = predicted["progress_reference"]
    if predicted["reference_budget"] is None and alone is not None and predicted["progress"] > alone:
        lines.append("without acceleration training would never get as far, by these measurements")
    if predicted["beyond_profile"]:
        lines.append(
            f"this goes beyond the profiled run ({format_count(predicted['profiled_budget'])} units): past its end the "
            "last checkpoint's measurements are held; profile a longer run to know better"
        )
    if predicted["stuck"]:
        lines.append("the schedule ends where no allowed strategy is measured to make progress")
    if predicted.get("not_explored"):
        left_out = ", ".join(",".join(f"{k}={v}" for k, v in entry.items()) for entry in predicted["not_explored"])
        lines.append(f"not explored, since not measured at every checkpoint: {left_out}")
    return lines


def _progress(predicted: dict[str, Any]) -> str:
    from gradscope.plots._theme import with_error

    if "progress_se" not in predicted:
        return f"{predicted['progress']:.3f}"
    return with_error(predicted["progress"], predicted["progress_se"]).replace("±", "+-")


def _doubt_lines(plan: Schedule, profile: Profile, wishes: Sequence[Wish]) -> list[str]:
    from schedulers import format_count

    if not any(stage.probability is not None for stage in plan.stages):
        return []
    lines = [
        "best: how probable it is that the strategy is the best there; else by: how much it falls short if it is not"
    ]
    if profile.influence is None:
        lines.append(
            "the cube does not keep what cells share (an older version made it, or some gradients are too large or "
            "small for it): their errors count as independent, which overstates doubt; profile again to know better"
        )
    regret = plan.predicted.get("regret", 0.0)
    what = "progress" if plan.progress_mode == "trajectory" else "mean score"
    lines.append(
        f"a schedule from perfect measurements is expected to be {regret:.1%} better ({what}, same constraints)"
    )
    if plan.predicted.get("more_samples") and not wishes:
        lines.append(
            "the cube is of an online run, whose probes cannot be repeated: to know better, profile the checkpoints of "
            "that run (gradscope profile CKPT_DIR) or give the next one a larger overhead"
        )
    worth = regret * (plan.budget or 0.0)
    paying = [wish for wish in wishes if wish.units <= worth]
    if paying:
        lines.append(f"cells worth more samples (the doubt is worth about {format_count(worth)} units of this budget):")
    elif wishes:
        lines.append(
            f"more samples would cost more (from {format_count(min(w.units for w in wishes))} units) than the doubt is "
            f"worth at this budget (about {format_count(worth)}); --json has the commands"
        )
    for wish in paying:
        lines += [f"  {wish.command}", f"    about {format_count(wish.units)} units"]
    if any("CKPT_DIR" in wish.command for wish in paying):
        lines.append("  (CKPT_DIR: the folder of the checkpoints)")
    return lines


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
