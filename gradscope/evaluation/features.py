"""Features of a trained backbone on the images of a dataset: full-length sequences, no augmentation.

Shapes: N image, B image of a batch, S side in pixels, D width, F = blocks x D feature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from gradscope.data import Ahead, Dataset
from gradscope.errors import UsageError
from gradscope.models import VisionTransformer

Report = Callable[[float, str], None]  # (fraction of the work done, one line of news)
AHEAD = 2  # batches decoded while the model works on one


class Statistics(Protocol):
    """What normalisation needs of a dataset: one mean and one deviation a channel, of pixels in [0, 1]."""

    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def normalise(images_BCSS: Tensor, data: Statistics, model: nn.Module) -> Tensor:
    """uint8 images as the model sees them: float32, standardised per channel, on the model's device."""
    device = next(model.parameters()).device
    mean_C11 = torch.tensor(data.mean, device=device)[:, None, None]
    std_C11 = torch.tensor(data.std, device=device)[:, None, None]
    return (images_BCSS.to(device).float() / 255 - mean_C11) / std_C11


def check_blocks(backbone: VisionTransformer, blocks: int) -> int:
    """The blocks of a model. Raises UsageError when `blocks`, the last ones that are wanted, is not in 1..depth."""
    depth = len(backbone.blocks)
    if not 1 <= blocks <= depth:
        raise UsageError(f"blocks={blocks}: the model has {depth}; choose between 1 and {depth}")
    return depth


@torch.no_grad()
def block_features(backbone: VisionTransformer, images_BCSS: Tensor, blocks: int = 1) -> Tensor:
    """Class tokens of the last `blocks` blocks, each after the final norm, side by side: (B, blocks x D).

    Images are normalised ones. The last block's, which is the backbone's own feature, stands last, as in DINO's
    linear evaluation (Caron et al. 2021). Raises UsageError when `blocks` is not in 1..depth.
    """
    depth = check_blocks(backbone, blocks)
    if blocks == 1:
        feature_BD: Tensor = backbone(images_BCSS)
        return feature_BD
    tokens_BLD = backbone.embed(images_BCSS)
    found = []
    for number, block in enumerate(backbone.blocks):
        tokens_BLD = block(tokens_BLD)
        if number >= depth - blocks:
            found.append(backbone.norm(tokens_BLD[:, 0]))
    return torch.cat(found, dim=1)


def extract_features(
    backbone: VisionTransformer, images_NCSS: Tensor, data: Statistics, *, batch_size: int = 250, blocks: int = 1
) -> Tensor:
    """Features (N, F) of uint8 images in memory, in evaluation mode; the mode is put back afterwards."""
    training = backbone.training
    backbone.eval()
    try:
        parts = torch.split(images_NCSS, batch_size)
        return torch.cat([block_features(backbone, normalise(part, data, backbone), blocks) for part in parts])
    finally:
        backbone.train(training)


def dataset_features(
    backbone: VisionTransformer,
    data: Dataset,
    part: str,
    *,
    blocks: int = 1,
    batch_size: int = 250,
    statistics: Statistics | None = None,
    report: Report | None = None,
) -> Tensor:
    """Features (N, F), float32 on the model's device, of all images of the part "train" or "test", read in batches.

    `statistics` is what the model's input is normalised by, by default the dataset's own. Extracted in evaluation
    mode; the mode is put back afterwards. Raises UsageError for another part, or images that do not suit the model.
    """
    if part not in ("train", "test"):
        raise UsageError(f"part={part!r}: choose train or test")
    check_suits(backbone, data)
    check_blocks(backbone, blocks)
    count = data.train_count if part == "train" else data.test_count
    device = next(backbone.parameters()).device
    feature_NF = torch.empty(count, blocks * backbone.width, device=device)
    rows = torch.split(torch.arange(count), batch_size)

    def plain(step: int) -> Tensor:  # asked for steps past the last, too, which are never taken
        return data.plain(part, rows[step]) if step < len(rows) else torch.empty(0)

    with Ahead(plain, depth=AHEAD, workers=1) as images:
        for step, rows_B in enumerate(rows):
            feature_NF[rows_B[0] : rows_B[-1] + 1] = extract_features(
                backbone, images.take(step), statistics or data, batch_size=batch_size, blocks=blocks
            )
            if report is not None:
                report((step + 1) / len(rows), f"features of {int(rows_B[-1]) + 1:,} of {count:,} {part} images")
    return feature_NF


def check_suits(backbone: VisionTransformer, data: Dataset) -> None:
    """Raise UsageError unless the images have the model's channels and a side that its patches divide."""
    channels = backbone.patch_embed.proj.in_channels
    if data.channels != channels:
        raise UsageError(
            f"{data.name}: its images have {data.channels} channels, the model was trained on {channels}; evaluate it "
            f"on data of {channels}"
        )
    if data.image_size % backbone.patch:
        raise UsageError(
            f"{data.name}: images of {data.image_size} pixels cannot be cut into the model's patches of "
            f"{backbone.patch}; choose an image size (--image-size) that {backbone.patch} divides, such as "
            f"{backbone.image_size}, with which it was trained"
        )


def check_labelled(data: Dataset) -> None:
    """Raise UsageError unless both parts have images, each with a label."""
    if not data.classes or not len(data.train_labels):
        raise UsageError(
            f"{data.name}: has no classes, and evaluation needs labels; name data that has them with --data, such as a "
            "folder DIR/train/<class>/*.jpg"
        )
    if not data.test_count:
        raise UsageError(f"{data.name}: has no test images; add some under DIR/val/<class>/")
