"""`gradscope demo` and `gradscope plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradscope.cli.console import DataFolder, Device, Json, Quiet, Seed, emit, open_device, parse_units


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="The loop")(demo)
    app.command(rich_help_panel="The loop")(plot)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything.", envvar="GRADSCOPE_OUT")] = Path(
        "demo"
    ),
    budget: Annotated[
        float | None,
        typer.Option("--budget", "-b", parser=parse_units, metavar="N[K|M|B]", help="Units of each of the three runs."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="fashion-mnist-10k (ships with the package) or fashion-mnist.", envvar="GRADSCOPE_DATASET"),
    ] = "fashion-mnist-10k",
    data_folder: DataFolder = None,
    seed: Seed = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The whole loop on real images: train, profile, optimize, train on the schedule, report. Run again to resume.

    gradscope demo
    """
    from gradscope.demo import BUDGET, run_demo

    result = run_demo(
        out,
        budget=BUDGET if budget is None else budget,
        data=data,
        data_folder=data_folder,
        seed=seed,
        quiet=quiet or as_json,
        device=open_device(device),
    )
    emit(result.facts(), result.lines(), as_json=as_json)
    if result.failed_cells:
        raise typer.Exit(4)


def plot(
    cube: Annotated[Path, typer.Argument(help="The cube.", envvar="GRADSCOPE_CUBE")] = Path("cube.nc"),
    schedule: Annotated[Path | None, typer.Option(help="A schedule; default schedule.json if there is one.")] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(help="A training folder whose curves to show; repeatable; default every one here."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The report.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One self-contained report: heatmaps over progress, the trade-off, the schedule, training curves.

    gradscope plot
    """
    from gradscope.cube import open_cube
    from gradscope.report import write_report
    from gradscope.trainer import read_log
    from schedulers import load_schedule

    path = schedule or (Path("schedule.json") if Path("schedule.json").is_file() else None)
    plan = None if path is None else load_schedule(path)
    folders = run or [log.parent for log in sorted(Path().glob("*/log.jsonl")) if any(log.parent.glob("step-*.pt"))]
    runs = {folder.name or str(folder): read_log(folder) for folder in folders}
    write_report(out, cube=open_cube(cube), schedule=plan, runs=runs, title=f"gradscope: {cube.stem}")
    emit(
        {"report": str(out), "cube": str(cube), "schedule": None if path is None else str(path)},
        [f"{out}: open it in a browser"],
        as_json=as_json,
    )
