"""A ViT's shape from the shapes of its tensors, and the backbone that has it.

What no tensor tells: the number of attention heads, and the epsilon of the norms. A file beside them may; else heads
follow the rule of the code base, with a warning, for a wrong number loads without any error and gives other features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.errors import CheckpointError, UsageError
from gradscope.foreign.checkpoint import ForeignCheckpoint, Tensors
from gradscope.foreign.values import number_in
from gradscope.models import VisionTransformer, ViTSize
from gradscope.models.positions import resample_table, sincos_table

HEAD_WIDTH = 64  # of every published ViT of timm and DINO


@dataclass(frozen=True)
class Architecture:
    """What a backbone is built from. `image_size`: of the stored position table, pixels; `guessed`: the heads are."""

    size: ViTSize
    image_size: int
    patch: int
    channels: int
    positions: str
    norm_eps: float
    drop_path: float = 0.0
    guessed: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        if not self.guessed:
            return ()
        return (
            f"{self.size.heads} attention heads is a guess from the width {self.size.width}; no tensor tells them, and "
            "another number gives other features: confirm it with --heads",
        )


def architecture_of(checkpoint: ForeignCheckpoint, heads: int | None = None) -> Architecture:
    """The shape of a checkpoint's backbone; `heads` where the user names them.

    Raises CheckpointError for shapes that make no plain ViT on square images, UsageError for a number of heads that
    does not divide the width, or where none is known.
    """
    tensors, path = checkpoint.backbone, checkpoint.path
    kernel_DCPP, table_1ND = tensors["patch_embed.proj.weight"], tensors["pos_embed"]
    if kernel_DCPP.ndim != 4 or kernel_DCPP.shape[2] != kernel_DCPP.shape[3]:
        raise CheckpointError(f"{path}: patch_embed.proj.weight {tuple(kernel_DCPP.shape)} is not of square patches")
    width, channels, patch, _ = kernel_DCPP.shape
    if table_1ND.ndim != 3 or table_1ND.shape[0] != 1 or table_1ND.shape[2] != width:
        raise CheckpointError(f"{path}: pos_embed {tuple(table_1ND.shape)} is not (1, positions, width={width})")
    side = _side(table_1ND, checkpoint)
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    activation = checkpoint.settings.get("hidden_act", "gelu")
    if activation != "gelu":
        raise CheckpointError(f"{path}: config.json: hidden_act is {activation!r}; the bundled ViT has gelu")
    count, guessed = heads or checkpoint.heads_count, False
    if not (heads or checkpoint.heads_told):
        guessed, count = True, count or (width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else None)
    if count is None:
        raise UsageError(
            f"{path}: no tensor tells the attention heads, and the width {width} is not a multiple of {HEAD_WIDTH}, "
            "which published models have per head; give --heads N"
        )
    if count < 1 or width % count:
        raise UsageError(f"--heads {count}: does not divide the width {width} of {path}")
    drop_path = number_in(checkpoint.settings, "drop_path_rate") or 0.0
    return Architecture(
        ViTSize(width, depth, count, hidden / width), side * patch, patch, channels, _positions(table_1ND, side),
        checkpoint.norm_eps, drop_path if checkpoint.layout == "DINO" else 0.0, guessed,
    )  # fmt: skip


def backbone_module(architecture: Architecture, image_size: int | None = None) -> VisionTransformer:
    """A backbone of that shape for images of `image_size` pixels, its weights not yet the checkpoint's."""
    a, size = architecture, image_size or architecture.image_size
    with torch.random.fork_rng(devices=[]):
        return VisionTransformer(
            a.size, image_size=size, patch=a.patch, channels=a.channels, positions=a.positions, norm_eps=a.norm_eps,
            drop_path=a.drop_path,
        )  # fmt: skip


def fitted(tensors: Tensors, side: int) -> dict[str, Tensor]:
    """A backbone's tensors with the position table resampled to a grid of `side` x `side` patches, all in float32."""
    return {
        name: resample_table(value.float(), side) if name == "pos_embed" else value.float()
        for name, value in tensors.items()
    }


def load_backbone(
    checkpoint: ForeignCheckpoint, *, heads: int | None = None, momentum: bool = False
) -> VisionTransformer:
    """The checkpoint's backbone (or, with `momentum`, the average's: DINO's teacher) as the bundled ViT, on the CPU."""
    tensors = checkpoint.momentum_backbone if momentum else checkpoint.backbone
    if tensors is None:
        raise CheckpointError(f"{checkpoint.path}: holds no momentum backbone")
    model = backbone_module(architecture_of(checkpoint, heads))
    model.load_state_dict(fitted(tensors, model.image_size // model.patch))
    return model


def _side(table_1ND: Tensor, checkpoint: ForeignCheckpoint) -> int:
    """Side of the grid of positions, of which there is one more, the class token's."""
    positions = table_1ND.shape[1]
    side = math.isqrt(positions - 1)
    if side * side == positions - 1 and side:
        return side
    extra = {
        positions: "none for the class token",
        positions - 2: "two more, as with a distillation token",
        positions - 5: "five more, as with register tokens",
    }
    why = next((text for grid, text in extra.items() if grid > 0 and math.isqrt(grid) ** 2 == grid), "no square grid")
    raise CheckpointError(
        f"{checkpoint.path}: pos_embed {tuple(table_1ND.shape)} has {why}; the bundled ViT has one position for the "
        "class token and a square grid"
    )


def _positions(table_1ND: Tensor, side: int) -> str:
    """Whether a table is one of the two sine-cosine layouts in use (row first or column first), hence not learned."""
    width = table_1ND.shape[2]
    if width % 4:
        return "learned"
    known_1ND = sincos_table(side, width)
    swapped_1ND = torch.cat([known_1ND[..., width // 2 :], known_1ND[..., : width // 2]], dim=2)
    fixed = any(table_1ND.float().allclose(known, atol=1e-3) for known in (known_1ND, swapped_1ND))
    return "sincos" if fixed else "learned"
