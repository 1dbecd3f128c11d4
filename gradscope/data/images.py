"""The value that every dataset is: images in memory, split into training and test, with their statistics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gradscope.errors import DataError


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
