"""Racing: who stays, at which error rates, and which cells decide where the best strategy changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from schedulers import Grid, Moments, Profile, RaceRule, Strategy, UsageError, boundary_cells, contenders


def race(values: np.ndarray, **options: float) -> list[bool]:
    """Contenders of scores that are means of `values` (M, C), whose jackknife is the plain standard error."""
    total = values.sum(0)
    return list(contenders(values.mean(0), (total - values) / (len(values) - 1), lower_is_better=False, **options))


def test_a_difference_is_judged_by_its_own_paired_error() -> None:
    """Scores that move together are told apart although each alone is uncertain."""
    noise = np.random.default_rng(0).normal(size=(16, 1))
    small = np.random.default_rng(1).normal(size=(16, 2)) * 0.01
    assert race(10 + np.array([0.0, -1.0]) + 3 * noise + small) == [True, False]
    assert race(10 + np.array([0.0, -1.0]) + 3 * noise * [1.0, -1.0] + small) == [True, True]


def test_bound_is_students_on_the_difference() -> None:
    values = np.array([5.0, 4.5]) + np.random.default_rng(3).normal(size=(12, 2))
    gap = values[:, 1] - values[:, 0]
    bound = gap.mean() + stats.t.ppf(0.999, 11) * gap.std(ddof=1) / 12**0.5
    assert gap.mean() < 0 < bound
    edge = bound / values[:, 0].mean()
    assert race(values, confidence=0.999, tolerance=edge * 1.001) == [True, False]
    assert race(values, confidence=0.999, tolerance=edge * 0.999) == [True, True]


def test_the_best_is_lost_as_seldom_as_the_level_says() -> None:
    """Two strategies as good as each other, the tolerance zero: the truly best is sent away in about 1 of 20 races."""
    rng, lost = np.random.default_rng(5), 0
    for _ in range(4000):
        lost += race(rng.normal(size=(10, 2)), confidence=0.95, tolerance=0.0) != [True, True]
    assert 0.08 < lost / 4000 < 0.12  # either of the two may be the one that looks worse


def test_advantages_within_the_tolerance_end_a_race() -> None:
    values = 1 + np.array([0.0, -0.01]) + 0.001 * np.random.default_rng(6).normal(size=(20, 2))
    assert race(values, tolerance=0.05) == [True, False]
    values = 1 + np.array([0.0, -0.01]) + 0.1 * np.random.default_rng(6).normal(size=(20, 2))
    assert race(values, tolerance=0.0) == [True, True] and sum(race(values, tolerance=0.2)) == 1


def test_direction_and_strategies_that_are_out() -> None:
    score, deleted = np.array([1.0, 5.0, np.nan]), np.tile([1.0, 5.0, np.nan], (9, 1))
    assert list(contenders(score, deleted, lower_is_better=True)) == [True, False, False]
    assert list(contenders(score, deleted, lower_is_better=False)) == [False, True, False]
    assert not contenders(np.full(2, np.nan), np.full((9, 2), np.nan), lower_is_better=True).any()


def test_looks_grow_to_the_maximum() -> None:
    assert RaceRule(minimum=8, maximum=64).looks() == [8, 12, 18, 27, 40, 60, 64]
    assert RaceRule(minimum=3, maximum=3).looks() == [3]
    assert RaceRule(minimum=3, maximum=6, growth=1.01).looks() == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"minimum": 2}, "at least 3"),
        ({"minimum": 9, "maximum": 8}, "may not exceed"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"growth": 1.0}, "growth=1.0"),
    ],
)
def test_rules_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RaceRule(**values)  # type: ignore[arg-type]


def two_points(worth: list[list[float]], bias_se: list[list[float]]) -> Profile:
    """Two progress points, three strategies, ca-mse equal to bias_sq with the given standard errors."""
    bias = np.array(worth)
    ones, zeros = np.ones_like(bias), np.zeros_like(bias)
    covariance = np.zeros((*bias.shape, 5, 5))
    covariance[..., 0, 0] = np.array(bias_se) ** 2
    grid = Grid({"a": (0, 1, 2)}, Strategy(a=0))
    return Profile(
        grid=grid, progress=np.array([0.0, 1.0]), cost=np.ones(3),
        moments=Moments(bias_sq=bias, variance=zeros, norm_sq=ones, inner=ones, norm_sq_ref=ones),
        covariance=covariance, batch_size=4, beta=4.0, metric="euclidean", cost_model="tokens", digest="x",
    )  # fmt: skip


def test_boundary_cells_are_those_that_place_the_change() -> None:
    """From 0 to 1 the best goes from strategy 0 to 1; the error of the change comes from the second point."""
    worth = [[1.0, 3.0, 9.0], [3.0, 1.0, 9.0]]
    certain, uncertain = [[0.01] * 3] * 2, [[0.01] * 3, [2.5] * 3]
    assert boundary_cells(two_points(worth, certain), "ca-mse") == []
    assert boundary_cells(two_points(worth, uncertain), "ca-mse") == [(1, 0), (1, 1)]
    assert boundary_cells(two_points([worth[0]] * 2, uncertain), "ca-mse") == []


def test_boundary_loss_is_that_of_a_misplaced_change() -> None:
    """The expected loss by simulation: scores on a line between the points, the change put where the errors say."""
    d0, d1, s0, s1 = 2.0, 1.0, 0.2, 0.3
    rng = np.random.default_rng(0)
    e0, e1 = d0 + s0 * rng.normal(size=200_000), d1 + s1 * rng.normal(size=200_000)
    misplaced = e0 / (e0 + e1) - d0 / (d0 + d1)
    simulated = float(((d0 + d1) * misplaced**2 / 2).mean())
    side = 2**-0.5
    profile = two_points(
        [[1.0, 1 + d0, 9.0], [1 + d1, 1.0, 9.0]], [[s0 * side, s0 * side, 0], [s1 * side, s1 * side, 0]]
    )
    assert boundary_cells(profile, "ca-mse", tolerance=simulated * 0.9)
    assert not boundary_cells(profile, "ca-mse", tolerance=simulated * 1.1)


def test_strategies_that_left_a_race_cannot_win_by_their_luck() -> None:
    """The frozen score of a strategy with few samples is read as no better than the best one that stayed."""
    profile = two_points([[1.0, 0.5, 9.0], [1.0, 0.5, 9.0]], [[0.0] * 3] * 2)
    raced = replace(profile, contenders={"ca-mse": np.array([[True, False, False], [True, True, True]])})
    scores, _ = raced.scores("ca-mse", [0.0, 1.0])
    np.testing.assert_allclose(scores, [[1.0, 1.0, 9.0], [1.0, 0.5, 9.0]])
    np.testing.assert_allclose(raced.scores("descent", [0.0])[0], profile.scores("descent", [0.0])[0])
