"""Pictures in files: their crops against Pillow's own, every kind of picture, and broken ones."""

import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gradscope.data import Ahead, FolderData, Prepared, folder_data, views_of
from gradscope.data.augment import Augmentation, draw
from gradscope.data.pictures import Cut, Picture
from gradscope.errors import DataError, UsageError

CPU = torch.device("cpu")
CROPS: dict[str, Any] = {"crop_scale": (0.08, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
SIZES = ((40, 60), (60, 40), (33, 33), (100, 31), (24, 24), (1, 1), (48, 300))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB picture of soft colours with some detail."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def put(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def plain_view(size: int, **options: Any) -> Augmentation:
    return Augmentation(size, (0.0,) * 3, (1.0,) * 3, **options)


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


@pytest.fixture
def sizes_folder(tmp_path: Path) -> Path:
    """Lossless pictures of many sizes, class by class: their order in the data is that of `SIZES`."""
    for index, (height, width) in enumerate(SIZES):
        put(tmp_path / "train" / "a" / f"{index}.png", smooth(height, width, index))
        put(tmp_path / "val" / "a" / f"{index}.png", smooth(height, width, 50 + index))
    return tmp_path


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_are_cut_out_and_then_resized_as_by_pillow(sizes_folder: Path, interpolation: str) -> None:
    """The box of every picture is the one that `draw` gives for its size; flips come later, on the device."""
    data = folder_data(sizes_folder, image_size=32)
    views = (plain_view(32, flip=0.5, interpolation=interpolation, **CROPS), plain_view(12, **CROPS))
    parts = data.prepare(torch.arange(len(SIZES)), views, generator(3))
    resampling = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    same = generator(3)
    for view, part in zip(views, parts, strict=True):
        state = same.get_state()
        for index, (height, width) in enumerate(SIZES):
            same.set_state(state)
            drawn = draw(len(SIZES), height, width, view, same)
            top, left, rows, columns = drawn.box_B4[index].astype(int).tolist()
            cut = smooth(height, width, index).crop((left, top, left + columns, top + rows))
            expected = cut.resize((view.size, view.size), resampling[view.interpolation])
            assert torch.equal(part.images_BCHW[index], pixels_of(expected)), (index, view.size)
        assert not part.crop
    finished = data.finish(parts, CPU)
    flips = parts[0].drawn.flip_B
    assert 0 < flips.sum() < len(flips)
    for found, raw, flip in zip(finished[0], parts[0].images_BCHW, flips, strict=True):
        torch.testing.assert_close(found * 255, (raw.flip(2) if flip else raw).float(), atol=1e-4, rtol=0)


def test_plain_is_the_central_square_of_the_picture_resized(sizes_folder: Path) -> None:
    data = folder_data(sizes_folder, image_size=32)
    found = data.plain("test", torch.arange(len(SIZES)))
    assert found.shape == (len(SIZES), 3, 32, 32) and found.dtype == torch.uint8
    for index, (height, width) in enumerate(SIZES):
        image, side = smooth(height, width, 50 + index), min(height, width) * 224 / 256
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        expected = pixels_of(image.resize((32, 32), Image.Resampling.BICUBIC, box=box))
        difference = (found[index].int() - expected.int()).abs()
        assert difference[:, 1:-1, 1:-1].float().mean() < 1, index  # at the edge Pillow looks beyond the box
    assert not torch.equal(data.plain("train", torch.tensor([0]))[0], found[0])


def prepared(data: FolderData, indices: torch.Tensor, views: tuple[Augmentation, ...], step: int) -> Prepared:
    return data.prepare(indices, views, generator(step))


def test_views_depend_neither_on_rows_nor_threads_nor_depth(sizes_folder: Path) -> None:
    views = views_of("dino", image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, channels=3, small_count=2, small_size=16)
    indices = torch.tensor([6, 0, 3, 3, 1, 5, 2, 4] * 5)
    data = folder_data(sizes_folder, image_size=32, threads=1)
    expected = data.views(indices, views, generator(1), CPU)
    for threads in (1, 2, 7):
        data = folder_data(sizes_folder, image_size=32, threads=threads)
        for rows in (slice(None), slice(0, 20), slice(20, 40), slice(39, 40)):
            found = data.views(indices, views, generator(1), CPU, rows)
            assert all(torch.equal(a[rows], b) for a, b in zip(expected, found, strict=True)), (threads, rows)
        for depth in (0, 3):
            make = functools.partial(prepared, data, indices, views)
            with Ahead(make, depth=depth, workers=2) as ahead:
                ahead.take(0)
                found = data.finish(ahead.take(1), CPU)
            assert all(map(torch.equal, expected, found)), (threads, depth)


def test_the_generator_moves_on_by_the_whole_batch(sizes_folder: Path) -> None:
    data, views = folder_data(sizes_folder, image_size=8), (plain_view(8, **CROPS),) * 2
    one, other = generator(1), generator(1)
    data.prepare(torch.arange(6), views, one, slice(2, 3))
    data.prepare(torch.arange(6), views, other)
    assert torch.equal(one.get_state(), other.get_state())


def test_large_jpegs_are_decoded_small_and_look_the_same(tmp_path: Path) -> None:
    """Against the full decoding: equal where it is decoded in full too, else within a few steps of 8 bits."""
    path = put(tmp_path / "large.jpg", smooth(1203, 1607), quality=95)
    full = opened(path)
    for box, decoded in (((0, 0, 1203, 1607), (402, 301)), ((101, 203, 600, 400), (1607, 1203))):
        picture = Picture(path)
        assert (picture.height, picture.width) == (1203, 1607)
        (found,) = picture.cut([Cut(box, 112, "bilinear")])
        assert picture._image.size == decoded
        top, left, height, width = box
        expected = full.crop((left, top, left + width, top + height)).resize((112, 112), Image.Resampling.BILINEAR)
        difference = np.abs(found.astype(int) - np.asarray(expected).astype(int))
        assert difference.mean() < 1 and difference.max() <= (6 if decoded[0] < 1607 else 0)


def test_the_largest_view_decides_how_small_a_jpeg_is_decoded(tmp_path: Path) -> None:
    picture = Picture(put(tmp_path / "large.jpg", smooth(1200, 1600)))
    picture.cut([Cut((0, 0, 1200, 1200), 32, "bilinear"), Cut((0, 0, 600, 600), 160, "bilinear")])
    assert picture._image.size == (1600, 1200)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("end", ["jpg", "png", "webp"])
def test_pictures_are_turned_as_their_exif_data_say(tmp_path: Path, orientation: int, end: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = put(tmp_path / f"a.{end}", smooth(30, 50), exif=exif)
    shown = ImageOps.exif_transpose(opened(path)).convert("RGB")
    picture = Picture(path)
    assert (picture.width, picture.height) == shown.size == ((50, 30) if orientation < 5 else (30, 50))
    (found,) = picture.cut([Cut((3, 5, 20, 11), 16, "bilinear")])
    assert np.array_equal(found, np.asarray(shown.crop((5, 3, 16, 23)).resize((16, 16), Image.Resampling.BILINEAR)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_do_not_hide_the_picture(tmp_path: Path) -> None:
    path = put(tmp_path / "a.jpg", smooth(20, 20), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff")
    (found,) = Picture(path).cut([Cut((0, 0, 20, 20), 20, "bilinear")])
    assert np.array_equal(found, np.asarray(opened(path)))


def deep(height: int, width: int) -> np.ndarray:
    return (np.arange(height * width, dtype=np.uint32).reshape(height, width) * 97 % 65536).astype(np.uint16)


def transparent_palette() -> Image.Image:
    image = smooth(20, 20).quantize(16)
    image.info["transparency"] = bytes([0, 128] + [255] * 14)
    return image


KINDS: dict[str, tuple[str, Callable[[], Image.Image]]] = {
    "cmyk": ("jpg", lambda: smooth(20, 20).convert("CMYK")),
    "gray": ("jpg", lambda: smooth(20, 20).convert("L")),
    "progressive": ("jpeg", lambda: smooth(20, 20)),
    "palette": ("png", lambda: smooth(20, 20).quantize(16)),
    "transparent palette": ("png", transparent_palette),
    "alpha": ("png", lambda: smooth(20, 20).convert("RGBA")),
    "gray and alpha": ("png", lambda: smooth(20, 20).convert("LA")),
    "black and white": ("png", lambda: smooth(20, 20).convert("1")),
    "gif": ("gif", lambda: smooth(20, 20).quantize(16)),
    "webp": ("webp", lambda: smooth(20, 20)),
    "bmp": ("bmp", lambda: smooth(20, 20)),
    "tiff": ("TIFF", lambda: smooth(20, 20)),
    "ppm": ("ppm", lambda: smooth(20, 20)),
    "pgm": ("pgm", lambda: smooth(20, 20).convert("L")),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, kind: str) -> None:
    end, make = KINDS[kind]
    path = put(tmp_path / f"p.{end}", make(), **({"progressive": True} if kind == "progressive" else {}))
    data = folder_data(tmp_path, image_size=20)
    (part,) = data.prepare(torch.tensor([0]), (plain_view(20),), generator())
    image = opened(path)
    # Pillow warns of palettes with alpha unless they pass through RGBA.
    expected = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    assert torch.equal(part.images_BCHW[0], pixels_of(expected))
    assert len(data.skipped) == 0 and data.seen == 1


@pytest.mark.parametrize("end", ["png", "tiff"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path: Path, end: str) -> None:
    put(tmp_path / f"deep.{end}", Image.fromarray(deep(20, 20)))
    found = folder_data(tmp_path, image_size=20).prepare(torch.tensor([0]), (plain_view(20),), generator())
    expected = np.stack([(deep(20, 20) // 256).astype(np.uint8)] * 3)
    assert np.array_equal(found[0].images_BCHW[0].numpy(), expected)


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    smooth(64, 64, seed).save(buffer, "JPEG")
    return buffer.getvalue()


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    smooth(64, 64, seed).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "truncated jpeg": ("jpg", lambda: jpeg()[:700]),
    "half a header": ("jpg", lambda: jpeg()[:20]),
    "truncated png": ("png", lambda: png()[:600]),
    "empty": ("jpg", lambda: b""),
    "text": ("jpg", lambda: b"<html>404 not found</html>"),
    "damaged png header": ("png", lambda: png()[:20] + bytes(4) + png()[24:]),
    "floating point": ("tif", lambda: floating()),
}


def floating() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


def one_broken(folder: Path, kind: str, reports: list[str]) -> FolderData:
    """Six pictures of two classes; the last of the first class, at place 2, is broken."""
    for index in range(6):
        put(folder / "train" / "ab"[index // 3] / f"{index}.png", smooth(30, 30, index))
    end, content = BROKEN[kind]
    (folder / "train/a/2.png").unlink()
    (folder / f"train/a/2.{end}").write_bytes(content())
    (folder / "val").mkdir()
    data = folder_data(folder, image_size=30, threads=3)
    data.report = reports.append
    return data


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_picture_is_told_once_and_replaced_within_its_class(tmp_path: Path, kind: str) -> None:
    reports: list[str] = []
    data = one_broken(tmp_path, kind, reports)
    indices = torch.tensor([5, 2, 1, 2, 0])
    for _ in range(2):
        (part,) = data.prepare(indices, (plain_view(30),), generator())
        for place, seed in enumerate((5, 0, 1, 0, 0)):
            assert torch.equal(part.images_BCHW[place], pixels_of(smooth(30, 30, seed))), place
    path = next((tmp_path / "train" / "a").glob("2.*"))
    assert len(reports) == 1 and str(path) in reports[0]
    assert data.skipped == (path,)
    assert data.seen == 4
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_the_replacement_is_cropped_by_its_own_size(tmp_path: Path) -> None:
    """Whether the broken file is met for the first time or known already, in a batch or alone."""
    (tmp_path / "a.png").write_bytes(png()[:-300])
    put(tmp_path / "b.png", smooth(20, 90, 1))
    put(tmp_path / "c.png", smooth(90, 20, 2))
    view = plain_view(16, **CROPS)
    expected = draw(3, 20, 90, view, generator(4)).box_B4[1]
    data = folder_data(tmp_path, image_size=16)
    data.report = lambda line: None
    batch = torch.tensor([2, 0, 2])
    first = data.prepare(batch, (view,), generator(4))[0]
    again = data.prepare(batch, (view,), generator(4))[0]
    alone = data.prepare(batch, (view,), generator(4), slice(1, 2))[0]
    assert first.drawn.box_B4[1].tolist() == expected.tolist()
    assert torch.equal(first.images_BCHW, again.images_BCHW)
    assert torch.equal(first.images_BCHW[1:2], alone.images_BCHW)
    top, left, rows, columns = expected.astype(int).tolist()
    cut = smooth(20, 90, 1).crop((left, top, left + columns, top + rows))
    assert torch.equal(first.images_BCHW[1], pixels_of(cut.resize((16, 16), Image.Resampling.BILINEAR)))


def test_broken_pictures_are_told_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ä.jpg").write_bytes(b"")
    put(tmp_path / "b.jpg", smooth(20, 20))
    folder_data(tmp_path, image_size=8).plain("train", torch.tensor([0, 1, 0]))
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "ä.jpg" in err


def test_a_class_of_broken_pictures_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "train/good/1.png", smooth(9, 9))
    put(tmp_path / "val/good/1.png", smooth(9, 9))
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "train/worse").mkdir(exist_ok=True)
        (tmp_path / "train/worse" / name).write_bytes(b"x")
    data = folder_data(tmp_path, image_size=8)
    data.report = lambda line: None
    data.plain("train", torch.tensor([0]))
    with pytest.raises(DataError, match="none of the 2 pictures of this class can be read") as caught:
        data.plain("train", torch.tensor([1]))
    assert str(tmp_path / "train" / "worse") in str(caught.value)


@pytest.mark.parametrize(("broken", "whole", "fails"), [(19, 20, False), (20, 100, True), (20, 180, False)])
def test_too_many_broken_pictures_are_an_error(tmp_path: Path, broken: int, whole: int, fails: bool) -> None:
    """From 20 on, where they are more than a tenth of those seen. Whole pictures are seen first."""
    content = png()
    for index in range(whole):
        (tmp_path / f"a{index:03d}.png").write_bytes(content)
    for index in range(broken):
        (tmp_path / f"b{index:03d}.png").write_bytes(b"")
    data = folder_data(tmp_path, image_size=8, threads=1)
    lines: list[str] = []
    data.report = lines.append
    if fails:
        with pytest.raises(DataError, match="20 of 120 pictures cannot be read") as caught:
            data.plain("train", torch.arange(data.train_count))
        assert str(tmp_path) in str(caught.value)
    else:
        data.plain("train", torch.arange(data.train_count))
    assert len(lines) == broken


@pytest.mark.parametrize(("option", "value"), [("image_size", 0), ("threads", 0)])
def test_illegal_options_are_named(tmp_path: Path, option: str, value: int) -> None:
    put(tmp_path / "a.png", smooth(9, 9))
    with pytest.raises(UsageError, match=f"{option} is 0"):
        folder_data(tmp_path, **{option: value})


def test_an_unknown_part_is_named(sizes_folder: Path) -> None:
    with pytest.raises(UsageError, match="part 'val'"):
        folder_data(sizes_folder, image_size=8).plain("val", torch.tensor([0]))
