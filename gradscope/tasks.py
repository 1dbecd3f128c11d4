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
from gradscope.methods import METHODS, Method
from gradscope.pilot import stages_json
from gradscope.ranks import ALONE
from gradscope.stepper import second_moments
from gradscope.task import Checkpoint, Task
from schedulers import Grid, Schedule, Strategy, TokenCounts, paper_cost, patch_tokens, token_counts


class PretrainTask(Task):
    """A bundled method on its training data, as its checkpoints' configuration describes it.

    `grid` and `batch_size` default to the run's own. Momentum encoder, teacher and centre are not moved: the loss is
    called as training calls it, without the updates that stand beside it.
    """

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
        self.independent_terms = METHODS[setting.config.method].independent_terms
        self.fraction = 1.0  # of the budget, at which the loaded model stood
        self._targets = _PerBatch()

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
        self._targets = _PerBatch()  # another model gives other targets
        content = load_checkpoint(checkpoint)
        self.fraction = min(content["units"] / self.setting.config.budget, 1.0)
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
        images = self.setting.data.train_count
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
        """One term per image. BatchNorm (MoCo-v3, SimCLR) couples them, so no per-sample engine takes those."""
        assert isinstance(model, Method)
        versions = tuple(p._version for p in model.parameters() if not p.requires_grad)  # of a moved encoder
        key = (model.target_key(strategy), versions)
        targets = self._targets.of(batch[1], key, lambda: model.targets(batch, strategy))
        return model.losses(batch, strategy, generator, targets=targets, fraction=self.fraction)

    def shared_costs(self, strategy: Strategy) -> Mapping[str, float]:
        """The pass of the key encoder or teacher, which all strategies with equal targets share."""
        config = self.setting.config
        if config.method == "simclr":
            return {}
        counts = self._counts(strategy)
        shared = f"key patch={strategy['patch']}" if config.method == "mocov3" else "key"
        return {shared: counts.key / counts.base}

    def cost(self, strategy: Strategy) -> float:
        return self.setting.cost(strategy)

    def other_costs(self, strategy: Strategy) -> Mapping[str, float]:
        config, size = self.setting.config, self.setting.image_size
        small = patch_tokens(config.small_crop_size(size), config.patch) + 1 if config.small_crops else 0
        return {"paper": paper_cost(config.method, size, config.patch, strategy, small=small, crops=config.small_crops)}

    def tokens(self, strategy: Strategy) -> Mapping[str, int]:
        counts = self._counts(strategy)
        return {"query": counts.query, "key": counts.key}

    def _counts(self, strategy: Strategy) -> TokenCounts:
        config = self.setting.config
        return token_counts(self.setting.image_size, config.patch, strategy, method=config.method)

    def checkpoints(self, folder: Path) -> Sequence[Checkpoint]:
        return list_checkpoints(folder)

    def second_moment(self, checkpoint: Path, model: nn.Module) -> Mapping[str, Tensor] | None:
        """Adam's v / (1 - beta2^t) as the checkpoint's optimizer holds it; None before the first step."""
        return second_moments(load_checkpoint(checkpoint), self.device)

    def describe(self) -> Mapping[str, Any]:
        return {
            "task": "gradscope.tasks:PretrainTask",
            "config": self.setting.config.identity(),
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


class TrainingTask(PretrainTask):
    """The task of a run while it trains: the model is the one in training, and every rank probes by itself."""

    def sample_losses(
        self, model: nn.Module, batch: tuple[Tensor, ...], strategy: Strategy, generator: torch.Generator
    ) -> Tensor:
        assert isinstance(model, Method)
        model.train_on(ALONE)  # a probe puts back what training had; its ranks have sub-batches of their own
        return super().sample_losses(model, batch, strategy, generator)

    def training(self, folder: Path) -> Mapping[str, Any]:
        return {}

    def forget(self) -> None:
        """Let go of the last batch and its targets."""
        self._targets = _PerBatch()


class _PerBatch:
    """What is computed once for a batch and then used again, as long as the same batch comes back."""

    def __init__(self) -> None:
        self._batch: Tensor | None = None
        self._values: dict[Hashable, Tensor | None] = {}

    def of(self, batch: Tensor, key: Hashable, compute: Callable[[], Tensor | None]) -> Tensor | None:
        if batch is not self._batch:
            self._batch, self._values = batch, {}
        if key not in self._values:
            self._values[key] = compute()
        return self._values[key]
