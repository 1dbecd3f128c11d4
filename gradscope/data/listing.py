"""Which pictures a folder holds, of which classes, and which of them are for tests.

    DIR/train/CLASS/*.jpg and, if there, DIR/val/CLASS/*.jpg (or DIR/test)
    DIR/CLASS/*.jpg
    DIR/*.jpg or DIR/train/*.jpg        without classes, for pre-training alone

Class folders are searched to any depth and symbolic links are followed; names that begin with a point
are left out.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from gradscope.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Ends of file names, in any case, by which pictures are known."""

TEST_FOLDERS = ("val", "test")
"""Names of the folder with test pictures beside `train`; the first that exists is taken."""

HELD_OUT = 0.1
"""Share of a class that is set aside for tests where no folder holds test pictures."""


@dataclass(frozen=True)
class Files:
    """Pictures of one part, class by class: `names` relative to `root`, with `/`; `labels` empty without classes."""

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Listing:
    """What a folder holds. `digest`: of every file's name, size in bytes and part, not of its content."""

    classes: tuple[str, ...]
    train: Files
    test: Files
    digest: str


def list_pictures(folder: Path) -> Listing:
    """Look through `folder`; the order depends on names alone.

    Without a folder of test pictures a tenth of each class is set aside: the files whose name (below the
    folder of classes) has a SHA-256 in the lowest tenth, at least one of a class of two or more and never
    all. So adding pictures moves none from one part to the other, except in the smallest classes. Pictures
    without classes are all for training. Raises DataError, with the cure, for a folder without pictures and
    for one that fits none of the layouts.
    """
    root = folder / "train"
    test_root = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if not root.is_dir():
        if test_root is not None and {name for name, _ in _entries(folder)[0]} <= set(TEST_FOLDERS):
            raise DataError(f"{folder} holds {test_root.name} but no train; put the training pictures into {root}")
        root, test_root = folder, None
    sizes, by_class = _classes(root)
    classes = tuple(sorted(by_class))
    if test_root is not None:
        test_sizes = _test_sizes(test_root, classes)
        train, test = _files(root, sizes, by_class), _files(test_root, test_sizes, _by_class(test_sizes, classes))
    else:
        test_sizes = {}
        kept, held_out = {}, {}
        for label, names in by_class.items():
            chosen = _held_out(names)
            held_out[label] = [name for name in names if name in chosen]
            kept[label] = [name for name in names if name not in chosen]
        train, test = _files(root, sizes, kept), _files(root, sizes, held_out)
    digest = hashlib.sha256()
    for part, files, known in (("train", train, sizes), ("test", test, test_sizes or sizes)):
        for name in files.names:
            digest.update(os.fsencode(f"{part}\0{name}\0{known[name]}\n"))
    return Listing(classes, train, test, digest.hexdigest()[:16])


def _classes(root: Path) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Bytes of each picture of the training part, and the pictures of each class (none: one class called '')."""
    folders, loose = _entries(root)
    sizes = _walk(root)
    if not sizes:
        raise DataError(
            f"{root} holds no pictures: no file below it ends in {', '.join(EXTENSIONS)}; "
            "name a folder with DIR/train/CLASS/*.jpg, DIR/CLASS/*.jpg or DIR/*.jpg"
        )
    if not any("/" in name for name in sizes):
        return sizes, {"": list(sizes)}
    if loose:
        raise DataError(
            f"{root} holds pictures both beside and in its {len(folders)} subfolders (such as {loose[0]}): "
            "put every picture into a class's subfolder, or all into one folder without subfolders"
        )
    return sizes, _by_class(sizes, sorted({name.split("/", 1)[0] for name in sizes}))


def _by_class(sizes: dict[str, int], classes: tuple[str, ...] | list[str]) -> dict[str, list[str]]:
    by_class: dict[str, list[str]] = {name: [] for name in classes}
    for name in sizes:
        by_class["" if classes == ("",) else name.split("/", 1)[0]].append(name)
    return by_class


def _test_sizes(root: Path, classes: tuple[str, ...]) -> dict[str, int]:
    """Bytes of each test picture. Raises DataError unless they lie in folders of the training part's classes."""
    sizes = _walk(root)
    if classes == ("",):
        return sizes
    for name in sizes:
        if "/" not in name:
            raise DataError(f"{root} holds pictures without a class ({name}); sort them into folders named as train's")
        if name.split("/", 1)[0] not in classes:
            raise DataError(
                f"{root} has the class {name.split('/', 1)[0]!r}, of which train has no pictures; "
                "remove it or give train some"
            )
    return sizes


def _held_out(names: list[str]) -> set[str]:
    """The tenth of a class's pictures that is for tests."""
    if names and "/" not in names[0]:
        return set()
    place = {name: int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) / 2**64 for name in names}
    ordered = sorted(names, key=place.__getitem__)
    count = sum(value < HELD_OUT for value in place.values())
    return set(ordered[: min(max(count, 1), len(names) - 1)])


def _files(root: Path, sizes: dict[str, int], by_class: dict[str, list[str]]) -> Files:
    classes = sorted(by_class)
    names = tuple(name for each in classes for name in by_class[each])
    labels = () if classes == [""] else tuple(i for i, each in enumerate(classes) for _ in by_class[each])
    return Files(root, names, labels)


def _entries(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """(name, path) of the subfolders of `folder`, and names of its pictures; both sorted."""
    with os.scandir(folder) as entries:
        shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    folders = [(entry.name, entry.path) for entry in shown if entry.is_dir()]
    pictures = [entry.name for entry in shown if _is_picture(entry.name) and entry.is_file()]
    return folders, pictures


def _is_picture(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _walk(root: Path) -> dict[str, int]:
    """Bytes of every picture below `root`, by its name relative to it, folder by folder in order of names.

    A folder met again on the way down to it, through a link, is not entered a second time.
    """
    sizes: dict[str, int] = {}

    def enter(folder: str, prefix: str, above: tuple[str, ...]) -> None:
        place = os.path.realpath(folder)
        if place in above:
            return
        folders, pictures = _entries(Path(folder))
        for name in pictures:
            sizes[prefix + name] = os.stat(os.path.join(folder, name)).st_size
        for name, path in folders:
            enter(path, f"{prefix}{name}/", (*above, place))

    enter(str(root), "", ())
    return sizes
