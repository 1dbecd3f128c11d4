"""Gradients of a sub-batch under a strategy, as one flat vector.

The one body here is `SubBatchEngine`: plain autograd of the mean loss of a sub-batch. It holds for every
loss, also for those that couple the samples of a batch (InfoNCE's negatives, BatchNorm's statistics),
because a replicate is then the whole sub-batch (design section 3).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradscope.errors import NonFiniteError, TaskError
from gradscope.estimators import GroupLayout
from gradscope.task import Task
from gradscope.untouched import buffer_guard
from schedulers import Strategy


@dataclass(frozen=True)
class FlatParameters:
    """The trainable parameters of a model in the order of the flat gradient, group by group."""

    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]
    layout: GroupLayout

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @classmethod
    def of(cls, task: Task, model: nn.Module) -> FlatParameters:
        """Every trainable parameter that the task does not declare frozen, in the task's groups.

        Raises TaskError when a group names a parameter that does not exist, or a parameter is in no group or two.
        """
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in set(task.frozen)}
        if not trainable:
            raise TaskError(
                f"{type(task).__name__}: the model has no trainable parameter; set requires_grad before profiling"
            )
        groups = task.param_groups(model)
        names: list[str] = []
        sizes: list[int] = []
        for group, members in groups.items():
            for name in members:
                if name not in trainable:
                    raise TaskError(f"param_groups: group {group!r} names {name!r}, which is no trainable parameter")
                if name in names:
                    raise TaskError(f"param_groups: parameter {name!r} is in two groups")
                names.append(name)
            sizes.append(sum(trainable[name].numel() for name in members))
        missing = sorted(set(trainable) - set(names))
        if missing:
            raise TaskError(f"param_groups leaves out the trainable parameter {missing[0]!r}; put every one in a group")
        layout = GroupLayout(tuple(groups), tuple(sizes))
        return cls(tuple(names), tuple(trainable[name] for name in names), layout)

    def flatten(self, named: dict[str, Tensor]) -> Tensor:
        """One float32 vector (P) from a tensor per parameter name."""
        return torch.cat([named[name].reshape(-1).float() for name in self.names])


class Engine(Protocol):
    """Turns (model, batch, strategy) into one replicate of the gradient."""

    name: str

    def gradient(self, batch: Any, strategy: Strategy, *, seed: int) -> Tensor:
        """Flat gradient (P) float32 of the mean loss of `batch`; randomness comes from `seed` alone."""
        ...


class SubBatchEngine:
    """Gradient of the mean loss of a whole sub-batch by autograd; buffers are put back after every call."""

    name = "subbatch"

    def __init__(self, task: Task, model: nn.Module, parameters: FlatParameters) -> None:
        self.task, self.model, self.parameters = task, model, parameters
        self._restore_buffers = buffer_guard(model)

    def gradient(self, batch: Any, strategy: Strategy, *, seed: int) -> Tensor:
        """Flat gradient (P) float32.

        The task's generator and torch's own streams are both seeded by `seed`, so dropout layers of any
        model repeat too: call it inside `untouched`. Raises NonFiniteError on a loss or gradient that is
        not finite and TaskError when a trainable parameter gets no gradient under the reference (under
        another strategy a part of the model may be skipped; its gradient is then zero).
        """
        torch.manual_seed(seed)
        try:
            loss = self.task.loss(self.model, batch, strategy, torch.Generator().manual_seed(seed))
            if not isinstance(loss, Tensor):
                raise TaskError(f"loss returned {type(loss).__name__}; return a tensor that carries its gradient")
            if loss.ndim:
                raise TaskError(f"loss has shape {tuple(loss.shape)}; return the mean over the batch, a scalar")
            if not torch.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss.item()} under {strategy}")
            gradients = torch.autograd.grad(loss, self.parameters.tensors, allow_unused=True)
        finally:
            self._restore_buffers()
        parts = []
        for name, parameter, gradient in zip(self.parameters.names, self.parameters.tensors, gradients, strict=True):
            if gradient is None:
                if strategy == self.task.grid.reference:
                    raise TaskError(
                        f"parameter {name!r} receives no gradient from the loss; declare it in the task's "
                        "`frozen` if that is meant"
                    )
                gradient = torch.zeros_like(parameter)
            parts.append(gradient.reshape(-1).float())
        flat_P = torch.cat(parts)
        if not torch.isfinite(flat_P).all():
            raise NonFiniteError(f"the gradient is not finite under {strategy}")
        return flat_P


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values with a stable text, the same on every machine and in every run."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
