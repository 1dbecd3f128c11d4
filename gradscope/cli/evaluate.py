"""`gradscope evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradscope.cli.console import DataFolder, Device, Json, Quiet, Seed, emit, note, open_device, table

if TYPE_CHECKING:
    from gradscope.config import Setting
    from gradscope.data import Dataset
    from gradscope.evaluation import FinetuneOptions, Outcome, Wanted
    from gradscope.models import VisionTransformer
    from gradscope.task import Checkpoint

SMALL = 64  # pixels; larger images are fine-tuned on by the published recipe


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Further")(evaluate)


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint file, or a folder (its last checkpoint).")],
    knn: Annotated[bool, typer.Option("--knn", help="k nearest neighbours, as DINO's; the default.")] = False,
    linear: Annotated[
        bool,
        typer.Option("--linear", help="Linear probe; penalty or rate are chosen on a tenth of the training images."),
    ] = False,
    finetune: Annotated[bool, typer.Option("--finetune", help="Fine-tune a copy of everything.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every checkpoint of the folder, as a table.")] = False,
    k: Annotated[str, typer.Option("--k", help="Numbers of neighbours, as 20 or 10,20,100.")] = "20",
    temperature: Annotated[float, typer.Option(help="Of the neighbours' votes exp(similarity / temperature).")] = 0.07,
    solver: Annotated[str, typer.Option(help="Of the linear probe: lbfgs, or sgd at several rates.")] = "lbfgs",
    blocks: Annotated[int, typer.Option(help="The probe sees the class tokens of so many last blocks.")] = 1,
    probe_epochs: Annotated[int, typer.Option(help="Epochs of the probe by sgd.")] = 100,
    epochs: Annotated[
        int | None,
        typer.Option(help=f"Epochs of fine-tuning; default 150, up to {SMALL} pixels 5 of a recipe for small images."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Other data than the run's: a name, or a folder with train/<class>/*.jpg.")
    ] = None,
    data_folder: DataFolder = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels that images are brought to; default the model's.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """How good a checkpoint's features are, on full-length sequences.

    gradscope evaluate ckpt_dir --knn --linear
    """
    from gradscope.checkpoints import list_checkpoints
    from gradscope.errors import UsageError
    from gradscope.evaluation import Wanted
    from gradscope.progress import Progress

    if every and not checkpoint.is_dir():
        raise UsageError(f"--all: {checkpoint} is no folder of checkpoints; give the folder that `train --out` wrote")
    found = list_checkpoints(checkpoint) if checkpoint.is_dir() else None
    paths = [checkpoint] if found is None else [point.path for point in (found if every else found[-1:])]
    ks = _neighbours(k)
    setting, backbone = _open(paths[0], None if data is not None else data_folder)
    backbone.to(open_device(device))
    images = _data(setting, backbone, data, data_folder, image_size)
    wanted = Wanted(
        ks=ks if knn or not (linear or finetune) else (),
        temperature=temperature,
        linear=solver if linear else None,
        blocks=blocks,
        probe_epochs=probe_epochs,
        finetune=_recipe(images.image_size, epochs, as_json=as_json) if finetune else None,
        seed=seed,
    )
    outcomes = []
    with Progress("evaluate", quiet=quiet or as_json) as progress:
        for number, path in enumerate(paths):
            if number:
                _load(backbone, path, setting)
            outcomes.append(_evaluate(backbone, images, wanted, setting, progress, number, paths))
    facts: dict[str, Any] = {"data": images.name, "image_size": images.image_size}
    if every and found is not None:
        _emit_all(facts, found, outcomes, as_json=as_json)
        return
    (outcome,) = outcomes
    emit(
        {"checkpoint": str(paths[0]), **facts, "accuracy": outcome.accuracy, "details": outcome.details},
        [f"{name:<9}{value:.1%}" for name, value in outcome.accuracy.items()],
        as_json=as_json,
    )


def _evaluate(
    backbone: VisionTransformer,
    images: Dataset,
    wanted: Wanted,
    setting: Setting,
    progress: Any,
    number: int,
    paths: Sequence[Path],
) -> Outcome:
    from gradscope.evaluation import evaluate as run

    def report(fraction: float, text: str) -> None:
        progress.update((number + fraction) / len(paths), f"{paths[number].name}: {text}")

    return run(backbone, images, wanted, statistics=setting.data, report=report)


def _emit_all(
    facts: dict[str, Any], found: Sequence[Checkpoint], outcomes: Sequence[Outcome], *, as_json: bool
) -> None:
    names = list(outcomes[0].accuracy)
    rows = [
        [point.path.name, f"{point.progress:.0%}", *(f"{outcome.accuracy[name]:.1%}" for name in names)]
        for point, outcome in zip(found, outcomes, strict=True)
    ]
    checkpoints = [
        {
            "checkpoint": str(point.path), "step": point.step, "progress": point.progress,
            "accuracy": outcome.accuracy, "details": outcome.details,
        }
        for point, outcome in zip(found, outcomes, strict=True)
    ]  # fmt: skip
    emit({**facts, "checkpoints": checkpoints}, table(["checkpoint", "progress", *names], rows), as_json=as_json)


def _neighbours(text: str) -> tuple[int, ...]:
    """`10,20` as numbers without repetition. Raises UsageError on another form."""
    from gradscope.errors import UsageError

    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--k {text!r}: give whole numbers of neighbours, as 20 or 10,20,100") from None


def _open(path: Path, data_folder: Path | None) -> tuple[Setting, VisionTransformer]:
    """The setting of a checkpoint's run, and its backbone to evaluate."""
    from gradscope.trainer import load_run

    setting, method, _ = load_run(path, data_folder)
    return setting, method.evaluated


def _load(backbone: VisionTransformer, path: Path, setting: Setting) -> None:
    """Another checkpoint of the same run into `backbone`, without opening the run's data again."""
    from gradscope.checkpoints import load_checkpoint
    from gradscope.config import config_of
    from gradscope.errors import CheckpointError

    content = load_checkpoint(path)
    changed = setting.config.changed(config_of(content, path))
    if changed:
        raise CheckpointError(
            f"{path}: is of another run than the folder's first checkpoint (another {', '.join(changed)}); evaluate "
            "it alone"
        )
    method = setting.new_model()
    method.load_state_dict(content["model"])
    backbone.load_state_dict(method.evaluated.state_dict())


def _data(
    setting: Setting, backbone: VisionTransformer, name: str | None, folder: Path | None, image_size: int | None
) -> Dataset:
    """The data to evaluate on: the run's own unless another name or size is given."""
    if name is None and image_size is None:
        return setting.data
    from gradscope.data import load_data

    size = backbone.image_size if image_size is None else image_size
    return load_data(name if name is not None else setting.config.data, folder, image_size=size)


def _recipe(image_size: int, epochs: int | None, *, as_json: bool) -> FinetuneOptions:
    from gradscope.evaluation import FinetuneOptions

    recipe = FinetuneOptions.small() if image_size <= SMALL else FinetuneOptions()
    if epochs is not None:
        recipe = FinetuneOptions.small(epochs=epochs) if image_size <= SMALL else replace(recipe, epochs=epochs)
    if not as_json:
        note(f"fine-tuning for {recipe.epochs} epochs (--epochs)")
    return recipe
