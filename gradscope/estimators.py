"""Moments of accelerated gradients and their standard errors, from a stream of sub-batch gradients.

Notation of design section 3: g_m is the gradient of sub-batch m (K samples) under a strategy, z_m the
reference's on the same sub-batch, d_m = g_m - z_m, m = 1..M. Every estimate below is raw and signed.

    variance       K/(M-1) sum |g_m - mean g|^2                     unbiased trace of the per-sample covariance
    bias_sq        U(d, d)                                           unbiased |E g - E z|^2
    bias_sq_plugin |mean d|^2                                        the paper's; too large by tr Cov(d)/M
    norm_sq        U(g, g)                                           unbiased |E g|^2
    inner          U(g, z)                                           unbiased <E g, E z>
    norm_sq_ref    U(z, z)                                           unbiased |E z|^2

with U(a, b) = sum_{i != j} <a_i, b_j> / (M (M-1)) = <mean a, mean b> - sum <a_m - mean a, b_m - mean b> / (M (M-1)).
Inner products may be taken in a diagonal metric, <a, b>_W = sum w a b, and are kept per parameter group.

Point estimates are exact: a stream keeps the sum of its vectors (float32) and sums of squares (float64),
never M vectors. Standard errors are a delete-one jackknife over sub-batches, which needs inner products
between replicates; those are taken in a random sketch of each replicate (a CountSketch, Charikar, Chen,
Farach-Colton 2002: random signs, buckets by position modulo a prime, one sketch per parameter group).

Shapes: P parameter, G parameter group, W metric, M replicate, S sketch entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

ESTIMATES = ("bias_sq", "bias_sq_plugin", "variance", "norm_sq", "inner", "norm_sq_ref")
SKETCH_SIZE = 1021  # prime, so that no layer's width makes whole columns share a bucket


@dataclass(frozen=True)
class GroupLayout:
    """Where each parameter group lies in the flat gradient: contiguous, in order."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def split(self, flat_P: Tensor) -> tuple[Tensor, ...]:
        """The groups' parts of a flat vector (views)."""
        return torch.split(flat_P, list(self.sizes))


@dataclass(frozen=True)
class Metrics:
    """The diagonal metrics in which inner products are taken: name -> weights (P) >= 0, or None for w = 1."""

    weights: Mapping[str, Tensor | None]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)


EUCLIDEAN = Metrics({"euclidean": None})


class Sketch:
    """Random linear map of a flat gradient to SKETCH_SIZE numbers per group that keeps inner products on average."""

    def __init__(self, layout: GroupLayout, *, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (layout.total,), generator=generator, dtype=torch.int8) * 2 - 1
        self.layout, self.signs_P = layout, signs.to(device)

    def __call__(self, flat_P: Tensor) -> Tensor:
        """(P) -> (G, S) float32 on the CPU."""
        rows = []
        for part in self.layout.split(flat_P * self.signs_P):
            padding = -len(part) % SKETCH_SIZE
            rows.append(torch.nn.functional.pad(part, (0, padding)).view(-1, SKETCH_SIZE).sum(0))
        return torch.stack(rows).cpu()


class GradientStream:
    """Streaming sums of one strategy's replicates g_1, g_2, ...: what the estimators need of it alone."""

    def __init__(self, layout: GroupLayout, metrics: Metrics, sketch: Sketch) -> None:
        self.layout, self.metrics, self.sketch = layout, metrics, sketch
        self.count = 0
        self.sum_P: Tensor | None = None
        self.squares_WG = np.zeros((len(metrics.names), len(layout.names)))
        self.sketches: list[Tensor] = []

    def add(self, gradient_P: Tensor) -> None:
        """Take in one replicate, (P) float32; the caller may reuse the tensor afterwards."""
        self.sum_P = gradient_P.clone() if self.sum_P is None else self.sum_P.add_(gradient_P)
        self.squares_WG += inner_products(gradient_P, gradient_P, self.layout, self.metrics)
        self.sketches.append(
            torch.stack(
                [self.sketch(gradient_P if w is None else gradient_P * w.sqrt()) for w in self.metrics.weights.values()]
            )
        )
        self.count += 1


class PairedSums:
    """Streaming sums over pairs (g_m, z_m) that neither stream has alone."""

    def __init__(self, layout: GroupLayout, metrics: Metrics) -> None:
        self.layout, self.metrics = layout, metrics
        shape = (len(metrics.names), len(layout.names))
        self.difference_WG, self.cross_WG = np.zeros(shape), np.zeros(shape)

    def add(self, gradient_P: Tensor, reference_P: Tensor) -> None:
        difference_P = gradient_P - reference_P
        self.difference_WG += inner_products(difference_P, difference_P, self.layout, self.metrics)
        self.cross_WG += inner_products(gradient_P, reference_P, self.layout, self.metrics)


@dataclass(frozen=True)
class Estimates:
    """Estimates in every metric, per parameter group and in total.

    `groups`: (W, G, E) and `total`: (W, E) float64 in the order of ESTIMATES; `groups_se` one standard error
    of each; `covariance`: (W, E, E) jackknife covariance of the totals (its diagonal is se^2). With fewer than
    three replicates the standard errors are NaN.
    """

    count: int
    total_WE: Array
    covariance_WEE: Array
    groups_WGE: Array
    groups_se_WGE: Array

    @property
    def total_se_WE(self) -> Array:
        return np.asarray(np.sqrt(np.diagonal(self.covariance_WEE, axis1=1, axis2=2)))


def estimate(stream: GradientStream, reference: GradientStream, paired: PairedSums, *, batch_size: int) -> Estimates:
    """All estimates of one strategy against the reference from M >= 2 paired replicates of `batch_size` samples.

    For the reference itself pass the same stream twice: its bias is then exactly zero.
    """
    count = stream.count
    if count != reference.count or count < 2:
        raise ValueError(
            f"{count} replicates against {reference.count} of the reference: need at least two of each, paired"
        )
    assert stream.sum_P is not None and reference.sum_P is not None
    layout, metrics = stream.layout, stream.metrics
    difference_P = stream.sum_P - reference.sum_P
    groups_WGE = _estimates(
        count,
        batch_size,
        sum_gg=inner_products(stream.sum_P, stream.sum_P, layout, metrics),
        sum_dd=inner_products(difference_P, difference_P, layout, metrics),
        sum_gz=inner_products(stream.sum_P, reference.sum_P, layout, metrics),
        sum_zz=inner_products(reference.sum_P, reference.sum_P, layout, metrics),
        gg=stream.squares_WG,
        dd=paired.difference_WG,
        gz=paired.cross_WG,
        zz=reference.squares_WG,
    )
    deleted_MWGE = _delete_one(stream, reference, batch_size)
    return Estimates(
        count=count,
        total_WE=groups_WGE.sum(1),
        covariance_WEE=_jackknife_covariance(deleted_MWGE.sum(2)),
        groups_WGE=groups_WGE,
        groups_se_WGE=np.sqrt(_jackknife_variance(deleted_MWGE)),
    )


def inner_products(a_P: Tensor, b_P: Tensor, layout: GroupLayout, metrics: Metrics) -> Array:
    """<a, b>_W of every metric and parameter group: (W, G) float64."""
    product_P = a_P * b_P
    return np.array(
        [
            [part.sum(dtype=torch.float64).item() for part in layout.split(product_P if w is None else product_P * w)]
            for w in metrics.weights.values()
        ]
    )


def _estimates(
    count: int,
    batch_size: int,
    *,
    sum_gg: Array,
    sum_dd: Array,
    sum_gz: Array,
    sum_zz: Array,
    gg: Array,
    dd: Array,
    gz: Array,
    zz: Array,
) -> Array:
    """The estimates from <sum a, sum b> and sum <a_m, b_m>, arrays of one shape (...): (..., E)."""
    pairs = count * (count - 1)
    return np.stack(
        [
            (sum_dd - dd) / pairs,
            sum_dd / count**2,
            batch_size / (count - 1) * (gg - sum_gg / count),
            (sum_gg - gg) / pairs,
            (sum_gz - gz) / pairs,
            (sum_zz - zz) / pairs,
        ],
        axis=-1,
    )


def _delete_one(stream: GradientStream, reference: GradientStream, batch_size: int) -> Array:
    """The estimates with replicate m left out, in sketch space: (M, W, G, E)."""
    g = torch.stack(stream.sketches).double().numpy()  # (M, W, G, S)
    z = g if stream is reference else torch.stack(reference.sketches).double().numpy()
    d = g - z
    count = len(g)
    if count < 3:
        return np.full((count, *g.shape[1:3], len(ESTIMATES)), np.nan)

    def left_out(a: Array, b: Array) -> tuple[Array, Array]:
        each = (a * b).sum(-1)
        sum_a, sum_b = a.sum(0), b.sum(0)
        of_sums = ((sum_a - a) * (sum_b - b)).sum(-1)
        return of_sums, each.sum(0) - each

    (sum_gg, gg), (sum_dd, dd) = left_out(g, g), left_out(d, d)
    (sum_gz, gz), (sum_zz, zz) = left_out(g, z), left_out(z, z)
    return _estimates(
        count - 1, batch_size, sum_gg=sum_gg, sum_dd=sum_dd, sum_gz=sum_gz, sum_zz=sum_zz, gg=gg, dd=dd, gz=gz, zz=zz
    )


def _jackknife_covariance(deleted_MWE: Array) -> Array:
    """Delete-one jackknife covariance (M-1)/M sum (t_m - mean t)(t_m - mean t)': (W, E, E)."""
    count = len(deleted_MWE)
    centred = deleted_MWE - deleted_MWE.mean(0)
    return np.asarray((count - 1) / count * np.einsum("mwe,mwf->wef", centred, centred))


def _jackknife_variance(deleted: Array) -> Array:
    """The diagonal of the above for any trailing shape: (M, ...) -> (...)."""
    count = len(deleted)
    return np.asarray((count - 1) / count * ((deleted - deleted.mean(0)) ** 2).sum(0))


def optimizer_weights(second_moment_P: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Weights 1 / (sqrt(v) + epsilon) of the `optimizer` metric from Adam's bias-corrected second moment v (P)."""
    return 1 / (second_moment_P.sqrt() + epsilon)


def second_moment_from(gradients: Sequence[Tensor], layout: GroupLayout) -> Tensor:
    """Second moment v (P) estimated from a few reference gradients, for a checkpoint that has none.

    The mean of g^2, shrunk half-way to its mean over the parameter group, because with few replicates some
    coordinates are near zero by accident and would get an unbounded weight.
    """
    mean_P = torch.stack([gradient.square() for gradient in gradients]).mean(0)
    return torch.cat([(part + part.mean()) / 2 for part in layout.split(mean_P)])
