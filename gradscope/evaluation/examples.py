"""Labelled features as a linear probe sees them: standardised batch by batch, some held out.

Shapes: N image, M image in use, B image of a batch, D feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.errors import UsageError

CHUNK_NUMBERS = 2**25
"""Numbers in the features and logits of one part of a whole set: 128 MiB of float32."""

EPSILON = 1e-5
"""What BatchNorm1d adds to the variance."""


@dataclass(frozen=True)
class Examples:
    """Features `features_ND` and labels `labels_N` on one device, those in `rows_M` alone; `classes` is C.

    `batch` gives (x - mean_D) * scale_D; the features are never copied as a whole.
    """

    features_ND: Tensor
    labels_N: Tensor
    rows_M: Tensor
    mean_D: Tensor
    scale_D: Tensor
    classes: int

    def __len__(self) -> int:
        return len(self.rows_M)

    def batch(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features (B, D) and labels (B) of some of the N images."""
        return (self.features_ND[rows_B] - self.mean_D) * self.scale_D, self.labels_N[rows_B]

    def parts(self) -> tuple[Tensor, ...]:
        """`rows_M` in parts of bounded memory."""
        return torch.split(self.rows_M, max(1, CHUNK_NUMBERS // (len(self.mean_D) + self.classes)))

    def like(self, features_ND: Tensor, labels_N: Tensor, rows_M: Tensor | None = None) -> Examples:
        """Other images under the same standardisation, on the same device; all of them unless `rows_M` says which."""
        check_numbers(features_ND, labels_N)
        device = self.mean_D.device
        rows_M = torch.arange(len(labels_N)) if rows_M is None else rows_M
        features_ND = features_ND.to(self.mean_D)
        return Examples(features_ND, labels_N.to(device), rows_M.to(device), self.mean_D, self.scale_D, self.classes)


def training_examples(
    features_ND: Tensor, labels_N: Tensor, rows_M: Tensor | None = None, *, standardise: bool = True
) -> Examples:
    """Training images, standardised by the statistics of their own rows.

    As BatchNorm1d(affine=False) does over the whole set: (x - mean) / sqrt(variance + 1e-5), the variance with
    divisor M, in place of that layer's running averages. Float64 features stay so, all others become float32.
    Raises UsageError for features and labels of different numbers.
    """
    check_numbers(features_ND, labels_N)
    width, classes = features_ND.shape[1], int(labels_N.max()) + 1
    exact = torch.float64 if features_ND.dtype == torch.float64 else torch.float32
    zero_D = torch.zeros(width, dtype=torch.float64, device=features_ND.device)
    raw = Examples(features_ND, labels_N, labels_N, zero_D.to(exact), torch.ones_like(zero_D, dtype=exact), classes)
    raw = raw.like(features_ND, labels_N, rows_M)
    if not standardise:
        return raw
    mean_D = sum((raw.features_ND[rows].double().sum(0) for rows in raw.parts()), zero_D) / len(raw)
    square_D = sum(((raw.features_ND[rows].double() - mean_D).square().sum(0) for rows in raw.parts()), zero_D)
    scale_D = (square_D / len(raw) + EPSILON).rsqrt()
    return Examples(raw.features_ND, raw.labels_N, raw.rows_M, mean_D.to(exact), scale_D.to(exact), classes)


def held_out_split(labels_N: Tensor, *, every: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices (fitted on, held out) on the CPU: one image in `every` at random, from all classes alike, held out.

    Raises UsageError when there are fewer than `every` images.
    """
    if len(labels_N) < every:
        raise UsageError(f"{len(labels_N)} labelled training images are too few to hold out one in {every}; give more")
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(len(labels_N), generator=generator)
    order_N = order_N[labels_N.cpu()[order_N].argsort(stable=True)]
    held_N = torch.arange(len(order_N)) % every == every - 1
    return order_N[~held_N].sort().values, order_N[held_N].sort().values


def check_numbers(features_ND: Tensor, labels_N: Tensor) -> None:
    """Raise UsageError unless there are features (N, D), N > 0, and a label for each."""
    if features_ND.ndim != 2 or labels_N.shape != features_ND.shape[:1] or not len(labels_N):
        raise UsageError(
            f"features must be (N, D) and labels (N,) with N > 0, not {tuple(features_ND.shape)} and "
            f"{tuple(labels_N.shape)}"
        )
