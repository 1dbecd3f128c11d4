"""How sure a schedule is, against the normal distribution's closed forms."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import norm

from schedulers import (
    MOMENTS,
    Constraints,
    Moments,
    Profile,
    Schedule,
    Stage,
    Strategy,
    UsageError,
    optimize,
)
from schedulers.problem import Problem
from schedulers.uncertainty import (
    MOST_TIMES,
    CellWish,
    StageDoubt,
    cells_worth_samples,
    moment_draws,
    redrawn,
    relative_shortfall,
    stage_doubts,
    worth_draws,
)

DRAWS = 20_000
NEAR = 4 * 0.5 / math.sqrt(DRAWS)  # four standard errors of a share of that many draws
INNER = MOMENTS.index("inner")


def errors(points: int, sd: object) -> np.ndarray:
    """A covariance (points, C, 5, 5) in which the planted worth alone errs, by `sd` (C,) or (points, C)."""
    spread = np.broadcast_to(np.asarray(sd, dtype=float), (points, np.shape(sd)[-1]))
    covariance = np.zeros((*spread.shape, 5, 5))
    covariance[..., INNER, INNER] = spread**2
    return covariance


def stage(mode: int, start: float = 0.0, end: float = 1.0) -> Stage:
    return Stage(start, end, ((Strategy(mode=mode), 1.0),), 1.0)


def doubt(profile: Profile, criterion, mode: str, main: int, at: list[float], **arguments) -> StageDoubt:
    """Of one stage that runs strategy `main` and is looked at where `at` says, with every strategy allowed."""
    allowed = arguments.pop("allowed", np.ones(len(profile.grid), dtype=bool))
    arguments = {"draws": DRAWS, **arguments}
    (found,) = stage_doubts(profile, criterion, mode, [stage(main)], [np.array(at)], allowed, **arguments)
    return found


@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
@pytest.mark.parametrize("apart", [-0.3, 0.0, 0.1, 0.4, 1.0])
def test_the_probability_is_that_of_a_normal_difference(apart: float, mode: str, worth, worth_profile) -> None:
    profile = worth_profile([[2.0, 2.0 + apart]], covariance=errors(1, [0.3, 0.4]))
    found = doubt(profile, worth, mode, 1, [0.5])
    assert found.probability == pytest.approx(norm.cdf(apart / 0.5), abs=NEAR)
    assert found.rival == 0
    if mode == "fraction":  # by trajectory it is that of a ratio
        assert found.advantage_se == pytest.approx(0.5, rel=0.02)


def test_where_lower_is_better_the_probability_is_that_of_less(raw, worth_profile) -> None:
    covariance = np.zeros((1, 2, 5, 5))
    covariance[..., 0, 0] = 0.2**2
    profile = worth_profile(np.ones((1, 2)), covariance=covariance)
    profile = dataclasses.replace(profile, moments=dataclasses.replace(profile.moments, bias_sq=np.array([[2.0, 2.1]])))
    found = doubt(profile, raw, "fraction", 0, [0.5])
    assert found.probability == pytest.approx(norm.cdf(0.1 / math.hypot(0.2, 0.2)), abs=NEAR)
    by_speed = doubt(profile, raw, "trajectory", 0, [0.5])  # inverses are ordered the other way round
    assert by_speed.probability == pytest.approx(found.probability, abs=1e-12)


def test_a_stage_is_judged_by_its_mean_over_points(worth, worth_profile) -> None:
    values = np.array([[1.0, 1.3], [1.0, 0.9]])
    profile = worth_profile(values, covariance=errors(2, [[0.1, 0.2], [0.3, 0.1]]))
    # three parts of the stage stand at the first point and one at the second; points err apart
    found = doubt(profile, worth, "fraction", 1, [0.0, 0.0, 0.0, 1.0])
    mean = 0.75 * 0.3 - 0.25 * 0.1
    se = math.hypot(0.75 * math.hypot(0.1, 0.2), 0.25 * math.hypot(0.3, 0.1))
    assert found.probability == pytest.approx(norm.cdf(mean / se), abs=NEAR)
    assert found.advantage == pytest.approx(mean, abs=0.01)
    assert found.weight == pytest.approx([0.75, 0.25])


def test_errors_common_to_both_leave_the_difference_certain(worth, worth_profile) -> None:
    influence = np.zeros((1, 2, 5, 12))
    influence[0, :, INNER] = np.random.default_rng(0).normal(size=12)
    profile = worth_profile([[2.0, 2.01]], covariance=errors(1, [4.0, 4.0]), influence=influence)
    found = doubt(profile, worth, "fraction", 1, [0.5])
    assert (found.probability, found.regret, found.rival) == (1.0, 0.0, None)
    alone = doubt(dataclasses.replace(profile, influence=None), worth, "fraction", 1, [0.5])
    assert alone.probability == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_errors_that_go_together_partly_are_those_of_the_difference(seed: int, worth, worth_profile) -> None:
    rng = np.random.default_rng(seed)
    influence = np.zeros((2, 2, 5, 9))
    influence[:, :, INNER] = 0.1 * rng.normal(size=(2, 2, 9)) + 0.3 * rng.normal(size=(2, 1, 9))
    profile = worth_profile([[2.0, 2.3], [2.0, 1.9]], influence=influence)
    found = doubt(profile, worth, "fraction", 1, [0.0, 1.0])
    apart = (influence[:, 1, INNER] - influence[:, 0, INNER]).mean(axis=0)  # checkpoints share their sub-batches too
    assert found.probability == pytest.approx(norm.cdf(0.1 / np.linalg.norm(apart)), abs=NEAR)


def shortfall(apart: float, se: float) -> float:
    """E[max(0, -D)] of a normal D."""
    return se * norm.pdf(apart / se) - apart * norm.cdf(-apart / se)


@pytest.mark.parametrize("apart", [0.0, 0.2, -0.3])
def test_the_regret_is_the_mean_of_the_half_that_is_lost(apart: float, worth, worth_profile) -> None:
    profile = worth_profile([[2.0, 2.0 + apart]], covariance=errors(1, [0.3, 0.4]))
    found = doubt(profile, worth, "fraction", 1, [0.5])
    best = 2.0 + apart + shortfall(apart, 0.5)
    assert found.regret == pytest.approx(shortfall(apart, 0.5) / norm.cdf(-apart / 0.5) / best, rel=0.03)
    if apart == 0:
        assert found.regret == pytest.approx(
            0.5 * math.sqrt(2 / math.pi) / (2 + 0.5 / math.sqrt(2 * math.pi)), rel=0.03
        )


def test_the_rival_is_whoever_wins_most_often(worth, worth_profile) -> None:
    profile = worth_profile([[2.0, 1.5, 1.9, 1.0]], covariance=errors(1, [0.1, 0.4, 0.1, 0.1]))
    # by itself strategy 2 is ahead in 24 % of the draws and strategy 1 in 11 %
    assert doubt(profile, worth, "fraction", 0, [0.5]).rival == 2
    profile = dataclasses.replace(profile, covariance=errors(1, [0.1, 2.0, 0.1, 0.1]))
    assert doubt(profile, worth, "fraction", 0, [0.5]).rival == 1
    allowed = np.array([True, False, True, True])
    assert doubt(profile, worth, "fraction", 0, [0.5], allowed=allowed).rival == 2


def test_who_left_a_race_is_no_rival_where_it_left(worth, worth_profile) -> None:
    stays = np.array([[True, True, True], [True, False, True]])
    profile = worth_profile(
        [[2.0, 1.9, 1.0], [2.0, 1.9, 1.0]], covariance=errors(2, [0.1, 5.0, 0.2]), contenders={"worth": stays}
    )
    for mode in ("fraction", "trajectory"):
        early, late = (doubt(profile, worth, mode, 0, [at]) for at in (0.0, 1.0))
        assert early.rival == 1
        assert early.probability == pytest.approx(norm.cdf(0.1 / math.hypot(0.1, 5)), abs=NEAR)
        assert late.rival in (None, 2)
        assert late.probability == pytest.approx(norm.cdf(1 / math.hypot(0.1, 0.2)), abs=NEAR)


def test_without_errors_everything_is_certain(worth, worth_profile) -> None:
    values = np.exp(np.random.default_rng(0).normal(size=(4, 3)))
    profile = worth_profile(values, [4, 2, 1], covariance=errors(4, [0.0, 0.0, 0.0]))
    for mode in ("fraction", "trajectory"):
        schedule = optimize(profile, 1000, criterion=worth, progress=mode, draws=50, slices=20)
        assert {(s.probability, s.regret, s.rival) for s in schedule.stages} <= {
            (1.0, 0.0, None)
        } or mode == "trajectory"
        assert schedule.predicted["regret"] == 0.0
        assert schedule.predicted["more_samples"] == []


def test_what_a_constraint_forces_asks_for_no_samples(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 3.0], [1.0, 3.0]], covariance=errors(2, [0.1, 0.1]))
    for constraints in (Constraints(final_reference=0.5), Constraints(allowed=(Strategy(mode=0),))):
        schedule = optimize(profile, 1000, criterion=worth, constraints=constraints, draws=60, slices=10)
        assert schedule.predicted["more_samples"] == []
        assert schedule.predicted["regret"] == pytest.approx(0, abs=1e-12)


def test_who_is_not_allowed_is_no_rival(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 0.9]], covariance=errors(1, [0.5, 0.5]))
    only = Constraints(allowed=(Strategy(mode=0),))
    (found,) = optimize(profile, 1000, criterion=worth, constraints=only, draws=60, slices=10).stages
    assert (found.probability, found.regret, found.rival) == (1.0, 0.0, None)


@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
@pytest.mark.parametrize("uncertain", range(4))
def test_samples_are_asked_for_where_the_error_is(uncertain: int, mode: str, worth, worth_profile) -> None:
    sd = np.zeros((4, 2))
    sd[uncertain, 1] = 3.0
    profile = worth_profile(np.ones((4, 2)) * [1.0, 1.001], covariance=errors(4, sd))
    schedule = optimize(profile, 1000, criterion=worth, draws=200, slices=20, progress=mode)
    asked = schedule.predicted["more_samples"]
    assert {wish["checkpoint"] for wish in asked} == {uncertain}
    assert {wish["progress"] for wish in asked} == {profile.progress[uncertain]}
    assert [wish["strategy"] for wish in asked] == [{"mode": 0}, {"mode": 1}]


def test_the_larger_the_error_the_more_samples(worth, worth_profile) -> None:
    times = []
    for sd in (0.01, 0.12, 0.16, 0.4, 3.0):
        profile = worth_profile([[1.0, 1.15]], covariance=errors(1, [sd, sd]))
        found = doubt(profile, worth, "fraction", 1, [0.5])
        wishes = cells_worth_samples(profile, [stage(1)], [found])
        assert {(wish.t, wish.c) for wish in wishes} in ({(0, 0), (0, 1)}, set())
        times.append(max((wish.times for wish in wishes), default=0))
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == MOST_TIMES
    assert len(set(times)) == 3


def test_a_wish_would_make_the_difference_plain(worth, worth_profile) -> None:
    """With `times` the samples the error is at most the difference over 1.64, and with half as many it is not."""
    profile = worth_profile([[1.0, 1.3]], covariance=errors(1, [0.4, 0.3]))
    found = doubt(profile, worth, "fraction", 1, [0.5])
    wishes = cells_worth_samples(profile, [stage(1)], [found])
    times = wishes[0].times
    assert wishes == [CellWish(0, 0, times), CellWish(0, 1, times)]
    assert 0.5 / math.sqrt(times) <= 0.3 / 1.64 * 1.02
    assert 0.5 / math.sqrt(times / 2) > 0.3 / 1.64


def test_the_regret_of_a_schedule_is_what_perfect_knowledge_would_add(worth, worth_profile) -> None:
    profile = worth_profile([[2.0, 2.2]], covariance=errors(1, [0.3, 0.4]))
    problem = Problem.of(profile, worth, Constraints(), 1, 0.0, "fraction")
    found = relative_shortfall(*redrawn(problem, np.array([1]), 1000.0, draws=2000))
    assert found == pytest.approx(shortfall(0.2, 0.5) / (2.2 + shortfall(0.2, 0.5)), rel=0.1)
    # by trajectory the pilot, here the reference, moves at 1 in every draw
    noise = np.random.default_rng(1).normal(size=(2, 1_000_000))
    ratio = (2.2 + 0.4 * noise[0]) / np.maximum(2 + 0.3 * noise[1], 0.2)
    problem = Problem.of(profile, worth, Constraints(), 1, 0.0, "trajectory")
    found = relative_shortfall(*redrawn(problem, np.array([1]), 1000.0, draws=2000))
    assert found == pytest.approx(np.maximum(1 - ratio, 0).mean() / np.maximum(1, ratio).mean(), rel=0.1)


@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
@pytest.mark.parametrize("criterion", ["descent", "ca-mse"])
def test_the_regret_grows_from_nothing_with_the_errors(criterion: str, mode: str, worth_profile) -> None:
    rng = np.random.default_rng(0)
    moments = Moments(*(rng.uniform(0.5, 1.0, size=(3, 3)) for _ in range(4)), np.ones((3, 3)))
    found = []
    for size in (0.0, 0.01, 0.1, 1.0, 3.0):
        covariance = np.broadcast_to(size**2 * np.eye(5), (3, 3, 5, 5))
        profile = worth_profile(np.ones((3, 3)), [4, 2, 1], moments=moments, covariance=covariance)
        schedule = optimize(profile, 1000, criterion=criterion, progress=mode, slices=12, draws=60)
        found.append(schedule.predicted["regret"])
        unsure = [s.probability for s in schedule.stages]
    assert found[0] == 0.0
    assert found[1] < found[2] < min(found[3:])
    assert found[-1] > 0.02
    assert max(unsure) < 0.95  # errors three times the moments leave nothing certain
    assert schedule.predicted["more_samples"]


@pytest.mark.parametrize("mode", ["fraction", "trajectory"])
def test_nothing_is_lost_where_every_choice_is_the_same_mixture(mode: str, worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 1.2], [1.0, 0.9]], covariance=errors(2, [0.5, 0.5]))
    arguments = {"criterion": worth, "progress": mode, "draws": 50, "slices": 10}
    assert optimize(profile, 1000, exploration=1.0, **arguments).predicted["regret"] == pytest.approx(0, abs=1e-12)
    half, none = (optimize(profile, 1000, exploration=e, **arguments).predicted["regret"] for e in (0.5, 0.0))
    assert 0 < half < none


def test_with_a_limit_of_seconds_the_best_of_a_draw_keeps_it_too(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 2.0]], seconds=[0.1, 0.4], covariance=errors(1, [0.0, 0.0]))
    for mode in ("fraction", "trajectory"):
        schedule = optimize(
            profile,
            1000,
            criterion=worth,
            constraints=Constraints(max_seconds=200.0),
            draws=50,
            slices=12,
            progress=mode,
        )
        assert {s.strategy for s in schedule.stages} == {Strategy(mode=0), Strategy(mode=1)}
        assert schedule.predicted["regret"] == pytest.approx(0, abs=1e-12)
        assert schedule.predicted["more_samples"] == []


def test_the_seed_decides_the_numbers(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 1.1, 1.05]], covariance=errors(1, [0.3, 0.2, 0.4]))
    first, again, other = (
        optimize(profile, 1000, criterion=worth, draws=80, seed=seed, slices=10) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.predicted["regret"] != other.predicted["regret"]
    assert first.stages[0].probability != other.stages[0].probability


def test_stages_tell_of_their_doubt_and_of_none_without_draws(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 1.5], [1.0, 0.8]], covariance=errors(2, [0.1, 0.2]))
    schedule = optimize(profile, 1000, criterion=worth, draws=400, slices=10)
    assert [s.rival for s in schedule.stages] == [Strategy(mode=0), Strategy(mode=1)]
    assert all(0 < s.probability < 1 and s.regret > 0 for s in schedule.stages)
    assert Schedule.from_json(schedule.to_json()) == schedule
    plain = optimize(profile, 1000, criterion=worth, slices=10)
    assert {(s.probability, s.regret, s.rival) for s in plain.stages} == {(None, None, None)}
    assert "more_samples" not in plain.predicted
    assert "regret" not in plain.predicted


def test_a_stage_whose_strategy_was_not_measured_there_has_no_doubt(worth, worth_profile) -> None:
    profile = worth_profile([[1.0, 1.5], [1.0, np.nan]], covariance=errors(2, [0.1, 0.2]))
    allowed = np.ones(2, dtype=bool)
    arguments = ([stage(1), stage(0)], [np.array([0.7]), np.array([0.7])], allowed)
    missing, alone = stage_doubts(profile, worth, "fraction", *arguments, draws=50)
    assert missing is None
    assert (alone.probability, alone.rival) == (1.0, None)
    assert cells_worth_samples(profile, [stage(1), stage(0)], [missing, alone]) == []


def test_a_profile_without_errors_has_nothing_to_tell(worth, worth_profile) -> None:
    with pytest.raises(UsageError, match="no standard errors"):
        optimize(worth_profile([[1.0, 2.0]]), 1000, criterion=worth, draws=50)


def test_draws_have_the_covariance_of_the_measurement(worth_profile) -> None:
    rng = np.random.default_rng(0)
    root = 0.1 * rng.normal(size=(2, 3, 5, 5))
    covariance = root @ root.swapaxes(-1, -2)
    profile = worth_profile(np.ones((2, 3)), covariance=covariance)
    drawn = np.stack([getattr(moment_draws(profile, DRAWS, 0), name) for name in MOMENTS], axis=-1)
    assert drawn.shape == (DRAWS, 2, 3, 5)
    assert drawn.mean(axis=0) == pytest.approx(np.ones((2, 3, 5)), abs=0.02)
    flat = np.cov(drawn.reshape(DRAWS, -1).T).reshape(2, 3, 5, 2, 3, 5)
    for t in range(2):
        assert flat[t, 0, :, t, 0] == pytest.approx(covariance[t, 0], abs=0.003)  # the reference
        for c in range(1, 3):
            assert flat[t, c, :4, t, c, :4] == pytest.approx(covariance[t, c, :4, :4], abs=0.003)
    assert flat[0, 1, :, 1, 1] == pytest.approx(np.zeros((5, 5)), abs=0.003)
    assert np.ptp(drawn[..., 4], axis=2).max() == 0  # one ||G||^2 of all strategies


@pytest.mark.parametrize("seed", range(2))
def test_in_every_draw_the_pilot_moves_at_one(seed: int, worth, worth_profile) -> None:
    mixture = ((Strategy(mode=0), 0.3), (Strategy(mode=1), 0.2), (Strategy(mode=2), 0.5))
    values = np.random.default_rng(seed).uniform(1, 2, size=(3, 3))
    profile = worth_profile(
        values, [4, 2, 1], covariance=errors(3, [0.2, 0.1, 0.2]), pilot=(Stage(0, 1, mixture, 2.1),)
    )
    share = np.array([1.2, 0.4, 0.5]) / 2.1
    assert worth_draws(profile, worth, "trajectory", 100, seed) @ share == pytest.approx(np.ones((100, 3)))


def test_a_measured_cell_without_errors_is_no_certain_cell(worth, worth_profile) -> None:
    covariance = errors(2, [0.1, 0.2])
    covariance[1, 1] = np.nan
    with pytest.raises(UsageError, match="no standard errors of some measured cells"):
        optimize(worth_profile(np.ones((2, 2)), covariance=covariance), 1000, criterion=worth, draws=50)
    holed = worth_profile([[1.0, 1.5], [1.0, np.nan]], covariance=covariance)  # what was not measured needs none
    assert optimize(holed, 1000, criterion=worth, draws=50, slices=10).predicted["regret"] >= 0


def test_a_variance_is_never_drawn_negative(worth_profile) -> None:
    covariance = np.zeros((1, 2, 5, 5))
    covariance[..., MOMENTS.index("variance"), MOMENTS.index("variance")] = 2.0**2
    profile = worth_profile(np.ones((1, 2)), covariance=covariance)
    assert moment_draws(profile, 500, 0).variance.min() == pytest.approx(0.01)  # a hundredth of its estimate


def test_draws_have_the_covariances_of_influence_between_cells(worth_profile) -> None:
    influence = 0.05 * np.random.default_rng(1).normal(size=(2, 3, 5, 7))
    profile = worth_profile(np.ones((2, 3)), influence=influence)
    drawn = np.stack([getattr(moment_draws(profile, DRAWS, 0), name) for name in MOMENTS], axis=-1)
    rows = influence.reshape(-1, 7)
    assert np.cov(drawn.reshape(DRAWS, -1).T) == pytest.approx(rows @ rows.T, abs=0.0015)


def test_the_worth_of_draws_is_the_speed_or_the_score(raw, worth_profile) -> None:
    """Without errors every draw is the estimate."""
    score = np.array([[2.0, 0.5], [1.0, -3.0], [1.0, 4.0]])
    profile = worth_profile(np.ones((3, 2)), covariance=np.zeros((3, 2, 5, 5)))
    profile = dataclasses.replace(profile, moments=dataclasses.replace(profile.moments, bias_sq=score))
    assert worth_draws(profile, raw, "fraction", 2, 0).tolist() == [(-score).tolist()] * 2
    speed = [[1.0, 4.0], [1.0, 1.0], [1.0, 0.25]]  # what is not above 0 counts as the smallest of its point that is
    assert worth_draws(profile, raw, "trajectory", 2, 0).tolist() == [speed] * 2
