"""Fixed two-dimensional position tables and their resampling to another patch size.

Shapes: G base grid side, H other grid side, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradscope.models.patch_embed import interpolation_matrix
from schedulers.errors import UsageError


def sincos_table(side: int, width: int) -> Tensor:
    """Sine-cosine table (1, 1 + side**2, width), float32: a zero row for the class token, then the grid, row-major.

    The first half of the width encodes the row, the second the column; in each, width/4 sines, then
    as many cosines, at frequencies 10000^(-i/(width/4)) (the layout of MoCo-v3's tables).
    """
    if width % 4:
        raise UsageError(f"width {width} cannot carry a two-dimensional sine-cosine table: it must be a multiple of 4")
    frequency_F = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle_GF = torch.arange(side, dtype=torch.float64)[:, None] * frequency_F
    code_GE = torch.cat([angle_GF.sin(), angle_GF.cos()], dim=1)
    row_GGE = code_GE[:, None, :].expand(side, side, -1)
    column_GGE = code_GE[None, :, :].expand(side, side, -1)
    table_ND = torch.cat([row_GGE, column_GGE], dim=2).reshape(side * side, width)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table_ND]).float()[None]


def resample_table(table_1ND: Tensor, side: int) -> Tensor:
    """The table at the physical patch centres of a grid of `side` x `side`: (1, 1+G*G, D) -> (1, 1+H*H, D).

    A patch of q pixels centred at (i + 1/2) q sits at (i + 1/2) q/p - 1/2 in units of the base grid, and
    its code is interpolated there (bilinear), so a token keeps the position of the pixels it shows.
    The class token's row is passed through.
    """
    base = round((table_1ND.shape[1] - 1) ** 0.5)
    if side == base:
        return table_1ND
    matrix_HG = interpolation_matrix(base, side).to(table_1ND)
    grid_GGD = table_1ND[0, 1:].reshape(base, base, -1)
    with torch.autocast(table_1ND.device.type, enabled=False):
        grid_HHD = torch.einsum("hg,gkd,ik->hid", matrix_HG, grid_GGD, matrix_HG)
    return torch.cat([table_1ND[:, :1], grid_HHD.flatten(0, 1)[None]], dim=1)
