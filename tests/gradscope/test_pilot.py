"""The profiled run in a profile: its budget in other cost models, verdicts of races, and what is not known of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from gradscope import ProfileOptions, Strategy, profile, profile_of
from gradscope.cube_costs import put_costs
from gradscope.errors import CubeError, TaskError
from gradscope.pilot import pilot_note
from gradscope.races import Entry, RaceBook
from schedulers import MOMENTS, Profile, Schedule, predict
from tests.gradscope.tasks_for_tests import LineTask, make_checkpoints

REFERENCE = LineTask.grid.reference
HALF, NOISY = Strategy(keep="half", noise=0), Strategy(keep="all", noise=2)
BUDGET = 1000.0
MIXED = [
    {"start": 0, "end": 1, "cost": 2, "mixture": [[dict(REFERENCE), 0.5], [dict(HALF), 0.25], [dict(NOISY), 0.25]]}
]
TWO = [
    {"start": 0, "end": 0.5, "cost": 1.5, "mixture": [[dict(HALF), 1]]},
    {"start": 0.5, "end": 1, "cost": 3, "mixture": [[dict(REFERENCE), 1]]},
]
OFF = Strategy(keep="all", noise=1)


class PaperTask(LineTask):
    def other_costs(self, strategy: Strategy) -> dict[str, float]:
        return {"paper": {0: 5.0, 0.5: 4.0, 2: 3.0}[strategy.number("noise")]}


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> xr.Dataset:
    """Known moments without doubt: half the tokens, more variance; costs of all three models."""
    folder = tmp_path_factory.mktemp("pilot")
    options = ProfileOptions(samples=24, allocation="fixed", metrics=("euclidean",))
    tree, _ = profile(PaperTask(), make_checkpoints(folder / "ckpt_dir"), folder / "cube.nc", options=options)
    strategies = LineTask.grid.strategies()
    seconds = dict(zip(strategies, (0.03, 0.02, 0.01, 0.04, 0.02, 0.005), strict=True))  # keep=half is no faster
    made = put_costs(tree.to_dataset(), {"seconds": seconds}, {"device": "a device"})
    variance = np.array([10.0, 12, 16, 14, 18, 25]).reshape(2, 3)
    for name, value in zip(MOMENTS, (0.0, variance, 1.0, 1.0, 1.0), strict=True):
        made[name].values[:] = np.broadcast_to(np.asarray(value), (2, 3))[..., None] + np.zeros(made[name].shape)
    made["moment_cov"].values[:] = 1e-12 * np.eye(len(MOMENTS))
    made["influence"].values[:] = 0
    return made


def told(cube: xr.Dataset, **training: object) -> xr.Dataset:
    return cube.assign_attrs(training_json=json.dumps({"budget": BUDGET, **training}))


def run_in(found: Profile) -> float:
    """Where the profiled run itself gets to when it spends its budget."""
    assert found.pilot is not None and found.reference_budget is not None
    return predict(found, Schedule(stages=found.pilot), found.reference_budget)[-1]


@pytest.mark.parametrize("model", ["tokens", "paper", "measured"])
def test_a_mixed_run_gets_to_its_own_end_in_every_cost_model(cube: xr.Dataset, model: str) -> None:
    found = profile_of(told(cube, stages=MIXED), metric="euclidean", cost_model=model)
    samples = BUDGET / (0.5 * 3 + 0.25 * 1.5 + 0.25 * 1)
    cost = {
        "tokens": 0.5 * 3 + 0.25 * 1.5 + 0.25 * 1,
        "paper": 0.5 * 5 + 0.25 * 5 + 0.25 * 3,
        "measured": 3 / 0.03 * (0.5 * 0.03 + 0.25 * 0.04 + 0.25 * 0.01),
    }[model]
    assert found.reference_budget == pytest.approx(samples * cost)
    assert run_in(found) == pytest.approx(1, rel=1e-9)
    assert found.progress.tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(("stages", "expected"), [(TWO, 500 / 1.5 * 5 + 500 / 3 * 5), (None, BUDGET / 3 * 5)])
def test_stages_keep_their_samples_and_an_unknown_run_is_one_without_acceleration(
    cube: xr.Dataset, stages: list[dict[str, object]] | None, expected: float
) -> None:
    cube = told(cube) if stages is None else told(cube, stages=stages)
    assert profile_of(cube, metric="euclidean", cost_model="paper").reference_budget == pytest.approx(expected)


def test_a_run_off_the_grid_or_without_cost_has_no_budget_in_other_units_and_a_note(cube: xr.Dataset) -> None:
    on = told(cube, stages=MIXED)
    assert pilot_note(profile_of(on, metric="euclidean")) == ""
    partly = told(cube, stages=[{**MIXED[0], "mixture": [[dict(REFERENCE), 0.5], [dict(OFF), 0.5]]}])
    by_tokens = profile_of(partly, metric="euclidean")
    assert by_tokens.reference_budget == BUDGET  # that is how it was counted
    note = pilot_note(by_tokens)
    assert "off this grid (keep=all,noise=1)" in note and "under its others alone" in note and "units" not in note
    whole = told(cube, stages=[{**MIXED[0], "mixture": [[dict(OFF), 1]]}])
    assert "as if without acceleration" in pilot_note(profile_of(whole, metric="euclidean"))
    by_paper = profile_of(partly, metric="euclidean", cost_model="paper")
    assert by_paper.reference_budget is None
    assert "budget in units of the cost model paper is not known" in pilot_note(by_paper)
    some = put_costs(on, {"seconds": {REFERENCE: 0.03, HALF: 0.02}}, {"device": "another"})
    by_time = profile_of(some, metric="euclidean", cost_model="measured")
    assert by_time.reference_budget is None
    assert "trained under keep=all,noise=2, without known cost in the model measured" in pilot_note(by_time)


def test_verdicts_of_races_bind_the_costs_they_went_by_alone(cube: xr.Dataset) -> None:
    book = RaceBook()
    names = tuple(map(str, LineTask.grid.strategies()))
    for digest, step in zip(cube["checkpoint_sha256"].values, cube["step"].values, strict=True):
        book.note(f"{str(digest)[:16]}:{step}", Entry(("descent", 0), names, 8, (str(HALF),)))
    counts = cube["n_samples"].copy()
    counts.loc[{"keep": "half", "noise": 0}] = 1024  # the others left the race with fewer
    raced = cube.assign_attrs(races_json=book.text()).assign(n_samples=counts)
    noisiest = LineTask.grid.strategies().index(Strategy(keep="half", noise=2))

    def best(model: str, dataset: xr.Dataset) -> int:
        found = profile_of(dataset, metric="euclidean", cost_model=model)
        return int(found.scores("descent", [0.5])[0][0].argmax())

    assert best("tokens", raced) == LineTask.grid.strategies().index(HALF)
    assert best("measured", raced) == best("measured", cube) == noisiest


def test_strategies_of_the_same_moments_score_the_same_whatever_their_samples(cube: xr.Dataset) -> None:
    noisy = cube.copy(deep=True)
    correlated = np.eye(5) + 0.3 * (1 - np.eye(5))
    for noise, size in ((0, 0.04), (0.5, 9.0), (2, 0.25)):
        noisy["moment_cov"].loc[{"noise": noise}] = size * correlated
    noisy["variance"].values[:] = 10.0
    noisy["moment_cov"].values[2, 0, 0] = 0  # of a reference known exactly
    found = profile_of(noisy, metric="euclidean")
    shared = 0.04
    assert found.covariance is not None
    norm = MOMENTS.index("norm_sq_ref")
    np.testing.assert_allclose(found.covariance[:2, :, norm, norm], shared)
    assert (found.covariance[2, :, norm, :] == 0).all()
    assert (np.linalg.eigvalsh(found.covariance) > -1e-12).all()
    others = [i for i in range(5) if i != norm]
    own = noisy["moment_cov"].values.reshape(3, 6, 5, 5)
    np.testing.assert_array_equal(found.covariance[..., others, :][..., others], own[..., others, :][..., others])
    deviation = np.sqrt(np.diagonal(found.covariance[0], axis1=1, axis2=2))
    np.testing.assert_allclose(found.covariance[0] / (deviation[:, :, None] * deviation[:, None]), [correlated] * 6)
    score = found.scores("ca-mse", [0, 0.5])[0] / found.cost  # variance over norm alone differs by the cost
    np.testing.assert_allclose(score, np.broadcast_to(score[:, :1], score.shape))


@pytest.mark.parametrize("budget", ["2M", True, 0, -5, float("nan"), float("inf"), [3]])
def test_a_budget_that_is_none_is_the_tasks_error(tmp_path: Path, budget: object) -> None:
    class Odd(LineTask):
        def training(self, folder: Path) -> dict[str, object]:
            return {"budget": budget}

    with pytest.raises(TaskError, match=r"training: budget: .* must be a positive number of units; leave out"):
        profile(Odd(), make_checkpoints(tmp_path / "ckpt_dir"), tmp_path / "cube.nc")
    assert not (tmp_path / "cube.nc").exists()


def test_stages_on_other_axes_are_the_tasks_error(tmp_path: Path, cube: xr.Dataset) -> None:
    stages = [{"start": 0, "end": 1, "cost": 2, "mixture": [[{"patch": 4}, 1]]}]

    class Odd(LineTask):
        def training(self, folder: Path) -> dict[str, object]:
            return {"stages": stages}

    with pytest.raises(TaskError, match=r"training: stages: patch=4 has other axes than the grid \(keep, noise\)"):
        profile(Odd(), make_checkpoints(tmp_path / "ckpt_dir"), tmp_path / "cube.nc")
    with pytest.raises(CubeError, match="training_json: stages: patch=4 has other axes"):
        profile_of(told(cube, stages=stages), metric="euclidean")
    with pytest.raises(CubeError, match="training_json: budget: '2M' must be a positive number"):
        profile_of(cube.assign_attrs(training_json='{"budget": "2M"}'), metric="euclidean")
