"""What every pre-training method is: a module whose loss under a strategy stands apart from what training does besides.

Shapes: B image, S image side, C channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradscope.methods.norm import BatchNorm1d
from gradscope.models import VisionTransformer, random_keep
from gradscope.ranks import ALONE, Ranks
from schedulers import Strategy, TokenCounts, patch_tokens, token_cost, token_counts

Views = Sequence[Tensor]
"""The augmented views of a batch, each (B, C, S, S) float."""


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of a batch of `total` images: a rank's share, or one of several passes.

    Random numbers are drawn for the whole batch, so that an image's do not depend on how the batch is divided.
    """

    start: int
    stop: int
    total: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @classmethod
    def whole(cls, count: int) -> Part:
        return cls(0, count, count)


class Method(nn.Module, ABC):
    """A self-supervised method on a ViT backbone.

    One training step is `before_step(f)`, `t = targets(views, strategy)`, `loss(views, strategy, generator, targets=t,
    fraction=f)` with its backward pass and the optimizer's step, `after_step(f, t)`, f being the fraction of the
    budget that is spent. A profiler calls `targets` and `loss` alone, as often as it likes: they change nothing but the
    running statistics of BatchNorm.

    `independent_terms`: False where the loss terms of a batch share negatives. `two_sided`: whether gradient flows into
    the negatives, too, so that the loss of a batch cannot be had in parts. `ranks`: those that train together, set by
    `train_on`; every rank then gets its share of the batch's views.
    """

    name: ClassVar[str]
    independent_terms: ClassVar[bool] = False
    two_sided: ClassVar[bool] = False
    backbone: VisionTransformer

    def __init__(self) -> None:
        super().__init__()
        self.ranks: Ranks = ALONE

    @property
    def evaluated(self) -> VisionTransformer:
        """The backbone whose features are evaluated."""
        return self.backbone

    @abstractmethod
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
        """The loss term of every image under `strategy`, (B).

        Kept tokens and skipped branches come from `generator`, a CPU generator. `targets`: what `targets` gave for
        these views, computed here where it is not given. `fraction` of the budget spent: for what a method changes
        over training besides its parameters. `part`: which rows of the batch these views are, by default all.
        """

    def loss(
        self,
        views: Views,
        strategy: Strategy,
        generator: torch.Generator,
        *,
        targets: Tensor | None = None,
        fraction: float = 1.0,
        part: Part | None = None,
    ) -> Tensor:
        """Mean of `losses`, a scalar."""
        return self.losses(views, strategy, generator, targets=targets, fraction=fraction, part=part).mean()

    def forward(
        self,
        views: Views,
        strategy: Strategy,
        generator: torch.Generator,
        targets: Tensor | None,
        fraction: float,
        part: Part | None,
    ) -> Tensor:
        """`loss`, for wrappers that only know how to call a module."""
        return self.loss(views, strategy, generator, targets=targets, fraction=fraction, part=part)

    def targets(self, views: Views, strategy: Strategy) -> Tensor | None:
        """What the loss holds constant: keys or teacher outputs, (B, F), without gradient; None where nothing is."""
        return None

    def target_key(self, strategy: Strategy) -> Hashable:
        """Strategies with equal keys have equal `targets`; meaningless where there are none."""
        return None

    def tokens(self, strategy: Strategy) -> TokenCounts:
        """Sequence lengths under `strategy`, class token included."""
        return token_counts(self.backbone.image_size, self.backbone.patch, strategy, method=self.name)

    def cost(self, strategy: Strategy) -> float:
        """Units per image with integer token counts, class token included (design section 5)."""
        return token_cost(self.name, self.backbone.image_size, self.backbone.patch, strategy)

    def before_step(self, fraction: float) -> None:
        """What training does before the loss of a step."""

    def after_step(self, fraction: float, targets: Tensor | None) -> None:
        """What training does after the optimizer's step; `targets` are those of the step."""

    def train_on(self, ranks: Ranks) -> None:
        """Let the losses gather features, and the heads' BatchNorm its statistics, over `ranks`."""
        self.ranks = ranks
        for module in self.modules():
            if isinstance(module, BatchNorm1d):
                module.ranks = ranks

    def features(
        self, images_BCSS: Tensor, strategy: Strategy, generator: torch.Generator, part: Part | None
    ) -> Tensor:
        """Backbone features (B, D) of one view under a strategy: its patch size, random tokens dropped."""
        part = part or Part.whole(len(images_BCSS))
        patch, dropout = int(strategy.number("patch")), strategy.number("dropout")
        keep_BK = None
        if dropout:
            tokens = patch_tokens(images_BCSS.shape[-1], patch)
            keep_BK = random_keep(part.total, tokens, dropout, generator, images_BCSS.device, part.rows)
        paths_RB = self.paths(images_BCSS, generator, part)
        feature_BD: Tensor = self.backbone(images_BCSS, patch=patch, keep_BK=keep_BK, paths_RB=paths_RB)
        return feature_BD

    def paths(self, images_BCSS: Tensor, generator: torch.Generator, part: Part) -> Tensor | None:
        """Which residual branches these images skip, (R, B); None when not training, or without `drop_path`."""
        drawn_RB = self.backbone.random_paths(part.total, generator) if self.training else None
        return None if drawn_RB is None else drawn_RB[:, part.rows].to(images_BCSS.device)
