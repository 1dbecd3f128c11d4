"""The task of a folder of foreign checkpoints: their own loss where they have its heads, on images the user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.config import Setting, TrainConfig, open_setting
from gradscope.data import DATASETS, Dataset, load_data
from gradscope.engines import derive_seed
from gradscope.errors import UsageError
from gradscope.foreign.building import Blueprint, blueprint_of, build
from gradscope.foreign.checkpoint import ForeignCheckpoint
from gradscope.foreign.layouts import read_foreign
from gradscope.foreign.progress import Run, foreign_files, run_of
from gradscope.foreign.reading import some_names
from gradscope.foreign.values import number_in
from gradscope.methods import DINO
from gradscope.task import Checkpoint
from gradscope.tasks import PretrainTask

DROPOUTS = (0.0, 0.25, 0.5, 0.75)
LARGEST_PATCH = 3.5  # in base patches; the paper's grid ends at 3
CENTRE_IMAGES = 256


class ForeignTask(PretrainTask):
    """A folder's checkpoints with the views and the loss of their method, as the bundled trainer has them.

    `found`: the first checkpoint, which stands for all. `run`: their order and progress. `blueprint`: how each
    becomes a method. Everything that a profile should tell about them is in `lines` and `warnings`.
    """

    def __init__(
        self,
        found: ForeignCheckpoint,
        run: Run,
        blueprint: Blueprint,
        setting: Setting,
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(setting, device=device)
        self.found, self.run, self.blueprint = found, run, blueprint
        self.warnings = (*blueprint.warnings, *(() if blueprint.fresh_heads else found.notes))

    @classmethod
    def from_checkpoints(
        cls,
        folder: Path,
        *,
        data: str | None,
        heads: int | None = None,
        epochs: float | None = None,
        loss: str | None = None,
        image_size: int | None = None,
        data_folder: Path | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> ForeignTask:
        """The task of a folder of foreign checkpoints.

        `heads`: of attention, `epochs`: of the whole run, where the files cannot tell. `loss`: mocov3, simclr or dino,
        to profile under another loss than the files' own. `data`: as `load_data` takes it; `image_size` in pixels, by
        default the checkpoints' own. `seed`: of fresh heads. Raises CheckpointError and UsageError, naming the file and
        the cure, for whatever is missing.
        """
        run = run_of([read_foreign(path).outline for path in foreign_files(folder)], folder, epochs)
        first = read_foreign(run.checkpoints[0].path)
        blueprint = blueprint_of(
            first, heads=heads, loss=loss, image_size=image_size, total_epochs=run.total_epochs, seed=seed
        )
        if data is None:
            raise UsageError(f"{folder}: {first.layout} checkpoints do not say on which images; add --data DIR")
        setting = _setting(blueprint, data, data_folder, number_in(first.settings, "batch_size"))
        return cls(first.outline, run, blueprint, setting, device=device)

    @property
    def lines(self) -> tuple[str, ...]:
        """What was found, for people."""
        a, size = self.blueprint.architecture, self.blueprint.architecture.size
        points = self.run.checkpoints
        shown = ", ".join(f"{point.progress:.3g}" for point in points[:6]) + (", ..." if len(points) > 6 else "")
        lines = [
            f"{self.found.layout} checkpoints, loss {self.blueprint.method}: ViT of width {size.width}, "
            f"depth {size.depth}, {size.heads} heads, patch {a.patch}, {a.positions} positions, {a.image_size} pixels",
            f"{len(points)} checkpoints of a run of {self.run.total_epochs:g} epochs, at progress {shown}",
        ]
        if self.run.left_out:
            copies = some_names([f"{copy} ({kept})" for copy, kept in self.run.left_out.items()])
            lines.append(f"left out, of the same epoch as another: {copies}")
        if number_in(self.found.settings, "batch_size") is None:
            lines.append(
                f"the run's batch size is not told; sub-batches of {self.batch_size} unless --batch-size is given"
            )
        if self.found.leftovers:
            lines.append(f"tensors not used: {some_names(list(self.found.leftovers))}")
        return tuple(lines)

    def load(self, checkpoint: Path) -> nn.Module:
        self._targets = type(self._targets)()  # another model gives other targets
        found = read_foreign(checkpoint)
        self.fraction = next((c.progress for c in self.run.checkpoints if c.path == checkpoint), 1.0)
        method = build(found, self.blueprint).to(self.device)
        if isinstance(method, DINO) and (found.centre is None or self.blueprint.fresh_heads):
            self._estimate_centre(method)
        return method

    def checkpoints(self, folder: Path) -> Sequence[Checkpoint]:
        return self.run.checkpoints

    def second_moment(self, checkpoint: Path, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Adam's, where the file's optimizer fits its parameters and holds all that are trained; else None."""
        found = None if self.blueprint.fresh_heads else read_foreign(checkpoint).second_moment
        wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if found is None or any(name not in found for name in wanted):
            return None
        return {name: found[name].to(self.device) for name in wanted}

    def describe(self) -> Mapping[str, Any]:
        b, size = self.blueprint, self.blueprint.architecture.size
        return {
            "task": "gradscope.foreign.task:ForeignTask",
            "layout": self.found.layout,
            "method": b.method,
            "model": [size.width, size.depth, size.heads, size.mlp_ratio, b.architecture.norm_eps],
            "image_size": b.image_size,
            "settings": {name: value for name, value in sorted(b.settings.items())},
            "scales": [b.crop_scale, b.small_scale],
            "fresh_heads": b.seed if b.fresh_heads else None,
            "epochs": self.run.total_epochs,
            "data": self.setting.data.digest,
            "warnings": list(self.warnings),
        }

    def training(self, folder: Path) -> Mapping[str, Any]:
        reference = str(self.grid.reference)
        told = {"schedule": f"0-1: {reference}", "strategies": [reference]}
        return {**told, "source": self.found.layout, "warnings": list(self.warnings)}

    @torch.no_grad()
    def _estimate_centre(self, method: DINO) -> None:
        """Set the centre to the teacher's mean output over some images; in training it is a moving average of those."""
        size = min(CENTRE_IMAGES, self.setting.data.train_count)
        views = next(iter(self.batches(size, derive_seed("centre", 0) % 2**31)))
        method.centre.copy_(method.targets(views, self.grid.reference).float().mean(0, keepdim=True))


def _setting(blueprint: Blueprint, data: str, data_folder: Path | None, batch_size: float | None) -> Setting:
    """The images and views of a blueprint's method, with a grid of strategies that its image size allows."""
    patch, size = blueprint.architecture.patch, blueprint.image_size
    patches = [q for q in range(patch, int(LARGEST_PATCH * patch) + 1) if size % q == 0 and size // q > 1]
    if not patches:
        raise UsageError(f"--image-size {size}: holds a single patch of {patch} pixels; give a larger one")
    config = TrainConfig(
        budget=1.0, method=blueprint.method, data=data, image_size=size, patch=patch,
        patches=tuple(patches), dropouts=DROPOUTS, batch_size=2, freeze_patch_embed=False,
        small_crops=blueprint.small_crops, small_size=int(blueprint.settings.get("small_size", 0)),
        crop_scale=blueprint.crop_scale or (), small_scale=blueprint.small_scale or (),
    )  # fmt: skip
    if data in DATASETS:
        _check_channels(data, load_data(data, data_folder), blueprint)  # before all of its images are resampled
    setting = open_setting(config, data_folder)
    _check_channels(data, setting.data, blueprint)
    batch = int(batch_size or TrainConfig.batch_size)
    return replace(setting, config=replace(config, batch_size=max(2, min(batch, setting.data.train_count))))


def _check_channels(name: str, images: Dataset, blueprint: Blueprint) -> None:
    if images.channels != blueprint.architecture.channels:
        raise UsageError(
            f"--data {name}: images of {images.channels} channels, but the checkpoints' model takes "
            f"{blueprint.architecture.channels}"
        )
