"""The learning-rate decay in a user's own loop, and the same rates in the bundled trainer's log."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradscope import Decay, Schedule, Strategy
from gradscope.cli.run_settings import make_schedule
from gradscope.config import Setting
from gradscope.trainer import read_log, train
from schedulers import Stage


def cosine_with_warmup(fraction: float, warmup: float) -> float:
    if fraction < warmup:
        return fraction / warmup
    return 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


def test_a_loop_of_ones_own_sets_the_rate_from_the_budget_spent() -> None:
    """Under a loss with gradient 1, plain SGD moves the parameter by the rate of each step."""
    short, full = Strategy(patch=7), Strategy(patch=4)
    schedule = Schedule(stages=(Stage(0.0, 0.5, ((short, 1.0),), 1.0), Stage(0.5, 1.0, ((full, 1.0),), 4.0)))
    decay, base_lr, budget, batch = Decay("cosine", warmup=0.1), 0.2, 2000.0, 10
    parameter = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=base_lr)
    spent, step, places = 0.0, 0, [0.0]
    while spent < budget:
        strategy = schedule.draw(spent / budget, seed=0, step=step)
        for group in optimizer.param_groups:
            group["lr"] = base_lr * decay.factor(spent / budget)
        optimizer.zero_grad()
        parameter.backward()
        optimizer.step()
        places.append(-parameter.item())
        spent += batch * {short: 1.0, full: 4.0}[strategy]
        step += 1
    moved = [after - before for before, after in itertools.pairwise(places)]
    at = [k / 200 for k in range(100)] + [0.5 + k / 50 for k in range(25)]  # of the budget, before each step
    assert moved == pytest.approx([0.2 * cosine_with_warmup(fraction, 0.1) for fraction in at], abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "polynomial"])
def test_the_trainer_logs_the_very_rates_of_such_a_loop(
    kind: str, make_setting: Callable[..., Setting], tmp_path: Path
) -> None:
    setting = make_setting(decay=kind, warmup=0.2, lr=0.016)
    plan = make_schedule("patch=7@0.5;patch=4", setting)
    train(setting, plan, tmp_path / "run")
    rows = [row for row in read_log(tmp_path / "run") if "loss" in row]
    decay, model, spent = Decay(kind, warmup=0.2), setting.new_model(), 0.0
    for step, row in enumerate(rows):
        assert row["lr"] == 0.016 * 16 / 256 * decay.factor(spent / 400)
        spent += 16 * model.cost(plan.draw(spent / 400, seed=0, step=step))
    assert len(rows) > 8 and rows[0]["lr"] == 0
