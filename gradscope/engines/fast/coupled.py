"""Refuse loss terms that depend on other samples' activations: their gradients are not those of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradscope.errors import TaskError


def refuse_coupling(
    model: nn.Module,
    losses: Callable[[Any], Tensor],
    batch: Any,
    chosen_K: Tensor,
    mixed: Sequence[Sequence[str]],
) -> None:
    """Raise TaskError if the chosen samples' losses reach other samples; return if only the layout is unusual.

    `mixed`: parameters of the uses whose signals do not vanish for the other samples, in forward order.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.SyncBatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise TaskError(
                f"module {name!r} ({type(module).__name__} in training mode) mixes the samples of a batch, so "
                "gradients of single samples are not defined; "
                "use --estimator subbatch, or GroupNorm or LayerNorm in its place"
            )
    if _inputs_are_independent(losses, batch, chosen_K):
        return
    last = f" up to module {_module_of(model, mixed[-1])!r}" if mixed else ""
    raise TaskError(
        f"the loss terms mix samples{last}: term i has a gradient through other samples, so gradients of single "
        "samples are not defined; detach what is constant to the term (keys, targets), or use --estimator subbatch"
    )


def _inputs_are_independent(losses: Callable[[Any], Tensor], batch: Any, chosen_K: Tensor) -> bool:
    """Whether the chosen samples' losses have exactly no gradient with respect to the other samples' inputs.

    Where no input can carry a gradient: whether they stay the same when the others are replaced.
    """
    leaves: list[Tensor] = []

    def is_data(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(chosen_K)

    def attach(value: Any) -> Any:
        if is_data(value) and value.is_floating_point():
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1].view_as(leaves[-1])
        return value

    def replace(value: Any) -> Any:
        if not is_data(value):
            return value
        value = value.clone()
        value[~chosen_K.to(value.device)] = value[chosen_K.to(value.device)][0]
        return value

    losses_K = losses(tree_map(attach, batch))
    if not losses_K.requires_grad:
        return False
    if not leaves:
        others_K = losses(tree_map(replace, batch))
        return bool(torch.allclose(losses_K[chosen_K], others_K[chosen_K], rtol=1e-4, atol=1e-6))
    gradients = torch.autograd.grad(losses_K[chosen_K].sum(), leaves, allow_unused=True)
    return all(g is None or not bool((g != 0).reshape(len(g), -1).any(1)[~chosen_K].any()) for g in gradients)


def _module_of(model: nn.Module, names: Sequence[str]) -> str:
    """The module that owns the first of the parameters."""
    return names[0].rpartition(".")[0] or type(model).__name__
