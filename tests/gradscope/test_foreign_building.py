"""Methods out of foreign checkpoints: shapes inferred, losses against float64 computations of the code bases' own."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradscope.errors import CheckpointError, UsageError
from gradscope.foreign import ForeignCheckpoint, architecture_of, blueprint_of, build, load_backbone, read_foreign
from gradscope.foreign.heads import sequence_of
from gradscope.methods import DINO, MoCoV3, SimCLR
from gradscope.models.positions import resample_table
from schedulers import Strategy
from tests.gradscope.foreign_models import (
    DEPTH,
    HEADS,
    WIDTH,
    MoCo,
    ViT,
    Wrapper,
    contrastive_head,
    save_dino,
    save_moco,
    sincos,
    twin,
    wrapped,
)

REFERENCE = Strategy(patch=4, dropout=0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def bare(path: Path, vit: ViT) -> ForeignCheckpoint:
    torch.save(vit.state_dict(), path / "model.pth")
    return read_foreign(path / "model.pth")


def test_shapes_are_inferred(tmp_path: Path) -> None:
    found = architecture_of(bare(tmp_path, ViT(width=32, heads=2, image=28, patch=7, channels=1)), heads=2)
    assert (found.size.width, found.size.depth, found.size.heads, found.size.mlp_ratio) == (32, DEPTH, 2, 2)
    assert (found.image_size, found.patch, found.channels, found.positions) == (28, 7, 1, "learned")
    assert not found.warnings


@pytest.mark.parametrize(("column_first", "positions"), [(False, "sincos"), (True, "sincos"), (None, "learned")])
def test_fixed_tables_of_either_layout_are_kept_and_not_trained(
    tmp_path: Path, column_first: bool | None, positions: str
) -> None:
    vit = ViT()
    if column_first is not None:
        vit.pos_embed.data = sincos(4, WIDTH, column_first=column_first)
    model = load_backbone(bare(tmp_path, vit), heads=HEADS)
    assert model.positions == positions and model.pos_embed.requires_grad == (positions == "learned")
    assert torch.equal(model.pos_embed, vit.pos_embed)


def test_a_wrong_number_of_heads_loads_and_gives_other_features(tmp_path: Path) -> None:
    vit, images = ViT(), torch.randn(2, 3, 16, 16)
    found = bare(tmp_path, vit)
    assert not load_backbone(found, heads=2)(images).allclose(vit.features(images), atol=1e-2)  # why a guess must warn
    assert load_backbone(found, heads=HEADS)(images).allclose(vit.features(images), atol=1e-5)


def test_heads_by_rule_with_a_warning(tmp_path: Path) -> None:
    found = bare(tmp_path, ViT(width=128, heads=2))
    assert (
        architecture_of(found).size.heads == 2 and "2 attention heads is a guess" in architecture_of(found).warnings[0]
    )
    with pytest.raises(UsageError, match=r"width 48 is not a multiple of 64.*--heads N"):
        architecture_of(bare(tmp_path, ViT()))
    with pytest.raises(UsageError, match="--heads 5: does not divide the width 48"):
        architecture_of(bare(tmp_path, ViT()), heads=5)


def test_moco_v3_small_has_12_heads_where_others_have_6(tmp_path: Path) -> None:
    vit = ViT(width=384, heads=12)
    assert architecture_of(bare(tmp_path, vit)).size.heads == 6
    content = {"state_dict": wrapped(vit, "module.base_encoder."), "epoch": 1}
    torch.save(content, tmp_path / "checkpoint_0000.pth.tar")
    found = architecture_of(read_foreign(tmp_path / "checkpoint_0000.pth.tar"))
    assert found.size.heads == 12 and found.guessed
    torch.save({**content, "arch": "vit_small"}, tmp_path / "checkpoint_0000.pth.tar")
    found = architecture_of(read_foreign(tmp_path / "checkpoint_0000.pth.tar"))
    assert found.size.heads == 12 and not found.guessed and not found.warnings
    linear = {"state_dict": wrapped(vit, "module."), "epoch": 90, "arch": "vit_small", "best_acc1": 70.0}
    torch.save(linear, tmp_path / "linear.pth.tar")
    assert architecture_of(read_foreign(tmp_path / "linear.pth.tar")).size.heads == 12


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ((1, 18, WIDTH), "distillation token"),
        ((1, 16, WIDTH), "none for the class token"),
        ((1, 21, WIDTH), "register"),
    ],
)
def test_other_tokens_are_seen_in_the_position_table(tmp_path: Path, table: tuple[int, ...], message: str) -> None:
    vit = ViT()
    vit.pos_embed = nn.Parameter(torch.zeros(table))
    with pytest.raises(CheckpointError, match=f"pos_embed .*{message}"):
        architecture_of(bare(tmp_path, vit), heads=HEADS)


def test_moco_v3_loss_and_gradients(tmp_path: Path) -> None:
    model = MoCo()
    model.momentum_encoder.load_state_dict(twin(model.base_encoder).state_dict())
    save_moco(tmp_path / "checkpoint_0003.pth.tar", model, epoch=4)
    found = read_foreign(tmp_path / "checkpoint_0003.pth.tar")
    ours = build(found, blueprint_of(found, heads=HEADS)).double()
    assert isinstance(ours, MoCoV3) and ours.training and not ours.backbone.patch_embed.proj.weight.requires_grad
    views = torch.randn(2, 6, 3, 16, 16, dtype=torch.float64)
    expected = model.double().train().loss(*views)
    loss = ours.loss(tuple(views), REFERENCE, torch.Generator())
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    expected.backward()
    loss.backward()
    for theirs, name in (
        (model.base_encoder.blocks[0].attn.qkv.weight, "backbone.blocks.0.attn.qkv.weight"),
        (model.base_encoder.head[3].weight, "projector.3.weight"),
        (model.predictor[1].bias, "predictor.1.bias"),
    ):
        torch.testing.assert_close(ours.get_parameter(name).grad, theirs.grad, rtol=1e-7, atol=1e-12)


def test_all_buffers_of_the_heads_are_the_files(tmp_path: Path) -> None:
    model = MoCo()
    model.train()
    model.loss(*torch.randn(2, 6, 3, 16, 16))  # moves the running statistics
    save_moco(tmp_path / "checkpoint_0000.pth.tar", model, epoch=1)
    found = read_foreign(tmp_path / "checkpoint_0000.pth.tar")
    state = build(found, blueprint_of(found, heads=HEADS)).state_dict()
    for role, module in (
        ("projector", model.base_encoder.head),
        ("momentum_projector", model.momentum_encoder.head),
        ("predictor", model.predictor),
    ):
        theirs = {f"{role}.{name}": value for name, value in module.state_dict().items()}
        assert theirs.keys() == {name for name in state if name.startswith(role + ".")}
        torch.testing.assert_close({name: state[name] for name in theirs}, theirs)


@pytest.mark.parametrize("crops", [0, 3])
def test_dino_loss(tmp_path: Path, crops: int) -> None:
    student = Wrapper()
    teacher = twin(student)
    save_dino(tmp_path / "checkpoint.pth", student, teacher, epoch=1, local_crops_number=crops)
    found = read_foreign(tmp_path / "checkpoint.pth")
    blueprint = blueprint_of(found, heads=HEADS, total_epochs=found.total_epochs)
    ours = build(found, blueprint).double()
    assert isinstance(ours, DINO) and not ours.head.last_layer.weight_g.requires_grad
    assert blueprint.small_crops == crops
    assert (blueprint.crop_scale, blueprint.small_scale) == ((0.5, 1.0), (0.1, 0.5))
    views = torch.randn(2 + crops, 5, 3, 16, 16, dtype=torch.float64)
    student.double(), teacher.double()
    target = ((teacher(views[1]) - torch.linspace(-0.5, 0.5, 20)) / 0.055).softmax(1)  # half-way from .04 to .07
    seen = [views[0], *views[2:]]
    terms = [-(target * F.log_softmax(student(view) / 0.1, 1)).sum(1).mean() for view in seen]
    loss = ours.loss(tuple(views), REFERENCE, torch.Generator(), fraction=0.2)
    # the saved centre is float32
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-6, atol=0)
    assert blueprint.settings["teacher_temperature_warmup"] == 0.4


def test_simclr_head_without_batch_norm(tmp_path: Path) -> None:
    vit, head = ViT(), nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, 8))
    state = wrapped(vit, "backbone.") | wrapped(head, "projector.")
    torch.save({"state_dict": state, "epoch": 0, "global_step": 1}, tmp_path / "simclr-x-ep=0.ckpt")
    found = read_foreign(tmp_path / "simclr-x-ep=0.ckpt")
    ours = build(found, blueprint_of(found, heads=HEADS)).double()
    assert isinstance(ours, SimCLR)
    views = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    z = torch.cat([F.normalize(head.double()(vit.double().features(view)), dim=1) for view in views])
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    partner = torch.arange(8).roll(4)
    terms = F.cross_entropy(logits, partner, reduction="none")
    loss = ours.loss(tuple(views), REFERENCE, torch.Generator())
    torch.testing.assert_close(loss, terms.mean(), rtol=1e-9, atol=0)


def test_a_backbone_alone_needs_a_loss_and_gets_seeded_heads(tmp_path: Path) -> None:
    found = bare(tmp_path, ViT())
    with pytest.raises(UsageError, match=r"cannot give the loss .*backbone alone.*--loss mocov3\|simclr\|dino"):
        blueprint_of(found, heads=HEADS)
    with pytest.raises(UsageError, match="--loss 'byol': unknown"):
        blueprint_of(found, heads=HEADS, loss="byol")
    for loss in ("mocov3", "simclr", "dino"):
        blueprints = [blueprint_of(found, heads=HEADS, loss=loss, seed=seed) for seed in (0, 0, 1)]
        assert blueprints[0].fresh_heads and "freshly initialised (seed 0)" in " ".join(blueprints[0].warnings)
        first, again, other = (build(found, blueprint).state_dict() for blueprint in blueprints)
        role = "head.mlp.0.weight" if loss == "dino" else "projector.0.weight"
        assert torch.equal(first[role], again[role]) and not torch.equal(first[role], other[role])
        assert torch.equal(first["backbone.norm.weight"], found.backbone["norm.weight"])
        if loss != "simclr":
            assert torch.equal(first["momentum_backbone.norm.weight"], found.backbone["norm.weight"])


def test_another_image_size_resamples_the_positions(tmp_path: Path) -> None:
    vit = ViT()
    found = bare(tmp_path, vit)
    blueprint = blueprint_of(found, heads=HEADS, loss="simclr", image_size=24)
    method = build(found, blueprint)
    assert torch.equal(method.backbone.pos_embed, resample_table(vit.pos_embed, 6))
    assert method.backbone.image_size == 24 and "resampled to 24" in " ".join(blueprint.warnings)
    with pytest.raises(UsageError, match="--image-size 18: not a multiple of the model's patch of 4"):
        blueprint_of(found, heads=HEADS, loss="simclr", image_size=18)


def test_heads_that_are_not_linear_layers_and_batch_norm(tmp_path: Path) -> None:
    norm = {"0.weight": torch.ones(3, 4), "1.weight": torch.ones(3), "1.bias": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"projector\.1\.weight \(3,\).*neither a linear layer nor a BatchNorm1d"):
        sequence_of(norm, nn.ReLU, tmp_path, "projector")
    with pytest.raises(CheckpointError, match=r"projector\.2 takes 5 numbers, the layer before gives 3"):
        sequence_of({"0.weight": torch.ones(3, 4), "2.weight": torch.ones(2, 5)}, nn.ReLU, tmp_path, "projector")
    head, state = sequence_of({"weight": torch.ones(3, 4), "bias": torch.ones(3)}, nn.ReLU, tmp_path, "predictor")
    assert [type(layer) for layer in head] == [nn.Linear] and set(state) == {"0.weight", "0.bias"}


def test_a_dino_head_without_weight_norm_is_refused(tmp_path: Path) -> None:
    student = Wrapper()
    save_dino(tmp_path / "checkpoint.pth", student, twin(student), epoch=1)
    found = read_foreign(tmp_path / "checkpoint.pth")
    plain = {"last_layer.weight": torch.ones(2, 2), **{n: v for n, v in found.heads["head"].items() if "mlp" in n}}
    other = replace(found, heads={**found.heads, "head": plain})
    with pytest.raises(CheckpointError, match="last_layer has weight, not weight_g and weight_v"):
        build(other, blueprint_of(found, heads=HEADS))


def test_heads_of_another_width_than_the_backbone(tmp_path: Path) -> None:
    model = MoCo()
    model.momentum_encoder.head = contrastive_head((WIDTH, 24, 24, 6))
    save_moco(tmp_path / "checkpoint_0000.pth.tar", model, epoch=1)
    found = read_foreign(tmp_path / "checkpoint_0000.pth.tar")
    with pytest.raises(CheckpointError, match=r"do not fit together: .*momentum_projector\.6\.weight"):
        build(found, blueprint_of(found, heads=HEADS))


def test_an_activation_that_the_bundled_vit_has_not(tmp_path: Path) -> None:
    found = replace(bare(tmp_path, ViT()), settings={"hidden_act": "quick_gelu"})
    with pytest.raises(CheckpointError, match="hidden_act is 'quick_gelu'"):
        architecture_of(found, heads=HEADS)


def test_drop_path_of_the_run_is_the_students(tmp_path: Path) -> None:
    student = Wrapper()
    save_dino(tmp_path / "checkpoint.pth", student, twin(student), epoch=1, drop_path_rate=0.3)
    found = read_foreign(tmp_path / "checkpoint.pth")
    method = build(found, blueprint_of(found, heads=HEADS))
    assert isinstance(method, DINO)
    assert (method.backbone.drop_path, method.momentum_backbone.drop_path) == (0.3, 0.0)
    assert isinstance(found.settings, dict) and Namespace(**found.settings).arch == "vit_tiny"
