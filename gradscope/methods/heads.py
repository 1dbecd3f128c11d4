"""Projection and prediction heads of self-supervised methods."""

from __future__ import annotations

from torch import nn


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
        modules.append(nn.BatchNorm1d(size_out, affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
