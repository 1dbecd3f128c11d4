"""Training on from a checkpoint for a while, under other strategies than its run would have had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gradscope.checkpoints import checkpoint_path, list_steps, save_checkpoint
from gradscope.engines import derive_seed
from gradscope.methods import Part
from gradscope.stepper import Stepper
from gradscope.trainer import load_run
from schedulers import Strategy


def branch(
    checkpoint: Path, at: Callable[[int], Strategy], units: Sequence[float], folders: Sequence[Path], device: str
) -> list[Path]:
    """Checkpoints after each of `units` (ascending, on top of those of `checkpoint`), each alone in its folder.

    `at(step)` names the strategy of a step. Learning rate, momentum and data go on as they would have in the run.
    What is there is not made again, unless one is missing.
    """
    if all(list_steps(folder) for folder in folders):
        return [list_steps(folder)[0] for folder in folders]
    setting, model, content = load_run(checkpoint)
    config, here = setting.config, torch.device(device)
    stepper = Stepper(setting, model.to(here), device=here)
    stepper.optimizer.load_state_dict(content["optimizer"])
    whole = Part(0, config.batch_size, config.batch_size)
    step, spent = int(content["step"]), float(content["units"])
    paths = []
    for most, folder in zip(units, folders, strict=True):
        while True:
            strategy = at(step)
            cost = config.batch_size * model.cost(strategy)
            if spent + cost > content["units"] + most:
                break
            epoch, position = divmod(step, setting.steps_per_epoch)
            indices_B = setting.shuffled(epoch, config.seed)[position * config.batch_size :][: config.batch_size]
            generator = torch.Generator().manual_seed(derive_seed("views", config.seed, step))
            views = setting.finish(setting.prepare(indices_B, generator, whole), here)
            stepper.step(step, min(spent / config.budget, 1.0), strategy, views)
            step, spent = step + 1, spent + cost
        paths.append(checkpoint_path(folder, step))
        folder.mkdir(parents=True, exist_ok=True)
        moved = {"model": model.state_dict(), "optimizer": stepper.optimizer.state_dict()}
        save_checkpoint(paths[-1], {**content, **moved, "step": step, "units": spent})
    return paths
