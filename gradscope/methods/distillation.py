"""DINO's loss and its pieces: cross-entropy between teacher and student, centre, teacher temperature.

Shapes: V student view, B image, K prototype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gradscope.methods.contrastive import at_least_float32, without_autocast


def distillation_losses(
    student_VBK: Tensor,
    teacher_BK: Tensor,
    centre_1K: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """DINO's cross-entropy, one term per image (B) (Caron et al. 2021, algorithm 1).

    The mean over the student's views of -Σ softmax((t - c)/T_t) log softmax(s/T_s), in float32 or better. The views
    of the student must be others than the teacher's; no gradient should flow into `teacher_BK` and `centre_1K`.
    """
    with without_autocast(student_VBK):
        teacher_BK = F.softmax((at_least_float32(teacher_BK) - centre_1K) / teacher_temperature, dim=1)
        student_VBK = F.log_softmax(at_least_float32(student_VBK) / student_temperature, dim=2)
        return -torch.einsum("bk,vbk->b", teacher_BK, student_VBK) / len(student_VBK)


def teacher_temperature_at(fraction: float, first: float, last: float, warmup: float) -> float:
    """The teacher's temperature: linear from `first` to `last` over a share `warmup` of the budget, then `last`."""
    if fraction >= warmup:
        return last
    return first + (last - first) * fraction / warmup


@torch.no_grad()
def moved_centre(centre_1K: Tensor, mean_1K: Tensor, momentum: float) -> Tensor:
    """The centre after a batch whose teacher outputs have mean `mean_1K`: m c + (1 - m) mean."""
    return centre_1K * momentum + mean_1K.to(centre_1K) * (1 - momentum)
