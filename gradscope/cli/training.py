"""`gradscope train` and `gradscope evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.cli.console import (
    Budget,
    DataFolder,
    Device,
    Json,
    Quiet,
    Seed,
    emit,
    note,
    open_device,
    parse_grid_axes,
)

if TYPE_CHECKING:
    from gradscope.config import Setting, TrainConfig
    from schedulers import Schedule, Strategy


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="The loop")(train)
    app.command(rich_help_panel="Further")(evaluate)


def train(
    budget: Budget,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints and log.", envvar="GRADSCOPE_OUT")],
    schedule: Annotated[
        str,
        typer.Option(
            help="A schedule file, [bold]mixed[/bold] (every step draws from the grid), none, or a short text; "
            "quote it, since ; > and * mean something to a shell. A strategy: patch=4,dropout=0.5. Stages, each until "
            "a fraction of the budget: 'patch=7@0.4;patch=2'. Ramps in equal parts: 'dropout=0.8->0/5@0.6;patch=2' "
            "(five parts, at .8, .6, .4, .2, 0), 'patch=14>7>4>2'. Mixtures, drawn at every step: "
            "'0.7*patch=7+0.3*patch=2'.",
            envvar="GRADSCOPE_SCHEDULE",
        ),
    ] = "none",
    method: Annotated[str, typer.Option(help="Pre-training method: mocov3.", envvar="GRADSCOPE_METHOD")] = "mocov3",
    data: Annotated[
        str,
        typer.Option(
            help="fashion-mnist-10k (ships with the package) or fashion-mnist (60,000 + 10,000 images).",
            envvar="GRADSCOPE_DATASET",
        ),
    ] = "fashion-mnist-10k",
    data_folder: DataFolder = None,
    model: Annotated[str, typer.Option(help="demo, tiny, small or base.")] = "demo",
    grid: Annotated[
        str | None, typer.Option(help="Strategies for mixed runs and profiles, as patch=2,4,7;dropout=0,0.5.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 64,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate at batch 256, scaled with the batch; default 4e-3 for demo, else 1.5e-4."),
    ] = None,
    decay: Annotated[str, typer.Option(help="cosine, polynomial or constant, over the spent budget.")] = "cosine",
    seed: Seed = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as weight_decay=0.05; repeatable.")
    ] = None,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pre-train under a schedule until the budget is spent; the same command continues a stopped run.

    gradscope train --budget 300K --schedule mixed --out ckpt_dir
    """
    if schedule == "online":
        note("error: --schedule online is not built yet; use a file, a strategy, mixed or none")
        raise typer.Exit(2)
    from gradscope.config import open_setting
    from gradscope.progress import Progress
    from gradscope.trainer import train as run
    from schedulers import format_count

    values = {
        "budget": budget,
        "method": method,
        "data": data,
        "model": model,
        "batch_size": batch_size,
        "decay": decay,
        "seed": seed,
    }
    config = make_config({**values, **({"lr": lr} if lr is not None else {})}, grid, settings or [])
    setting = open_setting(config, data_folder)
    plan = make_schedule(schedule, setting)
    if not as_json:
        note(
            f"budget {format_count(budget)} = {budget:,.0f} units; batch {config.batch_size}; schedule "
            f"{schedule}; {len(setting.data.train_images):,} images"
        )
    with Progress("train", quiet=quiet or as_json) as progress:
        result = run(setting, plan, out, device=open_device(device), report=progress.update)
    facts = {
        "out": str(out), "steps": result.step, "units": result.units, "samples": result.samples,
        "seconds": round(result.seconds, 2), "knn_accuracy": result.accuracy,
    }  # fmt: skip
    accuracy = "" if result.accuracy is None else f", kNN accuracy {result.accuracy:.1%}"
    emit(
        facts,
        [
            f"{out}: {result.step:,} steps, {result.samples:,} samples, {result.units:,.0f} units, "
            f"{result.seconds:.0f} s{accuracy}"
        ],
        as_json=as_json,
    )


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint file, or a folder (its last checkpoint).")],
    knn: Annotated[
        bool, typer.Option("--knn", help="k nearest neighbours (k 20, temperature 0.07); the default.")
    ] = False,
    linear: Annotated[bool, typer.Option("--linear", help="Linear probe by L-BFGS.")] = False,
    finetune: Annotated[bool, typer.Option("--finetune", help="Fine-tune everything.")] = False,
    epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning.")] = 5,
    data_folder: DataFolder = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """How good a checkpoint's features are, on full-length sequences.

    gradscope evaluate ckpt_dir --knn --linear
    """
    from gradscope.checkpoints import list_checkpoints
    from gradscope.errors import UsageError
    from gradscope.evaluation import extract_features, finetune_accuracy, knn_accuracy, linear_accuracy
    from gradscope.trainer import load_run

    if epochs < 1:
        raise UsageError(f"--epochs {epochs}: fine-tuning needs at least 1")
    path = list_checkpoints(checkpoint)[-1].path if checkpoint.is_dir() else checkpoint
    setting, model, _ = load_run(path, data_folder)
    model.to(open_device(device))
    data = setting.data
    found: dict[str, float] = {}
    if knn or linear or not finetune:
        features = [extract_features(model.backbone, images, data) for images in (data.train_images, data.test_images)]
        if knn or not linear:
            found["knn"] = knn_accuracy(features[0], data.train_labels, features[1], data.test_labels)
        if linear:
            found["linear"] = linear_accuracy(features[0], data.train_labels, features[1], data.test_labels)
    for name, value in found.items():
        note(f"{name} {value:.1%}")
    if finetune:
        note(f"fine-tuning for {epochs} epochs (--epochs)")
        found["finetune"] = finetune_accuracy(model.backbone, data, epochs=epochs)
    emit(
        {"checkpoint": str(path), "accuracy": found},
        [f"{name:<9}{value:.1%}" for name, value in found.items()],
        as_json=as_json,
    )


def make_config(values: dict[str, Any], grid: str | None, settings: list[str]) -> TrainConfig:
    """A configuration from options, a grid's text and `key=value` texts. Raises UsageError naming what is wrong."""
    import ast
    import dataclasses

    from gradscope.config import TrainConfig
    from gradscope.errors import UsageError

    if grid is not None:
        axes = parse_grid_axes(grid)
        names = {"patch": "patches", "dropout": "dropouts"}
        for axis, points in axes.items():
            if axis not in names:
                raise UsageError(f"--grid {grid!r}: unknown axis {axis!r}; the axes are patch, dropout")
            if any(isinstance(point, str) for point in points):
                raise UsageError(f"--grid {grid!r}: patch and dropout take numbers, as in patch=2,4;dropout=0,0.5")
            values[names[axis]] = points
    types = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    for text in settings:
        key, equals, value = text.partition("=")
        if equals and key not in types:
            raise UsageError(f"--set {text!r}: unknown setting {key!r}; the settings are {', '.join(sorted(types))}")
        if not equals:
            raise UsageError(
                f"--set {text!r}: not of the form setting=value; the settings are {', '.join(sorted(types))}"
            )
        try:
            read = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            read = value
        if key in values:
            raise UsageError(f"--set {text!r}: {key} has an option of its own, --{key.replace('_', '-')}")
        values[key] = (read,) if isinstance(types[key], tuple) and not isinstance(read, tuple) else read
    return TrainConfig.for_model(**values)


def make_schedule(text: str, setting: Setting) -> Schedule:
    """The schedule that an option's text names: none, mixed, stages, or a file. Checks that the model can run it.

    A file whose costs are of another model than `tokens`, which training counts in, becomes the same run in tokens.
    """
    from gradscope.errors import UsageError
    from schedulers import constant_schedule, load_schedule, mixed_schedule, parse_schedule, token_cost

    config = setting.config

    def cost(strategy: Any) -> float:
        return token_cost(config.method, setting.image_size, config.patch, strategy)

    if text == "none":
        return constant_schedule(config.reference, cost(config.reference))
    if text == "mixed":
        strategies = setting.config.grid(setting.image_size).strategies()
        return mixed_schedule(strategies, [cost(s) for s in strategies])
    if Path(text).is_file():
        plan = load_schedule(text)
    elif "=" in text:
        plan = parse_schedule(text, cost=cost, reference=config.reference)
    else:
        raise UsageError(
            f"--schedule {text!r}: no such file; give a schedule file, a strategy such as "
            "patch=4,dropout=0.5, stages such as patch=7@0.4;patch=2, mixed or none"
        )
    for strategy in plan.strategies:
        for axis in strategy:
            if axis not in config.reference:
                raise UsageError(
                    f"--schedule {text!r}: unknown axis {axis!r}; {config.method} has {', '.join(config.reference)}"
                )
        cost(strategy)  # refuses a patch that does not divide the image, and a dropout that leaves no token
    if Path(text).is_file():
        plan = _in_tokens(plan, text, cost)
        for name, here in (("budget", config.budget), ("batch_size", config.batch_size)):
            made_for = getattr(plan, name)
            if made_for is not None and abs(made_for - here) > 0.5:  # a budget may be given in whole units
                note(f"note: {text} was made for {name} {made_for:.9g}, this run has {here:.9g}")
    return plan


def _in_tokens(plan: Schedule, path: str, cost: Callable[[Strategy], float]) -> Schedule:
    """The plan as it is, or, where it counts other costs than tokens, the same samples counted in tokens."""
    from schedulers.schedule import in_costs

    if plan.cost_model == "tokens":
        return plan
    counted = in_costs(plan, cost, "tokens")
    budgets = ""
    if plan.budget is not None:
        budgets = (
            f"; its budget of {plan.budget:,.0f} units is {counted.budget:,.0f} here (--budget {counted.budget:.0f})"
        )
    note(
        f"note: {path} counts {plan.cost_model} costs, training counts tokens: its stages get as many samples as it "
        f"planned{budgets}"
    )
    return counted
