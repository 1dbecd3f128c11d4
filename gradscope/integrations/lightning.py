"""A callback for Lightning's Trainer, of `lightning` or of `pytorch_lightning`.

    def controller(module, optimizer):
        return AdaptiveController(task, module.net, optimizer, budget="2M", batch_size=64)

    Trainer(callbacks=[OnlineCallback(controller)], max_epochs=-1)

The strategy must act inside the model or `training_step`: Lightning fetches a batch ahead, so a dataset or a collate
function would use that of the step before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gradscope.adaptive import AdaptiveController
from gradscope.errors import UsageError
from gradscope.integrations.common import Apply, Follower, MakeController, framework_class, set_strategy
from schedulers import Strategy

_FOUND, _MISSING = framework_class(["lightning.pytorch", "pytorch_lightning"], "Callback")
if TYPE_CHECKING:
    _Callback = object
else:
    _Callback = _FOUND


class OnlineCallback(_Callback):
    """Runs an online controller: strategy before each optimizer step, observation after backward, stop at the end.

    `controller`: an AdaptiveController, or a function (module, optimizer) -> AdaptiveController that is called when
    training begins, for the optimizer that `configure_optimizers` makes. `apply(module, strategy)` tells the module;
    by default its attribute `strategy` is set. `strategy` is that of the current or last optimizer step; while the
    module is evaluated, and afterwards, it has the reference.

    With gradient accumulation all batches of an optimizer step have one strategy, and the controller's `batch_size`
    counts them all. The state is kept in Lightning's checkpoints. Raises UsageError without Lightning, with several
    optimizers, and for a checkpoint without the controller's state.
    """

    def __init__(self, controller: AdaptiveController | MakeController, *, apply: Apply = set_strategy) -> None:
        if _MISSING:
            raise UsageError(f"OnlineCallback needs Lightning ({_MISSING}): pip install lightning")
        super().__init__()
        self._follower = Follower(controller, apply)

    @property
    def controller(self) -> AdaptiveController:
        return self._follower.controller

    @property
    def strategy(self) -> Strategy | None:
        return self._follower.strategy

    @property
    def state_key(self) -> str:
        return "gradscope.OnlineCallback"

    def state_dict(self) -> dict[str, Any]:
        return self._follower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._follower.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if len(trainer.optimizers) != 1:
            raise UsageError(
                f"{type(pl_module).__name__} has {len(trainer.optimizers)} optimizers; an online controller follows one"
            )
        self._follower.build(pl_module, trainer.optimizers[0], trainer.global_step)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._follower.begin(trainer.global_step)
        if self.controller.finished:
            trainer.should_stop = True

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._follower.before_step(pl_module, trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        if self._follower.after_backward(trainer.global_step):
            trainer.should_stop = True

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._follower.rest(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._follower.rest(pl_module)
