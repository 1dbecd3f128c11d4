"""Racing in the profile: samples where the decision is open, the same numbers whatever happens in between."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from gradscope import Grid, ProfileOptions, Strategy, profile
from gradscope.cube import DONE, FAILED, contenders_of
from gradscope.errors import Interrupted, TaskError
from gradscope.profiler import expected_work
from gradscope.tasks import PretrainTask
from tests.gradscope.tasks_for_tests import FailingTask, LineTask, make_checkpoints
from tests.gradscope.test_profiler import assert_identical

RACING = ProfileOptions(
    samples=192, seed=3, minimum=6, criterion="ca-mse", metric="euclidean", tolerance=0.1, confidence=0.95
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoints(tmp_path / "ckpt_dir")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    """The race that nothing disturbs."""
    path = tmp_path_factory.mktemp("whole")
    return profile(LineTask(), make_checkpoints(path / "ckpt_dir"), path / "cube.nc", options=RACING)[0]


def test_a_race_gives_each_cell_the_numbers_that_fixed_samples_give(
    folder: Path, tmp_path: Path, whole: xr.DataTree
) -> None:
    raced = whole
    counts = raced["n_samples"].values
    assert counts.min() >= 48 and counts.max() <= 192 and len(np.unique(counts)) > 2
    for samples in np.unique(counts):
        same = dataclasses.replace(RACING, samples=int(samples), allocation="fixed")
        fixed, _ = profile(LineTask(), folder, tmp_path / f"fixed-{samples}.nc", options=same)
        here = (raced["n_samples"] == samples) & (raced["status"] == DONE)
        for name in ("bias_sq", "variance", "norm_sq", "inner", "norm_sq_ref", "moment_cov", "inner_se"):
            np.testing.assert_array_equal(raced[name].where(here), fixed[name].where(here))


def test_the_reference_has_as_many_samples_as_what_is_paired_with_it(whole: xr.DataTree) -> None:
    reference = Strategy.parse(str(whole.attrs["reference"]))
    counts = whole["n_samples"].values.reshape(3, -1)
    assert (whole["n_samples"].sel(dict(reference)).values == counts.max(1)).all()


def test_a_race_spends_where_the_decision_is_open(folder: Path, tmp_path: Path) -> None:
    """The best cell of each checkpoint has the most samples of all, and fixed samples would have cost more."""
    raced, summary = profile(LineTask(), folder, tmp_path / "raced.nc", options=RACING)
    score = raced["ca_mse"].sel(metric="euclidean").values.reshape(3, -1)
    counts = raced["n_samples"].values.reshape(3, -1)
    for t in range(3):
        assert counts[t, score[t].argmin()] == counts[t].max()
    _, fixed = profile(
        LineTask(), folder, tmp_path / "fixed.nc", options=dataclasses.replace(RACING, allocation="fixed")
    )
    assert summary.units < 0.9 * fixed.units
    cells, least, most = expected_work(LineTask(), folder, tmp_path / "new.nc", RACING)
    assert cells == 18 and least < summary.units < most


def test_races_in_another_order_end_alike(folder: Path, tmp_path: Path, whole: xr.DataTree) -> None:
    backwards = dataclasses.replace(RACING, order=lambda strategies: list(reversed(strategies)))
    second, _ = profile(LineTask(), folder, tmp_path / "b.nc", options=backwards)
    assert_identical(whole, second)


@pytest.mark.parametrize("at", [3, 14, 40])
def test_a_killed_race_continues_to_the_same_cube(
    folder: Path, tmp_path: Path, at: int, whole: xr.DataTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradscope.profile_cube.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("gradscope.profile_cube.SAVE_SHARE", 0.0)
    calls = 0

    def stop(fraction: float, text: str) -> None:
        nonlocal calls
        calls += 1
        assert 0 <= fraction <= 1
        if calls == at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        profile(LineTask(), folder, tmp_path / "cube.nc", options=RACING, report=stop)
    resumed, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=RACING)
    assert_identical(whole, resumed)
    assert resumed.attrs["races_json"] == whole.attrs["races_json"]
    assert profile(LineTask(), folder, tmp_path / "cube.nc", options=RACING)[1].units == 0


def test_more_samples_continue_an_open_race_only(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    short = dataclasses.replace(RACING, samples=64, tolerance=0.0, confidence=0.9)
    first, _ = profile(LineTask(), folder, out, options=short)
    longer = dataclasses.replace(short, samples=256)
    second, _ = profile(LineTask(), folder, out, options=longer)
    grown = (second["n_samples"] > first["n_samples"]).values
    assert grown.any() and not grown.all()
    assert (first["n_samples"].values[grown] == 64).all()
    assert (second["bias_sq"].values[~grown] == first["bias_sq"].values[~grown]).all()


def test_new_strategies_race_against_the_best_one(folder: Path, tmp_path: Path) -> None:
    out, wider = tmp_path / "cube.nc", LineTask()
    first, _ = profile(LineTask(), folder, out, options=RACING)
    wider.grid = Grid({**LineTask.grid.axes, "noise": (0, 0.5, 1, 2)}, LineTask.grid.reference)
    second, summary = profile(wider, folder, out, options=RACING)
    assert (second["status"] == DONE).all() and summary.measured >= 6  # two new ones of each row
    kept = second.dataset.sel(noise=[0, 0.5, 2])
    assert (kept["n_samples"].values >= first["n_samples"].values).all()


def test_a_strategy_that_fails_leaves_the_race_to_the_others(folder: Path, tmp_path: Path) -> None:
    tree, summary = profile(FailingTask(), folder, tmp_path / "cube.nc", options=RACING)
    assert (tree["status"] == FAILED).sum() == 6 and (tree["status"] == DONE).sum() == 12
    assert len(summary.failures) == 6
    again, second = profile(FailingTask(), folder, tmp_path / "cube.nc", options=RACING)
    assert len(second.failures) == 6
    np.testing.assert_array_equal(again["bias_sq"], tree["bias_sq"])


def test_shared_work_is_counted_once(small_run: Path, tmp_path: Path) -> None:
    """MoCo-v3's key pass is spent once per patch size, and really made only that often."""
    task = PretrainTask.from_folder(small_run)
    calls = []
    targets = type(task.load(task.checkpoints(small_run)[0].path)).targets

    def counted(self, views, strategy):  # type: ignore[no-untyped-def]
        calls.append(strategy["patch"])
        return targets(self, views, strategy)

    options = ProfileOptions(samples=48, allocation="fixed", metrics=("euclidean",), estimator="subbatch")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gradscope.methods.mocov3.MoCoV3.targets", counted)
        _, summary = profile(task, small_run, tmp_path / "cube.nc", options=options)
    assert len(calls) == 2 + 5 * 3 * 2  # two to see that the loss repeats itself, then both patches of 15 sub-batches
    costs = {s: task.cost(s) for s in task.grid.strategies()}
    twice = sum(next(iter(task.shared_costs(s).values())) for s in costs if s["dropout"] == 0.5)
    assert summary.units == pytest.approx(5 * 48 * (sum(costs.values()) - twice))


def test_a_failing_cell_does_not_end_the_contest_of_the_others(folder: Path, tmp_path: Path) -> None:
    """With more samples an open race goes on as it would have without the failing strategy."""
    short = dataclasses.replace(RACING, samples=64, tolerance=0.0, confidence=0.9)
    longer = dataclasses.replace(short, samples=128)
    out = tmp_path / "cube.nc"
    profile(FailingTask(), folder, out, options=short)
    profile(FailingTask(), folder, out, options=short)
    grown, _ = profile(FailingTask(), folder, out, options=longer)
    at_once, _ = profile(FailingTask(), folder, tmp_path / "at-once.nc", options=longer)
    np.testing.assert_array_equal(
        grown["n_samples"].max(("keep", "noise")), at_once["n_samples"].max(("keep", "noise"))
    )
    assert (grown["n_samples"] > 64).any()


@pytest.mark.parametrize("at", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_race_of_newcomers_continues_to_the_same_cube(
    folder: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradscope.profile_cube.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("gradscope.profile_cube.SAVE_SHARE", 0.0)
    small, wide = LineTask(), LineTask()
    small.grid = Grid({"keep": ("all", "half"), "noise": (0, 2)}, LineTask.grid.reference)
    options = dataclasses.replace(RACING, tolerance=0.02, confidence=0.99)
    whole, _ = profile(small, folder, tmp_path / "whole.nc", options=options)
    profile(small, folder, tmp_path / "cube.nc", options=options)
    whole, _ = profile(wide, folder, tmp_path / "whole.nc", options=options)
    calls = 0

    def stop(fraction: float, text: str) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        profile(wide, folder, tmp_path / "cube.nc", options=options, report=stop)
    resumed, _ = profile(wide, folder, tmp_path / "cube.nc", options=options)
    assert_identical(whole, resumed)


def test_another_question_is_another_race(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    profile(LineTask(), folder, out, options=dataclasses.replace(RACING, samples=96))
    other = dataclasses.replace(RACING, samples=96, criterion="descent")
    second, summary = profile(LineTask(), folder, out, options=other)
    fresh, _ = profile(LineTask(), folder, tmp_path / "fresh.nc", options=other)
    assert summary.units > 0 and (second["n_samples"] >= fresh["n_samples"]).all()
    assert profile(LineTask(), folder, out, options=other)[1].units == 0


def test_checkpoints_with_the_same_bytes_race_apart(tmp_path: Path) -> None:
    folder = make_checkpoints(tmp_path / "twins", (5, 9))
    (folder / "step-9.pt").write_bytes((folder / "step-5.pt").read_bytes())
    twins, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=RACING)
    alone = make_checkpoints(tmp_path / "alone", (9,))
    (alone / "step-9.pt").write_bytes((folder / "step-9.pt").read_bytes())
    single, _ = profile(LineTask(), alone, tmp_path / "single.nc", options=RACING)
    before = twins["n_samples"].values[1] >= single["n_samples"].values[0]  # boundaries may add samples
    assert before.all() and len(np.unique(twins["n_samples"].values[1])) > 1


def test_reasons_of_failures_are_kept_as_long_as_the_cells_are_failed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    profile(FailingTask(), folder, out, options=dataclasses.replace(RACING, checkpoints=(0,)))
    _, summary = profile(FailingTask(), folder, out, options=dataclasses.replace(RACING, checkpoints=(1,)))
    assert len(summary.failures) == 4 and "out of memory, say" in str(summary.failures)


def test_sub_batches_of_different_sizes_are_refused(folder: Path, tmp_path: Path) -> None:
    class ShortLast(LineTask):
        def batches(self, size, seed):  # type: ignore[no-untyped-def]
            for m, (x, y) in enumerate(super().batches(size, seed)):
                yield (x, y) if m % 4 else (x[:5], y[:5])

    with pytest.raises(TaskError, match=r"sub-batches of \d and then of \d rows"):
        profile(ShortLast(), folder, tmp_path / "cube.nc", options=RACING)


def test_any_error_of_a_strategy_is_a_failed_cell(folder: Path, tmp_path: Path) -> None:
    class Odd(LineTask):
        def loss(self, model, batch, strategy, generator):  # type: ignore[no-untyped-def]
            if strategy["noise"] == 2:
                raise IndexError("list index out of range")
            return super().loss(model, batch, strategy, generator)

    tree, summary = profile(Odd(), folder, tmp_path / "cube.nc", options=RACING)
    assert (tree["status"] == FAILED).sum() == 6 and "IndexError: list index" in str(summary.failures)


def test_a_strategy_that_left_counts_again_once_it_has_the_samples(folder: Path, tmp_path: Path) -> None:
    """What is measured by name outside of the race neither enters its book nor makes a plain profile go on."""
    out = tmp_path / "cube.nc"
    tree, _ = profile(LineTask(), folder, out, options=RACING)
    cube = tree.to_dataset()
    names, counts = LineTask.grid.strategies(), cube["n_samples"].values.reshape(3, -1)
    before = contenders_of(cube, "euclidean")["ca-mse"]
    most = [int(counts[t][before[t]].max()) for t in range(3)]
    t, c = next((t, c) for t in range(3) for c in range(6) if not before[t, c])
    assert counts[t, c] < most[t]
    named = dataclasses.replace(RACING, only=(names[c],), checkpoints=(t,))
    fewer, _ = profile(LineTask(), folder, out, options=dataclasses.replace(named, samples=most[t] - 8))
    np.testing.assert_array_equal(contenders_of(fewer.to_dataset(), "euclidean")["ca-mse"], before)
    enough, _ = profile(LineTask(), folder, out, options=dataclasses.replace(named, samples=most[t]))
    expected = before.copy()
    expected[t, c] = True
    np.testing.assert_array_equal(contenders_of(enough.to_dataset(), "euclidean")["ca-mse"], expected)
    assert enough.attrs["races_json"] == tree.attrs["races_json"]
    changed = (enough["n_samples"] != tree["n_samples"]).values.reshape(3, -1)
    assert changed.sum() == 1 and changed[t, c]


def test_races_after_some_strategies_were_measured_by_name_are_the_same_races(
    folder: Path, tmp_path: Path, whole: xr.DataTree
) -> None:
    named = dataclasses.replace(RACING, samples=64, only=tuple(LineTask.grid.strategies()[1:3]))
    first, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=named)
    assert first.attrs["races_json"] == "{}" and int((first["status"] == DONE).sum()) == 6
    plain, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=RACING)
    assert plain.attrs["races_json"] == whole.attrs["races_json"]
    same = (plain["n_samples"] == whole["n_samples"]) & (whole["status"] == DONE)
    assert int(same.sum()) >= 12
    for name in ("bias_sq", "variance", "moment_cov", "influence"):
        np.testing.assert_array_equal(plain[name].where(same, 0), whole[name].where(same, 0))
    assert profile(LineTask(), folder, tmp_path / "cube.nc", options=RACING)[1].units == 0
