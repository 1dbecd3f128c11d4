"""A callback for the Trainer of Hugging Face's `transformers`.

    def controller(model, optimizer):
        return AdaptiveController(task, model, optimizer, budget="2M", batch_size=64)

    Trainer(model, args, train_dataset=data, callbacks=[OnlineCallback(controller)])

The strategy must act inside the model (or `compute_loss`): the Trainer fetches the batches of a step before it begins,
so a data collator would use the strategy of the step before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from gradscope.adaptive import AdaptiveController
from gradscope.errors import CheckpointError, UsageError
from gradscope.files import write_text
from gradscope.integrations.common import Apply, Follower, MakeController, framework_class, set_strategy
from schedulers import Strategy

STATE_NAME = "gradscope_online.json"
_FOUND, _MISSING = framework_class(["transformers"], "TrainerCallback")
if TYPE_CHECKING:
    _TrainerCallback = object
else:
    _TrainerCallback = _FOUND


class OnlineCallback(_TrainerCallback):
    """Runs an online controller: strategy before each optimizer step, observation after backward, stop at the end.

    `controller`: an AdaptiveController, or a function (model, optimizer) -> AdaptiveController that is called when
    training begins, for the optimizer that the Trainer makes. `apply(model, strategy)` tells the model; by default its
    attribute `strategy` is set. `strategy` is that of the current or last optimizer step; between steps, where the
    Trainer evaluates, and afterwards, the model has the reference.

    With gradient accumulation all batches of an optimizer step have one strategy, and the controller's `batch_size`
    counts them all. The state lies in each checkpoint's folder as `gradscope_online.json`. When training is resumed it
    is read from `resume_from`, else from the Trainer's argument `resume_from_checkpoint`, else from the folder
    `checkpoint-STEP` of `output_dir`. Raises UsageError without transformers, CheckpointError where the state is
    missing.
    """

    def __init__(
        self,
        controller: AdaptiveController | MakeController,
        *,
        apply: Apply = set_strategy,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        if _MISSING:
            raise UsageError(f"OnlineCallback needs transformers ({_MISSING}): pip install transformers accelerate")
        super().__init__()
        self._follower = Follower(controller, apply)
        self._resume_from = resume_from

    @property
    def controller(self) -> AdaptiveController:
        return self._follower.controller

    @property
    def strategy(self) -> Strategy | None:
        return self._follower.strategy

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        step, optimizer = state.global_step, kwargs["optimizer"]
        self._follower.build(model, getattr(optimizer, "optimizer", optimizer), step)  # accelerate wraps it
        if step > 0:
            self._follower.load_state_dict(_read(self._folder(args, step) / STATE_NAME, step))
        self._follower.begin(step)
        self._follower.rest(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self._follower.before_step(model, state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._follower.after_backward(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Rest, for an evaluation may follow; at the end of the budget stop as the Trainer does at its last step."""
        self._follower.rest(model)
        if self.controller.finished:
            control.should_training_stop = True
            control.should_save = control.should_save or args.save_strategy == "steps"
            control.should_evaluate = control.should_evaluate or args.eval_strategy == "steps"

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:  # another rank does
            return
        folder = _checkpoint(args, state.global_step)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: no such folder, so the controller's state cannot be saved in the checkpoint; "
                "hyperparameter searches are not supported"
            )
        write_text(folder / STATE_NAME, json.dumps(self._follower.state_dict()))

    def _folder(self, args: Any, step: int) -> Path:
        if self._resume_from is not None:
            return Path(self._resume_from)
        told = args.resume_from_checkpoint
        return Path(told) if isinstance(told, str) and Path(told).is_dir() else _checkpoint(args, step)


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"checkpoint-{step}"


def _read(path: Path, step: int) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing, and training resumes at optimizer step {step}: resume from a checkpoint that was saved "
            "with this callback, and where it lies elsewhere name its folder: OnlineCallback(..., resume_from=FOLDER)"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); resume from an earlier checkpoint") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds no controller's state; resume from an earlier checkpoint")
    return state
