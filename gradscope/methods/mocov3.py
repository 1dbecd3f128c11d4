"""MoCo-v3 with the non-symmetric loss of the paper: one query view, one key view.

Everything that training does besides the loss (the momentum update) stands outside the loss, so that
a profiler may call the loss as often as it likes.

Shapes: B image, S image side, F feature of the head.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from gradscope.methods.base import Method, Part, Views
from gradscope.methods.contrastive import contrastive_losses
from gradscope.methods.momentum import frozen_copy, momentum_at, update_average
from gradscope.models import VisionTransformer
from schedulers import Strategy


class MoCoV3(Method):
    """Query encoder with projector and predictor, and the momentum copy of encoder and projector.

    The query drops `strategy["dropout"]` of its tokens, the key none; both use `strategy["patch"]` (what the paper
    found best, its tables 2a to 2c). `temperature` and `momentum` default to the published recipe's. The momentum
    copies take no gradient; their BatchNorm statistics are their own.
    """

    name = "mocov3"

    def __init__(
        self,
        backbone: VisionTransformer,
        projector: nn.Module,
        predictor: nn.Module,
        *,
        temperature: float = 0.2,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.backbone, self.projector, self.predictor = backbone, projector, predictor
        self.momentum_backbone, self.momentum_projector = frozen_copy(backbone), frozen_copy(projector)

    def losses(
        self,
        views: Views,
        strategy: Strategy,
        generator: torch.Generator,
        *,
        targets: Tensor | None = None,
        fraction: float = 1.0,
        part: Part | None = None,
    ) -> Tensor:
        """InfoNCE of every query, (B); `views`: query and key view. BatchNorm statistics of the heads are updated.

        With a `part` of a rank's share of the batch `targets` are the keys of this part, or of the whole share.
        """
        query_BF = self.predictor(self.projector(self.features(views[0], strategy, generator, part)))
        key_BF = self.targets(views, strategy) if targets is None else targets
        first = 0 if part is None else part.start % len(key_BF)  # keys may be those of a rank's whole share
        return contrastive_losses(query_BF, key_BF, self.temperature, self.ranks, first=first)

    @torch.no_grad()
    def targets(self, views: Views, strategy: Strategy) -> Tensor:
        """The momentum encoder's features (B, F) of the key view; they carry no gradient."""
        key_BF: Tensor = self.momentum_projector(self.momentum_backbone(views[1], patch=int(strategy.number("patch"))))
        return key_BF

    def target_key(self, strategy: Strategy) -> Hashable:
        return int(strategy.number("patch"))

    def before_step(self, fraction: float) -> None:
        """Move the key encoder towards the query encoder; `fraction` of the budget sets the momentum.

        The recipe does this between the query's and the key's pass; doing it before the loss is the same, for the
        query's pass does not read the key encoder.
        """
        momentum = momentum_at(fraction, self.momentum)
        update_average(self.momentum_backbone, self.backbone, momentum)
        update_average(self.momentum_projector, self.projector, momentum)
