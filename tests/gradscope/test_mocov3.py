"""MoCo-v3: the loss against a direct computation, and the traps of its recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gradscope.methods import MoCoV3, MoCoV3Config, contrastive_loss, mlp_head, momentum_at
from gradscope.models import ViTSize
from schedulers import Strategy


def make(**settings: object) -> MoCoV3:
    torch.manual_seed(0)
    config = MoCoV3Config(head_hidden=16, head_width=8, **settings)  # type: ignore[arg-type]
    return MoCoV3(config, ViTSize(16, 1, 2), image_size=28, patch=4, channels=1)


def test_loss_equals_the_sum_over_anchors_in_float64() -> None:
    q, k = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    total = 0.0
    for i in range(6):
        cosines = [float(q[i] @ k[j] / (q[i].norm() * k[j].norm())) for j in range(6)]
        total -= math.log(math.exp(cosines[i] / 0.2) / sum(math.exp(c / 0.2) for c in cosines))
    assert float(contrastive_loss(q, k, 0.2)) == pytest.approx(2 * 0.2 * total / 6, rel=1e-12)


def test_heads_have_the_published_layout() -> None:
    kinds = [type(m) for m in mlp_head(16, layers=3, hidden=32, width_out=8)]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    head = mlp_head(16, layers=2, hidden=32, width_out=8)
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    assert head[1].affine and not head[-1].affine
    assert (head[0].out_features, head[-2].out_features) == (32, 8)


def test_no_gradient_reaches_the_key_encoder_or_the_frozen_patch_embedding() -> None:
    model = make()
    views = (torch.randn(8, 1, 28, 28), torch.randn(8, 1, 28, 28))
    model.loss(views, Strategy(patch=4, dropout=0.5), torch.Generator().manual_seed(0)).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    frozen = {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    assert without == frozen | {name for name, _ in model.named_parameters() if name.startswith("momentum_")}


def test_loss_leaves_the_key_encoders_parameters_alone() -> None:
    model = make()
    before = [p.clone() for p in model.momentum_backbone.parameters()]
    model.loss((torch.randn(4, 1, 28, 28),) * 2, Strategy(patch=4, dropout=0), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(before, model.momentum_backbone.parameters(), strict=True))


def test_only_the_query_loses_tokens_and_both_use_the_same_patch() -> None:
    model = make()
    lengths: dict[str, int] = {}
    for name in ("backbone", "momentum_backbone"):
        block = getattr(model, name).blocks[0]
        block.register_forward_hook(lambda m, inputs, out, name=name: lengths.update({name: inputs[0].shape[1]}))
    model.loss((torch.randn(4, 1, 28, 28),) * 2, Strategy(patch=7, dropout=0.5), torch.Generator())
    assert lengths == {"backbone": 9, "momentum_backbone": 17}
    assert model.cost(Strategy(patch=7, dropout=0.5)) == pytest.approx((3 * 9 + 17) / 50)


def test_momentum_moves_from_base_to_one_and_updates_parameters_only() -> None:
    assert momentum_at(0, 0.99) == pytest.approx(0.99)
    assert momentum_at(0.5, 0.99) == pytest.approx(0.995)
    assert momentum_at(1, 0.99) == 1
    model = make(momentum=0.9)
    with torch.no_grad():
        model.backbone.cls_token.fill_(1.0)
        model.momentum_backbone.cls_token.fill_(0.0)
    statistics = model.momentum_projector[1].running_mean.clone()
    model.update_momentum(0.0)
    assert model.momentum_backbone.cls_token.mean() == pytest.approx(0.1)
    assert torch.equal(model.momentum_projector[1].running_mean, statistics)
