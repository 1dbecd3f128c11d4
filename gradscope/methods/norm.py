"""BatchNorm whose statistics are those of the batches of all ranks together.

torch's SyncBatchNorm needs a GPU; this one runs wherever the ranks can gather tensors. One process alone runs torch's
own BatchNorm1d, to the bit.

Shapes: B sample of this rank, F feature, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradscope.ranks import ALONE, Ranks


class BatchNorm1d(nn.BatchNorm1d):
    """torch's BatchNorm1d over the batches of all `ranks`, which must be of one size; set `ranks` to synchronise.

    In training mode mean μ = Σ μ_r / R and variance σ² = Σ (σ_r² + (μ_r - μ)²) / R, with gradient through them into
    the samples of every rank, so that the mean over ranks of the gradients is that of one rank with all samples.
    """

    ranks: Ranks = ALONE

    def forward(self, x_BF: Tensor) -> Tensor:
        if self.ranks.size == 1 or not self.training:
            return super().forward(x_BF)
        wide_BF = x_BF.float() if x_BF.dtype in (torch.bfloat16, torch.float16) else x_BF
        own_2F = torch.stack([wide_BF.mean(0), wide_BF.var(0, correction=0)])
        mean_RF, variance_RF = self.ranks.gather_with_gradient(own_2F).unbind(1)
        mean_F = mean_RF.mean(0)
        variance_F = variance_RF.mean(0) + (mean_RF - mean_F).square().mean(0)
        self._follow(mean_F.detach(), variance_F.detach(), len(x_BF) * self.ranks.size)
        y_BF = (wide_BF - mean_F) * torch.rsqrt(variance_F + self.eps)
        if self.weight is not None:
            y_BF = y_BF * self.weight + self.bias
        return y_BF.to(x_BF.dtype)

    @torch.no_grad()
    def _follow(self, mean_F: Tensor, variance_F: Tensor, count: int) -> None:
        """Move the running statistics as torch does: the variance unbiased."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_F.to(self.running_mean), share)
        self.running_var.lerp_((variance_F * (count / (count - 1))).to(self.running_var), share)
