"""Datasets by name: the ones that are known, and folders of pictures."""

from __future__ import annotations

import os
from pathlib import Path

from gradscope.data.fashion_mnist import fashion_mnist, fashion_mnist_10k
from gradscope.data.folder import IMAGE_SIZE, folder_data
from gradscope.data.images import Dataset, resampled
from gradscope.errors import UsageError

DATASETS = ("fashion-mnist-10k", "fashion-mnist")
"""Names that `load_data` knows."""


def load_data(name: str, folder: Path | None = None, *, image_size: int | None = None) -> Dataset:
    """The dataset called `name`.

    - `fashion-mnist-10k` ships with the package: 8,000 training and 2,000 test images.
    - `fashion-mnist`: all 60,000 and 10,000 images, read from disk; `folder` is looked into first. The images of both
      are resampled to `image_size` pixels (default as they are, 28).
    - anything else is the path of a folder of pictures (`gradscope.data.folder`), which are brought to
      `image_size` pixels (default 224).

    Raises UsageError for a name that is neither known nor a folder, for a `folder` given to anything but
    `fashion-mnist`, and for an `image_size` below 1; DataError for data that cannot be found or read.
    """
    if folder is not None and name != "fashion-mnist":
        kind = "ships with gradscope" if name in DATASETS else "is itself a folder"
        raise UsageError(f"{name} {kind} and is not read from {folder}; fashion-mnist is")
    if name in DATASETS:
        data = fashion_mnist(folder) if name == "fashion-mnist" else fashion_mnist_10k()
        return data if image_size in (None, data.image_size) else resampled(data, image_size)
    path = Path(os.path.expanduser(name))
    if not path.is_dir():
        raise UsageError(
            f"unknown dataset {name!r}: neither one of {', '.join(DATASETS)} nor a folder of pictures that exists"
        )
    return folder_data(path, image_size=IMAGE_SIZE if image_size is None else image_size)
