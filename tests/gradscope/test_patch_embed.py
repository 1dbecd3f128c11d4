"""Patch embedding with a flexible patch size: exactness against direct inner products and torch's own resize."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gradscope.models.patch_embed import PatchEmbed, interpolation_matrix, resize_patch_weight
from schedulers import UsageError

PAPER_PATCHES = (16, 20, 24, 30, 40, 48)
PAIRS = [(p, q) for p in PAPER_PATCHES for q in PAPER_PATCHES if q >= p] + [(2, 4), (2, 7), (2, 14), (4, 7)]


@pytest.mark.parametrize(("base", "patch"), PAIRS)
def test_resized_weights_give_the_same_response_to_the_resized_patch(base: int, patch: int) -> None:
    generator = torch.Generator().manual_seed(base * 100 + patch)
    x = torch.randn(8, 3, base, base, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 3, base, base, generator=generator, dtype=torch.float64)
    resized_x = F.interpolate(x, size=(patch, patch), mode="bilinear", align_corners=False)
    before = torch.einsum("bcij,dcij->bd", x, weight)
    after = torch.einsum("bcij,dcij->bd", resized_x, resize_patch_weight(weight, patch))
    assert ((after - before).abs() / before.abs().clamp_min(1e-3)).max() <= 1e-9


@pytest.mark.parametrize(("size_from", "size_to"), [(16, 20), (16, 48), (2, 7), (5, 3), (1, 4)])
def test_interpolation_matrix_is_what_torch_interpolates(size_from: int, size_to: int) -> None:
    identity = torch.eye(size_from, dtype=torch.float64)[None]
    expected = F.interpolate(identity, size=size_to, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(interpolation_matrix(size_from, size_to), expected, rtol=0, atol=1e-14)


def test_gradient_reaches_the_base_weights() -> None:
    weight = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: resize_patch_weight(w, 7), (weight,))


def test_separable_resize_equals_the_full_pseudo_inverse() -> None:
    """The textbook form: w_q = (B^T)^+ w_p with B the p^2 -> q^2 resize of a flattened patch."""
    one = interpolation_matrix(4, 7)
    both = torch.kron(one, one)
    weight = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    expected = (torch.linalg.pinv(both.T) @ weight.flatten(1).T).T.reshape(3, 1, 7, 7)
    torch.testing.assert_close(resize_patch_weight(weight, 7), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("patch", [2, 4, 7, 14])
def test_embedding_is_a_strided_convolution_with_the_resized_weights(patch: int) -> None:
    embed = PatchEmbed(patch=2, channels=3, width=8).double()
    images = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    kernel = resize_patch_weight(embed.proj.weight, patch)
    expected = F.conv2d(images, kernel, embed.proj.bias, stride=patch).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images, patch), expected)


def test_a_patch_that_does_not_divide_the_image_is_refused() -> None:
    with pytest.raises(UsageError, match=r"patch=5 does not divide image_size=28; .* 1, 2, 4, 7, 14, 28"):
        PatchEmbed(patch=2, channels=1, width=4)(torch.zeros(1, 1, 28, 28), 5)
