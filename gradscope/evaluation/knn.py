"""Accuracy of a weighted vote of the k nearest training images.

Shapes: N training image, M test image, D feature, C class, K neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gradscope.errors import UsageError

CHUNK_NUMBERS = 2**25
"""Similarities held at a time: 128 MiB of float32."""


def knn_accuracy(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy in [0, 1] with one number of neighbours; otherwise as `knn_accuracies`."""
    return knn_accuracies(train_ND, train_labels_N, test_MD, test_labels_M, ks=(k,), temperature=temperature)[k]


@torch.no_grad()
def knn_accuracies(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chunk_numbers: int = CHUNK_NUMBERS,
) -> dict[int, float]:
    """Accuracy in [0, 1] of a weighted vote of the k nearest, for each k.

    Neighbours by cosine similarity s, votes exp(s / temperature), as in DINO's evaluation (Caron et al. 2021,
    appendix: temperature 0.07, and 20 neighbours work best). Computed on the device of `train_ND`, for as many test
    images at a time as keep the similarities under `chunk_numbers` (at least one). Raises UsageError when there is
    no k, one is not in 1..N, the temperature is not positive, or labels and features differ in number.
    """
    _check(train_ND, train_labels_N, "train")
    _check(test_MD, test_labels_M, "test")
    if not ks:
        raise UsageError("no k given: name at least one number of neighbours, such as 20")
    for k in ks:
        if not 1 <= k <= len(train_ND):
            raise UsageError(f"k={k} neighbours: choose between 1 and the {len(train_ND)} training images")
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature={temperature!r} must be a positive number, such as 0.07")
    device = train_ND.device
    train_ND, train_labels_N = F.normalize(train_ND.float(), dim=1), train_labels_N.to(device)
    classes = int(train_labels_N.max()) + 1
    rows = max(1, chunk_numbers // (len(train_ND) + classes))
    right = dict.fromkeys(ks, 0)
    for part_MD, labels_M in zip(torch.split(test_MD, rows), torch.split(test_labels_M, rows), strict=True):
        part_MD = F.normalize(part_MD.to(device).float(), dim=1)
        similarity_MK, neighbour_MK = (part_MD @ train_ND.T).topk(max(ks), dim=1)
        # Weights relative to the nearest's: the same vote, and no temperature makes them overflow.
        weight_MK = ((similarity_MK - similarity_MK[:, :1]) / temperature).exp()
        label_MK, labels_M = train_labels_N[neighbour_MK], labels_M.to(device)
        for k in right:
            votes_MC = torch.zeros(len(part_MD), classes, device=device)
            votes_MC.scatter_add_(1, label_MK[:, :k], weight_MK[:, :k])
            right[k] += int((votes_MC.argmax(1) == labels_M).sum())
    return {k: count / len(test_MD) for k, count in right.items()}


def _check(features_ND: Tensor, labels_N: Tensor, part: str) -> None:
    if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1] or not len(labels_N):
        raise UsageError(
            f"{part} features must be (N, D) and labels (N,) with N > 0, not {tuple(features_ND.shape)} and "
            f"{tuple(labels_N.shape)}"
        )
