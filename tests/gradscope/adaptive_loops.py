"""A loop of a user's own around the online mode, on models and data of a millisecond a step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradscope import AdaptiveController, AdaptiveRule, Grid, LoopTask, Strategy

GRID = Grid({"keep": (0.25, 0.5, 1)}, reference=Strategy(keep=1))
QUARTER, HALF, WHOLE = GRID.strategies()
ALONE = Grid({"keep": (1,)}, reference=Strategy(keep=1))
WIDTH, BATCH = 8, 8
PROBES: dict[str, Any] = {"overhead": 0.4, "exploration": 0.3, "minimum": 3, "maximum": 4, "dwell": 0.0}
MIXED: dict[str, Any] = {**PROBES, "finish": 0.0, "frozen": True}  # probes that decide nothing


def linear(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    return _seeded(seed, lambda: nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 1))).to(dtype)


def coupled(seed: int = 0) -> nn.Module:
    """With a user's BatchNorm and dropout."""
    return _seeded(
        seed,
        lambda: nn.Sequential(
            nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1), nn.Dropout1d(0.1)
        ),
    )


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().train()


def sample_losses(model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
    """Squared errors of a line whose inputs beyond those kept are not seen; noise from the generator."""
    x, y = batch
    kept = round(WIDTH * strategy.number("keep"))
    x = torch.cat([x[:, :kept], torch.zeros_like(x[:, kept:])], dim=1)
    x = x + (1 - strategy.number("keep")) * 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return (model(x).squeeze(1) - y).square()


def loss(model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
    return sample_losses(model, batch, strategy, generator).mean()


def batches(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(2, 0.2, WIDTH, dtype=dtype)
    while True:
        x = torch.randn(size, WIDTH, generator=generator, dtype=dtype)
        yield x, x @ slope + 0.3 * torch.randn(size, generator=generator, dtype=dtype)


def cost(strategy: Strategy) -> float:
    return 3 * strategy.number("keep")


@dataclass
class Spy:
    """What a task was called for: units by hand in passes with and without gradient, seeds of its batches.

    `trouble(strategy, call)` may raise, or give a factor for the loss, in passes outside training.
    """

    dtype: torch.dtype = torch.float64
    trouble: Callable[[Strategy, int], float | None] | None = None
    training: bool = False
    units: float = 0.0
    units_without_gradient: float = 0.0
    seeds: list[tuple[int, int]] = field(default_factory=list)
    calls: int = 0

    def loss(self, model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
        factor: float | None = 1.0
        if not self.training:
            self.calls += 1
            _ = torch.rand(2), np.random.rand(), random.random()  # a loss may draw from streams that are not its own
            if self.trouble is not None:
                factor = self.trouble(strategy, self.calls)
            if torch.is_grad_enabled():
                self.units += len(batch[0]) * cost(strategy)
            else:
                self.units_without_gradient += len(batch[0]) * cost(strategy)
        found = loss(model, batch, strategy, generator)
        return found if factor is None else found * factor

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.seeds.append((size, seed))
        return batches(size, seed, self.dtype)

    def task(self, grid: Grid = GRID, **changes: Any) -> LoopTask:
        return LoopTask(grid, **{"loss": self.loss, "batches": self.batches, "cost": cost, **changes})


@dataclass
class Loop:
    """A training run of a user's own. `streams`: the data is augmented from all global random streams."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    controller: AdaptiveController
    spy: Spy
    streams: bool = True
    ran: list[Strategy] = field(default_factory=list)

    def backward(self, strategy: Strategy, step: int) -> None:
        """Forward and backward pass of a step, whose data is a function of the step and of the global streams."""
        x, y = next(batches(BATCH, 1000 + step, self.spy.dtype))
        if self.streams:
            scale = 1 + 0.01 * (random.random() + float(np.random.rand()))
            x = x * scale + 0.01 * torch.randn(x.shape, dtype=x.dtype)
        self.spy.training = True
        try:
            self.spy.loss(self.model, (x, y), strategy, torch.Generator().manual_seed(step)).backward()
        finally:
            self.spy.training = False

    def once(self) -> bool:
        controller = self.controller
        if controller.finished:
            return False
        step = controller.step
        strategy = controller.at(step)
        self.ran.append(strategy)
        self.backward(strategy, step)
        controller.observe(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def all(self) -> Loop:
        while self.once():
            pass
        return self

    def until(self, probes: int) -> Loop:
        """Up to the step after which there are so many probes."""
        while len(self.controller.probes) < probes:
            assert self.once()
        return self

    def numbers(self) -> dict[str, Any]:
        """Everything that a training stream is made of, bit by bit."""
        moments = {
            f"{i} {name}": bits(torch.as_tensor(value))
            for i, kept in self.optimizer.state_dict()["state"].items()
            for name, value in kept.items()
        }
        return {
            "model": {name: bits(value) for name, value in self.model.state_dict().items()},
            "moments": moments,
            "torch": bits(torch.get_rng_state()),
            "numpy": tuple(np.random.get_state()[1]),
            "python": random.getstate(),
        }  # fmt: skip


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def seed_all(seed: int = 0) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def new_loop(
    rule: dict[str, Any] | None = None,
    *,
    model: nn.Module | None = None,
    optimizer: str = "AdamW",
    budget: float | str = 6000,
    grid: Grid = GRID,
    spy: Spy | None = None,
    task: dict[str, Any] | None = None,
    **options: Any,
) -> Loop:
    model = model or linear()
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = getattr(torch.optim, optimizer)(parameters, lr=0.02)
    spy = spy or Spy(parameters[0].dtype)
    controller = AdaptiveController(
        spy.task(grid, **(task or {})), model, made, budget=budget, batch_size=BATCH,
        rule=AdaptiveRule(**(PROBES if rule is None else rule)), **options,
    )  # fmt: skip
    return Loop(model, made, controller, spy)


def decisions_of(controller: AdaptiveController) -> str:
    """Everything that a controller decided and measured, without the seconds that it took."""
    state = controller.state_dict()
    del state["probe_seconds"]
    for record in state["probes"]:
        del record["seconds"]
    return json.dumps(state, sort_keys=True, allow_nan=False)
