"""The Vision Transformer: names, sequence lengths, token dropout, positions."""

from __future__ import annotations

import math

import pytest
import torch

from gradscope.models import VIT_SIZES, VisionTransformer, ViTSize, random_keep
from gradscope.models.positions import resample_table, sincos_table
from schedulers import Strategy, UsageError, token_counts

TINY = ViTSize(width=16, depth=2, heads=2)


def make(image_size: int = 28, patch: int = 2, channels: int = 1) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(TINY, image_size=image_size, patch=patch, channels=channels)


def test_parameters_have_timm_names_and_shapes() -> None:
    shapes = {name: tuple(p.shape) for name, p in make(channels=3).named_parameters()}
    assert shapes["cls_token"] == (1, 1, 16)
    assert shapes["pos_embed"] == (1, 197, 16)
    assert shapes["patch_embed.proj.weight"] == (16, 3, 2, 2)
    assert shapes["blocks.1.attn.qkv.weight"] == (48, 16)
    assert shapes["blocks.0.mlp.fc1.weight"] == (64, 16)
    leaves = {name.split(".", 2)[2] for name in shapes if name.startswith("blocks.0.")}
    parts = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert leaves == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert {"norm.weight", "norm.bias"} <= set(shapes)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.5), ("small", 21.6), ("base", 85.6)])
def test_sizes_match_the_published_parameter_counts(size: str, millions: float) -> None:
    """Backbone parameters of DeiT-Ti, ViT-S/16 and ViT-B/16 without a classifier (in millions, 224 pixels)."""
    with torch.device("meta"):
        model = VisionTransformer(VIT_SIZES[size], image_size=224, patch=16)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("patch", [16, 20, 24, 30, 40, 48])
@pytest.mark.parametrize("dropout", [0, 0.25, 0.5, 0.75, 0.9])
def test_the_blocks_see_exactly_the_tokens_that_are_paid_for(patch: int, dropout: float) -> None:
    model = make(image_size=240, patch=16, channels=1)
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    keep = random_keep(1, (240 // patch) ** 2, dropout, torch.Generator().manual_seed(0), torch.device("cpu"))
    model(torch.zeros(1, 1, 240, 240), patch=patch, keep_BK=keep)
    assert seen == [token_counts(240, 16, Strategy(patch=patch, dropout=dropout)).query]


def test_dropping_tokens_is_attending_to_the_kept_ones_alone() -> None:
    """Against a model run on all tokens with the dropped ones masked out of every attention."""
    model = make().eval()
    images = torch.randn(2, 1, 28, 28)
    keep = random_keep(2, 49, 0.5, torch.Generator().manual_seed(1), torch.device("cpu"))
    result = model(images, patch=4, keep_BK=keep)
    for b in range(2):
        tokens = model.patch_embed(images[b : b + 1], 4) + resample_table(model.pos_embed, 7)[:, 1:]
        x = torch.cat([model.cls_token, tokens], dim=1)
        allowed = torch.zeros(50, dtype=torch.bool)
        allowed[0] = True
        allowed[keep[b] + 1] = True
        for block in model.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-1, -2)) / math.sqrt(8)
            mixed = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v
            x = x + block.attn.proj(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
        torch.testing.assert_close(result[b], model.norm(x[0, 0]), rtol=1e-4, atol=1e-5)


def test_kept_tokens_are_distinct_uniform_and_reproducible() -> None:
    first = random_keep(4000, 10, 0.7, torch.Generator().manual_seed(3), torch.device("cpu"))
    again = random_keep(4000, 10, 0.7, torch.Generator().manual_seed(3), torch.device("cpu"))
    assert torch.equal(first, again)
    assert all(len(set(row.tolist())) == 3 for row in first[:50])
    share = torch.bincount(first.flatten(), minlength=10) / 4000
    assert (share - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 4000)


def test_positions_follow_the_pixels_when_patches_grow() -> None:
    """Two base patches merged into one: the code must be the mean of theirs (bilinear at the midpoint)."""
    table = sincos_table(14, 16)
    grid = table[0, 1:].reshape(14, 14, 16)
    merged = resample_table(table, 7)[0, 1:].reshape(7, 7, 16)
    expected = (grid[0::2, 0::2] + grid[1::2, 0::2] + grid[0::2, 1::2] + grid[1::2, 1::2]) / 4
    torch.testing.assert_close(merged, expected)


def test_table_layout_row_first_then_column_class_row_zero() -> None:
    table = sincos_table(3, 8)[0]
    assert torch.equal(table[0], torch.zeros(8))
    row, column = 2, 1
    code = table[1 + row * 3 + column]
    frequencies = torch.tensor([1.0, 0.01])
    expected = torch.cat([f(position * frequencies) for position in (row, column) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(code, expected)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="does not divide image_size=28"):
        make()(torch.zeros(1, 1, 28, 28), patch=3)
    with pytest.raises(UsageError, match="built for 28 x 28"):
        make()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(UsageError, match="does not divide image_size=30"):
        make(image_size=30, patch=4)
    with pytest.raises(UsageError, match="multiple of 4"):
        sincos_table(2, 6)
