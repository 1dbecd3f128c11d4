"""Vision Transformer with a patch size per forward pass and token dropout by index.

Parameter names are timm's (`cls_token`, `pos_embed`, `patch_embed.proj`, `blocks.N.attn.qkv`, ...), so that
checkpoints and per-layer results can be compared. Pre-norm blocks; sine-cosine positions, or learned ones.

Shapes: B image, N patch token, K kept token, L = 1 + N or 1 + K, D width, H head, E = D / H, R residual branch.
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


POSITIONS = ("sincos", "learned")


class VisionTransformer(nn.Module):
    """ViT backbone: images (B, C, S, S) -> normalised class-token feature (B, D).

    `image_size` and `patch` fix the base grid, where the weights of the patch embedding and the position
    table live. `forward(images, patch=, keep_BK=)` uses another patch size and the given subset of tokens.
    `positions`: "sincos", a fixed table, or "learned", a trained one. `norm_eps`: of every LayerNorm.
    `drop_path`: share of samples that skip a residual branch, rising linearly from 0 in the first block to this
    in the last (`random_paths` draws them). Raises UsageError for sizes that do not fit together.
    """

    def __init__(
        self,
        size: ViTSize,
        *,
        image_size: int,
        patch: int,
        channels: int = 3,
        positions: str = "sincos",
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if size.width % size.heads:
            raise UsageError(f"width {size.width} is not a multiple of heads {size.heads}")
        if positions not in POSITIONS:
            raise UsageError(f"positions={positions!r}: choose one of {', '.join(POSITIONS)}")
        if not 0 <= drop_path < 1:
            raise UsageError(f"drop_path={drop_path!r} is not in [0, 1)")
        patch_tokens(image_size, patch)
        self.size, self.image_size, self.patch, self.width = size, image_size, patch, size.width
        self.positions, self.drop_path = positions, drop_path
        self.patch_embed = PatchEmbed(patch=patch, channels=channels, width=size.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        learned = positions == "learned"
        self.pos_embed = nn.Parameter(sincos_table(image_size // patch, size.width), requires_grad=learned)
        self.blocks = nn.ModuleList(Block(size, norm_eps) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise by the recipe that goes with the positions.

        "sincos": Xavier uniform (q, k and v apart) and a class token near zero, as MoCo-v3's (Chen, Xie, He 2021).
        "learned": normal of standard deviation .02, cut off at 2, for linear layers, class token and positions, as
        DINO's (Caron et al. 2021); the patch embedding keeps a convolution's default.
        """
        learned = self.positions == "learned"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _truncated_normal(module.weight) if learned else nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if learned:
            _truncated_normal(self.cls_token)
            _truncated_normal(self.pos_embed)
            return
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

    def forward(
        self,
        images_BCSS: Tensor,
        *,
        patch: int | None = None,
        keep_BK: Tensor | None = None,
        paths_RB: Tensor | None = None,
    ) -> Tensor:
        """Class-token feature (B, D) after the final norm.

        `patch`: pixels per patch, any divisor of the images' size (UsageError otherwise), default the base patch.
        `keep_BK`: int64 indices of the patch tokens to keep, per image; the others are dropped after the
        position embedding. None keeps all; the class token is always kept.
        `paths_RB`: factor on each residual branch (two a block, attention first) of each image; None is 1.
        Images of another size than `image_size` (small crops) get the position table resampled to their grid.
        """
        x_BLD = self.embed(images_BCSS, patch=patch, keep_BK=keep_BK)
        for i, block in enumerate(self.blocks):
            x_BLD = block(x_BLD) if paths_RB is None else block(x_BLD, paths_RB[2 * i], paths_RB[2 * i + 1])
        feature_BD: Tensor = self.norm(x_BLD[:, 0])
        return feature_BD

    def embed(self, images_BCSS: Tensor, *, patch: int | None = None, keep_BK: Tensor | None = None) -> Tensor:
        """The sequence (B, L, D) that enters the first block; arguments as those of `forward`."""
        if images_BCSS.shape[-1] != images_BCSS.shape[-2]:
            raise UsageError(f"images of {tuple(images_BCSS.shape[-2:])} pixels: they must be square")
        tokens_BND = self.patch_embed(images_BCSS, patch)
        table_1LD = resample_table(self.pos_embed, math.isqrt(tokens_BND.shape[1]))
        tokens_BND = tokens_BND + table_1LD[:, 1:]
        if keep_BK is not None:
            tokens_BND = tokens_BND.gather(1, keep_BK[:, :, None].expand(-1, -1, self.width))
        class_B1D = (self.cls_token + table_1LD[:, :1]).expand(len(tokens_BND), -1, -1)
        return torch.cat([class_B1D.to(tokens_BND.dtype), tokens_BND], dim=1)

    def random_paths(self, batch: int, generator: torch.Generator) -> Tensor | None:
        """Factors (R, batch) for `forward`'s `paths_RB`, float32 on the CPU: 0 for a branch that is skipped.

        What is kept is scaled by 1 / (1 - rate), so that the mean stays (stochastic depth, Huang et al. 2016). None
        without `drop_path`, when nothing is drawn from `generator`.
        """
        if not self.drop_path:
            return None
        blocks = len(self.blocks)
        rate_R1 = torch.linspace(0, self.drop_path, blocks).repeat_interleave(2)[:, None]
        return (torch.rand(2 * blocks, batch, generator=generator) >= rate_R1).float() / (1 - rate_R1)


class Block(nn.Module):
    """Pre-norm transformer block, (B, L, D) -> (B, L, D), with optional factors (B) on its two branches."""

    def __init__(self, size: ViTSize, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.width, eps=norm_eps)
        self.attn = Attention(size)
        self.norm2 = nn.LayerNorm(size.width, eps=norm_eps)
        self.mlp = Mlp(size)

    def forward(self, x_BLD: Tensor, attention_B: Tensor | None = None, mlp_B: Tensor | None = None) -> Tensor:
        if attention_B is None or mlp_B is None:
            x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
            x_BLD = x_BLD + self.mlp(self.norm2(x_BLD))
            return x_BLD
        x_BLD = x_BLD + attention_B[:, None, None].to(x_BLD.dtype) * self.attn(self.norm1(x_BLD))
        x_BLD = x_BLD + mlp_B[:, None, None].to(x_BLD.dtype) * self.mlp(self.norm2(x_BLD))
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


def random_keep(
    batch: int,
    tokens: int,
    dropout: float,
    generator: torch.Generator,
    device: torch.device,
    rows: slice = slice(None),
) -> Tensor:
    """Indices (batch, K) of the tokens each image keeps: uniform, without replacement, independent per image.

    K = floor(tokens * (1 - dropout)) in exact arithmetic. Drawn on the generator's device and then moved,
    so a CPU generator gives the same subsets on every device. Of `rows` alone, but drawn for the whole batch.
    """
    kept = kept_tokens(tokens, dropout)
    noise_BN = torch.rand(batch, tokens, generator=generator, device=generator.device)
    return noise_BN[rows].argsort(dim=1)[:, :kept].to(device)


def _truncated_normal(tensor: Tensor) -> None:
    nn.init.trunc_normal_(tensor, std=0.02, a=-2.0, b=2.0)
