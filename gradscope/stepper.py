"""One optimizer step of a pre-training method: learning rate, loss, gradient, AdamW, what follows it.

Everything random in a step is a function of the seed and the step alone, so a step is the same wherever it is taken
again, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradscope.config import Setting, TrainConfig
from gradscope.engines import derive_seed
from gradscope.errors import NonFiniteError, UsageError
from gradscope.methods import DINO, Method, Part
from gradscope.ranks import ALONE, Ranks
from gradscope.untouched import untouched
from schedulers import Strategy

GRAPHS = 4  # compiled graphs a strategy may need: query and key, with and without gradient, and small crops


class Stepper:
    """A model and its optimizer, and the step that moves them.

    `ranks` divide every batch: each is given the views of its `part`. With `compiled` torch.compile makes one graph per
    strategy, all before the first step (`warm_up`). Raises UsageError where the batch does not divide.
    """

    def __init__(
        self,
        setting: Setting,
        model: Method,
        *,
        device: torch.device,
        ranks: Ranks = ALONE,
        compiled: bool = False,
    ) -> None:
        config = setting.config
        if config.batch_size % (ranks.size * config.accumulate):
            raise UsageError(
                f"batch_size {config.batch_size} is not a multiple of {ranks.size} ranks x {config.accumulate} "
                "passes (accumulate)"
            )
        self.setting, self.config, self.device, self.ranks = setting, config, device, ranks
        self.model = model
        self.optimizer, self.parameter_names = new_optimizer(model, config, device)
        model.train_on(ranks)
        self.compiled = compiled
        self._whole: nn.Module = model

    @property
    def part(self) -> Part:
        """The rows of every batch that this rank computes."""
        share = self.config.batch_size // self.ranks.size
        return Part(self.ranks.rank * share, (self.ranks.rank + 1) * share, self.config.batch_size)

    def start(self, strategies: Sequence[Strategy]) -> None:
        """Wrap for several ranks and compile; once, after the parameters were loaded."""
        if self.compiled:
            limit = max(torch._dynamo.config.recompile_limit, GRAPHS * (len(strategies) + 1))
            torch._dynamo.config.recompile_limit = limit
            torch._dynamo.config.accumulated_recompile_limit = max(
                torch._dynamo.config.accumulated_recompile_limit, 4 * limit
            )
            for backbone in {self.model.backbone, getattr(self.model, "momentum_backbone", self.model.backbone)}:
                backbone.compile(dynamic=False)
            self._warm_up(strategies)
        if self.ranks.size > 1:
            self._whole = DistributedDataParallel(self.model, **_no_buffers())

    def step(self, step: int, fraction: float, strategy: Strategy, views: Sequence[Tensor]) -> tuple[float, float]:
        """Take step number `step` at `fraction` of the budget: the mean loss over all ranks, and the learning rate.

        `views` are those of `part`. Raises NonFiniteError, on all ranks, for a loss that is NaN or infinite on one, and
        for a gradient that is; the optimizer has moved nothing then.
        """
        config, model = self.config, self.model
        lr = config.learning_rate(fraction)
        for number, group in enumerate(self.optimizer.param_groups):  # the second, if any, does not decay
            group["lr"] = lr
            group["weight_decay"] = config.weight_decay_at(fraction) if number == 0 else 0.0
        model.before_step(fraction)
        self.optimizer.zero_grad(set_to_none=True)
        loss, targets = self._gradient(step, fraction, strategy, views)
        value = self.ranks.mean_of(float(loss))  # where it is not finite on one rank, no rank takes the step
        if not math.isfinite(value):
            raise NonFiniteError(
                f"step {step}: the loss is {value} under {strategy}; lower --lr (now {config.lr:g}) or "
                "lengthen the warm-up"
            )
        if not all_finite(p.grad for p in model.parameters() if p.grad is not None):
            raise NonFiniteError(
                f"step {step}: the gradient is not finite under {strategy}, though the loss is {value:.4g}; lower --lr "
                f"(now {config.lr:g}) or use --precision float32"
            )
        if config.clip:
            clip_each(model.parameters(), config.clip)
        if isinstance(model, DINO):
            for parameter in model.without_gradient(fraction):
                parameter.grad = None
        self.optimizer.step()
        model.after_step(fraction, targets)
        return value, lr

    def _gradient(
        self, step: int, fraction: float, strategy: Strategy, views: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Accumulate the gradient of the mean loss of the batch in `.grad`; the loss, and the targets of `views`."""
        config, model, part = self.config, self.model, self.part
        passes = config.accumulate
        size = (part.stop - part.start) // passes
        total = torch.zeros((), device=self.device)
        with self._autocast():
            targets = model.targets(views, strategy)
        for i in range(passes):
            here = Part(part.start + i * size, part.start + (i + 1) * size, part.total)
            some = views if passes == 1 else [view[i * size : (i + 1) * size] for view in views]
            generator = torch.Generator().manual_seed(derive_seed("mask", config.seed, step))
            last = i == passes - 1
            waiting = self._whole.no_sync() if isinstance(self._whole, DistributedDataParallel) and not last else None
            with waiting or contextlib.nullcontext():
                with self._autocast():
                    loss = self._whole(some, strategy, generator, targets, fraction, here)
                (loss if passes == 1 else loss / passes).backward()
            total = total + loss.detach() / passes
        return total, targets

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _warm_up(self, strategies: Sequence[Strategy]) -> None:
        """Compile every strategy's graph now, on random numbers; the model is left as it was."""
        part, data = self.part, self.setting.data
        count = part.stop - part.start
        views = [
            torch.randn(count, data.channels, a.size, a.size, device=self.device) for a in self.setting.augmentations
        ]
        with untouched(self.model):
            for strategy in strategies:
                self._gradient(0, 0.0, strategy, views)
        self.optimizer.zero_grad(set_to_none=True)


def _no_buffers() -> dict[str, Any]:
    """The argument that leaves buffers alone: they are the same on all ranks, and the gathering keeps them so."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}  # since 2.13


def new_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW over the trainable parameters, and their names in its order.

    Where biases and other one-dimensional parameters do not decay, they are a second group.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [(n, p) for n, p in named if config.decay_biases or (p.ndim > 1 and not n.endswith("bias"))]
    rest = [(n, p) for n, p in named if not any(p is q for _, q in decayed)]
    groups: list[dict[str, Any]] = [{"params": [p for _, p in decayed]}]
    if rest:
        groups.append({"params": [p for _, p in rest]})
    optimizer = torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=True if device.type == "cuda" else None,
    )
    return optimizer, [name for name, _ in (*decayed, *rest)]


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number of the tensors is NaN or infinite."""
    some = [tensor for tensor in tensors if tensor.numel()]
    return not some or bool(torch.stack(torch._foreach_norm(some, math.inf)).isfinite().all())


@torch.no_grad()
def clip_each(parameters: Iterable[nn.Parameter], most: float) -> None:
    """Scale the gradient of every parameter, each by itself, to a norm of at most `most` (as DINO's training does)."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    factors = [(most / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(gradients)]
    torch._foreach_mul_(gradients, factors)


def second_moments(content: Mapping[str, Any], device: torch.device) -> dict[str, Tensor] | None:
    """Adam's bias-corrected second moment by parameter name, from a checkpoint.

    None where a parameter was never moved: before the first step, and while DINO's last layer is frozen.
    """
    states, beta2 = content["optimizer"]["state"], content["optimizer"]["param_groups"][0]["betas"][1]
    names = content["parameter_names"]
    if any(i not in states for i in range(len(names))):
        return None
    return {
        name: states[i]["exp_avg_sq"].to(device) / (1 - beta2 ** float(states[i]["step"]))
        for i, name in enumerate(names)
    }
