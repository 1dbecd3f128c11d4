"""Regularisers of supervised training that mix the images of a batch or blot out parts of them.

All draw from NumPy generators that the caller passes, on the CPU, so every device sees the same.

Shapes: B image, C class, S side in pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
_ATTEMPTS = 10


def smoothed_targets(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """Rows (B, C) that sum to 1: `smoothing` spread over all classes, the rest on the label."""
    return F.one_hot(labels_B, classes).float() * (1 - smoothing) + smoothing / classes


def mix(
    images_BXSS: Tensor, target_BC: Tensor, *, mixup: float, cutmix: float, switch: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Mix a batch with itself in reverse order, images and targets by the same share.

    With probability `switch` by CutMix (Yun et al. 2019), else by mixup (Zhang et al. 2018); by the other one where
    its concentration is 0, not at all where both are. The share lambda that an image keeps is drawn from
    Beta(a, a), a the concentration, once a batch; CutMix's is then exactly the share of pixels that were kept,
    since its box (of the area 1 - lambda, centred anywhere) is cut off at the image's edge.
    """
    use_cutmix = cutmix > 0 and (mixup == 0 or random.random() < switch)
    concentration = cutmix if use_cutmix else mixup
    if concentration == 0:
        return images_BXSS, target_BC
    kept = random.beta(concentration, concentration)
    if use_cutmix:
        size = images_BXSS.shape[-1]
        top, bottom, left, right = _cut_box(size, kept, random)
        kept = 1 - (bottom - top) * (right - left) / size**2
        mixed_BXSS = images_BXSS.clone()
        mixed_BXSS[:, :, top:bottom, left:right] = images_BXSS.flip(0)[:, :, top:bottom, left:right]
    else:
        mixed_BXSS = images_BXSS * kept + images_BXSS.flip(0) * (1 - kept)
    return mixed_BXSS, target_BC * kept + target_BC.flip(0) * (1 - kept)


def erase(images_BXSS: Tensor, probability: float, random: np.random.Generator, noise: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al. 2020): one box of normal noise in each image chosen with `probability`.

    The box takes a share of the area uniform in [.02, 1/3], its ratio uniform in the logarithm in [.3, 1/.3]; ten
    are tried, and an image in which none fits stays whole. `images_BXSS` is normalised, so that the noise has
    its mean and deviation, and left as it was. `noise` is a generator on the images' device.
    """
    batch, size = len(images_BXSS), images_BXSS.shape[-1]
    boxes_B4 = np.zeros((batch, 4), np.int64)
    for row in np.flatnonzero(random.random(batch) < probability):
        boxes_B4[row] = _erased_box(size, random)
    top_B, bottom_B, left_B, right_B = torch.from_numpy(boxes_B4).to(images_BXSS.device)[:, :, None].unbind(1)
    place_S = torch.arange(size, device=images_BXSS.device)
    inside_B1SS = ((place_S >= top_B) & (place_S < bottom_B))[:, None, :, None] & (
        (place_S >= left_B) & (place_S < right_B)
    )[:, None, None, :]
    noise_BXSS = torch.randn(images_BXSS.shape, generator=noise, device=images_BXSS.device)
    return torch.where(inside_B1SS, noise_BXSS, images_BXSS)


def _cut_box(size: int, kept: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a square of the area (1 - kept) size² around any pixel, cut off at the edges."""
    side = int(size * math.sqrt(1 - kept))
    row, column = random.integers(size, size=2)
    (top, bottom), (left, right) = (
        (max(int(middle) - side // 2, 0), min(int(middle) + side - side // 2, size)) for middle in (row, column)
    )
    return top, bottom, left, right


def _erased_box(size: int, random: np.random.Generator) -> NDArray[np.int64]:
    """(top, bottom, left, right) of the first of ten random boxes that fits, zeros where none does."""
    low, high = (math.log(ratio) for ratio in ERASED_RATIO)
    for _ in range(_ATTEMPTS):
        area, ratio = random.uniform(*ERASED_AREA) * size**2, math.exp(random.uniform(low, high))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < size and 0 < width < size:
            top, left = random.integers(size - height + 1), random.integers(size - width + 1)
            return np.array((top, top + height, left, left + width))
    return np.zeros(4, np.int64)
