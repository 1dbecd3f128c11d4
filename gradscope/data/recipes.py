"""What the views of each method look like, as published."""

from __future__ import annotations

from dataclasses import replace

from gradscope.data.augment import Augmentation
from gradscope.errors import UsageError

RECIPES = ("mocov3", "simclr", "dino")
"""Methods whose views `views_of` knows."""

SMALL_SHARE = 96 / 224
"""Side of DINO's small crops as a share of the image's, unless another is asked for."""


def views_of(
    method: str,
    *,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels: int,
    crop_scale: tuple[float, float] | None = None,
    small_size: int | None = None,
    small_count: int = 0,
    small_scale: tuple[float, float] | None = None,
) -> tuple[Augmentation, ...]:
    """The views of `method`'s published recipe for ViT, for images of `image_size` pixels.

    - `mocov3` (Chen, Xie, He 2021): two views, the query's and the key's; they differ in blur
      (always / one in ten) and solarization (never / one in five).
    - `simclr` (Chen, Kornblith, Norouzi, Hinton 2020): two views alike, with twice the strength of jitter
      (four times in saturation) and without solarization.
    - `dino` (Caron et al. 2021): two global crops, the student's and the teacher's, then `small_count`
      small ones of `small_size` pixels (default 96/224 of `image_size`, to the nearest pixel); all bicubic.

    `crop_scale` and `small_scale` are the ranges of a crop's share of the image area; by default
    (.08, 1) for MoCo-v3 and SimCLR, (.4, 1) for DINO's global and (.05, .4) for its small crops.
    Images without three channels have no colour to change: saturation, hue and grayscale are switched
    off for them. Raises UsageError for an unknown method, a mean that does not match `channels`, and small
    crops of a method that has none.
    """
    if method not in RECIPES:
        raise UsageError(f"views_of: unknown method {method!r}; the methods are {', '.join(RECIPES)}")
    if len(mean) != channels:
        raise UsageError(f"views_of: mean must give one number for each of the {channels} channels, not {mean}")
    if small_count < 0:
        raise UsageError(f"views_of: small_count is {small_count}; it must be at least 0")
    if small_count and method != "dino":
        raise UsageError(f"views_of: small_count is {small_count}, but {method} has no small crops; dino has")
    view = Augmentation(
        size=image_size,
        mean=mean,
        std=std,
        crop_scale=crop_scale or (0.08, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        gray=0.2,
        blur=1.0,
    )
    if method == "simclr":
        view = replace(view, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)
    if method == "dino":
        view = replace(view, crop_scale=crop_scale or (0.4, 1.0), interpolation="bicubic")
    if channels != 3:
        view = replace(view, saturation=0.0, hue=0.0, gray=0.0)
    if method == "simclr":
        return view, view
    second = replace(view, blur=0.1, solarize=0.2)
    side = small_size or max(1, round(SMALL_SHARE * image_size))
    low, high = view.blur_sigma
    # Published widths are in pixels of the crop itself, also where it is small.
    sigma = (low * image_size / side, high * image_size / side)
    small = replace(view, size=side, crop_scale=small_scale or (0.05, 0.4), blur=0.5, blur_sigma=sigma)
    return view, second, *[small] * small_count


def mocov3_views(
    image_size: int, mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[Augmentation, Augmentation]:
    """The two views of MoCo-v3's recipe: `views_of("mocov3", ...)` with its published crops."""
    first, second = views_of("mocov3", image_size=image_size, mean=mean, std=std, channels=channels)
    return first, second
