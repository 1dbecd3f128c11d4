"""`gradscope evaluate` as a user meets it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from gradscope.checkpoints import list_checkpoints
from gradscope.cli import main
from gradscope.cli.run_settings import make_schedule
from gradscope.config import TrainConfig, open_setting
from gradscope.data import ImageData, folder_data
from gradscope.evaluation import dataset_features, knn_accuracies, linear_probe
from gradscope.trainer import load_run, train
from tests.gradscope.test_evaluation_features import write_pictures

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run `gradscope evaluate` with some words: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in ("GRADSCOPE_SEED", "GRADSCOPE_CONFIG", "GRADSCOPE_DATA"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", "evaluate", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_all_accuracies_of_one_checkpoint(run: Run, small_run: Path) -> None:
    words = ("--knn", "--linear", "--finetune", "--solver", "sgd", "--k", "10,20,10", "--temperature", 0.1)
    code, out, _ = run(small_run, *words, "--blocks", 2, "--probe-epochs", 3, "--epochs", 1, "--json")
    facts = json.loads(out)
    assert code == 0 and set(facts["accuracy"]) == {"knn_10", "knn_20", "linear", "finetune"}
    last = list_checkpoints(small_run)[-1].path
    assert facts["checkpoint"] == str(last) and facts["data"] == "fashion-mnist-10k" and facts["image_size"] == 28
    setting, model, _ = load_run(last)
    data = setting.data
    train, test = (dataset_features(model.evaluated, data, part, blocks=2) for part in ("train", "test"))
    labels = data.train_labels, data.test_labels
    width = model.evaluated.width
    by_k = knn_accuracies(train[:, -width:], labels[0], test[:, -width:], labels[1], ks=(10, 20), temperature=0.1)
    assert [facts["accuracy"][f"knn_{k}"] for k in (10, 20)] == [by_k[10], by_k[20]]
    probe = linear_probe(train, labels[0], test, labels[1], solver="sgd", epochs=3)
    assert facts["accuracy"]["linear"] == probe.accuracy
    assert facts["details"]["linear"]["chosen"] == probe.chosen and facts["details"]["finetune"]["epochs"] == 1
    code, out, _ = run(last)
    assert code == 0 and out.split()[0] == "knn" and len(out.splitlines()) == 1


def test_all_checkpoints_in_a_table(run: Run, small_run: Path) -> None:
    before = sorted(path.name for path in small_run.parent.rglob("*"))
    code, out, _ = run(small_run, "--all", "--json")
    rows = json.loads(out)["checkpoints"]
    found = list_checkpoints(small_run)
    assert code == 0 and [row["checkpoint"] for row in rows] == [str(point.path) for point in found]
    for row in rows:
        assert row["accuracy"] == json.loads(run(row["checkpoint"], "--json")[1])["accuracy"]
    assert len({row["accuracy"]["knn"] for row in rows}) > 1
    code, out, err = run(small_run, "--all")
    assert code == 0 and out.splitlines()[0].split() == ["checkpoint", "progress", "knn"]
    assert [line.split()[2] for line in out.splitlines()[2:]] == [f"{row['accuracy']['knn']:.1%}" for row in rows]
    assert "evaluate" in err and sorted(path.name for path in small_run.parent.rglob("*")) == before


@pytest.fixture
def picture_run(tmp_path: Path) -> Path:
    """A folder with the checkpoints of a run on RGB pictures of 16 pixels, in `tmp_path`/seen."""
    write_pictures(tmp_path / "seen")
    config = TrainConfig(
        budget=300.0, data=str(tmp_path / "seen"), image_size=16, patch=4, patches=(4, 8), batch_size=8,
        head_hidden=16, head_width=8, evaluations=(), checkpoints=(1.0,),
    )  # fmt: skip
    setting = open_setting(config)
    train(setting, make_schedule("none", setting), tmp_path / "ckpt_dir")
    return tmp_path / "ckpt_dir"


def test_other_data_than_the_run_s(run: Run, picture_run: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "other", seed=1)
    code, out, _ = run(picture_run, "--data", "other", "--k", 5, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["data"] == "other" and facts["image_size"] == 16
    model = load_run(list_checkpoints(picture_run)[-1].path)[1].evaluated
    data = folder_data(tmp_path / "other", image_size=16)
    train_ND, test_ND = (dataset_features(model, data, part) for part in ("train", "test"))
    expected = knn_accuracies(train_ND, data.train_labels, test_ND, data.test_labels, ks=(5,))
    assert facts["accuracy"]["knn"] == expected[5]
    assert json.loads(run(picture_run, "--image-size", 24, "--k", 5, "--json")[1])["image_size"] == 24
    code, _, err = run(picture_run, "--data", "fashion-mnist-10k")
    assert code == 2 and "its images have 1 channels, the model was trained on 3" in err
    code, _, err = run(picture_run, "--image-size", 18)
    assert code == 2 and "images of 18 pixels cannot be cut into the model's patches of 4" in err
    (tmp_path / "flat").mkdir()
    for i in range(12):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / "flat" / f"{i}.png")
    code, out, err = run(picture_run, "--data", "flat", "--json")
    assert code == 2 and out == "" and "flat: has no classes, and evaluation needs labels" in err


def test_other_data_is_normalised_as_the_run_s_was(
    run: Run, small_run: Path, few_images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(few_images, mean=(0.9,), std=(3.0,), name="fashion-mnist")
    monkeypatch.setattr("gradscope.data.load_data", lambda name, folder=None, image_size=None: other)
    first, second = (json.loads(run(small_run, *words, "--json")[1]) for words in ((), ("--data", "fashion-mnist")))
    assert first["accuracy"] == second["accuracy"] and second["data"] == "fashion-mnist"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--k", "ten"), "--k 'ten': give whole numbers"),
        (("--k", "0"), "k=0 neighbours"),
        (("--linear", "--solver", "adam"), "solver='adam': choose one of lbfgs, sgd"),
        (("--linear", "--blocks", 9), "blocks=9: the model has 3"),
        (("--finetune", "--epochs", 0), "epochs=0: fine-tuning needs at least 1"),
        (("--data", "absent"), "absent"),
        (("--temperature", 0), "temperature=0.0"),
    ],
)
def test_what_is_out_of_range_is_refused(run: Run, small_run: Path, words: tuple[object, ...], message: str) -> None:
    code, out, err = run(small_run, *words, "--json")
    assert code == 2 and out == "" and message in err and len(err.splitlines()) <= 3


def test_all_needs_a_folder(run: Run, small_run: Path) -> None:
    code, _, err = run(list_checkpoints(small_run)[0].path, "--all")
    assert code == 2 and "is no folder of checkpoints" in err


def test_checkpoints_of_two_runs_are_not_mixed(run: Run, small_run: Path) -> None:
    path = list_checkpoints(small_run)[1].path
    content = torch.load(path, weights_only=True)
    content["config"]["lr"] = 1.0
    torch.save(content, path)
    code, _, err = run(small_run, "--all", "--quiet")
    assert code == 1 and f"{path.name}: is of another run than the folder's first checkpoint (another lr)" in err
