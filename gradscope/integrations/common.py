"""What all adapters share: how a model learns its strategy, and how a controller follows a loop of others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.hooks import RemovableHandle

from gradscope.adaptive import AdaptiveController
from gradscope.errors import UsageError
from schedulers import Strategy

Apply = Callable[[nn.Module, Strategy], None]
MakeController = Callable[[nn.Module, torch.optim.Optimizer], AdaptiveController]
ATTRIBUTE = "strategy"


def set_strategy(model: nn.Module, strategy: Strategy) -> None:
    """Tell `model` its strategy by the attribute `strategy`, which its forward pass reads.

    Its class may have a default of that name; raises UsageError where it has anything else.
    """
    if not isinstance(getattr(type(model), ATTRIBUTE, strategy), Strategy):
        raise UsageError(
            f"{type(model).__name__} has a `{ATTRIBUTE}` of its own, which the strategy would hide; pass `apply=`, a "
            "function of model and strategy that tells the model"
        )
    setattr(model, ATTRIBUTE, strategy)


class Follower:
    """A controller that follows a framework's loop: `before_step`, then `after_backward`, for every optimizer step.

    `controller`: an AdaptiveController, or a function (model, optimizer) -> AdaptiveController for a framework that
    makes the optimizer itself; it is called when training begins. Between the steps of training, where a framework
    evaluates, `rest` puts the model on the reference.
    """

    def __init__(self, controller: AdaptiveController | MakeController, apply: Apply) -> None:
        self._made = controller if isinstance(controller, AdaptiveController) else None
        self._make = None if isinstance(controller, AdaptiveController) else controller
        self._apply = apply
        self._pending: Mapping[str, Any] | None = None
        self.strategy: Strategy | None = None

    @property
    def controller(self) -> AdaptiveController:
        if self._made is None:
            raise UsageError("the controller is made when training begins; there is none yet")
        return self._made

    def build(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Have a controller: where it is made here, a new one for each training that begins at step 0.

        Raises UsageError for a controller of another optimizer, whose second moment would never be that of training,
        and for one that was made before the processes of a distributed job had joined, which would decide alone.
        """
        if self._make is not None and (self._made is None or (step == 0 and self._made.step > 0)):
            self._made = self._make(model, optimizer)
        if self.controller.optimizer is not None and self.controller.optimizer is not optimizer:
            raise UsageError(
                "the controller was made for another optimizer than the one that trains; give a function (model, "
                "optimizer) -> AdaptiveController, which is called when there is one"
            )
        joined = distributed.is_available() and distributed.is_initialized()
        processes = distributed.get_world_size() if joined else 1
        if self.controller.ranks.size != processes:
            raise UsageError(
                f"the controller knows of {self.controller.ranks.size} and there are {processes} processes; give a "
                "function (model, optimizer) -> AdaptiveController, which is called when they have joined"
            )

    def begin(self, step: int) -> None:
        """Take the state that was loaded, if any. Raises UsageError where the loop stands at another optimizer step."""
        if self._pending is not None:
            self.controller.load_state_dict(self._pending)
            self._pending = None
        if self.controller.step != step:
            raise UsageError(
                f"training begins at optimizer step {step} and the controller is at {self.controller.step}: continue "
                "from a checkpoint that holds the controller's state, and take a new controller for a new run"
            )

    def before_step(self, model: nn.Module, step: int) -> None:
        """Put the model on the strategy of `step`. Raises UsageError when the budget is spent."""
        check_budget(self.controller)
        self.strategy = self.controller.at(step)
        self._apply(model, self.strategy)

    def after_backward(self, step: int) -> bool:
        """Observe `step`; whether the budget is spent."""
        self.controller.observe(step)
        return self.controller.finished

    def rest(self, model: nn.Module) -> None:
        """Put the model on the reference, as evaluation and whoever gets the model expect."""
        self._apply(model, self.controller.task.grid.reference)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._made is None else self._made.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state when training begins, for there may be no controller yet."""
        self._pending = state


def attach(controller: AdaptiveController, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Observe every `optimizer.step()` of a loop that offers no hook; the result's `remove()` ends it.

    For a loop that reads `controller.at(controller.step)` before a forward pass. The step is the controller's own, so
    its state must be saved and loaded with the model's. A step that a GradScaler skips is not seen: it is not charged
    and the next one has its number. `optimizer.step` raises UsageError once the budget is spent, and for a closure,
    in which gradients would come after the observation.
    """

    def observe(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first one is the optimizer
        if closure is not None:
            raise UsageError(
                "optimizer.step(closure) computes the gradients after this hook; call controller.observe(step) after "
                "backward() instead of attaching"
            )
        check_budget(controller)
        controller.observe(controller.step)

    return optimizer.register_step_pre_hook(observe)


def check_budget(controller: AdaptiveController) -> None:
    """Raise UsageError when the budget does not pay for the next step, rather than overspend it in silence."""
    if controller.finished:
        raise UsageError(
            f"the budget of {controller.budget:,.0f} units is spent after {controller.step} optimizer steps; end the "
            "training when the controller is `finished`, or give a larger budget"
        )


def framework_class(modules: Sequence[str], name: str) -> tuple[Any, str]:
    """The class `name` of one of `modules`, an imported one first, and ""; else `object` and the reason."""
    reasons = []
    for module in sorted(modules, key=lambda module: module not in sys.modules):
        try:
            return getattr(import_module(module), name), ""
        except (ImportError, AttributeError) as error:
            reasons.append(str(error).splitlines()[0])
    return object, "; ".join(reasons)
