"""A task from functions, for a training loop that has a loss and data but no checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.errors import TaskError
from gradscope.task import Task
from schedulers import Grid, Strategy

Loss = Callable[[nn.Module, Any, Strategy, torch.Generator], Tensor]


class LoopTask(Task):
    """The task of a training loop: its grid, loss, data and costs as functions.

    `loss(model, batch, strategy, generator)`: mean loss of the batch, a scalar, with random choices drawn from
    `generator`. `batches(size, seed)`: batches of `size` samples without end, the same ones for the same seed.
    `cost(strategy)`: units per sample. `sample_losses`, optional, as `loss`, one term per sample, (K,): it makes probes
    far more precise where samples do not depend on each other.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        loss: Loss,
        batches: Callable[[int, int], Iterator[Any]],
        cost: Callable[[Strategy], float],
        sample_losses: Loss | None = None,
    ) -> None:
        self.grid = grid
        self._loss, self._batches, self._cost, self._sample_losses = loss, batches, cost, sample_losses

    @property
    def gives_sample_losses(self) -> bool:
        return self._sample_losses is not None

    def load(self, checkpoint: Path) -> nn.Module:
        raise TaskError(f"{checkpoint}: a LoopTask loads no checkpoints; write a Task to profile them")

    def batches(self, size: int, seed: int) -> Iterator[Any]:
        return iter(self._batches(size, seed))

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        return self._loss(model, batch, strategy, generator)

    def sample_losses(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        if self._sample_losses is None:
            return super().sample_losses(model, batch, strategy, generator)
        return self._sample_losses(model, batch, strategy, generator)

    def cost(self, strategy: Strategy) -> float:
        return self._cost(strategy)

    def describe(self) -> Mapping[str, Any]:
        return {"task": "gradscope.adaptive:LoopTask"}
