"""`gradscope train`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.cli.console import SETTINGS, Budget, DataFolder, Device, Json, Quiet, Seed, emit, note, open_device
from gradscope.cli.run_settings import make_config, make_plan

if TYPE_CHECKING:
    from gradscope.config import Setting


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="The loop")(train)


def train(
    context: typer.Context,
    budget: Budget,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints and log.", envvar="GRADSCOPE_OUT")],
    schedule: Annotated[
        str,
        typer.Option(
            help="A schedule file, [bold]mixed[/bold] (every step draws from the grid), [bold]online[/bold] (decided "
            "while training runs; online:overhead=0.05,finish=0 changes its rule), none, or a short text; "
            "quote it, since ; > and * mean something to a shell. A strategy: patch=4,dropout=0.5. Stages, each until "
            "a fraction of the budget: 'patch=7@0.4;patch=2'. Ramps in equal parts: 'dropout=0.8->0/5@0.6;patch=2' "
            "(five parts, at .8, .6, .4, .2, 0), 'patch=14>7>4>2'. Mixtures, drawn at every step: "
            "'0.7*patch=7+0.3*patch=2'.",
            envvar="GRADSCOPE_SCHEDULE",
        ),
    ] = "none",
    method: Annotated[
        str, typer.Option(help="Pre-training method: mocov3, simclr or dino.", envvar="GRADSCOPE_METHOD")
    ] = "mocov3",
    data: Annotated[
        str,
        typer.Option(
            help="fashion-mnist-10k (ships with the package), fashion-mnist (60,000 + 10,000 images), or a folder of "
            "pictures: DIR/train/CLASS/*.jpg, DIR/CLASS/*.jpg, or DIR/*.jpg without classes.",
            envvar="GRADSCOPE_DATASET",
        ),
    ] = "fashion-mnist-10k",
    data_folder: DataFolder = None,
    image_size: Annotated[
        int, typer.Option(help="Pixels to which images are brought; 0: the data's own, 224 for a folder.")
    ] = 0,
    model: Annotated[str, typer.Option(help="demo, tiny, small or base.")] = "demo",
    patch: Annotated[
        int | None,
        typer.Option(
            help="Base patch in pixels; default 2 for demo (pictures of a folder: at least 14 x 14 patches), else 16."
        ),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Strategies for mixed runs and profiles, as patch=2,4,7;dropout=0,0.5.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per step, over all ranks.")] = 64,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate at batch 256, scaled with the batch; default: the recipe's of the method."),
    ] = None,
    decay: Annotated[str, typer.Option(help="cosine, polynomial or constant, over the spent budget.")] = "cosine",
    precision: Annotated[str, typer.Option(help="float32, or bf16 (autocast).")] = "float32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile, one graph per strategy, before the first step.")
    ] = False,
    keep: Annotated[
        int | None, typer.Option(help="Keep only the newest N checkpoints (a profile wants all of them).")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard's event files.")] = False,
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

    On several GPUs: torchrun --nproc-per-node 4 -m gradscope train ... --device cuda. Settings may also stand in the
    \\[train] table of a TOML file (gradscope --config FILE train ...); OUT/config.toml is one.
    """
    from gradscope.config import open_setting
    from gradscope.data.folder import FolderData
    from gradscope.progress import Progress
    from gradscope.ranks import open_ranks
    from gradscope.trainer import RunOptions
    from gradscope.trainer import train as run
    from schedulers import AdaptiveRule, format_count

    given = {"lr": lr, "patch": patch}
    values = {
        "budget": budget,
        "method": method,
        "data": data,
        "image_size": image_size,
        "model": model,
        "batch_size": batch_size,
        "decay": decay,
        "precision": precision,
        "seed": seed,
        **{name: value for name, value in given.items() if value is not None},
    }
    with open_ranks(lambda: open_device(device)) as (ranks, here):
        config = make_config(values, grid, settings or [], context.meta.get(SETTINGS))
        setting = open_setting(config, data_folder)
        plan = make_plan(schedule, setting)
        silent = as_json or not ranks.first
        if not silent:
            over = f" over {ranks.size} ranks" if ranks.size > 1 else ""
            note(
                f"budget {format_count(budget)} = {budget:,.0f} units; batch {config.batch_size}{over}; schedule "
                f"{schedule}; {setting.data.train_count:,} images"
            )
            if not quiet:
                note(_described(setting))
            if not setting.data.classes:
                note(f"note: {config.data} has no classes, so there is no accuracy to tell")
        options = RunOptions(compiled=compiled, keep=keep, tensorboard=tensorboard, schedule_text=schedule)
        with Progress("train", quiet=quiet or silent) as progress:
            result = run(
                setting,
                plan,
                out,
                device=here,
                report=progress.update,
                options=options,
                ranks=ranks,
                tell=progress.note,
            )
        here_skipped = setting.data.skipped if isinstance(setting.data, FolderData) else ()
        skipped = sorted({str(path) for paths in ranks.gather(here_skipped) for path in paths})
    if not ranks.first:
        return
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        note(f"{len(skipped)} pictures could not be read and were skipped: {', '.join(skipped[:5])}{more}")
    facts = {
        "out": str(out), "steps": result.step, "units": result.units, "samples": result.samples,
        "seconds": round(result.seconds, 2), "loss": result.loss, "knn_accuracy": result.accuracy,
        "skipped_pictures": skipped,
    }  # fmt: skip
    if isinstance(plan, AdaptiveRule):
        facts["online"] = _online_facts(out)
    accuracy = "" if result.accuracy is None else f", kNN accuracy {result.accuracy:.1%}"
    accuracy += "" if result.loss is None else f", last loss {result.loss:.3f}"
    emit(
        facts,
        [
            f"{out}: {result.step:,} steps, {result.samples:,} samples, {result.units:,.0f} units, "
            f"{result.seconds:.0f} s{accuracy}"
        ],
        as_json=as_json,
    )


def _online_facts(out: Path) -> dict[str, Any]:
    """What an online run decided, and what that took: units and seconds of its probes, and its stages."""
    from gradscope.runlog import SCHEDULE_FILE, read_log
    from schedulers import load_schedule

    schedule, probes = load_schedule(out / SCHEDULE_FILE), [row for row in read_log(out) if "probe" in row]
    return {
        "probes": len(probes),
        "probe_units": schedule.constraints["probe_units"],
        "probe_seconds": round(sum(row["probe_seconds"] for row in probes), 3),
        "schedule": str(out / SCHEDULE_FILE),
        "stages": [
            {"start": stage.start, "end": stage.end, "mixture": {str(s): weight for s, weight in stage.mixture}}
            for stage in schedule.stages
        ],
    }


def _described(setting: Setting) -> str:
    """The resolved configuration, in a few lines: what the method has, as it will be."""
    from gradscope.setting_checks import OF_METHODS

    config, size = setting.config, setting.new_model().backbone.size
    first = setting.augmentations[0]
    values = config.to_dict() | {
        "image_size": setting.image_size, "width": size.width, "depth": size.depth, "heads": size.heads,
        "mlp_ratio": size.mlp_ratio, "crop_scale": list(first.crop_scale),
        "lr": f"{config.lr:g} ({config.learning_rate(config.warmup):g} at this batch)",
        "patches": list(config.grid_patches(setting.image_size, config.patches)),
    }  # fmt: skip
    values["small_size"] = config.small_crop_size(setting.image_size)
    if config.small_crops:
        values["small_scale"] = list(setting.augmentations[-1].crop_scale)
    if config.weight_decay_end < 0:
        values["weight_decay_end"] = config.weight_decay
    left_out = {name for name, methods in OF_METHODS.items() if config.method not in methods}
    left_out |= {"decay_alpha"} if config.decay != "polynomial" else set()
    left_out |= set() if config.small_crops else {"small_size", "small_scale"}
    words = ", ".join(f"{n.replace('_', chr(160))} {_short(v)}" for n, v in values.items() if n not in left_out)
    lines = textwrap.wrap(words, width=110, initial_indent="settings: ", subsequent_indent="  ")
    return "\n".join(lines).replace(chr(160), "_")


def _short(value: object) -> str:
    if isinstance(value, list):
        return "/".join(map(_short, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
