"""Small tasks with axes of their own: nothing in the profiler may assume patch and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from gradscope import Grid, Strategy, Task


class LineTask(Task):
    """Least squares on noisy lines; the axis `keep` names which inputs are read, `noise` adds noise to them."""

    grid = Grid({"keep": ("all", "half"), "noise": (0, 0.5, 2)}, Strategy(keep="all", noise=0))
    batch_size = 8

    def load(self, checkpoint: Path) -> nn.Module:
        torch.manual_seed(len(checkpoint.name))
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 1))
        with torch.no_grad():
            model[0].weight.mul_(1 + int(checkpoint.stem.split("-")[1]) / 10)
        return model

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(size, 6, generator=generator)
            yield x, x.sum(1) + torch.randn(size, generator=generator)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        x, y = batch
        if strategy["keep"] == "half":
            x = x * torch.tensor([1.0, 1, 1, 0, 0, 0])
        x = x + strategy.number("noise") * torch.randn(x.shape, generator=generator)
        return (model(x).squeeze(1) - y).square().mean()

    def cost(self, strategy: Strategy) -> float:
        return (3.0 if strategy["keep"] == "all" else 1.5) / (1 + strategy.number("noise"))


class FailingTask(LineTask):
    """One strategy raises, another gives NaN."""

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        if strategy == Strategy(keep="half", noise=2):
            raise RuntimeError("out of memory, say")
        loss = super().loss(model, batch, strategy, generator)
        return loss * float("nan") if strategy == Strategy(keep="all", noise=2) else loss


def make_checkpoints(folder: Path, steps: tuple[int, ...] = (0, 5, 10)) -> Path:
    """Files whose names and bytes are all that LineTask needs."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (folder / f"step-{step}.pt").write_bytes(b"weights of step %d" % step)
    return folder
