"""Features against hooks and shortened models; data that does not suit; and the whole suite in one call."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradscope.data import ImageData, folder_data
from gradscope.errors import UsageError
from gradscope.evaluation import (
    FinetuneOptions,
    Wanted,
    block_features,
    dataset_features,
    evaluate,
    extract_features,
    knn_accuracy,
    linear_probe,
    normalise,
)
from gradscope.models import VisionTransformer, ViTSize

SIZE = ViTSize(width=16, depth=3, heads=2, mlp_ratio=2.0)


def new_model(*, channels: int = 1, image_size: int = 28, patch: int = 7, depth: int = 3) -> VisionTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = dataclasses.replace(SIZE, depth=depth)
        return VisionTransformer(size, image_size=image_size, patch=patch, channels=channels)


def write_pictures(folder: Path, *, seed: int = 0) -> Path:
    """40 + 10 pictures of 30 x 24 pixels in two classes, each of one brightness but for noise."""
    random = np.random.default_rng(seed)
    for part, count in (("train", 20), ("val", 5)):
        for position, name in enumerate(("bright", "dark")):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                grey = random.normal(190 - 120 * position, 30, (30, 24, 3)).clip(0, 255)
                Image.fromarray(grey.astype(np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


def test_block_features_are_what_hooks_see_and_what_shorter_models_give(few_images: ImageData) -> None:
    model = new_model().eval()
    images = normalise(few_images.test_images[:5], few_images, model)
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in model.blocks]
    with torch.no_grad():
        feature = model(images)
        by_hook = [model.norm(out[:, 0]) for out in seen]
        for hook in hooks:
            hook.remove()
        shorter = []
        for depth in (1, 2, 3):
            part = copy.deepcopy(model)
            part.blocks = part.blocks[:depth]
            shorter.append(part(images))
    for blocks in (1, 2, 3):
        found = block_features(model, images, blocks)
        torch.testing.assert_close(found, torch.cat(by_hook[-blocks:], dim=1))
        torch.testing.assert_close(found, torch.cat(shorter[-blocks:], dim=1))
    torch.testing.assert_close(found[:, -16:], feature)
    for blocks in (0, 4):
        with pytest.raises(UsageError, match=f"blocks={blocks}: the model has 3"):
            block_features(model, images, blocks)


def test_features_of_a_dataset_are_those_of_its_images_in_order(few_images: ImageData) -> None:
    model = new_model().train()
    model.drop_path = 0.9  # evaluation skips no branch
    for part, images in (("train", few_images.train_images), ("test", few_images.test_images)):
        found = dataset_features(model, few_images, part, batch_size=7, blocks=2)
        assert model.training
        with torch.no_grad():
            single = torch.cat(
                [block_features(model.eval(), normalise(image[None], few_images, model), 2) for image in images[:20]]
            )
        torch.testing.assert_close(found[:20], single)
        torch.testing.assert_close(found, extract_features(model.train(), images, few_images, blocks=2))
    with pytest.raises(UsageError, match="part='val': choose train or test"):
        dataset_features(model, few_images, "val")


def test_normalisation_is_by_the_statistics_given(few_images: ImageData) -> None:
    model = new_model()
    other = dataclasses.replace(few_images, mean=(0.5,), std=(0.25,))
    torch.testing.assert_close(
        normalise(few_images.test_images[:3], other, model), few_images.test_images[:3].double().float() / 63.75 - 2
    )
    found = dataset_features(model, few_images, "test", statistics=other)
    torch.testing.assert_close(found, dataset_features(model, other, "test"))
    assert not torch.allclose(found, dataset_features(model, few_images, "test"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"channels": 3}, "have 1 channels, the model was trained on 3"),
        ({"image_size": 48, "patch": 16}, "28 pixels cannot be cut into the model's patches of 16; .* such as 48"),
    ],
)
def test_images_that_do_not_suit_the_model_are_refused(
    few_images: ImageData, model: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        dataset_features(new_model(**model), few_images, "test")
    with pytest.raises(UsageError, match=message):
        evaluate(new_model(**model), few_images, Wanted(ks=(), finetune=FinetuneOptions.small()))


def test_images_of_another_size_that_the_patches_divide_are_evaluated(few_images: ImageData) -> None:
    assert dataset_features(new_model(image_size=14), few_images, "test").shape == (48, 16)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(ks=(), finetune=FinetuneOptions.small(epochs=1))])
def test_data_without_labels_is_refused_with_the_cure(few_images: ImageData, tmp_path: Path, wanted: Wanted) -> None:
    for i in range(12):
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(UsageError, match=r"has no classes, and evaluation needs labels; .* --data.*train/<class>"):
        evaluate(new_model(channels=3, image_size=14), folder_data(tmp_path, image_size=14), wanted)
    empty = dataclasses.replace(
        few_images, test_images=few_images.test_images[:0], test_labels=few_images.test_labels[:0]
    )
    with pytest.raises(UsageError, match="no test images"):
        evaluate(new_model(), empty, wanted)


def test_the_suite_gives_what_its_parts_give(few_images: ImageData) -> None:
    model = new_model()
    news: list[float] = []
    wanted = Wanted(ks=(5, 20), linear="sgd", blocks=2, probe_epochs=5, finetune=FinetuneOptions.small(epochs=1))
    found = evaluate(model, few_images, wanted, report=lambda fraction, text: news.append(fraction))
    train, test = (dataset_features(model, few_images, part, blocks=2) for part in ("train", "test"))
    labels = few_images.train_labels, few_images.test_labels
    for k in (5, 20):
        last = knn_accuracy(train[:, 16:], labels[0], test[:, 16:], labels[1], k=k)
        assert found.accuracy[f"knn_{k}"] == last
    probe = linear_probe(train, labels[0], test, labels[1], solver="sgd", epochs=5)
    assert found.accuracy["linear"] == probe.accuracy
    assert found.details["linear"]["chosen"] == probe.chosen and found.details["linear"]["blocks"] == 2
    assert 0 <= found.accuracy["finetune"] <= 1 and found.details["finetune"]["epochs"] == 1
    assert news == sorted(news) and news[-1] == pytest.approx(1)
    assert set(evaluate(model, few_images).accuracy) == {"knn"}
    with pytest.raises(UsageError, match="nothing to evaluate"):
        Wanted(ks=())


def test_a_folder_of_pictures_is_evaluated(tmp_path: Path) -> None:
    data = folder_data(write_pictures(tmp_path / "d"), image_size=14)
    wanted = Wanted(ks=(3,), linear="sgd", probe_epochs=20, finetune=FinetuneOptions.small(epochs=2, batch_size=8))
    found = evaluate(new_model(channels=3, image_size=14), data, wanted)
    assert found.accuracy["knn"] == found.accuracy["linear"] == 1.0 and "finetune" in found.accuracy
