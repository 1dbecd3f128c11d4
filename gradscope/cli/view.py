"""`gradscope demo` and `gradscope plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradscope.cli.console import DataFolder, Device, Json, Quiet, Seed, emit, note, open_device, parse_units


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
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep the report up to date while a profile or a run goes on, until Ctrl-C.")
    ] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks with --watch.")] = 10.0,
    as_json: Json = False,
) -> None:
    """One self-contained report: what is best, heatmaps over progress, the schedule, training curves.

    gradscope plot
    """
    from gradscope.report_words import sentences
    from gradscope.watch import Sources, make_report, watch_report

    sources, title = Sources(cube, schedule, run), f"gradscope: {cube.stem}"
    if watch:
        facts = watch_report(sources, out, title=title, every=interval, say=note)
    else:
        facts = make_report(sources, out, title=title)
    shown = sources.schedule_path() if "schedule" in facts else None
    emit(
        {
            "report": str(out),
            "cube": str(cube) if "profile" in facts else None,
            "schedule": None if shown is None else str(shown),
            "facts": facts,
        },
        [*sentences(facts), f"{out}: open it in a browser"],
        as_json=as_json,
    )
