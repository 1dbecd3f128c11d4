"""`gradscope profile` and `gradscope merge`; which task a folder of checkpoints gets."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gradscope.cli.show as show
from gradscope.cli.console import (
    DataFolder,
    Device,
    Json,
    Quiet,
    Seed,
    complete,
    emit,
    note,
    open_device,
    override_grid,
)

if TYPE_CHECKING:
    import torch

    from gradscope.task import Task

FOREIGN = "Checkpoints of other code bases"
Cube = Annotated[Path, typer.Argument(help="A cube file.", envvar="GRADSCOPE_CUBE")]


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="The loop")(profile)
    app.command(rich_help_panel="Further")(merge)
    show.register(app)


def profile(
    ckpt_dir: Annotated[Path, typer.Argument(help="Folder with the checkpoints of one run.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The cube file.", envvar="GRADSCOPE_CUBE")] = Path("cube.nc"),
    task: Annotated[
        str | None,
        typer.Option(
            help="Your own task, as my_module:MyTask; default: the method the checkpoints name.",
            envvar="GRADSCOPE_TASK",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Most samples per cell; default 8,192 (16 sub-batches with a fixed allocation).",
            envvar="GRADSCOPE_SAMPLES",
        ),
    ] = None,
    samples_per_cell: Annotated[
        str,
        typer.Option(
            help="racing: more for the cells that a decision hangs on; fixed: the same for all.",
            metavar="racing|fixed",
        ),
    ] = "racing",
    criterion: Annotated[str, typer.Option(help="What racing decides by: descent, ca-mse, descent-batch.")] = "descent",
    metric: Annotated[
        str | None, typer.Option(help="In which metric: optimizer or euclidean; default: optimizer.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Advantages below this share of the best score are not worth samples.")
    ] = 0.05,
    estimator: Annotated[
        str,
        typer.Option(
            help="Engine: auto, subbatch, per-sample, per-sample-fast.",
            metavar="auto|subbatch|per-sample|per-sample-fast",
            envvar="GRADSCOPE_ESTIMATOR",
        ),
    ] = "auto",
    precision: Annotated[
        str, typer.Option(help="Of the forward and backward passes: float32 or bf16 (autocast).")
    ] = "float32",
    accumulators: Annotated[
        str, typer.Option(help="Where the strategies' sums are kept: auto, device or cpu (offloaded).")
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per sub-batch (K); default: the run's batch size.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Strategies, as patch=2,4,7;dropout=0,0.5; default: the run's grid.")
    ] = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            help="Only these, counted from 0 by progress, as 0,2; `merge` joins the cubes of such jobs.",
            metavar="N,N",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this strategy (patch=4,dropout=0.5; an axis left out: the reference's); repeatable. Each such "
            "cell gets --samples (default 16 sub-batches), without racing; the others stay as they are.",
            metavar="STRATEGY",
        ),
    ] = None,
    group_size: Annotated[
        int, typer.Option(help="Strategies measured side by side with --samples-per-cell fixed or --only.")
    ] = 16,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads, which no tensor tells.", rich_help_panel=FOREIGN)
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Epochs of the whole run, where the files do not tell.", rich_help_panel=FOREIGN),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="Profile under this loss with fresh heads, where the files hold a backbone alone.",
            metavar="mocov3|simclr|dino",
            rich_help_panel=FOREIGN,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Images: a folder of pictures, or a name as for train.", rich_help_panel=FOREIGN),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of the images; default: the checkpoints' own.", rich_help_panel=FOREIGN)
    ] = None,
    seed: Seed = 0,
    data_folder: DataFolder = None,
    device: Device = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew if the file holds another profile.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured and at what cost.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure bias and variance of every strategy's gradient at every checkpoint. Run again to resume.

    gradscope profile ckpt_dir
    """
    from dataclasses import replace

    from gradscope.profile_options import ProfileOptions
    from gradscope.profiler import expected_work, told_units
    from gradscope.profiler import profile as run
    from gradscope.progress import Progress
    from gradscope.ranks import open_ranks
    from schedulers import format_count

    with open_ranks(lambda: open_device(device)) as (ranks, here):
        options = ProfileOptions(
            samples=samples, batch_size=batch_size, seed=seed, allocation=samples_per_cell, criterion=criterion,
            metric=metric, tolerance=tolerance, estimator=estimator, precision=precision, accumulators=accumulators,
            group_size=group_size, checkpoints=None if checkpoints is None else parse_numbers(checkpoints),
        )  # fmt: skip
        foreign: dict[str, Any] = {
            "heads": heads, "epochs": epochs, "loss": loss, "data": data, "image_size": image_size
        }  # fmt: skip
        measured = open_task(task, ckpt_dir, data_folder, here, foreign=foreign, seed=seed)
        if ranks.first:
            for line in found_lines(measured):
                note(line)
        if grid is not None:
            measured.grid = override_grid(measured.grid, grid)
        if only:
            options = replace(options, only=tuple(complete("--only", text, measured.grid.reference) for text in only))
        if dry_run and not ranks.first:
            return
        if dry_run:
            cells, least, most = expected_work(measured, ckpt_dir, out, options, overwrite)
            emit(
                {"cells": cells, "strategies": len(measured.grid), "units": most, "units_least": least},
                [
                    f"{cells} cells to measure on a grid of {len(measured.grid)} strategies, "
                    f"{f'{told_units(least, most)} besides the set-up' if cells else 'nothing to do'}"
                ],
                as_json=as_json,
            )
            return
        words = {
            "--out": out if out != Path("cube.nc") else None, "--task": task, "--grid": grid,
            "--batch-size": batch_size, "--seed": seed or None, "--data-folder": data_folder,
            "--estimator": estimator if estimator != "auto" else None,
            "--precision": precision if precision != "float32" else None,
            **{f"--{name.replace('_', '-')}": value for name, value in foreign.items()},
        }  # fmt: skip
        given = [str(word) for item in words.items() if item[1] is not None for word in item]
        command = shlex.join(["gradscope", "profile", str(ckpt_dir), *given])
        with Progress("profile", quiet=quiet or as_json or not ranks.first) as progress:
            tree, summary = run(
                measured, ckpt_dir, out, options=options, overwrite=overwrite, report=progress.update, ranks=ranks,
                command=command, tell=None if quiet or as_json else note,
            )  # fmt: skip
    if not ranks.first:
        return
    done: dict[str, Any] = {
        "cube": str(out),
        "measured": summary.measured,
        "reused": summary.reused,
        "failed": summary.failures,
        "units": summary.units,
        "estimator": summary.engine or tree.attrs["engine"],
        "estimator_reason": summary.engine_reason,
    }
    spent = f"{format_count(summary.units)} units spent" if summary.units else "nothing to do"
    lines = [
        f"{out}: {summary.measured} cells measured, {summary.reused} reused, {len(summary.failures)} failed; {spent}"
    ]
    if summary.engine:
        lines.append(f"estimator {summary.engine}: {summary.engine_reason.removeprefix(f'{summary.engine}, ')}")
    emit(done, [*lines, *untrained_note(tree.attrs, measured)], as_json=as_json)
    for cell, reason in list(summary.failures.items())[:5]:
        note(f"failed: {cell}: {reason}")
    if summary.failures:
        raise typer.Exit(4)


def merge(
    cubes: Annotated[list[Path], typer.Argument(help="Cubes of one profile, measured in parts.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The joined cube.")],
    as_json: Json = False,
) -> None:
    """Join cubes that were measured in parts (other checkpoints or strategies of one run) into --out.

    gradscope merge a.nc b.nc -o cube.nc
    """
    from gradscope.cube import DONE, open_cube, save_cube
    from gradscope.merge import merge_cubes

    cube, groups = merge_cubes([open_cube(path) for path in cubes])
    save_cube(cube, groups, out)
    done = int((cube["status"] == DONE).sum())
    emit(
        {"cube": str(out), "done": done, "cells": cube["status"].size},
        [f"{out}: {done} of {cube['status'].size} cells"],
        as_json=as_json,
    )


def open_task(
    name: str | None,
    folder: Path,
    data_folder: Path | None,
    device: torch.device,
    *,
    foreign: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Task:
    """The user's task `module:Class`, or the bundled one of the folder's checkpoints: our own, or another code base's.

    `foreign`: options for the latter, as `ForeignTask.from_checkpoints` takes them, None where a command has none;
    for others they are an error. `seed`: of heads that such checkpoints lack. Raises TaskError, CheckpointError,
    UsageError.
    """
    import importlib

    from gradscope.checkpoints import list_checkpoints
    from gradscope.checks import reason
    from gradscope.errors import GradscopeError, TaskError, UsageError
    from gradscope.foreign import ForeignTask, holds_foreign
    from gradscope.task import Task
    from gradscope.tasks import PretrainTask
    from schedulers import Grid

    given = {option: value for option, value in (foreign or {}).items() if value is not None}
    if name is None and holds_foreign(folder):
        if foreign is None:
            raise UsageError(f"{folder}: holds checkpoints of another code base, which only `gradscope profile` takes")
        return ForeignTask.from_checkpoints(
            folder, **{"data": None, **given}, data_folder=data_folder, seed=seed, device=device
        )
    if given:
        option = f"--{next(iter(given)).replace('_', '-')}"
        if name is None:
            list_checkpoints(folder)  # a folder that is missing or empty is told first
        whose = f"the task {name} has its" if name else f"the checkpoints of {folder} have their"
        raise UsageError(f"{option} is for checkpoints of other code bases; leave it out: {whose} own settings")
    if name is None:
        return PretrainTask.from_folder(folder, data_folder=data_folder, device=device)
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise TaskError(f"--task {name!r} is not of the form module:Class")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module_name), class_name)()
    except ModuleNotFoundError as error:
        cure = f"; run from the folder that holds {module_name.split('.')[0]}.py"
        raise TaskError(f"--task {name!r}: {error}{cure if error.name == module_name.split('.')[0] else ''}") from error
    except GradscopeError:
        raise
    except Exception as error:  # whatever the user's module and constructor raise
        raise TaskError(f"--task {name!r}: {reason(error)}") from error
    if not isinstance(made, Task):
        raise TaskError(f"--task {name!r}: {class_name} is no gradscope.Task; derive it from gradscope.Task")
    if not isinstance(getattr(made, "grid", None), Grid):
        raise TaskError(f"--task {name!r}: it has no `grid`; set it to a gradscope.Grid")
    return made


def found_lines(task: Task) -> list[str]:
    """What a task of foreign checkpoints is made of, and what to beware of; nothing for other tasks."""
    from gradscope.foreign import ForeignTask

    if not isinstance(task, ForeignTask):
        return []
    return [*(f"found: {line}" for line in task.lines), *(f"warning: {text}" for text in task.warnings)]


def parse_numbers(text: str) -> tuple[int, ...]:
    """Read `0,2` into numbers. Raises UsageError on another form."""
    from gradscope.errors import UsageError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--checkpoints {text!r} is not of the form 0,2") from None


def untrained_note(attributes: Any, task: Task) -> list[str]:
    """A line that names the grid's strategies under which the checkpoints were never trained (design section 4)."""
    import json

    trained = json.loads(attributes.get("training_json", "{}")).get("strategies")
    never = [] if trained is None else [str(s) for s in task.grid.strategies() if str(s) not in trained]
    if not never:
        return []
    shown = ", ".join(never[:4]) + (f" and {len(never) - 4} more" if len(never) > 4 else "")
    return [
        f"note: the checkpoints were never trained under {shown}; much of their bias is then mismatch that "
        "a few steps remove (a mixed pilot avoids it)"
    ]
