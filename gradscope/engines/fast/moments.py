"""Sums, squared norms and inner products of the per-sample gradients of one parameter, from its parts.

Three ways, chosen by the shapes:

    gram     |g_i|^2 = sum_ts (left_t . left_s)(right_t . right_s), and one ordinary weight gradient for the sum:
             cheap while a sample has few positions T; the euclidean metric only
    direct   the gradients of a few samples at a time in a buffer that stays in the cache; sum, squared norms and
             weighted norms are read from it. As many operations as the ordinary weight gradient
    reduced  gradients no larger than the signal (biases, normalisations, position tables)

With few positions the first saves most, since forming (O, I) numbers per sample costs more than T (O + I) of them.

Shapes: K sample, P number of the parameter, W metric, C sample of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradscope.engines.fast.terms import Embedded, Mapped, Outer, Part, Rows

CHUNK_BYTES = {"cpu": 2 * 2**20, "cuda": 256 * 2**20}
LARGE = 2**15  # numbers of a weight from which one sample at a time is faster than several
# Forming one number of a per-sample gradient, adding it up and squaring it costs about as much as this many
# multiplications and additions of a matrix product (measured on a CPU, where the crossing is at 30 positions for
# width 192).
WORK_PER_NUMBER = 10.0


@dataclass(frozen=True)
class Moments:
    """Of one parameter: sum of its gradients (P), squared norms and inner products by sample (W, K) float64.

    `kept` pairs another strategy's gradients with these.
    """

    total_P: Tensor
    squares_WK: Tensor
    cross_WK: Tensor | None
    method: str
    kept: Part | None


def moments(
    parts: Sequence[Part],
    weights: Sequence[Tensor | None],
    size: int,
    *,
    other: Part | None = None,
    keep: bool = False,
    work: Workspace | None = None,
) -> Moments:
    """Moments of the gradients (K, `size`) that `parts` add up to.

    `weights`: per metric (P), or None for the euclidean one; `other`: gradients of the same parameter, as kept
    from the reference; `keep`: hold on to these gradients for later pairing; `work`: buffers to use again.
    """
    part, work = _one(parts), work or Workspace()
    euclidean = all(w is None for w in weights)
    if isinstance(part, Rows):
        squares_WK = _products(part.g_KP, part.g_KP, weights)
        cross_WK = None if other is None else _crossed(part, other, weights, size)
        return Moments(part.g_KP.sum(0), squares_WK, cross_WK, part.method, part if keep else None)
    if euclidean and isinstance(part, Outer | Embedded) and _gram_is_cheaper(part, part, part):
        squares_WK = _repeat(_gram(part, part), len(weights))
        cross_WK = None if other is None else _crossed(part, other, weights, size)
        return Moments(part.total(), squares_WK, cross_WK, "gram", part if keep else None)
    crossed_WK = None
    if other is not None and _prefers_gram(part, other, weights):
        crossed_WK, other = _crossed(part, other, weights, size), None
    found = (
        _one_by_one(part, weights, size, other, keep, work)
        if isinstance(part, Outer) and not part.left_KTO.is_cuda and size >= LARGE
        else _by_chunks(part, weights, size, other, keep)
    )
    return found if crossed_WK is None else replace(found, cross_WK=crossed_WK)


class Workspace:
    """Buffers that are used again: a fresh one of a megabyte costs as much as filling it."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, size: int, like: Tensor) -> Tensor:
        """(size) numbers on the CPU, of the dtype of `like`."""
        buffer = self._buffers.get((name, like.dtype))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name, like.dtype] = torch.empty(size, dtype=like.dtype)
        return buffer[:size]


def _one_by_one(
    part: Outer, weights: Sequence[Tensor | None], size: int, other: Part | None, keep: bool, work: Workspace
) -> Moments:
    """One sample at a time, so that its gradient is still in the cache when it is squared and added up."""
    _, o, i = part.sizes
    like = part.left_KTO
    kept_KP = like.new_empty(part.samples, size) if keep and size <= _held(part) else None
    total_P = like.new_zeros(size)
    g_P, w_g_P = work.take("g", size, like), work.take("w", size, like)
    squares: list[Tensor] = []
    cross: list[Tensor] = []
    others = _each(other, size, work.take("z", size, like)) if other is not None else None
    for k, (left_OT, right_TI) in enumerate(zip(part.left_KTO.mT.unbind(), part.right_KTI.unbind(), strict=True)):
        g_P = g_P if kept_KP is None else kept_KP[k]
        torch.mm(left_OT, right_TI, out=g_P.view(o, i))
        total_P += g_P
        z_P = None if others is None else next(others)
        for w_P in weights:
            weighted_P = g_P if w_P is None else torch.mul(g_P, w_P, out=w_g_P)
            squares.append(torch.dot(weighted_P, g_P))
            if z_P is not None:
                cross.append(torch.dot(weighted_P, z_P))
    shape = (part.samples, len(weights))
    return Moments(
        total_P,
        torch.stack(squares).double().view(shape).T,
        torch.stack(cross).double().view(shape).T if cross else None,
        "direct",
        Rows(kept_KP) if kept_KP is not None else part if keep else None,
    )


def _each(part: Part, size: int, buffer_P: Tensor) -> Iterator[Tensor]:
    """The gradients of one sample after another, (P); an outer product's are written to the buffer."""
    if isinstance(part, Outer):
        _, o, i = part.sizes
        for left_OT, right_TI in zip(part.left_KTO.mT.unbind(), part.right_KTI.unbind(), strict=True):
            torch.mm(left_OT, right_TI, out=buffer_P.view(o, i))
            yield buffer_P
    else:
        for k in range(part.samples):
            yield part.gradients(k, k + 1)[0]


def _by_chunks(part: Part, weights: Sequence[Tensor | None], size: int, other: Part | None, keep: bool) -> Moments:
    """A few samples at a time: on a GPU, for small weights, and for parts without a matrix product of their own."""
    samples = part.samples
    chunk = chunk_size(part, size, other)
    totals: list[Tensor] = []
    squares: list[Tensor] = []
    cross: list[Tensor] = []
    kept: list[Tensor] = []
    for lo in range(0, samples, chunk):
        hi = min(lo + chunk, samples)
        g_CP = part.gradients(lo, hi)
        totals = [g_CP.sum(0) if not totals else totals[0].add_(g_CP.sum(0))]
        squares.append(_products(g_CP, g_CP, weights))
        if other is not None:
            cross.append(_products(g_CP, other.gradients(lo, hi), weights))
        if keep and size <= _held(part):
            kept.append(g_CP)
    return Moments(
        totals[0],
        torch.cat(squares, 1),
        torch.cat(cross, 1) if cross else None,
        "direct",
        Rows(torch.cat(kept)) if kept else part if keep else None,
    )


def chunk_size(part: Part, size: int, other: Part | None) -> int:
    """Samples whose gradients fit in the workspace."""
    device = next(iter(_tensors(part))).device.type
    numbers = size + part.workspace() + (0 if other is None else size + other.workspace())
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (4 * numbers))


def _crossed(part: Part, other: Part, weights: Sequence[Tensor | None], size: int) -> Tensor:
    """<g_i, z_i> by sample: (W, K)."""
    if _prefers_gram(part, other, weights):
        return _repeat(_gram(part, other), len(weights))
    chunk = chunk_size(part, size, other)
    pieces = []
    for lo in range(0, part.samples, chunk):
        hi = min(lo + chunk, part.samples)
        pieces.append(_products(part.gradients(lo, hi), other.gradients(lo, hi), weights))
    return torch.cat(pieces, 1)


def _products(a_CP: Tensor, b_CP: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
    """sum_p w a b of every metric and row: (W, C) float64."""
    rows = []
    for w_P in weights:
        if w_P is None and a_CP is b_CP:
            rows.append(torch.linalg.vector_norm(a_CP, dim=1).square())
        else:  # a batched matrix product of these shapes is several times slower
            rows.append(((a_CP if w_P is None else a_CP * w_P) * b_CP).sum(1))
    return torch.stack(rows).double()


def _one(parts: Sequence[Part]) -> Part:
    """Parts of one parameter as a single one."""
    outers = [p for p in parts if isinstance(p, Outer)]
    rest = [p for p in parts if not isinstance(p, Outer)]
    if outers:
        rest.insert(0, Outer.joined(outers))
    if len(rest) == 1:
        return rest[0]
    if all(isinstance(p, Rows) for p in rest):
        methods = {p.method for p in rest if isinstance(p, Rows)}
        return Rows(torch.stack([p.gradients(0, p.samples) for p in rest]).sum(0), max(methods))
    return _Sum(tuple(rest))


@dataclass(frozen=True)
class _Sum:
    """Several unlike parts: their gradients are added, chunk by chunk."""

    parts: tuple[Part, ...]

    @property
    def samples(self) -> int:
        return self.parts[0].samples

    def gradients(self, lo: int, hi: int) -> Tensor:
        return torch.stack([part.gradients(lo, hi) for part in self.parts]).sum(0)

    def workspace(self) -> int:
        return sum(part.workspace() for part in self.parts)


def _gram(a: Part, b: Part) -> Tensor:
    if isinstance(a, Outer) and isinstance(b, Outer):
        return Outer.inner(a, b).double()
    if isinstance(a, Embedded) and isinstance(b, Embedded):
        return Embedded.inner(a, b).double()
    raise TypeError(f"no Gram product of {type(a).__name__} and {type(b).__name__}")


def _prefers_gram(part: Part, other: Part, weights: Sequence[Tensor | None]) -> bool:
    if any(w is not None for w in weights) or type(part) is not type(other):
        return False
    return isinstance(part, Outer | Embedded) and _gram_is_cheaper(part, part, other)


def _gram_is_cheaper(part: Outer | Embedded, a: Part, b: Part) -> bool:
    """Multiplications of the Gram product against the cost of forming the gradients."""
    if isinstance(part, Embedded):
        assert isinstance(a, Embedded) and isinstance(b, Embedded)
        table = part.table_rows * part.signal_KTD.shape[2]
        return a.ids_KT.shape[1] * b.ids_KT.shape[1] * part.signal_KTD.shape[2] < WORK_PER_NUMBER * table
    assert isinstance(a, Outer) and isinstance(b, Outer)
    (s, o, i), (t, _, _) = a.sizes, b.sizes
    return 2 * s * t * (o + i) < WORK_PER_NUMBER * o * i


def _held(part: Part) -> int:
    """Numbers per sample that a part holds on to."""
    return sum(tensor.numel() for tensor in _tensors(part)) // part.samples


def _tensors(part: Part) -> Iterator[Tensor]:
    """The activations and signals in a part."""
    if isinstance(part, _Sum):
        for inner in part.parts:
            yield from _tensors(inner)
    elif isinstance(part, Mapped):
        yield from _tensors(part.inner)
    else:
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


def _repeat(values_K: Tensor, metrics: int) -> Tensor:
    return values_K.expand(metrics, -1)
