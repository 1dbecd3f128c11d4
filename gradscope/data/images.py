"""What every dataset promises, and the kind whose images lie in memory.

Shapes: B image, C channel, H row, W column, S side of a view; B' image of the rows asked for.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gradscope.data.augment import Augmentation, Draw, apply, draw, join
from gradscope.data.pixels import unit_range
from gradscope.errors import DataError, UsageError

EVERY = slice(None)


@dataclass(frozen=True, eq=False)
class Part:
    """One view of a batch, half made: what is left is done on the device, for all images at once.

    `images_BCHW`: uint8 on the CPU; `crop`: whether the boxes of `drawn` are still to be cut out.
    """

    images_BCHW: Tensor
    augmentation: Augmentation
    drawn: Draw
    crop: bool


Prepared = tuple[Part, ...]
"""The views of a batch, half made: one part for each augmentation."""


class Dataset(Protocol):
    """Images to train and to evaluate on, wherever they lie.

    `classes` is empty where nothing is labelled; then so are `train_labels` and `test_labels`, otherwise
    int64 (N,), positions in `classes`. `mean` and `std` are of pixels in [0, 1], one number a channel.
    Equal `digest`s mean equal data.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def image_size(self) -> int: ...
    @property
    def digest(self) -> str: ...
    @property
    def train_count(self) -> int: ...
    @property
    def test_count(self) -> int: ...
    @property
    def train_labels(self) -> Tensor: ...
    @property
    def test_labels(self) -> Tensor: ...

    @property
    def skipped(self) -> tuple[Path, ...]:
        """Files that could not be read so far, and in whose place others were taken."""
        ...

    def prepare(
        self,
        indices_B: Tensor,
        augmentations: Sequence[Augmentation],
        generator: torch.Generator,
        rows: slice = EVERY,
    ) -> Prepared:
        """The work of the CPU for random views of training images `indices_B[rows]`; may run in any thread.

        Random numbers are drawn for all of `indices_B`, for one augmentation after the other, so the views of
        an image do not depend on `rows`.
        """
        ...

    def finish(self, prepared: Prepared, device: torch.device) -> tuple[Tensor, ...]:
        """The rest of the work, on `device`: for each augmentation float32 (B', C, S, S), normalised."""
        ...

    def views(
        self,
        indices_B: Tensor,
        augmentations: Sequence[Augmentation],
        generator: torch.Generator,
        device: torch.device,
        rows: slice = EVERY,
    ) -> tuple[Tensor, ...]:
        """`finish` of `prepare`."""
        ...

    def plain(self, part: str, indices_B: Tensor) -> Tensor:
        """uint8 (B, C, S, S) of images of the part `train` or `test`, not augmented, S being `image_size`."""
        ...


def finish(prepared: Prepared, device: torch.device) -> tuple[Tensor, ...]:
    """What every dataset does with prepared views.

    Images that several views share are moved once, and neighbouring views of the same augmentation are made
    together: for many small crops that saves most of the time.
    """
    moved: dict[int, Tensor] = {}
    for part in prepared:
        if id(part.images_BCHW) not in moved:
            moved[id(part.images_BCHW)] = unit_range(part.images_BCHW.to(device, non_blocking=True).contiguous())
    views: list[Tensor] = []
    for (augmentation, crop), alike in itertools.groupby(prepared, lambda part: (part.augmentation, part.crop)):
        parts = list(alike)
        images = [moved[id(part.images_BCHW)] for part in parts]
        joined = (torch.cat(images), join([part.drawn for part in parts])) if len(parts) > 1 else None
        images_BCHW, drawn = joined or (images[0], parts[0].drawn)
        views += apply(images_BCHW, augmentation, drawn, crop=crop).chunk(len(parts))
    return tuple(views)


def check_part(part: str) -> None:
    """Raise UsageError unless `part` is `train` or `test`."""
    if part not in ("train", "test"):
        raise UsageError(f"part {part!r} of a dataset: it must be train or test")


@dataclass(frozen=True, eq=False)
class ImageData:
    """Labelled images on the CPU.

    `train_images`, `test_images`: uint8 (N, C, H, W); `train_labels`, `test_labels`: int64 (N,), positions
    in `classes`. `mean`, `std`: one number a channel, of all pixels of the training images in [0, 1].
    `digest`: the first 16 hexadecimal digits of a SHA-256 over all four arrays and their shapes; equal
    digests mean equal data.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    digest: str

    @property
    def channels(self) -> int:
        return self.train_images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of the images in pixels."""
        return self.train_images.shape[2]

    @property
    def train_count(self) -> int:
        return len(self.train_images)

    @property
    def test_count(self) -> int:
        return len(self.test_images)

    @property
    def skipped(self) -> tuple[Path, ...]:
        """None: images in memory have been read."""
        return ()

    def prepare(
        self,
        indices_B: Tensor,
        augmentations: Sequence[Augmentation],
        generator: torch.Generator,
        rows: slice = EVERY,
    ) -> Prepared:
        """See `Dataset.prepare`."""
        images_BCHW = self.train_images.index_select(0, indices_B[rows])  # three times as fast as []
        height, width = images_BCHW.shape[2:]
        parts = []
        for augmentation in augmentations:
            drawn = draw(len(indices_B), height, width, augmentation, generator)
            crop = drawn.crops(height, width, augmentation.size)
            parts.append(Part(images_BCHW, augmentation, drawn.rows(rows), crop))
        return tuple(parts)

    def finish(self, prepared: Prepared, device: torch.device) -> tuple[Tensor, ...]:
        """See `Dataset.finish`."""
        return finish(prepared, device)

    def views(
        self,
        indices_B: Tensor,
        augmentations: Sequence[Augmentation],
        generator: torch.Generator,
        device: torch.device,
        rows: slice = EVERY,
    ) -> tuple[Tensor, ...]:
        """See `Dataset.views`: as `augment` of the images on `device`, for one augmentation after the other."""
        return finish(self.prepare(indices_B, augmentations, generator, rows), device)

    def plain(self, part: str, indices_B: Tensor) -> Tensor:
        """The images as they are: uint8 (B, C, H, W)."""
        check_part(part)
        return (self.train_images if part == "train" else self.test_images).index_select(0, indices_B)


def image_data(
    name: str,
    *,
    train_images: Tensor,
    train_labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    classes: tuple[str, ...],
) -> ImageData:
    """Check the arrays and compute their statistics and digest. Raises DataError naming the array at fault."""
    for part, images, labels in (("train", train_images, train_labels), ("test", test_images, test_labels)):
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
            raise DataError(
                f"{name}: {part}_images must be uint8 of shape (N, C, H, W) with N > 0, "
                f"not {images.dtype} of shape {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise DataError(
                f"{name}: {part}_labels must be int64 of shape ({len(images)},), one for each image, "
                f"not {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
            raise DataError(
                f"{name}: {part}_labels must lie in 0..{len(classes) - 1}, the positions of the classes, "
                f"but reach from {int(labels.min())} to {int(labels.max())}"
            )
    if train_images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{name}: test_images of shape {tuple(test_images.shape[1:])} do not match "
            f"train_images of shape {tuple(train_images.shape[1:])}"
        )
    mean, std = channel_statistics(train_images)
    arrays = (train_images, train_labels, test_images, test_labels)
    return ImageData(name, *arrays, mean=mean, std=std, classes=classes, digest=_digest(arrays))


def resampled(data: ImageData, image_size: int, *, batch_size: int = 1000) -> ImageData:
    """The same images at `image_size` pixels, bicubic (averaging where they shrink), rounded to uint8.

    The digest is one of the original images and the size, since single pixels depend on the processor. Raises
    UsageError for an `image_size` below 1.
    """
    if image_size < 1:
        raise UsageError(f"image_size is {image_size}; it must be at least 1 pixel")
    wanted = (data.train_count + data.test_count) * data.channels * image_size**2
    if wanted > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise UsageError(
            f"image_size is {image_size}: at that size the images of {data.name} take {wanted / 2**30:,.0f} GiB, more "
            f"than this machine's memory ({memory / 2**30:,.0f} GiB); take a smaller one"
        )

    def resize(images_NCHW: Tensor) -> Tensor:
        parts = (
            F.interpolate(some.float(), (image_size, image_size), mode="bicubic", align_corners=False, antialias=True)
            for some in torch.split(images_NCHW, batch_size)
        )
        return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])

    made = image_data(
        data.name,
        train_images=resize(data.train_images),
        train_labels=data.train_labels,
        test_images=resize(data.test_images),
        test_labels=data.test_labels,
        classes=data.classes,
    )
    return replace(made, digest=hashlib.sha256(f"{data.digest} {image_size}".encode()).hexdigest()[:16])


def channel_statistics(images_BCHW: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and (population) standard deviation of each channel's pixels in [0, 1], from exact counts of uint8."""
    value_256 = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel_BHW in images_BCHW.unbind(1):
        share_256 = torch.bincount(channel_BHW.flatten(), minlength=256).double() / channel_BHW.numel()
        mean = torch.dot(share_256, value_256)
        means.append(mean.item())
        stds.append(torch.dot(share_256, (value_256 - mean) ** 2).sqrt().item())
    return tuple(means), tuple(stds)


def _digest(arrays: tuple[Tensor, ...]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {tuple(array.shape)};".encode())
        digest.update(array.contiguous().numpy().data)
    return digest.hexdigest()[:16]
