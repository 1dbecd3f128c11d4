"""Vision Transformer with a patch size per forward pass and token dropout by index.

Parameter names are timm's (`cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.N.attn.qkv`, ...), so that
checkpoints and per-layer results can be compared. Pre-norm blocks, fixed sine-cosine positions.

Shapes: B image, N patch token, K kept token, L = 1 + N or 1 + K, D width, H head, E = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope.models.patch_embed import PatchEmbed
from gradscope.models.positions import resample_table, sincos_table
from schedulers.errors import UsageError
from schedulers.tokens import kept_tokens, patch_tokens


@dataclass(frozen=True)
class ViTSize:
    """Width, depth and heads of a Vision Transformer; the MLP is `mlp_ratio` times as wide."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


VIT_SIZES = {
    "demo": ViTSize(width=48, depth=3, heads=1, mlp_ratio=2.0),
    "tiny": ViTSize(width=192, depth=12, heads=3),
    "small": ViTSize(width=384, depth=12, heads=6),
    "base": ViTSize(width=768, depth=12, heads=12),
}


class VisionTransformer(nn.Module):
    """ViT backbone: images (B, C, S, S) -> normalised class-token feature (B, D).

    `image_size` and `patch` fix the base grid, where the weights of the patch embedding and the position
    table live. `forward(images, patch=, keep_BK=)` uses another patch size and the given subset of tokens.
    """

    def __init__(self, size: ViTSize, *, image_size: int, patch: int, channels: int = 3) -> None:
        super().__init__()
        if size.width % size.heads:
            raise UsageError(f"width {size.width} is not a multiple of heads {size.heads}")
        patch_tokens(image_size, patch)
        self.image_size, self.patch, self.width = image_size, patch, size.width
        self.patch_embed = PatchEmbed(patch=patch, channels=channels, width=size.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(sincos_table(image_size // patch, size.width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=1e-6)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the MoCo-v3 recipe does: Xavier uniform (q, k and v apart), class token near zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            assert isinstance(block, Block)
            bound = math.sqrt(6 / (2 * self.width))
            nn.init.uniform_(block.attn.qkv.weight, -bound, bound)
        kernel = self.patch_embed.proj.weight
        bound = math.sqrt(6 / (kernel[0].numel() + self.width))
        nn.init.uniform_(kernel, -bound, bound)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, images_BCSS: Tensor, *, patch: int | None = None, keep_BK: Tensor | None = None) -> Tensor:
        """Class-token feature (B, D) after the final norm.

        `patch`: pixels per patch, any divisor of the image size (UsageError otherwise), default the base patch.
        `keep_BK`: int64 indices of the patch tokens to keep, per image; the others are dropped after the
        position embedding. None keeps all; the class token is always kept.
        """
        if images_BCSS.shape[-2:] != (self.image_size, self.image_size):
            raise UsageError(
                f"images of {tuple(images_BCSS.shape[-2:])} pixels given to a model built for "
                f"{self.image_size} x {self.image_size}"
            )
        tokens_BND = self.patch_embed(images_BCSS, patch)
        table_1LD = resample_table(self.pos_embed, math.isqrt(tokens_BND.shape[1]))
        tokens_BND = tokens_BND + table_1LD[:, 1:]
        if keep_BK is not None:
            tokens_BND = tokens_BND.gather(1, keep_BK[:, :, None].expand(-1, -1, self.width))
        class_B1D = (self.cls_token + table_1LD[:, :1]).expand(len(tokens_BND), -1, -1)
        x_BLD = torch.cat([class_B1D, tokens_BND], dim=1)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        feature_BD: Tensor = self.norm(x_BLD[:, 0])
        return feature_BD


class Block(nn.Module):
    """Pre-norm transformer block, (B, L, D) -> (B, L, D)."""

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=1e-6)
        self.attn = Attention(size)
        self.norm2 = nn.LayerNorm(size.width, eps=1e-6)
        self.mlp = Mlp(size)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        x_BLD = x_BLD + self.mlp(self.norm2(x_BLD))
        return x_BLD


class Attention(nn.Module):
    """Multi-head self-attention with one joint q, k, v projection, (B, L, D) -> (B, L, D)."""

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.proj = nn.Linear(size.width, size.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        qkv_3BHLE = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BHLE = F.scaled_dot_product_attention(*qkv_3BHLE)
        out_BLD: Tensor = self.proj(mixed_BHLE.transpose(1, 2).flatten(2))
        return out_BLD


class Mlp(nn.Module):
    """Two-layer perceptron with GELU, (B, L, D) -> (B, L, D)."""

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        hidden = round(size.width * size.mlp_ratio)
        self.fc1 = nn.Linear(size.width, hidden)
        self.fc2 = nn.Linear(hidden, size.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        out_BLD: Tensor = self.fc2(F.gelu(self.fc1(x_BLD)))
        return out_BLD


def random_keep(batch: int, tokens: int, dropout: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Indices (batch, K) of the tokens each image keeps: uniform, without replacement, independent per image.

    K = floor(tokens * (1 - dropout)) in exact arithmetic. Drawn on the generator's device and then moved,
    so a CPU generator gives the same subsets on every device.
    """
    kept = kept_tokens(tokens, dropout)
    noise_BN = torch.rand(batch, tokens, generator=generator, device=generator.device)
    return noise_BN.argsort(dim=1)[:, :kept].to(device)
