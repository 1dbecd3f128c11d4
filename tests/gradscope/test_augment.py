"""Augmentation: each operation against a plain per-image computation, and the promises about randomness."""

import colorsys
import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from gradscope.data import Augmentation, augment, mocov3_views
from gradscope.data.augment import MIN_SIGMA, Draw, apply, draw
from gradscope.errors import UsageError

LUMA = torch.tensor([0.299, 0.587, 0.114])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(batch: int, channels: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8, generator=generator(seed))


def plain(size: int, channels: int, **options: Any) -> Augmentation:
    """Nothing but `options`; mean 0 and std 1."""
    return Augmentation(size=size, mean=(0.0,) * channels, std=(1.0,) * channels, **options)


def neutral(batch: int, size: int, **columns: Any) -> Draw:
    """Parameters that change nothing, but for `columns`."""
    ones, zeros, no = np.ones(batch, np.float32), np.zeros(batch, np.float32), np.zeros(batch, bool)
    values: dict[str, Any] = {
        "box_B4": np.tile(np.array([0, 0, size, size], np.float32), (batch, 1)),
        "flip_B": no,
        "brightness_B": ones,
        "contrast_B": ones,
        "saturation_B": ones,
        "hue_B": zeros,
        "gray_B": no,
        "sigma_B": zeros,
        "solarize_B": no,
    }
    return Draw(**{**values, **columns})


@pytest.mark.parametrize("ratio", [(1.0, 1.0), (3 / 4, 4 / 3)])
def test_everything_off_is_the_normalised_input(ratio: tuple[float, float]) -> None:
    images = random_images(6, 3, 28)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    view = augment(images, Augmentation(28, mean, std), generator())
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(view.double(), expected, atol=1e-6, rtol=0)
    assert view.dtype == torch.float32


def test_floating_images_are_taken_as_they_are_and_left_alone() -> None:
    images = random_images(6, 3, 28)
    floating = images.double() / 255
    before = floating.clone()
    first, _ = mocov3_views(28, (0.5,) * 3, (0.5,) * 3, 3)
    from_bytes, from_floats = augment(images, first, generator()), augment(floating, first, generator())
    torch.testing.assert_close(from_bytes, from_floats, atol=1e-5, rtol=0)
    assert torch.equal(floating, before)
    floating32 = floating.float()
    augment(floating32, plain(28, 3, jitter=1.0, brightness=0.9), generator())
    assert torch.equal(floating32, before.float())


def test_the_generator_alone_decides() -> None:
    images = random_images(16, 3, 20)
    _, second = mocov3_views(20, (0.5,) * 3, (0.5,) * 3, 3)
    first_time, again, other = (augment(images, second, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first_time, again)
    assert not torch.equal(first_time, other)
    state = torch.get_rng_state()
    augment(images, second, generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_numbers_do_not_depend_on_the_images_or_the_operations() -> None:
    first, second = mocov3_views(20, (0.5,) * 3, (0.5,) * 3, 3)
    states = []
    for images, view in (
        (random_images(8, 3, 20), first),
        (torch.zeros(8, 3, 20, 20, dtype=torch.uint8), second),
        (random_images(8, 3, 20, seed=1), plain(20, 3)),
    ):
        source = generator(7)
        augment(images, view, source)
        states.append(source.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
    boxes = [draw(8, 20, 20, view, generator(7)).box_B4 for view in (first, second)]
    np.testing.assert_array_equal(*boxes)


def test_an_image_is_augmented_alone() -> None:
    images = random_images(8, 3, 24)
    _, second = mocov3_views(24, (0.5,) * 3, (0.5,) * 3, 3)
    views = augment(images, second, generator())
    images[3] = 255 - images[3]
    changed = augment(images, second, generator())
    same = [bool(torch.equal(a, b)) for a, b in zip(views, changed, strict=True)]
    assert same == [index != 3 for index in range(8)]


def test_flip_mirrors_exactly_the_drawn_images() -> None:
    images = random_images(64, 1, 28)
    drawn = draw(64, 28, 28, plain(28, 1, flip=0.5), generator())
    view = augment(images, plain(28, 1, flip=0.5), generator())
    assert 10 < drawn.flip_B.sum() < 54
    for image, flipped, result in zip(images.float() / 255, drawn.flip_B, view, strict=True):
        assert torch.equal(result, image.flip(2) if flipped else image)


@pytest.mark.parametrize(("height", "width", "size"), [(28, 28, 28), (20, 33, 28), (40, 24, 16)])
def test_crop_is_the_interpolated_slice(height: int, width: int, size: int) -> None:
    batch = 32
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator())
    view = plain(size, 3, crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5)
    drawn = draw(batch, height, width, view, generator(1))
    result = augment(images, view, generator(1))
    for index, (top, left, rows, columns) in enumerate(drawn.box_B4.astype(int).tolist()):
        part = images[index : index + 1, :, top : top + rows, left : left + columns].float() / 255
        assert part.shape[2:] == (rows, columns)
        expected = F.interpolate(part, (size, size), mode="bilinear", align_corners=False)[0]
        expected = expected.flip(2) if drawn.flip_B[index] else expected
        torch.testing.assert_close(result[index], expected, atol=2e-5, rtol=0)


def test_boxes_follow_the_published_sampling() -> None:
    """Against the rejection loop written out for one image at a time."""

    def published(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * rng.uniform(0.08, 1.0)
            ratio = math.exp(rng.uniform(math.log(1 / 2), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        return 0, 0, height, width

    height, width, count = 28, 36, 20_000
    view = plain(28, 1, crop_scale=(0.08, 1.0), crop_ratio=(1 / 2, 4 / 3))
    ours = draw(count, height, width, view, generator()).box_B4.astype(np.float64)
    rng = random.Random(0)
    expected = np.array([published(rng, height, width) for _ in range(count)], np.float64)
    top, left, rows, columns = ours.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + rows <= height).all() and (left + columns <= width).all()
    assert (ours == np.rint(ours)).all()
    for measure in (
        lambda box: box,
        lambda box: box**2,
        lambda box: (box[:, 2] * box[:, 3])[:, None],
        lambda box: np.log(box[:, 2] / box[:, 3])[:, None],
        lambda box: (box[:, 0] == height - box[:, 2])[:, None].astype(float),
    ):
        a, b = measure(ours), measure(expected)
        error = np.sqrt((a.var(0) + b.var(0)) / count)
        assert (np.abs(a.mean(0) - b.mean(0)) < 4.5 * error).all()


@pytest.mark.parametrize(("height", "width", "box"), [(10, 40, (0, 13, 10, 13)), (40, 10, (13, 0, 13, 10))])
def test_where_no_box_fits_the_largest_central_one_is_taken(
    height: int, width: int, box: tuple[int, int, int, int]
) -> None:
    """A box of the whole area with a ratio in 3/4..4/3 never fits into an image of 1:4."""
    view = plain(28, 1, crop_scale=(1.0, 1.0), crop_ratio=(3 / 4, 4 / 3))
    boxes = draw(200, height, width, view, generator()).box_B4
    np.testing.assert_array_equal(boxes, np.tile(box, (200, 1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_and_contrast(channels: int) -> None:
    batch = 40
    images = random_images(batch, channels, 12)
    view = plain(12, channels, jitter=0.7, brightness=0.4, contrast=1.5)
    drawn = draw(batch, 12, 12, view, generator(2))
    result = augment(images, view, generator(2))
    assert 0 < (drawn.brightness_B == 1).sum() < batch
    assert drawn.contrast_B.min() >= 0 and drawn.contrast_B.max() > 2
    for index, image in enumerate(images.double() / 255):
        brighter = (image * float(drawn.brightness_B[index])).clamp(0, 1)
        gray = (brighter * LUMA.view(3, 1, 1)).sum(0) if channels == 3 else brighter[0]
        contrast = float(drawn.contrast_B[index])
        expected = (contrast * brighter + (1 - contrast) * gray.mean()).clamp(0, 1)
        torch.testing.assert_close(result[index].double(), expected, atol=2e-6, rtol=0)


def test_saturation_blends_with_the_gray_image() -> None:
    batch = 16
    images = random_images(batch, 3, 12)
    view = plain(12, 3, jitter=1.0, saturation=0.8)
    drawn = draw(batch, 12, 12, view, generator())
    result = augment(images, view, generator())
    for index, image in enumerate(images.double() / 255):
        gray = (image * LUMA.view(3, 1, 1)).sum(0, keepdim=True)
        saturation = float(drawn.saturation_B[index])
        assert 0.2 <= saturation <= 1.8
        expected = (saturation * image + (1 - saturation) * gray).clamp(0, 1)
        torch.testing.assert_close(result[index].double(), expected, atol=2e-6, rtol=0)


def test_grayscale_gives_every_channel_the_luma() -> None:
    images = random_images(64, 3, 12)
    view = plain(12, 3, gray=0.4)
    drawn = draw(64, 12, 12, view, generator())
    result = augment(images, view, generator())
    assert 0 < drawn.gray_B.sum() < 64
    for image, chosen, found in zip(images.float() / 255, drawn.gray_B, result, strict=True):
        gray = (image * LUMA.view(3, 1, 1)).sum(0, keepdim=True).expand(3, 12, 12)
        torch.testing.assert_close(found, gray if chosen else image, atol=2e-6, rtol=0)


def test_hue_turns_the_colours_of_yiq() -> None:
    """Half a turn mirrors every colour at its gray exactly; a fifth of a turn agrees with colorsys's rounded YIQ."""
    images = random_images(8, 3, 12).float() / 255 * 0.2 + 0.4
    view = plain(12, 3, jitter=1.0, hue=0.5)
    half = apply(images, view, neutral(8, 12, hue_B=np.full(8, 0.5, np.float32)))
    gray = (images * LUMA.view(3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(half, 2 * gray - images, atol=2e-6, rtol=0)

    fifth = apply(images, view, neutral(8, 12, hue_B=np.full(8, 0.2, np.float32)))
    angle = 2 * math.pi * 0.2
    for before, after in zip(
        images.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        fifth.permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
        strict=True,
    ):
        y, i, q = colorsys.rgb_to_yiq(*before)
        turned = (y, i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle))
        assert after == pytest.approx(colorsys.yiq_to_rgb(*turned), abs=0.01)


def test_blur_is_the_gaussian_of_every_sample() -> None:
    batch, size = 24, 64
    images = random_images(batch, 3, size)
    view = plain(size, 3, blur=0.6, blur_sigma=(0.9, 8.0))
    drawn = draw(batch, size, size, view, generator())
    result = augment(images, view, generator())
    chosen = drawn.sigma_B > 0
    assert 0 < chosen.sum() < batch
    assert (drawn.sigma_B[chosen] >= MIN_SIGMA).all() and (drawn.sigma_B[chosen] <= 8 * size / 224).all()
    radius = math.ceil(3 * 8 * size / 224)
    for image, sigma, found in zip(images.numpy().astype(np.float64) / 255, drawn.sigma_B, result, strict=True):
        widths = (0, float(sigma), float(sigma))
        expected = (
            ndimage.gaussian_filter(image, widths, mode="nearest", radius=(0, radius, radius)) if sigma else image
        )
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_blur_too_narrow_for_eight_bits_is_skipped_rightly() -> None:
    """Even on the image that it changes most, a lone pixel, a skipped Gaussian changes less than half a step."""
    lone = np.zeros((5, 5))
    lone[2, 2] = 1
    assert np.abs(ndimage.gaussian_filter(lone, MIN_SIGMA, radius=2) - lone).max() < 0.5 / 255
    first, _ = mocov3_views(28, (0.5,), (0.5,), 1)
    assert first.blur == 1 and (draw(500, 28, 28, first, generator()).sigma_B == 0).all()


def test_solarize_inverts_the_bright_pixels_of_the_drawn_images() -> None:
    images = random_images(64, 1, 12)
    images[:, 0, 0, :3] = torch.tensor([127, 128, 129], dtype=torch.uint8)
    view = plain(12, 1, solarize=0.3)
    drawn = draw(64, 12, 12, view, generator())
    result = augment(images, view, generator())
    assert 0 < drawn.solarize_B.sum() < 64
    for image, chosen, found in zip(images.int(), drawn.solarize_B, result, strict=True):
        expected = torch.where(image >= 128, 255 - image, image) if chosen else image
        torch.testing.assert_close(found * 255, expected.float(), atol=1e-4, rtol=0)


def test_operations_run_in_the_documented_order() -> None:
    """Contrast of the brightened image, then the inverted bright part, then the normalisation."""
    images = torch.tensor([0.2, 0.4, 0.6, 0.8]).view(1, 1, 2, 2)
    view = Augmentation(2, (0.5,), (0.25,), jitter=1.0, brightness=1.0, contrast=1.0, solarize=1.0)
    two, half = np.full(1, 2, np.float32), np.full(1, 0.5, np.float32)
    drawn = neutral(1, 2, brightness_B=two, contrast_B=half, solarize_B=np.ones(1, bool))
    # Brightened: .4 .8 1 1, mean .8; contrast 1/2: .6 .8 .9 .9; solarized: .4 .2 .1 .1.
    expected = (torch.tensor([0.4, 0.2, 0.1, 0.1]) - 0.5) / 0.25
    torch.testing.assert_close(apply(images, view, drawn).flatten(), expected, atol=1e-6, rtol=0)


def test_the_recipe_draws_with_the_published_probabilities_and_ranges() -> None:
    count = 20_000
    first, second = mocov3_views(224, (0.5,) * 3, (0.5,) * 3, 3)
    for view, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        drawn = draw(count, 224, 224, view, generator(5))
        jittered = drawn.brightness_B != 1
        # A tenth of the published widths .1..2 lies below MIN_SIGMA and counts as no blur.
        wide = (2 - MIN_SIGMA) / (2 - 0.1)
        for chosen, probability in (
            (drawn.flip_B, 0.5),
            (jittered, 0.8),
            (drawn.gray_B, 0.2),
            (drawn.sigma_B > 0, blur * wide),
            (drawn.solarize_B, solarize),
        ):
            error = math.sqrt(probability * (1 - probability) / count)
            assert abs(chosen.mean() - probability) <= 4.5 * error
        for column, low, high in (
            (drawn.brightness_B, 0.6, 1.4),
            (drawn.contrast_B, 0.6, 1.4),
            (drawn.saturation_B, 0.8, 1.2),
            (drawn.hue_B, -0.1, 0.1),
        ):
            spread = (high - low) / math.sqrt(12 * jittered.sum())
            assert low - 1e-6 <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high + 1e-6
            assert abs(column[jittered].mean() - (low + high) / 2) < 4.5 * spread
            assert (column[~jittered] == (low + high) / 2).all()


def test_the_random_parameters_of_an_image_are_independent() -> None:
    count = 20_000
    _, second = mocov3_views(224, (0.5,) * 3, (0.5,) * 3, 3)
    drawn = draw(count, 224, 224, second, generator(6))
    decisions = [drawn.flip_B, drawn.brightness_B != 1, drawn.gray_B, drawn.sigma_B > 0, drawn.solarize_B]
    amounts = [drawn.brightness_B, drawn.contrast_B, drawn.saturation_B, drawn.hue_B, drawn.box_B4[:, 0]]
    correlation = np.corrcoef([*decisions, *amounts])
    assert np.abs(correlation[np.triu_indices(len(correlation), 1)]).max() < 4.5 / math.sqrt(count)


def test_one_channel_has_no_colour_to_change() -> None:
    for view in mocov3_views(28, (0.3,), (0.35,), 1):
        assert (view.saturation, view.hue, view.gray) == (0, 0, 0)
        assert (view.brightness, view.contrast, view.jitter, view.flip) == (0.4, 0.4, 0.8, 0.5)
    images = random_images(8, 1, 12)
    coloured = plain(12, 1, jitter=1.0, saturation=0.9, hue=0.4, gray=1.0)
    torch.testing.assert_close(augment(images, coloured, generator()), images.float() / 255)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"flip": 1.1}, "flip"),
        ({"solarize": -0.1}, "solarize"),
        ({"gray": math.nan}, "gray"),
        ({"brightness": -1.0}, "brightness"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma"),
        ({"size": 0}, "size"),
        ({"std": (0.0,)}, "std"),
        ({"mean": (0.0, 0.0)}, "mean"),
    ],
)
def test_an_illegal_option_is_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        dataclasses.replace(plain(28, 1), **options)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(4, 28, 28, dtype=torch.uint8),
        torch.zeros(4, 3, 28, 28, dtype=torch.uint8),
        torch.zeros(4, 1, 28, 28).int(),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Tensor) -> None:
    with pytest.raises(UsageError, match="augment: images must"):
        augment(images, plain(28, 1), generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_sees_the_same_views() -> None:
    images = random_images(64, 3, 40)
    for view in mocov3_views(40, (0.5,) * 3, (0.5,) * 3, 3):
        on_cpu, on_gpu = augment(images, view, generator()), augment(images.cuda(), view, generator())
        # A pixel within rounding of the threshold may be solarized on one device alone.
        assert ((on_cpu - on_gpu.cpu()).abs() > 1e-4).float().mean() < 1e-4
