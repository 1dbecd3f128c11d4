"""Published settings of the methods, and those that suit the demo's small model.

Sources: MoCo-v3 for ViT (Chen, Xie, He 2021 and the recipe they published), SimCLR on ViT as SLIP trains it (Mu et
al. 2021; the warm-up of a tenth is VISSL's), DINO (Caron et al. 2021 and the defaults of its published training).
Epochs have become fractions of the budget: 40 of MoCo-v3's 300 epochs of warm-up, 10 of DINO's 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED: dict[str, dict[str, Any]] = {
    "mocov3": {
        "lr": 1.5e-4, "weight_decay": 0.1, "warmup": 40 / 300, "head_hidden": 4096, "head_width": 256,
        "temperature": 0.2, "momentum": 0.99, "freeze_patch_embed": True,
    },
    "simclr": {
        "lr": 2e-4, "weight_decay": 0.1, "betas": (0.9, 0.98), "warmup": 0.1, "head_hidden": 4096, "head_width": 256,
        "temperature": 0.1, "freeze_patch_embed": False,
    },
    "dino": {
        "lr": 5e-4, "lr_end": 1e-6, "weight_decay": 0.04, "weight_decay_end": 0.4, "decay_biases": False, "warmup": 0.1,
        "clip": 3.0, "head_hidden": 2048, "head_width": 256, "prototypes": 65536, "temperature": 0.1,
        "momentum": 0.996, "freeze_patch_embed": False, "positions": "learned", "drop_path": 0.1, "small_crops": 8,
        "freeze_last_layer": 0.01,
    },
}  # fmt: skip
"""By method, for ViT-Ti, -S and -B. SimCLR's rate is 3.2e-3 at a batch of 4,096, in terms of one of 256."""

PAPER_GRID: dict[str, Any] = {"patch": 16, "patches": (), "dropouts": (0.0, 0.25, 0.5, 0.75, 0.9)}
"""The paper's grid: at 240 pixels the patches that divide the image, up to three times the base patch, are its six."""

BY_MODEL: dict[tuple[str, str], dict[str, Any]] = {
    ("mocov3", "small"): {"heads": 12},  # timm's and DINO's ViT-S has 6
    ("dino", "tiny"): {"fixed_norm": False},
    ("dino", "small"): {"fixed_norm": False},
}

DEMO: dict[str, dict[str, Any]] = {
    "mocov3": {},  # TrainConfig's own defaults
    "simclr": {
        "lr": 4e-3, "betas": (0.9, 0.98), "temperature": 0.1, "freeze_patch_embed": False,
    },
    "dino": {
        "lr": 4e-3, "lr_end": 1e-6, "weight_decay": 0.04, "decay_biases": False, "head_hidden": 256, "head_width": 64,
        "head_batchnorm": True, "prototypes": 1024, "temperature": 0.1, "momentum": 0.99, "freeze_patch_embed": False,
        "small_crops": 2,
    },
}  # fmt: skip


SMALL_SHARE = 96 / 224
"""Side of DINO's small crops over that of the image, as published."""


def small_crop_size(image_size: int, patch: int) -> int:
    """Pixels of DINO's small crops: SMALL_SHARE of the image, to the nearest multiple of the patch."""
    return patch * max(1, round(image_size * SMALL_SHARE / patch))


def recipe(method: str, model: str) -> Mapping[str, Any]:
    """Settings of TrainConfig for `method` on `model`; its own defaults are those of MoCo-v3 on the demo's."""
    if model == "demo":
        return DEMO.get(method, {})
    return {**PAPER_GRID, **PUBLISHED.get(method, {}), **BY_MODEL.get((method, model), {})}
