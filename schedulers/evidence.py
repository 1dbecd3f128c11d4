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
<E g, G> = |G|^2 (1 + a_c), a_c = <E g - G, G> / |G|^2, whose numerator is measured far better than <E g, G>; of a_c the
posterior given all probes is used (`schedulers.alignment`). |G|^2 is followed from probe to probe: an estimate of a
time h ago is uncertain by 2^(h / half_life) - 1 times itself besides its error, and what is lost in noise is taken as
its error.

Shapes: C strategies of the grid, P probes, M sub-batches of a probe, B draws, E = 5 moments in the order of MOMENTS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from schedulers.alignment import Sighting, expected, posterior
from schedulers.criteria import MOMENTS, Criterion, FloatArray, Moments
from schedulers.errors import UsageError
from schedulers.strategy import Strategy

DRAWS = 256
FORGOTTEN = 0.01  # relative weight below which a probe is dropped
MOST = 2000  # strategies times probes that are kept
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
        kept = [p for p in self.probes if self._decay(p, fraction) >= FORGOTTEN]
        self.probes = kept[-max(3, MOST // len(self.strategies)) :]

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
        followed = self._followed(probes)
        sightings = [self._sighting(p, e, *at) for p, e, at in zip(probes, errors_PBCE, followed, strict=True)]
        aside = posterior(fraction, sightings, self.cost_C, self.reference, self.half_life, DRAWS)
        common = followed[-1][0] if followed else np.nan
        return Pooled(*self._worth(moments_CE, errors_BCE, common, *aside), effective_C)

    def _worth(
        self,
        moments_CE: FloatArray,
        errors_BCE: FloatArray,
        common: float,
        aside_C: FloatArray,
        aside_BC: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        known_C = np.isfinite(moments_CE[:, INNER])
        moments_CE, draws_BCE = moments_CE.copy(), moments_CE + errors_BCE
        for values, aside in ((moments_CE, aside_C), (draws_BCE, aside_BC)):
            values[..., INNER] = np.where(known_C, common * (1 + aside), np.nan)
            values[..., REFERENCE] = common if common > 0 else np.nan
        draws_BCE[..., VARIANCE] = np.maximum(draws_BCE[..., VARIANCE], 0.01 * moments_CE[:, VARIANCE])
        return self._score(moments_CE), self._score(draws_BCE)

    def _sighting(self, probe: _Probe, errors_BCE: FloatArray, common: float, gain: float) -> Sighting:
        """a_c as a probe found it; `gain`: how far |G|^2, `common`, follows that of the probe."""
        if common <= 0:
            common = np.nan
        follow_C = gain * expected(self.cost_C, self.reference)

        def apart(values: FloatArray) -> FloatArray:
            """Change of a_c from changes of the moments, (..., C, E)."""
            whole = values[..., self.reference, REFERENCE, None]
            return np.asarray((values[..., INNER] - values[..., REFERENCE] - follow_C * whole) / common)

        moments_CE = probe.moments_CE
        return Sighting(
            probe.fraction,
            (moments_CE[:, INNER] - moments_CE[:, REFERENCE]) / common,
            apart(np.moveaxis(probe.influence_CEM, -1, 0)).T,
            apart(errors_BCE),
        )

    def _followed(self, probes: Sequence[_Probe]) -> list[tuple[float, float]]:
        """|G|^2 as it was known at each probe, and how far it follows that probe's own estimate (0 to 1)."""
        found: list[tuple[float, float]] = []
        value = square = before = 0.0
        for probe in probes:
            own = float(probe.moments_CE[self.reference, REFERENCE])
            error = float((probe.influence_CEM[self.reference, REFERENCE] ** 2).sum())
            gain = 1.0
            if found:
                drift = found[-1][0] * (2.0 ** ((probe.fraction - before) / self.half_life) - 1)
                square += drift**2
                gain = square / (square + error) if square + error > 0 else 1.0
            value, square = value + gain * (own - value), (1 - gain) * square if found else error
            before = probe.fraction
            found.append((max(value, float(np.sqrt(square))), gain))
        return found

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
