"""Per-sample gradients of one parameter in the form in which backpropagation yields them, before any is formed.

A part holds what one or several uses of a parameter contribute to g_1..g_K and forms the gradients of samples
lo..hi on request, (hi - lo, P). Nothing here holds K x P values, except where that is no more than what
backpropagation itself held (`Rows`).

Shapes: K sample, T position (token, pixel) of a sample, I and O the two sides of a weight, P its numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Part(Protocol):
    """A sum over uses of one parameter, as per-sample gradients on request."""

    @property
    def samples(self) -> int: ...

    def gradients(self, lo: int, hi: int) -> Tensor:
        """Gradients of samples lo..hi, (hi - lo, P), in the parameter's own order."""
        ...

    def workspace(self) -> int:
        """Numbers that `gradients` holds per sample besides its result."""
        ...


def wide(tensor: Tensor) -> Tensor:
    """At least float32: products of activations and signals are never taken in a half precision."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


@dataclass(frozen=True)
class Rows:
    """Gradients that are no larger than the signal they come from, or had to be formed: g_KP, and by what method."""

    g_KP: Tensor
    method: str = "reduced"

    @property
    def samples(self) -> int:
        return len(self.g_KP)

    def gradients(self, lo: int, hi: int) -> Tensor:
        return self.g_KP[lo:hi]

    def workspace(self) -> int:
        return 0


@dataclass(frozen=True)
class Outer:
    """g_i = sum_t left_it right_it', (O, I): a linear layer has left = signal, right = input."""

    left_KTO: Tensor
    right_KTI: Tensor

    @property
    def samples(self) -> int:
        return len(self.left_KTO)

    def gradients(self, lo: int, hi: int) -> Tensor:
        return torch.bmm(self.left_KTO[lo:hi].mT, self.right_KTI[lo:hi]).flatten(1)

    def workspace(self) -> int:
        return 0

    def total(self) -> Tensor:
        """sum_i g_i, (P): the ordinary weight gradient."""
        return (self.left_KTO.flatten(0, 1).T @ self.right_KTI.flatten(0, 1)).flatten()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(T, O, I)."""
        return self.left_KTO.shape[1], self.left_KTO.shape[2], self.right_KTI.shape[2]

    @staticmethod
    def inner(a: Outer, b: Outer) -> Tensor:
        """<a_i, b_i> = sum_ts (left_t . left'_s)(right_t . right'_s), (K), without forming either."""
        gram_KTS = torch.bmm(a.left_KTO, b.left_KTO.mT)
        gram_KTS *= torch.bmm(a.right_KTI, b.right_KTI.mT)
        return gram_KTS.sum((1, 2))

    @staticmethod
    def joined(parts: Sequence[Outer]) -> Outer:
        """Several uses of one weight are one use with more positions."""
        if len(parts) == 1:
            return parts[0]
        return Outer(torch.cat([p.left_KTO for p in parts], 1), torch.cat([p.right_KTI for p in parts], 1))


@dataclass(frozen=True)
class Embedded:
    """Lookup of rows of a table: g_i[v] = sum over positions with index v of the signal."""

    ids_KT: Tensor
    signal_KTD: Tensor
    table_rows: int

    @property
    def samples(self) -> int:
        return len(self.ids_KT)

    def gradients(self, lo: int, hi: int) -> Tensor:
        ids_CT, signal_CTD = self.ids_KT[lo:hi], self.signal_KTD[lo:hi]
        g_CVD = signal_CTD.new_zeros(hi - lo, self.table_rows, signal_CTD.shape[2])
        return g_CVD.scatter_add_(1, ids_CT[:, :, None].expand_as(signal_CTD), signal_CTD).flatten(1)

    def workspace(self) -> int:
        return 0

    def total(self) -> Tensor:
        table_VD = self.signal_KTD.new_zeros(self.table_rows, self.signal_KTD.shape[2])
        return table_VD.index_add_(0, self.ids_KT.flatten(), self.signal_KTD.flatten(0, 1)).flatten()

    @staticmethod
    def inner(a: Embedded, b: Embedded) -> Tensor:
        same_KTS = a.ids_KT[:, :, None] == b.ids_KT[:, None, :]
        return (torch.bmm(a.signal_KTD, b.signal_KTD.mT) * same_KTS).sum((1, 2))


@dataclass(frozen=True)
class Convolved:
    """Weight of a convolution: g_i = signal_i times the unfolded image i, group by group.

    `image_KNC..`, `signal_KNO..`: N images per sample (1 as a rule); `unfold` gives columns (images, C k, L).
    """

    image: Tensor
    signal: Tensor
    unfold: Callable[[Tensor], Tensor]
    groups: int
    columns: int

    @property
    def samples(self) -> int:
        return len(self.image)

    def gradients(self, lo: int, hi: int) -> Tensor:
        count, images = hi - lo, self.image.shape[1]
        columns = torch.unflatten(self.unfold(self.image[lo:hi].flatten(0, 1)), 1, (self.groups, -1))  # (c n, g, i, l)
        signal = torch.unflatten(self.signal[lo:hi].flatten(0, 1).flatten(2), 1, (self.groups, -1))  # (c n, g, o, l)
        if images > 1:
            columns = torch.unflatten(columns, 0, (count, images)).permute(0, 2, 3, 1, 4).flatten(3)
            signal = torch.unflatten(signal, 0, (count, images)).permute(0, 2, 3, 1, 4).flatten(3)
        g = torch.bmm(signal.flatten(0, 1), columns.flatten(0, 1).mT)  # (c g, o, i)
        return g.reshape(count, -1)

    def workspace(self) -> int:
        return self.columns


@dataclass(frozen=True)
class Contracted:
    """Weight of an einsum: g_i = einsum(equation, x_i, signal_i); the batch is dimension `dim` of either."""

    equation: str
    x: Tensor
    x_dim: int
    signal: Tensor
    signal_dim: int

    @property
    def samples(self) -> int:
        return self.x.shape[self.x_dim]

    def gradients(self, lo: int, hi: int) -> Tensor:
        x, signal = self.x.narrow(self.x_dim, lo, hi - lo), self.signal.narrow(self.signal_dim, lo, hi - lo)
        return torch.einsum(self.equation, x, signal).flatten(1)

    def workspace(self) -> int:
        return 0


@dataclass(frozen=True)
class Mapped:
    """Gradients of a tensor computed from the parameter alone, mapped back through that computation."""

    inner: Part
    derived: Tensor
    parameter: Tensor

    @property
    def samples(self) -> int:
        return self.inner.samples

    def gradients(self, lo: int, hi: int) -> Tensor:
        return self.back(self.inner.gradients(lo, hi))

    def workspace(self) -> int:
        return self.inner.workspace() + 2 * self.derived.numel()

    def back(self, g_CQ: Tensor) -> Tensor:
        """(c, Q) in the order of the derived tensor -> (c, P)."""
        seeds = g_CQ.view(-1, *self.derived.shape).to(self.derived.dtype)
        if len(seeds) == 1:
            return wide(self._vjp(seeds[0], False))[None].flatten(1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # slow batching rules warn; they are right
                return wide(self._vjp(seeds, True)).flatten(1)
        except RuntimeError:  # an operation without any batching rule
            return torch.stack([wide(self._vjp(seed, False)).flatten() for seed in seeds])

    def _vjp(self, seed: Tensor, batched: bool) -> Tensor:
        (g,) = torch.autograd.grad(
            self.derived, self.parameter, seed, retain_graph=True, is_grads_batched=batched, materialize_grads=True
        )
        return g


def unfolder(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """Images (n, C, H, W) or (n, C, L) -> columns (n, C k, positions) of a convolution with this weight."""
    kernel = tuple(weight.shape[2:])
    pads: list[int] = []
    if padding == "same":
        for size, step in zip(reversed(kernel), reversed(dilation), strict=True):
            both = step * (size - 1)
            pads += [both // 2, both - both // 2]
    elif not isinstance(padding, str):
        for pad in reversed(padding):
            pads += [pad, pad]
    if len(kernel) == 1:
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)

    def unfold(images: Tensor) -> Tensor:
        images = F.pad(images, pads) if any(pads) else images
        images = images[:, :, None] if images.ndim == 3 else images
        return F.unfold(images, kernel, dilation=tuple(dilation), stride=tuple(stride))

    return unfold
