"""The profile: right numbers, the same numbers in any order and after any interruption, failures that stay local."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from gradscope import Grid, ProfileOptions, Strategy, open_cube, profile, profile_of
from gradscope.checkpoints import load_checkpoint
from gradscope.cube import DONE, FAILED, PENDING, digest_of
from gradscope.engines import derive_seed
from gradscope.errors import BusyError, CheckpointError, CubeError, Interrupted, TaskError, UsageError
from gradscope.files import file_digest
from gradscope.locks import sole_writer
from gradscope.profiler import expected_work
from gradscope.task import numbered_checkpoints
from gradscope.tasks import PretrainTask
from schedulers import CRITERIA, Schedule
from tests.gradscope.tasks_for_tests import FailingTask, LineTask, make_checkpoints

OPTIONS = ProfileOptions(samples=40, allocation="fixed", seed=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoints(tmp_path / "ckpt_dir")


def test_a_cell_is_the_plain_formula_on_gradients_by_backward(folder: Path, tmp_path: Path) -> None:
    tree, _ = profile(LineTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    task, strategy, m_total = LineTask(), Strategy(keep="half", noise=0.5), 5
    model = task.load(folder / "step-5.pt")
    rows: dict[Strategy, list[torch.Tensor]] = {strategy: [], task.grid.reference: []}
    for m, batch in zip(range(m_total), task.batches(8, 3), strict=False):
        for s, gradients in rows.items():
            seed = derive_seed(3, 5, m, s)
            torch.manual_seed(seed)
            loss = task.loss(model, batch, s, torch.Generator().manual_seed(seed))
            gradients.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
            )
    g, z = (torch.stack(rows[s]) for s in rows)
    d = g - z
    cell = tree.dataset.sel(progress=0.5, keep="half", noise=0.5, metric="euclidean")
    spread = (g - g.mean(0)).square().sum()
    assert float(cell["variance"]) == pytest.approx(float(8 / 4 * spread), rel=1e-5)
    noise = (d - d.mean(0)).square().sum() / (m_total * (m_total - 1))
    assert float(cell["bias_sq"]) == pytest.approx(float(d.mean(0).square().sum() - noise), rel=1e-4)
    assert float(cell["bias_sq_plugin"]) == pytest.approx(float(d.mean(0).square().sum()), rel=1e-5)
    expected = (max(float(cell["bias_sq"]), 0) + float(cell["variance"]) / 8 * (1.5 / 1.5) / 3) / float(
        cell["norm_sq_ref"]
    )
    assert float(cell["ca_mse"]) == pytest.approx(expected, rel=1e-6)


def test_a_cube_that_another_process_writes_is_left_alone(folder: Path, tmp_path: Path) -> None:
    cube = tmp_path / "cube.nc"
    with sole_writer(cube), pytest.raises(BusyError, match=r"cube\.nc: is being written by process"):
        profile(LineTask(), folder, cube, options=OPTIONS)
    assert not cube.exists()
    profile(LineTask(), folder, cube, options=OPTIONS)


def test_the_cube_is_complete_and_labelled(folder: Path, tmp_path: Path) -> None:
    profile(LineTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    tree = open_cube(tmp_path / "cube.nc")
    cube = tree.dataset
    assert cube["bias_sq"].dims == ("progress", "keep", "noise", "metric")
    assert list(cube["keep"].values) == ["all", "half"] and list(cube["progress"].values) == [0, 0.5, 1]
    assert (cube["status"] == DONE).all() and (cube["n_samples"] == 40).all()
    reference = cube.sel(keep="all", noise=0)
    assert (reference["bias_sq"] == 0).all() and (reference["bias_sq_se"] == 0).all()
    np.testing.assert_allclose(reference["norm_sq"], reference["norm_sq_ref"])
    groups = tree["param_groups"].dataset
    np.testing.assert_allclose(groups["variance"].sum("param_group"), cube["variance"], rtol=1e-6)
    variances = np.diagonal(cube["moment_cov"].values, axis1=-2, axis2=-1)
    np.testing.assert_allclose(np.sqrt(variances[..., 1]), cube["variance_se"].values, rtol=1e-6)


def test_order_of_cells_and_size_of_groups_change_nothing(folder: Path, tmp_path: Path) -> None:
    first, _ = profile(LineTask(), folder, tmp_path / "a.nc", options=OPTIONS)
    backwards = ProfileOptions(
        samples=40, allocation="fixed", seed=3, group_size=1, order=lambda strategies: list(reversed(strategies))
    )
    second, _ = profile(LineTask(), folder, tmp_path / "b.nc", options=backwards)
    assert_identical(first, second)


def assert_identical(first: xr.DataTree, second: xr.DataTree) -> None:
    for a, b in ((first.dataset, second.dataset), (first["param_groups"].dataset, second["param_groups"].dataset)):
        xr.testing.assert_identical(a.drop_attrs(), b.drop_attrs())
    assert digest_of(first.dataset) == digest_of(second.dataset)


@pytest.mark.parametrize("at", [1, 7, 16, 29, 45])
def test_a_killed_profile_continues_to_the_same_cube(folder: Path, tmp_path: Path, at: int) -> None:
    whole, _ = profile(LineTask(), folder, tmp_path / "whole.nc", options=OPTIONS)
    options = ProfileOptions(samples=40, allocation="fixed", seed=3, group_size=2)
    calls = 0

    def stop(fraction: float, text: str) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        profile(LineTask(), folder, tmp_path / "cube.nc", options=options, report=stop)
    assert stopped.value.exit_code == 143
    resumed, summary = profile(LineTask(), folder, tmp_path / "cube.nc", options=options)
    assert summary.reused + summary.measured == 18 and (summary.reused > 0) == (at > 5)
    assert_identical(whole, resumed)
    assert_identical(whole, open_cube(tmp_path / "cube.nc"))


def test_nothing_is_measured_twice_but_new_cells_and_more_samples_are(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    tree, summary = profile(LineTask(), folder, out, options=OPTIONS)
    assert tree.attrs["units"] == summary.units == expected_units([(0, 0.5, 2)], cells=18, second_moments=3)
    assert profile(LineTask(), folder, out, options=OPTIONS)[1].units == 0
    make_checkpoints(folder, (20,))
    tree, summary = profile(LineTask(), folder, out, options=OPTIONS)  # the finished cells move to other progress
    assert (summary.reused, summary.measured) == (18, 6)
    assert tree.attrs["units"] > summary.units > 0
    np.testing.assert_array_equal(tree["progress"], [0, 0.25, 0.5, 1])
    wider = LineTask()
    wider.grid = Grid({**LineTask.grid.axes, "noise": (0, 0.5, 1, 2)}, LineTask.grid.reference)
    assert expected_work(wider, folder, out, OPTIONS)[0] == 8
    _, summary = profile(wider, folder, out, options=OPTIONS)
    assert (summary.reused, summary.measured) == (24, 8)
    tree, summary = profile(wider, folder, out, options=ProfileOptions(samples=48, allocation="fixed", seed=3))
    assert summary.measured == 32 and (tree["n_samples"] == 48).all()


def expected_units(grids: list[tuple[float, ...]], *, cells: int, second_moments: int) -> float:
    """5 sub-batches of 8 samples in every cell, and 4 reference sub-batches for each estimated second moment."""
    each = sum(LineTask().cost(Strategy(keep=k, noise=n)) for noises in grids for k in ("all", "half") for n in noises)
    return 40 * each * cells / (2 * sum(map(len, grids))) + second_moments * 4 * 8 * 3


@pytest.mark.parametrize("change", ["gone", "rewritten"])
def test_measurements_of_checkpoints_that_are_gone_are_not_thrown_away_unasked(
    folder: Path, tmp_path: Path, change: str
) -> None:
    out = tmp_path / "cube.nc"
    profile(LineTask(), folder, out, options=OPTIONS)
    before = out.read_bytes()
    if change == "gone":
        (folder / "step-5.pt").unlink()
    else:
        (folder / "step-5.pt").write_bytes(b"other weights")
    with pytest.raises(
        CubeError, match=r"step-5.pt of the cell progress=0.5, .* is gone or has changed; use --overwrite"
    ):
        profile(LineTask(), folder, out, options=OPTIONS)
    assert out.read_bytes() == before
    _, summary = profile(LineTask(), folder, out, options=OPTIONS, overwrite=True)
    assert summary.reused == 0


def test_a_cell_that_fails_on_more_samples_keeps_its_measurement(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    first, _ = profile(LineTask(), folder, out, options=OPTIONS)

    class LaterFailing(FailingTask):
        def describe(self):  # type: ignore[no-untyped-def]
            return LineTask().describe()

    tree, summary = profile(LaterFailing(), folder, out, options=ProfileOptions(samples=48, allocation="fixed", seed=3))
    assert len(summary.failures) == 6
    kept = dict(keep="half", noise=2)
    assert (tree["status"].sel(kept) == DONE).all() and (tree["n_samples"].sel(kept) == 40).all()
    np.testing.assert_array_equal(tree["variance"].sel(kept), first["variance"].sel(kept))


def test_another_profiles_file_is_refused_by_name_of_the_change(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    profile(LineTask(), folder, out, options=OPTIONS)
    before = out.read_bytes()
    for options, name in (
        (ProfileOptions(samples=40, allocation="fixed", seed=4), "seed"),
        (ProfileOptions(samples=40, allocation="fixed", seed=3, batch_size=10), "batch_size"),
    ):
        with pytest.raises(CubeError, match=rf"another {name}.*--overwrite"):
            profile(LineTask(), folder, out, options=options)
    assert out.read_bytes() == before
    profile(LineTask(), folder, out, options=ProfileOptions(samples=40, allocation="fixed", seed=4), overwrite=True)
    assert open_cube(out).attrs["seed"] == 4


def test_failing_cells_are_marked_and_the_rest_is_measured(folder: Path, tmp_path: Path) -> None:
    tree, summary = profile(FailingTask(), folder, tmp_path / "cube.nc", options=OPTIONS)
    status = tree["status"]
    assert (status.sel(keep="half", noise=2) == FAILED).all() and (status.sel(keep="all", noise=2) == FAILED).all()
    assert int((status == DONE).sum()) == 12 and not (status == PENDING).any()
    assert np.isnan(tree["bias_sq"].sel(keep="half", noise=2)).all()
    assert summary.failures["progress=0.5,keep=half,noise=2"] == "RuntimeError: out of memory, say"
    assert "the loss is nan" in summary.failures["progress=0,keep=all,noise=2"]


def test_wrong_use_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"2 sub-batches of 8.*--samples 24"):
        profile(LineTask(), folder, tmp_path / "cube.nc", options=ProfileOptions(samples=16, allocation="fixed"))
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        profile(LineTask(), make_checkpoints(tmp_path / "empty", ()), tmp_path / "cube.nc")
    with pytest.raises(CheckpointError, match="no such folder"):
        profile(LineTask(), tmp_path / "absent", tmp_path / "cube.nc")

    class Short(LineTask):
        def batches(self, size, seed):  # type: ignore[no-untyped-def]
            yield next(super().batches(size, seed))

    with pytest.raises(TaskError, match="ended before 5 sub-batches"):
        profile(Short(), folder, tmp_path / "cube.nc", options=OPTIONS)
    assert not (tmp_path / "cube.nc").exists()


def test_bundled_checkpoints_profile_with_adams_moment(small_run: Path, tmp_path: Path) -> None:
    task = PretrainTask.from_folder(small_run)
    tree, _ = profile(task, small_run, tmp_path / "cube.nc", options=ProfileOptions(samples=48, allocation="fixed"))
    cube = tree.dataset
    assert (cube["status"] == DONE).all() and cube["status"].shape == (5, 2, 2)
    assert {"backbone.blocks.0", "projector", "predictor"} <= set(tree["param_groups"]["param_group"].values)
    assert list(cube["tokens_query"].sel(dropout=0.5).values) == [25, 9]
    assert float(cube["cost"].sel(cost_model="tokens", patch=4, dropout=0)) == 4
    assert "patch=7,dropout=0.5" in cube.attrs["training_json"]
    model = task.load(task.checkpoints(small_run)[2].path)
    moment = task.second_moment(task.checkpoints(small_run)[2].path, model)
    assert moment is not None and all(
        moment[name].shape == p.shape for name, p in model.named_parameters() if p.requires_grad
    )
    assert task.second_moment(task.checkpoints(small_run)[0].path, model) is None


def test_the_optimizer_metric_weighs_by_adams_own_second_moment(small_run: Path, tmp_path: Path) -> None:
    """A late cell against gradients by backward, weighed by v taken from an Adam that is rebuilt from its state."""
    task = PretrainTask.from_folder(small_run)
    tree, _ = profile(task, small_run, tmp_path / "cube.nc", options=ProfileOptions(samples=48, allocation="fixed"))
    checkpoint, strategy = task.checkpoints(small_run)[3], Strategy(patch=7, dropout=0.5)
    model = task.load(checkpoint.path)
    assert model.training
    content = load_checkpoint(checkpoint.path)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    adam = torch.optim.AdamW(list(named.values()), lr=1.0)
    adam.load_state_dict(content["optimizer"])
    state = [adam.state[p] for p in named.values()]
    v = torch.cat([(s["exp_avg_sq"] / (1 - 0.999 ** s["step"].item())).flatten() for s in state])
    weight = (1 / (v.sqrt() + 1e-8)).double()
    rows: dict[Strategy, list[torch.Tensor]] = {strategy: [], task.grid.reference: []}
    for m, batch in zip(range(3), task.batches(16, 0), strict=False):
        for s, gradients in rows.items():
            loss = task.loss(model, batch, s, torch.Generator().manual_seed(derive_seed(0, checkpoint.step, m, s)))
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(named.values()))]).double())
    g, z = (torch.stack(rows[s]) for s in rows)
    cell = tree.dataset.sel(patch=7, dropout=0.5, metric="optimizer").isel(progress=3)
    assert float(cell["variance"]) == pytest.approx(float(16 / 2 * (weight * (g - g.mean(0)) ** 2).sum()), rel=1e-4)
    plugin = float((weight * (g - z).mean(0) ** 2).sum())
    assert float(cell["bias_sq_plugin"]) == pytest.approx(plugin, rel=1e-4)


def test_the_metric_of_a_checkpoint_without_optimizer_state_uses_data_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Weights from the measured sub-batches would make the estimates biased: the profile must ask for another seed."""
    seeds: list[int] = []

    class Listening(LineTask):
        def batches(self, size, seed):  # type: ignore[no-untyped-def]
            seeds.append(seed)
            return super().batches(size, seed)

    profile(Listening(), folder, tmp_path / "cube.nc", options=OPTIONS)
    assert set(seeds) == {3, derive_seed("metric", 3) % 2**31, derive_seed("engine", 3) % 2**31}


@pytest.mark.parametrize("culprit", ["batches", "loss"])
def test_a_task_that_does_not_repeat_itself_is_told_what_does_not(folder: Path, tmp_path: Path, culprit: str) -> None:
    class Drifting(LineTask):
        calls = 0

        def batches(self, size, seed):  # type: ignore[no-untyped-def]
            self.calls += culprit == "batches"
            return super().batches(size, seed + (self.calls if culprit == "batches" else 0))

        def loss(self, model, batch, strategy, generator):  # type: ignore[no-untyped-def]
            self.calls += culprit == "loss"
            return super().loss(model, batch, strategy, generator) * (1 + (self.calls if culprit == "loss" else 0))

    message = {
        "batches": "gives other data when it is called again",
        "loss": "gives another gradient for the same batch",
    }
    with pytest.raises(TaskError, match=message[culprit]):
        profile(Drifting(), folder, tmp_path / "cube.nc", options=OPTIONS)


def test_a_loss_that_fails_under_the_reference_is_an_error_and_no_cube(folder: Path, tmp_path: Path) -> None:
    class Broken(LineTask):
        def loss(self, model, batch, strategy, generator):  # type: ignore[no-untyped-def]
            return model(batch[0] @ torch.zeros(3, 3)).mean()

    with pytest.raises(TaskError, match=r"the loss fails under the reference keep=all,noise=0: RuntimeError"):
        profile(Broken(), folder, tmp_path / "cube.nc", options=OPTIONS)
    with pytest.raises(UsageError, match="batch_size is 0"):
        profile(LineTask(), folder, tmp_path / "cube.nc", options=ProfileOptions(batch_size=0))
    assert not (tmp_path / "cube.nc").exists()


def test_checkpoints_out_of_order_are_refused_before_anything_is_measured(folder: Path, tmp_path: Path) -> None:
    class Twice(LineTask):
        def checkpoints(self, folder):  # type: ignore[no-untyped-def]
            return [dataclasses.replace(c, progress=0.5) for c in super().checkpoints(folder)]

    with pytest.raises(TaskError, match="increasing progress in"):
        profile(Twice(), folder, tmp_path / "cube.nc", options=OPTIONS)


def test_numbers_in_file_names(tmp_path: Path) -> None:
    for name in ("epoch=3-val=0.51.ckpt", "epoch=9-val=0.38.ckpt", "notes.txt", "last.ckpt"):
        (tmp_path / name).touch()
    found = numbered_checkpoints(tmp_path)
    assert [(c.step, c.progress) for c in found] == [(3, pytest.approx(1 / 3)), (9, 1)]
    (tmp_path / "ema-9.pt").touch()
    with pytest.raises(CheckpointError, match="have the same number"):
        numbered_checkpoints(tmp_path)


def test_a_folder_of_shards_is_one_checkpoint(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}" / "sub").mkdir(parents=True)
        (tmp_path / f"{i}" / "sub" / "a").write_bytes(b"x")
    assert file_digest(tmp_path / "0") == file_digest(tmp_path / "1")
    (tmp_path / "1" / "sub" / "a").write_bytes(b"y")
    assert file_digest(tmp_path / "0") != file_digest(tmp_path / "1")


def rows_of(cube: xr.Dataset, only: tuple[Strategy, ...]) -> xr.DataArray:
    """Mask (keep, noise) of some strategies."""
    mask = xr.zeros_like(cube["n_samples"].isel(progress=0, drop=True), dtype=bool)
    for strategy in only:
        mask.loc[dict(strategy)] = True
    return mask


ONLY = (Strategy(noise=0.5, keep="half"), Strategy(keep="all", noise=2))


def test_some_strategies_alone_have_the_numbers_of_a_profile_of_all(folder: Path, tmp_path: Path) -> None:
    whole, _ = profile(LineTask(), folder, tmp_path / "whole.nc", options=OPTIONS)
    some = ProfileOptions(samples=40, seed=3, only=ONLY, checkpoints=(0, 2))  # no race, whatever the allocation
    assert expected_work(LineTask(), folder, tmp_path / "cube.nc", some) == (4, 2 * 40 * 5.0, 2 * 40 * 5.0)
    tree, summary = profile(LineTask(), folder, tmp_path / "cube.nc", options=some)
    assert summary.measured == 4 and summary.units == 2 * (40 * 5.0 + 4 * 8 * 3)
    mask = rows_of(tree.dataset, ONLY) & tree["progress"].isin([0, 1])
    assert (tree["status"] == xr.where(mask, DONE, PENDING)).all()
    assert json.loads(tree.attrs["races_json"]) == {}
    for ours, theirs in ((tree.dataset, whole.dataset), *[[t["param_groups"].dataset for t in (tree, whole)]]):
        for name in (str(n) for n in ours.data_vars if "keep" in ours[n].dims and "progress" in ours[n].dims):
            if ours[name].dtype.kind == "f":
                xr.testing.assert_identical(ours[name].where(mask, 0), theirs[name].where(mask, 0))
    assert profile(LineTask(), folder, tmp_path / "cube.nc", options=some)[1].units == 0


def test_more_samples_for_some_strategies_leave_the_others_as_they_are(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cube.nc"
    before, _ = profile(LineTask(), folder, out, options=OPTIONS)
    more = ProfileOptions(samples=64, seed=3, only=ONLY, checkpoints=(1,))
    assert expected_work(LineTask(), folder, out, more)[0] == 2
    after, summary = profile(LineTask(), folder, out, options=more)
    fresh, _ = profile(LineTask(), folder, tmp_path / "fresh.nc", options=dataclasses.replace(OPTIONS, samples=64))
    assert (summary.measured, summary.reused) == (2, 16)
    mask = rows_of(after.dataset, ONLY) & (after["progress"] == 0.5)
    assert (after["n_samples"] == xr.where(mask, 64, 40)).all()
    for name in ("bias_sq", "variance_se", "moment_cov", "norm_sq_ref", "cell_key"):
        xr.testing.assert_identical(after[name].where(~mask), before[name].where(~mask))
        xr.testing.assert_identical(after[name].where(mask), fresh[name].where(mask))
    for metric in after["metric"].values:  # cells of one progress share a denominator, however many samples they have
        seen = profile_of(after.dataset, metric=str(metric))
        for criterion in CRITERIA:
            stored = [after[f"{criterion.replace('-', '_')}{part}"].sel(metric=metric) for part in ("", "_se")]
            for told, values in zip(seen.scores(criterion, seen.progress), stored, strict=True):
                np.testing.assert_array_equal(told.reshape(values.shape), values)
    assert json.loads(after.attrs["races_json"]) == {}
    fewer = dataclasses.replace(more, samples=48)
    assert profile(LineTask(), folder, out, options=fewer)[1].units == 0


def test_only_strategies_of_the_grid_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    for only, message in (
        ((Strategy(keep="all", noise=1),), "noise=1 is not on the grid; noise is one of 0, 0.5, 2"),
        ((Strategy(keep="all"),), "gives no value for axis 'noise'"),
        ((), "no strategy is chosen"),
    ):
        with pytest.raises(UsageError, match=message):
            profile(LineTask(), folder, tmp_path / "cube.nc", options=dataclasses.replace(OPTIONS, only=only))
    assert not (tmp_path / "cube.nc").exists()


def test_stages_that_make_no_schedule_are_the_tasks_error(folder: Path, tmp_path: Path) -> None:
    class Odd(LineTask):
        def training(self, folder):  # type: ignore[no-untyped-def]
            return {"stages": [{"start": 0, "end": 0.5, "cost": 3, "mixture": [[{"keep": "all", "noise": 0}, 1]]}]}

    with pytest.raises(TaskError, match=r"training: stages\[0\].end: 0.5 must be 1"):
        profile(Odd(), folder, tmp_path / "cube.nc", options=OPTIONS)


def test_the_pilot_of_a_bundled_run_is_its_schedule(small_run: Path, tmp_path: Path) -> None:
    task = PretrainTask.from_folder(small_run)
    options = ProfileOptions(samples=48, only=(task.grid.reference,), checkpoints=(0,), metrics=("euclidean",))
    tree, _ = profile(task, small_run, tmp_path / "cube.nc", options=options)
    found = profile_of(tree.to_dataset(), metric="euclidean").pilot
    trained = Schedule.from_json(load_checkpoint(task.checkpoints(small_run)[-1].path)["schedule"])
    assert found is not None and len(found) == 1 and len(found[0].mixture) == 4
    assert [(s.start, s.end, s.mixture, s.cost) for s in found] == [
        (s.start, s.end, s.mixture, s.cost) for s in trained.stages
    ]
