"""Fine-tuning: what it learns, what it leaves alone, a step written out, and the regularisers by themselves."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradscope.data import ImageData
from gradscope.errors import NonFiniteError, UsageError
from gradscope.evaluation import FinetuneOptions, finetune, finetune_accuracy, finetuned, normalise
from gradscope.evaluation.finetune import parameter_groups
from gradscope.evaluation.mixing import erase, mix, smoothed_targets
from gradscope.models import VisionTransformer, ViTSize

PLAIN: dict[str, Any] = {"crop_scale": (1.0, 1.0), "flip": 0.0, "smoothing": 0.0}


def new_model(*, positions: str = "sincos") -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = ViTSize(width=24, depth=2, heads=2, mlp_ratio=2.0)
        return VisionTransformer(size, image_size=28, patch=7, channels=1, positions=positions)


def streams() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]


@pytest.mark.parametrize("training", [True, False])
def test_fine_tuning_learns_and_leaves_the_backbone_alone(few_images: ImageData, training: bool) -> None:
    model = new_model().train(training).requires_grad_(False)  # as a teacher is
    model.norm.weight.requires_grad_(True)
    model.norm.weight.grad = torch.ones(24)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    before = streams()
    options = FinetuneOptions.small(epochs=20, batch_size=32, lr=2e-2, **PLAIN)
    assert finetune(model, few_images, options) > 0.4  # ten classes
    assert streams() == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.training == training and model.drop_path == 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["norm.weight"]
    assert torch.equal(model.norm.weight.grad, torch.ones(24)) and model.cls_token.grad is None


def test_everything_switched_on_gives_the_same_twice_and_another_with_another_seed(few_images: ImageData) -> None:
    model = new_model(positions="learned")
    options = FinetuneOptions(epochs=2, batch_size=64, lr=1e-2, warmup_epochs=0.5, drop_path=0.5, layer_decay=0.7)
    (a, head_a), (b, head_b), (c, _) = (finetuned(model, few_images, options, seed=seed) for seed in (1, 1, 2))
    assert a.drop_path == 0.5 and torch.equal(head_a.weight, head_b.weight)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.norm.weight, c.norm.weight)
    assert all(not torch.equal(x, y) for x, y in zip(a.parameters(), model.parameters(), strict=True))


def test_the_steps_are_adamw_written_out(few_images: ImageData) -> None:
    """One batch, twice: the loss of softened labels, rates after half of each step, decay of matrices alone."""
    data = dataclasses.replace(
        few_images, train_images=few_images.train_images[:32], train_labels=few_images.train_labels[:32]
    )
    model = new_model()
    options = FinetuneOptions.small(
        epochs=2, batch_size=32, lr=0.016, weight_decay=0.5, warmup_epochs=1.0, layer_decay=0.5,
        crop_scale=(1.0, 1.0), flip=0.0,
    )  # fmt: skip
    found, head = finetuned(model, data, options)
    mine, layer = new_model(), nn.Linear(24, 10)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    named = {**dict(mine.named_parameters()), "head.weight": layer.weight, "head.bias": layer.bias}
    del named["pos_embed"]
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in named.items()}
    images = normalise(data.train_images, data, mine)
    for step, factor in ((1, 0.5), (2, (1 + math.cos(math.pi / 2)) / 2)):
        log_share = layer(mine(images)).log_softmax(1)
        target = torch.full((32, 10), 0.01).scatter_(1, data.train_labels[:, None], 0.91)
        gradients = torch.autograd.grad(-(target * log_share).sum(1).mean(), list(named.values()))
        for (name, p), gradient in zip(named.items(), gradients, strict=True):
            depth = (
                int(name.split(".")[1]) + 1 if name.startswith("blocks") else 3 if name[:4] in ("norm", "head") else 0
            )
            rate = 0.016 * 32 / 512 * 0.5 ** (3 - depth) * factor
            decay = 0.5 if p.ndim > 1 and name != "cls_token" else 0.0
            first, second = moments[name]
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            with torch.no_grad():
                p.mul_(1 - rate * decay)
                p.sub_(rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
    results = {**dict(found.named_parameters()), "head.weight": head.weight, "head.bias": head.bias}
    for name, p in named.items():
        known = moments[name][1].sqrt() > 1e-6  # elsewhere the gradient is rounding, which Adam blows up
        torch.testing.assert_close(results[name][known], p[known], rtol=1e-4, atol=1e-6)
        assert known.any() or name in ("cls_token",), name
    assert torch.equal(results["pos_embed"], model.pos_embed)


def test_parameter_groups_hold_each_trained_parameter_once() -> None:
    model, head = new_model(positions="learned"), nn.Linear(24, 10)
    names = {id(p): name for name, p in (*model.named_parameters(), *head.named_parameters("head"))}
    for layer_decay, groups in ((1.0, 2), (0.5, 8)):
        found = parameter_groups(model, head, FinetuneOptions(layer_decay=layer_decay), rate=1.0)
        held = [names[id(p)] for group in found for p in group["params"]]
        assert sorted(held) == sorted(names.values()) and len(found) == groups
        for group in found:
            for p in group["params"]:
                name = names[id(p)]
                matrix = name.endswith("weight") and "norm" not in name
                assert group["weight_decay"] == (0.05 if matrix else 0.0), name
                layer = {"norm": 3, "head": 3, "blocks": 0}.get(name.split(".")[0], 0)
                layer = int(name.split(".")[1]) + 1 if name.startswith("blocks") else layer
                assert group["lr"] == layer_decay ** (3 - layer)


def test_targets_sum_to_one() -> None:
    labels = torch.tensor([2, 0, 1, 2])
    targets = smoothed_targets(labels, 4, 0.2)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets[0].tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])
    images = torch.rand(4, 1, 8, 8)
    for seed in range(40):
        mixed = mix(images, targets, mixup=0.8, cutmix=1.0, switch=0.5, random=np.random.default_rng(seed))
        torch.testing.assert_close(mixed[1].sum(1), torch.ones(4))
        assert (mixed[1] >= 0).all()


def test_the_cut_area_is_the_label_s_share_exactly() -> None:
    """Images of one number each: counting pixels gives the share kept, which the targets must equal to the bit."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 2, 16, 16).contiguous()
    targets = nn.functional.one_hot(torch.arange(4), 4).float()
    shares = set()
    for seed in range(60):
        mixed, target = mix(images, targets, mixup=0.0, cutmix=1.0, switch=0.0, random=np.random.default_rng(seed))
        for i in range(4):
            kept = int((mixed[i, 0] == i).sum())
            assert int((mixed[i, 0] == 3 - i).sum()) == 256 - kept and torch.equal(mixed[i, 0], mixed[i, 1])
            assert target[i, i] == kept / 256 and target[i, 3 - i] == 1 - kept / 256
        shares.add(kept)
    assert len(shares) > 20 and torch.equal(images[1], torch.ones(2, 16, 16))


def test_mixup_is_the_same_share_of_pixels_and_labels() -> None:
    images, targets = torch.rand(6, 1, 5, 5), torch.rand(6, 3)
    shares = []
    for seed in range(300):
        mixed, target = mix(images, targets, mixup=0.8, cutmix=0.0, switch=1.0, random=np.random.default_rng(seed))
        share = float(((mixed - images.flip(0)) / (images - images.flip(0))).median())
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0), atol=1e-4, rtol=0)
        torch.testing.assert_close(target, share * targets + (1 - share) * targets.flip(0), atol=1e-4, rtol=0)
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.07)
    assert np.var(shares) == pytest.approx(0.25 / 2.6, abs=0.02)  # Beta(a, a): 1 / (4 (2 a + 1))
    same = mix(images, targets, mixup=0.0, cutmix=0.0, switch=0.5, random=np.random.default_rng(0))
    assert torch.equal(same[0], images) and torch.equal(same[1], targets)


def test_erasing_replaces_one_box_by_noise() -> None:
    images = torch.full((400, 2, 32, 32), 9.0)
    erased = erase(images, 0.25, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert bool((images == 9).all())
    noise = erased[erased != 9]
    assert float(noise.mean()) == pytest.approx(0, abs=0.02) and float(noise.std()) == pytest.approx(1, abs=0.02)
    hit = [i for i in range(400) if not torch.equal(erased[i], images[i])]
    assert len(hit) == pytest.approx(100, abs=30)
    areas = []
    for i in hit:
        inside = erased[i, 0] != 9
        rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
        height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert int(inside.sum()) == height * width and torch.equal(inside, erased[i, 1] != 9)
        assert 0.25 < height / width < 4
        areas.append(height * width / 32**2)
    assert 0.01 < min(areas) < 0.06 and 0.28 < max(areas) < 0.36
    assert torch.equal(erase(images, 0.0, np.random.default_rng(0), torch.Generator()), images)


def test_the_old_call_trains_at_the_rate_it_names(few_images: ImageData) -> None:
    options = FinetuneOptions.small(epochs=1, batch_size=64, lr=8e-3)
    assert finetune_accuracy(new_model(), few_images, epochs=1, batch_size=64, lr=1e-3) == finetune(
        new_model(), few_images, options
    )


def test_a_loss_that_is_not_finite_is_told(few_images: ImageData) -> None:
    model = new_model()
    model.norm.weight.data[0] = math.nan
    with pytest.raises(NonFiniteError, match="the loss is nan after epoch 1; lower lr"):
        finetune(model, few_images, FinetuneOptions.small())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs=0: fine-tuning needs at least 1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"drop_path": 1.0}, r"drop_path=1.0: it must lie in \[0, 1\)"),
        ({"erase": 2.0}, "erase=2.0"),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinetuneOptions(**values)
    with pytest.raises(UsageError, match=message):
        FinetuneOptions.small(**values)


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(UsageError, match="cutmx: no option of fine-tuning"):
        FinetuneOptions.small(cutmx=1)
