"""The probes of an online run as a cube: what was measured, by which run, also of one that was continued."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from gradscope import Grid
from gradscope.cube import DONE, FAILED, PENDING, open_cube, profile_of
from gradscope.errors import CubeError
from gradscope.pilot import training_of
from gradscope.task import task_digest
from schedulers import MOMENTS
from tests.gradscope.adaptive_loops import BATCH, GRID, HALF, PROBES, QUARTER, WHOLE, Loop, Spy, new_loop, seed_all

UNLIKE = {"created_at"}  # attributes that tell times
SHORT = 3000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cube.nc"


def opened(path: Path) -> xr.Dataset:
    return open_cube(path).to_dataset()


def assert_same_cube(first: Path, second: Path) -> None:
    """Every variable of both datasets and every attribute, but for times."""
    for group in ("/", "/param_groups"):
        a, b = (open_cube(p)[group].to_dataset() for p in (first, second))
        xr.testing.assert_identical(a.drop_attrs(), b.drop_attrs())
    a, b = opened(first), opened(second)
    assert {k: v for k, v in a.attrs.items() if k not in UNLIKE} == {
        k: v for k, v in b.attrs.items() if k not in UNLIKE
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loop, Path]:
    """A run and its cube; its first probe is told apart by hand."""
    path = tmp_path_factory.mktemp("finished") / "cube.nc"
    loop = new_loop(cube=path, budget=SHORT).all()
    loop.controller.write_cube()
    return loop, path


def test_every_probe_is_a_point_of_progress(finished: tuple[Loop, Path]) -> None:
    loop, path = finished
    cube, records = opened(path), loop.controller.probes
    assert len(records) >= 3 and cube.sizes["progress"] == len(records)
    assert list(cube["step"].values) == [r.step for r in records]
    # the fraction after the probe was paid for, at which it decided
    np.testing.assert_allclose(cube["progress"].values, [r.fraction for r in records], rtol=1e-12)
    assert np.all(np.diff(cube["progress"].values) > 0) and (cube["status"] == DONE).all()
    assert list(cube["keep"].values) == [0.25, 0.5, 1]
    assert cube["n_samples"].max() == max(r.sub_batches for r in records) * BATCH
    assert cube.attrs["source"] == "gradscope online" and cube.attrs["batch_size"] == BATCH
    assert cube.attrs["task_digest"] == task_digest(loop.controller.task)


def test_its_moments_are_those_that_the_policy_scored(finished: tuple[Loop, Path]) -> None:
    """At the first probe nothing is pooled yet; alignments are the posterior that `schedulers.evidence` tells of."""
    loop, path = finished
    record, cube = loop.controller.probes[0], opened(path).isel(progress=0).sel(metric="optimizer")
    profile = profile_of(opened(path), metric="optimizer")
    score_C = profile.scores("descent", profile.progress[:1])[0][0]
    whole = float(cube["norm_sq_ref"].sel(keep=1))
    assert whole > float(cube["norm_sq_ref_se"].sel(keep=1))
    keep = [0.25, 0.5]
    cells = cube.sel(keep=keep)
    inner, square = cells["inner"].values, cells["norm_sq_ref"].values
    psi = cells["influence"].transpose("moment", "keep", "replicate").values
    log = np.log([loop.controller.policy.costs[WHOLE] / loop.controller.policy.costs[s] for s in (QUARTER, HALF)])
    follow = cube["influence"].sel(keep=1).transpose("moment", "replicate").values[4]
    moves = (psi[3] - psi[4] + 0.25 * log[:, None] * follow) / whole  # of inner, norm_sq_ref
    noise, alone = moves @ moves.T, 2 / (2 + record.sub_batches - 1)
    noise = (1 - alone) * noise + alone * np.diag(np.diag(noise))
    prior = 0.15**2 * np.outer(log, log) + 0.1**2 * np.eye(2)
    apart = (inner - square) / whole
    posterior = -0.25 * log + prior @ np.linalg.inv(prior + noise) @ (apart + 0.25 * log)
    for row, strategy in enumerate((QUARTER, HALF)):
        aligned = whole * (1 + posterior[row])
        expected = score_C[row] * aligned * abs(aligned) / (inner[row] * abs(inner[row]))
        assert record.scores[str(strategy)] == pytest.approx(expected, rel=1e-3)
    assert record.scores[str(WHOLE)] == pytest.approx(score_C[2], rel=1e-6)


def test_it_knows_how_the_run_was_trained(finished: tuple[Loop, Path]) -> None:
    loop, path = finished
    cube = opened(path)
    assert cube.attrs["units"] == pytest.approx(loop.controller.probe_units)
    training = training_of(cube)
    assert training["schedule"] == "online" and training["budget"] == SHORT
    assert sorted(training["strategies"]) == sorted(map(str, GRID.strategies()))
    stages = json.loads(cube.attrs["training_json"])["stages"]
    assert [s["start"] for s in stages] == [d.fraction for d in loop.controller.decisions]
    assert stages[-1]["mixture"] == [[{"keep": 1}, 1.0]]


def test_it_is_read_for_the_batch_of_the_run_whatever_its_sub_batches_were(path: Path) -> None:
    loop = new_loop({**PROBES, "sub_batch": 2 * BATCH}, cube=path, budget=SHORT).all()
    loop.controller.write_cube()
    assert opened(path).attrs["batch_size"] == 2 * BATCH
    profile = profile_of(opened(path))
    assert profile.batch_size == BATCH == loop.controller.policy.batch_size
    assert profile.beta == BATCH * loop.controller.policy.costs[GRID.reference]


@pytest.mark.parametrize("value", ["abc", "64", True, 0, -3, 2.5, [1], None, float("nan")])
def test_a_damaged_batch_of_the_run_is_a_cube_error(value: Any, finished: tuple[Loop, Path]) -> None:
    cube = opened(finished[1])
    training = {**training_of(cube), "batch_size": value}
    with pytest.raises(CubeError, match=r"training_json is damaged \(batch_size="):
        profile_of(cube.assign_attrs(training_json=json.dumps(training)))
    cube = cube.assign_attrs(source="gradscope profile", training_json=json.dumps(training))
    assert profile_of(cube).batch_size == BATCH  # what other tasks tell of their training is theirs


def test_its_moments_are_signed_and_known(finished: tuple[Loop, Path]) -> None:
    cube = opened(finished[1])
    assert set(cube["metric"].values) == {"euclidean", "optimizer"}
    for name in MOMENTS:
        assert np.isfinite(cube[name].values).all(), name
    assert (cube["inner_se"].sel(keep=HALF.number("keep")) > 0).all()


def test_what_failed_is_marked_and_said(path: Path) -> None:
    def trouble(now: Any, call: int) -> float:
        return float("nan") if now == QUARTER else 1.0

    spy = Spy()
    loop = new_loop(spy=spy, cube=path, budget=SHORT)
    spy.trouble = trouble
    loop.all().controller.write_cube()
    cube = opened(path)
    status = cube["status"].sel(keep=0.25).values
    assert status[0] == FAILED and set(status) <= {FAILED, PENDING}
    assert (cube["status"].sel(keep=[0.5, 1]) == DONE).all()
    assert np.isnan(cube["inner"].sel(keep=0.25)).all()
    failures = json.loads(cube.attrs["failures_json"])
    assert len(failures) == int((status == FAILED).sum())
    for record, text in zip(loop.controller.probes, failures, strict=False):
        assert text == f"progress={record.fraction:g},keep=0.25" and "the loss is nan" in failures[text]


def test_what_a_small_cap_left_out_is_pending(path: Path) -> None:
    loop = new_loop({**PROBES, "overhead": 0.02}, cube=path, check=False).all()
    loop.controller.write_cube()
    cube = opened(path)
    assert min(record.strategies for record in loop.controller.probes) == 2
    for row, record in enumerate(loop.controller.probes):
        assert int((cube["status"][row] == DONE).sum()) == record.strategies
    assert (cube["status"].sel(keep=1) == DONE).all()


def test_a_blank_probe_leaves_no_point(path: Path) -> None:
    spy = Spy()
    loop = new_loop(spy=spy, cube=path).until(2)
    spy.trouble = lambda now, call: float("nan")
    loop.all().controller.write_cube()
    assert len(loop.controller.probes) == 5 and opened(path).sizes["progress"] == 2


def continued(path: Path, at: int, **options: Any) -> Loop:
    """A run that is stopped after step `at`, whose last state is lost, and continued from half as far."""
    seed_all()
    first = new_loop(cube=path, budget=SHORT, **options)
    kept: dict[str, Any] = {}
    first.streams = False
    while first.controller.step < at:
        if first.controller.step == at // 2:
            parts = {"model": first.model, "optimizer": first.optimizer, "controller": first.controller}
            kept = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
        assert first.once()
    lost = len(first.controller.probes)
    first.controller.write_cube()
    part = new_loop(cube=path, budget=SHORT, **options)
    part.streams = False
    part.model.load_state_dict(kept["model"])
    part.optimizer.load_state_dict(kept["optimizer"])
    part.controller.load_state_dict(kept["controller"])
    assert len(part.controller.probes) < lost
    return part.all()


@pytest.mark.parametrize("at", [pytest.param(at, marks=pytest.mark.slow) for at in (60, 110)])
def test_the_cube_of_a_continued_run_is_that_of_one_that_went_on(at: int, tmp_path: Path) -> None:
    """Probes after the point from which it goes on are made once more, and their old rows go."""
    seed_all()
    whole = new_loop(cube=tmp_path / "whole.nc", budget=SHORT)
    whole.streams = False
    whole.all()
    part = continued(tmp_path / "part.nc", at)
    assert part.controller.decisions == whole.controller.decisions
    for loop in (whole, part):
        loop.controller.write_cube()
    assert_same_cube(tmp_path / "whole.nc", tmp_path / "part.nc")


@pytest.mark.parametrize(
    "change", ["seed", *(pytest.param(c, marks=pytest.mark.slow) for c in ("grid", "budget", "optimizer", "maximum"))]
)
def test_the_cube_of_an_earlier_run_is_replaced_by_a_new_one(change: str, path: Path) -> None:
    """A controller that begins writes its own probes alone, also where the old ones were made at earlier steps."""
    rule, small = {**PROBES, "start": 0.1}, Grid({"keep": (0.5, 1)}, reference=WHOLE)
    changes: dict[str, dict[str, Any]] = {
        "budget": {}, "grid": {"grid": small}, "optimizer": {"optimizer": "SGD"},
        "maximum": {"rule": {**rule, "start": 0.0, "maximum": 5}}, "seed": {"seed": 7},
    }  # fmt: skip
    before = new_loop(**{"rule": {**rule, "start": 0.0}, "budget": 4000, "cube": path, **changes[change]}).until(1)
    before.controller.write_cube()
    assert opened(path).sizes["progress"] == 1
    loop = new_loop(rule, cube=path, budget=5000).until(2)
    loop.controller.write_cube()
    cube = opened(path)
    first, old = loop.controller.probes[0], before.controller.probes[0]
    assert old.step < first.step and old.fraction < first.fraction
    assert list(cube["step"].values) == [r.step for r in loop.controller.probes]
    assert cube.sizes["keep"] == 3


def test_no_file_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new_loop(budget=2000).all().controller.write_cube()
    assert not list(tmp_path.iterdir())
