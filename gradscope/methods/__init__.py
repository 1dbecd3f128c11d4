"""Self-supervised methods: losses, heads, momentum."""

from gradscope.methods.heads import mlp_head
from gradscope.methods.mocov3 import MoCoV3, MoCoV3Config, contrastive_loss, momentum_at

__all__ = ["MoCoV3", "MoCoV3Config", "contrastive_loss", "mlp_head", "momentum_at"]
