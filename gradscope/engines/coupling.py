"""What couples the samples of a sub-batch, so that the gradient of one loss term is no function of one sample.

The gradient of loss term i is defined where term i depends on the *trainable* computation of sample i alone.
What other samples give it as a constant (keys of a momentum encoder, a teacher's outputs) does no harm;
BatchNorm in training mode, or the two-sided loss of SimCLR, does (design section 3).

Coupling is found by behaviour: on a few samples, the derivative of each loss term with respect to what every
module returns must vanish in the rows of the other samples. The modules' types only give it a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from gradscope.engines._samples import losses_of, sample_tensors, take
from gradscope.errors import TaskError
from gradscope.task import Task
from gradscope.untouched import untouched
from schedulers import Strategy

PROBE = 3  # samples; two would not tell a row per sample from a row per pair
LEAK = 1e-6  # of the largest row of a derivative: another sample's row above it is coupling, not rounding


@dataclass(frozen=True)
class _Call:
    """What one call of a module returned."""

    name: str
    module: nn.Module
    output: Tensor


def coupled_modules(model: nn.Module) -> list[tuple[str, str]]:
    """(name, why) of every module known to compute with, or to keep, statistics of the batch it is given."""
    found = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _BatchNorm):
            if module.training:
                found.append((name, f"{kind} in training mode normalises with the statistics of the batch"))
            elif not module.track_running_stats:
                found.append((name, f"{kind} without running statistics normalises with those of the batch"))
        elif isinstance(module, _InstanceNorm) and module.training and module.track_running_stats:
            found.append((name, f"{kind} in training mode averages its running statistics over the batch"))
    return found


def check_uncoupled(task: Task, model: nn.Module, batch: Any, strategy: Strategy, *, seed: int) -> None:
    """Raise TaskError, naming the module or the loss and the cure, when the terms of a sub-batch are coupled.

    Costs forward and backward passes of PROBE samples; the model and the random streams are left as found.
    """
    if why := find_coupling(task, model, batch, strategy, seed=seed):
        raise TaskError(f"per-sample gradients are undefined: {why}")


def find_coupling(task: Task, model: nn.Module, batch: Any, strategy: Strategy, *, seed: int) -> str | None:
    """What couples the samples under `strategy`, with the cure, or None.

    Also tells, as a reason to refuse, when the model calls no module with gradient and a row per sample.
    """
    count = min(PROBE, len(sample_tensors(batch)[0]))
    if count == 1:
        return None
    with untouched(model):
        _fill_zeros(model, seed)
        few = take(batch, slice(count))
        fewer_calls: list[_Call] = []
        if count > 2 or not coupled_modules(model):  # BatchNorm cannot train on a single sample
            _, fewer_calls = _observe(task, model, take(batch, slice(count - 1)), strategy, seed)
        losses, calls = _observe(task, model, few, strategy, seed)
        if not losses.requires_grad:
            raise TaskError("sample_losses carries no gradient; compute it from the model's trainable parameters")
        statistics = {name: why for name, why in coupled_modules(model) if "normalises" in why}
        if named := next((c.name for c in calls if c.name in statistics and c.output.requires_grad), None):
            return f"module {named!r} couples the samples: {statistics[named]}; {_cure(norm=True)}"
        calls = [c for c in _batch_led(calls, fewer_calls, count) if c.output.requires_grad]
        if not calls:
            return (
                "no module of the model returns a row per sample with a gradient, so coupled samples could not be "
                f"told from others; call the model's parts as modules, or {_cure()}"
            )
        leaking = max((_last_leak(loss, calls, count) for loss in losses), default=-1)
        if leaking < 0:
            return None
        culprit = next((c for c in calls[leaking + 1 :] if _reads(c, calls[leaking])), None)
    if culprit is None:
        return f"the loss couples the samples of a sub-batch: a term's gradient reaches other samples; {_cure()}"
    name = f"module {culprit.name!r}" if culprit.name else "the model's own forward"
    return f"{name} ({type(culprit.module).__name__}) couples the samples of a sub-batch; {_cure(norm=True)}"


def _cure(*, norm: bool = False) -> str:
    return "use GroupNorm or LayerNorm in its place, or --estimator subbatch" if norm else "use --estimator subbatch"


@torch.no_grad()
def _fill_zeros(model: nn.Module, seed: int) -> None:
    """Give parameters that are all zero (a head before training) small values: they would hide what they follow."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.any():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.copy_(noise * 0.02)


def _observe(task: Task, model: nn.Module, batch: Any, strategy: Strategy, seed: int) -> tuple[Tensor, list[_Call]]:
    """The loss terms and every tensor with a dimension that a module returned on the way, in order."""
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(
            lambda module, _, output, name=name: calls.extend(_Call(name, module, t) for t in _tensors(output))
        )
        for name, module in model.named_modules()
    ]
    try:
        losses = losses_of(task, model, batch, strategy, seed=seed)
    finally:
        for handle in handles:
            handle.remove()
    return losses, list(calls)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.ndim else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, tuple | list) else []


def _batch_led(calls: list[_Call], fewer_calls: list[_Call], count: int) -> list[_Call]:
    """The calls whose leading dimension grows with the number of samples (not tokens that happen to be as many)."""
    if len(calls) != len(fewer_calls):
        return [c for c in calls if len(c.output) % count == 0]
    return [
        c
        for c, fewer in zip(calls, fewer_calls, strict=True)
        if len(c.output) * (count - 1) == len(fewer.output) * count and len(c.output) >= count
    ]


def _last_leak(loss: Tensor, calls: list[_Call], count: int) -> int:
    """Index of the last call of which a loss term reads more rows than one sample has; -1 when there is none.

    With r rows a sample (views or tokens stacked in any order) a term may read r rows.
    """
    rows = torch.autograd.grad(loss, [c.output for c in calls], retain_graph=True, allow_unused=True)
    leaks = [-1]
    for i, row in enumerate(rows):
        if row is not None:
            norms = row.detach().flatten(1).double().norm(dim=1) if row.ndim > 1 else row.detach().double().abs()
            read = int((norms > LEAK * norms.max()).sum())
            if read > len(norms) // count:
                leaks.append(i)
    return max(leaks)


def _reads(call: _Call, earlier: _Call) -> bool:
    """Whether what a call returned was computed from what an earlier one returned."""
    (gradient,) = torch.autograd.grad(call.output.sum(), [earlier.output], retain_graph=True, allow_unused=True)
    return gradient is not None
