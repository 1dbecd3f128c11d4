"""The bundled tasks: profile the checkpoints that `gradscope train` wrote."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradscope.checkpoints import list_checkpoints, load_checkpoint
from gradscope.config import Setting, config_of, open_setting
from gradscope.engines import derive_seed
from gradscope.errors import CheckpointError, UsageError
from gradscope.methods import MoCoV3
from gradscope.pilot import stages_json
from gradscope.task import Checkpoint, Task
from schedulers import Grid, Schedule, Strategy, paper_cost, token_cost, token_counts


class PretrainTask(Task):
    """A bundled method on its training data, as its checkpoints' configuration describes it.

    `grid` and `batch_size` default to the run's own. The momentum encoder is not updated: the loss is
    called as training calls it, without the update that stands beside it.
    """

    independent_terms = False  # the queries of a batch share their negatives

    def __init__(
        self,
        setting: Setting,
        *,
        grid: Grid | None = None,
        batch_size: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.setting = setting
        self.grid = grid or setting.config.grid(setting.image_size)
        self.batch_size = batch_size or setting.config.batch_size
        self.device = device or torch.device("cpu")
        self._keys = _PerBatch()

    @classmethod
    def from_folder(
        cls, folder: Path, *, data_folder: Path | None = None, device: torch.device | None = None
    ) -> PretrainTask:
        """The task of a folder of checkpoints. Raises CheckpointError when there are none, or of different runs."""
        checkpoints = list_checkpoints(folder)
        configs = [
            config_of(load_checkpoint(checkpoint.path, mmap=True), checkpoint.path) for checkpoint in checkpoints
        ]
        for checkpoint, config in zip(checkpoints, configs, strict=True):
            changed = configs[0].changed(config)
            if changed:
                raise CheckpointError(
                    f"{checkpoint.path}: another {', '.join(changed)} than {checkpoints[0].path.name}; "
                    "profile one run at a time"
                )
        return cls(open_setting(configs[0], data_folder), device=device)

    def load(self, checkpoint: Path) -> nn.Module:
        self._keys = _PerBatch()  # another model gives other keys
        content = load_checkpoint(checkpoint)
        model = self.setting.new_model()
        model.load_state_dict(content["model"])
        return model.to(self.device).train()

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """Views of `size` training images each, without replacement within an epoch."""
        return self.sub_batches(size, seed)

    def sub_batches(self, size: int, seed: int, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, ...]]:
        if type(self).batches is not PretrainTask.batches:  # a subclass has data of its own
            yield from super().sub_batches(size, seed, first, every)
            return
        images = len(self.setting.data.train_images)
        if size > images:
            raise UsageError(f"sub-batches of {size} samples: {self.setting.config.data} has only {images}")
        per_epoch, epoch, order_N = images // size, -1, torch.empty(0)
        for step in itertools.count(first, every):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order_N = self.setting.shuffled(epoch, derive_seed("profile", seed) % 2**31)
            start = step % per_epoch * size
            generator = torch.Generator().manual_seed(derive_seed("profile views", seed, step))
            yield self.setting.views(order_N[start : start + size], generator, self.device)

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, ...], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        return self.sample_losses(model, batch, strategy, generator).mean()

    def sample_losses(
        self, model: nn.Module, batch: tuple[Tensor, ...], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        """One term per query. MoCo-v3's heads hold BatchNorm, which couples them: no per-sample engine takes them."""
        assert isinstance(model, MoCoV3)
        patch = int(strategy.number("patch"))
        state = next(model.momentum_backbone.parameters())._version  # keys of a moved encoder are others
        key_BF = self._keys.of(batch[1], (patch, state), lambda: model.keys(batch[1], patch))
        return model.losses((batch[0], batch[1]), strategy, generator, key_BF=key_BF)

    def shared_costs(self, strategy: Strategy) -> Mapping[str, float]:
        """The key's pass, which all strategies of one patch size share (the key drops no tokens)."""
        counts = token_counts(self.setting.image_size, self.setting.config.patch, strategy)
        return {f"key patch={strategy['patch']}": counts.key / counts.base}

    def cost(self, strategy: Strategy) -> float:
        return token_cost(self.setting.config.method, self.setting.image_size, self.setting.config.patch, strategy)

    def other_costs(self, strategy: Strategy) -> Mapping[str, float]:
        config = self.setting.config
        return {"paper": paper_cost(config.method, self.setting.image_size, config.patch, strategy)}

    def tokens(self, strategy: Strategy) -> Mapping[str, int]:
        counts = token_counts(self.setting.image_size, self.setting.config.patch, strategy)
        return {"query": counts.query, "key": counts.key}

    def checkpoints(self, folder: Path) -> Sequence[Checkpoint]:
        return list_checkpoints(folder)

    def second_moment(self, checkpoint: Path, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Adam's v / (1 - beta2^t) as the checkpoint's optimizer holds it; None before the first step."""
        content = load_checkpoint(checkpoint)
        states, beta2 = content["optimizer"]["state"], content["optimizer"]["param_groups"][0]["betas"][1]
        if not states:
            return None
        return {
            name: states[i]["exp_avg_sq"].to(self.device) / (1 - beta2 ** float(states[i]["step"]))
            for i, name in enumerate(content["parameter_names"])
        }

    def describe(self) -> Mapping[str, Any]:
        return {
            "task": "gradscope.tasks:PretrainTask",
            "config": self.setting.config.to_dict(),
            "data": self.setting.data.digest,
        }

    def training(self, folder: Path) -> Mapping[str, Any]:
        content = load_checkpoint(list_checkpoints(folder)[-1].path, mmap=True)
        schedule = Schedule.from_json(content["schedule"])
        stages = [
            f"{stage.start:g}-{stage.end:g}: " + " | ".join(str(s) for s, weight in stage.mixture if weight > 0)
            for stage in schedule.stages
        ]
        return {
            "schedule": "; ".join(stages),
            "strategies": [str(strategy) for strategy in schedule.strategies],
            "budget": self.setting.config.budget,
            "stages": stages_json(schedule),
        }


class _PerBatch:
    """What is computed once for a batch and then used again, as long as the same batch comes back."""

    def __init__(self) -> None:
        self._batch: Tensor | None = None
        self._values: dict[Hashable, Tensor] = {}

    def of(self, batch: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        if batch is not self._batch:
            self._batch, self._values = batch, {}
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]
