"""Batched random augmentation of images: the views that self-supervised methods compare.

A batch is augmented at once, on the device on which it lies, each image by its own random
parameters. The parameters are drawn on the CPU, a fixed number for each image, so that the same
generator gives the same views on every device, whatever the images show and whichever operations
are switched on.

Shapes: B image, R image still without a crop, C channel, H row, W column, N random number, S side of the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradscope.data import pixels
from gradscope.errors import UsageError

Array = NDArray[np.float32]

REFERENCE_SIZE = 224
"""Image side in pixels for which published recipes state the widths of their blur."""

MIN_SIGMA = 0.256
"""Gaussians narrower than this many pixels change no image by half a step of 8 bits, and are skipped.

A neighbour's weight is w = exp(-1/(2 sigma^2)), a pixel changes by at most 4 w, and 4 w < 1/510.
"""

INTERPOLATIONS = ("bilinear", "bicubic")

_ATTEMPTS = 10
_NUMBERS = 2 * _ATTEMPTS + 12  # random numbers an image, whatever is done with them


@dataclass(frozen=True)
class Augmentation:
    """What one view may look like; as it stands, without options, the resized and normalised image.

    Operations run in this order: random crop resized to `size` with horizontal flip, jitter
    (brightness, contrast, then saturation and hue together), grayscale, blur, solarization,
    normalisation by `mean` and `std` (one number a channel, of pixels in [0, 1]).

    - `crop_scale`, `crop_ratio`: ranges of the box's share of the image area (uniform) and of its
      width over its height (uniform in the logarithm). As in the published recipes ten boxes are
      tried, and where none fits the largest central box of a legal ratio is taken.
    - `interpolation`: `bilinear` between pixel centres, without a low-pass filter, or `bicubic` with one,
      as Pillow resizes. Pictures decoded from files are low-passed in either case.
    - `brightness`, `contrast`, `saturation`: factor uniform in [max(0, 1 - x), 1 + x]; `hue`:
      rotation uniform in [-x, x] of the circle, by rotating the colours of YIQ; `jitter`:
      probability of all four. Published recipes shuffle the four; here their order is fixed.
    - `blur_sigma`: range of the Gaussian's width in pixels of a 224-pixel image; it is scaled to `size`.
    - `flip`, `gray`, `blur`, `solarize`: probabilities; `solarize_threshold` in [0, 1].

    Saturation, hue and grayscale need three channels and are skipped for images with another number.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 128 / 255
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "gray", "blur", "solarize", "solarize_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"augmentation: {name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation", "hue"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"augmentation: {name} must not be negative, but is {getattr(self, name)}")
        for name, most in (("crop_scale", 1), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise UsageError(f"augmentation: {name} must be (low, high) with 0 < low <= high, not {(low, high)}")
        if self.size < 1:
            raise UsageError(f"augmentation: size must be at least 1 pixel, not {self.size}")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UsageError(
                "augmentation: mean and std must give one number a channel, std above 0, "
                f"not {self.mean} and {self.std}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(f"augmentation: interpolation must be bilinear or bicubic, not {self.interpolation!r}")


@dataclass(frozen=True, eq=False)
class Draw:
    """The random parameters of one batch, on the CPU: a row for each image, neutral where nothing was chosen.

    `box_B4` is (top, left, height, width) in pixels of the input; `brightness_B`, `contrast_B`,
    `saturation_B` are factors (1 neutral), `hue_B` a fraction of the circle (0 neutral), `sigma_B`
    pixels of the output (0: no blur); `flip_B`, `gray_B`, `solarize_B` are bool.
    """

    box_B4: Array
    flip_B: NDArray[np.bool_]
    brightness_B: Array
    contrast_B: Array
    saturation_B: Array
    hue_B: Array
    gray_B: NDArray[np.bool_]
    sigma_B: Array
    solarize_B: NDArray[np.bool_]

    def rows(self, rows: slice) -> Draw:
        """The parameters of some of the images."""
        return Draw(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def crops(self, height: int, width: int, size: int) -> bool:
        """Whether any image of `height` x `width` pixels has to be resampled to be `size` x `size`."""
        return not (height == width == size and bool((self.box_B4[:, 2:] == size).all()))


def join(draws: Sequence[Draw]) -> Draw:
    """The parameters of several batches, one after the other."""
    return Draw(*(np.concatenate([getattr(drawn, field.name) for drawn in draws]) for field in fields(Draw)))


def augment(images_BCHW: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """One random view of every image: float32 (B, C, size, size), normalised, on the images' device.

    `images_BCHW` is uint8, or floating in [0, 1]; it is left as it was. `generator` is a CPU
    generator. Raises UsageError for another shape, type, number of channels or generator.
    """
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] != len(augmentation.mean):
        raise UsageError(
            f"augment: images must have the shape (batch, {len(augmentation.mean)}, height, width) "
            f"of the augmentation's mean and std, not {tuple(images_BCHW.shape)}"
        )
    if images_BCHW.dtype != torch.uint8 and not images_BCHW.is_floating_point():
        raise UsageError(f"augment: images must be uint8, or floating in [0, 1], not {images_BCHW.dtype}")
    batch, _, height, width = images_BCHW.shape
    return apply(images_BCHW, augmentation, draw(batch, height, width, augmentation, generator))


def draw(batch: int, height: int, width: int, augmentation: Augmentation, generator: torch.Generator) -> Draw:
    """Random parameters for `batch` images of `height` x `width` pixels: 32 numbers an image from `generator`."""
    numbers_BN = random_numbers(batch, generator)
    return draw_from(numbers_BN, boxes(numbers_BN, height, width, augmentation), augmentation)


def random_numbers(batch: int, generator: torch.Generator) -> Array:
    """What the parameters of one view of `batch` images are computed from: uniform in [0, 1), 32 for each image."""
    if generator.device.type != "cpu":
        raise UsageError(
            "augment: the generator must be a CPU generator, so that every device sees the same views, "
            f"not one on {generator.device}"
        )
    numbers_BN: Array = torch.rand(batch, _NUMBERS, generator=generator).numpy()
    return numbers_BN


def draw_from(numbers_BN: Array, box_B4: Array, augmentation: Augmentation) -> Draw:
    """The parameters that follow from the random numbers of some images, with these crops."""
    factor_B3, rest = numbers_BN[:, 2 * _ATTEMPTS + 2 :][:, :3], numbers_BN[:, 2 * _ATTEMPTS + 5 :]
    flip_B, jitter_B, hue_B, gray_B, blur_B, width_B, solarize_B = rest.T
    a = augmentation
    jittered_B = jitter_B < a.jitter
    strength_3 = np.array((a.brightness, a.contrast, a.saturation), np.float32)
    lowest_3 = np.maximum(1 - strength_3, 0)
    factor_B3 = np.where(jittered_B[:, None], lowest_3 + (1 + strength_3 - lowest_3) * factor_B3, np.float32(1))
    narrow, wide = (sigma * a.size / REFERENCE_SIZE for sigma in a.blur_sigma)
    sigma_B = narrow + (wide - narrow) * width_B
    return Draw(
        box_B4=box_B4,
        flip_B=flip_B < a.flip,
        brightness_B=factor_B3[:, 0],
        contrast_B=factor_B3[:, 1],
        saturation_B=factor_B3[:, 2],
        hue_B=np.where(jittered_B, a.hue * (2 * hue_B - 1), np.float32(0)),
        gray_B=gray_B < a.gray,
        sigma_B=np.where((blur_B < a.blur) & (sigma_B >= MIN_SIGMA), sigma_B, np.float32(0)),
        solarize_B=solarize_B < a.solarize,
    )


def apply(images_BCHW: Tensor, augmentation: Augmentation, drawn: Draw, *, crop: bool | None = None) -> Tensor:
    """The views that `drawn` describes: float32 (B, C, size, size), normalised; `images_BCHW` is left as it was.

    `crop`: whether to cut the boxes out, or to take the images as they are, each `size` x `size`; by default
    what the boxes need. Images are resampled all or none, so a part of a batch passes what the whole needs.
    """
    a = augmentation
    _, channels, height, width = images_BCHW.shape
    colour_B = np.where(drawn.gray_B, np.float32(0), drawn.saturation_B)
    columns = (drawn.flip_B, drawn.brightness_B, drawn.contrast_B, colour_B, drawn.hue_B, drawn.sigma_B)
    packed = torch.from_numpy(np.column_stack((drawn.box_B4, *columns))).to(images_BCHW.device)
    flip_B, brightness_B, contrast_B, saturation_B, hue_B, sigma_B = packed[:, 4:].unbind(1)

    x = pixels.unit_range(images_BCHW)
    if drawn.crops(height, width, a.size) if crop is None else crop:
        resample = pixels.resized_crop if a.interpolation == "bilinear" else pixels.bicubic_crop
        x = resample(x, packed[:, :4], flip_B > 0, a.size)
    else:
        x = torch.where(flip_B[:, None, None, None] > 0, x.flip(3), x)
    if a.jitter and (a.brightness or a.contrast):
        x = pixels.brightness_contrast_(x, brightness_B, contrast_B)
    if channels == 3 and (a.gray or (a.jitter and (a.saturation or a.hue))):
        x = pixels.saturation_hue(x, saturation_B, hue_B)
    if a.blur:
        radius = max(1, math.ceil(3 * a.blur_sigma[1] * a.size / REFERENCE_SIZE))
        x = pixels.on_chosen_(
            x, drawn.sigma_B > 0, lambda some, index: pixels.gaussian_blur(some, sigma_B[index], radius)
        )
    if a.solarize:
        x = pixels.on_chosen_(x, drawn.solarize_B, lambda some, _: pixels.solarize(some, a.solarize_threshold))
    mean_C11, std_C11 = (x.new_tensor(values)[:, None, None] for values in (a.mean, a.std))
    return x.sub_(mean_C11).div_(std_C11)


def boxes(numbers_BN: Array, height: int | Array, width: int | Array, augmentation: Augmentation) -> Array:
    """Boxes (B, 4) of whole pixels (top, left, height, width): the first attempt that fits, else a central one.

    `height`, `width`: of the images, one for all or float32 (B,).
    """
    a = augmentation
    image_B2 = np.empty((len(numbers_BN), 2), np.float32)
    image_B2[:, 0], image_B2[:, 1] = height, width
    size_B2, found_B = _attempt(numbers_BN[:, 0], numbers_BN[:, _ATTEMPTS], image_B2, a)
    again_R = np.flatnonzero(~found_B)
    for attempt in range(1, _ATTEMPTS):
        if len(again_R) == 0:
            break
        area_R, ratio_R = numbers_BN[again_R, attempt], numbers_BN[again_R, _ATTEMPTS + attempt]
        size_B2[again_R], fits_R = _attempt(area_R, ratio_R, image_B2[again_R], a)
        again_R = again_R[~fits_R]
    if len(again_R):
        size_B2[again_R] = _largest_boxes(image_B2[again_R], a)
    room_B2 = image_B2 - size_B2
    place_B2 = numbers_BN[:, 2 * _ATTEMPTS : 2 * _ATTEMPTS + 2]
    start_B2 = np.floor(place_B2 * (room_B2 + 1))
    start_B2[again_R] = room_B2[again_R] // 2
    return np.concatenate((start_B2, size_B2), axis=1, dtype=np.float32)


def _attempt(area_R: Array, ratio_R: Array, image_R2: Array, a: Augmentation) -> tuple[Array, NDArray[np.bool_]]:
    """(height, width) that random numbers give for images of these sizes, and whether they fit."""
    low, high = a.crop_scale
    narrow, wide = (math.log(ratio) for ratio in a.crop_ratio)
    area_R = image_R2[:, 0] * image_R2[:, 1] * (low + (high - low) * area_R)
    ratio_R = np.exp(narrow + (wide - narrow) * ratio_R)
    size_R2 = np.empty_like(image_R2)
    size_R2[:, 0], size_R2[:, 1] = area_R / ratio_R, area_R * ratio_R
    np.rint(np.sqrt(size_R2, out=size_R2), out=size_R2)
    fits_R2 = (size_R2 >= 1) & (size_R2 <= image_R2)
    return size_R2, fits_R2[:, 0] & fits_R2[:, 1]


def _largest_boxes(image_B2: Array, a: Augmentation) -> Array:
    """(height, width) of the largest box with a legal ratio in images of these heights and widths."""
    narrow, wide = a.crop_ratio
    height_B, width_B = image_B2.T.astype(np.float64)
    tall = np.stack((np.maximum(np.rint(width_B / narrow), 1), width_B), axis=1)
    broad = np.stack((height_B, np.maximum(np.rint(height_B * wide), 1)), axis=1)
    legal = np.where((width_B > height_B * wide)[:, None], broad, image_B2)
    return np.where((width_B < height_B * narrow)[:, None], tall, legal).astype(np.float32)
