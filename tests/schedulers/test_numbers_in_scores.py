"""Moments of any size, zero or missing: scores are numbers or NaN, never a warning; a schedule or a clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from schedulers import CRITERIA, Grid, Moments, Profile, Strategy, optimize
from schedulers.criteria import FloatArray, criterion_se, readable
from schedulers.errors import UsageError
from schedulers.racing import boundary_cells

GIVEN: dict[str, Any] = {"beta": 24.0, "batch_size": 8, "reference_cost": 3.0}
ODD = np.array(
    [0, 1, -1, 2, 0.5, 1e-20, 1e20, 1e-150, 1e150, 1e-300, -1e-300, 1e300, -1e300, 5e-324, 1.7e308, np.nan, np.inf]
)
COST = np.array([3.0, 2.0, 1.0])
EVERY = pytest.mark.parametrize("criterion", list(CRITERIA))


@EVERY
@pytest.mark.parametrize("factor", [1e-300, 1e-120, 1e120, 1e290])
def test_scores_and_their_errors_do_not_depend_on_the_unit_of_gradients(criterion: str, factor: float) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 2, (5, 40)) * rng.choice([-1, 1], (5, 40), p=[0.1, 0.9])
    plain, scaled = Moments(*values), Moments(*(values * factor))
    score = CRITERIA[criterion].score
    np.testing.assert_allclose(score(scaled, 2.0, **GIVEN), score(plain, 2.0, **GIVEN), rtol=1e-12)
    if abs(np.log10(factor)) < 150:  # beyond it float64 does not hold a covariance
        spread = np.eye(5) * (0.01 * np.moveaxis(values, 0, -1)[..., None]) ** 2
        expected = criterion_se(criterion, plain, spread, 2.0, **GIVEN)
        found = criterion_se(criterion, scaled, spread * factor**2, 2.0, **GIVEN)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@EVERY
def test_no_moments_make_a_warning_or_an_infinite_score(criterion: str) -> None:
    rng, score = np.random.default_rng(1), CRITERIA[criterion].score
    for _ in range(300):
        moments = Moments(*(rng.choice(ODD, 9) for _ in range(5)))
        spread = np.zeros((9, 5, 5))
        spread[:, range(5), range(5)] = rng.choice([0, 1e-300, 1e-20, 1, 1e300, np.nan], (9, 5))
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            for found in (moments, readable(moments, spread)):
                assert not np.isinf(score(found, 2.0, **GIVEN)).any()
            assert not np.isinf(criterion_se(criterion, moments, spread, 2.0, **GIVEN)).any()


def test_a_strategy_without_a_gradient_gains_nothing() -> None:
    zero = Moments(*np.array([1.0, 0, 0, 0, 1]))  # its bias is the whole reference gradient
    assert [float(CRITERIA[name].score(zero, 1.0, **GIVEN)) for name in CRITERIA] == [1.0, 0.0, 0.0]
    assert float(criterion_se("descent", zero, np.zeros((5, 5)), 1.0, **GIVEN)) == 0
    nothing = Moments(*np.zeros(5))  # nor has the reference: nothing can be said
    assert all(np.isnan(criterion.score(nothing, 1.0, **GIVEN)) for criterion in CRITERIA.values())


Change = Callable[[dict[str, FloatArray]], None]


def profile_with(change: Change, *, errors: bool = True) -> Profile:
    """Three points, three strategies, the first the reference; `change` edits the moments in place."""
    rng = np.random.default_rng(2)
    ones = np.ones((3, 3))
    moments = {
        "bias_sq": rng.uniform(0.1, 1, (3, 3)), "variance": rng.uniform(4, 8, (3, 3)), "norm_sq": 1.2 * ones,
        "inner": rng.uniform(0.5, 1, (3, 3)), "norm_sq_ref": ones.copy(),
    }  # fmt: skip
    change(moments)
    spread = np.eye(5) * (0.1 * np.stack(list(moments.values()), -1)[..., None]) ** 2
    return Profile(
        grid=Grid({"mode": (0, 1, 2)}, Strategy(mode=0)), progress=np.array([0.0, 0.4, 1.0]), cost=COST,
        moments=Moments(**moments), covariance=spread if errors else None, batch_size=8, beta=24.0,
        metric="euclidean", cost_model="tokens", digest="d", reference_budget=1000.0,
    )  # fmt: skip


def at(point: Any, value: float, *names: str) -> Change:
    def change(moments: dict[str, FloatArray]) -> None:
        for name in names or moments:
            moments[name][point] = value

    return change


def times(point: Any, factor: float) -> Change:
    def change(moments: dict[str, FloatArray]) -> None:
        for values in moments.values():
            values[point] *= factor

    return change


@EVERY
@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
@pytest.mark.parametrize(
    "change",
    [
        at((slice(None), 2), np.nan),
        at((1, 1), np.nan),
        at(slice(None), 0, "variance"),
        at((slice(None), 1), 0, "variance", "norm_sq", "inner"),
        at(1, -0.2, "norm_sq_ref"),
        times(1, 1e-60),
        times(slice(None), 1e70),
    ],
    ids=["a strategy", "a cell", "no variance", "no gradient", "lost in noise", "a tiny point", "huge"],
)
def test_a_schedule_comes_out_where_some_strategy_is_known_everywhere(
    criterion: str, mode: str, change: Change
) -> None:
    profile = profile_with(change)
    schedule = optimize(profile, 2000.0, criterion=criterion, progress=mode, slices=12, draws=40)
    json.dumps(schedule.to_json(), allow_nan=False)
    assert all(stage.score is None or np.isfinite(stage.score) for stage in schedule.stages)
    boundary_cells(profile, criterion)


@EVERY
@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_a_point_without_any_score_is_passed_over_or_named(criterion: str, value: float) -> None:
    profile = profile_with(at(1, value))
    schedule = optimize(profile, 2000.0, criterion=criterion, progress="trajectory", slices=12, draws=40)
    json.dumps(schedule.to_json(), allow_nan=False)
    with pytest.raises(UsageError, match=r"at the profiled progress 0\.4 \(metric euclidean.*zero or lost.*trajectory"):
        optimize(profile, 2000.0, criterion=criterion, progress="fraction", slices=12)


@EVERY
@pytest.mark.parametrize("value", [np.nan, 0.0])
@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
def test_a_profile_without_any_score_is_an_error_that_says_why(criterion: str, value: float, mode: str) -> None:
    with pytest.raises(UsageError, match=r"gives no .* score .*missing.*zero or lost in noise.*more samples"):
        optimize(profile_with(at(slice(None), value)), 2000.0, criterion=criterion, progress=mode, slices=12)
