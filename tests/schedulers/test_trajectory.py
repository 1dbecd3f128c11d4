"""Motion through a profile against numerical integration and closed forms, and what makes the pilot move at speed 1."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schedulers import Moments, Schedule, Stage, Strategy, UsageError, get_criterion, predict, reference_progress
from schedulers.trajectory import TABLE, Speeds, gains, pilot_gain, speeds

PILOT_BUDGET = 1000.0
A, B, C = (Strategy(mode=mode) for mode in range(3))


def formula(motion: Speeds, p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """v (n,) at p, written from the module's text: log-linear between two positive points, else linear, at least 0."""
    knots = motion.progress
    left = np.clip(np.searchsorted(knots, p, side="right") - 1, 0, len(knots) - 1)
    right = np.minimum(left + 1, len(knots) - 1)
    right = np.where(p < knots[0], left, right)
    a, b = motion.speed[left, c], motion.speed[right, c]
    share = np.where(right > left, (p - knots[left]) / np.where(right > left, knots[right] - knots[left], 1.0), 0.0)
    both = (a > 0) & (b > 0)
    geometric = np.where(both, a, 1.0) ** (1 - share) * np.where(both, b, 1.0) ** share
    value = np.where(both, geometric, (1 - share) * a + share * b)
    return np.where(value > 0, value, 0.0)  # NaN is not above 0 either


def integrated(motion: Speeds, p: np.ndarray, units: float, c: np.ndarray, steps: int = 1500) -> np.ndarray:
    """Progress after `units`, by the Runge-Kutta method of fourth order."""
    h = units / motion.budget / steps
    for _ in range(steps):
        k1 = formula(motion, p, c)
        k2 = formula(motion, p + h / 2 * k1, c)
        k3 = formula(motion, p + h / 2 * k2, c)
        k4 = formula(motion, p + h * k3, c)
        p = p + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return p


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [("positive", 1e-6), ("signed", 1e-6), ("zeros", 1e-6), ("unknown", 3e-3)],  # a step over a jump errs by its length
)
def test_the_motion_is_the_integral_of_the_speed(kind: str, tolerance: float) -> None:
    rng = np.random.default_rng(["positive", "signed", "zeros", "unknown"].index(kind))
    points, strategies = 5, 6
    speed = np.exp(rng.normal(0, 0.8, size=(points, strategies)))
    if kind == "signed":
        speed = rng.normal(0.5, 1, size=speed.shape)
    if kind == "zeros":
        speed[rng.random(speed.shape) < 0.4] = 0.0
    if kind == "unknown":
        speed[rng.random(speed.shape) < 0.3] = np.nan
    motion = Speeds(np.array([0.1, 0.3, 0.35, 0.7, 0.9]), speed, PILOT_BUDGET)
    c = np.tile(np.arange(strategies), 6)
    start = rng.uniform(0, 1.1, size=c.size)
    assert_moves_as_integrated(motion, start, 0.4 * PILOT_BUDGET, c, tolerance)
    assert_moves_as_integrated(motion, start, 1.5 * PILOT_BUDGET, c, tolerance)


def assert_moves_as_integrated(
    motion: Speeds, start: np.ndarray, units: float, c: np.ndarray, tolerance: float
) -> None:
    found, expected = motion.advance(start, units, c), integrated(motion, start, units, c)
    assert np.abs(found - expected).max() < tolerance * max(1, np.abs(expected).max())
    assert (found > start).any()


def test_the_speed_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(7)
    speed = rng.normal(0.3, 1, size=(6, 8))
    speed[rng.random(speed.shape) < 0.2] = np.nan
    motion = Speeds(np.sort(rng.random(6)), speed, PILOT_BUDGET)
    p, c = rng.uniform(0, 1.3, 400), rng.integers(0, 8, 400)
    assert motion.at(p, c) == pytest.approx(formula(motion, p, c), abs=1e-12)


def test_exponential_and_linear_pieces_have_their_closed_forms() -> None:
    # v = e^-p: p = log(1 + u); v = 1 - p: p = 1 - e^-u, which never reaches the end; v = p - .5 from .75
    motion = Speeds(np.array([0.0, 1.0]), np.array([[1.0, 1.0, -0.5], [math.exp(-1), 0.0, 0.5]]), PILOT_BUDGET)
    for u in (0.2, 0.7, 1.5):
        found = motion.advance(np.array([0.0, 0.0, 0.75]), u * PILOT_BUDGET, np.array([0, 1, 2]))
        assert found[0] == pytest.approx(math.log1p(u), rel=1e-14)
        assert found[1] == pytest.approx(-math.expm1(-u), rel=1e-14)
        assert found[2] == pytest.approx(0.5 + 0.25 * math.exp(u) if u < math.log(2) else 1 + (u - math.log(2)) / 2)


def test_negative_zero_and_unknown_speeds_move_nothing() -> None:
    for value in (-1.0, 0.0, np.nan):
        motion = Speeds(np.array([0.2, 0.8]), np.array([[value, 1.0], [value, 1.0]]), PILOT_BUDGET)
        start = np.array([0.0, 0.2, 0.5, 0.8, 2.0])
        assert motion.advance(start, 1e9, np.zeros(5, dtype=int)).tolist() == start.tolist()


def test_training_stops_before_a_point_that_is_not_known() -> None:
    motion = Speeds(np.array([0.0, 0.4, 0.7, 1.0]), np.array([[1.0], [2.0], [np.nan], [3.0]]), PILOT_BUDGET)
    none = np.array([0])
    assert motion.advance(np.array([0.0]), 1e9, none)[0] == 0.4
    assert motion.advance(np.array([0.5]), 1e9, none)[0] == 0.5
    assert motion.advance(np.array([0.8]), 1e9, none)[0] == 0.8
    assert motion.advance(np.array([1.0]), 100.0, none)[0] == pytest.approx(1.3)
    assert motion.units_to(0.41, 0) == math.inf


def test_a_single_point_is_one_speed_everywhere() -> None:
    motion = Speeds(np.array([0.3]), np.array([[2.0, 0.5]]), PILOT_BUDGET)
    found = motion.advance(np.array([0.0, 0.9]), 500.0, np.array([0, 1]))
    assert found == pytest.approx([1.0, 1.15])
    assert motion.units_to(3.0, 0, start=1.0) == pytest.approx(1000.0)


def test_the_ends_count_beyond_the_profiled_points() -> None:
    motion = Speeds(np.array([0.4, 0.6]), np.array([[0.5], [2.0]]), PILOT_BUDGET)
    none = np.array([0])
    assert motion.advance(np.array([0.0]), 600.0, none)[0] == pytest.approx(0.3)
    assert motion.advance(np.array([0.7]), 1000.0, none)[0] == pytest.approx(2.7)


def test_nothing_spent_is_nowhere_gone() -> None:
    motion = Speeds(np.array([0.4]), np.array([[0.5]]), PILOT_BUDGET)
    assert motion.advance(np.array([0.25]), 0.0, np.array([0])).tolist() == [0.25]


def test_the_callers_array_is_left_alone() -> None:
    start = np.zeros(1)
    Speeds(np.array([0.4]), np.array([[0.5]]), PILOT_BUDGET).advance(start, 10.0, np.array([0]))
    assert start[0] == 0.0


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan, math.inf])
def test_a_pilot_without_a_budget_is_refused(budget: float) -> None:
    with pytest.raises(UsageError, match=r"budget=.* of the profiled run"):
        Speeds(np.array([0.4]), np.array([[0.5]]), budget)


KNOTS = np.array([0.05, 0.2, 0.5, 0.55, 1.0])
speed_values = st.one_of(
    st.floats(0.01, 50),
    st.floats(-5, 5).map(lambda x: round(x, 6)),
    st.sampled_from([0.0, 1e-9, -1e-9, math.nan]),
    st.floats(1e-6, 1e-3),
)
columns = st.lists(speed_values, min_size=len(KNOTS), max_size=len(KNOTS))
places, spent = st.floats(0, 1.5), st.floats(0, 3000)
ONE = np.array([0])
checked = settings(deadline=None, derandomize=True, max_examples=200)


@given(columns, places, places, spent, spent)
@checked
def test_motion_keeps_order_and_adds_up(speed: list[float], p: float, q: float, u: float, more: float) -> None:
    motion = Speeds(KNOTS, np.array(speed)[:, None], PILOT_BUDGET)

    def moved(place: float, units: float) -> float:
        return float(motion.advance(np.array([place]), units, ONE)[0])

    p, q = min(p, q), max(p, q)
    assert p <= moved(p, u)
    assert moved(p, u) <= moved(q, u) * (1 + 1e-12)
    assert moved(p, u) <= moved(p, u + more) * (1 + 1e-12)
    # relative to the distance too: rounding at a rise grows with it, as the motion itself does
    at_once, in_two = moved(p, u + more), moved(moved(p, u), more)
    assert in_two == pytest.approx(at_once, rel=1e-7, abs=1e-7)


@given(columns, places, spent)
@checked
def test_units_to_is_the_inverse_of_advance(speed: list[float], start: float, units: float) -> None:
    motion = Speeds(KNOTS, np.array(speed)[:, None], PILOT_BUDGET)
    end = float(motion.advance(np.array([start]), units, ONE)[0])
    at_end = float(motion.at(np.array([end]), ONE)[0])
    if at_end == 0:
        assert motion.units_to(end + 1e-3, 0, start) == math.inf
    elif at_end > 1e-3:  # less of it is a rest that rounding decides
        assert motion.units_to(end, 0, start) == pytest.approx(units, rel=1e-6, abs=1e-6)
    assert motion.units_to(start, 0, start) == 0.0
    assert motion.units_to(start / 2, 0, start) == 0.0


def test_units_to_what_is_never_reached_are_infinite() -> None:
    motion = Speeds(np.array([0.0, 0.5]), np.array([[1.0, 1.0], [0.0, -1.0]]), PILOT_BUDGET)
    assert math.isfinite(motion.units_to(0.24, 1))
    assert motion.units_to(0.25, 1) == math.inf  # falls to 0 there
    assert motion.units_to(0.5, 0) == math.inf


@pytest.mark.parametrize("seed", range(3))
def test_a_table_of_the_motion_is_close_to_it_and_keeps_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    speed = np.concatenate([np.exp(rng.normal(0, 1, size=(6, 3))), rng.normal(0, 1, size=(6, 3))], axis=1)
    motion, reach = Speeds(np.linspace(0, 1, 6), speed, PILOT_BUDGET), 1.7
    table = motion.tabulated(120.0, reach)
    p, c = np.sort(rng.uniform(0, reach, 5000)), rng.integers(0, 6, 5000)
    found, exact = table(p, c), motion.advance(p, 120.0, c)
    step = reach / (TABLE - 1)
    below, above = (motion.advance(edge, 120.0, c) for edge in (p - p % step, p - p % step + step))
    assert (below <= found + 1e-9).all()
    assert (found <= above + 1e-9).all()
    assert np.sqrt(np.mean((found - exact) ** 2)) < 2e-5
    for strategy in range(6):
        assert (np.diff(found[c == strategy]) >= 0).all()


def pilot(*mixture: tuple[Strategy, float], cost: float = 1.0) -> tuple[Stage, ...]:
    return (Stage(0.0, 1.0, mixture, cost),)


def random_worth(seed: int, points: int = 5) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).normal(0, 1, size=(points, 3)))


@pytest.mark.parametrize("mode", range(3))
def test_a_pilot_of_one_strategy_moves_at_speed_one(mode: int, worth, worth_profile) -> None:
    profile = worth_profile(random_worth(mode), cost=[4, 2, 1], pilot=pilot((Strategy(mode=mode), 1.0)))
    alone = Schedule(
        (Stage(0.0, 0.35, ((Strategy(mode=mode), 1.0),), 1.0), Stage(0.35, 1.0, profile.pilot[0].mixture, 1.0))
    )
    assert predict(profile, alone, PILOT_BUDGET, criterion=worth) == pytest.approx([0.0, 0.35, 1.0], abs=1e-9)


def test_the_reference_is_the_pilot_of_a_run_that_is_not_known(worth, worth_profile) -> None:
    profile = worth_profile(random_worth(0))
    for fraction in (0.1, 0.5, 1.0, 1.5):
        assert reference_progress(profile, fraction * PILOT_BUDGET, criterion=worth) == pytest.approx(fraction)
    assert reference_progress(profile, 300.0, criterion=worth, start=0.4) == pytest.approx(0.7)
    off_the_grid = dataclasses.replace(profile, pilot=pilot((Strategy(mode=9), 1.0)))
    assert reference_progress(off_the_grid, 700.0, criterion=worth) == pytest.approx(0.7)


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_pilot_moves_at_speed_one(seed: int, worth, worth_profile) -> None:
    weights = np.random.default_rng(seed).dirichlet(np.ones(3))
    mixture = tuple((Strategy(mode=mode), float(weight)) for mode, weight in enumerate(weights))
    profile = worth_profile(random_worth(seed), cost=[4, 2, 1], pilot=pilot(*mixture))
    # at the profiled points themselves, by shares of the budget: weight times cost
    share = weights * [4, 2, 1] / (weights @ [4, 2, 1])
    assert speeds(profile, worth).speed @ share == pytest.approx(np.ones(5))
    positions = predict(profile, Schedule(profile.pilot), PILOT_BUDGET, criterion=worth)
    assert positions == pytest.approx([0.0, 1.0], abs=1e-6)


def test_a_pilot_that_changed_its_mixture_moves_at_speed_one_throughout(worth, worth_profile) -> None:
    stages = (
        Stage(0.0, 0.5, ((A, 0.25), (B, 0.75)), 2.5),
        Stage(0.5, 1.0, ((B, 0.5), (C, 0.5)), 1.5),
    )
    profile = worth_profile(random_worth(5), cost=[4, 2, 1], pilot=stages)
    speed = speeds(profile, worth).speed
    early, late = np.array([1.0, 1.5, 0]) / 2.5, np.array([0, 1.0, 0.5]) / 1.5
    assert speed[:2] @ early == pytest.approx(np.ones(2))
    assert speed[2:] @ late == pytest.approx(np.ones(3))  # the stage that begins at a point is the one that runs there


def test_the_pilots_share_of_a_strategy_that_was_not_measured_is_left_out(worth, worth_profile) -> None:
    gain = np.array([[1.0, np.nan, 4.0]])
    profile = worth_profile(gain, pilot=pilot((A, 0.25), (B, 0.5), (C, 0.25)))
    assert pilot_gain(profile, worth) == pytest.approx([2.5])


def test_points_lost_in_noise_are_passed_over(worth, worth_profile) -> None:
    gain = random_worth(1)
    for lost in (-0.5, 0.0, np.nan):
        damaged = gain.copy()
        damaged[2, 0] = lost
        profile = worth_profile(damaged)
        left = np.array([0, 1, 3, 4])
        motion = speeds(profile, worth)
        assert motion.progress.tolist() == profile.progress[left].tolist()
        assert motion.speed == pytest.approx(gain[left] / gain[left, :1])


def test_a_profile_of_which_all_is_lost_is_refused(worth, worth_profile) -> None:
    gain = random_worth(1)
    gain[:, 0] = [-1.0, 0.0, np.nan, -2.0, -3.0]
    with pytest.raises(UsageError, match=r"worth score of the profiled run itself is not above 0 .*metric euclidean"):
        speeds(worth_profile(gain), worth)


def test_a_profile_without_any_score_is_refused(worth, worth_profile) -> None:
    with pytest.raises(UsageError, match=r"no worth score at any progress \(metric euclidean, costs tokens\)"):
        speeds(worth_profile(np.full((3, 2), np.nan)), worth)


def test_a_profile_without_the_budget_of_its_run_is_refused(worth, worth_profile) -> None:
    with pytest.raises(UsageError, match="budget of the profiled run"):
        speeds(worth_profile(random_worth(0), reference_budget=None), worth)


def test_a_pilot_gain_below_its_error_counts_as_its_error(worth, worth_profile) -> None:
    gain = np.array([[1.0, 2.0], [0.1, 2.0], [0.1, 2.0]])
    covariance = np.zeros((3, 2, 5, 5))
    covariance[:, :, 3, 3] = 0.4**2
    profile = worth_profile(gain, cost=[3, 1], covariance=covariance)
    assert pilot_gain(profile, worth) == pytest.approx([1.0, 0.4, 0.4])
    assert speeds(profile, worth).speed == pytest.approx(gain / [[1.0], [0.4], [0.4]])
    # of a mixture: errors of strategies by their shares of the budget (3/4 and 1/4), which go together
    covariance = covariance * [[[[1.0]], [[4.0]]]]
    both = dataclasses.replace(
        profile,
        moments=dataclasses.replace(profile.moments, inner=0.1 * np.ones((3, 2))),
        covariance=covariance,
        pilot=pilot((A, 0.5), (B, 0.5)),
    )
    assert pilot_gain(both, worth) == pytest.approx([0.75 * 0.4 + 0.25 * 0.8] * 3)


def test_where_lower_is_better_a_gain_is_the_inverse(raw, worth_profile) -> None:
    score = np.array([[2.0, 0.5, 4.0], [1.0, -3.0, 0.25], [1.0, 0.0, np.nan], [-1.0, 0.0, -2.0]])
    covariance = np.zeros((4, 3, 5, 5))
    covariance[..., 0, 0] = 0.01**2
    profile = worth_profile(np.ones((4, 3)), covariance=covariance)
    profile = dataclasses.replace(profile, moments=dataclasses.replace(profile.moments, bias_sq=score))
    gain, se = gains(profile, raw)
    # what is not above 0 counts as the smallest of its point that is
    expected = [[0.5, 2.0, 0.25], [1.0, 4.0, 4.0], [1.0, 1.0, np.nan], [np.nan] * 3]
    assert gain == pytest.approx(np.array(expected), nan_ok=True)
    assert se[0] == pytest.approx(0.01 / score[0] ** 2)


def test_without_a_covariance_gains_have_no_error(worth, worth_profile) -> None:
    gain, se = gains(worth_profile(random_worth(0)), worth)
    assert gain.tolist() == random_worth(0).tolist()
    assert np.isnan(se).all()


@pytest.mark.parametrize("name", ["descent", "ca-mse"])
def test_the_speeds_of_the_bundled_criteria(name: str, worth_profile) -> None:
    rng = np.random.default_rng(3)
    bias, variance, norm, ref = (rng.uniform(0.5, 2, size=(4, 3)) for _ in range(4))
    inner, ref = rng.uniform(-0.5, 1, size=(4, 3)), ref[:, :1] * np.ones(3)
    inner[:, 0] = np.abs(inner[:, 0])
    cost = np.array([4.0, 2.0, 1.0])
    profile = worth_profile(np.ones((4, 3)), cost, moments=Moments(bias, variance, norm, inner, ref))
    if name == "ca-mse":
        error = bias + cost / 32 * variance
        expected = error[:, :1] / error
    else:
        cosine = inner * np.abs(inner) / (norm + cost / 32 * variance)
        expected = cosine / cosine[:, :1]
    assert speeds(profile, get_criterion(name)).speed == pytest.approx(expected)
    assert speeds(profile, name).budget == 1000.0
