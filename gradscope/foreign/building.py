"""A method of the bundled trainer out of a foreign checkpoint: its backbone, its heads, its loss, loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.config import TrainConfig
from gradscope.errors import CheckpointError, UsageError
from gradscope.foreign.architecture import Architecture, architecture_of, backbone_module, fitted
from gradscope.foreign.checkpoint import ForeignCheckpoint
from gradscope.foreign.heads import dino_head_of, sequence_of
from gradscope.foreign.values import number_in
from gradscope.methods import DINO, METHODS, Method, MethodSettings, MoCoV3, SimCLR, new_method
from gradscope.recipes import small_crop_size

SMALL_CROPS = 8  # of DINO's recipe
PUBLISHED_WIDTH = 192  # of ViT-Ti, the narrowest model with published heads


@dataclass(frozen=True)
class Blueprint:
    """What is the same for all checkpoints of a run: the loss, the backbone's shape, the recipe's numbers.

    `image_size`: pixels of the images to profile with. `fresh_heads`: the loss is not the checkpoint's own, its heads
    are drawn from `seed`. `settings`: arguments of the method's constructor. `crop_scale`, `small_scale`: of its views.
    """

    method: str
    architecture: Architecture
    image_size: int
    fresh_heads: bool
    settings: Mapping[str, Any]
    crop_scale: tuple[float, float] | None = None
    small_scale: tuple[float, float] | None = None
    seed: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def small_crops(self) -> int:
        return int(self.settings.get("small_crops", 0))


def blueprint_of(
    checkpoint: ForeignCheckpoint,
    *,
    heads: int | None = None,
    loss: str | None = None,
    image_size: int | None = None,
    total_epochs: float | None = None,
    seed: int = 0,
) -> Blueprint:
    """How to build the method of a checkpoint.

    `loss`: profile under this one; where it is not the checkpoint's own, heads are fresh. `total_epochs`: for DINO's
    warm-up of the teacher's temperature. Raises UsageError for a checkpoint that cannot give a loss of its own where
    none is chosen, and what `architecture_of` raises.
    """
    if loss is not None and loss not in METHODS:
        raise UsageError(f"--loss {loss!r}: unknown; the losses are {', '.join(METHODS)}")
    method = loss or checkpoint.method
    if method is None:
        raise UsageError(
            f"{checkpoint.path}: a {checkpoint.layout} checkpoint cannot give the loss it was trained under: "
            f"{checkpoint.lacking}; --loss {'|'.join(METHODS)} profiles it under that loss, with fresh heads where it "
            "has none"
        )
    architecture = architecture_of(checkpoint, heads)
    size = architecture.image_size if image_size is None else image_size
    if size < 1 or size % architecture.patch:
        raise UsageError(f"--image-size {size}: not a multiple of the model's patch of {architecture.patch} pixels")
    fresh = method != checkpoint.method
    warnings = list(architecture.warnings)
    if fresh:
        warnings.append(
            f"the heads of {method} are freshly initialised (seed {seed}): gradients are those of a loss that this "
            f"{checkpoint.layout} run never had, not of its own training"
        )
    if size != architecture.image_size:
        warnings.append(
            f"the position table of {architecture.image_size} pixels is resampled to {size}, which the run never saw"
        )
    own = {} if fresh else checkpoint.settings
    settings = _settings(method, own, architecture.patch, size, total_epochs)
    if method == "dino" and number_in(own, "local_crops_number") is None:
        warnings.append(f"{SMALL_CROPS} small crops, the recipe's number: the file does not tell it")
    crops = _range(own, "global_crops_scale"), _range(own, "local_crops_scale")
    return Blueprint(method, architecture, size, fresh, settings, *crops, seed, tuple(warnings))


def build(checkpoint: ForeignCheckpoint, blueprint: Blueprint) -> Method:
    """The method with the checkpoint's tensors, on the CPU, in training mode.

    All of the method's tensors come from the file, but for fresh heads and for DINO's centre where it has none (then
    zero). Raises CheckpointError, naming tensors, where they do not fit.
    """
    backbone = backbone_module(blueprint.architecture, blueprint.image_size)
    if checkpoint.frozen_patch_embed:
        backbone.patch_embed.requires_grad_(False)
    method, state = _fresh(backbone, blueprint) if blueprint.fresh_heads else _own(checkpoint, backbone, blueprint)
    side = backbone.image_size // backbone.patch
    own = fitted(checkpoint.backbone, side)
    slow = fitted(checkpoint.momentum_backbone, side) if checkpoint.momentum_backbone else own
    state |= {f"backbone.{name}": value for name, value in own.items()}
    if hasattr(method, "momentum_backbone"):
        state |= {f"momentum_backbone.{name}": value for name, value in slow.items()}
    try:
        method.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"{checkpoint.path}: its tensors do not fit together: {why}") from error
    return method.train()


def _own(checkpoint: ForeignCheckpoint, backbone: nn.Module, blueprint: Blueprint) -> tuple[Method, dict[str, Tensor]]:
    """The method with modules as the file's tensors ask for, and the state dict of its heads."""
    heads, path, state = checkpoint.heads, checkpoint.path, dict[str, Tensor]()
    modules: dict[str, nn.Module] = {}
    fixed_norm = checkpoint.settings.get("norm_last_layer")
    for role, tensors in heads.items():
        if role in ("head", "momentum_head"):
            modules[role], own = dino_head_of(tensors, path, fixed_norm if isinstance(fixed_norm, bool) else None)
        else:
            modules[role], own = sequence_of(tensors, nn.ReLU, path, role)
        state |= {f"{role}.{name}": value for name, value in own.items()}
    settings = blueprint.settings
    method: Method
    if blueprint.method == "mocov3":
        method = MoCoV3(backbone, modules["projector"], modules["predictor"], **settings)  # type: ignore[arg-type]
    elif blueprint.method == "simclr":
        method = SimCLR(backbone, modules["projector"], **settings)  # type: ignore[arg-type]
    else:
        method = DINO(backbone, modules["head"], **settings)  # type: ignore[arg-type]
        state["centre"] = method.centre if checkpoint.centre is None else checkpoint.centre.float()
    return method, state


def _fresh(backbone: nn.Module, blueprint: Blueprint) -> tuple[Method, dict[str, Tensor]]:
    """The method with heads of the published sizes (the demo's for narrow models), and the heads' state dict."""
    model = "small" if blueprint.architecture.size.width >= PUBLISHED_WIDTH else "demo"
    config = TrainConfig.for_run(blueprint.method, model, budget=1.0)
    settings = MethodSettings(
        hidden=config.head_hidden, width=config.head_width, temperature=config.temperature, momentum=config.momentum,
        freeze_patch_embed=False, prototypes=config.prototypes, fixed_norm=config.fixed_norm,
        small_crops=blueprint.small_crops, small_size=int(blueprint.settings.get("small_size", 0)),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(blueprint.seed)
        method = new_method(blueprint.method, backbone, settings)  # type: ignore[arg-type]
    outside = ("backbone.", "momentum_backbone.")
    return method, {name: value for name, value in method.state_dict().items() if not name.startswith(outside)}


def _settings(
    method: str, own: Mapping[str, Any], patch: int, image_size: int, total_epochs: float | None
) -> dict[str, Any]:
    """Arguments of the method's constructor: those that the file tells, else the recipe's."""
    if method != "dino":
        temperature = number_in(own, "temperature")
        return {} if not temperature else {"temperature": temperature}
    names = {
        "student_temperature": ("student_temperature", "student_temp"),
        "teacher_temperature": ("teacher_temperature", "teacher_temp"),
        "teacher_temperature_start": ("warmup_teacher_temperature", "warmup_teacher_temp"),
    }
    found: dict[str, Any] = {ours: number for ours, theirs in names.items() if (number := number_in(own, *theirs))}
    warmup = number_in(own, "warmup_teacher_temperature_epochs", "warmup_teacher_temp_epochs")
    if warmup and total_epochs:
        found["teacher_temperature_warmup"] = min(warmup / total_epochs, 1.0)
    crops = number_in(own, "local_crops_number")
    found["small_crops"] = SMALL_CROPS if crops is None else int(crops)
    found["small_size"] = small_crop_size(image_size, patch)
    return found


def _range(own: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    value = own.get(name)
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(bound, int | float) for bound in value):
        return float(value[0]), float(value[1])
    return None
