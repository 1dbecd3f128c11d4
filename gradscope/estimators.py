"""Moments of accelerated gradients and their standard errors, from a stream of sub-batch blocks.

A *term* is one draw of a gradient: of a sub-batch's mean loss, or of one sample's loss. g_i are a strategy's
terms, z_i the reference's on the same data, d_i = g_i - z_i, i = 1..N; sub-batch m contributes a block of
K_m terms whose sums are S_m. Every estimate below is raw and signed (design section 3).

    variance       k (sum |g_i|^2 / N - U(g, g))                   unbiased trace of the per-sample covariance
    bias_sq        U(d, d)                                           unbiased |E g - E z|^2
    bias_sq_plugin |mean d|^2                                        the paper's; too large by tr Cov(d)/N
    norm_sq        U(g, g)                                           unbiased |E g|^2
    inner          U(g, z)                                           unbiased <E g, E z>
    norm_sq_ref    U(z, z)                                           unbiased |E z|^2

k is the samples of one term. U averages <a_i, b_j> over pairs of independent terms: over all i != j, or, when
the terms of one sub-batch share something random (negatives), over pairs from different sub-batches only,

    U(a, b) = (<sum a, sum b> - sum_i <a_i, b_i>) / (N (N-1))        or
    U(a, b) = (<sum a, sum b> - sum_m <S^a_m, S^b_m>) / (N^2 - sum K_m^2).

With one term per sub-batch the two are the same. Inner products may be taken in a diagonal metric,
<a, b>_W = sum w a b, and are kept per parameter group.

Point estimates are exact: a stream keeps the sum of its vectors and sums of squares (float64),
never M vectors. Standard errors are a delete-one jackknife over sub-batches, which needs inner products
between blocks; those are taken in a random sketch of each block's sum (a CountSketch, Charikar, Chen,
Farach-Colton 2002: random signs, buckets by position modulo a prime, one sketch per parameter group). The
sketch adds noise of its own, about |g_m|^2 |mean g|^2 / S to a squared influence: for gradients whose noise has far
more than S effective dimensions in one group the standard errors come out too large, never too small.

Shapes: P parameter, G parameter group, W metric, M sub-batch, S sketch entry, E estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradscope.errors import NonFiniteError

Array = NDArray[np.float64]

ESTIMATES = ("bias_sq", "bias_sq_plugin", "variance", "norm_sq", "inner", "norm_sq_ref")
SKETCH_SIZE = 1021  # prime, so that no layer's width makes whole columns share a bucket
PIECE = 128 * SKETCH_SIZE  # half a megabyte of float32; whole rows of the sketch
# Mean product from which a sum of float32 products is right to six digits: single ones underflow at 1e-38, and
# weights go up to 1e8 (`optimizer_weights`).
LEAST_PRODUCT, LEAST_WEIGHTED = 1e-32, 1e-24
MOST_SQUARE = 1e140  # of a gradient, so that the squares of moments, which standard errors need, stay in float64


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

    def pieces(self, device: torch.device) -> Iterator[tuple[int, slice]]:
        """(group number, its slice of the flat vector), on a CPU in pieces of at most PIECE numbers.

        What is computed of a piece stays in the cache; of a whole vector it would be mapped, written and unmapped.
        """
        start = 0
        for group, size in enumerate(self.sizes):
            step = PIECE if device.type == "cpu" else max(size, 1)
            for first in range(start, start + size, step):
                yield group, slice(first, min(first + step, start + size))
            start += size


@dataclass(frozen=True)
class Metrics:
    """The diagonal metrics in which inner products are taken: name -> weights (P) >= 0, or None for w = 1."""

    weights: Mapping[str, Tensor | None]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def on(self, device: torch.device) -> Metrics:
        """The same metrics with their weights on a device."""
        return Metrics({name: None if w is None else w.to(device) for name, w in self.weights.items()})


EUCLIDEAN = Metrics({"euclidean": None})


class Sketch:
    """Random linear map of a flat gradient to SKETCH_SIZE numbers per group that keeps inner products on average."""

    def __init__(self, layout: GroupLayout, *, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (layout.total,), generator=generator, dtype=torch.int8) * 2 - 1
        self.layout, self.signs_P = layout, signs.to(device)

    def __call__(self, flat_P: Tensor, metrics: Metrics = EUCLIDEAN) -> Tensor:
        """(P) -> (W, G, S) on the CPU: the sketch of sqrt(w) * `flat_P` in every metric."""
        weights = list(metrics.weights.values())
        sketch_WGS = flat_P.new_zeros(len(weights), len(self.layout.names), SKETCH_SIZE)
        for group, piece in self.layout.pieces(flat_P.device):
            signed = flat_P[piece] * self.signs_P[piece]
            for w, w_P in enumerate(weights):
                values, into_S = signed if w_P is None else signed * w_P[piece].sqrt(), sketch_WGS[w, group]
                whole = len(values) // SKETCH_SIZE * SKETCH_SIZE
                into_S += values[:whole].view(-1, SKETCH_SIZE).sum(0)
                into_S[: len(values) - whole] += values[whole:]
        return sketch_WGS.cpu()


@dataclass(frozen=True)
class Block:
    """What one sub-batch says of one strategy.

    `sum_P`: sum of the terms' gradients, float32 (float64 for a model in float64); `terms`: how many;
    `squares_WG` and `cross_WG`: float64 sums over the terms of |g_i|^2 and of <g_i, z_i> with the reference's.
    """

    sum_P: Tensor
    terms: int
    squares_WG: Array
    cross_WG: Array


@dataclass(frozen=True)
class BlockRecord:
    """What is kept of a block: its scalars, the products of its sum, and the sum's sketch (W, G, S)."""

    terms: int
    squares_WG: Array
    cross_WG: Array
    own_WG: Array
    with_reference_WG: Array
    sketch_WGS: NDArray[np.float32]


@dataclass
class GradientStream:
    """One strategy's blocks so far: the sum of all their terms (P), and a record per sub-batch number.

    The sum is best kept in float64: unbiased estimates near zero are differences of large numbers, which the
    order of a float32 summation (over ranks, say) would show in.
    """

    layout: GroupLayout
    metrics: Metrics
    sketch: Sketch
    sum_P: Tensor
    records: dict[int, BlockRecord]

    @classmethod
    def empty(cls, layout: GroupLayout, metrics: Metrics, sketch: Sketch, zeros_P: Tensor) -> GradientStream:
        """No blocks yet; sums are kept in `zeros_P`, on its device, which may be another than the gradients'."""
        return cls(layout, metrics, sketch, zeros_P, {})

    def add(self, number: int, block: Block, reference: Block) -> None:
        """Take in sub-batch `number`; `reference` is the reference's block on it (its own for the reference).

        Raises NonFiniteError for a gradient that is too large for moments.
        """
        own, both = block.squares_WG, block.cross_WG
        if block.terms > 1:
            own, both = products_with(block.sum_P, [block.sum_P, reference.sum_P], self.layout, self.metrics)
        sketch = self.sketch(block.sum_P, self.metrics).numpy()
        if not (np.isfinite(sketch).all() and (block.squares_WG <= MOST_SQUARE).all() and (own <= MOST_SQUARE).all()):
            raise NonFiniteError(f"the gradient, up to {float(block.sum_P.abs().max()):.1g}, is too large for moments")
        self.records[number] = BlockRecord(block.terms, block.squares_WG, block.cross_WG, own, both, sketch)
        self.sum_P += block.sum_P.to(self.sum_P.device)


@dataclass(frozen=True)
class Estimates:
    """Estimates in every metric, per parameter group and in total, in the order of ESTIMATES.

    `blocks` M sub-batches of together `samples` samples. `total` (W, E), `groups` (W, G, E) with one standard
    error of each; `covariance` (W, E, E) jackknife covariance of the totals (its diagonal is se^2). `deleted`
    (M, W, E): the totals with one sub-batch left out, from which the standard error of any function of them,
    and of differences between strategies measured on the same sub-batches, follows. With fewer than three
    sub-batches these are NaN.
    """

    blocks: int
    samples: int
    total_WE: Array
    covariance_WEE: Array
    groups_WGE: Array
    groups_se_WGE: Array
    deleted_MWE: Array

    @property
    def total_se_WE(self) -> Array:
        return np.asarray(np.sqrt(np.diagonal(self.covariance_WEE, axis1=1, axis2=2)))


def estimate(
    stream: GradientStream, reference: GradientStream, *, term_samples: int = 1, independent: bool = True
) -> Estimates:
    """All estimates of one strategy against the reference from at least two paired sub-batches.

    `term_samples`: samples of one term (K for the sub-batch engine, 1 for per-sample engines). `independent`:
    whether the terms of one sub-batch are independent of each other. For the reference itself pass the same
    stream twice: its bias is then exactly zero. Raises ValueError when the streams hold different sub-batches.
    """
    numbers = sorted(stream.records)
    if numbers != sorted(reference.records) or len(numbers) < 2:
        raise ValueError(
            f"{len(numbers)} sub-batches against {len(reference.records)} of the reference: "
            "need the same ones, at least two"
        )
    layout, metrics = stream.layout, stream.metrics.on(stream.sum_P.device)
    gg_WG, gz_WG = products_with(stream.sum_P, [stream.sum_P, reference.sum_P], layout, metrics)
    sums = _Products(gg_WG, gz_WG, inner_products(reference.sum_P, reference.sum_P, layout, metrics))
    ours, theirs = [stream.records[m] for m in numbers], [reference.records[m] for m in numbers]
    terms_M = np.array([record.terms for record in ours])
    each = _Products(
        gg=np.stack([record.squares_WG for record in ours]),
        gz=np.stack([record.cross_WG for record in ours]),
        zz=np.stack([record.squares_WG for record in theirs]),
    )
    blocks = _Products(
        gg=np.stack([record.own_WG for record in ours]),
        gz=np.stack([record.with_reference_WG for record in ours]),
        zz=np.stack([record.own_WG for record in theirs]),
    )
    groups_WGE = _estimates(
        terms_M.sum(),
        (terms_M**2).sum(),
        sums,
        each.map(lambda a: a.sum(0)),
        blocks.map(lambda a: a.sum(0)),
        term_samples,
        independent,
    )
    deleted_MWGE = np.full((len(numbers), *groups_WGE.shape), np.nan)
    if len(numbers) > 2:
        left = each.map(_left_out), blocks.map(_left_out)
        between = _between_blocks(ours, theirs)
        left_sums = _Products(*(pairs + own for pairs, own in zip(between, left[1], strict=True)))
        count, squares = (values.reshape(-1, 1, 1) for values in (terms_M.sum() - terms_M, _left_out(terms_M**2)))
        deleted_MWGE = _estimates(count, squares, left_sums, *left, term_samples, independent)
    deleted_MWE = deleted_MWGE.sum(2)
    return Estimates(
        blocks=len(numbers),
        samples=int(terms_M.sum()) * term_samples,
        total_WE=groups_WGE.sum(1),
        covariance_WEE=_jackknife_covariance(deleted_MWE),
        groups_WGE=groups_WGE,
        groups_se_WGE=np.sqrt(_jackknife_variance(deleted_MWGE)),
        deleted_MWE=deleted_MWE,
    )


class _Products(NamedTuple):
    """<g, g>, <g, z> and <z, z>, arrays of one shape."""

    gg: Array
    gz: Array
    zz: Array

    @property
    def dd(self) -> Array:
        """<d, d> of d = g - z; exactly zero where g is z."""
        return np.asarray(self.gg - 2 * self.gz + self.zz)

    def map(self, function: Callable[[Array], Array]) -> _Products:
        return _Products(*map(function, self))


def inner_products(a_P: Tensor, b_P: Tensor, layout: GroupLayout, metrics: Metrics) -> Array:
    """<a, b>_W of every metric and parameter group: (W, G) float64."""
    return np.asarray(products_with(a_P, [b_P], layout, metrics)[0])


def products_with(a_P: Tensor, others: Sequence[Tensor], layout: GroupLayout, metrics: Metrics) -> Array:
    """<a, b>_W of each b in `others`, of every metric and parameter group, in one pass: (len(others), W, G) float64.

    Products are taken in the vectors' dtype, and again in float64 where they are `out_of_range`.
    """
    weights = list(metrics.weights.values())
    groups: list[int] = []
    found: list[Tensor] = []
    for group, piece in layout.pieces(a_P.device):
        groups.append(group)
        for b_P in others:
            product = a_P[piece] * b_P[piece]
            found += [(product if w_P is None else product * w_P[piece]).double().sum() for w_P in weights]
    sums_GBW = np.zeros((len(layout.names), len(others), len(weights)))
    np.add.at(sums_GBW, groups, torch.stack(found).cpu().numpy().reshape(-1, len(others), len(weights)))
    sums_BWG = sums_GBW.transpose(1, 2, 0)
    if a_P.dtype != torch.float64:
        for w, w_P in enumerate(weights):
            for b, group in np.argwhere(out_of_range(sums_BWG[:, w], np.array(layout.sizes), w_P is not None)):
                sums_BWG[b, w, group] = _wide_product(a_P, others[b], w_P, layout, group)
    return sums_BWG


def out_of_range(sums: Array, count: Array | int, weighted: bool) -> NDArray[np.bool_]:
    """Where sums of `count` float32 products have overflowed, or are so small that products may have underflowed."""
    least = LEAST_WEIGHTED if weighted else LEAST_PRODUCT
    return np.asarray(~np.isfinite(sums) | (np.abs(sums) < least * count))


def _wide_product(a_P: Tensor, b_P: Tensor, w_P: Tensor | None, layout: GroupLayout, group: int) -> float:
    """<a, b>_W of one parameter group, with products in float64."""
    total = 0.0
    for number, piece in layout.pieces(a_P.device):
        if number == group:
            product = a_P[piece].double() * b_P[piece].double()
            total += float((product if w_P is None else product * w_P[piece].double()).sum())
    return total


def _estimates(
    count: Array,
    squares: Array,
    sums: _Products,
    each: _Products,
    blocks: _Products,
    term_samples: int,
    independent: bool,
) -> Array:
    """The estimates (..., E) from arrays of one shape (...), N = `count`, sum K_m^2 = `squares`.

    `sums`: products of the sums over all terms; `each`: sums over terms of their products; `blocks`: sums over
    sub-batches of the products of their sums.
    """
    pairs = count * (count - 1) if independent else count**2 - squares
    within = each if independent else blocks
    norm_sq = (sums.gg - within.gg) / pairs
    return np.stack(
        [
            (sums.dd - within.dd) / pairs,
            sums.dd / count**2,
            term_samples * (each.gg / count - norm_sq),
            norm_sq,
            (sums.gz - within.gz) / pairs,
            (sums.zz - within.zz) / pairs,
        ],
        axis=-1,
    )


def _between_blocks(ours: Sequence[BlockRecord], theirs: Sequence[BlockRecord]) -> _Products:
    """Sums over pairs of different sub-batches, with sub-batch m left out, in sketch space: (M, W, G) each."""
    g, z = (np.stack([record.sketch_WGS for record in records]).astype(np.float64) for records in (ours, theirs))

    def pairs(a: Array, b: Array) -> Array:
        of_sums = ((a.sum(0) - a) * (b.sum(0) - b)).sum(-1)
        return np.asarray(of_sums - _left_out((a * b).sum(-1)))

    return _Products(pairs(g, g), pairs(g, z), pairs(z, z))


def _left_out(values: Array) -> Array:
    """The sum over the first axis with each entry left out in turn."""
    return np.asarray(values.sum(0) - values)


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
    coordinates are near zero by accident and would get an unbounded weight. In float64 where squares overflow float32.
    """
    mean_P = torch.stack([gradient.square() for gradient in gradients]).mean(0)
    if not torch.isfinite(mean_P).all():
        mean_P = torch.stack([gradient.double().square() for gradient in gradients]).mean(0)
    return torch.cat([(part + part.mean()) / 2 for part in layout.split(mean_P)])
