"""Which pictures of a folder are found, and as what."""

import hashlib
from pathlib import Path

import pytest

from gradscope.data import folder_data, load_data
from gradscope.data.listing import list_pictures
from gradscope.errors import DataError, UsageError


def put(folder: Path, *names: str, content: bytes = b"content") -> Path:
    """Files that only look like pictures: a listing opens none of them."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize("test_part", ["val", "test"])
def test_train_and_test_parts_with_classes(tmp_path: Path, test_part: str) -> None:
    put(tmp_path, "train/dog/2.jpg", "train/dog/10.JPEG", "train/cat/deep/er/1.png", "train/cat/0.webp")
    put(tmp_path, f"{test_part}/dog/1.jpg", f"{test_part}/dog/0.jpg", "README.txt", "train/dog/labels.csv")
    listing = list_pictures(tmp_path)
    assert listing.classes == ("cat", "dog")
    assert listing.train.names == ("cat/0.webp", "cat/deep/er/1.png", "dog/10.JPEG", "dog/2.jpg")
    assert listing.train.labels == (0, 0, 1, 1)
    # The test part lacks a class; labels are positions in the training part's.
    assert listing.test.names == ("dog/0.jpg", "dog/1.jpg") and listing.test.labels == (1, 1)
    assert (listing.train.root, listing.test.root) == (tmp_path / "train", tmp_path / test_part)


def test_val_comes_before_test(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.jpg", "val/a/2.jpg", "test/a/3.jpg")
    assert list_pictures(tmp_path).test.names == ("a/2.jpg",)


def test_hidden_files_and_names_of_any_script(tmp_path: Path) -> None:
    put(tmp_path, ".git/a/1.jpg", "猫/.trash/1.jpg", "猫/._2.jpg", "猫/ねこ 1.jpg", "Hündin/ß.PNG")
    listing = list_pictures(tmp_path)
    assert listing.classes == ("Hündin", "猫")
    assert set(listing.train.names) | set(listing.test.names) == {"Hündin/ß.PNG", "猫/ねこ 1.jpg"}


@pytest.mark.parametrize("folder", ["", "train"])
def test_a_flat_folder_has_no_classes_and_no_test_part(tmp_path: Path, folder: str) -> None:
    put(tmp_path / folder, *[f"{index:02d}.jpg" for index in range(30)])
    data = folder_data(tmp_path)
    assert data.classes == () and (data.train_count, data.test_count) == (30, 0)
    assert data.train_labels.shape == data.test_labels.shape == (0,)


def test_a_flat_training_part_may_have_a_test_part(tmp_path: Path) -> None:
    put(tmp_path, "train/1.jpg", "train/2.jpg", "val/a/3.jpg")
    data = folder_data(tmp_path)
    assert (data.classes, data.train_count, data.test_count) == ((), 2, 1)


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_tenth_is_set_aside_by_the_digest_of_the_name(tmp_path: Path, prefix: str) -> None:
    names = [f"{name}/{index}.jpg" for name in ("a", "b") for index in range(300)]
    put(tmp_path, *[prefix + name for name in names])
    listing = list_pictures(tmp_path)
    expected = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 < 0.1}
    assert set(listing.test.names) == expected and 35 < len(expected) < 90
    assert sorted(listing.train.names + listing.test.names) == sorted(names)
    for files in (listing.train, listing.test):
        assert list(files.names) == sorted(files.names)
        assert [name[0] for name in files.names] == ["ab"[label] for label in files.labels]
    put(tmp_path, *[f"{prefix}a/new{index}.jpg" for index in range(50)], f"{prefix}c/1.jpg", f"{prefix}c/2.jpg")
    more = list_pictures(tmp_path)
    assert expected <= set(more.test.names) and set(listing.train.names) <= set(more.train.names)


def test_small_classes_are_split_too_unless_they_have_one_picture(tmp_path: Path) -> None:
    put(tmp_path, *[f"{name}/{index}.jpg" for name in "abcdefghijklmnop" for index in range(2)], "z/1.jpg")
    listing = list_pictures(tmp_path)
    assert [listing.train.labels.count(label) for label in range(17)] == [1] * 17
    assert [listing.test.labels.count(label) for label in range(17)] == [1] * 16 + [0]


def test_one_class_is_a_class(tmp_path: Path) -> None:
    put(tmp_path, *[f"only/{index}.jpg" for index in range(5)])
    data = folder_data(tmp_path)
    assert data.classes == ("only",)
    assert data.train_labels.tolist() == [0] * data.train_count and data.train_count + data.test_count == 5


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "store", "x/1.jpg", "y.jpg")
    put(tmp_path / "data", "train/b/0.jpg", "val/b/0.jpg")
    (tmp_path / "data/train/a").symlink_to(tmp_path / "store")
    (tmp_path / "data/train/b/linked.jpg").symlink_to(tmp_path / "store/y.jpg")
    (tmp_path / "data/train/b/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "store/x/up").symlink_to(tmp_path / "store")
    assert list_pictures(tmp_path / "data").train.names == ("a/y.jpg", "a/x/1.jpg", "b/0.jpg", "b/linked.jpg")


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["notes.txt"], "holds no pictures"),
        (["train/notes.txt", "val/a/1.jpg"], "train holds no pictures"),
        (["val/a/1.jpg", "test/a/1.jpg"], "holds val but no train"),
        (["a/1.jpg", "2.jpg"], "both beside and in its 1 subfolders"),
        (["train/a/1.jpg", "val/b/1.jpg"], "has the class 'b', of which train has no pictures"),
        (["train/a/1.jpg", "val/1.jpg"], "pictures without a class"),
    ],
)
def test_other_layouts_are_refused_with_the_cure(tmp_path: Path, names: list[str], word: str) -> None:
    put(tmp_path, *names)
    with pytest.raises(DataError, match=word) as caught:
        folder_data(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_the_digest_sees_names_sizes_and_parts(tmp_path: Path) -> None:
    def digest(*names: str, content: bytes = b"content") -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        return list_pictures(put(put(root, *names), names[-1], content=content)).digest

    names = ("train/a/1.jpg", "train/b/1.jpg", "val/b/2.jpg", "val/b/3.jpg")
    before = digest(*names)
    assert before == digest(*names)  # wherever the folder lies
    assert len(before) == 16
    others = [
        digest(*names, content=b"longer content"),
        digest(*names[:3], "val/b/4.jpg"),
        digest(*names[:3], "val/a/3.jpg"),
        digest(*names, "val/b/4.jpg"),
        digest("train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg", "val/b/3.jpg"),
    ]
    assert len({before, *others}) == 6


def test_load_data_opens_folders(tmp_path: Path) -> None:
    put(tmp_path / "pets", "cat/1.jpg", "dog/1.jpg")
    data = load_data(str(tmp_path / "pets"))
    assert (data.name, data.classes, data.image_size, data.channels) == ("pets", ("cat", "dog"), 224, 3)
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)
    assert load_data(str(tmp_path / "pets"), image_size=96).image_size == 96
    with pytest.raises(UsageError, match="is itself a folder"):
        load_data(str(tmp_path / "pets"), tmp_path)
    with pytest.raises(UsageError, match="nor a folder of pictures that exists"):
        load_data(str(tmp_path / "pest"))


def test_ranks_of_one_machine_share_its_processors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "1.jpg")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert folder_data(tmp_path).threads == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert folder_data(tmp_path).threads == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert folder_data(tmp_path).threads == 1
