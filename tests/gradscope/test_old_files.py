"""Files that earlier versions wrote (tests/data/README.md) open and say what they said; newer ones are refused."""

from __future__ import annotations

import dataclasses
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import gradscope.models.vit as vit
from gradscope import open_cube
from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.cli import main
from gradscope.cli.run_settings import make_schedule
from gradscope.config import config_of, open_setting
from gradscope.cube import DONE, digest_of, groups_of, profile_of, save_cube
from gradscope.data import ImageData
from gradscope.errors import CheckpointError, CubeError, GradscopeError
from gradscope.files import seal_holds
from gradscope.trainer import load_run, read_log, train
from schedulers import AdaptiveRule, ScheduleError, load_schedule

DATA = Path(__file__).parents[1] / "data"
LATER = {"races_json", "units", "precision", "profile_command", "measured_json"}


class Old(NamedTuple):
    """What one version's files are known to say: digests of the cube and its groups, the sum of all squared biases,
    the LATER attributes that its cube lacks, whether it has influences, a seal, version and first strategy of the
    schedule, and whether today's settings are those of its profile."""

    digest: str
    groups: str
    bias_sq: float
    without: set[str]
    influence: bool
    sealed: bool | None
    schedule: tuple[int, str] | None
    goes_on: bool


NOISE = -999272.1131753776
OLD = {
    "first": Old("f62c710638b2cb29", "424f6bb35b5c0b7e", -2057780.8029617516, LATER, False, None, None, True),
    "raced": Old(
        "ed50fb04846e3475", "599de1ba7e2b0de8", NOISE, {"profile_command", "measured_json"}, False, None,
        (1, "patch=14,dropout=0.5"), True,
    ),
    "influence": Old(
        "10b12c42eb6d63e7", "8d0930615a5f32c3", NOISE, set(), True, None, (2, "patch=7,dropout=0.5"), True
    ),
    "settings": Old(
        "c673536e43a5f4d2", "59238131454d488d", NOISE, set(), True, None, (2, "patch=7,dropout=0.5"), False
    ),
    "sealed": Old("f4d30f89c5b3059e", "89bb8e4a8b1d14d1", NOISE, set(), True, True, (2, "patch=7,dropout=0.5"), True),
}  # fmt: skip
QUICK = ("first", "sealed")  # on which all commands run by default
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, small_data: ImageData
) -> Call:
    """Run a command line in the folder where an archive was unpacked: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    tiny = dataclasses.replace(vit.VIT_SIZES["demo"], width=8, depth=1, heads=1)
    monkeypatch.setitem(vit.VIT_SIZES, "demo", tiny)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradscope", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(DATA / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def edited(path: Path, **changes: Any) -> Path:
    """A checkpoint with other values under some names."""
    torch.save(load_checkpoint(path) | changes, path)
    return path


@pytest.mark.parametrize("name", OLD)
def test_an_old_cube_says_what_it_said(name: str, tmp_path: Path) -> None:
    old, path = OLD[name], unpacked(name, tmp_path) / "cube.nc"
    tree = open_cube(path)
    groups = groups_of(tree)
    assert groups is not None and seal_holds(path) is old.sealed
    assert (digest_of(tree.dataset), digest_of(groups)) == (old.digest, old.groups)
    assert LATER - set(tree.attrs) == old.without
    assert bool((tree["status"] == DONE).all()) and tree["status"].size == 8
    assert float(tree["bias_sq"].sum()) == pytest.approx(old.bias_sq, rel=1e-12)
    profile = profile_of(tree.to_dataset())
    assert profile.reference_budget == 300 and (profile.influence is not None) is old.influence
    save_cube(tree.to_dataset(), groups, tmp_path / "again.nc")
    assert digest_of(open_cube(tmp_path / "again.nc").dataset) == old.digest


@pytest.mark.parametrize("name", OLD)
def test_an_old_run_says_what_it_said(name: str, tmp_path: Path, call: Call) -> None:
    run = unpacked(name, tmp_path) / "run"
    found = list_checkpoints(run)
    assert [(point.step, round(point.progress, 4)) for point in found] == [(0, 0.0), (16, 0.982)]
    rows = read_log(run)
    assert len(rows) == 17 and rows[-1]["step"] == 16 and 0.3 < rows[-1]["accuracy"] < 0.4
    setting, model, content = load_run(found[-1].path)
    assert content["samples"] == 128 and sum(p.numel() for p in model.parameters()) == 2784
    trained = train(setting, make_schedule("mixed", setting), run)  # is complete: goes on to where it is
    assert (trained.step, trained.accuracy) == (16, rows[-1]["accuracy"])
    found[-1].path.unlink()
    assert train(setting, make_schedule("mixed", setting), run).step == 16  # from its first checkpoint


@pytest.mark.parametrize("name", [name for name, old in OLD.items() if old.schedule])
def test_an_old_schedule_says_what_it_said(name: str, tmp_path: Path, call: Call) -> None:
    path = unpacked(name, tmp_path) / "schedule.json"
    schedule = load_schedule(path)
    first = str(schedule.stages[0].mixture[0][0])
    assert (json.loads(path.read_text())["schema_version"], first) == OLD[name].schedule
    code, out, _ = call("show", "schedule.json")
    assert code == 0 and first in out


@pytest.mark.parametrize("progress", ["fraction", pytest.param("trajectory", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OLD])
def test_commands_work_on_old_files(name: str, progress: str, tmp_path: Path, call: Call) -> None:
    old, before = OLD[name], (unpacked(name, tmp_path) / "cube.nc").read_bytes()
    code, out, err = call("show", "cube.nc")
    assert (code, err) == (0, "") and "8 of 8 cells done" in out and "40 to 40 samples" in out
    code, out, _ = call("show", "run/step-00000016.pt")
    assert code == 0 and "step 16, 128 samples, 98.2% of 300 units" in out
    code, out, err = call("optimize", "--budget", "1K", "--progress", progress, "--out", "new.json")
    assert code == 0 and "patch=" in out, err
    assert load_schedule("new.json").cube_digest == old.digest
    code, out, err = call("plot", "--run", "run")
    assert code == 0 and "report.html: open it" in out, err
    code, out, err = call("merge", "cube.nc", "cube.nc", "--out", "merged.nc")
    assert code == 0 and "8 of 8 cells" in out, err
    code, out, err = call("profile", "run", "--samples", 40, "-q")
    if old.goes_on:
        assert code == 0 and "0 cells measured, 8 reused" in out, err
    else:
        assert code == 1 and "holds another profile (another task_digest); use --overwrite" in err
        assert (tmp_path / "cube.nc").read_bytes() == before


def test_an_old_profile_is_measured_further(tmp_path: Path, call: Call) -> None:
    unpacked("first", tmp_path)
    code, out, err = call("profile", "run", "--samples", 64, "--only", "patch=14", "-q")
    assert code == 0 and "2 cells measured" in out, err
    tree = open_cube(tmp_path / "cube.nc")
    assert sorted(tree["n_samples"].values.ravel()) == [40] * 6 + [64] * 2
    assert call("optimize", "--budget", "1K", "--progress", "fraction")[0] == 0


def test_newer_files_are_refused_by_name(tmp_path: Path, call: Call) -> None:
    run = unpacked("sealed", tmp_path) / "run"
    tree = open_cube(tmp_path / "cube.nc")
    cube = tree.to_dataset()
    cube.attrs["schema_version"] = 2
    save_cube(cube, groups_of(tree), tmp_path / "cube.nc")
    with pytest.raises(CubeError, match=r"cube\.nc: schema version 2 is newer than 1, .*; upgrade gradscope"):
        open_cube(tmp_path / "cube.nc")
    schedule = tmp_path / "schedule.json"
    schedule.write_text(schedule.read_text().replace('"schema_version": 2', '"schema_version": 3'))
    with pytest.raises(
        ScheduleError, match=r"schedule\.json: schema_version: 3 is newer than 2, .*; upgrade gradscope"
    ):
        load_schedule(schedule)
    path = edited(run / "step-00000000.pt", format=2)
    with pytest.raises(CheckpointError, match=r"00\.pt: written by a newer gradscope \(format 2, known up to 1\)"):
        load_checkpoint(path)
    last = run / "step-00000016.pt"
    config = load_checkpoint(last)["config"]
    for command in (["optimize", "--budget", "1K"], ["plot"], ["show", "cube.nc"], ["profile", "run", "-q"]):
        code, _, err = call(*command)
        assert code == 1 and ("newer" in err) and "Traceback" not in err and err.count("\n") <= 3, err
    content = load_checkpoint(edited(last, config={**config, "novelty": 3}))
    with pytest.raises(CheckpointError, match=r"16\.pt: its configuration is not understood \(.*novelty"):
        config_of(content, last)


def test_a_newer_or_damaged_online_state_is_refused_by_name(tmp_path: Path, call: Call) -> None:
    last = unpacked("sealed", tmp_path) / "run" / "step-00000016.pt"
    setting = open_setting(config_of(load_checkpoint(last), last))
    edited(last, online={"version": 99})
    with pytest.raises(GradscopeError, match="version 99, newer than 2"):
        train(setting, AdaptiveRule(), last.parent)
