"""A method with freshly initialised parts, from plain settings."""

from __future__ import annotations

from dataclasses import dataclass

from gradscope.errors import UsageError
from gradscope.methods.base import Method
from gradscope.methods.dino import DINO
from gradscope.methods.heads import dino_head, mlp_head, simclr_head
from gradscope.methods.mocov3 import MoCoV3
from gradscope.methods.simclr import SimCLR
from gradscope.models import VisionTransformer

METHODS: dict[str, type[Method]] = {"mocov3": MoCoV3, "simclr": SimCLR, "dino": DINO}
"""The methods by name."""


@dataclass(frozen=True)
class MethodSettings:
    """What the heads and the loss of a method are made of; a method reads those that it has.

    `hidden`, `width`: of the head's layers and its output (DINO: of the bottleneck before the prototypes).
    `temperature`: of the contrastive loss, or of DINO's student. `momentum`: of the key encoder or teacher, at the
    start. `freeze_patch_embed`: the patch embedding stays a random projection (MoCo-v3's `stop-grad-conv1`).
    """

    hidden: int
    width: int
    temperature: float
    momentum: float
    freeze_patch_embed: bool
    prototypes: int = 65536
    fixed_norm: bool = True
    batchnorm: bool = False
    teacher_temperature: float = 0.04
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup: float = 0.0
    centre_momentum: float = 0.9
    small_crops: int = 0
    small_size: int = 96
    freeze_last_layer: float = 0.0


def new_method(name: str, backbone: VisionTransformer, settings: MethodSettings) -> Method:
    """The method called `name` on a backbone, its heads drawn from torch's random stream.

    Raises UsageError for an unknown name.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; the methods are {', '.join(METHODS)}")
    s, width = settings, backbone.width
    if s.freeze_patch_embed:
        backbone.patch_embed.requires_grad_(False)
    if name == "simclr":
        return SimCLR(backbone, simclr_head(width, hidden=s.hidden, width_out=s.width), temperature=s.temperature)
    if name == "mocov3":
        projector = mlp_head(width, layers=3, hidden=s.hidden, width_out=s.width)
        predictor = mlp_head(s.width, layers=2, hidden=s.hidden, width_out=s.width)
        return MoCoV3(backbone, projector, predictor, temperature=s.temperature, momentum=s.momentum)
    return DINO(
        backbone,
        dino_head(
            width,
            hidden=s.hidden,
            bottleneck=s.width,
            prototypes=s.prototypes,
            fixed_norm=s.fixed_norm,
            batchnorm=s.batchnorm,
        ),
        student_temperature=s.temperature,
        teacher_temperature=s.teacher_temperature,
        teacher_temperature_start=s.teacher_temperature_start,
        teacher_temperature_warmup=s.teacher_temperature_warmup,
        centre_momentum=s.centre_momentum,
        momentum=s.momentum,
        small_crops=s.small_crops,
        small_size=s.small_size,
        freeze_last_layer=s.freeze_last_layer,
    )
