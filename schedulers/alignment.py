"""How well gradients of strategies are aligned with the reference's, from noisy probes of a run.

With g^c the gradient under strategy c and G the reference's expectation, <E g^c, G> = |G|^2 (1 + a_c). Of a_c(f) at the
fraction f of the budget a Gaussian process is assumed before anything is measured. With the compression
k_c = C_ref / C_c and x_c = max(log k_c, 0),

    a_c(f) = -s(f) x_c + r_c(f),    s ~ N(SLOPE, SLOPE_SPREAD^2),    r_c ~ N(0, OWN_SPREAD^2),

s and r_c independent, correlated over the budget by 2^(-|f - f'| / half_life); the reference's a is 0. So strategies
tell about each other, and probes count as far as they are precise and recent.

A probe of M sub-batches knows the covariance of its own errors from M - 1 degrees of freedom only, fewer than it may
have strategies: some combinations would seem to be measured exactly. The covariance S of p strategies is therefore
taken as (1 - w) S + w diag S with w = p / (p + M - 1).

Shapes: C strategies, B draws, M sub-batches, F fractions of the budget (those of the probes and the present one),
N = F C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

SLOPE = 0.25  # by which <E g, G> / |G|^2 falls with the logarithm of the compression, before anything is measured
SLOPE_SPREAD = 0.15  # standard deviation of that
OWN_SPREAD = 0.1  # of a strategy's own deviation from that line
NUGGET = 1e-12  # variance that every alignment has besides, so that equal data can be solved for


@dataclass(frozen=True, eq=False)
class Sighting:
    """a_c as one probe at `fraction` found it: (C,), NaN for what it did not measure.

    `influence_CM`: that of each of its sub-batches; `draws_BC`: errors drawn from them.
    """

    fraction: float
    aside_C: FloatArray
    influence_CM: FloatArray
    draws_BC: FloatArray


def expected(cost_C: FloatArray, reference: int) -> FloatArray:
    """a_c (C,) before anything is measured, from units per sample (C,)."""
    return np.asarray(-SLOPE * np.log(np.maximum(cost_C[reference] / cost_C, 1.0)))


def posterior(
    fraction: float, sightings: Sequence[Sighting], cost_C: FloatArray, reference: int, half_life: float, draws: int
) -> tuple[FloatArray, FloatArray]:
    """Mean (C,) and draws (B, C) of a_c at `fraction`, given `sightings`, the oldest first.

    Draws by Matheron's rule: of the process, corrected by the residual of data with drawn errors. They so keep what
    the errors of the alignments have in common with the draws of other moments from the same sub-batches.
    """
    log_C, count = np.log(np.maximum(cost_C[reference] / cost_C, 1.0)), len(cost_C)
    own_C = np.full(count, OWN_SPREAD)
    own_C[reference] = 0.0
    cov_CC = SLOPE_SPREAD**2 * np.outer(log_C, log_C) + np.diag(own_C**2)
    at_F = np.array([s.fraction for s in sightings] + [fraction])
    prior_NN = np.kron(2.0 ** (-np.abs(at_F[:, None] - at_F) / half_life), cov_CC)
    noise_NN = np.zeros_like(prior_NN)
    found_N, drawn_BN = np.full(len(prior_NN), np.nan), np.zeros((draws, len(prior_NN)))
    generator = np.random.default_rng(1)
    process_BN = _process(at_F, np.column_stack([SLOPE_SPREAD * log_C, np.diag(own_C)]), half_life, draws, generator)
    for number, seen in enumerate(sightings):
        rows = slice(number * count, (number + 1) * count)
        found_N[rows] = seen.aside_C
        noise_NN[rows, rows], drawn_BN[:, rows] = _errors(seen, reference, generator)
    found_N[reference::count] = np.nan  # 0 by definition
    known, now = np.flatnonzero(np.isfinite(found_N)), slice(len(prior_NN) - count, None)
    data_NN = (prior_NN + noise_NN)[np.ix_(known, known)] + NUGGET * np.eye(len(known))
    gain_CN = np.linalg.solve(data_NN, prior_NN[known, now]).T
    mean_C = expected(cost_C, reference)
    aside_C = mean_C + gain_CN @ (found_N - np.tile(mean_C, len(at_F)))[known]
    return aside_C, aside_C + process_BN[:, now] - (process_BN + drawn_BN)[:, known] @ gain_CN.T


def _errors(seen: Sighting, reference: int, generator: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Covariance (C, C) of a sighting's errors, and draws (B, C) of them."""
    measured_C = np.isfinite(seen.aside_C) & (np.arange(len(seen.aside_C)) != reference)
    strategies, sub_batches = int(measured_C.sum()), seen.influence_CM.shape[1]
    apart = strategies / (strategies + sub_batches - 1) if strategies > 1 else 0.0
    sampled_CC = seen.influence_CM @ seen.influence_CM.T
    own_C = np.diag(sampled_CC)
    fresh_BC = generator.standard_normal(seen.draws_BC.shape)
    noise_CC = (1 - apart) * sampled_CC + apart * np.diag(own_C)
    return noise_CC, np.sqrt(1 - apart) * seen.draws_BC + np.sqrt(apart * own_C) * fresh_BC


def _process(
    at_F: FloatArray, root: FloatArray, half_life: float, draws: int, generator: np.random.Generator
) -> FloatArray:
    """Draws (B, F C) of the process without its mean; `root` (C, any) of its covariance at one fraction."""
    values: list[FloatArray] = []
    for number in range(len(at_F)):
        fresh_BC = generator.standard_normal((draws, root.shape[1])) @ root.T
        if number:
            like = 2.0 ** (-(at_F[number] - at_F[number - 1]) / half_life)
            fresh_BC = like * values[-1] + np.sqrt(1 - like**2) * fresh_BC
        values.append(fresh_BC)
    return np.concatenate(values, axis=1)
