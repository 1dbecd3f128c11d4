"""Pooled evidence of an online run beside explicit loops over probes, strategies and sub-batches."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

import schedulers.evidence
from schedulers import MOMENTS, Criterion, Measurement, Strategy, UsageError, get_criterion
from schedulers.alignment import Sighting, posterior
from schedulers.evidence import Evidence
from tests.schedulers.adaptive_cases import KEEP, aligned_means, gradients_of, keep_cost, measurement_of, some_of

QUARTER, HALF, WHOLE = KEEP.strategies()
SIZE, HALF_LIFE = 8, 0.15


def reading(name: str) -> Criterion:
    """A criterion that is a moment itself."""
    return Criterion(
        name, name, False, lambda moments, cost, *, beta, batch_size, reference_cost: getattr(moments, name)
    )


def evidence_of(criterion: str | Criterion = "descent", half_life: float = HALF_LIFE) -> Evidence:
    costs = keep_cost(KEEP)
    return Evidence(
        tuple(KEEP.strategies()), 2, np.array(list(costs.values())), SIZE, get_criterion(criterion), half_life, []
    )


def some_measurements(seed: int = 0) -> list[tuple[float, Measurement]]:
    """Three probes: of all strategies, of two, and one in which a strategy left the race early."""
    rng, means = np.random.default_rng(seed), aligned_means(KEEP, {"keep=0.25": 0.6, "keep=0.5": 0.9})
    first = gradients_of(means, rng, 6)
    second = gradients_of({s: 0.5 * means[s] for s in (QUARTER, WHOLE)}, rng, 4)
    third = gradients_of({s: 3 * means[s] for s in KEEP.strategies()}, rng, 9)
    third[HALF] = third[HALF][:5]
    return [(at, measurement_of(g, WHOLE, SIZE)) for at, g in ((0.1, first), (0.2, second), (0.45, third))]


def filled(criterion: str | Criterion = "descent", seed: int = 0, half_life: float = HALF_LIFE) -> Evidence:
    evidence = evidence_of(criterion, half_life)
    for fraction, found in some_measurements(seed):
        evidence.add(fraction, found)
    return evidence


def weights(
    now: float, seed: int = 0, half_life: float = HALF_LIFE
) -> dict[Strategy, list[tuple[float, float, Any, int]]]:
    """Of every strategy: (decay, sub-batches, measurement, its row there), probe by probe."""
    counts = [{QUARTER: 6, HALF: 6, WHOLE: 6}, {QUARTER: 4, WHOLE: 4}, {QUARTER: 9, HALF: 5, WHOLE: 9}]
    rows: dict[Strategy, list[tuple[float, float, Any, int]]] = {s: [] for s in KEEP.strategies()}
    for (fraction, found), count in zip(some_measurements(seed), counts, strict=True):
        for s, sub_batches in count.items():
            decay = 0.5 ** ((now - fraction) / HALF_LIFE)
            rows[s].append((decay, sub_batches, found, found.strategies.index(s)))
    return rows


def scale_of(found: Measurement) -> float:
    """The reference's mean squared gradient norm of one step."""
    at = found.strategies.index(WHOLE)
    return float(found.moments[at, MOMENTS.index("norm_sq_ref")] + found.moments[at, MOMENTS.index("variance")] / SIZE)


@pytest.mark.parametrize("name", ["bias_sq", "variance", "norm_sq"])
def test_pooled_moments_are_a_ratio_of_decayed_sums(name: str) -> None:
    pooled = filled(reading(name)).pooled(0.6)
    for c, (s, rows) in enumerate(weights(0.6).items()):
        above = below = 0.0
        for decay, sub_batches, found, row in rows:
            above += decay * sub_batches * found.moments[row, MOMENTS.index(name)] / scale_of(found)
            below += decay * sub_batches
        assert pooled.worth_C[c] == pytest.approx(above / below, rel=1e-12), s


def test_effective_counts_are_those_of_weighted_sub_batches() -> None:
    pooled = filled().pooled(0.6)
    for c, rows in enumerate(weights(0.6).values()):
        each = [decay for decay, sub_batches, _, _ in rows for _ in range(int(sub_batches))]
        assert pooled.effective_C[c] == pytest.approx(sum(each) ** 2 / sum(w * w for w in each), rel=1e-12)
    plain = evidence_of()
    plain.add(0.3, some_measurements()[0][1])
    np.testing.assert_allclose(plain.pooled(0.9).effective_C, 6)  # all weights alike: all of them count


@pytest.mark.parametrize("name", ["norm_sq", "bias_sq"])
def test_draws_scatter_as_the_influences_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covariance within and between strategies, from an explicit sum over probes and sub-batches."""
    monkeypatch.setattr(schedulers.evidence, "DRAWS", 40_000)
    drawn_BC = filled(reading(name)).pooled(0.6).draws_BC
    totals = {s: sum(decay * n for decay, n, _, _ in rows) for s, rows in weights(0.6).items()}
    expected = np.zeros((3, 3))
    for fraction, found in some_measurements():
        decay = 0.5 ** ((0.6 - fraction) / HALF_LIFE)
        for m in range(found.influence.shape[-1]):
            move = np.zeros(3)
            for row, s in enumerate(found.strategies):
                n = int((found.influence[row] != 0).any(axis=0).sum())
                share = decay * n / totals[s]
                move[KEEP.strategies().index(s)] = (
                    share * found.influence[row, MOMENTS.index(name), m] / scale_of(found)
                )
            expected += np.outer(move, move)
    scatter = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_array_less(np.abs(np.cov(drawn_BC.T) - expected), 0.03 * scatter + 1e-12)
    np.testing.assert_allclose(drawn_BC.mean(0), filled(reading(name)).pooled(0.6).worth_C, atol=0.05)


def test_alignments_are_the_posterior_of_a_process_over_strategies_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """In information form, entry by entry: precision = prior^-1 + noise^-1 over all strategies of all probes."""
    monkeypatch.setattr(schedulers.evidence, "DRAWS", 20_000)
    at_inner, at_ref = MOMENTS.index("inner"), MOMENTS.index("norm_sq_ref")
    log = {QUARTER: math.log(4), HALF: math.log(2)}
    placed = [(at, s) for at in (0.1, 0.2, 0.45, 0.6) for s in (QUARTER, HALF)]
    prior = np.array(
        [
            [2 ** (-abs(f - g) / HALF_LIFE) * (0.15**2 * log[s] * log[t] + 0.1**2 * (s == t)) for g, t in placed]
            for f, s in placed
        ]
    )
    precision, weighted = np.linalg.inv(prior), np.linalg.inv(prior) @ [-0.25 * log[s] for _, s in placed]
    common, uncertain, before = 0.0, 0.0, 0.0
    for at, found in some_measurements():
        whole, count = found.strategies.index(WHOLE), found.influence.shape[-1]
        moments, influence = found.moments / scale_of(found), found.influence / scale_of(found)
        error = float((influence[whole, at_ref] ** 2).sum())
        uncertain += (common * (2 ** ((at - before) / HALF_LIFE) - 1)) ** 2  # |G|^2 drifts
        gain = uncertain / (uncertain + error) if common else 1.0
        common += gain * (moments[whole, at_ref] - common)
        uncertain, before = (1 - gain) * uncertain if at > 0.1 else error, at
        assert common > math.sqrt(uncertain) > 0
        others = [s for s in (QUARTER, HALF) if s in found.strategies]
        rows = [found.strategies.index(s) for s in others]
        apart = (moments[rows, at_inner] - moments[rows, at_ref]) / common
        follow = np.array([[-0.25 * log[s] * gain] for s in others])
        moves = (influence[rows, at_inner] - influence[rows, at_ref] - follow * influence[whole, at_ref]) / common
        noise = moves @ moves.T
        alone = len(rows) / (len(rows) + count - 1) if len(rows) > 1 else 0.0
        noise = (1 - alone) * noise + alone * np.diag(np.diag(noise))
        at_rows = [placed.index((at, s)) for s in others]
        precision[np.ix_(at_rows, at_rows)] += np.linalg.inv(noise)
        weighted[at_rows] += np.linalg.inv(noise) @ apart
    covariance = np.linalg.inv(precision)
    mean, spread = (covariance @ weighted)[-2:], covariance[-2:, -2:]
    pooled = filled(reading("inner")).pooled(0.6)
    known = pooled.worth_C[2]
    assert known == pytest.approx(common)
    np.testing.assert_allclose(pooled.worth_C[:2] / known, 1 + mean, rtol=1e-6)
    drawn = pooled.draws_BC[:, :2] / known
    np.testing.assert_allclose(drawn.mean(0), 1 + mean, atol=0.01)
    scatter = np.sqrt(np.outer(np.diag(spread), np.diag(spread)))
    np.testing.assert_array_less(np.abs(np.cov(drawn.T) - spread), 0.05 * scatter)
    assert (pooled.draws_BC[:, 2] == known).all()


@pytest.mark.parametrize(
    ("sub_batches", "noise", "worse"), [(4, 1.0, 1.3), (4, 0.3, 0.9), (12, 1.0, 1.2), (12, 0.1, 0.6)]
)
def test_many_strategies_in_few_sub_batches_are_not_mistaken_for_certainty(
    sub_batches: int, noise: float, worse: float
) -> None:
    """Of 8 strategies, drawn from what is assumed, with errors that 4 sub-batches cannot know all of."""
    cost_C = np.array([1.0, 2, 3, 4, 6, 8, 12, 16, 1])[::-1] / 16
    cost_C[0] = 1.0
    log_C = np.log(cost_C[0] / cost_C)
    rng = np.random.default_rng(0)
    errors, before, spreads = [], [], []
    for _ in range(60):
        true_C = -(0.25 + 0.15 * rng.standard_normal()) * log_C + 0.1 * rng.standard_normal(9)
        errors_CM = noise * math.sqrt(sub_batches) * rng.standard_normal((9, sub_batches))
        influence_CM = (errors_CM - errors_CM.mean(1, keepdims=True)) / math.sqrt(sub_batches * (sub_batches - 1))
        draws_BC = rng.standard_normal((256, sub_batches)) @ influence_CM.T
        seen = Sighting(0.3, true_C + errors_CM.mean(1), influence_CM, draws_BC)
        mean_C, drawn_BC = posterior(0.3, [seen], cost_C, 0, HALF_LIFE, 256)
        errors.append((mean_C - true_C)[1:])
        before.append((-0.25 * log_C - true_C)[1:])
        spreads.append(drawn_BC.std(0)[1:])
    error, prior = math.sqrt(np.square(errors).mean()), math.sqrt(np.square(before).mean())
    assert error < worse * prior
    claimed = math.sqrt(np.square(spreads).mean())
    assert 0.5 * error < claimed < 1.5 * error


def test_an_alignment_that_stays_is_found_although_noise_and_length_change() -> None:
    """Two probes without error, of gradients whose |G|^2 falls twenty times against their noise in between."""
    for gap in (0.02, 0.07, 0.28):
        evidence = evidence_of(reading("inner"))
        for fraction, length in ((0.2, 1.0), (0.2 + gap, 0.05)):
            moments = np.array([[0.1, 8.0, length, inner * length, length] for inner in (0.1, 0.4, 1.0)])
            influence = np.full((3, 5, 6), 1e-9) * np.array([1, -1, 1, -1, 1, -1])
            evidence.add(fraction, Measurement((QUARTER, HALF, WHOLE), moments, influence))
        worth_C = evidence.pooled(0.2 + gap).worth_C
        np.testing.assert_allclose(worth_C / worth_C[2], [0.1, 0.4, 1.0], rtol=1e-3)


def test_the_more_compressed_a_strategy_the_less_it_is_trusted_before_it_is_measured_well() -> None:
    """Of pure noise nothing is learnt: what stays is the prior, 1 - log(k) / 4."""
    psi = np.random.default_rng(1).normal(size=(3, 5, 8)) * 100
    moments = np.tile([0.5, 8.0, 1.0, 1.0, 1.0], (3, 1))
    evidence = evidence_of(reading("inner"))
    evidence.add(0.2, Measurement((QUARTER, HALF, WHOLE), moments, psi))
    worth_C = evidence.pooled(0.2).worth_C
    np.testing.assert_allclose(worth_C / worth_C[2], [1 - math.log(4) / 4, 1 - math.log(2) / 4, 1], atol=0.01)


def test_one_strategy_tells_about_another() -> None:
    """A badly aligned half makes the quarter less trusted, although the quarter was not measured any better."""
    moments = np.tile([0.5, 8.0, 1.0, 1.0, 1.0], (3, 1))
    found = []
    for inner in (1.0, 0.5):
        psi = np.zeros((3, 5, 8))
        psi[0, MOMENTS.index("inner")] = 5 * np.random.default_rng(1).normal(size=8)
        moments[1, MOMENTS.index("inner")] = inner
        evidence = evidence_of(reading("inner"))
        evidence.add(0.2, Measurement((QUARTER, HALF, WHOLE), moments, psi))
        found.append(evidence.pooled(0.2).worth_C)
    (first, second, _), (lower, least, _) = found
    assert least == pytest.approx(second / 2) and lower < 0.8 * first


def test_what_common_images_err_by_cancels_in_differences() -> None:
    """The estimates of two strategies move together; the difference is known far better than either."""
    rng = np.random.default_rng(3)
    means = aligned_means(KEEP, {"keep=0.5": 0.95}, length=1.0)
    paired = measurement_of(gradients_of(means, rng, 12, common=2.0, own=0.02), WHOLE, SIZE)
    evidence = evidence_of(reading("norm_sq"))
    evidence.add(0.2, paired)
    drawn_BC = evidence.pooled(0.2).draws_BC
    alone, apart = drawn_BC[:, 1].std(), (drawn_BC[:, 1] - drawn_BC[:, 2]).std()
    assert 0 < apart < 0.25 * alone


def test_equal_influences_cancel_exactly_and_opposite_ones_add_up() -> None:
    psi = np.random.default_rng(0).normal(size=(5, 6))
    moments = np.tile([0.5, 8.0, 1.0, 1.0, 1.0], (3, 1))
    moments[0, MOMENTS.index("norm_sq")] = 0.4
    evidence = evidence_of(reading("norm_sq"))
    evidence.add(0.2, Measurement((QUARTER, HALF, WHOLE), moments, np.stack([psi, -psi, psi])))
    drawn_BC = evidence.pooled(0.2).draws_BC
    np.testing.assert_allclose(drawn_BC[:, 2] - drawn_BC[:, 0], 0.6 / 2, rtol=1e-12)  # 0.6 over |G|^2 + variance / K
    same, opposite = drawn_BC[:, 0].std(), (drawn_BC[:, 0] - drawn_BC[:, 1]).std()
    assert opposite == pytest.approx(2 * same, rel=1e-9)


@pytest.mark.parametrize("criterion", ["descent", "ca-mse", "descent-batch"])
def test_the_length_of_all_gradients_changes_nothing(criterion: str) -> None:
    """Times a power of two not a bit changes; each probe may have a length of its own."""
    before = filled(criterion).pooled(0.6)
    for factors in ([2.0**20] * 3, [2.0**-30, 1.0, 2.0**8]):
        scaled = evidence_of(criterion)
        for factor, (fraction, found) in zip(factors, some_measurements(), strict=True):
            scaled.add(fraction, some_of(found, found.strategies, factor**2))
        after = scaled.pooled(0.6)
        for name in ("worth_C", "draws_BC", "effective_C"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize("criterion", ["descent", "ca-mse", "descent-batch"])
def test_worth_is_the_criterion_of_the_pooled_moments(criterion: str) -> None:
    """Read with the reference's |G|^2 for all strategies; larger is better, whatever the criterion."""
    moments = {n: filled(reading(n)).pooled(0.6).worth_C for n in ("bias_sq", "variance", "norm_sq", "inner")}
    worth_C, cost = filled(criterion).pooled(0.6).worth_C, list(keep_cost(KEEP).values())
    norm_ref = moments["inner"][2]  # of the reference with itself
    for c in range(3):
        bias, variance, norm, inner = (moments[n][c] for n in ("bias_sq", "variance", "norm_sq", "inner"))
        noise = cost[c] / (SIZE * cost[2]) * variance
        expected = {
            "descent": inner * abs(inner) / ((max(norm, 0) + noise) * norm_ref),
            "ca-mse": -(max(bias, 0) + noise) / norm_ref,
            "descent-batch": inner * abs(inner) / ((max(norm, 0) + variance / SIZE) * norm_ref) * cost[2] / cost[c],
        }
        assert worth_C[c] == pytest.approx(expected[criterion], rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_state_survives_json_bit_for_bit(seed: int) -> None:
    evidence = filled(seed=seed)
    state = json.loads(json.dumps(evidence.state(), allow_nan=False))
    other = evidence_of()
    other.probes = other.read(state)
    assert other.state() == evidence.state()
    before, after = evidence.pooled(0.7), other.pooled(0.7)
    for name in ("worth_C", "draws_BC", "effective_C"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    further = some_measurements(seed + 10)[0][1]
    for each in (evidence, other):
        each.add(0.8, further)
    np.testing.assert_array_equal(evidence.pooled(0.8).draws_BC, other.pooled(0.8).draws_BC)


def test_probes_of_long_ago_are_dropped() -> None:
    evidence = evidence_of(half_life=0.05)
    found = some_measurements()[0][1]
    for fraction in (0.1, 0.4, 0.45):
        evidence.add(fraction, found)
    assert [p.fraction for p in evidence.probes] == [0.4, 0.45]  # after 6.6 half-lives a hundredth is left


def test_what_was_never_measured_is_not_known() -> None:
    evidence = evidence_of()
    assert np.isnan(evidence.pooled(0.5).worth_C).all() and (evidence.pooled(0.5).effective_C == 0).all()
    evidence.add(*some_measurements()[1])
    pooled = evidence.pooled(0.5)
    assert list(np.isfinite(pooled.worth_C)) == [True, False, True] and pooled.effective_C[1] == 0
    assert np.isnan(pooled.draws_BC[:, 1]).all() and np.isfinite(pooled.draws_BC[:, [0, 2]]).all()


def test_a_reference_gradient_lost_in_noise_still_leaves_a_ranking() -> None:
    """The estimate of |G|^2 is below zero; its error stands in for it, and the order of scores is that of inner."""
    psi = np.random.default_rng(1).normal(size=(3, 5, 6)) * 0.01
    moments = np.tile([0.1, 8.0, 0.2, 0.1, -0.02], (3, 1))
    moments[:, MOMENTS.index("inner")] = [0.3, 0.2, 0.1]
    evidence = evidence_of("descent-batch")
    evidence.add(0.2, Measurement((QUARTER, HALF, WHOLE), moments, psi))
    pooled = evidence.pooled(0.2)
    assert np.isfinite(pooled.worth_C).all() and np.isfinite(pooled.draws_BC).all()
    assert pooled.worth_C[0] > pooled.worth_C[1] > pooled.worth_C[2] > 0


def test_gradients_without_noise_are_known_exactly() -> None:
    """Training on all data at once: every sub-batch is the same, so no sub-batch has any influence."""
    means = aligned_means(KEEP, {"keep=0.25": 0.6, "keep=0.5": 0.9})
    found = measurement_of({s: np.tile(mean, (4, 1)) for s, mean in means.items()}, WHOLE, SIZE)
    evidence = evidence_of()
    evidence.add(0.2, found)
    pooled = evidence.pooled(0.2)
    np.testing.assert_allclose(pooled.worth_C, [0.36, 0.81, 1.0], rtol=1e-9)
    np.testing.assert_allclose(pooled.draws_BC, np.tile(pooled.worth_C, (len(pooled.draws_BC), 1)), rtol=1e-9)


@pytest.mark.parametrize(
    ("strategies", "moments", "influence", "message"),
    [
        ((WHOLE, WHOLE), np.ones((2, 5)), np.ones((2, 5, 4)), "names a strategy twice"),
        ((HALF, WHOLE), np.ones((2, 4)), np.ones((2, 4, 4)), r"2 strategies need moments of shape \(2, 5\)"),
        ((HALF, WHOLE), np.ones((2, 5)), np.ones((3, 5, 4)), r"not \(2, 5\) and \(3, 5, 4\)"),
        ((WHOLE,), np.full((1, 5), math.nan), np.ones((1, 5, 4)), "must be finite"),
        ((WHOLE,), np.ones((1, 5)), np.full((1, 5, 4), math.inf), "must be finite"),
    ],
)
def test_measurements_that_cannot_be_are_refused(strategies: Any, moments: Any, influence: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Measurement(strategies, moments, influence)


@pytest.mark.parametrize("counts", [[4], [4, 5], [0, 4], [4, 4, 4], [4, math.nan]])
def test_counts_that_cannot_be_are_refused(counts: list[float]) -> None:
    with pytest.raises(UsageError, match=r"sub_batches=.*from 1 to 4"):
        Measurement((HALF, WHOLE), np.ones((2, 5)), np.ones((2, 5, 4)), np.array(counts))


def test_a_measurement_without_the_reference_is_refused() -> None:
    with pytest.raises(UsageError, match="needs the reference"):
        evidence_of().add(0.1, Measurement((HALF,), np.ones((1, 5)), np.ones((1, 5, 4))))
