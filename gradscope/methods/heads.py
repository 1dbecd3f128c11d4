"""Projection and prediction heads of self-supervised methods."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradscope.methods.norm import BatchNorm1d


def mlp_head(width_in: int, *, layers: int, hidden: int, width_out: int) -> nn.Sequential:
    """MoCo-v3's head for ViT, (batch, width_in) -> (batch, width_out).

    `layers` linear layers without bias, each hidden one followed by BatchNorm and ReLU, the last one by a
    BatchNorm without affine parameters. Used with three layers as projector, with two as predictor
    (Chen, Xie, He 2021, section 4 and the recipe they published).
    """
    modules: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        size_in, size_out = (width_in if layer == 0 else hidden), (width_out if last else hidden)
        modules.append(nn.Linear(size_in, size_out, bias=False))
        modules.append(BatchNorm1d(size_out, affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def simclr_head(width_in: int, *, hidden: int, width_out: int) -> nn.Sequential:
    """SimCLR's projector on a ViT, (batch, width_in) -> (batch, width_out), as SLIP has it (Mu et al. 2021).

    Three linear layers with biases, the two hidden ones followed by BatchNorm and ReLU, nothing after the last.
    """
    return nn.Sequential(
        nn.Linear(width_in, hidden),
        BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, width_out),
    )


class PrototypeLayer(nn.Module):
    """Cosine-like logits, (batch, F) -> (batch, K): a linear layer without bias whose rows have the lengths g.

    Weight g v / ‖v‖ (Salimans and Kingma 2016) with parameters `weight_g` (K, 1), set to 1, and `weight_v` (K, F).
    `fixed_norm`: `weight_g` is not trained (DINO's `norm_last_layer`).
    """

    def __init__(self, width_in: int, prototypes: int, *, fixed_norm: bool = True) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not fixed_norm)
        self.weight_v = nn.Parameter(torch.empty(prototypes, width_in))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # a linear layer's default

    def forward(self, x_BF: Tensor) -> Tensor:
        return F.linear(x_BF, self.weight_g * F.normalize(self.weight_v, dim=1))


class DINOHead(nn.Module):
    """DINO's head, (batch, width) -> (batch, prototypes): an MLP, L2 normalisation, a `PrototypeLayer` (`last_layer`).

    Without BatchNorm in the MLP, as published, the images of a batch stay independent (Caron et al. 2021, section
    3.1).
    """

    def __init__(self, mlp: nn.Sequential, last_layer: PrototypeLayer) -> None:
        super().__init__()
        self.mlp, self.last_layer = mlp, last_layer

    def forward(self, x_BD: Tensor) -> Tensor:
        logits_BK: Tensor = self.last_layer(F.normalize(self.mlp(x_BD), dim=1))
        return logits_BK


def dino_head(
    width_in: int, *, hidden: int, bottleneck: int, prototypes: int, fixed_norm: bool = True, batchnorm: bool = False
) -> DINOHead:
    """The published head: linear layers of `hidden`, `hidden` and `bottleneck` with GELU between, then prototypes.

    Published sizes are 2048, 256 and 65,536. Weights are normal of standard deviation .02, cut off at 2; biases 0.
    `batchnorm`: BatchNorm before each GELU, an option of the published training that is off by default. A small model
    at the start gives nearly the same logits for all images, so that centring leaves little to learn; this cures it.
    """
    layers: list[nn.Module] = []
    for size_in, size_out in ((width_in, hidden), (hidden, hidden)):
        layers += [nn.Linear(size_in, size_out), *([BatchNorm1d(size_out)] if batchnorm else []), nn.GELU()]
    mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
    for module in mlp:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-2.0, b=2.0)
            nn.init.zeros_(module.bias)
    return DINOHead(mlp, PrototypeLayer(bottleneck, prototypes, fixed_norm=fixed_norm))
