"""Datasets: what ships is the published data, and files that are missing or damaged are named."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gradscope.data import DATASETS, fashion_mnist, image_data, load_data
from gradscope.errors import DataError, UsageError


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the full dataset; returns the folder of the user's cache."""
    monkeypatch.delenv("GRADSCOPE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    return tmp_path / "cache" / "gradscope" / "fashion-mnist"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Four small files of the format, and the loader's checksums set to theirs."""
    rng = np.random.default_rng(0)
    files = {}
    for part, count in (("train", 7), ("t10k", 3)):
        pixels = rng.integers(0, 256, count * 28 * 28, np.uint8).tobytes()
        labels = rng.integers(0, 10, count, np.uint8).tobytes()
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">iiii", 2051, count, 28, 28) + pixels
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">ii", 2049, count) + labels
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(fashion_mnist, "FILES", checksums)
    return files


def put(folder: Path, files: dict[str, bytes], *, gzipped: bool) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / (f"{name}.gz" if gzipped else name)
        path.write_bytes(gzip.compress(content) if gzipped else content)
    return folder


def test_the_embedded_data_is_the_published_test_set_split_in_order() -> None:
    data = load_data("fashion-mnist-10k")
    with gzip.open(fashion_mnist.EMBEDDED / "t10k-images-idx3-ubyte.gz") as file:
        magic, count, height, width = struct.unpack(">iiii", file.read(16))
        images = np.frombuffer(file.read(), np.uint8).reshape(count, 1, height, width)
    with gzip.open(fashion_mnist.EMBEDDED / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read()[8:], np.uint8)
    assert (magic, count) == (2051, 10_000)
    assert data.train_images.shape == (8000, 1, 28, 28) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (2000, 1, 28, 28) and data.test_labels.dtype == torch.int64
    np.testing.assert_array_equal(data.train_images, images[:8000])
    np.testing.assert_array_equal(data.test_images, images[8000:])
    np.testing.assert_array_equal(torch.cat((data.train_labels, data.test_labels)), labels)
    assert (data.channels, data.image_size, len(data.classes)) == (1, 28, 10)
    # The published test set has 1,000 images of each class.
    assert torch.cat((data.train_labels, data.test_labels)).bincount().tolist() == [1000] * 10


def test_the_digest_of_the_embedded_data_never_changes() -> None:
    assert load_data("fashion-mnist-10k").digest == "ae5dffc82932df6e"


def test_mean_and_std_are_those_of_the_training_pixels() -> None:
    data = load_data("fashion-mnist-10k")
    pixels = data.train_images.double() / 255
    assert data.mean == pytest.approx((pixels.mean().item(),), rel=1e-12)
    assert data.std == pytest.approx((pixels.std(correction=0).item(),), rel=1e-9)


@pytest.mark.parametrize("gzipped", [True, False])
def test_the_full_data_is_read_from_a_folder(
    tmp_path: Path, nowhere: Path, tiny: dict[str, bytes], gzipped: bool
) -> None:
    data = load_data("fashion-mnist", put(tmp_path / "data", tiny, gzipped=gzipped))
    for part, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("t10k", data.test_images, data.test_labels),
    ):
        assert images.numpy().tobytes() == tiny[f"{part}-images-idx3-ubyte"][16:]
        assert bytes(labels.tolist()) == tiny[f"{part}-labels-idx1-ubyte"][8:]


def test_places_are_searched_in_order(
    tmp_path: Path, nowhere: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place in turn is given a damaged file; the error names the place that was read."""
    damaged = dict(tiny)
    damaged["train-labels-idx1-ubyte"] = damaged["train-labels-idx1-ubyte"][:-1] + b"\xff"
    variable = tmp_path / "variable"
    monkeypatch.setenv("GRADSCOPE_DATA", str(variable))
    for place in (fashion_mnist.DEBIAN, nowhere, variable, tmp_path / "given"):
        put(place, damaged, gzipped=False)
        with pytest.raises(DataError) as caught:
            load_data("fashion-mnist", tmp_path / "given")
        assert str(place / "train-labels-idx1-ubyte") in str(caught.value)


def test_a_folder_that_lacks_a_file_is_passed_over_and_reported(
    tmp_path: Path, nowhere: Path, tiny: dict[str, bytes]
) -> None:
    folder = put(tmp_path / "given", tiny, gzipped=True)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="the folder given, lacks only t10k-labels-idx1-ubyte"):
        load_data("fashion-mnist", folder)
    put(nowhere, tiny, gzipped=True)
    assert len(load_data("fashion-mnist", folder).train_images) == 7


def test_missing_data_tells_where_it_looked_and_how_to_get_it(
    tmp_path: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSCOPE_DATA", str(tmp_path / "variable"))
    with pytest.raises(DataError) as caught:
        load_data("fashion-mnist", tmp_path / "given")
    text = str(caught.value)
    places = [tmp_path / "given", tmp_path / "variable", nowhere, tmp_path / "debian"]
    assert sorted(places, key=lambda place: text.index(str(place))) == places
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"):
        assert name in text
    for cure in ("apt-get download dataset-fashion-mnist", "dpkg-deb -x", "GRADSCOPE_DATA", "fashion-mnist-10k"):
        assert cure in text


@pytest.mark.parametrize("name", ["fashion-mnist-10k", "fashion-mnist"])
def test_a_damaged_file_is_named(
    name: str, tmp_path: Path, nowhere: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(tmp_path / "data", tiny, gzipped=True)
    path = folder / "t10k-images-idx3-ubyte.gz"
    content = bytearray(tiny["t10k-images-idx3-ubyte"])
    content[100] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    monkeypatch.setattr(fashion_mnist, "EMBEDDED", folder)
    with pytest.raises(DataError, match="SHA-256") as caught:
        load_data(name, folder if name == "fashion-mnist" else None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-20], lambda raw: raw[:5], lambda raw: b"not gzip", lambda raw: b""],
    ids=["tail", "head", "other", "empty"],
)
def test_a_torn_gzip_file_is_named(damage: Callable[[bytes], bytes], tmp_path: Path, tiny: dict[str, bytes]) -> None:
    folder = put(tmp_path / "data", tiny, gzipped=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        load_data("fashion-mnist", folder)
    assert str(path) in str(caught.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown dataset 'cifar'") as caught:
        load_data("cifar")
    assert all(name in str(caught.value) for name in DATASETS)


def test_a_folder_for_the_embedded_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ships with gradscope"):
        load_data("fashion-mnist-10k", tmp_path)


def test_the_published_full_data_where_it_is_installed() -> None:
    try:
        data = load_data("fashion-mnist")
    except DataError as error:
        pytest.skip(str(error).splitlines()[0])
    assert data.train_images.shape == (60_000, 1, 28, 28) and data.digest == "4646b659654b9ba5"
    assert torch.equal(data.test_images[:8000], load_data("fashion-mnist-10k").train_images)


ARRAYS = {
    "train_images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
    "train_labels": torch.tensor([0, 1, 0, 1]),
    "test_images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    "test_labels": torch.tensor([1, 0]),
}


@pytest.mark.parametrize(
    ("array", "value"),
    [
        ("train_images", torch.zeros(4, 3, 8, 8)),
        ("train_images", torch.zeros(4, 8, 8, dtype=torch.uint8)),
        ("train_labels", torch.tensor([0, 1])),
        ("train_labels", torch.tensor([0, 1, 2, 0])),
        ("train_labels", torch.tensor([0, -1, 1, 0])),
        ("test_labels", torch.tensor([0.0, 1.0])),
        ("test_images", torch.zeros(2, 1, 8, 8, dtype=torch.uint8)),
        ("test_images", torch.zeros(0, 3, 8, 8, dtype=torch.uint8)),
    ],
)
def test_arrays_that_do_not_fit_are_named(array: str, value: torch.Tensor) -> None:
    with pytest.raises(DataError, match=f"mine: {array}"):
        image_data("mine", **{**ARRAYS, array: value}, classes=("cat", "dog"))


@pytest.mark.parametrize("array", list(ARRAYS))
def test_the_digest_sees_every_array(array: str) -> None:
    changed = ARRAYS[array].clone()
    changed.view(-1)[-1] = 1 - changed.view(-1)[-1]
    before = image_data("a", **ARRAYS, classes=("cat", "dog"))
    after = image_data("a", **{**ARRAYS, array: changed}, classes=("cat", "dog"))
    assert before.digest != after.digest
    assert before.digest == image_data("b", **ARRAYS, classes=("cat", "dog")).digest


def test_statistics_are_per_channel() -> None:
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    images[:, 1] = 255
    images[0, 2] = 255
    data = image_data(
        "mine",
        **{**ARRAYS, "train_images": images, "train_labels": torch.tensor([0, 1]), "test_images": images},
        classes=("cat", "dog"),
    )
    assert data.mean == pytest.approx((0, 1, 0.5)) and data.std == pytest.approx((0, 0, 0.5))
