"""DINO with the paper's accounting: one global query and small crops for the student, one global key for the teacher.

Shapes: V student view, B image, D feature, K prototype.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from gradscope.methods.base import Method, Part, Views
from gradscope.methods.distillation import distillation_losses, moved_centre, teacher_temperature_at
from gradscope.methods.heads import DINOHead
from gradscope.methods.momentum import frozen_copy, momentum_at, update_average
from gradscope.models import VisionTransformer
from schedulers import Strategy, patch_tokens, token_cost


class DINO(Method):
    """Student and teacher with a head each, and the centre of the teacher's outputs.

    `views`: the global query, the global key, then `small_crops` crops of `small_size` pixels. The student sees the
    query, compressed by the strategy, and the small crops, never compressed; the teacher sees the key, never
    compressed (paper, section 6.4). `teacher_temperature` is approached linearly from `teacher_temperature_start`
    over a share `teacher_temperature_warmup` of the budget. `freeze_last_layer`: share of the budget during which the
    head's last layer is not trained (`without_gradient`). Defaults are the published recipe's; skipped branches
    (`drop_path` of the backbone) are the student's alone.
    """

    name = "dino"
    independent_terms = True

    def __init__(
        self,
        backbone: VisionTransformer,
        head: DINOHead,
        *,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup: float = 0.0,
        centre_momentum: float = 0.9,
        momentum: float = 0.996,
        small_crops: int = 0,
        small_size: int = 96,
        freeze_last_layer: float = 0.0,
    ) -> None:
        super().__init__()
        self.student_temperature, self.centre_momentum, self.momentum = student_temperature, centre_momentum, momentum
        self.teacher_temperature, self.teacher_temperature_start = teacher_temperature, teacher_temperature_start
        self.teacher_temperature_warmup, self.freeze_last_layer = teacher_temperature_warmup, freeze_last_layer
        self.small_crops, self.small_size = small_crops, small_size
        self.backbone, self.head = backbone, head
        self.momentum_backbone, self.momentum_head = frozen_copy(backbone), frozen_copy(head)
        self.momentum_backbone.drop_path = 0.0
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(1, len(head.last_layer.weight_v)))

    @property
    def evaluated(self) -> VisionTransformer:
        """The teacher's backbone."""
        return self.momentum_backbone

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
        """Cross-entropy of the student's views with the teacher's, the mean over views, one term per image (B)."""
        part = part or Part.whole(len(views[0]))
        features, small = [self.features(views[0], strategy, generator, part)], views[2:]
        if small:  # crops of one size in one pass
            paths = [path for crop in small if (path := self.paths(crop, generator, part)) is not None]
            features.append(self.backbone(torch.cat(list(small)), paths_RB=torch.cat(paths, dim=1) if paths else None))
        student_VBK = self.head(torch.cat(features)).unflatten(0, (1 + len(small), len(views[0])))
        teacher_BK = self.targets(views, strategy) if targets is None else targets
        first = part.start % len(teacher_BK)  # targets may be those of a rank's whole share
        teacher_BK = teacher_BK[first : first + len(views[0])]
        return distillation_losses(
            student_VBK,
            teacher_BK,
            self.centre,
            student_temperature=self.student_temperature,
            teacher_temperature=self.teacher_temperature_at(fraction),
        )

    @torch.no_grad()
    def targets(self, views: Views, strategy: Strategy) -> Tensor:
        """The teacher's logits (B, K) of the global key, not yet centred."""
        teacher_BK: Tensor = self.momentum_head(self.momentum_backbone(views[1]))
        return teacher_BK

    def target_key(self, strategy: Strategy) -> Hashable:
        return ()

    def teacher_temperature_at(self, fraction: float) -> float:
        return teacher_temperature_at(
            fraction, self.teacher_temperature_start, self.teacher_temperature, self.teacher_temperature_warmup
        )

    def cost(self, strategy: Strategy) -> float:
        """Units per image: (3 L_q + 3 K L_small + L_k) / L_base, class token included (design section 5)."""
        small = patch_tokens(self.small_size, self.backbone.patch) + 1 if self.small_crops else 0
        base = self.backbone
        return token_cost(self.name, base.image_size, base.patch, strategy, small=small, crops=self.small_crops)

    def without_gradient(self, fraction: float) -> Iterable[torch.nn.Parameter]:
        """Parameters that a step at `fraction` of the budget leaves alone."""
        return self.head.last_layer.parameters() if fraction < self.freeze_last_layer else ()

    def after_step(self, fraction: float, targets: Tensor | None) -> None:
        """Move the centre to the teacher's mean output over all ranks, and the teacher to the student."""
        assert targets is not None
        mean_1K = self.ranks.mean(targets.float().mean(0, keepdim=True))
        self.centre.copy_(moved_centre(self.centre, mean_1K, self.centre_momentum))
        momentum = momentum_at(fraction, self.momentum)
        update_average(self.momentum_backbone, self.backbone, momentum)
        update_average(self.momentum_head, self.head, momentum)
