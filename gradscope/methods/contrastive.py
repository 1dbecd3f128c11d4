"""InfoNCE in its two forms: MoCo-v3's, against constant keys, and SimCLR's, with gradient through both sides.

Shapes: B image of this rank, N image of all ranks, F feature.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradscope.ranks import ALONE, Ranks


def contrastive_losses(
    query_BF: Tensor, key_BF: Tensor, temperature: float, ranks: Ranks = ALONE, *, first: int = 0
) -> Tensor:
    """InfoNCE of MoCo-v3, one term per query (B): cross-entropy of q.k/T over all keys, times 2T.

    Both inputs are L2-normalised here, in float32 or better; query b's positive is key `first` + b, its negatives the
    other keys, those of the other `ranks` included. No gradient should flow into `key_BF`: pass it detached. The
    factor 2T keeps gradients comparable over temperatures (Chen, Xie, He 2021, algorithm 1).
    """
    with without_autocast(query_BF):
        query_BF = F.normalize(at_least_float32(query_BF), dim=1)
        key_NF = ranks.gather_constant(F.normalize(at_least_float32(key_BF), dim=1))
        logits_BN = query_BF @ key_NF.T / temperature
        labels_B = torch.arange(len(query_BF), device=query_BF.device) + (ranks.rank * len(key_BF) + first)
        return F.cross_entropy(logits_BN, labels_B, reduction="none") * (2 * temperature)


def contrastive_loss(query_BF: Tensor, key_BF: Tensor, temperature: float, ranks: Ranks = ALONE) -> Tensor:
    """Mean of `contrastive_losses`, a scalar."""
    return contrastive_losses(query_BF, key_BF, temperature, ranks).mean()


def nt_xent_losses(first_BF: Tensor, second_BF: Tensor, temperature: float, ranks: Ranks = ALONE) -> Tensor:
    """The normalised temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, equation 1), one term per image (B).

    An image's term is the mean over its two views as anchors of -log exp(s(a, p)/T) / Σ exp(s(a, n)/T), s the cosine,
    p its other view, n all other views of all images: one positive and 2N - 2 negatives. Gradient flows through
    anchor, positive and negatives, also into those of the other `ranks`: every rank's loss is the mean over its own
    images, and the mean over ranks of the gradients is that of one rank with all of them.
    """
    with without_autocast(first_BF):
        views_2BF = F.normalize(at_least_float32(torch.stack([first_BF, second_BF])), dim=2)
        batch = views_2BF.shape[1]
        all_R2BF = ranks.gather_with_gradient(views_2BF)
        all_2NF = all_R2BF.transpose(0, 1).flatten(1, 2)
        own_B = torch.arange(batch, device=views_2BF.device) + ranks.rank * batch
        total = 0.0 * views_2BF[0, :, 0]
        for anchor in (0, 1):
            same_BN = views_2BF[anchor] @ all_2NF[anchor].T / temperature
            same_BN = same_BN.scatter(1, own_B[:, None], float("-inf"))  # an anchor is not its own negative
            other_BN = views_2BF[anchor] @ all_2NF[1 - anchor].T / temperature
            total = total + F.cross_entropy(torch.cat([other_BN, same_BN], dim=1), own_B, reduction="none")
        return total / 2


def nt_xent_loss(first_BF: Tensor, second_BF: Tensor, temperature: float, ranks: Ranks = ALONE) -> Tensor:
    """Mean of `nt_xent_losses`, a scalar."""
    return nt_xent_losses(first_BF, second_BF, temperature, ranks).mean()


def at_least_float32(features: Tensor) -> Tensor:
    """Half precision to float32: a loss is never computed in the precision of an autocast scope."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def without_autocast(features: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The scope in which a loss is computed, as `at_least_float32` made its inputs."""
    return torch.autocast(features.device.type, enabled=False)
