"""The settings of a pre-training run, and the objects they stand for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradscope.data import Augmentation, ImageData, augment, load_data, mocov3_views
from gradscope.errors import CheckpointError, UsageError
from gradscope.methods import MoCoV3, MoCoV3Config
from gradscope.models import VIT_SIZES
from schedulers import METHOD_FORMULAS, Decay, Grid, Strategy, kept_tokens, patch_tokens

METHODS = ("mocov3",)
PUBLISHED = {"lr": 1.5e-4, "head_hidden": 4096, "head_width": 256}  # MoCo-v3's for ViT-S and ViT-B


@dataclass(frozen=True)
class TrainConfig:
    """Everything that fixes a run besides its schedule; plain values, kept in every checkpoint.

    `budget` is in units. `patch` is the base patch in pixels: with dropout 0 it is the reference.
    `patches` and `dropouts` span the grid of strategies, for mixed runs and as the profile's default.
    `lr` is the learning rate at a batch of 256, scaled linearly with the batch. `warmup` is a fraction of
    the budget. `checkpoints` and `evaluations` are fractions of the budget. The recipe's constants
    (weight decay, temperature, momentum, frozen patch embedding) default to MoCo-v3's; learning rate, batch
    and heads to what suits the demo's small model (the rate is tuned for its unaccelerated run). For the
    published sizes start from `for_model`.
    """

    budget: float
    method: str = "mocov3"
    data: str = "fashion-mnist-10k"
    model: str = "demo"
    patch: int = 2
    patches: tuple[int, ...] = (2, 4, 7)
    dropouts: tuple[float, ...] = (0.0, 0.25, 0.5)
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.1
    warmup: float = 0.1
    decay: str = "cosine"
    decay_alpha: float = 2.0
    head_hidden: int = 256
    head_width: int = 64
    temperature: float = 0.2
    momentum: float = 0.99
    freeze_patch_embed: bool = True
    checkpoints: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    evaluations: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), self.__annotations__[field.name])
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            extra = " (its costs are known, its training is not)" if self.method in METHOD_FORMULAS else ""
            raise UsageError(f"method {self.method!r} cannot be trained{extra}; the methods are {known}")
        if self.model not in VIT_SIZES:
            raise UsageError(f"unknown model {self.model!r}; the models are {', '.join(VIT_SIZES)}")
        if not self.budget > 0:
            raise UsageError(f"budget {self.budget!r} must be a positive number of units, such as 300K")
        for name, low in (("batch_size", 2), ("head_hidden", 1), ("head_width", 1), ("patch", 1)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be at least {low}")
        for name in ("lr", "temperature"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be positive")
        if self.weight_decay < 0:
            raise UsageError(f"weight_decay is {self.weight_decay!r}; it must be at least 0")
        for name in ("checkpoints", "evaluations", "momentum"):
            values = getattr(self, name)
            if any(not 0 <= point <= 1 for point in (values if isinstance(values, tuple) else (values,))):
                raise UsageError(f"{name}: {values} must lie in [0, 1]")
        Decay(kind=self.decay, alpha=self.decay_alpha, warmup=self.warmup)

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
        patches = tuple(sorted({self.patch, *self.patches}))
        dropouts = tuple(sorted({0.0, *self.dropouts}))
        for patch in patches:
            for dropout in dropouts:
                kept_tokens(patch_tokens(image_size, patch), dropout)
        return Grid({"patch": patches, "dropout": dropouts}, self.reference, {"patch": "pixel"})

    @classmethod
    def for_model(cls, model: str, **values: Any) -> TrainConfig:
        """A configuration whose defaults suit `model`: the published learning rate and heads for all but the demo's."""
        return cls(model=model, **{**({} if model == "demo" else PUBLISHED), **values})

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "configuration") -> TrainConfig:
        """Inverse of `to_dict`. Raises UsageError naming an unknown key."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UsageError(f"{source}: unknown setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def changed(self, other: TrainConfig) -> list[str]:
        """Names of the settings in which two configurations differ."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]


def _check_type(name: str, value: object, annotation: str) -> None:
    """Raise UsageError unless `value` is what the annotation of a setting says; a whole number counts as a float."""
    inner = annotation.removeprefix("tuple[").removesuffix(", ...]")
    kinds: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "str": (str,), "bool": (bool,)}
    items = value if inner != annotation and isinstance(value, tuple) else (value,)
    right = inner == annotation or isinstance(value, tuple)
    for item in items:
        finite = not isinstance(item, float) or math.isfinite(item)
        right = right and isinstance(item, kinds[inner]) and finite and (inner == "bool" or not isinstance(item, bool))
    if not right:
        words = {"float": "a number", "int": "a whole number", "str": "a text", "bool": "True or False"}
        raise UsageError(
            f"{name} is {value!r}; it must be {'several of: ' if inner != annotation else ''}{words[inner]}"
        )


@dataclass(frozen=True)
class Setting:
    """A configuration with the data it names: what training and profiling need of it."""

    config: TrainConfig
    data: ImageData
    augmentations: tuple[Augmentation, ...]

    @property
    def image_size(self) -> int:
        return int(self.data.train_images.shape[-1])

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train_images) // self.config.batch_size

    def new_model(self) -> MoCoV3:
        """A freshly initialised method module, from the configuration's seed; torch's own stream is left alone."""
        config = self.config
        method = MoCoV3Config(
            temperature=config.temperature,
            momentum=config.momentum,
            head_hidden=config.head_hidden,
            head_width=config.head_width,
            freeze_patch_embed=config.freeze_patch_embed,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return MoCoV3(
                method,
                VIT_SIZES[config.model],
                image_size=self.image_size,
                patch=config.patch,
                channels=int(self.data.train_images.shape[1]),
            )

    def views(self, indices: Tensor, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        """Augmented views of training images `indices` (B): one (B, C, S, S) float tensor per view, on `device`."""
        images_BCSS = self.data.train_images[indices].to(device)
        return tuple(augment(images_BCSS, augmentation, generator) for augmentation in self.augmentations)

    def shuffled(self, epoch: int, seed: int) -> Tensor:
        """A permutation of the training images (N), a function of epoch and seed alone."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data.train_images), generator=generator)


def open_setting(config: TrainConfig, data_folder: Path | None = None) -> Setting:
    """Load the data that `config` names.

    Raises DataError when it is not found, UsageError when the batch is larger than it.
    """
    data = load_data(config.data, data_folder)
    if config.batch_size > len(data.train_images):
        raise UsageError(
            f"batch_size {config.batch_size} is larger than the {len(data.train_images)} images of {config.data}"
        )
    size, channels = int(data.train_images.shape[-1]), int(data.train_images.shape[1])
    config.grid(size)
    return Setting(config, data, mocov3_views(size, data.mean, data.std, channels))


def config_of(checkpoint: Mapping[str, Any], path: Path) -> TrainConfig:
    """The configuration a checkpoint was trained with. Raises CheckpointError when it is not understood."""
    try:
        return TrainConfig.from_dict(checkpoint["config"], source=str(path))
    except (UsageError, TypeError) as error:
        raise CheckpointError(f"{path}: its configuration is not understood ({error})") from error
