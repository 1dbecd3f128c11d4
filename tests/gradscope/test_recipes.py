"""The published constants, number by number, and what a run of each method is made of without further settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gradscope.config import TrainConfig
from gradscope.data import views_of
from gradscope.errors import UsageError
from gradscope.methods import METHODS, MethodSettings, new_method
from gradscope.models import VIT_SIZES, VisionTransformer
from schedulers import patch_tokens


def published(method: str, model: str = "base", **values: Any) -> TrainConfig:
    return TrainConfig.for_run(method, model, budget=1e6, image_size=224, **values)


@pytest.mark.parametrize(
    ("method", "facts"),
    [
        (
            "mocov3",
            {
                "lr": 1.5e-4, "lr_end": 0.0, "weight_decay": 0.1, "betas": (0.9, 0.999), "warmup": 40 / 300,
                "decay": "cosine", "clip": 0.0, "drop_path": 0.0, "decay_biases": True, "head_hidden": 4096,
                "head_width": 256, "temperature": 0.2, "momentum": 0.99, "freeze_patch_embed": True,
                "positions": "sincos",
            },
        ),
        (
            "simclr",
            {
                "lr": 3.2e-3 * 256 / 4096, "weight_decay": 0.1, "betas": (0.9, 0.98), "warmup": 0.1, "clip": 0.0,
                "head_hidden": 4096, "head_width": 256, "temperature": 0.1, "freeze_patch_embed": False,
                "small_crops": 0, "decay": "cosine",
            },
        ),
        (
            "dino",
            {
                "lr": 5e-4, "lr_end": 1e-6, "weight_decay": 0.04, "weight_decay_end": 0.4, "betas": (0.9, 0.999),
                "warmup": 10 / 100, "clip": 3.0, "drop_path": 0.1, "decay_biases": False, "head_hidden": 2048,
                "head_width": 256, "prototypes": 65536, "temperature": 0.1, "teacher_temperature": 0.04,
                "teacher_temperature_start": 0.04, "centre_momentum": 0.9, "momentum": 0.996, "fixed_norm": True,
                "freeze_patch_embed": False, "positions": "learned", "small_crops": 8, "freeze_last_layer": 1 / 100,
            },
        ),
    ],
)  # fmt: skip
def test_published_constants(method: str, facts: dict[str, Any]) -> None:
    config = published(method)
    for name, expected in facts.items():
        value = getattr(config, name)
        assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), name


def test_what_differs_between_models() -> None:
    assert published("mocov3", "small").heads == 12 and published("mocov3", "base").heads in (0, 12)
    assert VIT_SIZES["small"].heads == 6 and VIT_SIZES["base"].heads == 12
    assert not published("dino", "small").fixed_norm and published("dino", "base").fixed_norm


def test_a_setting_that_is_given_wins_over_the_recipe() -> None:
    config = TrainConfig.for_run("dino", "base", budget=1e6, lr=0.1, clip=0.0, small_crops=6)
    assert (config.lr, config.clip, config.small_crops, config.momentum) == (0.1, 0.0, 6, 0.996)
    with pytest.raises(UsageError, match="method is 'byol'; it must be one of mocov3, simclr, dino"):
        TrainConfig.for_run("byol", "base", budget=1e6)


def test_the_papers_grid_is_that_of_240_pixels() -> None:
    grid = TrainConfig.for_run("mocov3", "base", budget=1e6, image_size=240).grid(240)
    assert grid.axes["patch"] == (16, 20, 24, 30, 40, 48)
    assert grid.axes["dropout"] == (0.0, 0.25, 0.5, 0.75, 0.9)
    assert dict(grid.reference) == {"patch": 16, "dropout": 0}


def test_dinos_small_crops_are_96_of_224_pixels_and_37_tokens() -> None:
    config = published("dino")
    assert config.small_crop_size(224) == 96
    assert patch_tokens(96, 16) + 1 == 37
    reference = 4 + 3 * 8 * 37 / 197
    assert config.cost(224, config.reference) == pytest.approx(reference, rel=1e-12)
    assert TrainConfig.for_run("dino", "demo", budget=1e3, patch=7).small_crop_size(28) % 7 == 0


def test_dinos_crops() -> None:
    views = views_of("dino", image_size=224, mean=(0.5,) * 3, std=(0.2,) * 3, channels=3, small_count=8)
    query, key, *small = views
    assert [view.size for view in views] == [224, 224, *[96] * 8]
    assert all(view.interpolation == "bicubic" and view.flip == 0.5 for view in views)
    assert {view.crop_scale for view in (query, key)} == {(0.4, 1.0)} and {s.crop_scale for s in small} == {(0.05, 0.4)}
    assert (query.blur, key.blur, {s.blur for s in small}) == (1.0, 0.1, {0.5})
    assert (query.solarize, key.solarize, {s.solarize for s in small}) == (0.0, 0.2, {0.0})
    jitters = {(v.jitter, v.brightness, v.contrast, v.saturation, v.hue, v.gray) for v in views}
    assert jitters == {(0.8, 0.4, 0.4, 0.2, 0.1, 0.2)}


def test_mocov3s_and_simclrs_views() -> None:
    arguments = {"image_size": 224, "mean": (0.5,) * 3, "std": (0.2,) * 3, "channels": 3}
    query, key = views_of("mocov3", **arguments)  # type: ignore[arg-type]
    assert (query.blur, key.blur, query.solarize, key.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert query.crop_scale == key.crop_scale == (0.08, 1.0) and query.interpolation == "bilinear"
    assert (query.jitter, query.brightness, query.contrast, query.saturation, query.hue) == (0.8, 0.4, 0.4, 0.2, 0.1)
    first, second = views_of("simclr", **arguments)  # type: ignore[arg-type]
    assert first == second
    assert (first.jitter, first.brightness, first.contrast, first.saturation, first.hue) == (0.8, 0.8, 0.8, 0.8, 0.2)
    assert (first.gray, first.blur, first.solarize, first.crop_scale) == (0.2, 0.5, 0.0, (0.08, 1.0))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_published_heads_of_a_vit_base(method: str) -> None:
    """Shapes on the meta device: no memory is taken."""
    config = published(method)
    with torch.device("meta"):
        backbone = VisionTransformer(
            VIT_SIZES["base"], image_size=224, patch=16, positions=config.positions, drop_path=config.drop_path
        )
        model = new_method(
            method,
            backbone,
            MethodSettings(
                hidden=config.head_hidden, width=config.head_width, temperature=config.temperature,
                momentum=config.momentum, freeze_patch_embed=config.freeze_patch_embed, prototypes=config.prototypes,
                fixed_norm=config.fixed_norm, small_crops=config.small_crops,
            ),
        )  # fmt: skip
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("backbone")}
    shapes = {n: s for n, s in shapes.items() if "backbone" not in n and not n.startswith("momentum")}
    assert shapes == {
        "mocov3": {
            "projector.0.weight": (4096, 768), "projector.3.weight": (4096, 4096), "projector.6.weight": (256, 4096),
            "predictor.0.weight": (4096, 256), "predictor.3.weight": (256, 4096),
        },
        "simclr": {
            "projector.0.weight": (4096, 768), "projector.3.weight": (4096, 4096), "projector.6.weight": (256, 4096),
        },
        "dino": {
            "head.mlp.0.weight": (2048, 768), "head.mlp.2.weight": (2048, 2048), "head.mlp.4.weight": (256, 2048),
            "head.last_layer.weight_g": (65536, 1), "head.last_layer.weight_v": (65536, 256),
        },
    }[method]  # fmt: skip
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and not n.startswith("momentum")}
    assert (
        frozen
        == {
            "mocov3": {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias"},
            "simclr": {"backbone.pos_embed"},
            "dino": {"head.last_layer.weight_g"},
        }[method]
    )


def test_the_small_demo_keeps_each_methods_character() -> None:
    for method in METHODS:
        demo, base = TrainConfig.for_run(method, "demo", budget=1e3), published(method)
        for name in ("temperature", "betas", "freeze_patch_embed", "decay_biases", "weight_decay", "lr_end"):
            assert getattr(demo, name) == getattr(base, name), (method, name)


def test_the_cosine_of_the_rate_is_that_of_the_recipes_loop() -> None:
    """DINO's arrays: linear from 0 over the warm-up, then end + (base - end) (1 + cos) / 2 over the rest."""
    config = published("dino", batch_size=1024)
    base, steps, warm = 5e-4 * 1024 / 256, 1000, 100
    for step in (0, 37, 100, 400, 999):
        expected = (
            base * step / warm
            if step < warm
            else 1e-6 + 0.5 * (base - 1e-6) * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        )
        assert config.learning_rate(step / steps) == pytest.approx(expected, rel=1e-9)
