"""Criteria: small pure functions from gradient moments and costs to a score (design §4).

C is a strategy's cost in units per sample, β the budget of one update in units (by default batch
size times the reference's C), B the batch size. The moments are unbiased and signed, so an estimate
of something non-negative may be negative; clamping happens here and nowhere before. A score is NaN
where a moment is not finite, where it would be beyond float64 itself, and where norm_sq_ref, the estimate of
‖G‖², is not positive: there the reference gradient is lost in noise. `readable` gives such moments a scale, so
that strategies can still be ranked against each other. A strategy without any gradient, of which all is 0, gains
nothing: its descent is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from schedulers.errors import UsageError

FloatArray = NDArray[np.float64]

MOMENTS = ("bias_sq", "variance", "norm_sq", "inner", "norm_sq_ref")
_LARGE = 1e100  # moments above it, or all below its inverse, are scaled before they are multiplied
_SMALL_STEP = 1e-3  # step of the central differences in standard errors, where the score is smooth


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of a strategy's gradient (design §3), float64 arrays brought to one shape.

    bias_sq ‖E g − G‖², variance the trace of the per-sample covariance, norm_sq ‖E g‖²,
    inner ⟨E g, G⟩, norm_sq_ref ‖G‖²; all in one metric.
    """

    bias_sq: FloatArray
    variance: FloatArray
    norm_sq: FloatArray
    inner: FloatArray
    norm_sq_ref: FloatArray

    def __post_init__(self) -> None:
        values = [np.asarray(getattr(self, f.name), dtype=np.float64) for f in fields(self)]
        try:
            values = list(np.broadcast_arrays(*values))
        except ValueError:
            shapes = ", ".join(f"{f.name} {v.shape}" for f, v in zip(fields(self), values, strict=True))
            raise UsageError(f"moments do not share one shape: {shapes}") from None
        for f, value in zip(fields(self), values, strict=True):
            object.__setattr__(self, f.name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bias_sq.shape

    def map(self, function: Callable[[FloatArray], Any]) -> Moments:
        """`function` applied to each of the five arrays."""
        return Moments(*(function(getattr(self, name)) for name in MOMENTS))


def readable(moments: Moments, covariance: ArrayLike | None) -> Moments:
    """The moments with norm_sq_ref raised to at least one standard error of itself.

    norm_sq_ref is common to all strategies of a progress point and only scales their scores. Where its
    estimate is lost in noise (late in training ‖G‖² is small) the standard error stands in for it: the
    ranking at that point is unchanged, and the point weighs no more than the measurement can tell.
    `covariance` has the moments' shape and (5, 5); None leaves the moments as they are.
    """
    if covariance is None:
        return moments
    i = MOMENTS.index("norm_sq_ref")
    se = np.sqrt(np.maximum(np.asarray(covariance, dtype=np.float64)[..., i, i], 0))
    return _with(
        moments, "norm_sq_ref", np.where(np.isnan(se), moments.norm_sq_ref, np.maximum(moments.norm_sq_ref, se))
    )


class ScoreFunction(Protocol):
    """Score from moments (any shape) and cost (broadcastable to it); keywords as in the module's text."""

    def __call__(
        self, moments: Moments, cost: ArrayLike, *, beta: float, batch_size: int, reference_cost: float
    ) -> FloatArray: ...


@dataclass(frozen=True)
class Criterion:
    """What a schedule optimizes: `score(moments, cost, *, beta, batch_size, reference_cost)` and its direction."""

    name: str
    title: str
    lower_is_better: bool
    score: ScoreFunction


def ca_mse(moments: Moments, cost: ArrayLike, *, beta: float, batch_size: int, reference_cost: float) -> FloatArray:
    """The paper's cost-adjusted mean squared error (eq. 10) over ‖G‖²; lower is better.

    ( max(bias_sq, 0) + C/β · variance ) / norm_sq_ref
    """
    moments = _scaled(moments)
    noise = np.asarray(cost, dtype=np.float64) / beta * moments.variance
    return _ratio(np.maximum(moments.bias_sq, 0) + noise, moments.norm_sq_ref, moments)


def descent(moments: Moments, cost: ArrayLike, *, beta: float, batch_size: int, reference_cost: float) -> FloatArray:
    """Signed squared cosine between an update of budget β and the true gradient; higher is better.

    sign(inner) · inner² / ( (max(norm_sq, 0) + C/β · variance) · norm_sq_ref ), in [−1, 1] for exact moments.
    """
    moments = _scaled(moments)
    noise = np.asarray(cost, dtype=np.float64) / beta * moments.variance
    return _ratio(
        _signed_square(moments.inner), (np.maximum(moments.norm_sq, 0) + noise) * moments.norm_sq_ref, moments
    )


def descent_batch(
    moments: Moments, cost: ArrayLike, *, beta: float, batch_size: int, reference_cost: float
) -> FloatArray:
    """Gain per unit at a fixed batch B instead of a fixed budget; higher is better.

    sign(inner) · inner² / ( (max(norm_sq, 0) + variance/B) · norm_sq_ref ) · C_ref/C
    """
    moments = _scaled(moments)
    spread = np.maximum(moments.norm_sq, 0) + moments.variance / batch_size
    cosine = _ratio(_signed_square(moments.inner), spread * moments.norm_sq_ref, moments)
    with np.errstate(over="ignore"):
        score = cosine * (reference_cost / np.asarray(cost, dtype=np.float64))
    return np.where(np.isfinite(score), score, np.nan)


CRITERIA: dict[str, Criterion] = {
    "ca-mse": Criterion("ca-mse", "CA-MSE / ‖G‖²", True, ca_mse),
    "descent": Criterion("descent", "descent (signed cos², same budget per update)", False, descent),
    "descent-batch": Criterion("descent-batch", "descent per unit (same batch per update)", False, descent_batch),
}


def get_criterion(criterion: str | Criterion) -> Criterion:
    """The criterion of that name, or the criterion itself. Raises UsageError for an unknown name."""
    if isinstance(criterion, Criterion):
        return criterion
    if criterion not in CRITERIA:
        raise UsageError(f"unknown criterion {criterion!r}; the criteria are {', '.join(CRITERIA)}")
    return CRITERIA[criterion]


def criterion_se(
    criterion: str | Criterion,
    moments: Moments,
    covariance: ArrayLike,
    cost: ArrayLike,
    *,
    beta: float,
    batch_size: int,
    reference_cost: float,
) -> FloatArray:
    """One standard error of a score by the delta method: √(∇ᵀ Σ ∇), ∇ as `criterion_gradient` finds it.

    `covariance` has the shape of the moments and a trailing (5, 5) in the order of MOMENTS: the covariance of the
    estimates, not of single samples. NaN where the score or an entry of the covariance is NaN, or beyond float64.
    """
    gradient = criterion_gradient(
        criterion, moments, covariance, cost, beta=beta, batch_size=batch_size, reference_cost=reference_cost
    )
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.einsum("...i,...ij,...j->...", gradient, np.asarray(covariance, dtype=np.float64), gradient)
    return np.asarray(np.sqrt(np.where(np.isfinite(square), np.maximum(square, 0), np.nan)))


def criterion_gradient(
    criterion: str | Criterion,
    moments: Moments,
    covariance: ArrayLike,
    cost: ArrayLike,
    *,
    beta: float,
    batch_size: int,
    reference_cost: float,
) -> FloatArray:
    """Derivatives of a score by the moments, (..., 5) in the order of MOMENTS, by central differences.

    The criteria have a kink at 0 in bias_sq and norm_sq and a flat point in inner; a moment within one standard error
    of 0 is therefore stepped by a whole standard error (the slope that the estimate really meets) and every other by a
    thousandth of one. The two agree where they meet. NaN where the score is NaN. Raises UsageError for a `covariance`
    of another shape than `criterion_se` takes.
    """
    chosen, moments = get_criterion(criterion), _finite(moments)
    sigma = np.asarray(covariance, dtype=np.float64)
    if sigma.shape != (*moments.shape, len(MOMENTS), len(MOMENTS)):
        raise UsageError(f"covariance has shape {sigma.shape}; moments of shape {moments.shape} need (..., 5, 5)")

    def score(values: Moments) -> FloatArray:
        return chosen.score(values, cost, beta=beta, batch_size=batch_size, reference_cost=reference_cost)

    gradient = np.zeros((*moments.shape, len(MOMENTS)))
    for i, name in enumerate(MOMENTS):
        value = getattr(moments, name)
        se = np.sqrt(np.maximum(sigma[..., i, i], 0))
        if name == "norm_sq_ref":  # smooth where it is positive, undefined elsewhere
            step = np.minimum(_SMALL_STEP * se, np.abs(value) / 2)
        else:
            step = np.where(np.abs(value) <= se, se, _SMALL_STEP * se)
        up, down = value + step, value - step
        width = up - down
        moved = score(_with(moments, name, up)) - score(_with(moments, name, down))
        with np.errstate(over="ignore"):  # slopes beyond float64 make no standard error
            gradient[..., i] = np.where(width > 0, moved / np.where(width > 0, width, 1), 0)
    return np.where(np.isnan(score(moments))[..., None], np.nan, gradient)


def _with(moments: Moments, name: str, value: FloatArray) -> Moments:
    return Moments(**{key: value if key == name else getattr(moments, key) for key in MOMENTS})


def _signed_square(x: FloatArray) -> FloatArray:
    return np.asarray(x * np.abs(x))


def _finite(moments: Moments) -> Moments:
    if not any(np.isinf(getattr(moments, name)).any() for name in MOMENTS):
        return moments
    return moments.map(lambda values: np.where(np.isinf(values), np.nan, values))


def _scaled(moments: Moments) -> Moments:
    """The moments, NaN where infinite, divided by a power of two where their products would leave float64.

    Scores do not depend on the unit of gradients, and powers of two round nothing.
    """
    moments = _finite(moments)
    size = np.fmax.reduce([np.abs(getattr(moments, name)) for name in MOMENTS])
    extreme = (size > _LARGE) | ((size > 0) & (size < 1 / _LARGE))
    if not extreme.any():
        return moments
    exponent = np.frexp(np.where(extreme, size, 0.5))[1]
    return moments.map(lambda values: np.ldexp(values, -exponent))


def _ratio(numerator: FloatArray, denominator: FloatArray, moments: Moments) -> FloatArray:
    known = (denominator > 0) & (moments.norm_sq_ref > 0)
    with np.errstate(over="ignore"):
        ratio = numerator / np.where(known, denominator, 1)
    nothing = (numerator == 0) & (denominator == 0) & (moments.norm_sq_ref > 0)
    return np.where(nothing, 0.0, np.where(known & np.isfinite(ratio), ratio, np.nan))
