"""MoCo-v3: the loss and its gradient against explicit loops in float64, and the facts of its recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradscope.methods import contrastive_loss, contrastive_losses, mlp_head, momentum_at
from schedulers import Strategy
from tests.gradscope.small_methods import (
    assert_same,
    gradients,
    make_method,
    make_views,
    seeded,
    sequence_lengths,
    value,
)

FULL = Strategy(patch=4, dropout=0)


def by_loops(query_BF: Tensor, key_BF: Tensor, temperature: float) -> Tensor:
    """2T times the mean over queries of -log softmax of the cosines, written as sums."""
    total = query_BF.new_zeros(())
    for i in range(len(query_BF)):
        cosines = [
            (query_BF[i] * key).sum() / (query_BF[i].square().sum().sqrt() * key.square().sum().sqrt())
            for key in key_BF
        ]
        total = total - torch.log((cosines[i] / temperature).exp() / sum((c / temperature).exp() for c in cosines))
    return 2 * temperature * total / len(query_BF)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_and_gradient_equal_the_sum_over_anchors_in_float64(temperature: float) -> None:
    query, key = torch.randn(2, 6, 5, dtype=torch.float64, generator=seeded()).unbind(0)
    query.requires_grad_(True)
    loss, expected = contrastive_loss(query, key, temperature), by_loops(query, key, temperature)
    assert value(loss) == pytest.approx(value(expected), rel=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(x, query)[0] for x in (loss, expected)), rtol=1e-12, atol=1e-14)


def test_one_term_a_query_whose_positive_may_lie_further_down() -> None:
    """Passes over parts of the queries, each against all keys, are the terms of the whole."""
    query, key = torch.randn(2, 6, 5, dtype=torch.float64, generator=seeded()).unbind(0)
    terms = contrastive_losses(query, key, 0.2)
    assert terms.shape == (6,) and value(terms.mean()) == pytest.approx(value(by_loops(query, key, 0.2)))
    parts = [contrastive_losses(query[i : i + 2], key, 0.2, first=i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), terms)


def test_the_loss_is_computed_in_float32_inside_autocast() -> None:
    query, key = torch.randn(2, 16, 32, generator=seeded()).unbind(0)
    outside = contrastive_losses(query, key, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive_losses(query, key, 0.2)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [FULL, Strategy(patch=7, dropout=0.5)])
def test_a_methods_loss_and_gradient_equal_those_of_the_loops(strategy: Strategy) -> None:
    model, views = make_method("mocov3"), make_views("mocov3", 5)
    loss = model.loss(views, strategy, seeded())
    query = model.predictor(model.projector(model.features(views[0], strategy, seeded(), None)))
    key = model.momentum_projector(model.momentum_backbone(views[1], patch=int(strategy.number("patch")))).detach()
    expected = by_loops(query, key, 0.2)
    assert value(loss) == pytest.approx(value(expected), rel=1e-12)
    assert_same(gradients(model, loss), gradients(model, expected), 1e-12)
    given = model.loss(views, strategy, seeded(), targets=model.targets(views, strategy))
    assert value(given) == pytest.approx(value(expected), rel=1e-12)


def test_heads_have_the_published_layout() -> None:
    norm, linear = nn.BatchNorm1d, nn.Linear
    projector, predictor = (mlp_head(16, layers=n, hidden=32, width_out=8) for n in (3, 2))
    kinds = [norm if isinstance(m, norm) else type(m) for m in projector]
    assert kinds == [linear, norm, nn.ReLU, linear, norm, nn.ReLU, linear, norm]
    kinds = [norm if isinstance(m, norm) else type(m) for m in predictor]
    assert kinds == [linear, norm, nn.ReLU, linear, norm]
    for head in (projector, predictor):
        assert all(m.bias is None for m in head if isinstance(m, linear))
        affine = [m.affine for m in head if isinstance(m, norm)]
        assert affine == [True] * (len(affine) - 1) + [False]
        assert next((m.in_features, m.out_features) for m in head if isinstance(m, linear)) == (16, 32)
        assert head[-2].out_features == 8
    assert {name.split(".")[0] for name, _ in projector.named_parameters()} == {"0", "1", "3", "4", "6"}


def test_the_method_has_the_projector_three_deep_and_the_predictor_two_behind_it() -> None:
    model = make_method("mocov3")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith("pr") and n.endswith("weight")}
    assert shapes["projector.0.weight"] == (12, 16) and shapes["projector.6.weight"] == (8, 12)
    assert shapes["predictor.0.weight"] == (12, 8) and shapes["predictor.3.weight"] == (8, 12)
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"backbone", "projector", "predictor", "momentum_backbone", "momentum_projector"}


def test_no_gradient_reaches_the_key_encoder_or_the_frozen_patch_embedding() -> None:
    model = make_method("mocov3")
    model.loss(make_views("mocov3", 8), Strategy(patch=4, dropout=0.5), seeded()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    frozen = {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"}
    assert without == frozen | {name for name, _ in model.named_parameters() if name.startswith("momentum_")}
    free = make_method("mocov3", freeze_patch_embed=False)
    assert free.backbone.patch_embed.proj.weight.requires_grad


def test_loss_and_targets_leave_the_key_encoders_parameters_alone() -> None:
    model, views = make_method("mocov3"), make_views("mocov3", 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    keys = model.targets(views, FULL)
    model.loss(views, FULL, seeded(), targets=keys)
    assert keys.shape == (4, 8) and not keys.requires_grad
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("patch", [4, 7, 14])
@pytest.mark.parametrize("dropout", [0, 0.5, 0.75])
def test_only_the_query_loses_tokens_both_have_the_patch_and_the_cost_is_table_1s(patch: int, dropout: float) -> None:
    model, strategy = make_method("mocov3", patch=4), Strategy(patch=patch, dropout=dropout)
    with sequence_lengths(model.backbone, model.momentum_backbone) as (query, key):
        model.loss(make_views("mocov3", 4), strategy, seeded())
    tokens = (28 // patch) ** 2
    kept = tokens - math.ceil(tokens * dropout)
    assert query == [(4, kept + 1)] and key == [(4, tokens + 1)]
    counts = model.tokens(strategy)
    assert (counts.query, counts.key, counts.base) == (kept + 1, tokens + 1, 50)
    assert model.cost(strategy) == pytest.approx((3 * (kept + 1) + tokens + 1) / 50, rel=1e-12)


def test_strategies_of_one_patch_share_their_keys_and_others_do_not() -> None:
    model, views = make_method("mocov3"), make_views("mocov3", 4)
    full, half, large = FULL, Strategy(patch=4, dropout=0.5), Strategy(patch=7, dropout=0.5)
    assert model.target_key(full) == model.target_key(half) != model.target_key(large)
    torch.testing.assert_close(model.targets(views, full), model.targets(views, half), rtol=0, atol=0)
    assert not torch.allclose(model.targets(views, full), model.targets(views, large))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_momentum_moves_from_base_to_one_along_half_a_cosine(fraction: float) -> None:
    expected = 1 - 0.5 * (1 + math.cos(math.pi * fraction)) * (1 - 0.99)
    assert momentum_at(fraction, 0.99) == pytest.approx(expected, rel=1e-14)


def test_the_key_encoder_follows_before_the_step_with_parameters_alone() -> None:
    model = make_method("mocov3", momentum=0.9)
    query = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("momentum_")}
    keys = {n: p.clone() for n, p in model.named_parameters() if n.startswith("momentum_")}
    assert any(not torch.equal(keys[f"momentum_{n}"], p) for n, p in query.items() if f"momentum_{n}" in keys)
    model.projector[1].running_mean.fill_(3.0)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    model.before_step(0.25)
    m = 1 - 0.5 * (1 + math.cos(math.pi * 0.25)) * 0.1
    for name, before in keys.items():
        expected = m * before + (1 - m) * query[name.removeprefix("momentum_")]
        torch.testing.assert_close(model.get_parameter(name).data, expected, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(query[name], model.get_parameter(name)) for name in query)
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())
    state = {name: p.clone() for name, p in model.named_parameters()}
    model.after_step(0.25, model.targets(make_views("mocov3", 4), FULL))
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


def test_the_keys_batchnorm_has_statistics_of_its_own() -> None:
    model, views = make_method("mocov3"), make_views("mocov3", 8)
    views[1] = 3 * views[1] + 1
    model.loss(views, FULL, seeded())
    own, keys = model.projector[1], model.momentum_projector[1]
    assert int(own.num_batches_tracked) == int(keys.num_batches_tracked) == 1
    assert not torch.allclose(own.running_mean, keys.running_mean)


def test_branches_are_skipped_by_the_query_encoder_in_training_alone() -> None:
    model, views = make_method("mocov3", drop_path=0.6), make_views("mocov3", 8)
    keys = model.targets(views, FULL)
    torch.testing.assert_close(keys, model.targets(views, FULL), rtol=0, atol=0)
    first, second = (model.features(views[0], FULL, seeded(seed), None) for seed in (1, 2))
    assert not torch.allclose(first, second)
    model.eval()
    first, second = (model.features(views[0], FULL, seeded(seed), None) for seed in (1, 2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert model.evaluated is model.backbone and not model.independent_terms and not model.two_sided
