"""The settings of a pre-training run, and the objects they stand for."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradscope.data import Augmentation, Dataset, load_data, views_of
from gradscope.errors import CheckpointError, UsageError
from gradscope.methods import Method, MethodSettings, Part, new_method
from gradscope.models import VIT_SIZES, VisionTransformer
from gradscope.recipes import recipe, small_crop_size
from gradscope.setting_checks import check_settings
from schedulers import Decay, Grid, Strategy, kept_tokens, patch_tokens, token_cost
from schedulers.counts import exact

FIRST_SETTINGS = frozenset(
    {
        "budget", "method", "data", "model", "patch", "patches", "dropouts", "batch_size", "lr", "weight_decay",
        "warmup", "decay", "decay_alpha", "head_hidden", "head_width", "temperature", "momentum", "freeze_patch_embed",
        "checkpoints", "evaluations", "seed",
    }
)  # fmt: skip
"""Those of the first version; the defaults of later ones stand for what it did, and must not change."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that fixes a run besides its schedule; plain values, kept in every checkpoint.

    The defaults are the demo's: MoCo-v3's constants, with a learning rate, batch and heads that suit its small model
    (the rate is tuned for its unaccelerated run). `for_run` starts from the published recipe of a method and model.

    - `budget` in units. `method`: mocov3, simclr, dino. `data`: a name, or the path of an image folder, whose images
      are brought to `image_size` pixels (0: the data's own size, 224 for a folder).
    - `model`: demo, tiny, small, base; `width`, `depth`, `heads` and `mlp_ratio` where they are to be others than the
      model's own (0); `positions`: sincos or learned; `drop_path`: share of skipped branches in the last block.
    - `patch`: the base patch in pixels; with dropout 0 it is the reference. `patches` and `dropouts` span the grid of
      strategies, for mixed runs and as the profile's default; no patches: all from the base patch to three times it
      that divide the image.
    - `batch_size`: samples of a step, over all ranks; `accumulate`: passes it is divided into, on every rank;
      `precision`: float32, or bf16 for autocast.
    - `lr`: learning rate at a batch of 256, scaled linearly with the batch; after `warmup`, a fraction of the budget,
      it follows `decay` to `lr_end`, which is not scaled. `weight_decay` goes to `weight_decay_end` along half a cosine
      (negative: constant), on biases and other one-dimensional parameters only if `decay_biases`. `betas` are Adam's;
      `clip`: largest norm of each parameter's gradient (0: none).
    - `head_hidden`, `head_width`: widths of the heads' layers and output; `temperature`; `momentum` of the key encoder
      or teacher at the start; `freeze_patch_embed`: the patch embedding stays a random projection.
    - DINO: `prototypes`, `fixed_norm`, `head_batchnorm`, `teacher_temperature` (from `teacher_temperature_start` over
      `teacher_temperature_warmup` of the budget), `centre_momentum`, `freeze_last_layer` (fraction of the budget),
      `small_crops` of `small_size` pixels (0: 96/224 of the image, to the nearest multiple of the patch).
    - `crop_scale`, `small_scale`: share of the image that a crop shows, as (least, most); () is the method's own.
    - `checkpoints` and `evaluations` are fractions of the budget.
    """

    budget: float
    method: str = "mocov3"
    data: str = "fashion-mnist-10k"
    image_size: int = 0
    model: str = "demo"
    width: int = 0
    depth: int = 0
    heads: int = 0
    mlp_ratio: float = 0.0
    positions: str = "sincos"
    drop_path: float = 0.0
    patch: int = 2
    patches: tuple[int, ...] = (2, 4, 7)
    dropouts: tuple[float, ...] = (0.0, 0.25, 0.5)
    batch_size: int = 64
    accumulate: int = 1
    precision: str = "float32"
    lr: float = 4e-3
    lr_end: float = 0.0
    weight_decay: float = 0.1
    weight_decay_end: float = -1.0
    decay_biases: bool = True
    betas: tuple[float, ...] = (0.9, 0.999)
    clip: float = 0.0
    warmup: float = 0.1
    decay: str = "cosine"
    decay_alpha: float = 2.0
    head_hidden: int = 256
    head_width: int = 64
    temperature: float = 0.2
    momentum: float = 0.99
    freeze_patch_embed: bool = True
    prototypes: int = 65536
    fixed_norm: bool = True
    head_batchnorm: bool = False
    teacher_temperature: float = 0.04
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup: float = 0.0
    centre_momentum: float = 0.9
    freeze_last_layer: float = 0.0
    small_crops: int = 0
    small_size: int = 0
    crop_scale: tuple[float, ...] = ()
    small_scale: tuple[float, ...] = ()
    checkpoints: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    evaluations: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self)

    def learning_rate(self, fraction: float) -> float:
        """The learning rate at a fraction of the budget."""
        base, factor = self.lr * self.batch_size / 256, self.learning_rate_decay.factor(fraction)
        if fraction < self.warmup:
            return base * factor
        return self.lr_end + (base - self.lr_end) * factor

    def weight_decay_at(self, fraction: float) -> float:
        """The weight decay at a fraction of the budget."""
        if self.weight_decay_end < 0:
            return self.weight_decay
        turn = (1 - math.cos(math.pi * min(fraction, 1.0))) / 2
        return self.weight_decay + (self.weight_decay_end - self.weight_decay) * turn

    def small_crop_size(self, image_size: int) -> int:
        """Pixels of DINO's small crops: as set, else 96/224 of the image, to the nearest multiple of the patch."""
        return self.small_size or small_crop_size(image_size, self.patch)

    def cost(self, image_size: int, strategy: Strategy) -> float:
        """Units per sample of a strategy on images of `image_size` pixels (design section 5)."""
        small = 0
        if self.small_crops:
            small = patch_tokens(self.small_crop_size(image_size), self.patch) + 1
        return token_cost(self.method, image_size, self.patch, strategy, small=small, crops=self.small_crops)

    @property
    def learning_rate_decay(self) -> Decay:
        return Decay(kind=self.decay, alpha=self.decay_alpha, warmup=self.warmup)

    @property
    def reference(self) -> Strategy:
        return Strategy(patch=self.patch, dropout=0)

    def grid(self, image_size: int) -> Grid:
        """The grid of strategies.

        Raises UsageError for a patch that does not divide the image or a dropout that keeps nothing.
        """
        patches = self.grid_patches(image_size, self.patches)
        dropouts = tuple(sorted({0.0, *self.dropouts}))
        for patch in patches:
            for dropout in dropouts:
                kept_tokens(patch_tokens(image_size, patch), dropout)
        return Grid({"patch": patches, "dropout": dropouts}, self.reference, {"patch": "pixel"})

    def grid_patches(self, image_size: int, patches: tuple[int, ...]) -> tuple[int, ...]:
        """Patches of the grid: the base patch with those given, or else with all up to three times it that fit."""
        wide = range(self.patch, min(3 * self.patch, image_size) + 1)
        return tuple(sorted({self.patch, *(patches or (p for p in wide if image_size % p == 0))}))

    @classmethod
    def for_run(cls, method: str, model: str, **values: Any) -> TrainConfig:
        """A configuration whose defaults are the recipe of `method` on `model` (`gradscope.recipes`)."""
        return cls(**{**recipe(method, model), "method": method, "model": model, **values})

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """What tells two runs apart, the same for a run when later versions have more settings.

        The settings that were there from the start, and of the later ones those that are not as they were before.
        """
        as_before = {f.name: f.default for f in dataclasses.fields(self) if f.name not in FIRST_SETTINGS}
        return {n: v for n, v in self.to_dict().items() if n not in as_before or getattr(self, n) != as_before[n]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> TrainConfig:
        """Inverse of `to_dict`. Raises UsageError naming an unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(f"{source}: unknown setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def to_toml(self, **others: str) -> str:
        """A [train] table that `gradscope --config FILE train` reads, with `others` before the settings."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in {**others, **self.to_dict()}.items()]
        return "\n".join(["[train]", *lines, ""])

    def changed(self, other: TrainConfig) -> list[str]:
        """Names of the settings in which two configurations differ."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True)
class Setting:
    """A configuration with the data it names: what training and profiling need of it."""

    config: TrainConfig
    data: Dataset
    augmentations: tuple[Augmentation, ...]

    @property
    def image_size(self) -> int:
        return self.data.image_size

    @property
    def steps_per_epoch(self) -> int:
        return self.data.train_count // self.config.batch_size

    def new_model(self) -> Method:
        """A freshly initialised method module, from the configuration's seed; torch's own stream is left alone."""
        config = self.config
        own = {name: getattr(config, name) for name in ("width", "depth", "heads", "mlp_ratio")}
        size = dataclasses.replace(VIT_SIZES[config.model], **{name: value for name, value in own.items() if value})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            backbone = VisionTransformer(
                size,
                image_size=self.image_size,
                patch=config.patch,
                channels=self.data.channels,
                positions=config.positions,
                drop_path=config.drop_path,
            )
            settings = MethodSettings(
                hidden=config.head_hidden,
                width=config.head_width,
                temperature=config.temperature,
                momentum=config.momentum,
                freeze_patch_embed=config.freeze_patch_embed,
                prototypes=config.prototypes,
                fixed_norm=config.fixed_norm,
                batchnorm=config.head_batchnorm,
                teacher_temperature=config.teacher_temperature,
                teacher_temperature_start=config.teacher_temperature_start,
                teacher_temperature_warmup=config.teacher_temperature_warmup,
                centre_momentum=config.centre_momentum,
                small_crops=config.small_crops,
                small_size=config.small_crop_size(self.image_size),
                freeze_last_layer=config.freeze_last_layer,
            )
            return new_method(config.method, backbone, settings)

    def cost(self, strategy: Strategy) -> float:
        """Units per sample of a strategy."""
        return self.config.cost(self.image_size, strategy)

    def prepare(self, indices_B: Tensor, generator: torch.Generator, part: Part | None = None) -> Any:
        """The part of making views that runs on the CPU, in any thread; `finish` does the rest."""
        rows = slice(None) if part is None else part.rows
        return self.data.prepare(indices_B, self.augmentations, generator, rows)

    def finish(self, prepared: Any, device: torch.device) -> tuple[Tensor, ...]:
        """One (B, C, S, S) float tensor per view, on `device`."""
        return self.data.finish(prepared, device)

    def views(
        self, indices_B: Tensor, generator: torch.Generator, device: torch.device, part: Part | None = None
    ) -> tuple[Tensor, ...]:
        """Augmented views of training images `indices_B`: one (B, C, S, S) float tensor per view, on `device`.

        Of `part` of the batch alone, where one is given, the same views as the whole batch has there.
        """
        return self.finish(self.prepare(indices_B, generator, part), device)

    def shuffled(self, epoch: int, seed: int) -> Tensor:
        """A permutation of the training images (N), a function of epoch and seed alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(self.data.train_count, generator=generator)


def open_setting(config: TrainConfig, data_folder: Path | None = None) -> Setting:
    """Load the data that `config` names.

    Raises DataError when it is not found, UsageError when the batch is larger than it.
    """
    data = load_data(config.data, data_folder, image_size=config.image_size or None)
    if config.batch_size > data.train_count:
        raise UsageError(
            f"batch_size {config.batch_size} is larger than the {data.train_count} images of {config.data}"
        )
    config = _fitted(config, data.image_size)
    config.grid(data.image_size)
    small = config.small_crop_size(data.image_size) if config.small_crops else None
    if small is not None:
        patch_tokens(small, config.patch)  # refuses crops that the patch does not divide
    augmentations = views_of(
        config.method,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        channels=data.channels,
        crop_scale=_pair(config.crop_scale),
        small_size=small,
        small_count=config.small_crops,
        small_scale=_pair(config.small_scale),
    )
    return Setting(config, data, augmentations)


def _fitted(config: TrainConfig, image_size: int) -> TrainConfig:
    """The configuration without those values of the recipe's own grid that do not fit images of this size."""
    usual = TrainConfig.for_run(config.method, config.model, budget=config.budget)
    patches, dropouts = config.patches, config.dropouts
    if patches == usual.patches:
        patches = tuple(p for p in patches if image_size % p == 0 and p >= config.patch)
    if dropouts == usual.dropouts and image_size % config.patch == 0:
        widest = max(config.grid_patches(image_size, patches))
        tokens = (image_size // widest) ** 2
        dropouts = tuple(d for d in dropouts if tokens * (1 - exact(d)) >= 1)
    return dataclasses.replace(config, patches=patches, dropouts=dropouts)


def config_of(checkpoint: Mapping[str, Any], path: Path) -> TrainConfig:
    """The configuration a checkpoint was trained with. Raises CheckpointError when it is not understood."""
    try:
        return TrainConfig.from_dict(checkpoint["config"], source=str(path))
    except (UsageError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration is not understood ({error})") from error


def _pair(scale: tuple[float, ...]) -> tuple[float, float] | None:
    return (scale[0], scale[1]) if scale else None
