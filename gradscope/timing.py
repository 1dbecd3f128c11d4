"""Measured costs: what a training step takes under each strategy on this device, beside what token counts say.

Timed is what a step does with the model: setting gradients to none, loss, backward, and an AdamW step over the
trainable parameters. Loading and augmenting data is not in it, nor what a trainer does besides (a momentum
encoder's update). A step's work that does not depend on the strategy (the optimizer, heads) is divided by the
batch, so costs hold for about the batch size they were measured at.
"""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gradscope.config import Setting, TrainConfig
from gradscope.data import image_data
from gradscope.engines import derive_seed
from gradscope.engines.flat import seed_streams
from gradscope.errors import NonFiniteError, TaskError, UsageError
from gradscope.measuring import failure
from gradscope.task import Task, task_digest
from gradscope.tasks import PretrainTask
from gradscope.untouched import untouched
from schedulers import Grid, Strategy

Report = Callable[[float, str], None]  # (fraction of the work done, one line of news)
NAN = float("nan")


@dataclass(frozen=True)
class StrategyCost:
    """What one sample of a training step costs; all NaN, and `failure` says why, where the loss fails.

    `seconds`: the median over rounds; `spread`: the distance of its quartiles over the median. `flops`:
    floating-point operations of loss and backward, a multiplication and an addition counting two. `memory`:
    bytes that the loss keeps for the backward pass besides parameters and buffers.
    """

    seconds: float = NAN
    spread: float = NAN
    flops: float = NAN
    memory: float = NAN
    failure: str = ""


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs of strategies, the reference among them, and the conditions under which they were measured.

    `source`: of which model and data, the digest of the measured task or, of a synthetic one, a description.
    """

    reference: Strategy
    costs: Mapping[Strategy, StrategyCost]
    device: str
    threads: int
    batch_size: int
    repeats: int
    date: str
    source: str = ""

    def __getitem__(self, strategy: Strategy) -> StrategyCost:
        return self.costs[strategy]

    @property
    def failures(self) -> dict[str, str]:
        return {str(strategy): cost.failure for strategy, cost in self.costs.items() if cost.failure}

    def units(self, reference_cost: float, quantity: str = "seconds") -> dict[Strategy, float]:
        """Cost in units, reference_cost · q / q(reference), where q is `seconds`, `flops` or `memory`.

        The reference costs `reference_cost`, the units per sample that its token counts give it.
        """
        base = float(getattr(self.costs[self.reference], quantity))
        return {s: reference_cost * float(getattr(cost, quantity)) / base for s, cost in self.costs.items()}

    def about(self) -> dict[str, Any]:
        """The conditions, every strategy's spread, and the failures: plain JSON values for a cube's attribute."""
        return {
            "device": self.device,
            "threads": self.threads,
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "date": self.date,
            "source": self.source,
            "spread": {str(s): round(cost.spread, 4) for s, cost in self.costs.items() if not cost.failure},
            "failures": self.failures,
        }


def measure_costs(
    task: Task,
    model: nn.Module,
    strategies: Sequence[Strategy],
    *,
    batch_size: int,
    repeats: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    report: Report | None = None,
) -> MeasuredCosts:
    """Time, FLOPs and memory of a training step of `batch_size` samples under each strategy and the reference.

    One pass counts operations and bytes. Then every round times each strategy once, in an order that is
    rotated from round to round, for what else the machine does changes with time; the first round is not
    counted, and of the other `repeats` the median is taken. Every call gets a copy of the batch of its own, so
    that a task which keeps something for the next strategy of one batch (the bundled one its keys) pays anew.
    The model is left untouched; the optimizer's step has learning rate 0. Raises UsageError for `batch_size`
    below 2 or `repeats` below 1, and TaskError when the task gives no batch or the reference's loss fails.
    """
    if batch_size < 2:
        raise UsageError(f"batch_size={batch_size}: a step needs at least 2 samples")
    if repeats < 1:
        raise UsageError(f"repeats={repeats}: at least 1 round is needed")
    batch = next(iter(task.batches(batch_size, derive_seed("cost", seed) % 2**31)), None)
    if batch is None:
        raise TaskError(f"batches(size={batch_size}) yields nothing")
    reference = task.grid.reference
    ordered = list(dict.fromkeys([reference, *strategies]))
    with untouched(model):
        steps = _Steps(task, model, batch, seed, clock)
        counted, seconds = dict[Strategy, tuple[int, float]](), dict[Strategy, list[float]]()
        failures: dict[Strategy, str] = {}
        for number in range(repeats + 2):
            shift = 0 if number < 2 else (number - 2) * len(ordered) // repeats
            for strategy in [*ordered[shift:], *ordered[:shift]]:
                if strategy in failures:
                    continue
                try:
                    if number == 0:
                        counted[strategy] = steps.count(strategy)
                    else:
                        seconds.setdefault(strategy, []).append(steps.time(strategy))
                except Exception as error:
                    failures[strategy] = failure(error)
                    steps.clear()
            if reference in failures:
                raise TaskError(f"the loss fails under the reference {reference}: {failures[reference]}")
            if report is not None:
                report((number + 1) / (repeats + 2), f"round {number + 1} of {repeats + 2}")
    costs = {
        s: StrategyCost(failure=failures[s]) if s in failures else _cost(seconds[s][1:], counted[s], batch_size)
        for s in ordered
    }
    device, today = device_name(_device_of(model)), datetime.now(UTC).date().isoformat()
    source = task.source if isinstance(task, SyntheticTask) else task_digest(task)
    return MeasuredCosts(reference, costs, device, torch.get_num_threads(), batch_size, repeats, today, source)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == "model name")
    return next(named, "") or platform.processor() or platform.machine()


class SyntheticTask(PretrainTask):
    """A bundled method with random weights on random numbers in place of images: what it costs is the same.

    `load` makes a new model whatever the path; `source` names it. Raises UsageError as TrainConfig does.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        method: str = "mocov3",
        model: str = "small",
        image_size: int = 240,
        batch_size: int = 64,
        device: torch.device | None = None,
        small_crops: int | None = None,
    ) -> None:
        crops = {} if small_crops is None else {"small_crops": small_crops}
        config = TrainConfig.for_run(
            method, model, budget=1.0, patch=int(grid.reference.number("patch")), batch_size=batch_size, **crops
        )
        blank = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
        blank[0] = 1  # statistics of images that are all the same are refused
        labels = torch.arange(2)
        data = image_data(
            "synthetic", train_images=blank, train_labels=labels, test_images=blank, test_labels=labels,
            classes=("a", "b"),
        )  # fmt: skip
        super().__init__(Setting(config, data, ()), grid=grid, device=device)
        self.source = f"random numbers, model {model}, method {method}, image {image_size}"

    def load(self, checkpoint: Path | None = None) -> nn.Module:
        return self.setting.new_model().to(self.device).train()

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
        """The method's views, of standard normal numbers, each (size, 3, S, S)."""
        generator, config = torch.Generator().manual_seed(seed), self.setting.config
        side = self.setting.image_size
        sides = [side, side, *[config.small_crop_size(side)] * config.small_crops]
        while True:
            yield tuple(torch.randn(size, 3, s, s, generator=generator).to(self.device) for s in sides)


class _Steps:
    """Training steps of one model on copies of one batch; to be used inside `untouched`."""

    def __init__(self, task: Task, model: nn.Module, batch: Any, seed: int, clock: Callable[[], float]) -> None:
        self.task, self.model, self.batch, self.seed, self.clock = task, model, batch, seed, clock
        self.device = _device_of(model)
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        if not self.trainable:
            raise TaskError("the model has no trainable parameter")
        self.optimizer = torch.optim.AdamW(self.trainable, lr=0.0, weight_decay=0.0)

    def count(self, strategy: Strategy) -> tuple[int, float]:
        """FLOPs of loss and backward, and bytes kept between them, of the whole batch.

        Raises NonFiniteError for a loss or gradient that is not finite.
        """
        batch, generator = self._fresh(strategy)
        kept = _KeptBytes(self.model)
        self.clear()
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
                loss = self.task.loss(self.model, batch, strategy, generator)
            loss.backward()  # type: ignore[no-untyped-call]
        if not torch.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss.item()} under {strategy}")
        if not all(torch.isfinite(p.grad).all() for p in self.trainable if p.grad is not None):
            raise NonFiniteError(f"the gradient is not finite under {strategy}")
        return counter.get_total_flops(), kept.total

    def time(self, strategy: Strategy) -> float:
        """Seconds of one step."""
        batch, generator = self._fresh(strategy)
        start = self._now()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, batch, strategy, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return self._now() - start

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _fresh(self, strategy: Strategy) -> tuple[Any, torch.Generator]:
        seed = derive_seed("cost", self.seed, strategy)
        seed_streams(seed)
        return copy.deepcopy(self.batch), torch.Generator().manual_seed(seed)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()


class _KeptBytes:
    """Bytes of the distinct storages that autograd saves, those of a model's parameters and buffers left out.

    Storages are held, so that one that is freed early cannot be taken for the next one at its place. The sum is
    NaN once a tensor is saved that has no storage of its own (a sparse one).
    """

    def __init__(self, model: nn.Module) -> None:
        own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._own, self._seen = {storage._cdata for storage in own}, dict[int, torch.UntypedStorage]()
        self.total = 0.0

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided:
            self.total = NAN
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.total += storage.nbytes()
        return tensor


def _cost(seconds: Sequence[float], counted: tuple[int, float], batch_size: int) -> StrategyCost:
    low, middle, high = (float(value) / batch_size for value in np.quantile(seconds, [0.25, 0.5, 0.75]))
    flops, memory = counted
    return StrategyCost(middle, (high - low) / middle, flops / batch_size, memory / batch_size)


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **_: Any) -> int:
    """Of the shapes (B, H, L, E), (B, H, S, E), (B, H, S, V): scores and their product with the values."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Scores once more; gradients of scores, queries, keys and values."""
    return 2 * math.prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


# PyTorch (2.13) counts fused attention on CUDA only; the CPU's kernel, which also recomputes the scores in its
# backward pass, would count nothing.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
