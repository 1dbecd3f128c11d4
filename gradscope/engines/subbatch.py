"""The sub-batch engine: plain autograd of the mean loss of a whole sub-batch.

It holds for every loss, also for those that couple the samples of a batch (InfoNCE's negatives, BatchNorm's
statistics), because a replicate is then the whole sub-batch with its own negatives and statistics (design
section 3). Its one term per sub-batch is the gradient of the mean loss of K samples.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.engines.contract import Reference
from gradscope.engines.flat import FlatParameters, seed_streams
from gradscope.errors import NonFiniteError, TaskError
from gradscope.estimators import EUCLIDEAN, Block, Metrics, inner_products, products_with
from gradscope.task import Task
from gradscope.untouched import buffer_guard
from schedulers import Strategy


class SubBatchEngine:
    """Gradient of the mean loss of a whole sub-batch by autograd; buffers are put back after every call."""

    name = "subbatch"

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        parameters: FlatParameters,
        metrics: Metrics = EUCLIDEAN,
        precision: str = "float32",
    ) -> None:
        self.task, self.model, self.parameters = task, model, parameters
        self.metrics, self.precision = metrics, precision
        self._restore_buffers = buffer_guard(model)

    def reference(self, batch: Any, *, seed: int) -> Reference:
        z_P = self.gradient(batch, self.task.grid.reference, seed=seed)
        squares_WG = inner_products(z_P, z_P, self.parameters.layout, self.metrics)
        return Reference(Block(z_P, 1, squares_WG, squares_WG), kept=None)

    def block(self, batch: Any, strategy: Strategy, *, seed: int, reference: Reference) -> Block:
        g_P = self.gradient(batch, strategy, seed=seed)
        vectors = [g_P, reference.block.sum_P]
        squares_WG, cross_WG = products_with(g_P, vectors, self.parameters.layout, self.metrics)
        return Block(g_P, 1, squares_WG, cross_WG)

    def gradient(self, batch: Any, strategy: Strategy, *, seed: int) -> Tensor:
        """Flat gradient (P) of the mean loss, float32 (float64 for a model in float64).

        The task's generator and torch's own streams are both seeded by `seed`, so dropout layers of any
        model repeat too: call it inside `untouched`. Raises NonFiniteError on a loss or gradient that is
        not finite and TaskError when a trainable parameter gets no gradient under the reference (under
        another strategy a part of the model may be skipped; its gradient is then zero).
        """
        seed_streams(seed)
        try:
            with autocast(self.precision, self.parameters.device):
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
        named = {}
        for name, parameter, gradient in zip(self.parameters.names, self.parameters.tensors, gradients, strict=True):
            if gradient is None:
                if strategy == self.task.grid.reference:
                    raise no_gradient(name)
                gradient = torch.zeros_like(parameter)
            named[name] = gradient
        flat_P = self.parameters.flatten(named)
        # isfinite of each makes more vectors: only where the sum is not, be it by overflow
        if not torch.isfinite(flat_P.sum()) and not torch.isfinite(flat_P).all():
            raise NonFiniteError(f"the gradient is not finite under {strategy}")
        return flat_P


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The scope in which a task's loss runs: as it is, or with bfloat16 autocast."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def no_gradient(name: str) -> TaskError:
    """The error of a trainable parameter that the reference's loss does not reach."""
    return TaskError(
        f"parameter {name!r} receives no gradient from the loss; declare it in the task's `frozen` if that is meant"
    )
