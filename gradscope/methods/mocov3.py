"""MoCo-v3 with the non-symmetric loss of the paper: one query view, one key view.

Everything that training does besides the loss (the momentum update) stands outside the loss, so that
a profiler may call the loss as often as it likes.

Shapes: B image, S image side, F feature of the head, K kept token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope.methods.heads import mlp_head
from gradscope.models import VisionTransformer, ViTSize, random_keep
from schedulers import Strategy, patch_tokens, token_cost


def contrastive_losses(query_BF: Tensor, key_BF: Tensor, temperature: float) -> Tensor:
    """InfoNCE of MoCo-v3, one term per query (B): cross-entropy of q.k/T over the batch's keys, times 2T.

    Both inputs are L2-normalised here; image b's positive is key b, its negatives the other keys. No
    gradient should flow into `key_BF`: pass it detached. The factor 2T keeps gradients comparable
    over temperatures (Chen, Xie, He 2021, algorithm 1).
    """
    query_BF = F.normalize(query_BF, dim=1)
    key_BF = F.normalize(key_BF, dim=1)
    logits_BB = query_BF @ key_BF.T / temperature
    labels_B = torch.arange(len(query_BF), device=query_BF.device)
    return F.cross_entropy(logits_BB, labels_B, reduction="none") * (2 * temperature)


def contrastive_loss(query_BF: Tensor, key_BF: Tensor, temperature: float) -> Tensor:
    """Mean of `contrastive_losses`, a scalar."""
    return contrastive_losses(query_BF, key_BF, temperature).mean()


def momentum_at(fraction: float, base: float) -> float:
    """Momentum of the key encoder at a fraction of the budget: from `base` to 1 along half a cosine."""
    return 1 - (1 - base) * (1 + math.cos(math.pi * min(fraction, 1.0))) / 2


@dataclass(frozen=True)
class MoCoV3Config:
    """Settings of MoCo-v3 on a ViT; the defaults are the published recipe's.

    `freeze_patch_embed`: the patch embedding stays a random projection (the recipe's `stop-grad-conv1`).
    """

    temperature: float = 0.2
    momentum: float = 0.99
    head_hidden: int = 4096
    head_width: int = 256
    freeze_patch_embed: bool = True


class MoCoV3(nn.Module):
    """Query encoder with projector and predictor, and the momentum copy of encoder and projector.

    The momentum copies take no gradient; their BatchNorm statistics are their own.
    """

    name = "mocov3"
    views = 2

    def __init__(self, config: MoCoV3Config, size: ViTSize, *, image_size: int, patch: int, channels: int) -> None:
        super().__init__()
        self.config = config

        def encoder() -> VisionTransformer:
            return VisionTransformer(size, image_size=image_size, patch=patch, channels=channels)

        def projector() -> nn.Sequential:
            return mlp_head(size.width, layers=3, hidden=config.head_hidden, width_out=config.head_width)

        self.backbone, self.projector = encoder(), projector()
        self.predictor = mlp_head(config.head_width, layers=2, hidden=config.head_hidden, width_out=config.head_width)
        if config.freeze_patch_embed:
            self.backbone.patch_embed.requires_grad_(False)
        self.momentum_backbone, self.momentum_projector = encoder(), projector()
        self.momentum_backbone.load_state_dict(self.backbone.state_dict())
        self.momentum_projector.load_state_dict(self.projector.state_dict())
        self.momentum_backbone.requires_grad_(False)
        self.momentum_projector.requires_grad_(False)

    def loss(
        self,
        views: tuple[Tensor, Tensor],
        strategy: Strategy,
        generator: torch.Generator,
        *,
        key_BF: Tensor | None = None,
    ) -> Tensor:
        """Mean loss of a batch under `strategy`, a scalar; arguments as those of `losses`."""
        return self.losses(views, strategy, generator, key_BF=key_BF).mean()

    def losses(
        self,
        views: tuple[Tensor, Tensor],
        strategy: Strategy,
        generator: torch.Generator,
        *,
        key_BF: Tensor | None = None,
    ) -> Tensor:
        """The loss term of every query under `strategy`, (B).

        `views`: query and key view, each (B, C, S, S) float. The query drops `strategy["dropout"]` of its
        tokens, the key none; both use `strategy["patch"]` (what the paper found best, its tables 2a to 2c).
        Masks come from `generator`. `key_BF`: what `keys` gave for this key view and patch, if known. BatchNorm
        statistics of the heads are updated as in any forward pass.
        """
        query_BCSS, key_BCSS = views
        patch, dropout = int(strategy.number("patch")), strategy.number("dropout")
        keep_BK = None
        if dropout:
            tokens = patch_tokens(self.backbone.image_size, patch)
            keep_BK = random_keep(len(query_BCSS), tokens, dropout, generator, query_BCSS.device)
        query_BF = self.predictor(self.projector(self.backbone(query_BCSS, patch=patch, keep_BK=keep_BK)))
        if key_BF is None:
            key_BF = self.keys(key_BCSS, patch)
        return contrastive_losses(query_BF, key_BF, self.config.temperature)

    @torch.no_grad()
    def keys(self, key_BCSS: Tensor, patch: int) -> Tensor:
        """The momentum encoder's features (B, F) of a key view; they carry no gradient."""
        key_BF: Tensor = self.momentum_projector(self.momentum_backbone(key_BCSS, patch=patch))
        return key_BF

    def cost(self, strategy: Strategy) -> float:
        """Units per image: (3 L_q + L_k) / L_base with integer token counts, class token included (design 5)."""
        return token_cost(self.name, self.backbone.image_size, self.backbone.patch, strategy)

    @torch.no_grad()
    def update_momentum(self, fraction: float) -> None:
        """Move the key encoder towards the query encoder; `fraction` of the budget sets the momentum.

        The recipe does this between the query's and the key's pass; calling it before the loss is the same,
        for the query's pass does not read the key encoder.
        """
        online: list[Tensor] = [*self.backbone.parameters(), *self.projector.parameters()]
        slow: list[Tensor] = [*self.momentum_backbone.parameters(), *self.momentum_projector.parameters()]
        torch._foreach_lerp_(slow, online, 1 - momentum_at(fraction, self.config.momentum))
