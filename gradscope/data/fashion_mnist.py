"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): a part of it ships with the package, all of it is read from disk."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradscope.data.images import ImageData, image_data
from gradscope.errors import DataError

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of each file without gzip: the same images come gzipped with different headers."""

EMBEDDED = Path(__file__).parent / "files"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
EMBEDDED_TRAIN = 8000


def fashion_mnist(folder: Path | None = None) -> ImageData:
    """All 60,000 and 10,000 images, in memory.

    From the first of `folder`, the folder in the environment variable GRADSCOPE_DATA, the user's cache and
    Debian's dataset folder that has the four files, gzipped or not. Every file is checked by SHA-256. Raises
    DataError when files are missing (it tells where they were looked for and how to get them) or are not what
    they should be.
    """
    found = _find(folder)
    train_images, train_labels = _pair(found, "train")
    test_images, test_labels = _pair(found, "t10k")
    return image_data(
        "fashion-mnist",
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=CLASSES,
    )


def fashion_mnist_10k() -> ImageData:
    """The 10,000 test images, which ship with the package: 8,000 for training and 2,000 for tests, in memory."""
    images, labels = _pair(EMBEDDED, "t10k")
    return image_data(
        "fashion-mnist-10k",
        train_images=images[:EMBEDDED_TRAIN],
        train_labels=labels[:EMBEDDED_TRAIN],
        test_images=images[EMBEDDED_TRAIN:],
        test_labels=labels[EMBEDDED_TRAIN:],
        classes=CLASSES,
    )


def read_file(folder: Path, name: str) -> bytes:
    """Content of `name` or `name`.gz in `folder`, unpacked. Raises DataError unless its checksum is the published."""
    path = _existing(folder, name)
    if path is None:
        raise DataError(f"{folder / name} does not exist, nor does {name}.gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}); replace it with a complete copy") from error
    found = hashlib.sha256(content).hexdigest()
    if found != FILES[name]:
        raise DataError(
            f"{path} is not the published file: the SHA-256 of its content is {found[:16]}..., "
            f"not {FILES[name][:16]}...; replace it with a complete copy"
        )
    return content


def _pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 1, 28, 28) and labels int64 (N,); the IDX headers take 16 and 8 bytes."""
    images = np.frombuffer(read_file(folder, f"{part}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(read_file(folder, f"{part}-labels-idx1-ubyte"), np.uint8, offset=8)
    return torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()), torch.from_numpy(labels.astype(np.int64))


def _find(folder: Path | None) -> Path:
    """The first place that has all four files. Raises DataError telling every place and the way to get them."""
    places = _places(folder)
    for _, place in places:
        if all(_existing(place, name) for name in FILES):
            return place
    looked = "; ".join(f"{place} ({why}{_partial(place)})" for why, place in places)
    raise DataError(
        f"fashion-mnist not found. Looked for {', '.join(FILES)} (or with .gz) in {looked}.\n"
        "To get them without root: apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb "
        "fashion && export GRADSCOPE_DATA=$PWD/fashion/usr/share/datasets/fashion-mnist\n"
        "The dataset fashion-mnist-10k ships with gradscope and needs no files."
    )


def _places(folder: Path | None) -> list[tuple[str, Path]]:
    """(why, folder) of every place to look in, in order."""
    places = [("Debian's package", DEBIAN)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not cache.startswith("~"):  # as it stays for a user without a home
        places.insert(0, ("the user's cache", Path(cache) / "gradscope" / "fashion-mnist"))
    if variable := os.environ.get("GRADSCOPE_DATA"):
        places.insert(0, ("GRADSCOPE_DATA", Path(variable)))
    if folder is not None:
        places.insert(0, ("the folder given", folder))
    return places


def _existing(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _partial(folder: Path) -> str:
    missing = [name for name in FILES if _existing(folder, name) is None]
    return f", lacks only {', '.join(missing)}" if 0 < len(missing) < len(FILES) else ""
