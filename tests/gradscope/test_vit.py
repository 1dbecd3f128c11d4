"""The Vision Transformer: names, sequence lengths, token dropout, positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gradscope.models import VIT_SIZES, VisionTransformer, ViTSize, random_keep
from gradscope.models.positions import resample_table, sincos_table
from schedulers import Strategy, UsageError, token_counts

TINY = ViTSize(width=16, depth=2, heads=2)


def make(image_size: int = 28, patch: int = 2, channels: int = 1, **others: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(TINY, image_size=image_size, patch=patch, channels=channels, **others)


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


@pytest.mark.parametrize(("side", "patch"), [(12, 4), (8, 4), (56, 4), (21, 7)])
def test_images_of_another_size_have_the_positions_of_the_whole_image(side: int, patch: int) -> None:
    """A token of a crop stands where it would if the crop filled the image; patches of the base's size or others."""
    model = make(patch=4, positions="learned")
    images = torch.randn(2, 1, side, side)
    embedded, grid = model.embed(images, patch=patch), side // patch
    assert embedded.shape == (2, 1 + grid**2, 16) and model(images, patch=patch).shape == (2, 16)
    table_DGG = model.pos_embed[:, 1:].reshape(1, 7, 7, 16).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(table_DGG, (grid, grid), mode="bilinear", align_corners=False)
    found = embedded[:, 1:] - model.patch_embed(images, patch)
    for row in found:
        torch.testing.assert_close(row, wanted[0].flatten(1).T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(embedded[:, 0], (model.cls_token + model.pos_embed[:, :1])[:, 0].expand(2, -1))


def test_positions_are_fixed_or_learned() -> None:
    fixed, learned = make(patch=4), make(patch=4, positions="learned")
    assert not fixed.pos_embed.requires_grad and learned.pos_embed.requires_grad
    assert torch.equal(fixed.pos_embed, sincos_table(7, 16))
    images = torch.randn(2, 1, 28, 28)
    learned(images, patch=7).square().sum().backward()
    assert learned.pos_embed.grad is not None and bool(learned.pos_embed.grad.abs().amax(-1).min() > 0)


def test_initial_weights_are_those_of_the_recipe_that_the_positions_belong_to() -> None:
    """MoCo-v3: Xavier uniform with q, k, v apart, patch embedding as one linear layer; DINO: normal of .02."""
    wide = ViTSize(width=128, depth=2, heads=2)
    torch.manual_seed(0)
    uniform, normal = (
        VisionTransformer(wide, image_size=32, patch=8, channels=3, positions=p) for p in ("sincos", "learned")
    )
    block = uniform.blocks[0]
    for weight, bound in (
        (block.attn.qkv.weight, math.sqrt(6 / (128 + 128))),
        (block.attn.proj.weight, math.sqrt(6 / (128 + 128))),
        (block.mlp.fc1.weight, math.sqrt(6 / (128 + 512))),
        (uniform.patch_embed.proj.weight, math.sqrt(6 / (3 * 64 + 128))),
    ):
        most = float(weight.detach().abs().max())
        assert 0.98 * bound < most <= bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert float(uniform.cls_token.detach().abs().max()) < 1e-5
    for weight in (normal.blocks[1].attn.qkv.weight, normal.blocks[1].mlp.fc2.weight, normal.pos_embed):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(normal.cls_token.detach().std()) == pytest.approx(0.02, rel=0.3)
    for model in (uniform, normal):
        assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias") and "patch" not in n)


def test_skipped_branches_are_drawn_at_rates_rising_from_zero_and_keep_the_mean() -> None:
    model = make(drop_path=0.4)
    paths = model.random_paths(20000, torch.Generator().manual_seed(0))
    assert paths.shape == (4, 20000)
    for row, rate in zip(paths, (0, 0, 0.4, 0.4), strict=True):  # two branches a block, two blocks
        assert row.unique().tolist() == ([1.0] if rate == 0 else pytest.approx([0.0, 1 / 0.6]))
        assert float((row == 0).float().mean()) == pytest.approx(rate, abs=0.015)
        assert float(row.mean()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(paths[2], paths[3])
    assert torch.equal(paths, model.random_paths(20000, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(0)
    assert make().random_paths(3, generator) is None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_a_skipped_branch_adds_nothing_and_factors_scale_the_others() -> None:
    """Against the blocks written out, each image with factors of its own."""
    model, images = make(patch=4), torch.randn(3, 1, 28, 28)
    factors = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 1.5], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    result = model(images, paths_RB=factors)
    x = model.embed(images)
    for i, block in enumerate(model.blocks):
        attention, mlp = factors[2 * i], factors[2 * i + 1]
        x = torch.stack([x[b] + attention[b] * block.attn(block.norm1(x[b : b + 1]))[0] for b in range(3)])
        x = torch.stack([x[b] + mlp[b] * block.mlp(block.norm2(x[b : b + 1]))[0] for b in range(3)])
    torch.testing.assert_close(result, model.norm(x[:, 0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images, paths_RB=torch.ones(4, 3)), model(images))


def test_rows_of_a_batch_keep_the_tokens_that_they_have_in_the_whole() -> None:
    whole = random_keep(8, 49, 0.5, torch.Generator().manual_seed(3), torch.device("cpu"))
    some = random_keep(8, 49, 0.5, torch.Generator().manual_seed(3), torch.device("cpu"), slice(2, 5))
    assert torch.equal(some, whole[2:5])


def test_every_norm_has_the_given_epsilon() -> None:
    norms = [m for m in make(norm_eps=1e-3).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 5 and all(norm.eps == 1e-3 for norm in norms)
    assert {m.eps for m in make().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="does not divide image_size=28"):
        make()(torch.zeros(1, 1, 28, 28), patch=3)
    with pytest.raises(UsageError, match=r"images of \(28, 32\) pixels: they must be square"):
        make()(torch.zeros(1, 1, 28, 32))
    with pytest.raises(UsageError, match="does not divide image_size=31"):
        make()(torch.zeros(1, 1, 31, 31))
    with pytest.raises(UsageError, match="does not divide image_size=30"):
        make(image_size=30, patch=4)
    with pytest.raises(UsageError, match="multiple of 4"):
        sincos_table(2, 6)
    with pytest.raises(UsageError, match="positions='rotary': choose one of sincos, learned"):
        make(positions="rotary")
    with pytest.raises(UsageError, match=r"drop_path=1.0 is not in \[0, 1\)"):
        make(drop_path=1.0)
    with pytest.raises(UsageError, match="width 16 is not a multiple of heads 3"):
        VisionTransformer(ViTSize(width=16, depth=1, heads=3), image_size=28, patch=4)
