"""A model and a task small enough that a run of the online mode takes a second, for the tests of its adapters."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradscope import AdaptiveController, AdaptiveRule, Grid, LoopTask, Strategy

GRID = Grid({"keep": (0.25, 0.5, 1)}, reference=Strategy(keep=1))
BATCH = 8
RULE = AdaptiveRule(overhead=0.3, exploration=0.4, minimum=3, maximum=6)
_noise = torch.Generator().manual_seed(0)
FEATURES = torch.randn(96, 16, generator=_noise)
LABELS = (FEATURES @ torch.randn(16, generator=_noise) > 0).float()


class Classifier(nn.Module):
    """Logistic regression that sees a part of the features, as its attribute `strategy` says."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.linear = nn.Linear(16, 1)
        self.seen: list[Strategy] = []  # of every forward pass in training

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.seen.append(self.strategy)  # type: ignore[arg-type]  # set by the adapter
        logits = part_of(self, features, self.strategy)  # type: ignore[arg-type]
        loss = logits.sum() if labels is None else binary_loss(logits, labels)
        return {"loss": loss, "logits": logits}


def part_of(model: Classifier, features: Tensor, strategy: Strategy) -> Tensor:
    kept = round(features.shape[1] * strategy.number("keep"))
    return nn.functional.linear(features[:, :kept], model.linear.weight[:, :kept], model.linear.bias)[:, 0]


def binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def _loss(model: nn.Module, batch: Any, strategy: Strategy, generator: torch.Generator) -> Tensor:
    assert isinstance(model, Classifier)
    features, labels = batch
    return binary_loss(part_of(model, features, strategy), labels)


def _batches(size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(FEATURES), (size,), generator=generator)
        yield FEATURES[chosen], LABELS[chosen]


def batch_of(step: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """The batch of one optimizer step, in turn."""
    rows = (torch.arange(size) + step * size) % len(FEATURES)
    return FEATURES[rows], LABELS[rows]


def controller_for(
    model: nn.Module, optimizer: torch.optim.Optimizer, budget: float = 1200, batch_size: int = BATCH
) -> AdaptiveController:
    task = LoopTask(GRID, loss=_loss, batches=_batches, cost=lambda strategy: strategy.number("keep"))
    return AdaptiveController(task, model, optimizer, budget=budget, batch_size=batch_size, rule=RULE, seed=3)


def plain_run(budget: float = 1200, accumulate: int = 1) -> tuple[AdaptiveController, Classifier]:
    """What every adapter must reproduce: a loop of ones own."""
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    controller = controller_for(model, optimizer, budget, BATCH * accumulate)
    batch = 0
    while not controller.finished:
        model.strategy = controller.at(controller.step)  # type: ignore[assignment]
        for _ in range(accumulate):
            (model(*batch_of(batch))["loss"] / accumulate).backward()
            batch += 1
        controller.observe(controller.step)
        optimizer.step()
        optimizer.zero_grad()
    assert len(controller.probes) >= 3 and controller.policy.incumbent is not None
    return controller, model


def assert_same_run(
    controller: AdaptiveController, model: Classifier, expected: tuple[AdaptiveController, Classifier]
) -> None:
    """Same decisions, same strategies at every step, same units, same weights."""
    other, other_model = expected
    assert controller.step == other.step and controller.spent == other.spent and controller.finished
    assert controller.decisions == other.decisions
    assert [controller.at(step) for step in range(other.step)] == [other.at(step) for step in range(other.step)]
    torch.testing.assert_close(model.linear.weight, other_model.linear.weight)


def adapter_with(monkeypatch: pytest.MonkeyPatch, name: str, **frameworks: type | None) -> ModuleType:
    """A fresh copy of an adapter's module, imported beside stand-ins `module name=class`, None being a missing one.

    Dots of a module's name are written as double underscores.
    """
    for key, value in frameworks.items():
        module = key.replace("__", ".")
        stand_in = None if value is None else ModuleType(module)
        if value is not None:
            setattr(stand_in, value.__name__, value)
        monkeypatch.setitem(sys.modules, module, stand_in)  # type: ignore[arg-type]  # None: an import that fails
    found = importlib.util.find_spec(f"gradscope.integrations.{name}")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
