import numpy as np
import pytest
from numpy.testing import assert_allclose

from schedulers import CRITERIA, MOMENTS, Moments, UsageError, criterion_se, get_criterion, readable

SETTINGS = {"beta": 40.0, "batch_size": 16, "reference_cost": 4.0}


def moments(**changes: object) -> Moments:
    values = {"bias_sq": 0.5, "variance": 20.0, "norm_sq": 1.5, "inner": 0.9, "norm_sq_ref": 2.0, **changes}
    return Moments(**{name: np.asarray(value, dtype=float) for name, value in values.items()})


def of_vectors(mean: np.ndarray, reference: np.ndarray, variance: float) -> Moments:
    """The exact moments of a gradient with that mean and per-sample variance."""
    return moments(
        bias_sq=np.sum((mean - reference) ** 2),
        variance=variance,
        norm_sq=mean @ mean,
        inner=mean @ reference,
        norm_sq_ref=reference @ reference,
    )


def score(name: str, values: Moments, cost: object = 2.0, **changes: float) -> np.ndarray:
    return CRITERIA[name].score(values, cost, **{**SETTINGS, **changes})


def test_ca_mse_is_the_error_of_an_update_of_that_budget() -> None:
    rng = np.random.default_rng(0)
    reference, mean, spread = np.array([1.0, 0.5, -1.0]), np.array([0.8, 0.9, -0.4]), np.array([2.0, 1.0, 0.5])
    samples = 20  # beta / cost
    updates = mean + spread * rng.standard_normal((40_000, samples, 3)).mean(axis=1)
    error = np.sum((updates - reference) ** 2, axis=1).mean() / np.sum(reference**2)
    assert score("ca-mse", of_vectors(mean, reference, np.sum(spread**2))) == pytest.approx(error, rel=0.02)


def test_descent_without_noise_is_the_squared_cosine_with_its_sign() -> None:
    reference, mean = np.array([1.0, 0.5, -1.0]), np.array([0.8, 0.9, -0.4])
    cosine = mean @ reference / np.linalg.norm(mean) / np.linalg.norm(reference)
    assert score("descent", of_vectors(mean, reference, 0.0)) == pytest.approx(cosine**2)
    assert score("descent", of_vectors(-mean, reference, 0.0)) == pytest.approx(-(cosine**2))


def test_descent_with_noise_divides_by_the_squared_length_of_the_update() -> None:
    rng = np.random.default_rng(1)
    reference, mean, spread = np.array([1.0, 0.5, -1.0]), np.array([0.8, 0.9, -0.4]), np.array([2.0, 1.0, 0.5])
    updates = mean + spread * rng.standard_normal((40_000, 20, 3)).mean(axis=1)
    expected = (updates @ reference).mean() ** 2 / np.sum(updates**2, axis=1).mean() / np.sum(reference**2)
    assert score("descent", of_vectors(mean, reference, np.sum(spread**2))) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", ["descent", "descent-batch"])
def test_a_longer_gradient_of_the_same_direction_is_no_worse(name: str) -> None:
    reference, mean = np.array([1.0, 0.5]), np.array([0.8, 0.9])
    long = score(name, of_vectors(2.5 * mean, reference, 2.5**2 * 3))
    assert long == pytest.approx(float(score(name, of_vectors(mean, reference, 3))))
    assert score("ca-mse", of_vectors(2.5 * mean, reference, 19)) > score("ca-mse", of_vectors(mean, reference, 3))


def test_descent_batch_is_descent_at_the_batchs_own_budget_per_unit() -> None:
    values = moments(inner=[-0.4, 0.9, 1.2])
    per_budget = score("descent", values, cost=2.5, beta=16 * 2.5)
    assert_allclose(score("descent-batch", values, cost=2.5), per_budget * 4.0 / 2.5)


def test_the_noiseless_reference_scores_0_and_1() -> None:
    reference = of_vectors(np.array([1.0, 2.0]), np.array([1.0, 2.0]), 0.0)
    assert [float(score(name, reference, cost=4.0)) for name in CRITERIA] == pytest.approx([0, 1, 1])


def test_negative_estimates_are_clamped_where_they_are_read() -> None:
    assert score("ca-mse", moments(bias_sq=-0.3)) == score("ca-mse", moments(bias_sq=0.0))
    for name in ("descent", "descent-batch"):
        assert score(name, moments(norm_sq=-0.7)) == score(name, moments(norm_sq=0.0))


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("norm_sq_ref", [0.0, -1.0, np.nan])
def test_a_reference_lost_in_noise_gives_no_score(name: str, norm_sq_ref: float) -> None:
    assert np.isnan(score(name, moments(norm_sq_ref=norm_sq_ref)))


@pytest.mark.parametrize("name", CRITERIA)
def test_a_missing_cell_is_missing_alone(name: str) -> None:
    values = moments(bias_sq=[0.1, np.nan, 0.1], variance=[1, np.nan, 1], norm_sq=[1, np.nan, 1], inner=[1, np.nan, 1])
    assert np.isnan(score(name, values)).tolist() == [False, True, False]
    assert np.isnan(score(name, moments(bias_sq=[0.1] * 3), cost=[1, 2, np.nan])).tolist() == [False, False, True]


def test_no_length_and_no_noise_gives_no_cosine() -> None:
    assert np.isnan(score("descent", moments(norm_sq=0.0, variance=0.0)))


@pytest.mark.parametrize(("name", "lower"), [("ca-mse", True), ("descent", False), ("descent-batch", False)])
def test_the_direction_of_each_criterion(name: str, lower: bool) -> None:
    good = of_vectors(np.array([1.0, 0.1]), np.array([1.0, 0.0]), 0.1)
    bad = of_vectors(np.array([0.1, 1.0]), np.array([1.0, 0.0]), 0.1)
    assert get_criterion(name).lower_is_better is lower
    assert (score(name, good) < score(name, bad)) == lower


@pytest.mark.parametrize("name", CRITERIA)
def test_costs_run_along_the_last_axis(name: str) -> None:
    table = moments(bias_sq=np.arange(6.0).reshape(2, 3))
    together = score(name, table, cost=np.array([1.0, 2.0, 3.0]))
    assert together.shape == (2, 3)
    assert together[1, 2] == score(name, moments(bias_sq=5.0), cost=3.0)


def test_an_unknown_criterion_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="unknown criterion 'mse'; the criteria are ca-mse, descent, descent-batch"):
        get_criterion("mse")


def test_moments_of_different_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"do not share one shape: bias_sq \(2,\), variance \(\), norm_sq \(3,\)"):
        moments(bias_sq=[1, 2], norm_sq=[1, 2, 3])


def random_covariance(rng: np.random.Generator, scale: np.ndarray) -> np.ndarray:
    root = rng.standard_normal((5, 5)) / np.sqrt(5)
    return (root @ root.T) * np.outer(scale, scale)


@pytest.mark.parametrize("name", CRITERIA)
def test_the_standard_error_is_the_spread_of_the_score(name: str) -> None:
    rng = np.random.default_rng(3)
    truth = np.array([getattr(moments(), m) for m in MOMENTS])
    covariance = random_covariance(rng, 0.02 * truth)
    draws = rng.multivariate_normal(truth, covariance, size=100_000)
    spread = score(name, Moments(*draws.T)).std()
    assert criterion_se(name, moments(), covariance, 2.0, **SETTINGS) == pytest.approx(spread, rel=0.02)


def test_the_standard_error_of_ca_mse_in_closed_form() -> None:
    rng = np.random.default_rng(4)
    values = moments()
    covariance = random_covariance(rng, np.full(5, 0.05))
    noise = 2.0 / 40.0
    value = (0.5 + noise * 20) / 2
    gradient = np.array([1 / 2, noise / 2, 0, 0, -value / 2])
    expected = np.sqrt(gradient @ covariance @ gradient)
    assert criterion_se("ca-mse", values, covariance, 2.0, **SETTINGS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "moment"), [("ca-mse", "bias_sq"), ("descent", "inner"), ("descent", "norm_sq")])
@pytest.mark.parametrize("distance", [-0.5, 0.0, 0.5])
def test_near_a_kink_the_standard_error_is_of_the_size_of_the_spread(name: str, moment: str, distance: float) -> None:
    # one standard error is 0.4; the moment lies half of one from 0, where its slope alone says 0 or all
    rng = np.random.default_rng(5)
    values = moments(**{moment: 0.4 * distance})
    covariance = np.zeros((5, 5))
    i = MOMENTS.index(moment)
    covariance[i, i] = 0.4**2
    draws = moments(**{moment: 0.4 * distance + 0.4 * rng.standard_normal(100_000)})
    se = criterion_se(name, values, covariance, 2.0, **SETTINGS)
    assert 0.4 < se / score(name, draws).std() < 1.6


def test_the_noiseless_reference_has_no_error_in_descent() -> None:
    # inner, norm_sq and norm_sq_ref are one and the same number there
    values = moments(bias_sq=0.0, variance=0.0, norm_sq=2.0, inner=2.0, norm_sq_ref=2.0)
    same = np.zeros((5, 5))
    same[2:, 2:] = 0.1
    assert criterion_se("descent", values, same, 4.0, **SETTINGS) == pytest.approx(0, abs=1e-7)


def test_the_standard_error_of_a_table() -> None:
    rng = np.random.default_rng(6)
    table = moments(bias_sq=np.array([[0.5, np.nan, 0.1], [1.0, 2.0, 3.0]]))
    covariance = np.array([[random_covariance(rng, np.full(5, 0.1)) for _ in range(3)] for _ in range(2)])
    covariance[1, 1] = np.nan
    se = criterion_se("ca-mse", table, covariance, np.array([1.0, 2.0, 3.0]), **SETTINGS)
    assert np.isnan(se).tolist() == [[False, True, False], [False, True, False]]
    assert se[1, 2] == criterion_se("ca-mse", moments(bias_sq=3.0), covariance[1, 2], 3.0, **SETTINGS)


def test_a_covariance_of_another_shape_is_refused() -> None:
    with pytest.raises(UsageError, match=r"covariance has shape \(4, 4\)"):
        criterion_se("ca-mse", moments(), np.eye(4), 2.0, **SETTINGS)


def test_a_reference_norm_lost_in_noise_keeps_the_ranking() -> None:
    """With norm_sq_ref below its standard error the scores differ by one common factor from any other scale."""
    covariance = np.zeros((2, 5, 5))
    covariance[:, 4, 4] = 0.25
    lost = Moments(*(np.array(v) for v in ([0.2, 0.9], [3.0, 5.0], [1.0, 1.2], [0.7, 0.4], [-0.1, -0.1])))
    known = Moments(lost.bias_sq, lost.variance, lost.norm_sq, lost.inner, np.array([1.0, 1.0]))
    settings = {"beta": 8.0, "batch_size": 2, "reference_cost": 4.0}
    for criterion in CRITERIA.values():
        assert np.isnan(criterion.score(lost, [4.0, 1.0], **settings)).all()
        ratio = criterion.score(readable(lost, covariance), [4.0, 1.0], **settings) / criterion.score(
            known, [4.0, 1.0], **settings
        )
        np.testing.assert_allclose(ratio, 1 / 0.5)
    assert readable(known, covariance).norm_sq_ref.tolist() == [1.0, 1.0]
    assert readable(lost, None) is lost
