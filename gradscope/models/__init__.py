"""Vision Transformers whose patch size and kept tokens are arguments of the forward pass."""

from gradscope.models.patch_embed import PatchEmbed, resize_patch_weight
from gradscope.models.vit import POSITIONS, VIT_SIZES, VisionTransformer, ViTSize, random_keep

__all__ = ["POSITIONS", "VIT_SIZES", "PatchEmbed", "ViTSize", "VisionTransformer", "random_keep", "resize_patch_weight"]
