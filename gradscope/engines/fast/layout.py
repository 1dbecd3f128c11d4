"""Where the samples lie in a tensor that carries a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Dimension `dim` of a tensor holds the K samples, each once, or several rows of each.

    `major`: the rows of a sample follow one another (index = sample * k + j), else they are strided
    (index = j * K + sample, as after concatenating two views).
    """

    samples: int
    dim: int = 0
    major: bool = True

    def rows(self, tensor: Tensor) -> Tensor:
        """A view with the samples first: (K, *shape), where dimension `dim` of the shape has become k."""
        sizes = (self.samples, -1) if self.major else (-1, self.samples)
        split = torch.unflatten(tensor, self.dim, sizes)
        return split.movedim(self.dim if self.major else self.dim + 1, 0)

    def in_place(self, tensor: Tensor) -> bool:
        """Whether `tensor` can be read in this layout at all."""
        return self.dim < tensor.ndim and tensor.shape[self.dim] > 0 and tensor.shape[self.dim] % self.samples == 0


def find_layout(signal: Tensor, chosen_K: Tensor) -> Layout | None:
    """The layout in which a signal of the chosen samples' losses is exactly zero for all others, or None.

    One in which every chosen sample has some signal is preferred. The signal must not be zero altogether.
    """
    found = None
    for layout in _candidates(signal, len(chosen_K)):
        any_K = (layout.rows(signal) != 0).flatten(1).any(1)
        if bool(any_K[~chosen_K].any()):
            continue
        if bool(any_K[chosen_K].all()):
            return layout
        found = found or layout
    return found


def choose_samples(samples: int, generator: torch.Generator) -> Tensor:
    """About half of the samples, as a mask (K).

    The first and the last are left out: a pooled first or last token would look like them.
    """
    inside = range(1, samples - 1) if samples > 2 else range(1)
    order = torch.randperm(len(inside), generator=generator)[: max(1, len(inside) // 2)]
    chosen_K = torch.zeros(samples, dtype=torch.bool)
    chosen_K[order + inside.start] = True
    return chosen_K


def _candidates(tensor: Tensor, samples: int) -> Iterator[Layout]:
    for dim in range(tensor.ndim):
        for major in (True, False):
            layout = Layout(samples, dim, major)
            if layout.in_place(tensor) and (major or tensor.shape[dim] > samples):
                yield layout
