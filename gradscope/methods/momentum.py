"""Averages of a network's parameters over training: the key encoder of MoCo-v3, the teacher of DINO."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def momentum_at(fraction: float, base: float) -> float:
    """Momentum at a fraction of the budget: from `base` to 1 along half a cosine."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


def frozen_copy(module: Module) -> Module:
    """A copy whose parameters take no gradient; buffers (BatchNorm statistics) are its own."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_average(slow: nn.Module, online: nn.Module, momentum: float) -> None:
    """slow <- momentum slow + (1 - momentum) online, over the parameters; buffers stay as they are."""
    targets: list[Tensor] = list(slow.parameters())
    torch._foreach_lerp_(targets, list(online.parameters()), 1 - momentum)
