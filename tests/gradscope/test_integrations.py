"""What the adapters share, and each of them beside a stand-in for its framework."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradscope import Strategy
from gradscope.errors import CheckpointError, UsageError
from gradscope.integrations import attach, set_strategy
from tests.gradscope.loops_for_tests import (
    GRID,
    Classifier,
    adapter_with,
    assert_same_run,
    batch_of,
    controller_for,
    plain_run,
)


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    torch.set_num_threads(1)


class Callback:
    """Stands for Lightning's class: hooks that do nothing."""


class TrainerCallback:
    """Stands for the class of transformers."""


def setup(budget: float = 1200) -> tuple[Classifier, torch.optim.Optimizer, Any]:
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return model, optimizer, controller_for(model, optimizer, budget)


def test_a_model_is_told_by_an_attribute() -> None:
    class Defaulting(nn.Linear):
        strategy = GRID.reference

    for model in (nn.Linear(1, 1), Defaulting(1, 1)):
        set_strategy(model, Strategy(keep=0.5))
        assert model.strategy == Strategy(keep=0.5) and list(model.state_dict()) == ["weight", "bias"]


def test_an_attribute_of_the_model_s_own_is_not_hidden() -> None:
    class Own(nn.Module):
        @property
        def strategy(self) -> str:
            return "mine"

    with pytest.raises(UsageError, match=r"Own has a `strategy` of its own.*`apply=`"):
        set_strategy(Own(), Strategy(keep=1))


def test_an_attached_optimizer_gives_the_run_of_a_loop_of_ones_own() -> None:
    model, optimizer, controller = setup()
    handle = attach(controller, optimizer)
    while not controller.finished:
        model.strategy = controller.at(controller.step)
        model(*batch_of(controller.step))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_run(controller, model, plain_run())
    with pytest.raises(UsageError, match=r"budget of 1,200 units is spent after .* optimizer steps"):
        optimizer.step()
    handle.remove()
    optimizer.step()


def test_an_attached_optimizer_refuses_gradients_that_come_too_late() -> None:
    _, optimizer, controller = setup()
    attach(controller, optimizer)
    with pytest.raises(UsageError, match="no parameter has a gradient"):
        optimizer.step()
    with pytest.raises(UsageError, match=r"optimizer.step\(closure\) computes the gradients after"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(UsageError, match=r"optimizer.step\(closure\) computes the gradients after"):
        optimizer.step(closure=lambda: 0.0)
    assert controller.step == 0


@pytest.mark.parametrize(
    ("name", "modules", "package"),
    [
        ("lightning", ["lightning__pytorch", "lightning", "pytorch_lightning"], "lightning"),
        ("transformers", ["transformers"], "transformers"),
    ],
)
def test_without_the_framework_its_name_is_told_on_use(
    name: str, modules: list[str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_with(monkeypatch, name, **dict.fromkeys(modules))
    with pytest.raises(UsageError, match=f"OnlineCallback needs .*: pip install {package}"):
        adapter.OnlineCallback(setup()[2])


def test_the_lightning_that_is_imported_is_the_one_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lightning", "lightning.pytorch"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    adapter = adapter_with(monkeypatch, "lightning", pytorch_lightning=Callback)
    assert issubclass(adapter.OnlineCallback, Callback)


class LightningLoop:
    """The order in which Lightning calls a callback's hooks: closure first, then the hook, then the step."""

    def __init__(self, callback: Any, model: Classifier, optimizer: torch.optim.Optimizer, step: int = 0) -> None:
        self.callback, self.model, self.optimizer = callback, model, optimizer
        self.trainer = SimpleNamespace(
            optimizers=[optimizer], global_step=0, should_stop=False, state=SimpleNamespace(fn="fit")
        )
        callback.on_fit_start(self.trainer, model)
        self.trainer.global_step = step
        callback.on_train_start(self.trainer, model)

    def run(self, stop: int = 1000, accumulate: int = 1) -> None:
        while not self.trainer.should_stop and self.trainer.global_step < stop:
            self.optimizer.zero_grad()
            for part in range(accumulate):
                batch = self.trainer.global_step * accumulate + part
                self.callback.on_train_batch_start(self.trainer, self.model, None, batch)
                (self.model(*batch_of(batch))["loss"] / accumulate).backward()
            self.callback.on_before_optimizer_step(self.trainer, self.model, self.optimizer)
            self.optimizer.step()
            self.trainer.global_step += 1
        self.callback.on_train_end(self.trainer, self.model)


def test_lightning_s_hooks_give_the_run_of_a_loop_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_with(monkeypatch, "lightning", lightning__pytorch=Callback)
    model, optimizer, controller = setup()
    callback = adapter.OnlineCallback(controller)
    assert isinstance(callback, Callback) and callback.strategy is None
    LightningLoop(callback, model, optimizer).run()
    assert_same_run(controller, model, plain_run())
    assert callback.strategy == controller.at(controller.step - 1) and model.strategy == GRID.reference


def test_a_controller_that_lightning_s_training_makes_takes_up_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_with(monkeypatch, "lightning", lightning__pytorch=Callback)
    model, optimizer, _ = setup()
    first = adapter.OnlineCallback(controller_for)
    with pytest.raises(UsageError, match="the controller is made when training begins"):
        _ = first.controller
    assert first.state_dict() == {}
    LightningLoop(first, model, optimizer).run(stop=60)
    weights, moments = model.state_dict(), optimizer.state_dict()
    model, optimizer, _ = setup()
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    second = adapter.OnlineCallback(controller_for)
    second.load_state_dict(first.state_dict())
    LightningLoop(second, model, optimizer, step=60).run()
    assert_same_run(second.controller, model, plain_run())


def test_lightning_is_told_of_a_state_that_was_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_with(monkeypatch, "lightning", lightning__pytorch=Callback)
    model, optimizer, controller = setup()
    with pytest.raises(UsageError, match="begins at optimizer step 7 and the controller is at 0"):
        LightningLoop(adapter.OnlineCallback(controller), model, optimizer, step=7)


def test_lightning_with_two_optimizers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_with(monkeypatch, "lightning", lightning__pytorch=Callback)
    model, optimizer, controller = setup()
    trainer = SimpleNamespace(optimizers=[optimizer, optimizer], global_step=0)
    with pytest.raises(UsageError, match="Classifier has 2 optimizers"):
        adapter.OnlineCallback(controller).on_fit_start(trainer, model)


def test_a_controller_of_another_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_with(monkeypatch, "lightning", lightning__pytorch=Callback)
    model, _, controller = setup()
    with pytest.raises(UsageError, match=r"made for another optimizer.*give a function \(model, optimizer\)"):
        LightningLoop(adapter.OnlineCallback(controller), model, torch.optim.Adam(model.parameters()))


def test_a_controller_made_before_the_processes_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_with(monkeypatch, "lightning", lightning__pytorch=Callback)
    model, optimizer, controller = setup()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(UsageError, match="knows of 1 and there are 2 processes; give a function"):
        LightningLoop(adapter.OnlineCallback(controller), model, optimizer)


def test_lightning_s_validation_sees_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_with(monkeypatch, "lightning", lightning__pytorch=Callback)
    model, optimizer, controller = setup()
    callback = adapter.OnlineCallback(controller)
    loop = LightningLoop(callback, model, optimizer)
    cheap = next(step for step in range(100) if controller.at(step) != GRID.reference)
    loop.run(stop=cheap)
    callback.on_train_batch_start(loop.trainer, model, None, cheap)
    assert model.strategy != GRID.reference
    callback.on_validation_start(loop.trainer, model)
    assert model.strategy == GRID.reference != callback.strategy


class TransformersLoop:
    """The order in which the Trainer calls a callback's hooks; it zeroes gradients before `on_step_end`."""

    def __init__(self, callback: Any, model: Classifier, optimizer: torch.optim.Optimizer, args: Any) -> None:
        self.callback, self.model, self.optimizer, self.args = callback, model, optimizer, args
        self.state = SimpleNamespace(global_step=0)
        self.control = SimpleNamespace(should_training_stop=False, should_save=False, should_evaluate=False)

    def call(self, event: str, **kwargs: Any) -> None:
        getattr(self.callback, event)(self.args, self.state, self.control, model=self.model, **kwargs)

    def run(self, start: int = 0, stop: int = 1000) -> None:
        self.state.global_step = start
        self.call("on_train_begin", optimizer=SimpleNamespace(optimizer=self.optimizer))
        while not self.control.should_training_stop and self.state.global_step < stop:
            self.call("on_step_begin")
            self.model(*batch_of(self.state.global_step))["loss"].backward()
            self.call("on_pre_optimizer_step")
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.call("on_step_end")
            assert self.model.strategy == GRID.reference

    def save(self) -> None:
        Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").mkdir(parents=True)
        self.call("on_save")


def arguments(folder: Path, **changes: Any) -> SimpleNamespace:
    values = {"should_save": True, "resume_from_checkpoint": None, "save_strategy": "no", "eval_strategy": "no"}
    return SimpleNamespace(**{"output_dir": str(folder), **values, **changes})


def test_the_hooks_of_transformers_give_the_run_of_a_loop_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = adapter_with(monkeypatch, "transformers", transformers=TrainerCallback)
    model, optimizer, controller = setup()
    callback = adapter.OnlineCallback(controller)
    loop = TransformersLoop(callback, model, optimizer, arguments(tmp_path, save_strategy="steps"))
    loop.run()
    assert isinstance(callback, TrainerCallback) and callback.strategy == controller.at(controller.step - 1)
    assert_same_run(controller, model, plain_run())
    assert loop.control.should_save and not loop.control.should_evaluate


def test_transformers_continues_from_the_file_in_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    adapter = adapter_with(monkeypatch, "transformers", transformers=TrainerCallback)
    model, optimizer, _ = setup()
    callback = adapter.OnlineCallback(controller_for)
    first = TransformersLoop(callback, model, optimizer, arguments(tmp_path))
    first.run(stop=60)
    first.save()
    moved = (tmp_path / "checkpoint-60").rename(tmp_path / "elsewhere")
    assert [path.name for path in moved.iterdir()] == ["gradscope_online.json"]
    for place in ({"resume_from": moved}, {}):
        again = Classifier()
        again.load_state_dict(model.state_dict())
        adam = torch.optim.Adam(again.parameters())
        adam.load_state_dict(deepcopy(optimizer.state_dict()))
        told = arguments(tmp_path, resume_from_checkpoint=True if place else str(moved))
        second = TransformersLoop(adapter.OnlineCallback(controller_for, **place), again, adam, told)
        second.run(start=60)
        assert_same_run(second.callback.controller, again, plain_run())


def test_transformers_is_told_what_a_checkpoint_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = adapter_with(monkeypatch, "transformers", transformers=TrainerCallback)
    model, optimizer, controller = setup()
    loop = TransformersLoop(adapter.OnlineCallback(controller), model, optimizer, arguments(tmp_path))
    with pytest.raises(CheckpointError, match=r"checkpoint-5/gradscope_online.json: missing, and .* step 5"):
        loop.run(start=5)
    with pytest.raises(CheckpointError, match="checkpoint-5: no such folder"):
        loop.call("on_save")
    path = tmp_path / "checkpoint-5" / "gradscope_online.json"
    path.parent.mkdir()
    path.write_text("{ torn")
    with pytest.raises(CheckpointError, match=r"cannot be read .* earlier checkpoint"):
        loop.run(start=5)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="holds no controller's state"):
        loop.run(start=5)
    path.unlink()
    loop.call("on_save")  # of a controller that is at step 0
    with pytest.raises(UsageError, match="begins at optimizer step 5 and the controller is at 0"):
        loop.run(start=5)


def test_only_the_rank_that_saves_writes_the_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = adapter_with(monkeypatch, "transformers", transformers=TrainerCallback)
    model, optimizer, controller = setup()
    TransformersLoop(
        adapter.OnlineCallback(controller), model, optimizer, arguments(tmp_path, should_save=False)
    ).save()
    assert not list((tmp_path / "checkpoint-0").iterdir())


def test_a_second_training_takes_a_new_controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = adapter_with(monkeypatch, "transformers", transformers=TrainerCallback)
    model, optimizer, controller = setup()
    fixed, made = adapter.OnlineCallback(controller), adapter.OnlineCallback(controller_for)
    for callback in (fixed, made):
        TransformersLoop(callback, model, optimizer, arguments(tmp_path)).run(stop=3)
    with pytest.raises(UsageError, match=r"begins at optimizer step 0 and the controller is at 3.*new controller"):
        TransformersLoop(fixed, model, optimizer, arguments(tmp_path)).run(stop=3)
    TransformersLoop(made, model, optimizer, arguments(tmp_path)).run(stop=5)
    assert made.controller.step == 5


def test_a_budget_that_is_spent_trains_no_further(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    adapter = adapter_with(monkeypatch, "transformers", transformers=TrainerCallback)
    model, optimizer, _ = setup()
    args = arguments(tmp_path)
    first = TransformersLoop(adapter.OnlineCallback(controller_for), model, optimizer, args)
    first.run()
    first.save()
    again = TransformersLoop(adapter.OnlineCallback(controller_for), model, optimizer, args)
    with pytest.raises(UsageError, match="budget of 1,200 units is spent"):
        again.run(start=first.state.global_step)
