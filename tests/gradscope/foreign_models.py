"""Models and checkpoint files as other code bases have them, in a few lines of plain torch: independent of gradscope's.

Shapes: B image, L token, D width, H head, E = D / H.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, DEPTH, HEADS = 48, 2, 4


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        q, k, v = self.qkv(x_BLD).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weight_BHLL = ((q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weight_BHLL @ v).transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """A ViT whose parameters timm's names have; `head` is whatever the code base puts there."""

    def __init__(
        self, *, width: int = WIDTH, heads: int = HEADS, image: int = 16, patch: int = 4, channels: int = 3,
        head: nn.Module | None = None, fixed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        table = sincos(image // patch, width) if fixed else torch.randn(1, 1 + (image // patch) ** 2, width)
        self.pos_embed = nn.Parameter(table, requires_grad=not fixed)
        self.patch_embed = PatchEmbed(width, patch, channels)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = head or nn.Identity()
        for parameter in self.parameters():
            if parameter.requires_grad:  # far from the initial ones and zeros, so that every tensor counts
                nn.init.normal_(parameter, std=0.2)

    def features(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def sincos(side: int, width: int, *, column_first: bool = False) -> Tensor:
    """The fixed table, with a loop for every entry: the row's (or column's) angles in the first half."""
    table = torch.zeros(1 + side * side, width)
    for row in range(side):
        for column in range(side):
            for half, at in enumerate((column, row) if column_first else (row, column)):
                for i in range(width // 4):
                    angle = at / 10000 ** (i / (width / 4))
                    place = half * width // 2 + i
                    table[1 + row * side + column, place] = np.sin(angle)
                    table[1 + row * side + column, place + width // 4] = np.cos(angle)
    return table[None]


def contrastive_head(sizes: tuple[int, ...]) -> nn.Sequential:
    """moco-v3's: linear layers without bias, BatchNorm and ReLU between, a BatchNorm without weights at the end."""
    layers: list[nn.Module] = []
    for i, (size_in, size_out) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        layers += [nn.Linear(size_in, size_out, bias=False), nn.BatchNorm1d(size_out, affine=not last)]
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


class MoCo(nn.Module):
    """moco-v3's module: the projector is the encoder's head, the patch embedding is frozen."""

    def __init__(self, *, frozen: bool = True, **size: Any) -> None:
        super().__init__()
        self.base_encoder = ViT(head=contrastive_head((WIDTH, 24, 24, 8)), fixed=True, **size)
        self.momentum_encoder = ViT(head=contrastive_head((WIDTH, 24, 24, 8)), fixed=True, **size)
        if frozen:
            self.momentum_encoder.patch_embed.load_state_dict(self.base_encoder.patch_embed.state_dict())
        self.base_encoder.patch_embed.requires_grad_(not frozen)
        self.momentum_encoder.requires_grad_(False)
        self.predictor = contrastive_head((8, 24, 8))

    def loss(self, query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
        q = F.normalize(self.predictor(self.base_encoder(query)), dim=1)
        with torch.no_grad():
            k = F.normalize(self.momentum_encoder(key), dim=1)
        logits = q @ k.T / temperature
        return F.cross_entropy(logits, torch.arange(len(q))) * 2 * temperature


class Prototypes(nn.Module):
    """A linear layer under torch's older weight norm: parameters weight_g, then weight_v."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(size_out, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.randn(size_out, size_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class DinoHead(nn.Module):
    def __init__(self, prototypes: int = 20) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 8))
        self.last_layer = Prototypes(8, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Wrapper(nn.Module):
    """DINO's pairing of backbone and head."""

    def __init__(self, **size: Any) -> None:
        super().__init__()
        self.backbone, self.head = ViT(**size), DinoHead()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def wrapped(module: nn.Module, prefix: str = "module.") -> dict[str, Tensor]:
    return {prefix + name: value.clone() for name, value in module.state_dict().items()}


def trained_a_little(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Any, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.zero_grad()


def save_moco(path: Path, model: MoCo, *, epoch: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """`checkpoint_%04d.pth.tar` of moco-v3; `epoch` is what it writes, the index plus one."""
    content = {
        "epoch": epoch, "arch": "vit_small", "state_dict": wrapped(model),
        "optimizer": optimizer.state_dict() if optimizer else {}, "scaler": {"scale": 65536.0},
    }  # fmt: skip
    torch.save(content, path)


def dino_optimizer(student: nn.Module) -> torch.optim.AdamW:
    """DINO's two groups, with learning rates as NumPy numbers, as its schedules leave them."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups[name.endswith(".bias") or parameter.ndim == 1].append(parameter)
    optimizer = torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}])
    for group in optimizer.param_groups:
        group["lr"] = np.float64(1e-3)
    return optimizer


def save_dino(
    path: Path, student: Wrapper, teacher: Wrapper, *, epoch: int, optimizer: torch.optim.Optimizer | None = None,
    **arguments: Any,
) -> None:  # fmt: skip
    """`checkpoint%04d.pth` of DINO, with its arguments as a Namespace."""
    told = {
        "arch": "vit_tiny", "epochs": 10, "teacher_temp": 0.07, "warmup_teacher_temp": 0.04,
        "warmup_teacher_temp_epochs": 4, "local_crops_number": 2, "global_crops_scale": (0.5, 1.0),
        "local_crops_scale": (0.1, 0.5), "norm_last_layer": True, "drop_path_rate": 0.0,
    }  # fmt: skip
    content = {
        "student": wrapped(student), "teacher": wrapped(teacher, ""), "epoch": epoch,
        "optimizer": optimizer.state_dict() if optimizer else {}, "args": argparse.Namespace(**{**told, **arguments}),
        "dino_loss": {"center": torch.linspace(-0.5, 0.5, 20)[None]}, "fp16_scaler": None,
    }  # fmt: skip
    torch.save(content, path)


def twin(module: nn.Module, seed: int = 7) -> Any:
    """A copy with other weights, for the average's half: to tell which half was read."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other.requires_grad_(False)
