"""SimCLR on a ViT: NT-Xent and its gradient against explicit loops in float64, and the facts of its recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradscope.methods import nt_xent_loss, nt_xent_losses, simclr_head
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


def by_loops(first_BF: Tensor, second_BF: Tensor, temperature: float) -> Tensor:
    """Mean over all 2N anchors of -log e(a, positive) / Σ e(a, other), over the 2N - 1 other views."""
    views, count = [*first_BF, *second_BF], len(first_BF)
    total = first_BF.new_zeros(())
    for i, anchor in enumerate(views):
        exponentials = {
            j: ((anchor * other).sum() / (anchor.norm() * other.norm()) / temperature).exp()
            for j, other in enumerate(views)
            if j != i
        }
        assert len(exponentials) == 1 + (2 * count - 2)
        total = total - torch.log(exponentials[(i + count) % (2 * count)] / sum(exponentials.values()))
    return total / (2 * count)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_loss_and_gradient_equal_the_sum_over_both_anchors_in_float64(temperature: float) -> None:
    first, second = (x.clone().requires_grad_(True) for x in torch.randn(2, 5, 4, dtype=torch.float64).unbind(0))
    loss, expected = nt_xent_loss(first, second, temperature), by_loops(first, second, temperature)
    assert value(loss) == pytest.approx(value(expected), rel=1e-13)
    for found, wanted in zip(*(torch.autograd.grad(x, (first, second)) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
        assert found.norm() > 1e-3  # through both sides


def test_one_term_an_image_and_swapping_the_views_changes_nothing() -> None:
    first, second = torch.randn(2, 5, 4, dtype=torch.float64, generator=seeded()).unbind(0)
    terms = nt_xent_losses(first, second, 0.1)
    assert terms.shape == (5,) and value(terms.mean()) == pytest.approx(value(by_loops(first, second, 0.1)))
    torch.testing.assert_close(nt_xent_losses(second, first, 0.1), terms)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(nt_xent_losses(first[order], second[order], 0.1), terms[order])


def test_the_loss_is_computed_in_float32_inside_autocast() -> None:
    first, second = torch.randn(2, 16, 32, generator=seeded()).unbind(0)
    outside = nt_xent_losses(first, second, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = nt_xent_losses(first, second, 0.1)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [FULL, Strategy(patch=7, dropout=0.5)])
def test_a_methods_loss_and_gradient_equal_those_of_the_loops(strategy: Strategy) -> None:
    """The two views are encoded one after the other, and draw their tokens in this order."""
    model, views, generator = make_method("simclr"), make_views("simclr", 5), seeded()
    loss = model.loss(views, strategy, seeded())
    features = [model.features(view, strategy, generator, None) for view in views]
    expected = by_loops(*(model.projector(feature) for feature in features), 0.1)
    assert value(loss) == pytest.approx(value(expected), rel=1e-12)
    assert_same(gradients(model, loss), gradients(model, expected), 1e-11)
    assert model.targets(views, strategy) is None
    assert model.two_sided and not model.independent_terms and model.evaluated is model.backbone


def test_the_head_is_three_layers_with_biases_and_no_norm_at_the_end() -> None:
    head = simclr_head(16, hidden=32, width_out=8)
    norm, linear = nn.BatchNorm1d, nn.Linear
    kinds = [norm if isinstance(m, norm) else type(m) for m in head]
    assert kinds == [linear, norm, nn.ReLU, linear, norm, nn.ReLU, linear]
    sizes = [(m.in_features, m.out_features, m.bias is not None) for m in head if isinstance(m, linear)]
    assert sizes == [(16, 32, True), (32, 32, True), (32, 8, True)]
    assert all(m.affine for m in head if isinstance(m, norm))


def test_every_parameter_but_the_position_table_is_trained() -> None:
    model = make_method("simclr")
    model.loss(make_views("simclr", 8), Strategy(patch=4, dropout=0.5), seeded()).backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == {"backbone.pos_embed"}
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "projector"}


def test_both_views_lose_tokens_of_their_own() -> None:
    model, strategy = make_method("simclr"), Strategy(patch=4, dropout=0.5)
    kept: list[Tensor] = []
    model.backbone.register_forward_pre_hook(
        lambda module, inputs, named: kept.append(named["keep_BK"]), with_kwargs=True
    )
    model.loss(make_views("simclr", 6), strategy, seeded())
    first, second = kept
    assert first.shape == second.shape == (6, 24)
    assert not torch.equal(first.sort(1).values, second.sort(1).values)
    assert all(len(set(row.tolist())) == 24 for row in [*first, *second])


@pytest.mark.parametrize("patch", [4, 7, 14])
@pytest.mark.parametrize("dropout", [0, 0.5, 0.75])
def test_both_views_are_compressed_and_the_cost_is_table_1s(patch: int, dropout: float) -> None:
    model, strategy = make_method("simclr", patch=4), Strategy(patch=patch, dropout=dropout)
    with sequence_lengths(model.backbone) as (passes,):
        model.loss(make_views("simclr", 4), strategy, seeded())
    tokens = (28 // patch) ** 2
    length = tokens - math.ceil(tokens * dropout) + 1
    assert passes == [(4, length), (4, length)]
    counts = model.tokens(strategy)
    assert (counts.query, counts.key, counts.base) == (length, length, 50)
    assert model.cost(strategy) == pytest.approx(3 * (length + length) / 50, rel=1e-12)


def test_nothing_moves_beside_the_optimizer() -> None:
    model, views = make_method("simclr"), make_views("simclr", 4)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.before_step(0.3)
    model.after_step(0.3, None)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert model.target_key(FULL) == model.target_key(Strategy(patch=7, dropout=0.5))
    assert value(model.loss(views, FULL, seeded())) == value(model.loss(views, FULL, seeded()))
