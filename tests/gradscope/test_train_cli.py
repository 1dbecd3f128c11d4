"""`gradscope train` as a user meets it: where settings come from, SIGTERM, folders of pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.cli import main
from gradscope.data import ImageData
from gradscope.trainer import read_log

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]
QUICK = (
    "train", "--budget", 260, "--batch-size", 16, "--patch", 4, "--grid", "patch=4,7;dropout=0,0.5", "--set",
    "head_hidden=16", "--set", "evaluations=()",
)  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("GRADSCOPE")]:
        monkeypatch.delenv(name)

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


def saved(folder: str) -> dict[str, Any]:
    return tomllib.loads((Path(folder) / "config.toml").read_text())["train"]


def last(folder: str) -> dict[str, Any]:
    return load_checkpoint(list_checkpoints(Path(folder))[-1].path)


@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_the_saved_settings_give_the_same_run_again(method: str, run: Run, small_data: ImageData) -> None:
    extra = ("--set", "weight_decay_end=0.2", "--set", "decay_alpha=1.5", "--method", method, "--schedule", "mixed")
    if method == "dino":
        extra = (*extra, "--set", "prototypes=30", "--set", "small_scale=0.1,0.3")
    code, _, err = run(*QUICK, *extra, "--out", "first")
    assert code == 0, err
    code, out, err = run("--config", "first/config.toml", "train", "--out", "other", "--json")
    assert code == 0, err
    assert (Path("first") / "config.toml").read_text() == (Path("other") / "config.toml").read_text()
    first, other = last("first"), last("other")
    assert first["config"] == other["config"] and first["schedule"] == other["schedule"]
    assert all(torch.equal(value, other["model"][name]) for name, value in first["model"].items())
    assert json.loads(out)["steps"] == first["step"]


def test_a_setting_that_is_switched_off_stays_off_in_the_saved_ones(run: Run, small_data: ImageData) -> None:
    """DINO's recipe has a schedule of the weight decay, small crops and clipping."""
    off = ("--set", "weight_decay_end=-1", "--set", "small_crops=0", "--set", "clip=0", "--set", "prototypes=30")
    assert run(*QUICK, "--method", "dino", *off, "--out", "first")[0] == 0
    assert run("--config", "first/config.toml", "train", "--out", "other")[0] == 0
    assert last("first")["config"] == last("other")["config"]
    config = last("other")["config"]
    assert config["small_crops"] == 0 and config["clip"] == 0


def test_flags_win_over_the_file_setting_by_setting(run: Run, small_data: ImageData) -> None:
    assert run(*QUICK, "--out", "first", "--lr", 0.01, "--set", "momentum=0.5")[0] == 0
    words = ("--set", "warmup=0.25", "--grid", "patch=4,7,14;dropout=0", "--lr", 0.02)
    code, _, err = run("--config", "first/config.toml", "train", "--out", "other", *words)
    assert code == 0, err
    first, other = saved("first"), saved("other")
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {"warmup", "patches", "dropouts", "lr"}
    assert other["warmup"] == 0.25 and other["patches"] == [4, 7, 14] and other["lr"] == 0.02
    code, _, err = run("--config", "first/config.toml", "train", "--out", "third", "--set", "momentum=0.7")
    assert code == 0 and {n for n in first if first[n] != saved("third")[n]} == {"momentum"}


def test_flags_over_environment_over_file(run: Run, small_data: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("settings.toml").write_text(
        "[train]\nbudget = 200\nbatch-size = 16\nseed = 3\nlr = 0.1\nhead_hidden = 16\nevaluations = []\n"
        'patches = [7]\npatch = 7\ndropouts = [0.0]\nbetas = [0.7, 0.8]\nmethod = "simclr"\n'
    )
    begin = ("--config", "settings.toml", "train", "--out")
    assert run(*begin, "file")[0] == 0
    found = saved("file")
    assert (found["seed"], found["lr"], found["betas"], found["method"]) == (3, 0.1, [0.7, 0.8], "simclr")
    assert (found["head_hidden"], found["evaluations"], found["patches"]) == (16, [], [7])
    monkeypatch.setenv("GRADSCOPE_SEED", "4")
    monkeypatch.setenv("GRADSCOPE_METHOD", "mocov3")
    assert run(*begin, "environment")[0] == 0
    assert (saved("environment")["seed"], saved("environment")["method"]) == (4, "mocov3")
    assert run(*begin, "flag", "--seed", 5)[0] == 0
    assert (saved("flag")["seed"], saved("flag")["method"]) == (5, "mocov3")


@pytest.mark.parametrize(
    ("table", "words", "message"),
    [
        ("[train]\nbugdet = 1\n", (), "no option 'bugdet'"),
        ("[tarin]\nbudget = 1\n", (), r"[tarin] is no command"),
        ("[train]\nhead_hidden = 'abc'\n", (), "head_hidden is 'abc'; it must be a whole number"),
        ("[train]\nbetas = 0.9\n", (), "betas"),
        ("", ("--set", "momentun=1"), "unknown setting 'momentun'"),
        ("", ("--set", "momentum"), "not of the form setting=value"),
        ("", ("--set", "patches=4", "--grid", "patch=4,7"), "patches has an option of its own, --grid"),
        ("", ("--set", "width=64", "--set", "width=128"), "width is set twice"),
        ("", ("--set", "accumulate=2", "--method", "simclr"), "SimCLR's gradient flows into the negatives"),
        ("", ("--set", "small_crops=2"), "small_crops is 2; only dino"),
        ("", ("--keep", "0"), "keep is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(
    table: str, words: tuple[object, ...], message: str, run: Run, small_data: ImageData
) -> None:
    Path("settings.toml").write_text(table)
    code, _, err = run("--config", "settings.toml", "train", "--budget", 300, "--batch-size", 16, "--out", "x", *words)
    assert code == 2 and message in " ".join(err.replace("│", " ").split()), err
    assert not list(Path().glob("x/*.pt"))


def test_the_resolved_settings_are_shown(run: Run, small_data: ImageData) -> None:
    code, out, err = run(*QUICK, "--out", "x")
    shown = " ".join(err.split())
    for word in ("head_hidden 16,", "image_size 28,", "batch_size 16,", "method mocov3,"):
        assert code == 0 and word in shown, word
    assert "steps" in out and run(*QUICK, "--out", "x")[0] == 0


def test_a_missing_tensorboard_is_told_before_anything_is_done(
    run: Run, small_data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = run(*QUICK, "--out", "x", "--tensorboard")
    assert code == 2 and "--tensorboard needs the package tensorboard (pip install tensorboard)" in err
    assert not list(Path().glob("x/step-*.pt"))


def test_sigterm_saves_ends_with_143_and_the_same_command_continues(tmp_path: Path) -> None:
    """In a process of its own, on the bundled images."""
    command = [sys.executable, "-m", "gradscope", *map(str, QUICK), "--schedule", "mixed", "--out", str(tmp_path / "x")]
    command[command.index("--budget") + 1] = "20000"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        patience = time.monotonic() + 200
        while not (tmp_path / "x" / "step-00000000.pt").exists() and time.monotonic() < patience:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 143, err
    assert "run the same command to continue" in err and "Traceback" not in err
    resumed = load_checkpoint(tmp_path / "x" / "resume.pt")
    assert resumed["step"] >= 1 and resumed["units"] < 20000


def pictures(folder: Path, count: int, *, broken: int = 0) -> None:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(folder.name))
    for i in range(count):
        pixels = torch.randint(0, 256, (40, 48, 3), generator=generator, dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(folder / f"picture-{i}.jpg")
    for i in range(broken):
        (folder / f"broken-{i}.jpg").write_bytes(b"no picture at all")


PICTURES = (
    "train", "--budget", 60, "--batch-size", 8, "--image-size", 28, "--patch", 7, "--grid", "patch=7,14;dropout=0,0.5",
    "--set", "head_hidden=16", "--schedule", "mixed",
)  # fmt: skip


@pytest.mark.parametrize("method", ["mocov3", "dino"])
def test_a_flat_folder_of_pictures_trains_without_evaluation(method: str, run: Run) -> None:
    pictures(Path("album"), 24, broken=1)
    extra = ("--set", "prototypes=30", "--set", "small_crops=1") if method == "dino" else ()
    budget = ("--budget", 250)  # several epochs, so that every file is met
    code, out, err = run(*PICTURES, *budget, "--method", method, "--data", "album", "--out", "x", "--json", *extra)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["knn_accuracy"] is None and facts["steps"] >= 6
    assert facts["skipped_pictures"] == [str(Path("album", "broken-0.jpg").resolve())]
    assert not any("accuracy" in row for row in read_log(Path("x")))
    assert "broken-0.jpg" in err and err.count("broken-0.jpg") <= 2  # when it is met, and in the count at the end
    code, _, err = run("evaluate", "x", "--knn")
    assert code != 0 and "class" in err
    config = last("x")["config"]
    assert Path(config["data"]).resolve() == Path("album").resolve() and config["image_size"] == 28
    assert last("x")["model"]["backbone.patch_embed.proj.weight"].shape == (48, 3, 7, 7)


def test_a_small_folder_of_classes_is_trained_on_and_evaluated(run: Run) -> None:
    """Fewer training pictures than the twenty neighbours that are asked: still no end in the midst of a run."""
    for part, count in (("train", 7), ("val", 3)):
        for name in ("cats", "dogs"):
            pictures(Path("pets") / part / name, count)
    code, out, err = run(*PICTURES, "--data", "pets", "--out", "x", "--json")
    assert code == 0, err
    assert 0 <= json.loads(out)["knn_accuracy"] <= 1


def test_an_interrupted_run_on_a_folder_continues_bit_for_bit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are decoded ahead in threads; a run that stops forgets what it had begun."""
    pictures(Path("album"), 24)
    words = (*PICTURES, "--data", "album", "--budget", 120)
    assert run(*words, "--out", "whole")[0] == 0
    from gradscope.stepper import Stepper

    real = Stepper.step

    def stop(self: Stepper, step: int, *rest: Any) -> tuple[float, float]:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, step, *rest)

    monkeypatch.setattr(Stepper, "step", stop)
    assert run(*words, "--out", "part")[0] == 143
    monkeypatch.setattr(Stepper, "step", real)
    assert run(*words, "--out", "part")[0] == 0
    whole, part = last("whole"), last("part")
    assert whole["step"] == part["step"] > 5
    assert all(torch.equal(value, part["model"][name]) for name, value in whole["model"].items())
