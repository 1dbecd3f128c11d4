"""The image operations of the augmentations: every sample of a batch by its own parameters, no loops over samples.

Shapes: B image, C channel, H row and W column of the input (E pixel of either side), S side of the output,
N chosen image.
Images are float32 in [0, 1] unless said otherwise; parameters lie on the images' device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""


def unit_range(images_BCHW: Tensor) -> Tensor:
    """float32 in [0, 1] of uint8; floating images are taken to lie there already."""
    if images_BCHW.dtype == torch.uint8:
        return images_BCHW.float().div_(255)
    return images_BCHW.float()


def resized_crop(images_BCHW: Tensor, box_B4: Tensor, flip_B: Tensor, size: int) -> Tensor:
    """Each image's box (top, left, height, width in pixels), mirrored where `flip_B`, at `size` x `size`.

    Bilinear between pixel centres, (i + 1/2) h/S - 1/2 from the box's first row, held at the box's
    edges: what cutting the box out and `F.interpolate(..., align_corners=False)` give. There is no
    low-pass filter, so a box larger than the output aliases a little.
    """
    batch, _, height, width = images_BCHW.shape
    centre_S = (torch.arange(size, device=images_BCHW.device) + 0.5) / size
    start_B2, length_B2 = box_B4[:, :2, None], box_B4[:, 2:, None]
    source_B2S = (centre_S * length_B2 - 0.5).clamp_min_(0).minimum(length_B2 - 1) + start_B2
    extent_21 = torch.tensor([[height], [width]], dtype=torch.float32, device=images_BCHW.device)
    y_BS, x_BS = ((source_B2S * 2 + 1) / extent_21 - 1).unbind(1)
    x_BS = torch.where(flip_B[:, None], x_BS.flip(1), x_BS)
    grid_B2SS = torch.empty(batch, 2, size, size, device=images_BCHW.device)
    grid_B2SS[:, 0] = x_BS[:, None, :]
    grid_B2SS[:, 1] = y_BS[:, :, None]
    grid_BSS2 = grid_B2SS.permute(0, 2, 3, 1)
    return F.grid_sample(images_BCHW, grid_BSS2, mode="bilinear", padding_mode="border", align_corners=False)


def bicubic_crop(images_BCHW: Tensor, box_B4: Tensor, flip_B: Tensor, size: int) -> Tensor:
    """As `resized_crop`, by the cubic kernel of Keys (a = -1/2) as wide as a pixel of the coarser of the two grids.

    So shrinking is low-passed, as Pillow does it; values are clipped to [0, 1], which the kernel may leave.
    Each side is a matrix product with weights (B, S, H) that vanish outside of the box.
    """
    batch, channels, height, width = images_BCHW.shape
    row_BSH = _cubic_weights(box_B4[:, 0], box_B4[:, 2], size, height)
    column_BSW = _cubic_weights(box_B4[:, 1], box_B4[:, 3], size, width)
    column_BSW = torch.where(flip_B[:, None, None], column_BSW.flip(1), column_BSW)
    narrow_BHS = torch.bmm(images_BCHW.reshape(batch, channels * height, width), column_BSW.transpose(1, 2))
    return (row_BSH[:, None] @ narrow_BHS.view(batch, channels, height, size)).clamp_(0, 1)


def _cubic_weights(start_B: Tensor, length_B: Tensor, size: int, extent: int) -> Tensor:
    """Weights (B, size, extent) of the pixels of one side, each row of sum 1.

    Computed for the T pixels around each source alone: the kernel's support is 4 steps of the coarser grid,
    at most extent / size pixels each. With d the distance in steps, a = max(2 - d, 0) and b = max(a - 1, 0)
    the kernel is a^2 (a - 1) / 2 + b^2 (1 - 2 b).
    """
    step_B1 = length_B[:, None] / size
    coarse_B1 = step_B1.clamp(min=1)
    source_BS = (torch.arange(size, device=start_B.device) + 0.5) * step_B1 + start_B[:, None]
    taps = min(extent, math.ceil(4 * max(1, extent / size)) + 1)
    first_BS = (source_BS - 2 * coarse_B1 - 0.5).ceil_().clamp_(0, extent - taps)
    pixel_BST = first_BS[:, :, None] + torch.arange(taps, device=start_B.device)
    a_BST = pixel_BST - (source_BS[:, :, None] - 0.5)
    a_BST.div_(coarse_B1[:, :, None]).abs_().neg_().add_(2).clamp_(min=0)
    b_BST = a_BST - 1
    weight_BST = a_BST.square_().mul_(b_BST).div_(2)
    b_BST.clamp_(min=0)
    weight_BST.addcmul_(b_BST.square(), 1 - 2 * b_BST)
    last_B11 = (start_B + length_B - 1)[:, None, None]
    weight_BST *= (pixel_BST >= start_B[:, None, None]) & (pixel_BST <= last_B11)
    weight_BST /= weight_BST.sum(2, keepdim=True)
    weight_BSE = torch.zeros(len(start_B), size, extent, device=start_B.device)
    return weight_BSE.scatter_(2, pixel_BST.long(), weight_BST)


def brightness_contrast_(images_BCHW: Tensor, brightness_B: Tensor, contrast_B: Tensor) -> Tensor:
    """In place: x <- clip(b x), then x <- clip(c x + (1 - c) m) with m the mean brightness of the image."""
    images_BCHW.mul_(brightness_B[:, None, None, None]).clamp_(max=1)
    channel_BC = images_BCHW.mean(dim=(2, 3))
    mean_B = channel_BC @ channel_BC.new_tensor(LUMA) if channel_BC.shape[1] == 3 else channel_BC.mean(1)
    offset_B = (1 - contrast_B) * mean_B
    return images_BCHW.mul_(contrast_B[:, None, None, None]).add_(offset_B[:, None, None, None]).clamp_(0, 1)


def saturation_hue(images_B3HW: Tensor, saturation_B: Tensor, hue_B: Tensor) -> Tensor:
    """Scale the colour difference to grey by `saturation_B` and turn it by `hue_B` (fraction of the circle).

    Both are linear in YIQ colour space, where Y is the brightness and (I, Q) the colour: (I, Q) is
    multiplied by s and rotated by 2 pi h, which is one 3 x 3 matrix a sample. Saturation 0 is the
    grey image. The result is clipped to [0, 1] once.
    """
    luma_3 = images_B3HW.new_tensor(LUMA)
    keep_33 = torch.eye(3, device=images_B3HW.device) - luma_3
    turn_33 = images_B3HW.new_tensor(_QUARTER_TURN)
    angle_B11 = (2 * torch.pi * hue_B)[:, None, None]
    saturation_B11 = saturation_B[:, None, None]
    colour_B33 = luma_3 + saturation_B11 * (torch.cos(angle_B11) * keep_33 + torch.sin(angle_B11) * turn_33)
    return torch.bmm(colour_B33, images_B3HW.flatten(2)).view_as(images_B3HW).clamp_(0, 1)


def gaussian_blur(images_BCHW: Tensor, sigma_B: Tensor, radius: int) -> Tensor:
    """Convolve each image with a Gaussian of its own `sigma_B` pixels, sampled at -radius..radius and normalised.

    Rows, then columns, as a sum of shifted images: at the radii of small images that is two to four
    times faster on a CPU than a convolution grouped by sample. Edge pixels are repeated outwards.
    """
    size_H, size_W = images_BCHW.shape[2:]
    offset_K = torch.arange(-radius, radius + 1, device=images_BCHW.device)
    weight_BK = torch.exp(-(offset_K**2) / (2 * sigma_B[:, None] ** 2))
    weight_BK = weight_BK / weight_BK.sum(1, keepdim=True)
    weight_KB111 = weight_BK.T[:, :, None, None, None]
    padded = F.pad(images_BCHW, (radius, radius, radius, radius), mode="replicate")
    rows = padded[:, :, :size_H] * weight_KB111[0]
    for shift in range(1, 2 * radius + 1):
        rows.addcmul_(padded[:, :, shift : shift + size_H], weight_KB111[shift])
    blurred = rows[..., :size_W] * weight_KB111[0]
    for shift in range(1, 2 * radius + 1):
        blurred.addcmul_(rows[..., shift : shift + size_W], weight_KB111[shift])
    return blurred


def solarize(images_BCHW: Tensor, threshold: float) -> Tensor:
    """1 - x where x >= threshold, x elsewhere."""
    return torch.where(images_BCHW >= threshold, 1 - images_BCHW, images_BCHW)


def on_chosen_(
    images_BCHW: Tensor, chosen_B: NDArray[np.bool_], operation: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Replace the chosen images by `operation(images_NCHW, index_N)`; in place unless all are chosen.

    `chosen_B` lies on the CPU, where the number of chosen images is known without waiting for the device.
    """
    (chosen_N,) = chosen_B.nonzero()
    if len(chosen_N) == 0:
        return images_BCHW
    index_N = torch.from_numpy(chosen_N).to(images_BCHW.device)
    if len(chosen_N) == len(images_BCHW):
        return operation(images_BCHW, index_N)
    images_BCHW[index_N] = operation(images_BCHW[index_N], index_N)
    return images_BCHW


def _quarter_turn() -> list[list[float]]:
    """RGB matrix that turns the colour plane (I, Q) of YIQ by 90 degrees and drops Y."""
    to_yiq = torch.tensor(
        [LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)],  # NTSC, FCC 1953
        dtype=torch.float64,
    )
    turn = torch.tensor([[0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    matrix: list[list[float]] = (torch.linalg.inv(to_yiq) @ turn @ to_yiq).tolist()
    return matrix


_QUARTER_TURN = _quarter_turn()
