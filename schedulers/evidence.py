"""What probes have told so far: pooled moments of every strategy, and how sure a difference between two is.

Every probe gives unbiased moments of the strategies that it measured, with the influence of each of its sub-batches
(all strategies of a probe see the same ones). Of the probes of a run the pooled moments of strategy c are a ratio of
exponentially weighted sums,

    moment_c = sum_p w_pc moment_pc / sum_p w_pc,    w_pc = sub-batches_pc * 2^(-(now - fraction_p) / half_life),

each probe's moments divided by the reference's mean squared gradient norm in it, |G|^2 + variance / K, which is known
well and takes out that gradients shrink over training. The effective number of sub-batches is
(sum w)^2 / sum w^2 over them. Errors come from draws theta* = theta + sum_m xi_m influence_m with xi common to all
strategies of a sub-batch, so what common images err by together cancels in differences.

<E g, G> and |G|^2 err together, and where both are close to zero their ratio says nothing. Therefore
<E g, G> = |G|^2 (1 + a_c), a_c = <E g - G, G> / |G|^2, whose numerator is measured far better than <E g, G>, with
|G|^2 at least its standard error. Of a_c(f) at the fraction f of the budget a Gaussian process is assumed before
anything is measured: with k_c = C_ref / C_c the compression and x_c = max(log k_c, 0),

    a_c(f) = -s(f) x_c + r_c(f),    s ~ N(SLOPE, SLOPE_SPREAD^2),    r_c ~ N(0, OWN_SPREAD^2),

s and r_c independent, correlated over the budget by 2^(-|f - f'| / half_life). The posterior mean and draws given all
probes stand for a_c: strategies tell about each other, and a noisy probe weighs little.

Shapes: C strategies of the grid, P probes, M sub-batches of a probe, B draws, E = 5 moments in the order of MOMENTS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.criteria import MOMENTS, Criterion, FloatArray, Moments
from schedulers.errors import UsageError
from schedulers.strategy import Strategy

DRAWS = 256
FORGOTTEN = 0.01  # relative weight below which a probe is dropped
SLOPE = 0.25  # by which <E g, G> / |G|^2 falls with the logarithm of the compression, before anything is measured
SLOPE_SPREAD = 0.15  # standard deviation of that
OWN_SPREAD = 0.1  # of a strategy's own deviation from that line
NUGGET = 1e-12  # variance that every alignment has besides, so that equal data can be solved for
INNER = MOMENTS.index("inner")
REFERENCE = MOMENTS.index("norm_sq_ref")
VARIANCE = MOMENTS.index("variance")


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one probe found of C strategies, the reference among them.

    `moments` (C, 5) in the order of MOMENTS; `influence` (C, 5, M): the influence of each sub-batch, whose products
    summed over M are the covariance of the moments, within and between strategies; 0 for sub-batches that a strategy
    was not measured on. `sub_batches` (C,): how many each was measured on; default M. Raises UsageError for other
    shapes, or values that are not finite.
    """

    strategies: tuple[Strategy, ...]
    moments: FloatArray
    influence: FloatArray
    sub_batches: FloatArray | None = None

    def __post_init__(self) -> None:
        for name in ("moments", "influence"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        count = len(self.strategies)
        most = self.influence.shape[-1] if self.influence.ndim else 0
        given = np.full(count, most) if self.sub_batches is None else self.sub_batches
        object.__setattr__(self, "sub_batches", np.asarray(given, dtype=np.float64))
        if len(set(self.strategies)) != count:
            raise UsageError("a measurement names a strategy twice")
        if self.moments.shape != (count, len(MOMENTS)) or self.influence.shape[:-1] != self.moments.shape:
            raise UsageError(
                f"{count} strategies need moments of shape ({count}, 5) and influence ({count}, 5, M), not "
                f"{self.moments.shape} and {self.influence.shape}"
            )
        if not (np.isfinite(self.moments).all() and np.isfinite(self.influence).all()):
            raise UsageError("a measurement must be finite; leave out what failed")
        assert self.sub_batches is not None
        if self.sub_batches.shape != (count,) or not ((self.sub_batches > 0) & (self.sub_batches <= most)).all():
            raise UsageError(f"sub_batches={self.sub_batches.tolist()}: give one number from 1 to {most} a strategy")


@dataclass(frozen=True, eq=False)
class _Probe:
    """A measurement on the whole grid: NaN and weight 0 where a strategy was not in it."""

    fraction: float
    moments_CE: FloatArray
    influence_CEM: FloatArray
    sub_batches_C: FloatArray


@dataclass(frozen=True, eq=False)
class Pooled:
    """Worth of every strategy (C,), larger is better, NaN where not known, and draws of it (B, C).

    `effective` (C,): the effective number of sub-batches behind it.
    """

    worth_C: FloatArray
    draws_BC: FloatArray
    effective_C: FloatArray


@dataclass
class Evidence:
    """The probes of a run on the strategies of a grid, and the criterion by which they are read.

    `cost_C` units per sample, `reference` the position of the reference, `batch_size` K of the sub-batches and of the
    training steps alike.
    """

    strategies: tuple[Strategy, ...]
    reference: int
    cost_C: FloatArray
    batch_size: int
    criterion: Criterion
    half_life: float
    probes: list[_Probe]

    def add(self, fraction: float, found: Measurement) -> None:
        """Take in a probe at `fraction` of the budget. Raises UsageError when the reference is not in it."""
        names = list(found.strategies)
        if self.strategies[self.reference] not in names:
            raise UsageError("a measurement needs the reference among its strategies")
        at = names.index(self.strategies[self.reference])
        scale = found.moments[at, REFERENCE] + found.moments[at, VARIANCE] / self.batch_size
        self.probes.append(self._placed(fraction, found, float(scale) if scale > 0 else 1.0))
        self.probes = [p for p in self.probes if self._decay(p, fraction) >= FORGOTTEN]

    def pooled(self, fraction: float) -> Pooled:
        """What is known at `fraction`."""
        probes = self.probes
        count = len(self.strategies)
        weight_PC = np.array([self._decay(p, fraction) * p.sub_batches_C for p in probes]).reshape(-1, count)
        total_C = weight_PC.sum(0)
        share_PC = weight_PC / np.where(total_C > 0, total_C, np.nan)
        moments_CE = np.full((count, len(MOMENTS)), np.nan)
        errors_BCE = np.zeros((DRAWS, count, len(MOMENTS)))
        errors_PBCE = []
        if probes:
            values_PCE = np.nan_to_num(np.stack([p.moments_CE for p in probes]))
            moments_CE = np.where(
                total_C[:, None] > 0, (np.nan_to_num(share_PC)[..., None] * values_PCE).sum(0), np.nan
            )
            generator = np.random.default_rng(0)
            for share_C, probe in zip(np.nan_to_num(share_PC), probes, strict=True):
                noise_BM = generator.standard_normal((DRAWS, probe.influence_CEM.shape[-1]))
                errors_PBCE.append(np.einsum("bm,cem->bce", noise_BM, probe.influence_CEM))
                errors_BCE += share_C[:, None] * errors_PBCE[-1]
        squares_C = np.array(
            [self._decay(p, fraction) ** 2 * p.sub_batches_C for p in probes]
        ).reshape(-1, count).sum(0)  # fmt: skip
        effective_C = total_C**2 / np.where(squares_C > 0, squares_C, 1.0)
        aside_C, aside_BC = self._aside(fraction, probes, [e[..., INNER] - e[..., REFERENCE] for e in errors_PBCE])
        return Pooled(*self._worth(moments_CE, errors_BCE, aside_C, aside_BC), effective_C)

    def _worth(
        self, moments_CE: FloatArray, errors_BCE: FloatArray, aside_C: FloatArray, aside_BC: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        common = self._common(moments_CE, float(errors_BCE[:, self.reference, REFERENCE].std()))
        moments_CE, draws_BCE = moments_CE.copy(), moments_CE + errors_BCE
        moments_CE[:, INNER] = np.where(np.isnan(moments_CE[:, INNER]), np.nan, common * (1 + aside_C))
        draws_BCE[..., INNER] = np.where(np.isnan(moments_CE[:, INNER]), np.nan, common * (1 + aside_BC))
        moments_CE[:, REFERENCE] = draws_BCE[..., REFERENCE] = common if common > 0 else np.nan
        draws_BCE[..., VARIANCE] = np.maximum(draws_BCE[..., VARIANCE], 0.01 * moments_CE[:, VARIANCE])
        return self._score(moments_CE), self._score(draws_BCE)

    def _common(self, moments_CE: FloatArray, error: float) -> float:
        """|G|^2, one number for all strategies; where it is lost in noise, its error stands in for it."""
        return max(float(moments_CE[self.reference, REFERENCE]), error)

    def _aside(
        self, fraction: float, probes: Sequence[_Probe], errors_PBC: Sequence[FloatArray]
    ) -> tuple[FloatArray, FloatArray]:
        """Posterior mean (C,) and draws (B, C) of a_c at `fraction`; `errors_PBC`: draws of the probes' errors.

        Draws by Matheron's rule: what was drawn of the process, corrected by the residual of data with drawn errors,
        which keeps what the alignments' errors have in common with those of the other moments.
        """
        log_C = np.log(np.maximum(self.cost_C[self.reference] / self.cost_C, 1.0))
        own_C = np.full(len(log_C), OWN_SPREAD)
        own_C[self.reference] = 0.0
        cov_CC = SLOPE_SPREAD**2 * np.outer(log_C, log_C) + np.diag(own_C**2)
        mean_C, count = -SLOPE * log_C, len(log_C)
        at_F = np.array([p.fraction for p in probes] + [fraction])
        like_FF = 2.0 ** (-np.abs(at_F[:, None] - at_F) / self.half_life)
        prior_NN = np.kron(like_FF, cov_CC)
        noise_NN = np.zeros_like(prior_NN)
        found_N, drawn_BN = np.full(len(prior_NN), np.nan), np.zeros((DRAWS, len(prior_NN)))
        for number, (probe, errors_BC) in enumerate(zip(probes, errors_PBC, strict=True)):
            common = self._common_at(probes[: number + 1])
            rows = slice(number * count, (number + 1) * count)
            if common > 0:
                apart_CM = (probe.influence_CEM[:, INNER] - probe.influence_CEM[:, REFERENCE]) / common
                noise_NN[rows, rows] = apart_CM @ apart_CM.T
                found_N[rows] = (probe.moments_CE[:, INNER] - probe.moments_CE[:, REFERENCE]) / common
                drawn_BN[:, rows] = errors_BC / common
        found_N[self.reference :: count] = np.nan  # 0 by definition
        seen = np.flatnonzero(np.isfinite(found_N))
        now = slice(len(prior_NN) - count, None)
        root_NN = np.kron(_root(like_FF), _root(cov_CC))
        process_BN = np.random.default_rng(1).standard_normal((DRAWS, len(prior_NN))) @ root_NN.T
        prior_N = np.tile(mean_C, len(at_F))
        data_NN = (prior_NN + noise_NN)[np.ix_(seen, seen)] + NUGGET * np.eye(len(seen))
        gain_CN = np.linalg.solve(data_NN, prior_NN[seen, now]).T
        aside_C = mean_C + gain_CN @ (found_N - prior_N)[seen]
        aside_BC = aside_C + process_BN[:, now] - (process_BN + drawn_BN)[:, seen] @ gain_CN.T
        return aside_C, aside_BC

    def _common_at(self, probes: Sequence[_Probe]) -> float:
        """|G|^2 by these probes, as it was known at the last of them."""
        weight_P = np.array([self._decay(p, probes[-1].fraction) * p.sub_batches_C[self.reference] for p in probes])
        share_P = weight_P / weight_P.sum()
        value = float(share_P @ [p.moments_CE[self.reference, REFERENCE] for p in probes])
        squares_P = [(p.influence_CEM[self.reference, REFERENCE] ** 2).sum() for p in probes]
        return max(value, float(np.sqrt(share_P**2 @ squares_P)))

    def _score(self, moments: FloatArray) -> FloatArray:
        reference_cost = float(self.cost_C[self.reference])
        score = self.criterion.score(
            Moments(*(moments[..., i] for i in range(len(MOMENTS)))),
            self.cost_C,
            beta=self.batch_size * reference_cost,
            batch_size=self.batch_size,
            reference_cost=reference_cost,
        )
        return -score if self.criterion.lower_is_better else score

    def _decay(self, probe: _Probe, fraction: float) -> float:
        return float(2.0 ** (-(fraction - probe.fraction) / self.half_life))

    def state(self) -> list[dict[str, object]]:
        """The probes as plain values."""
        return [
            {
                "fraction": p.fraction,
                "strategies": [int(c) for c in np.flatnonzero(p.sub_batches_C)],
                "moments": p.moments_CE[p.sub_batches_C > 0].tolist(),
                "influence": p.influence_CEM[p.sub_batches_C > 0].tolist(),
                "sub_batches": p.sub_batches_C[p.sub_batches_C > 0].tolist(),
            }
            for p in self.probes
        ]

    def read(self, state: Sequence[Mapping[str, Any]]) -> list[_Probe]:
        """The probes that `state` wrote. Raises UsageError, ValueError, KeyError or TypeError for anything else."""
        probes = []
        for kept in state:
            rows = [int(c) for c in kept["strategies"]]
            if not all(0 <= c < len(self.strategies) for c in rows):
                raise ValueError("a strategy that is not on the grid")
            found = Measurement(
                tuple(self.strategies[c] for c in rows), kept["moments"], kept["influence"], kept["sub_batches"]
            )
            probes.append(self._placed(float(kept["fraction"]), found, 1.0))
        return probes

    def _placed(self, fraction: float, found: Measurement, scale: float) -> _Probe:
        rows = [self.strategies.index(s) for s in found.strategies]
        moments_CE = np.full((len(self.strategies), len(MOMENTS)), np.nan)
        influence_CEM = np.zeros((*moments_CE.shape, found.influence.shape[-1]))
        sub_batches_C = np.zeros(len(self.strategies))
        moments_CE[rows], influence_CEM[rows] = found.moments / scale, found.influence / scale
        sub_batches_C[rows] = found.sub_batches
        return _Probe(fraction, moments_CE, influence_CEM, sub_batches_C)


def _root(matrix_NN: FloatArray) -> FloatArray:
    """A square root of a covariance that may be singular."""
    values_N, vectors_NN = np.linalg.eigh(matrix_NN)
    return np.asarray(vectors_NN * np.sqrt(np.maximum(values_N, 0.0)))
