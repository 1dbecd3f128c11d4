"""`gradscope profile` and `show` on checkpoints of other code bases, from files in their layouts to the cube."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gradscope import open_cube
from gradscope.cli import main
from gradscope.cube import DONE
from gradscope.foreign import ForeignTask, build, read_foreign
from schedulers import Strategy
from tests.gradscope.foreign_models import (
    HEADS,
    MoCo,
    ViT,
    Wrapper,
    dino_optimizer,
    save_dino,
    save_moco,
    trained_a_little,
    twin,
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in an empty folder that has 24 pictures: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    Path("pictures").mkdir()
    for i in range(24):
        pixels = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 20)).save(f"pictures/{i}.png")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def moco(tmp_path: Path) -> Path:
    """Two checkpoints of moco-v3, and `last`, a copy of the second."""
    torch.manual_seed(0)
    folder = tmp_path / "moco"
    folder.mkdir()
    model = MoCo()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in (2, 10):
        trained_a_little(model, optimizer, lambda: model.loss(*torch.randn(2, 6, 3, 16, 16)), steps=1)
        save_moco(folder / f"checkpoint_{epoch - 1:04d}.pth.tar", model, epoch=epoch, optimizer=optimizer)
    save_moco(folder / "last.pth.tar", model, epoch=10, optimizer=optimizer)
    return folder


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "dino"
    folder.mkdir()
    student = Wrapper()
    optimizer = dino_optimizer(student)
    images = torch.randn(6, 3, 16, 16)
    for epoch in (5, 10):
        trained_a_little(student, optimizer, lambda: student(images).square().mean(), steps=1)
        save_dino(folder / f"checkpoint{epoch:04d}.pth", student, twin(student), epoch=epoch, optimizer=optimizer)
    return folder


SMALL = ("--heads", HEADS, "--data", "pictures", "--batch-size", 4, "--samples", 16, "--samples-per-cell", "fixed")
SMALL = (*SMALL, "--grid", "patch=4,8;dropout=0")


def test_profile_of_moco_v3(run: Run, moco: Path) -> None:
    code, _, err = run("profile", "moco", *SMALL)
    assert code == 2 and "do not tell how many epochs the run has; add --epochs N" in err
    code, out, err = run("profile", "moco", *SMALL, "--epochs", 20)
    assert code == 0 and "4 cells measured, 0 reused, 0 failed" in out
    assert "found: moco-v3 checkpoints, loss mocov3: ViT of width 48, depth 2, 4 heads, patch 4" in err
    assert "found: 2 checkpoints of a run of 20 epochs, at progress 0.1, 0.5" in err
    assert "left out, of the same epoch as another: last.pth.tar (checkpoint_0009.pth.tar)" in err
    assert "warning: temperature 0.2, the recipe's for ViT: the file does not tell it" in err
    cube = open_cube(Path("cube.nc")).dataset
    assert cube["progress"].values.tolist() == [0.1, 0.5] and (cube["status"] == DONE).all()
    assert cube["cost"].sel(cost_model="tokens", patch=4, dropout=0).item() == 4
    told = json.loads(cube.attrs["training_json"])
    assert told["source"] == "moco-v3" and told["strategies"] == ["patch=4,dropout=0"]
    assert "--epochs 20" in cube.attrs["profile_command"] and "--heads 4" in cube.attrs["profile_command"]
    again = run("profile", "moco", *SMALL, "--epochs", 20)
    assert "0 cells measured, 4 reused" in again[1]


def test_profile_of_dino(run: Run, dino: Path) -> None:
    code, out, err = run("profile", "dino", *SMALL, "--json")
    assert code == 0 and json.loads(out)["measured"] == 4 and json.loads(out)["failed"] == {}
    assert "found: DINO checkpoints, loss dino" in err and "at progress 0.5, 1" in err
    cube = open_cube(Path("cube.nc")).dataset
    assert cube["progress"].values.tolist() == [0.5, 1.0] and (cube["status"] == DONE).all()


def test_backbones_alone_only_under_a_chosen_loss(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "bare").mkdir()
    for epoch in (1, 2):
        torch.save(ViT().state_dict(), tmp_path / "bare" / f"epoch-{epoch}.pth")
    words = ("profile", "bare", *SMALL, "--epochs", 2)
    code, out, err = run(*words)
    assert code == 2 and out == "" and "a backbone alone, without the heads that the loss needs; --loss mocov3|" in err
    code, _, err = run(*words, "--loss", "simclr", "--seed", 3, "--checkpoints", 1)
    assert code == 0 and "warning: the heads of simclr are freshly initialised (seed 3)" in err
    training = json.loads(open_cube(Path("cube.nc")).attrs["training_json"])
    assert any("freshly initialised (seed 3)" in text for text in training["warnings"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--heads", HEADS, "--epochs", 20), 2, "moco-v3 checkpoints do not say on which images; add --data DIR"),
        (("--data", "pictures", "--epochs", 20), 2, "no tensor tells the attention heads"),
        (
            ("--heads", 4, "--epochs", 20, "--data", "fashion-mnist-10k"),
            2,
            "images of 1 channels, but the checkpoints' model takes 3",
        ),
        (
            ("--heads", 4, "--epochs", 20, "--data", "pictures", "--image-size", 18),
            2,
            "not a multiple of the model's patch",
        ),
        (("--heads", 4, "--epochs", 5, "--data", "pictures"), 1, "is of epoch 10, beyond the run's 5"),
    ],
)
def test_what_the_files_cannot_tell_is_asked_for(
    run: Run, moco: Path, words: tuple[object, ...], code: int, message: str
) -> None:
    got, out, err = run("profile", "moco", *words)
    assert got == code and out == "" and message in err and "Traceback" not in err


def test_options_for_foreign_checkpoints_are_refused_for_our_own(run: Run, small_run: Path) -> None:
    code, _, err = run("profile", small_run, "--heads", 3)
    assert code == 2 and "--heads is for checkpoints of other code bases" in err
    code, _, err = run("profile", "pictures", "--epochs", 3)
    assert code == 1 and "pictures: holds no checkpoint" in err


def test_costs_of_foreign_checkpoints_are_not_measured(run: Run, moco: Path) -> None:
    code, _, err = run("cost", "moco")
    assert code == 2 and "checkpoints of another code base, which only `gradscope profile` takes" in err


def test_show(run: Run, moco: Path, tmp_path: Path) -> None:
    code, out, _ = run("show", "moco/last.pth.tar")
    assert code == 0 and "moco-v3 checkpoint, epoch 10" in out and "loss: mocov3" in out
    assert "width 48, depth 2, heads unknown, patch 4, images of 16 pixels and 3 channels, sincos positions" in out
    vit = {**ViT(width=64, heads=1).state_dict(), "head.weight": torch.zeros(2, 64)}
    torch.save(vit, tmp_path / "model.pt")
    code, out, _ = run("show", "model.pt", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["kind"] == "foreign checkpoint" and facts["leftovers"] == ["head.weight"]
    assert facts["model"]["heads"] == 1 and facts["model"]["heads_guessed"] and facts["method"] is None
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    code, _, err = run("show", "optimizer.pt")
    assert code == 1 and "holds the state of an optimizer and no model" in err


def test_the_grid_and_the_batch_by_default(run: Run, moco: Path) -> None:
    task = ForeignTask.from_checkpoints(moco, data="pictures", heads=HEADS, epochs=20)
    assert task.grid.axes == {"patch": (4, 8), "dropout": (0.0, 0.25, 0.5, 0.75)}
    assert task.grid.reference == Strategy(patch=4, dropout=0) and task.cost(task.grid.reference) == 4
    wide = ForeignTask.from_checkpoints(moco, data="pictures", heads=HEADS, epochs=20, image_size=28)
    assert wide.grid.axes["patch"] == (4, 7, 14) and "resampled to 28" in " ".join(wide.warnings)


def test_second_moments_reach_the_profile(run: Run, moco: Path) -> None:
    task = ForeignTask.from_checkpoints(moco, data="pictures", heads=HEADS, epochs=20)
    file = moco / "checkpoint_0009.pth.tar"
    model = task.load(file)
    found = task.second_moment(file, model)
    assert found is not None
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.load(file, weights_only=False)["optimizer"]["state"]
    assert any(torch.equal(found["predictor.0.weight"], s["exp_avg_sq"] / (1 - 0.999**2)) for s in optimizer.values())


def test_a_dino_without_centre_gets_the_teachers_mean(run: Run, dino: Path) -> None:
    task = ForeignTask.from_checkpoints(dino, data="pictures", heads=HEADS)
    file = dino / "checkpoint0005.pth"
    assert torch.equal(task.load(file).centre.cpu(), torch.linspace(-0.5, 0.5, 20)[None])
    assert task.fraction == 0.5
    content = torch.load(file, weights_only=False)
    del content["dino_loss"]
    torch.save(content, file)
    again = ForeignTask.from_checkpoints(dino, data="pictures", heads=HEADS)
    model = again.load(file)
    assert any("no centre" in text for text in again.warnings)
    teacher = build(read_foreign(file), again.blueprint)
    outputs = torch.cat([teacher.targets(next(iter(again.batches(21, s))), again.grid.reference) for s in range(5)])
    distance = (model.centre - outputs.mean(0)).norm()
    assert distance < 0.1 * (outputs.mean(0) - torch.linspace(-0.5, 0.5, 20)).norm()


def test_images_that_cannot_suit_are_refused_before_they_are_resampled(
    run: Run, moco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resample(*_: object) -> None:
        raise AssertionError("images of one channel were resampled for a model that takes three")

    monkeypatch.setattr("gradscope.data.datasets.resampled", resample)
    got, _, err = run("profile", "moco", "--heads", 4, "--epochs", 20, "--data", "fashion-mnist-10k")
    assert got == 2 and "images of 1 channels, but the checkpoints' model takes 3" in err
