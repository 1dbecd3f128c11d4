"""The online mode in a training loop of timm's kind, standing where its learning-rate scheduler stands.

    model = timm.create_model("vit_small_patch16_224", patch_drop_rate=0.5, dynamic_img_size=True)
    lr_scheduler = OnlineScheduler(controller, model, optimizer, scheduler=lr_scheduler)
    ...
        output = model(resize(input, lr_scheduler.strategy))
        ...
        lr_scheduler.step_update(num_updates=num_updates, metric=losses_m.avg)
        if lr_scheduler.finished: break

timm itself is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from gradscope.adaptive import AdaptiveController
from gradscope.errors import GradscopeError, UsageError
from gradscope.integrations.common import Apply, attach
from schedulers import Strategy

UNSEEN = 50  # updates in a row; a GradScaler that begins at 2^16 has by then halved to 2^-34


class Scheduler(Protocol):
    """What this module uses of timm's `Scheduler`."""

    def step(self, epoch: int, metric: float | None = None) -> None: ...
    def step_update(self, num_updates: int, metric: float | None = None) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def apply_to_vit(model: nn.Module, strategy: Strategy) -> None:
    """Put a Vision Transformer of timm on a strategy: its patch dropout on that of the axis `dropout`.

    timm keeps int(n * (1 - dropout)) of n patch tokens, at least one, and all of them while the model evaluates. The
    axis `resolution` (pixels) needs `resize` on the images besides. Raises UsageError where the model was not built
    for an axis, and for an axis of another name.
    """
    for axis in strategy:
        if axis == "dropout":
            _set_dropout(model, strategy.number(axis))
        elif axis == "resolution":
            _check_resolution(model, strategy.number(axis))
        else:
            cure = "pass `apply=`, a function of model and strategy that tells the model"
            if axis.startswith("patch"):
                cure = (
                    "timm's set_input_size would replace the patch embedding, and the optimizer lose it: "
                    "take fewer pixels instead (axis `resolution`)"
                )
            raise UsageError(f"strategy {strategy}: timm's models know nothing of the axis {axis!r}; {cure}")


def resize(images_BCHW: Tensor, strategy: Strategy) -> Tensor:
    """Images in the strategy's `resolution` (pixels), (B, C, resolution, resolution); as they are without that axis."""
    if "resolution" not in strategy:
        return images_BCHW
    side = int(strategy.number("resolution"))
    if images_BCHW.shape[-2:] == (side, side):
        return images_BCHW
    return interpolate(images_BCHW, size=(side, side), mode="bilinear", antialias=True)


class OnlineScheduler:
    """An online controller with the methods of timm's `Scheduler`, which the loop calls with absolute counts.

    `scheduler`: the loop's own one, which gets every call first. `apply(model, strategy)` tells the model, at once and
    after every `step_update`. Each `optimizer.step()` is observed; the one given must be the one that steps. An update
    that a GradScaler skips for an overflow is neither seen nor charged; the next one has its strategy.

    `finished` says when the loop must end. timm saves no scheduler: `state_dict` goes into the checkpoint by the
    user's hand. Raises UsageError where loop and controller are at different steps, and from `optimizer.step()` once
    the budget is spent.
    """

    def __init__(
        self,
        controller: AdaptiveController,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: Scheduler | None = None,
        apply: Apply = apply_to_vit,
    ) -> None:
        self.controller, self.model, self.scheduler = controller, model, scheduler
        self._apply, self._skipped, self._unseen = apply, 0, 0
        self._hook = attach(controller, optimizer)
        self._apply(model, self.strategy)

    @property
    def strategy(self) -> Strategy:
        """The strategy of the next optimizer step."""
        return self.controller.at(self.controller.step)

    @property
    def finished(self) -> bool:
        return self.controller.finished

    def step(self, epoch: int, metric: float | None = None) -> None:
        if self.scheduler is not None:
            self.scheduler.step(epoch, metric)

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Tell that `num_updates` updates are done, and put the model on the strategy of the next one."""
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates, metric)
        ahead = num_updates - self._skipped - self.controller.step
        if ahead == 1:
            self._skipped, self._unseen = self._skipped + 1, self._unseen + 1
        else:
            self._unseen = 0
        if ahead not in (0, 1) or self._unseen > UNSEEN:
            raise UsageError(
                f"the loop has done {num_updates} updates, of which the controller saw {self.controller.step}: give "
                "the optimizer whose step() is called, call step_update after each step, and load the state of this "
                "object when a run is continued"
            )
        self._apply(self.model, self.strategy)

    def close(self) -> None:
        """Observe no more, and put the model on the reference."""
        self._hook.remove()
        self._apply(self.model, self.controller.task.grid.reference)

    def state_dict(self) -> dict[str, Any]:
        """Plain values: the controller's state and the own scheduler's."""
        own = None if self.scheduler is None else self.scheduler.state_dict()
        return {"controller": self.controller.state_dict(), "skipped": self._skipped, "scheduler": own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        missing = {"controller", "skipped", "scheduler"} - set(state_dict)
        if missing:
            raise GradscopeError(f"the state of an OnlineScheduler lacks {', '.join(sorted(missing))}")
        if (state_dict["scheduler"] is None) != (self.scheduler is None):
            raise UsageError("`scheduler` was given in one of the two runs only, of state and of object")
        self.controller.load_state_dict(state_dict["controller"])
        self._skipped = int(state_dict["skipped"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        self._apply(self.model, self.strategy)


def _set_dropout(model: nn.Module, rate: float) -> None:
    if not 0 <= rate < 1:
        raise UsageError(f"dropout={rate:g}: a rate is at least 0 and below 1")
    layer = getattr(model, "patch_drop", None)
    if not isinstance(layer, nn.Module) or not hasattr(layer, "prob"):
        if rate == 0:
            return
        raise UsageError(
            f"dropout={rate:g}: {type(model).__name__}.patch_drop is {type(layer).__name__}, which drops nothing; "
            "timm makes a dropout only of a rate above 0: build the model with patch_drop_rate=0.5 (any rate will do)"
        )
    layer.prob = rate  # type: ignore[assignment]  # a plain float of timm's PatchDropout


def _check_resolution(model: nn.Module, side: float) -> None:
    embed = getattr(model, "patch_embed", None)
    built, patch = (tuple(getattr(embed, name, None) or ()) for name in ("img_size", "patch_size"))
    if built and set(built) != {side} and not getattr(model, "dynamic_img_size", False):
        raise UsageError(
            f"resolution={side:g}: {type(model).__name__} takes images of {built[0]} pixels alone; build the model "
            "with dynamic_img_size=True"
        )
    if patch and side % patch[0] and not getattr(embed, "dynamic_img_pad", False):
        raise UsageError(f"resolution={side:g} is not a multiple of the patch size, {patch[0]} pixels")
