"""Self-supervised methods: losses, heads, momentum; each usable without the trainer."""

from gradscope.methods.base import Method, Part, Views
from gradscope.methods.build import METHODS, MethodSettings, new_method
from gradscope.methods.contrastive import contrastive_loss, contrastive_losses, nt_xent_loss, nt_xent_losses
from gradscope.methods.dino import DINO
from gradscope.methods.distillation import distillation_losses, moved_centre, teacher_temperature_at
from gradscope.methods.heads import DINOHead, PrototypeLayer, dino_head, mlp_head, simclr_head
from gradscope.methods.mocov3 import MoCoV3
from gradscope.methods.momentum import frozen_copy, momentum_at, update_average
from gradscope.methods.norm import BatchNorm1d
from gradscope.methods.simclr import SimCLR

__all__ = [
    "DINO",
    "METHODS",
    "BatchNorm1d",
    "DINOHead",
    "Method",
    "MethodSettings",
    "MoCoV3",
    "Part",
    "PrototypeLayer",
    "SimCLR",
    "Views",
    "contrastive_loss",
    "contrastive_losses",
    "dino_head",
    "distillation_losses",
    "frozen_copy",
    "mlp_head",
    "momentum_at",
    "moved_centre",
    "new_method",
    "nt_xent_loss",
    "nt_xent_losses",
    "simclr_head",
    "teacher_temperature_at",
    "update_average",
]
