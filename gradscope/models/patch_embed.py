"""Patch embedding whose patch size is an argument of the forward pass.

The weights are stored once, at the base patch size p, and resized to a patch of q pixels on the fly by
the pseudo-inverse of the image resize (FlexiViT, Beyer et al. 2023, section 3.4). Bilinear resizing
is separable, x -> A x A^T with one q x p matrix A, hence so is its pseudo-inverse:

    w_q = (A^+)^T w_p A^+           so that  <A x A^T, w_q> = <x, w_p>  for every x, if q >= p.

Two p x q matrices replace one p^2 x q^2 matrix. For q < p the equality holds in least squares only.

Shapes: B image, C channel, D width, P base patch, Q patch, N token (row-major over the grid).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from schedulers.tokens import patch_tokens


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def interpolation_matrix(size_from: int, size_to: int) -> Tensor:
    """Linear interpolation of `size_from` samples at the centres of `size_to` pixels: float64 (size_to, size_from).

    Half-pixel centres, no antialiasing, border values repeated: what
    `torch.nn.functional.interpolate(mode="linear", align_corners=False)` computes.
    """
    return _interpolation_matrix(size_from, size_to)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resize_pseudo_inverse(patch_from: int, patch_to: int) -> Tensor:
    """Pseudo-inverse A^+ of the p -> q resize: float64 (patch_from, patch_to)."""
    return _resize_pseudo_inverse(patch_from, patch_to)


# The cache is kept apart from what a compiled model calls: torch.compile looks through a cache and would put the
# singular values into its graph; of a function that is declared constant it keeps the result.


@lru_cache(maxsize=256)
def _interpolation_matrix(size_from: int, size_to: int) -> Tensor:
    centre_T = (torch.arange(size_to, dtype=torch.float64) + 0.5) * size_from / size_to - 0.5
    centre_T = centre_T.clamp(0, size_from - 1)
    lower_T = centre_T.floor().long().clamp(max=max(size_from - 2, 0))
    weight_T = centre_T - lower_T
    rows_T = torch.arange(size_to)
    matrix_TF = torch.zeros(size_to, size_from, dtype=torch.float64)
    matrix_TF[rows_T, lower_T] = 1 - weight_T
    matrix_TF[rows_T, (lower_T + 1).clamp(max=size_from - 1)] += weight_T
    return matrix_TF


@lru_cache(maxsize=256)
def _resize_pseudo_inverse(patch_from: int, patch_to: int) -> Tensor:
    inverse_PQ: Tensor = torch.linalg.pinv(_interpolation_matrix(patch_from, patch_to))
    return inverse_PQ


def resize_patch_weight(weight_DCPP: Tensor, patch: int) -> Tensor:
    """Patch-embedding weights for patches of `patch` pixels: (D, C, P, P) -> (D, C, Q, Q).

    Differentiable to `weight_DCPP`; exact (see the module's text) for `patch` >= P.
    """
    base = weight_DCPP.shape[-1]
    if patch == base:
        return weight_DCPP
    inverse_PQ: Tensor = resize_pseudo_inverse(base, patch).to(weight_DCPP)
    with torch.autocast(weight_DCPP.device.type, enabled=False):  # half precision here would be a bias of large patches
        return inverse_PQ.T @ weight_DCPP @ inverse_PQ


class PatchEmbed(nn.Module):
    """Cut an image into square patches of any size that divides it and embed each: (B, C, H, H) -> (B, N, D).

    Parameters `proj.weight` (D, C, P, P) and `proj.bias` (D), as timm names them.
    """

    def __init__(self, *, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, images_BCHH: Tensor, patch: int | None = None) -> Tensor:
        """Tokens (B, N, D). Raises UsageError when `patch` (default: the base patch) does not divide the image."""
        patch = self.patch if patch is None else patch
        batch, channels, size, _ = images_BCHH.shape
        patch_tokens(size, patch)
        side = size // patch
        pixels_BNK = (
            images_BCHH.reshape(batch, channels, side, patch, side, patch)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(batch, side * side, channels * patch * patch)
        )
        weight_DK = resize_patch_weight(self.proj.weight, patch).flatten(1)
        return nn.functional.linear(pixels_BNK, weight_DK, self.proj.bias)
