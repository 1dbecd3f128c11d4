"""Recipes of the methods, bicubic crops, and the views of images in memory."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from gradscope.data import ImageData, augment, image_data, load_data, mocov3_views, views_of
from gradscope.data.augment import Augmentation, draw
from gradscope.errors import UsageError

CPU = torch.device("cpu")
COLOUR: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "channels": 3}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def colour_data(height: int = 40, width: int = 32, count: int = 30) -> ImageData:
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator())
    labels = torch.zeros(count, dtype=torch.int64)
    return image_data(
        "noise", train_images=images, train_labels=labels, test_images=images, test_labels=labels, classes=("a",)
    )


PUBLISHED = {  # crop_scale, brightness, contrast, saturation, hue, blur, solarize, interpolation of each view
    "mocov3": [
        ((0.08, 1.0), 0.4, 0.4, 0.2, 0.1, 1.0, 0.0, "bilinear"),
        ((0.08, 1.0), 0.4, 0.4, 0.2, 0.1, 0.1, 0.2, "bilinear"),
    ],
    "simclr": [((0.08, 1.0), 0.8, 0.8, 0.8, 0.2, 0.5, 0.0, "bilinear")] * 2,
    "dino": [
        ((0.4, 1.0), 0.4, 0.4, 0.2, 0.1, 1.0, 0.0, "bicubic"),
        ((0.4, 1.0), 0.4, 0.4, 0.2, 0.1, 0.1, 0.2, "bicubic"),
        *[((0.05, 0.4), 0.4, 0.4, 0.2, 0.1, 0.5, 0.0, "bicubic")] * 3,
    ],
}


@pytest.mark.parametrize("method", list(PUBLISHED))
def test_recipes_are_the_published_ones(method: str) -> None:
    views = views_of(method, image_size=224, **COLOUR, small_count=3 if method == "dino" else 0)
    found = [
        (v.crop_scale, v.brightness, v.contrast, v.saturation, v.hue, v.blur, v.solarize, v.interpolation)
        for v in views
    ]
    assert found == PUBLISHED[method]
    assert [v.size for v in views] == [224, 224, *[96] * (len(views) - 2)]
    for view in views:
        assert (view.flip, view.jitter, view.gray, view.crop_ratio) == (0.5, 0.8, 0.2, (3 / 4, 4 / 3))
        # Published widths .1 to 2 are in pixels of the view, at its published size.
        assert [sigma * view.size / 224 for sigma in view.blur_sigma] == pytest.approx([0.1, 2.0])
        assert (view.mean, view.std) == (COLOUR["mean"], COLOUR["std"])


def test_recipes_take_other_crops_and_other_channels() -> None:
    views = views_of(
        "dino",
        image_size=28,
        mean=(0.3,),
        std=(0.3,),
        channels=1,
        crop_scale=(0.25, 1.0),
        small_size=14,
        small_count=2,
        small_scale=(0.1, 0.25),
    )
    assert [view.size for view in views] == [28, 28, 14, 14]
    assert [view.crop_scale for view in views] == [(0.25, 1.0)] * 2 + [(0.1, 0.25)] * 2
    assert {(view.saturation, view.hue, view.gray) for view in views} == {(0.0, 0.0, 0.0)}
    assert views_of("mocov3", image_size=28, **COLOUR, crop_scale=(0.2, 1.0))[1].crop_scale == (0.2, 1.0)
    assert views_of("mocov3", image_size=28, **COLOUR) == mocov3_views(28, COLOUR["mean"], COLOUR["std"], 3)


@pytest.mark.parametrize(
    ("method", "options", "word"),
    [
        ("byol", {}, "unknown method 'byol'"),
        ("mocov3", {"channels": 1}, "mean must give one number for each of the 1 channels"),
        ("simclr", {"small_count": 4}, "simclr has no small crops"),
        ("dino", {"small_count": -1}, "small_count is -1"),
    ],
)
def test_recipes_that_do_not_exist_are_refused(method: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        views_of(method, image_size=28, **{**COLOUR, **options})


@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 28), (20, 33, 28), (60, 48, 16)])
def test_bicubic_crops_are_slices_resized_by_pillow(height: int, width: int, size: int) -> None:
    """Against Pillow's floating-point resize of the slice, and torch's antialiased one."""
    batch = 24
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator())
    view = Augmentation(
        size,
        (0.0,) * 3,
        (1.0,) * 3,
        crop_scale=(0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        interpolation="bicubic",
    )
    drawn = draw(batch, height, width, view, generator(1))
    result = augment(images, view, generator(1))
    assert drawn.box_B4[:, 2:].max() > size or height <= 33
    for index, (top, left, rows, columns) in enumerate(drawn.box_B4.astype(int).tolist()):
        part = images[index, :, top : top + rows, left : left + columns].float() / 255
        channels = [
            np.asarray(Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BICUBIC))
            for channel in part
        ]
        expected = torch.from_numpy(np.stack(channels)).clamp(0, 1)
        by_torch = F.interpolate(part[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
        if drawn.flip_B[index]:
            expected, by_torch = expected.flip(2), by_torch.flip(2)
        torch.testing.assert_close(result[index], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(result[index], by_torch, atol=1e-5, rtol=0)


def test_an_unknown_interpolation_is_named() -> None:
    with pytest.raises(UsageError, match="'nearest'"):
        Augmentation(28, (0.5,), (0.5,), interpolation="nearest")


@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
@pytest.mark.parametrize("name", ["fashion-mnist-10k", "colour"])
def test_views_are_augment_of_the_images_for_one_view_after_the_other(method: str, name: str) -> None:
    data = colour_data() if name == "colour" else load_data(name)
    small = {"small_count": 2} if method == "dino" else {}
    views = views_of(method, image_size=28, mean=data.mean, std=data.std, channels=data.channels, **small)
    indices = torch.tensor([3, 17, 4, 4, 29, 0])
    one, other = generator(5), generator(5)
    assert isinstance(data, ImageData)
    expected = [augment(data.train_images[indices], view, one) for view in views]
    found = data.views(indices, views, other, CPU)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("method", ["mocov3", "dino"])
@pytest.mark.parametrize(
    "rows", [slice(0, 4), slice(4, 8), *(slice(i, i + 1) for i in range(8)), slice(1, None, 2), slice(2, 2)]
)
def test_views_in_memory_do_not_depend_on_rows(method: str, rows: slice) -> None:
    """In colour; some boxes are the whole image, which needs no resampling unless others in the batch do."""
    data = colour_data(28, 28)
    whole = Augmentation(28, COLOUR["mean"], COLOUR["std"], crop_scale=(0.9, 1.0), flip=0.5)
    views = (*views_of(method, image_size=28, **COLOUR), whole)
    indices = torch.arange(8)
    every = data.prepare(indices, views, generator(2))
    assert 0 < (every[-1].drawn.box_B4[:, 2] == 28).sum() < 8
    expected = data.finish(every, CPU)
    some = data.views(indices, views, generator(2), CPU, rows)
    assert all(torch.equal(a[rows], b) for a, b in zip(expected, some, strict=True))


def test_plain_images_in_memory_are_as_they_are() -> None:
    data = load_data("fashion-mnist-10k")
    assert isinstance(data, ImageData)
    indices = torch.tensor([5, 0])
    assert torch.equal(data.plain("test", indices), data.test_images[indices])
    assert torch.equal(data.plain("train", indices), data.train_images[indices])
    assert (data.train_count, data.test_count) == (8000, 2000)
    with pytest.raises(UsageError, match="part 'val'"):
        data.plain("val", indices)


def test_images_in_memory_are_resampled_when_asked() -> None:
    data = load_data("fashion-mnist-10k")
    assert load_data("fashion-mnist-10k", image_size=28).digest == data.digest
    large = load_data("fashion-mnist-10k", image_size=56)
    assert isinstance(data, ImageData) and isinstance(large, ImageData)
    assert large.image_size == 56 and large.train_images.dtype == torch.uint8 and large.digest != data.digest
    assert torch.equal(large.train_labels, data.train_labels) and large.classes == data.classes
    assert large.mean == pytest.approx(data.mean, abs=3e-3)
    back = F.interpolate(large.test_images[:50].float(), (28, 28), mode="area")
    apart = (back[:, None] - data.test_images[:50].float()).abs().mean((2, 3, 4))  # every image against every one
    assert torch.equal(apart.argmin(1), torch.arange(50)) and apart.diag().mean() < 5  # of 255
    with pytest.raises(UsageError, match="image_size is 0"):
        load_data("fashion-mnist-10k", image_size=0)
