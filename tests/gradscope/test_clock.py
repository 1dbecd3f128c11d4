"""A clock that jumps back by years, or far ahead, changes no result, stops nothing, and reorders nothing."""

from __future__ import annotations

import datetime
import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gradscope.locks
import gradscope.profile_cube
from gradscope import ProfileOptions, open_cube, profile
from gradscope.checkpoints import list_steps, load_checkpoint
from gradscope.cli.run_settings import make_schedule
from gradscope.locks import sole_writer
from gradscope.trainer import read_log, train
from gradscope.watch import Sources
from tests.gradscope.small_methods import small_setting
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints
from tests.gradscope.test_profiler import assert_identical

YEARS = (2030, 1971, 2200, 1999)


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the date finds another year; the clock that only counts seconds goes on as it does."""
    years = itertools.cycle(YEARS)
    stamp = (datetime.datetime(year, 6, 1).timestamp() for year in years)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.fromtimestamp(next(stamp), tz)

    monkeypatch.setattr(time, "time", lambda: next(stamp))
    monkeypatch.setattr(gradscope.profile_cube, "datetime", Jumping)
    monkeypatch.setattr(gradscope.locks.datetime, "datetime", Jumping)


def test_a_profile_is_the_same(tmp_path: Path, jumping: None) -> None:
    folder, options = make_checkpoints(tmp_path / "ckpt_dir"), ProfileOptions(samples=40, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradscope.profile_cube, "datetime", datetime.datetime)
        profile(LineTask(), folder, tmp_path / "whole.nc", options=options)
    for number, path in enumerate(sorted(folder.iterdir())):  # the newest by its date is the first by its step
        os.utime(path, (1e9 - 1e8 * number, 4e9 - 1e8 * number))
    profile(LineTask(), folder, tmp_path / "cube.nc", options=options)
    assert_identical(open_cube(tmp_path / "cube.nc"), open_cube(tmp_path / "whole.nc"))


def test_training_goes_on_from_its_furthest_checkpoint(tmp_path: Path, jumping: None) -> None:
    setting = small_setting("mocov3", budget=400.0, checkpoints=(0.0, 0.5))
    train(setting, make_schedule("mixed", setting), tmp_path / "run")
    whole = load_checkpoint(list_steps(tmp_path / "run")[-1])
    assert all(0 <= row["seconds"] < 1e5 for row in read_log(tmp_path / "run"))
    list_steps(tmp_path / "run")[-1].unlink()
    for number, path in enumerate(list_steps(tmp_path / "run")):
        os.utime(path, (5e8 - number, 5e8 - number))
    train(setting, make_schedule("mixed", setting), tmp_path / "run")
    found = load_checkpoint(list_steps(tmp_path / "run")[-1])
    assert found["step"] == whole["step"] and 0 <= found["seconds"] < 1e5
    assert all(torch.equal(found["model"][name], value) for name, value in whole["model"].items())


def test_a_lock_of_the_future_binds_nobody(tmp_path: Path, jumping: None) -> None:
    for _ in YEARS:
        with sole_writer(tmp_path / "cube.nc"):
            os.utime(tmp_path / ".cube.nc.lock", (7e9, 7e9))


def test_a_file_that_was_replaced_is_seen_whatever_its_date(tmp_path: Path) -> None:
    sources, path = Sources(tmp_path / "cube.nc", tmp_path / "schedule.json", [tmp_path]), tmp_path / "cube.nc"
    seen = []
    for content, date in ((b"one", 2e9), (b"two", 2e9), (b"six", 1e9), (b"ten", 2e9)):
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", (date, date))
        os.replace(tmp_path / "new", path)
        seen.append(sources.stamp())
        assert sources.stamp() == seen[-1]
    assert all(before != after for before, after in itertools.pairwise(seen))
