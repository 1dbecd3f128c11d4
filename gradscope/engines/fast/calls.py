"""A function call that reads tracked parameters, and what is kept of it until its signal arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradscope.engines.fast.layout import Layout

REDUCE_BYTES = 2**20  # of a product that is summed at once; it should stay in the cache


class UnsupportedUse(Exception):
    """Parameters are used in a way that only gradients of single samples cover."""


@dataclass(frozen=True)
class Call:
    """One torch function with tracked parameters among its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tracked: Callable[[Any], bool]
    data: Callable[[Any], bool]
    samples: int | None

    def bound(self, *names: str) -> dict[str, Any]:
        """The arguments by name; what the call leaves out is absent."""
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}

    def run(self) -> Any:
        """The function with tracked parameters detached."""
        return self.run_with(lambda tensor: tensor.detach())

    def run_with(self, replace: Callable[[Tensor], Tensor]) -> Any:
        args, kwargs = _swapped(self.args, self.tracked, replace), _swapped(self.kwargs, self.tracked, replace)
        return self.function(*args, **kwargs)


def _swapped(value: Any, tracked: Callable[[Any], bool], replace: Callable[[Tensor], Tensor]) -> Any:
    """A nest of arguments with the tracked tensors replaced."""
    if isinstance(value, Tensor):
        return replace(value) if tracked(value) else value
    if type(value) in (list, tuple):
        return type(value)(_swapped(v, tracked, replace) for v in value)
    if type(value) is dict:
        return {key: _swapped(v, tracked, replace) for key, v in value.items()}
    return value


@dataclass(frozen=True)
class Saved:
    """An activation kept until the signal arrives; overwriting it in the meantime is an error, as in autograd."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Saved:
        tensor = tensor.detach()
        return cls(tensor, tensor._version)

    def get(self) -> Tensor:
        if self.tensor._version != self.version:
            raise UnsupportedUse("an activation is overwritten after a parameter has read it")
        return self.tensor


def reduced(
    rows: Tensor, shape: Sequence[int], layout: Layout, factor: Callable[[int, int], Tensor] | None = None
) -> Tensor:
    """Sum of rows (K, *dims), times a factor, over what a parameter of `shape` was broadcast along: (K, P)."""
    ndim = rows.ndim - 1
    padded = (*[1] * (ndim - len(shape)), *shape)
    if padded[layout.dim] != 1:
        raise UnsupportedUse("a parameter that differs from sample to sample")
    over = [1 + i for i, size in enumerate(padded) if size == 1]
    if factor is None:
        return rows.sum(over).flatten(1)
    chunk = max(1, REDUCE_BYTES // (rows[0].numel() * rows.element_size())) if not rows.is_cuda else len(rows)
    pieces = [
        (rows[lo : lo + chunk] * factor(lo, lo + chunk)).sum(over).flatten(1) for lo in range(0, len(rows), chunk)
    ]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
