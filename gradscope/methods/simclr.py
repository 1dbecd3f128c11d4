"""SimCLR on a ViT: two views through one encoder, gradient through both.

Shapes: B image, F feature of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradscope.methods.base import Method, Part, Views
from gradscope.methods.contrastive import nt_xent_losses
from gradscope.models import VisionTransformer
from schedulers import Strategy


class SimCLR(Method):
    """One encoder with a projector. Both views lose tokens and use the strategy's patch (paper, section 6.4)."""

    name = "simclr"
    two_sided = True

    def __init__(self, backbone: VisionTransformer, projector: nn.Module, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature
        self.backbone, self.projector = backbone, projector

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
        """The NT-Xent term of every image, (B): of its two views as anchors, against all views of all images.

        Each view drops tokens of its own. The head's BatchNorm sees the two views one after the other, each a batch.
        """
        first_BF, second_BF = (self.projector(self.features(view, strategy, generator, part)) for view in views)
        return nt_xent_losses(first_BF, second_BF, self.temperature, self.ranks)
