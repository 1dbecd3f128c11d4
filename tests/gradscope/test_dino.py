"""DINO: the loss and its gradient against explicit loops in float64, and the facts of its recipe."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gradscope.methods import dino_head, distillation_losses, moved_centre, teacher_temperature_at
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

FULL, HALF = Strategy(patch=4, dropout=0), Strategy(patch=7, dropout=0.5)


def by_loops(views: list[Tensor], teacher_BK: Tensor, centre_K: Tensor, student_t: float, teacher_t: float) -> Tensor:
    """Mean over images and student's views of the cross-entropy -Σ_k p_k log q_k; `views`: each (B, K) logits."""
    total, terms = teacher_BK.new_zeros(()), 0
    for b in range(len(teacher_BK)):
        numerators = ((teacher_BK[b] - centre_K) / teacher_t).exp()
        p_K = numerators / numerators.sum()
        for logits_BK in views:
            exponentials = (logits_BK[b] / student_t).exp()
            q_K = exponentials / exponentials.sum()
            total, terms = total - sum(p_K[k] * q_K[k].log() for k in range(len(p_K))), terms + 1
    return total / terms


def head_by_hand(head: nn.Module, feature_BD: Tensor) -> Tensor:
    """The head from its parameters alone, one image after the other."""
    mlp, last, rows = head.mlp, head.last_layer, []
    for x in feature_BD:
        for i in (0, 2, 4):
            x = mlp[i].weight @ x + mlp[i].bias
            x = x if i == 4 else 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        x = x / x.norm()
        rows.append(torch.stack([g * (v / v.norm()) @ x for g, v in zip(last.weight_g, last.weight_v, strict=True)]))
    return torch.stack(rows)


@pytest.mark.parametrize("views", [1, 4])
def test_loss_and_gradient_equal_the_sum_over_views_and_prototypes(views: int) -> None:
    student, teacher = torch.randn(views, 3, 7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    centre = torch.randn(1, 7, dtype=torch.float64)
    student.requires_grad_(True)
    terms = distillation_losses(student, teacher, centre, student_temperature=0.3, teacher_temperature=0.2)
    expected = by_loops(list(student), teacher, centre[0], 0.3, 0.2)
    assert terms.shape == (3,) and value(terms.mean()) == pytest.approx(value(expected), rel=1e-13)
    found, wanted = (torch.autograd.grad(x, student)[0] for x in (terms.mean(), expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_the_loss_is_computed_in_float32_inside_autocast() -> None:
    student, teacher, centre = torch.randn(3, 8, 64), torch.randn(8, 64), torch.zeros(1, 64)

    def losses() -> Tensor:
        return distillation_losses(student, teacher, centre, student_temperature=0.1, teacher_temperature=0.04)

    outside = losses()
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses()
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", [FULL, HALF])
@pytest.mark.parametrize("small_crops", [0, 2])
def test_a_methods_loss_and_gradient_equal_those_of_the_loops(strategy: Strategy, small_crops: int) -> None:
    """Every view of the student, each with a pass of its own, against the teacher's one key."""
    model = make_method("dino", small_crops=small_crops, fixed_norm=False)
    views = make_views("dino", 4, small_crops=small_crops)
    loss = model.loss(views, strategy, seeded())
    student = [model.features(views[0], strategy, seeded(), None), *(model.backbone(crop) for crop in views[2:])]
    with torch.no_grad():
        teacher = head_by_hand(model.momentum_head, model.momentum_backbone(views[1]))
    logits = [head_by_hand(model.head, feature) for feature in student]
    expected = by_loops(logits, teacher, model.centre[0], 0.1, 0.04)
    assert value(loss) == pytest.approx(value(expected), rel=1e-11)
    assert_same(gradients(model, loss), gradients(model, expected), 1e-11)
    torch.testing.assert_close(model.targets(views, strategy), teacher)
    given = model.losses(views, strategy, seeded(), targets=teacher)
    assert given.shape == (4,) and value(given.mean()) == pytest.approx(value(expected), rel=1e-11)


def test_the_teachers_temperature_warms_up_linearly_and_enters_the_loss() -> None:
    for fraction, expected in ((0.0, 0.04), (0.1, 0.05), (0.15, 0.055), (0.3, 0.07), (0.9, 0.07)):
        assert teacher_temperature_at(fraction, 0.04, 0.07, 0.3) == pytest.approx(expected, rel=1e-12)
    assert teacher_temperature_at(0.0, 0.04, 0.07, 0.0) == 0.07
    model = make_method("dino", teacher_temperature=0.07, teacher_temperature_warmup=0.3)
    views = make_views("dino", 4)
    teacher = model.targets(views, FULL)
    with torch.no_grad():
        student = [model.head(model.features(views[0], FULL, seeded(), None))]
        student += [model.head(model.backbone(crop)) for crop in views[2:]]
    for fraction, temperature in ((0.0, 0.04), (0.1, 0.05), (1.0, 0.07)):
        loss = model.loss(views, FULL, seeded(), fraction=fraction)
        assert value(loss) == pytest.approx(value(by_loops(student, teacher, model.centre[0], 0.1, temperature)))


def test_the_head_is_the_published_one() -> None:
    head = dino_head(16, hidden=32, bottleneck=8, prototypes=50)
    assert [type(m) for m in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    sizes = [(m.in_features, m.out_features, m.bias is not None) for m in head.mlp if isinstance(m, nn.Linear)]
    assert sizes == [(16, 32, True), (32, 32, True), (32, 8, True)]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in head.modules())
    names = {name: tuple(p.shape) for name, p in head.last_layer.named_parameters()}
    assert names == {"weight_g": (50, 1), "weight_v": (50, 8)}
    assert torch.equal(head.last_layer.weight_g, torch.ones(50, 1)) and not head.last_layer.weight_g.requires_grad
    assert dino_head(16, hidden=4, bottleneck=4, prototypes=5, fixed_norm=False).last_layer.weight_g.requires_grad
    wide = dino_head(400, hidden=400, bottleneck=64, prototypes=5)
    assert float(wide.mlp[0].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not wide.mlp[0].bias.any()


def test_the_head_with_batchnorm_has_it_before_each_gelu_and_nowhere_else() -> None:
    head = dino_head(16, hidden=32, bottleneck=8, prototypes=50, batchnorm=True)
    norm = nn.BatchNorm1d
    kinds = [norm if isinstance(m, norm) else type(m) for m in head.mlp]
    assert kinds == [nn.Linear, norm, nn.GELU, nn.Linear, norm, nn.GELU, nn.Linear]
    assert [m.num_features for m in head.mlp if isinstance(m, norm)] == [32, 32]


def test_the_last_layer_is_torchs_weight_norm() -> None:
    head = dino_head(16, hidden=32, bottleneck=8, prototypes=50, fixed_norm=False)
    plain = nn.Linear(8, 50, bias=False)
    normed = nn.utils.parametrizations.weight_norm(plain)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2, generator=seeded())
        normed.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        normed.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
        x = torch.randn(6, 8, generator=seeded())
        torch.testing.assert_close(head.last_layer(x), normed(x))


@pytest.mark.parametrize("fixed_norm", [True, False])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_the_student_alone_gets_gradients(fixed_norm: bool, positions: str) -> None:
    model = make_method("dino", fixed_norm=fixed_norm, positions=positions)
    model.loss(make_views("dino", 4), HALF, seeded()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    teacher = {n for n, _ in model.named_parameters() if n.startswith("momentum_")}
    assert without - teacher == ({"head.last_layer.weight_g"} if fixed_norm else set()) | (
        {"backbone.pos_embed"} if positions == "sincos" else set()
    )
    assert teacher <= without and not model.targets(make_views("dino", 4), HALF).requires_grad
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes == {"backbone", "head", "momentum_backbone", "momentum_head", "centre"}
    assert model.state_dict()["centre"].shape == (1, 20)


@pytest.mark.parametrize("patch", [4, 7, 14])
@pytest.mark.parametrize("dropout", [0, 0.5, 0.75])
def test_the_query_alone_is_compressed_and_the_cost_is_table_1s(patch: int, dropout: float) -> None:
    """Small crops of 12 pixels keep the base patch of 4 and all their tokens; the teacher sees the base sequence."""
    model, strategy = make_method("dino", patch=4, small_crops=3), Strategy(patch=patch, dropout=dropout)
    with sequence_lengths(model.backbone, model.momentum_backbone) as (student, teacher):
        model.loss(make_views("dino", 4, small_crops=3), strategy, seeded())
    tokens = (28 // patch) ** 2
    query = tokens - math.ceil(tokens * dropout) + 1
    assert student == [(4, query), (12, 9 + 1)] and teacher == [(4, 50)]
    counts = model.tokens(strategy)
    assert (counts.query, counts.key, counts.base) == (query, 50, 50)
    assert model.cost(strategy) == pytest.approx((3 * query + 3 * 3 * 10 + 50) / 50, rel=1e-12)


def test_all_strategies_share_the_teachers_outputs() -> None:
    model, views = make_method("dino"), make_views("dino", 4)
    assert model.target_key(FULL) == model.target_key(HALF)
    torch.testing.assert_close(model.targets(views, FULL), model.targets(views, HALF), rtol=0, atol=0)


def test_small_crops_see_the_position_table_at_their_own_grid() -> None:
    """A crop of 12 pixels is 3 x 3 patches whose codes are those of the 7 x 7 table at 7/3 of its distance."""
    model, crop = make_method("dino", positions="learned"), make_views("dino", 2)[2]
    embedded = model.backbone.embed(crop)
    table = model.backbone.pos_embed[0, 1:].reshape(7, 7, 16)
    tokens = model.backbone.patch_embed(crop)
    for row in range(3):
        for column in range(3):
            y, x = (row + 0.5) * 7 / 3 - 0.5, (column + 0.5) * 7 / 3 - 0.5
            corners = [
                (1 - abs(y - i)) * (1 - abs(x - j)) * table[i, j]
                for i in range(7)
                for j in range(7)
                if abs(y - i) < 1 and abs(x - j) < 1
            ]
            token = tokens[:, row * 3 + column] + sum(corners)
            torch.testing.assert_close(embedded[:, 1 + row * 3 + column], token, rtol=1e-6, atol=1e-7)


def test_after_the_step_the_centre_and_the_teacher_follow() -> None:
    model, views = make_method("dino", momentum=0.8, fixed_norm=False), make_views("dino", 4)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    targets = model.targets(views, FULL)
    model.before_step(0.4)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    model.after_step(0.4, targets)
    mean = torch.stack([row for row in targets]).sum(0) / 4
    torch.testing.assert_close(model.centre[0], 0.9 * before["centre"][0] + 0.1 * mean, rtol=1e-6, atol=1e-7)
    m = 1 - 0.5 * (1 + math.cos(math.pi * 0.4)) * 0.2
    moved = 0
    for name, p in model.named_parameters():
        if name.startswith("momentum_"):
            online = before[name.removeprefix("momentum_")]
            torch.testing.assert_close(p.data, m * before[name] + (1 - m) * online, rtol=1e-12, atol=1e-14)
            moved += not torch.equal(p, before[name])
        else:
            assert torch.equal(p, before[name])
    assert moved > 20


def test_the_centre_is_an_average_with_its_momentum() -> None:
    centre, mean = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -2.0]])
    torch.testing.assert_close(moved_centre(centre, mean, 0.9), torch.tensor([[1.2, 1.6]]))


def test_the_last_layer_rests_at_the_start() -> None:
    model = make_method("dino", freeze_last_layer=0.2, fixed_norm=False)
    assert set(model.without_gradient(0.19)) == set(model.head.last_layer.parameters())
    assert not list(model.without_gradient(0.2))


def test_branches_are_skipped_by_the_student_in_training_alone() -> None:
    model, views = make_method("dino", drop_path=0.6), make_views("dino", 8)
    first, second = (model.losses(views, FULL, seeded(seed)) for seed in (1, 2))
    assert not torch.allclose(first, second)
    assert model.momentum_backbone.drop_path == 0 and model.backbone.drop_path == 0.6
    torch.testing.assert_close(model.targets(views, FULL), model.targets(views, FULL), rtol=0, atol=0)
    model.eval()
    first, second = (model.losses(views, FULL, seeded(seed)) for seed in (1, 2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert model.evaluated is model.momentum_backbone and model.independent_terms
