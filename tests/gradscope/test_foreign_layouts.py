"""Every layout: the class token of the module that wrote a file against the bundled ViT that was built from it."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradscope.errors import CheckpointError
from gradscope.foreign import load_backbone, read_foreign
from tests.gradscope.foreign_models import (
    HEADS,
    WIDTH,
    DinoHead,
    MoCo,
    ViT,
    Wrapper,
    contrastive_head,
    dino_optimizer,
    save_dino,
    save_moco,
    sincos,
    trained_a_little,
    twin,
    wrapped,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def same_features(path: Path, vit: ViT, momentum: ViT | None = None, heads: int | None = HEADS) -> Any:
    """Read the file and compare its one or two backbones with the modules that were saved."""
    found = read_foreign(path)
    torch.testing.assert_close(load_backbone(found, heads=heads)(IMAGES), vit.features(IMAGES), rtol=1e-5, atol=1e-5)
    assert (found.momentum_backbone is None) == (momentum is None)
    if momentum is not None:
        slow = load_backbone(found, heads=heads, momentum=True)(IMAGES)
        torch.testing.assert_close(slow, momentum.features(IMAGES), rtol=1e-5, atol=1e-5)
        assert not slow.allclose(vit.features(IMAGES), atol=1e-3)
    return found


def test_moco_v3(tmp_path: Path) -> None:
    model = MoCo()
    model.momentum_encoder.load_state_dict(twin(model.base_encoder).state_dict())
    save_moco(tmp_path / "checkpoint_0099.pth.tar", model, epoch=100)
    found = same_features(tmp_path / "checkpoint_0099.pth.tar", model.base_encoder, model.momentum_encoder)
    assert (found.layout, found.method, found.epoch, found.total_epochs) == ("moco-v3", "mocov3", 100, None)
    assert set(found.heads) == {"projector", "predictor", "momentum_projector"} and not found.leftovers
    assert torch.equal(found.heads["momentum_projector"]["0.weight"], model.momentum_encoder.head[0].weight)
    assert found.frozen_patch_embed


def test_a_trained_patch_embedding_is_not_taken_for_a_frozen_one(tmp_path: Path) -> None:
    model = MoCo(frozen=False)
    save_moco(tmp_path / "checkpoint_0000.pth.tar", model, epoch=1)
    assert not read_foreign(tmp_path / "checkpoint_0000.pth.tar").frozen_patch_embed
    optimizer = torch.optim.AdamW(model.parameters())
    trained_a_little(model, optimizer, lambda: model.loss(*torch.randn(2, 6, 3, 16, 16)))
    model.momentum_encoder.load_state_dict(model.base_encoder.state_dict())  # the optimizer knows better than the copy
    save_moco(tmp_path / "checkpoint_0000.pth.tar", model, epoch=1, optimizer=optimizer)
    assert not read_foreign(tmp_path / "checkpoint_0000.pth.tar").frozen_patch_embed


def test_dino_training_checkpoint(tmp_path: Path) -> None:
    student = Wrapper()
    teacher = twin(student)
    save_dino(tmp_path / "checkpoint0020.pth", student, teacher, epoch=20, epochs=100)
    found = same_features(tmp_path / "checkpoint0020.pth", student.backbone, teacher.backbone)
    assert (found.layout, found.method, found.epoch, found.total_epochs) == ("DINO", "dino", 20, 100)
    assert torch.equal(found.centre, torch.linspace(-0.5, 0.5, 20)[None]) and not found.leftovers
    assert torch.equal(found.heads["momentum_head"]["mlp.0.bias"], teacher.head.mlp[0].bias)


def test_dino_released_full_checkpoint_with_its_older_names(tmp_path: Path) -> None:
    student = Wrapper()
    teacher = twin(student)

    def older(module: nn.Module) -> dict[str, Tensor]:
        names = {"head.mlp.": "head.projection_head.", "head.last_layer.": "head.prototypes."}
        state = module.state_dict()
        return {
            next((old + n[len(new) :] for new, old in names.items() if n.startswith(new)), n): v
            for n, v in state.items()
        }

    torch.save({"student": older(student), "teacher": older(teacher), "epoch": 800}, tmp_path / "full_checkpoint.pth")
    found = same_features(tmp_path / "full_checkpoint.pth", student.backbone, teacher.backbone)
    assert found.method == "dino" and found.centre is None and found.epoch == 800 and found.total_epochs is None
    torch.testing.assert_close(dict(found.heads["head"]), student.head.state_dict())
    assert "no centre" in found.notes[0]


@pytest.mark.parametrize("wrap", ["", "module.backbone."])
def test_dino_teacher_and_backbone_alone(tmp_path: Path, wrap: str) -> None:
    vit = ViT()
    torch.save({"teacher": wrapped(vit, wrap)} if wrap else vit.state_dict(), tmp_path / "pretrain.pth")
    found = same_features(tmp_path / "pretrain.pth", vit)
    assert found.method is None and found.epoch is None and not found.heads


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_timm(tmp_path: Path, prefix: str) -> None:
    vit = ViT(head=nn.Linear(WIDTH, 5))
    content = {
        "state_dict": wrapped(vit, prefix), "state_dict_ema": wrapped(twin(vit), prefix), "epoch": 4, "version": 2,
        "arch": "vit_tiny_patch16_224", "args": Namespace(epochs=300, lr=0.1), "metric": 0.5, "optimizer": {},
    }  # fmt: skip
    torch.save(content, tmp_path / "checkpoint-4.pth.tar")
    found = same_features(tmp_path / "checkpoint-4.pth.tar", vit)
    assert (found.layout, found.method, found.epoch, found.total_epochs) == ("timm", None, 5, 300)
    assert found.leftovers == ("head.weight", "head.bias")


def test_timm_safetensors_in_half_precision(tmp_path: Path) -> None:
    vit = ViT(head=nn.Linear(WIDTH, 5)).half().float()
    save_file({name: value.half() for name, value in vit.state_dict().items()}, tmp_path / "model.safetensors")
    assert same_features(tmp_path / "model.safetensors", vit).layout == "timm"


def test_mae(tmp_path: Path) -> None:
    vit = ViT()
    vit.pos_embed.data = sincos(4, WIDTH, column_first=True)
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, WIDTH)}
    content = {"model": {**vit.state_dict(), **decoder}, "epoch": 399, "args": Namespace(epochs=800), "scaler": {}}
    torch.save(content, tmp_path / "checkpoint-399.pth")
    found = same_features(tmp_path / "checkpoint-399.pth", vit)
    assert (found.layout, found.method, found.epoch, found.total_epochs) == ("MAE", None, 400, 800)
    assert set(found.leftovers) == set(decoder)
    assert load_backbone(found, heads=HEADS).positions == "sincos"


def lightning(state: Mapping[str, Tensor], **more: Any) -> dict[str, Any]:
    return {
        "epoch": 9, "global_step": 500, "pytorch-lightning_version": "2.2.0", "state_dict": dict(state), "loops": {},
        "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "hyper_parameters": {"batch_size": 64}, **more,
    }  # fmt: skip


def under(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return wrapped(module, prefix)


def test_lightly_dino_whose_backbone_is_the_teacher(tmp_path: Path) -> None:
    student, teacher = ViT(), ViT()
    heads = DinoHead(), DinoHead()

    def named(prefix: str, head: DinoHead) -> dict[str, Tensor]:
        last = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
        found = under(prefix + "layers.", head.mlp)
        return found | {f"{prefix}last_layer.{last[n]}": v for n, v in head.last_layer.state_dict().items()}

    state = under("backbone.vit.", teacher) | under("student_backbone.vit.", student)
    state |= named("projection_head.", heads[1]) | named("student_projection_head.", heads[0])
    state |= {"criterion.center": torch.full((1, 1, 20), 0.25), "online_classifier.linear.weight": torch.zeros(3, 3)}
    torch.save(lightning(state), tmp_path / "epoch=9-step=500.ckpt")
    found = same_features(tmp_path / "epoch=9-step=500.ckpt", student, teacher)
    assert (found.layout, found.method, found.epoch, found.step) == ("lightly DINO", "dino", 10, 500)
    assert torch.equal(found.heads["momentum_head"]["mlp.2.weight"], heads[1].mlp[2].weight)
    assert torch.equal(found.heads["head"]["last_layer.weight_v"], heads[0].last_layer.weight_v)
    assert torch.equal(found.centre, torch.full((1, 20), 0.25))
    assert found.leftovers == ("online_classifier.linear.weight",)


def test_lightly_moco_and_simclr(tmp_path: Path) -> None:
    vit, slow = ViT(), ViT()
    head, predictor = contrastive_head((WIDTH, 24, 8)), contrastive_head((8, 24, 8))
    state = under("backbone.", vit) | under("projection_head.layers.", head)
    within = {"fit_loop": {"epoch_progress": {"current": {"ready": 10, "started": 10, "processed": 9, "completed": 9}}}}
    torch.save(lightning(state, loops=within), tmp_path / "simclr.ckpt")
    found = same_features(tmp_path / "simclr.ckpt", vit)
    assert found.epoch == 9
    assert (found.layout, found.method, set(found.heads)) == ("lightly SimCLR", "simclr", {"projector"})

    state |= under("key_backbone.", slow) | under("key_projection_head.layers.", head)
    torch.save(lightning({**state, "criterion.memory_bank.bank": torch.zeros(8, 4)}), tmp_path / "queue.ckpt")
    found = same_features(tmp_path / "queue.ckpt", vit, slow)
    assert found.method is None and "queue of keys" in found.lacking
    assert found.leftovers == ("criterion.memory_bank.bank",)

    torch.save(lightning(state | under("prediction_head.layers.", predictor)), tmp_path / "moco.ckpt")
    assert same_features(tmp_path / "moco.ckpt", vit, slow).method == "mocov3"


@pytest.mark.parametrize("online", ["backbone", "encoder"])
def test_solo_learn(tmp_path: Path, online: str) -> None:
    vit, slow = ViT(fixed=True), ViT(fixed=True)
    state = under(f"{online}.", vit) | under(f"momentum_{online}.", slow)
    state |= under("projector.", contrastive_head((WIDTH, 24, 8))) | under("predictor.", contrastive_head((8, 24, 8)))
    state |= under("momentum_projector.", contrastive_head((WIDTH, 24, 8))) | under("classifier.", nn.Linear(WIDTH, 2))
    torch.save(lightning(state), tmp_path / "mocov3-abc-ep=9.ckpt")
    told = {
        "max_epochs": 400,
        "method": "mocov3",
        "method_kwargs": {"temperature": 0.3},
        "optimizer": {"batch_size": 8},
    }
    (tmp_path / "args.json").write_text(json.dumps(told))
    found = same_features(tmp_path / "mocov3-abc-ep=9.ckpt", vit, slow)
    assert (found.layout, found.method, found.epoch, found.total_epochs) == ("solo-learn mocov3", "mocov3", 10, 400)
    assert found.settings["temperature"] == 0.3 and found.settings["batch_size"] == 8
    assert found.leftovers == ("classifier.weight", "classifier.bias")
    (tmp_path / "args.json").write_text(json.dumps({"method": "byol", "max_epochs": 400}))
    assert read_foreign(tmp_path / "mocov3-abc-ep=9.ckpt").method is None


def test_mmselfsup(tmp_path: Path) -> None:
    vit, slow = ViT(), ViT()
    head, predictor, slow_head = (contrastive_head((a, 24, 8)) for a in (WIDTH, 8, WIDTH))
    inner = {
        "patch_embed.proj.": "patch_embed.projection.", ".norm1.": ".ln1.", ".norm2.": ".ln2.", "norm.": "ln1.",
        ".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1.", "blocks.": "layers.",
    }  # fmt: skip

    def backbone(prefix: str, module: ViT) -> dict[str, Tensor]:
        found = {}
        for name, value in module.state_dict().items():
            for ours, theirs in inner.items():
                name = name.replace(ours, theirs) if ours != "norm." or name.startswith("norm.") else name
            found[prefix + name] = value
        return found

    def neck(prefix: str, module: nn.Sequential) -> dict[str, Tensor]:
        kinds = {0: "fc0", 1: "bn0", 3: "fc1", 4: "bn1"}
        return {f"{prefix}{kinds[int(n.split('.')[0])]}.{n.split('.')[1]}": v for n, v in module.state_dict().items()}

    state = backbone("backbone.", vit) | neck("neck.", head) | neck("head.predictor.", predictor)
    state |= backbone("momentum_encoder.module.0.", slow) | neck("momentum_encoder.module.1.", slow_head)
    content = {"meta": {"epoch": 7, "iter": 70}, "state_dict": {**state, "momentum_encoder.steps": torch.tensor(70)}}
    torch.save(content, tmp_path / "epoch_7.pth")
    found = same_features(tmp_path / "epoch_7.pth", vit, slow)
    assert (found.layout, found.method, found.epoch, found.step) == ("mmselfsup", "mocov3", 7, 70)
    torch.testing.assert_close(dict(found.heads["momentum_projector"]), slow_head.state_dict())


@pytest.mark.parametrize("naming", ["as saved", "modules' own"])
def test_hugging_face(tmp_path: Path, naming: str) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=3, intermediate_size=2 * WIDTH, image_size=16,
        patch_size=4,
    )  # fmt: skip
    model = ViTModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "checkpoint-50")
    file = tmp_path / "checkpoint-50" / "model.safetensors"
    saved = set(load_file(file))
    if naming == "modules' own":
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
        assert set(load_file(file)) != saved
    told = {"epoch": 2.5, "global_step": 50, "max_steps": 200, "num_train_epochs": 10}
    (file.parent / "trainer_state.json").write_text(json.dumps(told))
    found = read_foreign(file)
    with torch.no_grad():
        expected = model(pixel_values=IMAGES).last_hidden_state[:, 0]
        ours = load_backbone(found)
        torch.testing.assert_close(ours(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert {module.eps for module in ours.modules() if isinstance(module, nn.LayerNorm)} == {1e-12}
    assert (found.heads_count, found.norm_eps) == (3, 1e-12)
    assert (found.epoch, found.total_epochs, found.step) == (2.5, 10, 50)
    assert all(name.startswith("pooler.") for name in found.leftovers)


def test_second_moments_of_moco_v3_by_identity_of_parameters(tmp_path: Path) -> None:
    model = MoCo()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    views = torch.randn(2, 6, 3, 16, 16)
    trained_a_little(model, optimizer, lambda: model.loss(*views))
    save_moco(tmp_path / "checkpoint_0000.pth.tar", model, epoch=1, optimizer=optimizer)
    found = read_foreign(tmp_path / "checkpoint_0000.pth.tar")
    assert found.frozen_patch_embed
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            ours = name.replace("base_encoder.head.", "projector.").replace("base_encoder.", "backbone.")
            expected[ours] = optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**2)
    assert len(expected) > 20 and "backbone.patch_embed.proj.weight" not in expected
    torch.testing.assert_close(dict(found.second_moment), expected)


@pytest.mark.parametrize("norm_trained", [False, True])
def test_second_moments_of_dino_by_identity_of_parameters(tmp_path: Path, norm_trained: bool) -> None:
    student = Wrapper()
    student.head.last_layer.weight_g.requires_grad_(norm_trained)
    optimizer = dino_optimizer(student)
    images = torch.randn(6, 3, 16, 16)
    trained_a_little(student, optimizer, lambda: student(images).square().mean(), steps=3)
    save_dino(tmp_path / "checkpoint.pth", student, twin(student), epoch=1, optimizer=optimizer)
    found = read_foreign(tmp_path / "checkpoint.pth").second_moment
    expected = {
        name: optimizer.state[parameter]["exp_avg_sq"] / (1 - 0.999**3)
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
    }
    torch.testing.assert_close(dict(found), expected)


@pytest.mark.parametrize("other", ["another count", "another order"])
def test_an_optimizer_that_does_not_fit_gives_no_second_moments(tmp_path: Path, other: str) -> None:
    model = MoCo()
    parameters = list(model.parameters())[::-1]
    if other == "another count":
        parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    trained_a_little(model, optimizer, lambda: model.loss(*torch.randn(2, 6, 3, 16, 16)))
    save_moco(tmp_path / "checkpoint_0000.pth.tar", model, epoch=1, optimizer=optimizer)
    assert read_foreign(tmp_path / "checkpoint_0000.pth.tar").second_moment is None


def changed(**more: Tensor | None) -> Callable[[], dict[str, Tensor]]:
    """A bare ViT with further tensors, and without those that are None."""

    def make() -> dict[str, Tensor]:
        state = {**ViT().state_dict(), **{name.replace("__", "."): value for name, value in more.items()}}
        return {name: value for name, value in state.items() if value is not None}

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(blocks__1__attn__qkv__bias=None), r"it has no blocks\.1\.attn\.qkv\.bias"),
        (changed(norm__weight=None, norm__bias=None), r"it has no norm\.weight, norm\.bias"),
        (changed(register_tokens=torch.ones(1, 4, WIDTH)), r"register_tokens \(1, 4, 48\): this model has register"),
        (changed(reg_token=torch.ones(1, 4, WIDTH)), "reg_token .*register tokens"),
        (changed(dist_token=torch.ones(1, 1, WIDTH)), "dist_token .*a distillation token"),
        (changed(blocks__0__ls1__gamma=torch.ones(WIDTH)), r"blocks\.0\.ls1\.gamma .*layer scale"),
        (changed(blocks__0__gamma_1=torch.ones(WIDTH)), r"blocks\.0\.gamma_1 .*layer scale"),
        (changed(rope_embed__periods=torch.ones(3)), r"rope_embed\.periods .*RoPE"),
        (changed(fc_norm__weight=torch.ones(WIDTH)), r"fc_norm\.weight .*average pooling"),
        (changed(norm_pre__weight=torch.ones(WIDTH)), r"norm_pre\.weight .*a norm before the blocks"),
        (changed(blocks__0__attn__q_norm__weight=torch.ones(12)), r"q_norm\.weight .*queries and keys"),
        (changed(blocks__0__mlp__w12__weight=torch.ones(2, 2)), r"mlp\.w12\.weight .*SwiGLU"),
        (changed(blocks__0__attn__relative_position_bias_table=torch.ones(2)), "relative positions"),
        (changed(blocks__0__attn__extra__weight=torch.ones(2)), r"no place for: blocks\.0\.attn\.extra\.weight"),
        (lambda: {"layer1.0.conv1.weight": torch.ones(2, 2)}, r"not a complete ViT .* it holds layer1\.0\.conv1"),
        (lambda: {"weights": {"a": 1}}, "in none of the layouts known .* it holds weights"),
    ],
)
def test_other_models_are_refused_by_the_tensor(
    tmp_path: Path, make: Callable[[], dict[str, Tensor]], message: str
) -> None:
    torch.save(make(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        read_foreign(tmp_path / "model.pth")


def test_a_momentum_backbone_never_counts_as_the_backbone(tmp_path: Path) -> None:
    state = under("momentum_backbone.", ViT()) | under("classifier.", nn.Linear(WIDTH, 2))
    torch.save(lightning(state), tmp_path / "ep=0.ckpt")
    with pytest.raises(CheckpointError, match="not a complete ViT"):
        read_foreign(tmp_path / "ep=0.ckpt")
