"""Pictures in a folder, decoded in threads when they are needed.

Shapes: B image asked for, B' image of the rows asked for, N random number, S side of a view.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradscope.data.augment import Augmentation, boxes, draw_from, random_numbers
from gradscope.data.images import EVERY, Part, Prepared, check_part, finish
from gradscope.data.listing import Listing, list_pictures
from gradscope.data.pictures import Cut, Picture, PictureError, Pixels
from gradscope.data.shelf import Shelf
from gradscope.errors import UsageError
from gradscope.progress import say

IMAGE_SIZE = 224
"""Side in pixels to which pictures are brought unless another is asked for."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in ImageNet's pixels, as published; taken for every folder of pictures."""

CENTRE = 224 / 256
"""Share of the shorter side that `plain` keeps: published evaluations resize it to 256 and cut out 224."""

CHUNK = 16
"""Most pictures that one thread takes at a time."""


def folder_data(folder: Path, *, image_size: int = IMAGE_SIZE, threads: int | None = None) -> FolderData:
    """The pictures of `folder`; `gradscope.data.listing` tells which layouts are understood.

    Raises DataError for other layouts, UsageError for an `image_size` or number of `threads` below 1.
    """
    name = folder.resolve().name or str(folder)
    return FolderData(name, list_pictures(folder), image_size=image_size, threads=threads)


def default_threads() -> int:
    """Processors this process may use, shared with the other ranks that torchrun started on this machine."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class FolderData:
    """A `Dataset` of pictures in files: RGB, with ImageNet's mean and standard deviation.

    Random crops are cut from the pictures at full size and resized by Pillow with its low-pass filter;
    everything else is done on the device.

    A picture that cannot be read is told once to `report` and replaced, whenever it is asked for, by the next
    readable one of its class (of its part, where there are no classes): a choice that depends on the files
    alone. `skipped` lists them. Raises DataError, from `prepare` and `plain`, when none of a class can be
    read, or when 20 or more are broken and they are more than a tenth of those seen.
    """

    channels = 3
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __init__(
        self,
        name: str,
        listing: Listing,
        *,
        image_size: int,
        threads: int | None = None,
        report: Callable[[str], None] = say,
    ) -> None:
        if image_size < 1:
            raise UsageError(f"image_size is {image_size}; it must be at least 1 pixel")
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}; it must be at least 1")
        self.name = name
        self.classes = listing.classes if listing.classes != ("",) else ()
        self.digest = listing.digest
        self.image_size = image_size
        self.threads = threads or default_threads()
        self.train_labels = torch.tensor(listing.train.labels, dtype=torch.int64)
        self.test_labels = torch.tensor(listing.test.labels, dtype=torch.int64)
        self.report = report
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="gradscope-decode")
        self._train, self._test = (Shelf(part, self._tell) for part in (listing.train, listing.test))

    @property
    def train_count(self) -> int:
        return len(self._train.files.names)

    @property
    def test_count(self) -> int:
        return len(self._test.files.names)

    @property
    def skipped(self) -> tuple[Path, ...]:
        """See `Dataset.skipped`."""
        return tuple(shelf.path(index) for shelf in (self._train, self._test) for index in sorted(shelf.broken))

    @property
    def seen(self) -> int:
        """How many different pictures have been read so far, or could not be."""
        return sum(self._train.seen) + sum(self._test.seen)

    def prepare(
        self,
        indices_B: Tensor,
        augmentations: Sequence[Augmentation],
        generator: torch.Generator,
        rows: slice = EVERY,
    ) -> Prepared:
        """See `Dataset.prepare`: decode the pictures and cut out their crops."""
        numbers = [random_numbers(len(indices_B), generator)[rows] for _ in augmentations]
        box_VB4 = np.empty((len(augmentations), len(numbers[0]) if numbers else 0, 4), np.float32)

        def cuts(pictures: Sequence[Picture], place_B: Sequence[int]) -> list[list[Cut]]:
            height_B, width_B = np.array([(picture.height, picture.width) for picture in pictures], np.float32).T
            for box_B4, numbers_BN, augmentation in zip(box_VB4, numbers, augmentations, strict=True):
                box_B4[place_B] = boxes(numbers_BN[place_B], height_B, width_B, augmentation)
            return [
                [
                    Cut(box_4, augmentation.size, augmentation.interpolation)
                    for box_4, augmentation in zip(box_VB4[:, place].tolist(), augmentations, strict=True)
                ]
                for place in place_B
            ]

        images = self._decode(self._train, indices_B[rows], cuts, [a.size for a in augmentations])
        return tuple(
            Part(images_BCHW, augmentation, draw_from(numbers_BN, box_B4, augmentation), crop=False)
            for images_BCHW, augmentation, numbers_BN, box_B4 in zip(
                images, augmentations, numbers, box_VB4, strict=True
            )
        )

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
        """See `Dataset.views`."""
        return finish(self.prepare(indices_B, augmentations, generator, rows), device)

    def plain(self, part: str, indices_B: Tensor) -> Tensor:
        """uint8 (B, 3, S, S): the central square, 224/256 of the shorter side, resized by a bicubic filter."""
        check_part(part)

        def cuts(pictures: Sequence[Picture], _: Sequence[int]) -> list[list[Cut]]:
            return [[Cut(_centre(picture), self.image_size, "bicubic")] for picture in pictures]

        (images_BCSS,) = self._decode(
            self._train if part == "train" else self._test, indices_B, cuts, [self.image_size]
        )
        return images_BCSS

    def _decode(
        self,
        shelf: Shelf,
        indices_B: Tensor,
        cuts: Callable[[Sequence[Picture], Sequence[int]], list[list[Cut]]],
        sizes: list[int],
    ) -> list[Tensor]:
        """uint8 (B, 3, size, size) for each of `sizes`; `cuts` of some pictures, by their places in the batch."""
        pinned = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        images = [torch.empty(len(indices_B), 3, size, size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        arrays: list[Pixels] = [image.numpy() for image in images]
        index_B = indices_B.tolist()
        step = max(1, min(CHUNK, -(-len(index_B) // self.threads)))

        def chunk(start: int) -> None:
            waiting = {place: index_B[place] for place in range(start, min(start + step, len(index_B)))}
            while waiting:
                opened = [(place, *shelf.open(index)) for place, index in waiting.items()]
                chosen = cuts([picture for _, _, picture in opened], list(waiting))
                for (place, index, picture), of_picture in zip(opened, chosen, strict=True):
                    try:
                        parts = picture.cut(of_picture)
                    except PictureError as error:
                        waiting[place] = shelf.broke(index, error)
                        continue
                    for array, part in zip(arrays, parts, strict=True):
                        array[place] = part.transpose(2, 0, 1)
                    del waiting[place]

        for _ in self._pool.map(chunk, range(0, len(index_B), step)):
            pass
        return images

    def _tell(self, line: str) -> None:
        self.report(line)


def _centre(picture: Picture) -> tuple[float, float, float, float]:
    side = CENTRE * min(picture.height, picture.width)
    return (picture.height - side) / 2, (picture.width - side) / 2, side, side
