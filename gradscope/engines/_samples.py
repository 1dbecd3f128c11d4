"""The samples of a batch: a tuple, list or dict (nested as wanted) of tensors whose leading dimension is K.

Leaves of another leading dimension, and leaves that are no tensors, belong to the whole batch and pass through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.engines.flat import seed_streams
from gradscope.errors import TaskError
from gradscope.task import Task
from schedulers import Strategy


def sample_tensors(batch: Any) -> list[Tensor]:
    """The batch's tensors of leading dimension K, which is that of its first tensor; TaskError when it has none."""
    leaves: list[Tensor] = []
    _map(batch, lambda leaf: leaves.append(leaf) or leaf)  # type: ignore[func-returns-value]
    if not leaves:
        raise TaskError(
            f"the batch, a {type(batch).__name__}, holds no tensor of samples; let `batches` give a tuple, list or "
            "dict of tensors whose leading dimension is the number of samples"
        )
    return [leaf for leaf in leaves if len(leaf) == len(leaves[0])]


def with_samples(batch: Any, tensors: Sequence[Tensor]) -> Any:
    """The batch with other tensors in the places of `sample_tensors`, in that order."""
    length, following = len(sample_tensors(batch)[0]), iter(tensors)
    return _map(batch, lambda leaf: next(following) if len(leaf) == length else leaf)


def take(batch: Any, index: slice | Tensor) -> Any:
    """The batch of some of its samples."""
    return with_samples(batch, [tensor[index] for tensor in sample_tensors(batch)])


def losses_of(task: Task, model: nn.Module, batch: Any, strategy: Strategy, *, seed: int) -> Tensor:
    """`task.sample_losses` (K), with the task's generator and torch's own streams seeded; TaskError on its shape."""
    seed_streams(seed)
    losses = task.sample_losses(model, batch, strategy, torch.Generator().manual_seed(seed))
    check_shape(losses, len(sample_tensors(batch)[0]))
    return losses


def check_shape(losses: object, count: int) -> None:
    """Raise TaskError unless `losses` is a tensor (count)."""
    if not isinstance(losses, Tensor):
        raise TaskError(f"sample_losses returned {type(losses).__name__}; return a tensor of one loss per sample")
    if losses.shape != (count,):
        raise TaskError(
            f"sample_losses has shape {tuple(losses.shape)} for {count} sample{'s' * (count > 1)}; return one loss "
            f"per sample, ({count},), and let every tensor of samples in the batch lead with their number"
        )


def _map(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with `function` of every tensor that has a dimension."""
    if isinstance(batch, Tensor):
        return function(batch) if batch.ndim else batch
    if isinstance(batch, Mapping):
        mapped = {key: _map(value, function) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return mapped
        batch = copy.copy(batch)  # a dictionary of a kind of its own, with attributes perhaps
        batch.update(mapped)
        return batch
    if isinstance(batch, tuple | list):
        values = [_map(value, function) for value in batch]
        if isinstance(batch, list):
            return values
        return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)
    return batch
