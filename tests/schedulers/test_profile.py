import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from schedulers import Criterion, Grid, Moments, Profile, Stage, Strategy, UsageError, criterion_se, optimize
from schedulers.profile import interpolate

GRID = Grid({"mode": ("a", "b")}, Strategy(mode="b"))


def profile(progress=(0.0, 0.5, 1.0), **changes) -> Profile:
    ones = np.ones((len(progress), 2))
    fields = {
        "grid": GRID,
        "progress": np.array(progress),
        "cost": np.array([1.0, 4.0]),
        "moments": Moments(ones * [[0.2, 0.0]], ones * 10, ones, ones * [[0.8, 1.0]], ones),
        "covariance": None,
        "batch_size": 8,
        "beta": 32.0,
        "metric": "euclidean",
        "cost_model": "tokens",
        "digest": "d",
    }
    return Profile(**{**fields, **changes})


def at(values: list[float], points: list[float], progress: tuple[float, ...] = (0.0, 0.5, 1.0)) -> np.ndarray:
    return interpolate(np.array(progress), np.array(values)[:, None], points)[:, 0]


def test_positive_quantities_are_linear_in_the_logarithm() -> None:
    points = [0, 0.1, 0.25, 0.5, 0.6, 1]
    expected = np.exp(np.interp(points, [0, 0.5, 1], np.log([1, 100, 4])))
    assert_allclose(at([1, 100, 4], points), expected)
    assert at([1, 100, 4], [0.25])[0] == pytest.approx(10)


def test_a_bracket_with_a_point_that_is_not_positive_is_linear() -> None:
    assert_allclose(at([-1, 3, 12], [0.25, 0.75]), [1, 6])
    assert_allclose(at([0, 3, 12], [0.25]), [1.5])


def test_missing_points_spoil_their_brackets_alone() -> None:
    result = at([1, np.nan, 4], [0, 0.2, 0.5, 0.7, 1])
    assert np.isnan(result).tolist() == [False, True, True, True, False]


def test_outside_the_profiled_range_the_ends_hold() -> None:
    assert_allclose(at([2, 8], [0, 0.1, 0.3, 0.9, 1], progress=(0.1, 0.9)), [2, 2, 2 * 4**0.25, 8, 8])


def test_a_single_point_holds_everywhere() -> None:
    assert_allclose(at([7], [0, 0.4, 1], progress=(0.4,)), [7, 7, 7])


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.floats(0, 1))
def test_between_two_points_lies_between_their_values(values: list[float], point: float) -> None:
    progress = np.linspace(0, 1, len(values)) if len(values) > 1 else np.array([0.5])
    left = max(int(np.searchsorted(progress, point, side="right")) - 1, 0)
    ends = values[left : left + 2]
    slack = 1e-9 * max(abs(v) for v in ends)
    result = interpolate(progress, np.array(values)[:, None], [point])[0, 0]
    assert min(ends) - slack <= result <= max(ends) + slack


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_profiled_points_are_met_exactly(values: list[float]) -> None:
    progress = np.arange(len(values)) / 7
    assert interpolate(progress, np.array(values)[:, None], progress)[:, 0].tolist() == values


def test_scores_are_interpolated_and_not_the_moments() -> None:
    """Between points whose moments lie five decades apart and change sign, the score stays between its neighbours'."""
    scale = np.array([[1e5], [1.0], [1.0]])
    ones = np.ones((3, 2))
    inner = scale * [[0.9, 1.0], [-0.5, 1.0], [-0.5, 1.0]]
    found = profile(moments=Moments(ones * scale * 0.1, ones * scale, ones * scale, inner, ones * scale))
    score, se = found.scores("descent", [0.0, 0.25, 0.5])
    first, last = 0.81 / (1 + 1 / 32), -0.25 / (1 + 1 / 32)
    assert_allclose(score[:, 0], [first, (first + last) / 2, last])
    assert np.isnan(se).all()


def test_positive_scores_are_interpolated_in_the_logarithm() -> None:
    bias = np.array([[0.1, 0.0], [0.4, 0.0], [0.4, 0.0]])
    ones = np.ones((3, 2))
    score, _ = profile(moments=Moments(bias, ones * 10, ones, ones, ones * 2)).scores("ca-mse", [0.25])
    ends = [(b + 1 / 32 * 10) / 2 for b in (0.1, 0.4)]
    assert_allclose(score, [[np.sqrt(ends[0] * ends[1]), 4 / 32 * 10 / 2]])


def test_standard_errors_are_exact_on_profiled_points_and_between_them_elsewhere() -> None:
    covariance = np.zeros((3, 2, 5, 5))
    covariance[..., 0, 0] = covariance[..., 1, 1] = 0.01
    covariance[2] *= 16
    whole = profile(covariance=covariance)
    known = criterion_se("ca-mse", whole.moments, covariance, whole.cost, beta=32.0, batch_size=8, reference_cost=4.0)
    _, se = whole.scores("ca-mse", [0.0, 0.5, 0.75, 1.0])
    assert_allclose(se[[0, 1, 3]], known)
    assert_allclose(se[2], np.sqrt(known[1] * known[2]))


def test_the_reference_is_found_by_its_position() -> None:
    assert (profile().reference_index, profile().reference_cost) == (1, 4.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"progress": np.array([0.0, 0.5, 0.5])}, "progress must increase"),
        ({"progress": np.array([0.0, 0.5, 1.5])}, "progress must increase within"),
        ({"progress": np.array([0.0, np.nan, 1.0])}, "progress must increase"),
        ({"progress": np.array([])}, "progress has shape"),
        ({"moments": Moments(*[np.ones((2, 2))] * 5)}, r"moments have shape \(2, 2\), not \(3, 2\)"),
        ({"cost": np.array([1.0])}, "cost has shape .*; the grid has 2 strategies"),
        ({"cost": np.array([0.0, 1.0])}, "cost must be positive"),
        ({"cost": np.array([np.inf, 1.0])}, "cost must be positive"),
        ({"covariance": np.zeros((3, 2, 4, 4))}, "covariance has shape"),
        ({"influence": np.zeros((3, 2, 5))}, r"influence has shape \(3, 2, 5\), not \(3, 2, 5, R\)"),
        ({"influence": np.zeros((3, 2, 4, 8))}, "influence has shape"),
        ({"influence": np.zeros((3, 2, 5, 0))}, "influence has shape"),
        ({"influence": np.full((3, 2, 5, 1), np.nan)}, "influence must be finite"),
        ({"seconds": np.array([1.0])}, "seconds has shape .*; the grid has 2 strategies"),
        ({"seconds": np.array([0.0, 1.0])}, "seconds must be positive"),
        ({"memory": np.array([-1.0, 1.0])}, "memory must be positive"),
        ({"pilot": ()}, "pilot: stages"),
        ({"pilot": (Stage(0.0, 0.5, ((Strategy(mode="a"), 1.0),), 1.0),)}, r"pilot: stages\[0\].end"),
        ({"pilot": (Stage(0.0, 1.0, ((Strategy(level=1), 1.0),), 1.0),)}, "pilot: level=1 has other axes"),
        ({"reference_budget": "2M"}, "reference_budget='2M' must be a positive number of units"),
        ({"reference_budget": True}, "reference_budget=True"),
        ({"reference_budget": -5}, "reference_budget=-5"),
        ({"reference_budget": np.inf}, "reference_budget=inf"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"beta": np.nan}, "beta=nan"),
    ],
)
def test_a_profile_that_does_not_fit_together_is_refused(changes: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        profile(**changes)


def test_an_unknown_cost_is_allowed() -> None:
    assert np.isnan(profile(cost=np.array([np.nan, 4.0])).scores("descent", [0.5])[0]).tolist() == [[True, False]]


def test_optional_fields_are_kept_and_may_be_partly_unknown() -> None:
    pilot = (Stage(0.0, 1.0, ((Strategy(mode="a"), 0.5), (Strategy(mode="b"), 0.5)), 2.5),)
    found = profile(influence=np.ones((3, 2, 5, 7), np.float32), seconds=[np.nan, 2], memory=[1, np.nan], pilot=pilot)
    assert found.influence is not None and found.influence.dtype == np.float64
    assert_allclose(found.seconds, [np.nan, 2])
    assert_allclose(found.memory, [1, np.nan])
    assert found.pilot == pilot
    plain = profile()
    assert (plain.influence, plain.seconds, plain.memory, plain.pilot) == (None, None, None, None)


@pytest.mark.parametrize("lower_is_better", [True, False])
@pytest.mark.parametrize("worth", [3.0, 0.0, -3.0, 1e-300])
def test_a_strategy_that_left_a_race_never_ties_with_the_one_that_won_it(worth: float, lower_is_better: bool) -> None:
    """The first strategy of the grid left with the luck of few samples; a tie would go to it."""
    sign = -1 if lower_is_better else 1
    planted = Criterion("raw", "raw", lower_is_better, lambda m, cost, *, beta, batch_size, reference_cost: m.bias_sq)
    lucky, best = sign * (worth + 1), sign * worth
    ones = np.ones((3, 2))
    moments = Moments(ones * [[lucky, best]], ones, ones, ones, ones)
    raced = profile(moments=moments, contenders={"raw": np.array([[False, True]] * 3)})
    score, _ = raced.scores(planted, [0.0, 0.3, 1.0])
    assert (sign * score[:, 0] < sign * score[:, 1]).all()
    assert_allclose(score[:, 0], best, rtol=1e-8, atol=1e-8)
    assert_allclose(score[:, 1], best, rtol=1e-12)
    assert optimize(raced, 1e6, criterion=planted).strategies == (Strategy(mode="b"),)
    assert optimize(profile(moments=moments), 1e6, criterion=planted).strategies == (Strategy(mode="a"),)


def test_another_batch_weighs_the_variance_by_its_size(raw_profile) -> None:
    rng = np.random.default_rng(0)
    five = {name: rng.uniform(0.5, 2, (3, 4)) for name in ("bias_sq", "variance", "norm_sq", "inner")}
    moments = Moments(norm_sq_ref=np.ones((3, 4)), **five)
    at_8 = raw_profile(np.zeros((3, 4)), moments=moments, contenders={"ca-mse": np.eye(3, 4, dtype=bool)})
    at_64 = at_8.for_batch(64)
    assert (at_64.batch_size, at_64.beta, at_64.contenders) == (64, 8 * at_8.beta, {})
    expected = five["bias_sq"] + at_8.cost / (8 * at_8.beta) * five["variance"]
    np.testing.assert_allclose(at_64.scores("ca-mse", at_8.progress)[0], expected)
    cosine = five["inner"] ** 2 / (five["norm_sq"] + five["variance"] / 64) * at_8.reference_cost / at_8.cost
    np.testing.assert_allclose(at_64.scores("descent-batch", at_8.progress)[0], cosine)
    assert at_8.for_batch(8) is at_8
    with pytest.raises(UsageError, match="batch_size=0"):
        at_8.for_batch(0)
