"""Gradients that are not finite, zero or huge while a model trains: in its steps, and in probes of the online mode."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gradscope.checkpoints import list_steps, load_checkpoint
from gradscope.cli.run_settings import make_schedule
from gradscope.config import TrainConfig
from gradscope.errors import NonFiniteError, UsageError
from gradscope.stepper import Stepper, all_finite
from gradscope.trainer import train
from schedulers import Strategy
from tests.gradscope.adaptive_loops import HALF, WHOLE, Spy, new_loop
from tests.gradscope.small_methods import small_setting

CPU = torch.device("cpu")
FULL = Strategy(patch=4, dropout=0)


def spoil(monkeypatch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """From step `at` on, one number of the gradient is `value`; the loss stays as it is."""
    whole = Stepper._gradient

    def spoilt(self: Stepper, step: int, *rest: object) -> object:
        found = whole(self, step, *rest)  # type: ignore[arg-type]
        if step >= at:
            parameter = next(p for p in self.model.parameters() if p.grad is not None)
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = value
        return found

    monkeypatch.setattr(Stepper, "_gradient", spoilt)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_gradient_that_is_not_finite_stops_a_run_before_it_moves_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    setting = small_setting("mocov3", checkpoints=(0.0, 0.2, 0.4, 0.6, 0.8))
    spoil(monkeypatch, 4, value)
    with pytest.raises(NonFiniteError, match=r"step 4: the gradient is not finite under patch=.*, though the loss is"):
        train(setting, make_schedule("mixed", setting), tmp_path)
    kept = list_steps(tmp_path)
    assert kept
    for path in kept:
        assert all(value.isfinite().all() for value in load_checkpoint(path)["model"].values())


def test_what_is_not_finite_in_optimizer_or_buffers_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = small_setting("mocov3", checkpoints=(0.5,))
    step = Stepper.step

    def spoilt(self: Stepper, number: int, *rest: object) -> tuple[float, float]:
        found = step(self, number, *rest)  # type: ignore[arg-type]
        next(iter(self.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = math.inf
        return found

    monkeypatch.setattr(Stepper, "step", spoilt)
    with pytest.raises(NonFiniteError, match=r"the optimizer's exp_avg_sq of \S+ is no longer finite; .*nothing was"):
        train(setting, make_schedule("mixed", setting), tmp_path)
    assert not list_steps(tmp_path)


def test_finite_is_finite_however_large() -> None:
    assert all_finite([]) and all_finite([torch.empty(0), torch.full((3,), 3e38), torch.full((3,), -3e38)])
    assert not all_finite([torch.ones(2), torch.tensor([1.0, math.nan])])
    assert not all_finite([torch.tensor([-math.inf]), torch.ones(2, dtype=torch.float64)])


def test_gradients_of_zero_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = small_setting("mocov3", weight_decay=0.0)
    model = setting.new_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    views = [
        torch.zeros(setting.config.batch_size, setting.data.channels, a.size, a.size) for a in setting.augmentations
    ]
    stepper = Stepper(setting, model, device=CPU)
    for group in (model.backbone, model.projector):
        for parameter in group.parameters():
            parameter.register_hook(torch.zeros_like) if parameter.requires_grad else None
    loss, _ = stepper.step(3, 0.5, FULL, views)
    assert math.isfinite(loss) and all(p.isfinite().all() for p in model.parameters())
    kept = {n for n, p in model.named_parameters() if n in before and torch.equal(before[n], p)}
    assert {n for n in before if n.startswith(("backbone", "projector"))} <= kept


@pytest.mark.parametrize("changes", [{"lr": 0.0}, {"batch_size": 1}, {"lr": math.nan}])
def test_settings_that_cannot_train_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(changes))):
        TrainConfig(budget=100.0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e25, 1e150])
@pytest.mark.parametrize("where", [WHOLE, HALF], ids=["reference", "one"])
def test_probes_of_any_size_end_no_run(factor: float, where: Strategy) -> None:
    """Numbers that say something are scores; those that do not are failures with a reason; training goes on."""
    spy = Spy(trouble=lambda now, call: factor if now == where and torch.is_grad_enabled() else 1.0)
    loop = new_loop(spy=spy, budget=1500).all()
    controller = loop.controller
    assert controller.finished and controller.decisions[-1].why == "finish" and controller.probes
    assert all(torch.isfinite(p).all() for p in loop.model.parameters())
    json.dumps(controller.state_dict(), allow_nan=False)
    first = controller.probes[0]
    assert all(np.isfinite(score) for score in first.scores.values())
    if factor == 1e150:
        assert "too large for moments" in (first.error if where == WHOLE else first.failures[str(where)])
    elif where == HALF:
        assert str(WHOLE) in first.scores and not first.failures
