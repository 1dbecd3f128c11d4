"""The value that a checkpoint of another code base becomes, whatever its layout was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gradscope.foreign.moments import Moments

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class ForeignCheckpoint:
    """A model's tensors in timm's names and what its file tells about the run.

    - `layout`: which code base wrote it, for people.
    - `method`: mocov3, simclr or dino where the file holds all that the loss needs, else None; `lacking` says what not.
    - `backbone`, `momentum_backbone`: by timm's names, complete.
    - `heads`: tensors by role: projector, predictor, momentum_projector, or head, momentum_head.
    - `centre`: DINO's, (1, K). `moments`: Adam's v and its 1 - beta2^t by the names of the method's parameters.
    - `epoch`: epochs completed; `total_epochs` of the run; `step`: optimizer steps; None where the file cannot tell.
    - `heads_count`: attention heads by the code base's rule, or, with `heads_told`, by something that names the model.
    - `norm_eps`: of all LayerNorms.
    - `frozen_patch_embed`: the patch embedding was not trained.
    - `settings` of the recipe, by the names of the layouts' own arguments.
    - `leftovers`: names of tensors that were not used. `notes`: what people should know.
    """

    path: Path
    layout: str
    method: str | None
    backbone: Tensors
    momentum_backbone: Tensors | None = None
    heads: Mapping[str, Tensors] = field(default_factory=dict)
    centre: Tensor | None = None
    moments: Moments | None = None
    epoch: float | None = None
    total_epochs: float | None = None
    step: int | None = None
    heads_count: int | None = None
    heads_told: bool = False
    norm_eps: float = 1e-6
    frozen_patch_embed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    leftovers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    lacking: str = "the file holds a backbone alone, without the heads that the loss needs"

    @property
    def second_moment(self) -> Tensors | None:
        """Adam's bias-corrected second moment v / (1 - beta2^t) by the names of the method's parameters."""
        if self.moments is None:
            return None
        return {name: v.float() / correction for name, (v, correction) in self.moments.items()}

    @property
    def outline(self) -> ForeignCheckpoint:
        """The same with no tensor in memory: shapes of the backbone, and what the file tells about the run."""
        shapes = {name: value.to("meta") for name, value in self.backbone.items()}
        return replace(self, backbone=shapes, momentum_backbone=None, heads={}, centre=None, moments=None)
