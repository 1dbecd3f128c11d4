"""`gradscope cost`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.cli.console import (
    DataFolder,
    Device,
    Json,
    Quiet,
    Seed,
    emit,
    note,
    open_device,
    override_grid,
    parse_grid_axes,
)
from gradscope.cli.cost_table import cost_text, counted_rows, measured_rows

if TYPE_CHECKING:
    import xarray as xr

    from gradscope.task import Task
    from gradscope.timing import MeasuredCosts
    from schedulers import Grid

PAPER_GRID = "patch=16,20,24,30,40,48;dropout=0,0.25,0.5,0.75,0.9"


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Further")(cost)


def cost(
    ckpt_dir: Annotated[
        Path | None,
        typer.Argument(help="Measure the last checkpoint of this folder, on its run's grid, data and batch."),
    ] = None,
    method: Annotated[str, typer.Option(help="mocov3, simclr or dino.", envvar="GRADSCOPE_METHOD")] = "mocov3",
    image_size: Annotated[int | None, typer.Option(help="Pixels per side; default 240.")] = None,
    patch: Annotated[int | None, typer.Option(help="Base patch in pixels; default: the smallest of the grid.")] = None,
    small_crops: Annotated[
        int | None, typer.Option(help="DINO's small crops of an image; default the recipe's, 8.")
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help=f"Strategies; default the run's or the cube's grid, else the paper's at 240 pixels ({PAPER_GRID}), "
            "else the patches that divide the image."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Time training steps on this device, and count their FLOPs and memory."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="Measured without CKPT_DIR: demo, tiny, small (default) or base; --cube needs it to be named."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples per measured step; default: the run's, without CKPT_DIR 64.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds to take the median of; default 10.")] = None,
    cube: Annotated[
        Path | None,
        typer.Option(help="Write the measured costs into this cube, for optimize --cost-model measured, --max-hours."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Your own task, as my_module:MyTask, with CKPT_DIR.", envvar="GRADSCOPE_TASK")
    ] = None,
    seed: Seed = 0,
    data_folder: DataFolder = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """The cost of every strategy of a grid, in units per sample, under each cost model.

    With CKPT_DIR, --measure or --cube also what a training step (zero_grad, loss, backward, AdamW; not the
    data's loading and augmentation) takes on this device, and where cost is not linear in tokens.

    gradscope cost --method mocov3 --image-size 240

    gradscope cost ckpt_dir --cube cube.nc
    """
    from gradscope.errors import UsageError
    from gradscope.files import check_writable
    from schedulers.tokens import patch_tokens

    given = {"--model": model, "--batch-size": batch_size, "--repeats": repeats}
    measuring = [name for name, value in given.items() if value is not None]
    if ckpt_dir is not None:
        own = {"--image-size": image_size, "--patch": patch, "--model": model, "--small-crops": small_crops}
        for name, value in own.items():
            if value is not None:
                raise UsageError(f"{name} {value}: the checkpoints of {ckpt_dir} have their own; leave it out")
    elif not (measure or cube) and measuring:
        raise UsageError(f"{measuring[0]} is for measured costs; add --measure, or give the folder of checkpoints")
    elif task is not None and (measure or cube):
        raise UsageError(f"--task {task}: give the folder of its checkpoints, too")
    tree = None if cube is None else _open(cube)
    if cube is not None and ckpt_dir is None and model is None:
        raise UsageError(
            f"--cube {cube}: of which model? Give the folder of its checkpoints (gradscope cost CKPT_DIR --cube "
            f"{cube}), or --model for the costs of a bundled model with random weights"
        )
    if ckpt_dir is not None:
        chosen, loaded = _open_run(ckpt_dir, task, data_folder, device)
        if grid is not None:
            chosen.grid = override_grid(chosen.grid, grid)
        elif tree is not None:
            chosen.grid = _grid_of_cube(tree.dataset, chosen.grid)
    else:
        found = None if tree is None else _grid_of_cube(tree.dataset)
        size = 240 if image_size is None else image_size
        patch_tokens(size, 1)  # refuses a size that no image has
        strategies = _make_grid(size, patch, grid, found)
        crops = _small_crops(method, small_crops)
        if not (measure or cube):
            rows = counted_rows(method, size, strategies, crops)
            about = [f"with {crops} small crops an image (--small-crops)"] if crops else []
            emit({"rows": rows}, [*cost_text(rows, strategies, None), *about], as_json=as_json)
            return
        chosen, loaded = _synthetic(strategies, method, model or "small", size, batch_size, device, crops)
    if tree is not None:
        _check_fits(tree.dataset, chosen, str(cube))
        if ckpt_dir is None:
            note(f"note: {cube} gets the costs of the bundled model {model} on random numbers, whichever it profiled")
    if cube is not None:
        check_writable(cube)
    costs = _measure(chosen, loaded, batch_size, repeats, seed, quiet or as_json)
    rows = measured_rows(chosen, costs)
    lines = cost_text(rows, chosen.grid, costs)
    if cube is not None and tree is not None:
        lines += _write(cube, tree, costs)
    emit({"rows": rows, "measured": costs.about()}, lines, as_json=as_json)
    for strategy, why in costs.failures.items():
        note(f"failed: {strategy}: {why}")
    if costs.failures:
        raise typer.Exit(4)


def _make_grid(image_size: int, patch: int | None, text: str | None, found: Grid | None) -> Grid:
    """The grid that `text` names, else `found`, else a default; its reference is the base patch without dropout.

    Raises UsageError for other axes than patch and dropout and for values that are no numbers.
    """
    from gradscope.errors import UsageError
    from schedulers import Grid, Strategy

    if text is None and found is None and image_size % 240:
        sizes = [p for p in range(2, image_size // 2 + 1) if image_size % p == 0]
        text = f"patch={','.join(map(str, sizes or [image_size]))};dropout=0,0.25,0.5"
    axes = dict(found.axes) if text is None and found is not None else parse_grid_axes(text or PAPER_GRID)
    if set(axes) - {"patch", "dropout"}:
        raise UsageError(
            f"--grid: unknown axis {sorted(set(axes) - {'patch', 'dropout'})[0]!r}; the axes are patch, dropout"
        )
    if any(isinstance(value, str) for values in axes.values() for value in values):
        raise UsageError(f"--grid {text!r}: patch and dropout take numbers, as in patch=16,24;dropout=0,0.5")
    if patch is None and found is not None:
        patch = int(found.reference.number("patch"))
    base = int(min(axes.get("patch", (16,)))) if patch is None else patch
    axes = {
        "patch": tuple(dict.fromkeys((base, *axes.get("patch", ())))),
        "dropout": tuple(dict.fromkeys((0, *axes.get("dropout", ())))),
    }
    return Grid(axes, Strategy(patch=base, dropout=0))


def _measure(
    task: Task, model: Any, batch_size: int | None, repeats: int | None, seed: int, quiet: bool
) -> MeasuredCosts:
    from gradscope.progress import Progress
    from gradscope.timing import measure_costs

    size = task.batch_size if batch_size is None else batch_size
    with Progress("cost", quiet=quiet) as progress:
        return measure_costs(
            task, model, task.grid.strategies(), batch_size=size, repeats=10 if repeats is None else repeats,
            seed=seed, report=progress.update,
        )  # fmt: skip


def _open_run(folder: Path, name: str | None, data_folder: Path | None, device: str) -> tuple[Task, Any]:
    """The task of a folder of checkpoints and the model of the last one. Raises UsageError when there is none."""
    from gradscope.cli.measure import open_task
    from gradscope.errors import CheckpointError, UsageError

    try:
        task = open_task(name, folder, data_folder, open_device(device))
        checkpoint = task.checkpoints(folder)[-1]
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    return task, task.load(checkpoint.path)


def _small_crops(method: str, given: int | None) -> int:
    """DINO's small crops of an image, by default the recipe's; no other method has any."""
    from gradscope.errors import UsageError
    from gradscope.recipes import recipe

    if given is not None and (method != "dino" or given < 0):
        raise UsageError(f"--small-crops {given}: a number of at least 0, for --method dino")
    return int(recipe(method, "small").get("small_crops", 0)) if given is None else given


def _synthetic(
    grid: Grid, method: str, model: str, image_size: int, batch_size: int | None, device: str, small_crops: int
) -> tuple[Task, Any]:
    from gradscope.timing import SyntheticTask
    from schedulers import token_counts

    for strategy in grid.strategies():  # refuses patches that do not fit before a model is made
        token_counts(image_size, int(grid.reference.number("patch")), strategy, method=method)
    task = SyntheticTask(
        grid, method=method, model=model, image_size=image_size, batch_size=64 if batch_size is None else batch_size,
        device=open_device(device), small_crops=small_crops,
    )  # fmt: skip
    return task, task.load()


def _open(path: Path) -> xr.DataTree:
    from gradscope.cube import open_cube
    from gradscope.files import check_writable

    tree = open_cube(path)
    check_writable(path)
    return tree


def _grid_of_cube(cube: xr.Dataset, own: Grid | None = None) -> Grid:
    """The cube's grid. Raises UsageError when its axes or its reference are not those of the task's `own` grid."""
    from gradscope.cube import grid_of
    from gradscope.errors import UsageError

    grid = grid_of(cube)
    axes, reference = (["patch", "dropout"], None) if own is None else (list(own.axes), own.reference)
    if set(grid.axes) != set(axes):
        raise UsageError(f"--cube: its axes are {', '.join(grid.axes)}, those to be measured {', '.join(axes)}")
    if reference is not None and dict(grid.reference) != dict(reference):
        raise UsageError(f"--cube: its reference is {grid.reference}, that to be measured {reference}")
    return grid


def _check_fits(cube: xr.Dataset, task: Task, path: str) -> None:
    """Raise UsageError unless the task's strategies have a place in the cube, at the same costs in tokens."""
    from gradscope.errors import UsageError

    grid = _grid_of_cube(cube, task.grid)
    known = cube["cost"].sel(cost_model="tokens").transpose(*grid.axes).values
    for strategy in task.grid.strategies():
        if any(strategy[axis] not in values for axis, values in grid.axes.items()):
            raise UsageError(f"--cube {path}: {strategy} is not on its grid; leave out --grid to measure all of it")
        there, here = float(known[grid.position(strategy)]), task.cost(strategy)
        if not math.isclose(there, here, rel_tol=1e-6):
            raise UsageError(
                f"--cube {path}: {strategy} costs {there:.4g} units there and {here:.4g} here; measure the same "
                "method, image size and base patch"
            )


def _write(path: Path, tree: xr.DataTree, found: MeasuredCosts) -> list[str]:
    """Measured costs into the cube's file, beside those of other strategies if measured under the same conditions."""
    from gradscope.cube import groups_of, save_cube
    from gradscope.cube_costs import MEASURED, lost_costs, put_costs

    values = {name: {s: float(getattr(c, name)) for s, c in found.costs.items()} for name in MEASURED}
    lost = lost_costs(tree.dataset, list(found.costs), found.about())
    if lost:
        note(
            f"note: {lost} {'strategies lose their' if lost > 1 else 'strategy loses its'} measured costs, which were "
            "of another device, number of threads, batch size or model; leave out --grid to measure all"
        )
    save_cube(put_costs(tree.to_dataset(), values, found.about()), groups_of(tree), path)
    trained = int(tree.attrs["batch_size"])
    if trained != found.batch_size:
        note(
            f"note: measured at a batch of {found.batch_size}, where the cube's run had {trained}; work that a step "
            f"does once weighs otherwise there (--batch-size {trained})"
        )
    return [f"{path}: measured costs written; gradscope optimize --cost-model measured and --max-hours can now be used"]
