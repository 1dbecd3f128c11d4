"""Checkpoints profiled in jobs of their own and merged: the same cube, bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gradscope import ProfileOptions, merge_cubes, open_cube, profile, save_cube
from gradscope.cube import DONE, PENDING, digest_of
from gradscope.errors import UsageError
from gradscope.profiler import expected_work
from gradscope.races import Entry, RaceBook
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints

FIXED = ProfileOptions(samples=40, allocation="fixed", seed=3)
# Six strategies without a clear winner: the best one changes from checkpoint to checkpoint.
RACING = ProfileOptions(samples=160, seed=4, minimum=4, metric="euclidean", tolerance=0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoints(tmp_path / "ckpt_dir", (0, 5, 10, 20))


@pytest.mark.parametrize("options", [FIXED, RACING], ids=["fixed", "racing"])
def test_merged_parts_are_the_whole(folder: Path, tmp_path: Path, options: ProfileOptions) -> None:
    whole, spent = profile(LineTask(), folder, tmp_path / "whole.nc", options=options)
    parts = []
    for chosen in ((0, 2), (3,), (1,)):
        part = dataclasses.replace(options, checkpoints=chosen)
        tree, _ = profile(LineTask(), folder, tmp_path / "part.nc", options=part, overwrite=True)
        rows = tree["status"].values.reshape(4, -1)
        assert (rows[list(chosen)] == DONE).all() and (np.delete(rows, chosen, 0) == PENDING).all()
        assert list(tree["progress"].values) == [0, 0.25, 0.5, 1]
        parts.append(open_cube(tmp_path / "part.nc"))
    merged, groups = merge_cubes(parts)
    save_cube(merged, groups, tmp_path / "merged.nc")
    again, more = profile(LineTask(), folder, tmp_path / "merged.nc", options=options)
    assert digest_of(again.to_dataset()) == digest_of(whole.to_dataset())
    assert json.loads(again.attrs["races_json"]) == json.loads(whole.attrs["races_json"])
    boundaries = int((again["n_samples"] > merged["n_samples"]).sum())
    assert more.measured >= boundaries and (boundaries > 0) == options.racing
    assert again.attrs["units"] == pytest.approx(spent.units)


def test_only_checkpoints_that_are_there_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(FIXED, checkpoints=(3, 1, 1))
    assert expected_work(LineTask(), folder, tmp_path / "cube.nc", options)[0] == 12
    for chosen, message in (((4,), "no checkpoint 4; the 4 there are count from 0"), ((), "none is chosen")):
        with pytest.raises(UsageError, match=message):
            profile(LineTask(), folder, tmp_path / "cube.nc", options=dataclasses.replace(FIXED, checkpoints=chosen))
    assert not (tmp_path / "cube.nc").exists()


def test_what_two_parts_remember_of_one_checkpoints_race() -> None:
    rule = ("ca-mse", 0, 8, 0.05, 0.99, 1.5)
    early, late, other, elsewhere = RaceBook(), RaceBook(), RaceBook(), RaceBook()
    early.note("one", Entry(rule, ("a", "b"), 8, ("a", "b")))
    late.note("one", Entry(rule, ("a", "b"), 12, ("b",)))
    other.note("one", Entry(rule, ("a", "c"), 18, ("c",)))
    elsewhere.note("two", Entry(rule, ("a",), 8, ("a",)))
    book = RaceBook.read(early.text())
    book.join(late)
    book.join(elsewhere)
    assert book.races("one", rule) == [Entry(rule, ("a", "b"), 12, ("b",))] and len(book.races("two", rule)) == 1
    late.join(early)
    assert late.races("one", rule) == book.races("one", rule)
    book.join(other)  # those left in either go on against each other
    assert book.races("one", rule)[-1] == Entry(rule, ("b", "c"), 12, ("b", "c"))
    assert book.races("one", ("descent", *rule[1:])) == []
